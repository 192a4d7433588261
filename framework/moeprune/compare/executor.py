"""Where the jobs of a comparison run: in processes of this machine, or through submitit as jobs of SLURM (or of this machine)."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from moeprune.errors import UserError
from moeprune.files import locked, read_json, write_text

GENERAL = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")  # for any cluster
ONE_PROCESS = ("nodes", "tasks_per_node")
TIMEOUT_MIN = 60
PATIENCE = 20.0  # seconds until what a job of another machine wrote is seen here
STARTING = 60.0  # seconds until a job has taken the lock of its folder


class Running(ABC):
    """A job that was started."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether it may still write something."""

    @abstractmethod
    def ending(self) -> str:
        """How it ended, in a few words, for one that left no message."""

    @abstractmethod
    def stop(self) -> None:
        """End it."""

    def failed(self) -> bool:
        """Whether it is known to have ended badly, whatever it left."""
        return False


class Executor(ABC):
    """Starts jobs.

    Attributes:
        outlives: its jobs go on when the call that started them ends.
    """

    outlives = False

    @abstractmethod
    def start(self, place: Path, target: Callable[..., None], *args: Any) -> Running:
        """Run `target(*args)`, which keeps its files in `place` and ends with SystemExit if it fails."""

    def find(self, place: Path) -> Running | None:
        """The job that an earlier call started in `place`, if it still goes on."""
        return None


def make(
    kind: Literal["processes", "submitit"],
    cluster: Literal["slurm", "local"],
    options: Mapping[str, Any] | None,
    folder: Path,
    name: str,
    scores: bool,
) -> Executor:
    """The executor that `moeprune compare` was asked for; see `Processes` and `Submitit`.

    Raises:
        UserError: options of jobs where there are none.
    """
    if kind == "submitit":
        return Submitit(cluster, options or {}, folder, name)
    if options:
        raise UserError(
            f"job.{next(iter(options))} is an option of submitit's jobs; add --executor=submitit, or leave it out"
        )
    return Processes(scores)


# --- processes of this machine


class Processes(Executor):
    """Every job in a process forked from one that has done the imports; where that does not exist, a fresh one.

    Args:
        scores: whether lm-eval will be needed.
    """

    def __init__(self, scores: bool = True) -> None:
        self.scores = scores

    def start(self, place: Path, target: Callable[..., None], *args: Any) -> Running:
        """See `Executor.start`."""
        if "forkserver" not in multiprocessing.get_all_start_methods():
            process: BaseProcess = multiprocessing.get_context("spawn").Process(target=target, args=args)
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["moeprune.compare.preload" if self.scores else "moeprune.compare.prunes"])
            process = context.Process(target=target, args=args)
        process.start()
        return _Process(process)


class _Process(Running):
    def __init__(self, process: BaseProcess) -> None:
        self.process = process

    def alive(self) -> bool:
        return self.process.is_alive()

    def ending(self) -> str:
        code = self.process.exitcode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        self.process.terminate()

    def failed(self) -> bool:
        return self.process.exitcode != 0


# --- submitit


class Task:
    """What submitit pickles and calls. Where the job is near its time limit or preempted, it is queued again and goes on from its
    last checkpoint.
    """

    def __call__(self, place: Path, target: Callable[..., None], *args: Any) -> int:
        """Exit code of `target`, so that submitit keeps a result of every job that was not killed."""
        try:
            target(*args)
        except SystemExit as end:
            if isinstance(end.__cause__, SystemExit):  # submitit's own, once it has queued the job again
                (place / "error.txt").unlink(missing_ok=True)
                raise end.__cause__ from None
            return end.code if isinstance(end.code, int) else 1
        return 0

    def checkpoint(self, *args: Any) -> Any:
        """The same call again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args)


class Submitit(Executor):
    """Every job through the submitit library; one process per job.

    Args:
        cluster: `slurm`, or `local` for processes of this machine, to try it out.
        options: of the jobs. Those of any cluster: timeout_min (60 by default), mem_gb, cpus_per_task, gpus_per_node; every
            other one is an option of sbatch as submitit spells it (partition, account, qos, constraint, setup, ...), and
            means nothing locally.
        folder: of the comparison; submitit's scripts, pickles and logs go into .submitit there.
        name: of the jobs.

    Raises:
        UserError: submitit is not installed, there is no SLURM here, an option that it does not know, or more than one
            process per job.
    """

    def __init__(
        self, cluster: Literal["slurm", "local"], options: Mapping[str, Any], folder: Path, name: str = "moeprune"
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError("--executor=submitit needs the package submitit: pip install 'moeprune[slurm]'") from error
        self._submitit: Any = submitit
        for key in ONE_PROCESS:
            if options.get(key, 1) != 1:
                raise UserError(f"job.{key} must be 1, got {options[key]}: every run of a comparison is one process")
        self.cluster, self.options, self.folder, self.name = cluster, dict(options), folder, name
        self.outlives = cluster == "slurm"
        self._executor: Any = None
        with tempfile.TemporaryDirectory() as scratch:  # the options are checked before anything is written
            self._made(Path(scratch))

    def _made(self, folder: Path) -> Any:
        named = {"timeout_min": TIMEOUT_MIN, "name": self.name}
        for key, value in self.options.items():
            of = self.cluster if key == "setup" else "slurm"
            named[key if key in (*GENERAL, *ONE_PROCESS) else f"{of}_{key}"] = value
        try:
            made = self._submitit.AutoExecutor(folder=folder, cluster=self.cluster)
            made.update_parameters(**named)
        except RuntimeError as error:
            raise UserError(
                f"there is no SLURM here ({error}); use --cluster=local, or leave --executor out"
            ) from error
        except (NameError, ValueError, TypeError, AssertionError) as error:
            first = str(error).partition("\n")[0]
            raise UserError(f"submitit does not take these job options: {first}") from error
        return made

    @property
    def _jobs(self) -> Path:
        return (self.folder / ".submitit").absolute()

    def start(self, place: Path, target: Callable[..., None], *args: Any) -> Running:
        """See `Executor.start`.

        Raises:
            UserError: SLURM does not take the job.
        """
        self._executor = self._executor or self._made(self._jobs)
        self._executor.update_parameters(name=self.name if place == self.folder else f"{self.name}-{place.name}")
        try:
            job = self._executor.submit(Task(), place, target, *args)
        except (RuntimeError, OSError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"{self.cluster} did not take the job {place.name!r}: {said[-400:]}") from error
        write_text(place / "job.json", json.dumps({"cluster": self.cluster, "id": job.job_id, "at": time.time()}))
        return _Job(job, place, self.cluster)

    def find(self, place: Path) -> Running | None:
        """See `Executor.find`."""
        if not (place / "job.json").exists():
            return None
        noted = read_json(place / "job.json", "job's record")
        if noted["cluster"] != self.cluster:
            return None
        if self.cluster == "slurm":
            job = self._submitit.SlurmJob(folder=self._jobs, job_id=noted["id"])
            found = bool(job.get_info()) and not job.done()
            return _Job(job, place, self.cluster) if found else None
        earlier = _Earlier(self._submitit.LocalJob(folder=self._jobs, job_id=noted["id"]), place, noted["at"])
        return earlier if earlier.alive() else None


class _Job(Running):
    def __init__(self, job: Any, place: Path, cluster: str) -> None:
        self.job, self.place = job, place
        self._patience = PATIENCE if cluster == "slurm" else 0.0
        self._ended = 0.0

    def alive(self) -> bool:
        if not self.job.done():
            return True
        self._ended = self._ended or time.monotonic()
        told = any((self.place / name).exists() for name in ("result.json", "error.txt", "speed.json"))
        return not told and time.monotonic() - self._ended < self._patience

    def ending(self) -> str:
        return f"job {self.job.job_id} ended without a result ({self.job.state}); see {self.job.paths.stderr}"

    def stop(self) -> None:
        self.job.cancel(check=False)


class _Earlier(_Job):
    """A local job of an earlier call, whose process is no child of this one: it goes on while it holds its folder's lock."""

    def __init__(self, job: Any, place: Path, at: float) -> None:
        super().__init__(job, place, "local")
        self.at = at

    def alive(self) -> bool:
        try:
            with locked(self.place, "held"):
                pass
        except UserError:
            return True
        return not self.job.paths.result_pickle.exists() and time.time() - self.at < STARTING and self._exists()

    def _exists(self) -> bool:
        try:
            os.kill(int(self.job.job_id), 0)
        except (OSError, ValueError):
            return False
        return True

    def stop(self) -> None:
        """It is left alone, as it was before."""
