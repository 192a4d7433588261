"""Reading and writing small files: complete or not there, and one sentence when it does not work."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from moeprune.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """Where what can be made again is kept: tokenizers, tokens, compiled kernels: $MOEPRUNE_CACHE, else moeprune/ in $XDG_CACHE_HOME or ~/.cache."""
    if "MOEPRUNE_CACHE" in os.environ:
        return Path(os.environ["MOEPRUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeprune"


@contextmanager
def atomic(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` that takes its name once it is written and flushed to disk.

    Raises:
        UserError: the file cannot be written (full disk, no permission); nothing is left behind.
    """
    shown, path = path, Path(path).resolve()  # what a link points to is replaced, not the link
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {shown}: it is not a regular file; choose another place")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {shown}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as file:
        file.write(text)


def read_json(path: str | Path, what: str) -> Any:
    """Parse the JSON file at `path`; `what` names it in the message.

    Raises:
        UserError: no such file, or not JSON (line and column are named).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {what} at {path}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read the {what} at {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        at = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"the {what} at {path} is not JSON{at}") from error


def new_folder(path: str | Path, overwrite: bool = False) -> Path:
    """Check that `path` can become an output folder: it does not exist, is empty, or may be overwritten.

    Raises:
        UserError: it holds files and `overwrite` is false, or cannot be made; the sentence offers the ways out.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another --output")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path} exists and is not empty; choose another --output, remove it, or pass --overwrite=true")
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output") from error
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()
    return path


def model_folder(path: str | Path, overwrite: bool = False, source: Path | str | None = None) -> Path:
    """Check that `path` can become the folder of a model, see `new_folder`: what is replaced is a model, and not the one read.

    Args:
        path: the folder.
        overwrite: whether a model that is there may be replaced.
        source: the model that is read.

    Raises:
        UserError: it may not become that.
    """
    path = new_folder(path, overwrite)
    if source is not None and (there := Path(source).resolve()) and path.resolve() in (there, *there.parents):
        raise UserError(f"{path} holds the source itself; choose another --output")
    if path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
        raise UserError(f"{path} holds something else than a model and is not overwritten; choose another --output")
    return path


class JsonLines:
    """A file with one JSON object per line, each with a `step`; rows reach the disk when `flush` is called.

    Args:
        path: the file; its folder is made.
        resume_at: keep the rows up to this step and drop later ones, which a killed run wrote after its last checkpoint.
    """

    def __init__(self, path: str | Path, resume_at: int) -> None:
        self.path = Path(path)
        kept = [row for row in read_rows(self.path) if row["step"] <= resume_at]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._waiting: list[str] = []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._waiting.append(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Write what waits.

        Raises:
            UserError: the disk is full.
        """
        if self._waiting:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(self._waiting)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; free space and resume the run") from error
            self._waiting = []


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The complete rows of a JsonLines file; [] if there is none. A row that a kill cut short ends the list."""
    rows: list[dict[str, Any]] = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


@contextmanager
def locked(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends, however it ends.

    Raises:
        UserError: another process holds it; the sentence is `otherwise`.
    """
    with (folder / ".lock").open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(otherwise) from error
        yield
