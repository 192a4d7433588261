"""`moeprune evaluate`: score a model with suites of lm-eval tasks, alone or against a reference."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeprune import checkpoints, registry
from moeprune.errors import UserError
from moeprune.evaluation.paired import paired, same_tasks
from moeprune.evaluation.score import LONGEST_ANSWER, read_scores, save, score
from moeprune.evaluation.suite import Joined, Named, Suite
from moeprune.files import new_folder, write_text
from moeprune.interop.checkpoint import is_transformers, resolve

ARROWS = "↑ higher is better, ↓ lower is better"


def command(
    model: Path | None = None,
    suite: str | None = None,
    tasks: str | None = None,
    reference: Path | None = None,
    compare: str | None = None,
    list: bool = False,
    limit: int | None = None,
    output: Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
    max_gen_toks: int | None = None,
    apply_chat_template: bool = False,
    think_end_token: str | None = None,
    run_unsafe_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Score a model through lm-eval's own evaluator.

    Args:
        model: a checkpoint file (.ckpt), an exported folder, or a folder or hub name of a transformers checkpoint.
        suite: short names of registered suites, with commas (moeprune plugins suite); offline by default.
        tasks: names of lm-eval tasks, groups or tags, with commas, each with the metric that lm-eval reports first.
        reference: a second model, or a folder that --output wrote for one: differences to it are printed, too.
        compare: two folders that --output wrote, with a comma; the first minus the second, and no model is scored.
        list: show what would be scored, and stop.
        limit: documents per task; all by default.
        output: folder for results.json (lm-eval's format), scores.json, the samples of each task, and differences.json.
        batch_size: requests per forward pass.
        device: torch device; cpu by default.
        dtype: of a transformers model's weights: auto (as in the checkpoint), float32, bfloat16, float16.
        max_length: longest sequence in tokens; default: what the model takes.
        max_gen_toks: longest answer in tokens, for every task that generates; default: what the suite or the task says.
        apply_chat_template: put prompts into the tokenizer's chat template.
        think_end_token: text that ends a reasoning model's thoughts, </think> say; answers begin after it.
        run_unsafe_code: allow tasks that run code which the model wrote.
        overwrite: replace an existing output.
    """
    chosen = None if compare else _suite(suite, tasks)
    title = " and ".join(filter(None, [suite or ("" if tasks else "offline"), tasks]))
    if list and chosen is not None:
        show_tasks(chosen, title)
        return
    if compare is None and model is None:
        raise UserError("missing: model; give a value")
    if compare is not None and (model or reference or suite or tasks):
        raise UserError(
            "--compare reads two folders of results and scores no model; leave out --model, --reference, --suite and --tasks"
        )
    if output is not None:
        new_folder(output, overwrite)
    other: dict[str, Any] | None
    if compare is not None:
        folders = [Path(folder) for folder in compare.split(",")]
        if len(folders) != 2:
            raise UserError(f"--compare takes two folders with a comma between them, got {compare!r}")
        mine, other = (read_scores(folder) for folder in folders)
    else:
        assert chosen is not None
        assert model is not None
        other = _known(reference)
        if other is not None:
            same_tasks(str(model), chosen.metrics(), limit, other)  # before hours of scoring
        options: dict[str, Any] = {
            "limit": limit,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "max_length": max_length,
            "max_gen_toks": max_gen_toks,
            "apply_chat_template": apply_chat_template,
            "think_end_token": think_end_token,
            "run_unsafe_code": run_unsafe_code,
        }
        mine = _scored(model, chosen, options, output)
        show_scores(mine, f"{model} on {title}")
        if reference is not None and other is None:
            gc.collect()
            other = _scored(reference, chosen, options, None if output is None else output / "reference")
            show_scores(other, f"{reference} on {title}")
    if other is not None:
        found = paired(mine, other)
        if output is not None:
            write_text(output / "differences.json", json.dumps(found, indent=1) + "\n")
        show_differences(found)
    if output is not None:
        print(f"written to {output}")


def _known(reference: Path | None) -> dict[str, Any] | None:
    """The reference's scores if it is a folder of results; None if it is a model.

    Raises:
        UserError: it is neither.
    """
    if reference is None:
        return None
    if is_transformers(reference):
        resolve(reference)
        return None
    if not reference.exists():
        raise UserError(f"there is neither a model nor a folder of results at {reference}; check --reference")
    return read_scores(reference) if (reference / "scores.json").exists() else None


def _suite(suite: str | None, tasks: str | None) -> Suite:
    """What was asked for, as one suite."""
    names = [name for name in (suite or ("" if tasks else "offline")).split(",") if name]
    suites: dict[str, Suite] = {name: registry.create("suite", name) for name in names}
    taken = {task.name for each in suites.values() for task in each.tasks()}
    extra = [name for name in (tasks or "").split(",") if name and name not in taken]
    if extra:
        suites["tasks"] = Named(extra)
    if not suites:
        raise UserError("nothing to score; give --suite=NAME or --tasks=NAME,NAME")
    return Joined(suites) if len(suites) > 1 else next(iter(suites.values()))


def _scored(model: Path, suite: Suite, options: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """The scores of the model on disk, saved to `output` with everything else."""
    source = model if is_transformers(model) else checkpoints.read(model)
    results = score(source, suite, name=str(model), **options)
    if output is not None:
        save(results, output)
    scores: dict[str, Any] = results["scores"]
    return scores


def show_scores(scores: dict[str, Any], title: str) -> None:
    """Print the table of one model."""
    table = _table("task", "metric", "value", "standard error", "documents", title=title, caption=ARROWS)
    for name, row in _lines(scores, table):
        table.add_row(name, _metric(row), f"{row['value']:.4f}", _number(row["stderr"]), str(row["n"]))
    Console().print(table)


def show_differences(found: dict[str, Any]) -> None:
    """Print the table of a model minus its reference."""
    title = f"{found['model']} minus {found['reference']}"
    caption = (
        f"{ARROWS}; ± half of the 95 % interval, over the same documents; without a word: no detectable difference"
    )
    table = _table("task", "metric", "value", "reference", "difference", title=title, caption=caption)
    for name, row in _lines(found, table):
        value, half, verdict = (row["difference"][key] for key in ("value", "half_width", "verdict"))
        interval = "" if half is None else f" ± {half:.4f}"
        word = ""
        if verdict in ("higher", "lower"):
            word = " better" if (verdict == "higher") == row["higher_is_better"] else " worse"
        table.add_row(
            name, _metric(row), f"{row['value']:.4f}", f"{row['reference']:.4f}", f"{value:+.4f}{interval}{word}"
        )
    Console().print(table)


def show_tasks(suite: Suite, title: str) -> None:
    """Print what a suite scores; reads task files only, no data."""
    from moeprune.evaluation.catalogue import Catalogue

    catalogue = Catalogue([task.name for task in suite.tasks()], suite.folders())
    families: dict[str, list[str]] = {}
    for family, names in suite.families().items():
        for name in names:
            families.setdefault(name, []).append(family)
    table = _table("task", "metric", "few-shot", "longest answer", "family", "data", title=title)
    for task in suite.tasks():
        leaves = catalogue.leaves(task.name)
        config = catalogue.config(leaves[0]) if leaves else {}
        shots = task.num_fewshot if task.num_fewshot is not None else config.get("num_fewshot", 0)
        stated = (config.get("generation_kwargs") or {}).get("max_gen_toks")
        generates = config.get("output_type") == "generate_until" or stated or task.max_gen_toks
        table.add_row(
            task.name if len(leaves) == 1 else f"{task.name} ({len(leaves)} tasks)",
            task.metric or "the first one",
            str(shots),
            str(task.max_gen_toks or stated or LONGEST_ANSWER) if generates else "-",
            ", ".join(families.get(task.name, [])) or "-",
            task.data or catalogue.data(task.name) or "-",
        )
    Console().print(table)


def _table(*columns: str, **options: Any) -> Table:
    table = Table(**options)
    for column in columns:
        table.add_column(column, no_wrap=column in ("task", "value", "difference"), overflow="fold")
    return table


def _lines(found: dict[str, Any], table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tasks, then means over families, with a rule between them."""
    yield from found["rows"].items()
    if found["families"]:
        table.add_section()
    yield from ((f"mean: {name}", row) for name, row in found["families"].items())


def _metric(row: dict[str, Any]) -> str:
    return f"{row['metric']} {'↑' if row['higher_is_better'] else '↓'}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
