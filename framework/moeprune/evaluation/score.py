"""Runs a suite through lm-eval's evaluator."""

from __future__ import annotations

import json
import logging
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moeprune.errors import UserError
from moeprune.evaluation.suite import Suite
from moeprune.files import write_text

BOOTSTRAPS = 200  # for metrics without an analytic standard error


def score(
    checkpoint: Any,
    suite: Suite,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    name: str = "moeprune",
) -> dict[str, Any]:
    """lm-eval's results of a model on a suite, samples included.

    Args:
        checkpoint: path, or a `Checkpoint` in memory.
        suite: tasks.
        limit: documents per task; None for all. Task files are shuffled, so the first n are a random sample.
        batch_size: requests per forward pass.
        device: torch device.
        name: of the model, in the results.

    Raises:
        UserError: limit < 1, or a checkpoint that cannot be read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.tasks import TaskManager

    from moeprune.evaluation.lm import MoEPruneLM

    lm = MoEPruneLM(checkpoint, batch_size=batch_size, device=device)
    folder = suite.task_folder()
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    tasks = list(suite.metrics())
    results = lm_eval.evaluate(lm, manager.load(tasks), limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=True)
    if results is None:
        raise UserError("lm-eval gives results on the first process only; evaluate outside of a distributed launch")
    results["config"] = {
        "model": "moeprune",
        "model_args": {"pretrained": name},
        "batch_size": batch_size,
        "device": str(lm._device),
        "limit": limit,
        "bootstrap_iters": BOOTSTRAPS,
        **lm.get_model_info(),
    }
    results["date"] = time.time()
    for package in ("lm_eval", "torch", "moeprune"):
        results[f"{package}_version"] = version(package)
    return dict(results)


def headline(results: dict[str, Any], suite: Suite) -> dict[str, dict[str, Any]]:
    """Per task the suite's metric: value, standard error, documents, and each document's value in order of doc_id."""
    rows = {}
    for task, metric in suite.metrics().items():
        values = results["results"][task]
        stderr = values.get(f"{metric}_stderr,none")
        samples = sorted(results.get("samples", {}).get(task, []), key=lambda sample: sample["doc_id"])
        rows[task] = {
            "metric": metric,
            "higher_is_better": bool(results["higher_is_better"][task][metric]),
            "value": float(values[f"{metric},none"]),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "n": len(samples),
            "documents": [float(sample[metric]) for sample in samples],
        }
    return rows


def save(results: dict[str, Any], folder: Path) -> None:
    """Write `results.json` in lm-eval's format and `samples_<task>.jsonl` beside it.

    Raises:
        UserError: the folder cannot be written.
    """
    aggregated = {key: value for key, value in results.items() if key != "samples"}
    for task, samples in results.get("samples", {}).items():
        lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
        write_text(folder / f"samples_{task}.jsonl", "".join(line + "\n" for line in lines))
    write_text(folder / "results.json", json.dumps(aggregated, indent=1, default=str, ensure_ascii=False) + "\n")
