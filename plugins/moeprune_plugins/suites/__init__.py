"""Built-in suites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeprune.evaluation.suite import Suite


class Offline(Suite):
    """Text the model never saw, without network: bits per byte, word order, last word, indentation.

    Source: tasks made for moeprune from the test split of the embedded corpus (suites/offline/README.md); word order
    after BLiMP (arXiv 1912.00582), last word after LAMBADA (arXiv 1606.06031).
    """

    def metrics(self) -> Mapping[str, str]:
        """One metric per task."""
        return {
            task: "doc_bpb" if family == "bits per byte" else "acc"
            for family, tasks in self.families().items()
            for task in tasks
        }

    def task_folder(self) -> Path:
        """The task files of this package."""
        return Path(__file__).parent / "offline"

    def families(self) -> Mapping[str, list[str]]:
        """The four forms of task."""
        return {
            "bits per byte": [f"offline_bpb_{d}" for d in ("lit", "kjv", "code", "tech", "api")],
            "word order": [f"offline_wordorder_{d}" for d in ("lit", "kjv", "code", "tech", "api")],
            "last word": [f"offline_lastword_{d}" for d in ("lit", "kjv", "tech", "api")],
            "indentation": ["offline_code_indent"],
        }
