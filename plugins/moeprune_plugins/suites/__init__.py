"""Built-in suites."""

from __future__ import annotations

from pathlib import Path

from moeprune.evaluation.suite import Suite, Task


class Offline(Suite):
    """Text the model never saw, without network: bits per byte, word order, last word, indentation.

    Source: tasks made for moeprune from the test split of the embedded corpus (suites/offline/README.md); word order
    after BLiMP (arXiv 1912.00582), last word after LAMBADA (arXiv 1606.06031).
    """

    def tasks(self) -> list[Task]:
        """The four forms of task."""
        domains = ("lit", "kjv", "code", "tech", "api")
        return [
            *(Task(f"offline_bpb_{d}", "doc_bpb", "bits per byte") for d in domains),
            *(Task(f"offline_wordorder_{d}", "acc", "word order") for d in domains),
            *(Task(f"offline_lastword_{d}", "acc", "last word") for d in domains if d != "code"),
            Task("offline_code_indent", "acc", "indentation"),
        ]

    def task_folder(self) -> Path:
        """The task files of this package."""
        return Path(__file__).parent / "offline"
