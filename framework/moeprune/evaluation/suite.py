"""The contract of suites: which lm-eval tasks make one, and how each is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeprune.errors import UserError
from moeprune.pruning.pruner import _Described


@dataclass(frozen=True)
class Task:
    """One row of a suite: a task of lm-eval, or a group or tag, whose documents are pooled into one number.

    Args:
        name: lm-eval's.
        metric: lm-eval's name of what counts; `exact_match,flexible-extract` where it is read from a filtered answer; '' takes
            the one that lm-eval reports first.
        family: reports average over the tasks of a family, all equally; '' leaves the task out of averages.
        num_fewshot: examples in the prompt; None takes lm-eval's own number, which is 0 where it says none.
        max_gen_toks: longest answer in tokens; None takes the task's own.
        metadata: for a task that makes its own documents (the length of them, say); the tokenizer is added.
        data: the data set, where lm-eval's task file does not name it.
    """

    name: str
    metric: str = ""
    family: str = ""
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""


class Suite(_Described, ABC):
    """A named set of tasks."""

    @abstractmethod
    def tasks(self) -> Sequence[Task]:
        """The tasks, in the order of reports."""

    def task_folder(self) -> Path | None:
        """Folder of the suite's own task files; None if all of them are lm-eval's."""
        return None

    def folders(self) -> list[Path]:
        """Every folder with task files beside lm-eval's own."""
        own = self.task_folder()
        return [] if own is None else [own]

    def metrics(self) -> Mapping[str, str]:
        """Task name -> the metric that the suite reports for it, in the order of reports."""
        return {task.name: task.metric for task in self.tasks()}

    def families(self) -> Mapping[str, list[str]]:
        """What reports average over: name -> tasks, in the order of reports."""
        found: dict[str, list[str]] = {}
        for task in self.tasks():
            if task.family:
                found.setdefault(task.family, []).append(task.name)
        return found


class Named(Suite):
    """Tasks of lm-eval by name, each with the metric that lm-eval reports first.

    Args:
        names: of tasks, groups or tags.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def tasks(self) -> list[Task]:
        """One per name."""
        return [Task(name) for name in dict.fromkeys(self.names)]


class Joined(Suite):
    """Several suites as one; a task that is in two of them runs once.

    Args:
        suites: by name.

    Raises:
        UserError: two suites score the same task differently.
    """

    def __init__(self, suites: Mapping[str, Suite]) -> None:
        self.suites = suites
        found: dict[str, tuple[str, Task]] = {}
        for name, suite in suites.items():
            for task in suite.tasks():
                other, known = found.setdefault(task.name, (name, task))
                if replace(known, family="") != replace(task, family=""):
                    raise UserError(
                        f"the suites {other!r} and {name!r} score the task {task.name!r} differently; run them one by one"
                    )
        self._tasks = [task for _, task in found.values()]

    def tasks(self) -> list[Task]:
        """Those of all suites, each once."""
        return self._tasks

    def folders(self) -> list[Path]:
        """Those of all suites."""
        return list(dict.fromkeys(folder for suite in self.suites.values() for folder in suite.folders()))

    def families(self) -> Mapping[str, list[str]]:
        """Those of all suites; a name that two suites use for different tasks is led by the suite's."""
        found: dict[str, list[str]] = {}
        for name, suite in self.suites.items():
            for family, tasks in suite.families().items():
                found[family if found.get(family, tasks) == tasks else f"{name}: {family}"] = list(tasks)
        return found
