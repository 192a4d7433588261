"""The contract of suites: which lm-eval tasks make one, and which metric of each counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from moeprune.pruning.pruner import _Described


class Suite(_Described, ABC):
    """A named set of lm-eval tasks."""

    @abstractmethod
    def metrics(self) -> Mapping[str, str]:
        """Task name -> the metric that the suite reports for it, in the order of reports."""

    def task_folder(self) -> Path | None:
        """Folder of the suite's own task files; None if all of them are lm-eval's, which then loads its whole index."""
        return None

    def families(self) -> Mapping[str, list[str]]:
        """Groups of tasks that reports average over: name -> tasks, all with the same metric; none by default."""
        return {}
