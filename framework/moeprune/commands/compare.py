"""`moeprune compare`: train, prune and score many variants."""

from __future__ import annotations

import json
import time
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse.typing import Path_fr
from rich.console import Console

from moeprune import registry
from moeprune.compare import runner
from moeprune.compare.gather import gather
from moeprune.compare.spec import Comparison, Sweep, Variant
from moeprune.errors import UserError
from moeprune.files import locked, read_json, write_text


def command(
    name: str,
    recipe: Path_fr,
    variants: dict[str, Any],
    reference: str,
    trunk: dict[str, Any] | None = None,
    sweep: Sweep | None = None,
    train_on: bool = True,
    suite: str | None = "offline",
    limit: int | None = None,
    output: Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    options: list[str] | None = None,
) -> int:
    """Train one trunk, let every variant go on from it with the same batches, score them all, write a report.

    An interrupted comparison continues where it stopped when it is called again; a variant that fails is reported, tried
    again at the next call, and does not stop the others.

    Args:
        name: of the comparison.
        recipe: training recipe of every run, relative to the file it is written in.
        variants: by name: label, start (trunk, scratch, untrained), config (the lines of the recipe it changes), drift; for
            plots and rankings also strategy, family and budget.
        reference: the variant that the others are compared with.
        trunk: lines of the recipe that the trunk changes: the trigger that ends it.
        sweep: further variants, several pruners at several ratios.
        train_on: whether variants go on training after the trunk; without, they prune there, which is measured at once, and end.
        suite: short name of the suite that scores every variant; null for none, which it has to be without training on.
        limit: documents per task; all by default.
        output: folder; default: runs/<name>.
        workers: runs at a time; default: one per core.
        overwrite: start anew in an existing folder.
        options: further arguments of `moeprune fit` for every run, such as --trainer.max_steps=100.
    """
    from moeprune.compare.report import terminal_table, write_report
    from moeprune.training.cli import lineage

    began = time.time()
    if suite is not None:
        registry.lookup("suite", suite)
        if not train_on:
            raise UserError(f"suite {suite!r} scores models that were trained on; with train_on: false set suite: null")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    variants = _with_sweep(variants, Sweep(**sweep) if isinstance(sweep, dict) else sweep)
    workers = min(runner.cores(), max(1, len(variants))) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    comparison = Comparison(
        name,
        [path.read_text(encoding="utf-8") for path in lineage(Path(str(recipe.absolute)))],
        trunk or {},
        {each: Variant.from_config(each, config) for each, config in variants.items()},
        reference,
        suite,
        limit,
        options or [],
        train_on,
    )
    _check_names(comparison)
    folder = output or Path("runs") / name
    runner.prepare(comparison, folder, overwrite)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # into a file or pipe: the width of the widest table
    with locked(folder, runner.BUSY.format(folder)):
        console.print(
            f"comparing {len(variants)} variants of {recipe}, {workers} at a time; logs in {folder}/<variant>/log.txt"
        )
        failed = runner.run(comparison, folder, workers, console)
        trained = [n for n, v in comparison.variants.items() if n not in failed and v.start != "untrained" and train_on]
        speeds = runner.measure_speed(comparison, folder, trained)
        if trained and not speeds:
            console.print(
                f"step times were not measured: the reference failed, or see {folder}/speed.log", style="yellow"
            )
        clock = folder / "seconds.json"
        seconds = (read_json(clock, "clock") if clock.exists() else 0.0) + time.time() - began
        write_text(clock, json.dumps(seconds))
        results = gather(
            comparison, folder, {n: e for n, e in failed.items() if n in variants}, speeds, seconds, workers
        )
        write_text(folder / "results.json", json.dumps(results, allow_nan=False) + "\n")
        write_report(results, folder)
    console.print(terminal_table(results))
    console.print(
        f"report: {folder / 'report.html'}   results: {folder / 'results.json'}   ({seconds:.0f} s of computing)"
    )
    for each, error in failed.items():
        if not error.startswith(runner.NO_TRUNK):
            console.print(f"failed: {each}: {error}", style="red", markup=False, soft_wrap=True)
    return 1 if failed else 0


command.plain = True  # type: ignore[attr-defined]


def _with_sweep(variants: dict[str, Any], sweep: Sweep | None) -> dict[str, Any]:
    """The variants, then those of the sweep.

    Raises:
        UserError: an unknown pruner, one without a ratio, or a name that a variant has already.
    """
    if sweep is None:
        return variants
    for _, name, config in sweep.pruners():
        pruner = str(config.get("class_path", ""))
        if "." not in pruner and "ratio" not in signature(registry.lookup("pruner", pruner).load()).parameters:
            raise UserError(
                f"sweep: the pruner {pruner!r} ({name}) takes no ratio; write its variants out, with a budget"
            )
    made = sweep.variants()
    if taken := sorted(made.keys() & variants.keys()):
        raise UserError(f"the sweep makes a variant {taken[0]!r}, and there is one already; give it another name")
    return {**variants, **made}


def _check_names(comparison: Comparison) -> None:
    """Every short name in a variant's config exists, before anything is trained.

    Raises:
        UserError: an unknown pruner or balancer.
    """
    for name, variant in comparison.variants.items():
        pruner = variant.config.get("pruning", {}).get("pruner")
        for kind, value in [
            ("pruner", pruner),
            *(("balancer", b) for b in variant.config.get("model", {}).get("balancers", [])),
        ]:
            short = value.get("class_path") if isinstance(value, dict) else value
            if isinstance(short, str) and "." not in short:
                try:
                    registry.lookup(kind, short)
                except UserError as error:
                    raise UserError(f"variant {name!r}: {error}") from error
