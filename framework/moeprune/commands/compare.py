"""`moeprune compare`: train, prune and score many variants."""

from __future__ import annotations

import json
import time
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse.typing import Path_fr
from rich.console import Console

from moeprune import registry
from moeprune.compare import runner
from moeprune.compare.executor import make as make_executor
from moeprune.compare.gather import gather
from moeprune.compare.spec import Comparison, Sweep, Variant
from moeprune.errors import UserError
from moeprune.files import locked, read_json, write_text
from moeprune.pruning.trigger import Trigger

if TYPE_CHECKING:
    from moeprune.compare.checkpoint import Setup

WHOLE, EVAL_SEQUENCES = "whole", 16


def command(
    name: str,
    recipe: Path_fr | None = None,
    checkpoint: Path | None = None,
    variants: dict[str, Any] | None = None,
    reference: str | None = None,
    trunk: dict[str, Any] | None = None,
    sweep: Sweep | None = None,
    train_on: bool | None = None,
    suite: str | None = "offline",
    limit: int | None = None,
    output: Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    options: list[str] | None = None,
    data: str | None = None,
    calibration_batches: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    pack: bool | None = None,
    seed: int | None = None,
    gate: Literal["weight", "topk", "softmax"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    device: str | None = None,
    held_out: str | None = None,
    eval_sequences: int | None = None,
    apply_chat_template: bool = False,
    max_gen_toks: int | None = None,
    think_end_token: str | None = None,
    export: bool = False,
    executor: Literal["processes", "submitit"] = "processes",
    cluster: Literal["slurm", "local"] = "slurm",
    job: dict[str, Any] | None = None,
) -> int:
    """Train one trunk, let every variant go on from it with the same batches, score them all, write a report. Or prune an
    existing checkpoint in every way that is named, and measure and score what is left.

    An interrupted comparison continues where it stopped when it is called again; a variant that fails is reported, tried
    again at the next call, and does not stop the others. A comparison of a checkpoint may get further variants at a later call,
    which go on from what was measured.

    Args:
        name: of the comparison.
        recipe: training recipe of every run, relative to the file it is written in.
        checkpoint: model that is pruned, instead of a recipe: a checkpoint file (.ckpt), an exported folder, or a transformers
            checkpoint (folder or name on the hub).
        variants: by name: label, start (trunk, scratch, untrained), config (the lines of the recipe it changes; of a checkpoint
            pruning.pruner and pruning.constraints), drift; for plots and rankings also strategy, family and budget.
        reference: the variant that the others are compared with; of a checkpoint by default `whole`, the checkpoint as it is.
        trunk: lines of the recipe that the trunk changes: the trigger that ends it.
        sweep: further variants, several pruners at several ratios.
        train_on: whether variants go on training after the trunk, as they do by default; without, they prune there, which is
            measured at once, and end.
        suite: short name of the suite that scores every variant; null for none, which it has to be of a recipe without training on.
        limit: documents per task; all by default.
        output: folder; default: runs/<name>.
        workers: runs at a time; default: one per core.
        overwrite: start anew in an existing folder.
        options: further arguments of `moeprune fit` for every run, such as --trainer.max_steps=100.
        data: of a checkpoint, as are all that follow: text to calibrate on, as for `moeprune calibrate`.
        calibration_batches: batches to measure; default: 32.
        batch_size: sequences, or requests of the suite, per forward pass; default: 8.
        seq_len: tokens per sequence; default: as many as the model takes, at most 2048 for a transformers checkpoint.
        pack: join documents into full sequences, or one document per sequence; default: pack text, one chat per sequence.
        seed: of the choice of calibration text; default: 0.
        gate: which gate weight statistics use, as for `moeprune calibrate`; default: weight.
        dtype: of a transformers checkpoint's weights; default: auto.
        device: where the model runs; default: cpu.
        held_out: text for the loss: `embedded` or a folder, whose validation split is read, or a .txt or .jsonl file; default: what
            the model was trained on, `embedded` for a transformers checkpoint.
        eval_sequences: sequences of it, per domain; default: 16.
        apply_chat_template: of the suite, as are the next two (see `moeprune evaluate`): put prompts into the tokenizer's chat
            template.
        max_gen_toks: longest answer in tokens, for every task that generates; default: what the suite or the task says.
        think_end_token: text that ends a reasoning model's thoughts, </think> say; answers begin after it.
        export: write every pruned checkpoint as well, into <variant>/checkpoint.
        executor: where runs from a recipe take place: in processes of this machine, or as jobs through submitit.
        cluster: of submitit: slurm, or local to try it on this machine.
        job: options of submitit's jobs, such as --job.partition=gpu --job.timeout_min=240 --job.gpus_per_node=1.
    """
    from moeprune.compare.report import terminal_table, write_report
    from moeprune.training.cli import lineage

    began = time.time()
    measures = {
        "data": data,
        "calibration_batches": calibration_batches,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "pack": pack,
        "seed": seed,
        "gate": gate,
        "dtype": dtype,
        "device": device,
        "held_out": held_out,
        "eval_sequences": eval_sequences,
        "apply_chat_template": apply_chat_template or None,
        "max_gen_toks": max_gen_toks,
        "think_end_token": think_end_token,
    }
    trains: dict[str, Any] = {"trunk": trunk, "train_on": train_on or None, "options": options, "workers": workers}
    trains |= {"executor": None if executor == "processes" else executor, "job": job}
    setup = _setup(recipe, checkpoint, {k: v for k, v in measures.items() if v is not None}, trains, export)
    if setup is None:
        if variants is None or reference is None:
            raise UserError(f"missing: {'variants' if variants is None else 'reference'}; give a value")
        train_on = train_on is not False
    else:
        variants, reference, train_on = _with_whole(variants or {}, reference), reference or WHOLE, False
    if suite is None and setup is not None and setup.scoring:
        raise UserError(f"{min(setup.scoring)} is an option for a suite, and there is none; name one, or leave it out")
    if suite is not None:
        registry.lookup("suite", suite)
        if setup is None and not train_on:
            raise UserError(f"suite {suite!r} scores models that were trained on; with train_on: false set suite: null")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    variants = _with_sweep(variants, Sweep(**sweep) if isinstance(sweep, dict) else sweep)
    on_slurm = executor == "submitit" and cluster == "slurm"
    workers = min(len(variants) if on_slurm else runner.cores(), max(1, len(variants))) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    comparison = Comparison(
        name,
        [] if recipe is None else [path.read_text(encoding="utf-8") for path in lineage(Path(str(recipe.absolute)))],
        trunk or {},
        {each: Variant.from_config(each, config) for each, config in variants.items()},
        reference,
        suite,
        limit,
        options or [],
        train_on,
        None if setup is None else setup.identity(),
    )
    _check_names(comparison)
    folder = output or Path("runs") / name
    jobs = make_executor(executor, cluster, job, folder, name, suite is not None)
    work = None
    if setup is None:
        _check_start(comparison)
        runner.prepare(comparison, folder, overwrite)
    else:
        from moeprune.compare.checkpoint import Work

        work = Work(comparison, setup, folder, overwrite)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # into a file or pipe: the width of the widest table
    with locked(folder, runner.BUSY.format(folder)):
        if work is not None:
            console.print(
                f"comparing {len(variants)} variants of {checkpoint}, {len(work.waiting)} of them to be measured"
            )
            failed, speeds, workers = work.run(console), {}, 1
        else:
            console.print(
                f"comparing {len(variants)} variants of {recipe}, {workers} at a time; logs in {folder}/<variant>/log.txt"
            )
            threads = (job or {}).get("cpus_per_task", 1 if on_slurm else None)
            failed = runner.run(comparison, folder, workers, console, jobs, threads)
            trained = [
                n for n, v in comparison.variants.items() if n not in failed and v.start != "untrained" and train_on
            ]
            speeds = runner.measure_speed(comparison, folder, trained, jobs)
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


def _setup(
    recipe: Path_fr | None,
    checkpoint: Path | None,
    measures: dict[str, Any],
    trains: dict[str, Any],
    export: bool,
) -> Setup | None:
    """How an existing checkpoint is read and measured; None for a comparison of a recipe.

    Raises:
        UserError: both or neither, or an option that belongs to the other.
    """
    if recipe is not None and checkpoint is not None:
        raise UserError(
            f"recipe={recipe} and checkpoint={checkpoint} are both given; a comparison starts from one, leave out the other"
        )
    if recipe is None and checkpoint is None:
        raise UserError(
            "missing: recipe or checkpoint; give recipe=FILE to train a trunk, or --checkpoint=DIR to prune a model"
        )
    if checkpoint is None:
        for option in (*measures, *(["export"] if export else [])):
            raise UserError(
                f"{option} is an option for an existing checkpoint; leave it out, a recipe says what its runs read"
            )
        return None
    for option in (option for option, value in trains.items() if value is not None):
        raise UserError(
            f"{option} is an option for training from a recipe, but a checkpoint is pruned and not trained on; leave it out"
        )
    from moeprune.commands.subject import Reading
    from moeprune.compare.checkpoint import SCORING, Setup

    gate, held_out = measures.pop("gate", "weight"), measures.pop("held_out", None)
    eval_sequences = measures.pop("eval_sequences", EVAL_SEQUENCES)
    scoring = {name: measures.pop(name) for name in SCORING if name in measures}
    return Setup(checkpoint, Reading(**measures), gate, held_out, eval_sequences, export, scoring)


def _with_whole(variants: dict[str, Any], reference: str | None) -> dict[str, Any]:
    """The variants of a checkpoint, itself among them if the reference has no name."""
    return variants if reference is not None else {WHOLE: {"label": "not pruned"}, **variants}


def _check_start(comparison: Comparison) -> None:
    """Check what a comparison of a recipe would otherwise do differently from what it says.

    Raises:
        UserError: an untrained control of a model that goes on from a checkpoint; a gradual trigger whose variants prune at once.
    """
    found: dict[str, Any] = {"model.checkpoint": None, "pruning.trigger": None}
    for layer in [*(yaml.safe_load(text) or {} for text in comparison.texts), comparison.trunk]:
        for key in found:
            section, _, option = key.partition(".")
            value = (layer.get(section) or {}).get(option, found[key])
            both = isinstance(value, dict) and isinstance(found[key], dict)
            found[key] = {**found[key], **value} if both else value
    for argument in comparison.options:
        option, _, value = argument.removeprefix("--").partition("=")
        found |= {option: value} if option in found else {}
    start, trigger = found.values()
    from_trunk = [
        name
        for name, v in comparison.variants.items()
        if v.start == "trunk" and "pruner" in (v.config.get("pruning") or {})
    ]
    for name, variant in comparison.variants.items():
        begins = (variant.config.get("model") or {}).get("checkpoint", start)
        if variant.start == "untrained" and begins is not None:
            raise UserError(
                f"variant {name!r} is untrained, but the recipe goes on from model.checkpoint={begins}, of which a fresh model is no "
                f"control; remove the variant"
            )
    short = trigger.get("class_path", "") if isinstance(trigger, dict) else str(trigger or "")
    if from_trunk and short and _is_gradual(short):
        raise UserError(
            f"variant {from_trunk[0]!r} would prune once, where the trunk ends, but the trigger {short!r} prunes several times; give "
            f"the trunk at_step, and the variant its trigger and start: scratch"
        )


def _is_gradual(name: str) -> bool:
    """Whether a trigger, by short name or class path, prunes by parts."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(module), attribute).share is not Trigger.share
    return registry.lookup("trigger", name).load().share is not Trigger.share


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
        pruner = (variant.config.get("pruning") or {}).get("pruner")
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
