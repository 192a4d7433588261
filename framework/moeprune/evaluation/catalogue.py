"""lm-eval's tasks by name: where their files are, what they consist of, and loading them with one sentence per failure.

lm-eval parses all of its 14,000 task files to find one, which takes it 8 to 20 seconds. Here the names are looked up in their text,
and only the folders that hold the wanted ones are handed to lm-eval.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from moeprune.errors import UserError

_NAME = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*$""", re.MULTILINE)
_INCLUDE = re.compile(rb"""^["']?include["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*$""", re.MULTILINE)
_TAG = re.compile(rb"""^["']?tag["']?:[ \t]*(\[[^]]*\]|[^\s#]+|(?:\s*\n[ \t]*-[^\n]*)+)""", re.MULTILINE)
GENERATED = "made by the task"


class Catalogue:
    """The task files that some names need.

    Args:
        names: of tasks, groups or tags.
        folders: with task files beside lm-eval's own, which they go before.
        metadata: handed to tasks that make their own documents.

    Raises:
        UserError: a name that lm-eval does not know.
    """

    def __init__(
        self, names: Sequence[str], folders: Sequence[Path] = (), metadata: Mapping[str, Any] | None = None
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        needed: set[Path] = set()
        while True:
            self._manager = TaskManager(
                include_path=[*sorted(needed), *folders], include_defaults=False, metadata=dict(metadata or {})
            )
            found = needed | {folder for name in self._reached(names) for folder in self._homes(name)}
            found = {folder for folder in found if not found & set(folder.parents)}
            if found == needed:
                break
            needed = found
        for name in self._reached(names):
            if name not in self._manager.task_index:
                near = difflib.get_close_matches(name, _named(), n=3, cutoff=0.6)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists all of them"
                raise UserError(f"lm-eval has no task {name!r}; {hint}")

    def _reached(self, names: Sequence[str]) -> list[str]:
        """The names and, as far as they are known, everything they consist of."""
        reached, open_ = dict.fromkeys(names), list(names)
        while open_:
            name = open_.pop(0)
            children = self._children(name) if name in self._manager.task_index else []
            open_ += [child for child in children if child not in reached]
            reached |= dict.fromkeys(children)
        return list(reached)

    def _homes(self, name: str) -> list[Path]:
        """Folders of lm-eval that must be read for `name`."""
        entry = self._manager.task_index.get(name)
        if entry is not None and entry.kind.name != "TAG":
            return []
        homes = [_named()[name].parent] if name in _named() else []
        return [*homes, _tagged(name)] if name in _tags() else homes

    def _children(self, name: str) -> list[str]:
        entry = self._manager.task_index[name]
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        return self._members((entry.cfg or {}).get("task")) if entry.kind.name == "GROUP" else []

    def _members(self, members: Any) -> list[str]:
        """Names that a group's file lists; those of groups it defines in place are replaced by what these list, and tasks it
        defines in place are left out.
        """
        found: list[str] = []
        for member in members if isinstance(members, list) else []:
            if isinstance(member, str):
                found.append(member)
            elif isinstance(member.get("task"), list):
                found += self._members(member["task"])
            else:
                name = member.get("group", member.get("task"))
                if name in self._manager.task_index or name in _named() or name in _tags():
                    found.append(name)
        return found

    def leaves(self, name: str) -> list[str]:
        """The tasks that a group or tag consists of, each once; the name itself if it is a task."""
        if self._manager.task_index[name].kind.name not in ("GROUP", "TAG"):
            return [name]
        return list(dict.fromkeys(leaf for child in self._children(name) for leaf in self.leaves(child)))

    def config(self, task: str) -> dict[str, Any]:
        """The task's file as it stands."""
        return dict(self._manager.task_index[task].cfg or {})

    def data(self, name: str) -> str:
        """The data sets of a task or group; '' where the file does not say."""
        found = []
        for leaf in self.leaves(name):
            path = self.config(leaf).get("dataset_path")
            found.append(GENERATED if path == "" or ("custom_dataset" in self.config(leaf) and not path) else path)
        return ", ".join(dict.fromkeys(path for path in found if path))

    def runs_code(self, name: str) -> bool:
        """Whether scoring the task runs code that the model wrote."""
        return any(self.config(leaf).get("unsafe_code") for leaf in self.leaves(name))

    def load(self, name: str, data: str = "") -> dict[str, Any]:
        """Task objects by name, with their documents.

        Args:
            name: of a task, group or tag.
            data: what to call its data set where the file does not say.

        Raises:
            UserError: data that is not at hand, a package that is not installed, or whatever else lm-eval runs into.
        """
        data = data or self.data(name)
        try:
            with redirect_stdout(io.StringIO()):
                return dict(self._manager.load([name])["tasks"])
        except ImportError as error:
            raise UserError(
                f"the task {name!r} cannot be loaded: {_line(error)}; install what it needs, or leave it out: --tasks takes "
                f"names of tasks"
            ) from error
        except Exception as error:  # whatever a task's own code runs into
            if data and data != GENERATED:
                raise UserError(
                    f"cannot load the data set {data} of the task {name!r} ({_line(error)}); run once with network (unset "
                    f"HF_HUB_OFFLINE and HF_DATASETS_OFFLINE), copy a filled HF_HOME here, or take --suite=offline, which needs no network"
                ) from error
            raise UserError(f"cannot make the documents of the task {name!r}: {_line(error)}") from error


@cache
def _texts() -> dict[Path, bytes]:
    """Every file of lm-eval's that may describe tasks."""
    root = Path(lm_eval.tasks.__file__).parent
    files = (path for path in root.rglob("*") if path.suffix in (".yaml", "") or "yaml" in path.name)
    return {path: path.read_bytes() for path in sorted(files, key=Path.as_posix) if path.is_file()}


@cache
def _named() -> dict[str, Path]:
    """Every name of a task or group -> the first of lm-eval's files that defines it."""
    found: dict[str, Path] = {}
    for path, text in _texts().items():
        if path.suffix == ".yaml":
            for name in _NAME.findall(text):
                found.setdefault(name.decode(), path)
    return found


@cache
def _tags() -> dict[str, set[Path]]:
    """Every tag -> the files that give it to a task."""
    found: dict[str, set[Path]] = {}
    for path, text in _texts().items():
        for block in _TAG.findall(text):
            for tag in re.findall(rb"[^\s\[\]\"',]+", block):
                found.setdefault(tag.decode(), set()).add(path)
    return found


@cache
def _tagged(tag: str) -> Path:
    """The folder below which all files are that carry a tag, or include one that does.

    One folder: lm-eval forgets the tag's tasks of one folder when it reads the next.
    """
    found = set(_tags()[tag])
    while True:
        names = {path.name.encode() for path in found}
        more = {
            path
            for path, text in _texts().items()
            if path not in found and any(include.rpartition(b"/")[2] in names for include in _INCLUDE.findall(text))
        }
        if not more:
            return Path(os.path.commonpath([path.parent for path in found]))
        found |= more


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f"{text[:200]}..."
