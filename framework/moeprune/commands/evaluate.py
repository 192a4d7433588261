"""`moeprune evaluate`: score a model with a suite."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from moeprune import checkpoints, registry
from moeprune.evaluation.score import headline, save, score
from moeprune.evaluation.suite import Suite
from moeprune.files import new_folder


def command(
    model: Path,
    suite: str = "offline",
    limit: int | None = None,
    output: Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Score a model through lm-eval's own evaluator.

    Args:
        model: a checkpoint file (.ckpt) or an exported folder.
        suite: short name of a registered suite (moeprune plugins suite).
        limit: documents per task; all by default.
        output: folder for results.json (lm-eval's format) and the samples of each task.
        batch_size: requests per forward pass.
        device: torch device; cpu by default.
        overwrite: replace an existing output.
    """
    chosen: Suite = registry.create("suite", suite)
    if output is not None:
        new_folder(output, overwrite)
    results = score(checkpoints.read(model), chosen, limit, batch_size, device, str(model))
    if output is not None:
        save(results, output)
    table = Table("task", "metric", "value", "standard error", "documents", title=f"{model} on suite {suite}")
    for task, row in headline(results, chosen).items():
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        arrow = "higher" if row["higher_is_better"] else "lower"
        table.add_row(task, f"{row['metric']} ({arrow} is better)", f"{row['value']:.4f}", stderr, str(row["n"]))
    Console().print(table)
    if output is not None:
        print(f"written to {output}")
