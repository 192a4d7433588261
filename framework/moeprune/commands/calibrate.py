"""`moeprune calibrate`: measure a model once and save what was measured, for any number of plans."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from moeprune import registry
from moeprune.commands.subject import Reading, Subject, layerwise_evidence, subject
from moeprune.errors import UserError, suggest
from moeprune.files import atomic, locked, new_folder
from moeprune.pruning import store
from moeprune.pruning.calibration import BUILT_IN, HELD_OUT, TRIALS, WEIGHTS, Batch, Gate, Recording
from moeprune.pruning.evidence import Evidence


def command(
    model: Path,
    output: Path,
    data: str | None = None,
    statistics: list[str] | Literal["all"] | None = None,
    pruners: list[str] | None = None,
    calibration_batches: int = 32,
    batch_size: int = 8,
    seq_len: int | None = None,
    pack: bool | None = None,
    seed: int = 0,
    gate: Gate = "weight",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    layerwise: bool = False,
    every: int = 8,
    overwrite: bool = False,
) -> None:
    """Measure a model in one pass and save the evidence. An interrupted call, repeated, goes on where it was.

    Args:
        model: a checkpoint file (.ckpt), an exported folder, or a transformers checkpoint (folder or name on the hub).
        output: folder of the evidence.
        data: text to calibrate on: `embedded` or a folder; for a transformers checkpoint also a .txt or .jsonl file (text or
            chats) or the name of a data set. Default: what the model was trained on, `embedded` if unknown.
        statistics: what to measure, [counts,g1f1] (moeprune plugins statistic), or all; default: what `pruners` read, else all.
        pruners: short names of pruners; measures what they read.
        calibration_batches: batches to measure.
        batch_size: sequences per batch.
        seq_len: tokens per sequence; default: as many as the model takes, at most 2048 for a transformers checkpoint.
        pack: transformers checkpoints: join documents into full sequences, or one document per sequence; default: pack text,
            one chat per sequence.
        seed: of the choice of calibration text.
        gate: which g: the weight really used to combine, the probabilities of the chosen experts renormalised to sum to 1
            (topk), or as they are (softmax).
        dtype: transformers checkpoints: of the weights; auto takes the checkpoint's.
        device: where the model runs.
        layerwise: transformers checkpoints larger than memory: hold one decoder layer at a time.
        every: batches after which the state is saved; not layer by layer.
        overwrite: replace evidence that is there, and begin anew.
    """
    if every < 1:
        raise UserError(f"every must be at least 1, got {every}; it counts batches")
    _check_folder(output, overwrite)
    wanted, optional = _wanted(statistics, pruners)
    how = Reading(data, calibration_batches, batch_size, seq_len, pack, seed, dtype, device)
    if layerwise:

        def there(provenance: Mapping[str, Any], statistics: frozenset[str]) -> bool:
            return not overwrite and _there(output, _made_from({**provenance, "gate": gate}, statistics))

        found = layerwise_evidence(model, how, wanted, optional, gate, there)
        if found is None:
            print(f"{output} holds this evidence already; nothing to do")
            return
        store.save(found, output, overwrite=True)
        print(f"written to {output}")
        return
    it = subject(model, how, bool(wanted - WEIGHTS))
    if "router_w2" in wanted & optional and any("router" not in layer.weights() for layer in it.model.moe_layers):
        _note("left out: router_w2, since a router has no weight with one row per expert")
        wanted -= {"router_w2"}
    evidence = measured(output, it, wanted, gate, every, overwrite)
    if evidence is None:
        print(f"{output} holds this evidence already; nothing to do")
        return
    print(_summary(evidence))
    print(f"written to {output}")


def measured(
    output: Path, it: Subject, wanted: frozenset[str], gate: Gate = "weight", every: int = 8, overwrite: bool = False
) -> Evidence | None:
    """Measure a model in one pass and save the evidence; goes on where an interrupted call was.

    Args:
        output: folder of the evidence.
        it: the model and the text.
        wanted: statistics.
        gate: see `calibration.record`.
        every: batches after which the state is saved.
        overwrite: begin anew.

    Returns:
        The evidence; None if the folder holds it already.

    Raises:
        UserError: the folder holds other evidence, or another call is writing there.
    """
    provenance = {**it.provenance, "gate": gate}
    made_from = _made_from(provenance, wanted)
    recording = Recording(it.model, wanted, gate)
    partial = output / store.PARTIAL
    if not overwrite and _there(output, made_from):
        return None
    if not overwrite and partial.exists():
        _continue(partial, recording, made_from)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, f"another call is writing evidence to {output}; wait for it, or choose another --output"):
        try:
            if overwrite:
                for name in (store.DESCRIPTION, store.ARRAYS, store.PARTIAL):
                    (output / name).unlink(missing_ok=True)
            evidence = _measure(recording, it.batches, every, partial, made_from, provenance)
            store.save(evidence, output, overwrite=True)
            for left in (partial, *output.glob(f".{store.PARTIAL}.*")):
                left.unlink(missing_ok=True)
        finally:
            (output / ".lock").unlink(missing_ok=True)
            if not any(output.iterdir()):
                output.rmdir()
    return evidence


def _measure(
    recording: Recording,
    batches: Sequence[Batch],
    every: int,
    partial: Path,
    made_from: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Evidence:
    """Measure the batches that are left, saving the state to `partial` every so often."""
    console = Console(stderr=True)
    trials = bool(recording.needs & TRIALS)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (batches and console.is_terminal)) as progress:
        bar = progress.add_task("batches measured", total=len(batches), completed=recording.seen)
        for batch in batches[recording.seen :]:
            recording.update(batch)
            progress.update(bar, completed=recording.seen)
            if recording.seen % every == 0 and (recording.seen < len(batches) or trials):
                _save_state(partial, recording, made_from)
                if not console.is_terminal:
                    _note(f"{recording.seen} of {len(batches)} batches measured")
        if trials:
            progress.update(bar, description="batches measured; trying the model without experts")
        return recording.evidence(None, provenance, batches[:HELD_OUT])


def _wanted(
    statistics: list[str] | Literal["all"] | None, pruners: list[str] | None
) -> tuple[frozenset[str], frozenset[str]]:
    """What to measure, and which of it may be left out because nobody named it.

    Raises:
        UserError: a name that is not known, or nothing that can be saved.
    """
    classes, problems = registry.usable("statistic")
    known = (BUILT_IN - store.LIVE) | classes.keys()
    if statistics == "all" or (statistics is None and pruners is None):
        for problem in problems:
            _note(f"left out: {problem}")
        return known, known
    wanted: set[str] = set(statistics or [])
    for name in sorted(wanted - known):
        if name in store.LIVE:
            raise UserError(f"{name!r} is a live model's and cannot be saved; `moeprune prune` takes it from the model")
        raise UserError(suggest("statistic", name, sorted(known)))
    for name in pruners or []:
        needs = registry.create("pruner", name).needs
        for live in sorted(needs & store.LIVE):
            _note(f"{name} reads {live}, which cannot be saved: `moeprune prune` takes it from the model")
        wanted |= needs - store.LIVE
    if not wanted:
        raise UserError("there is nothing to measure: name a statistic, or a pruner that reads one")
    return frozenset(wanted), frozenset()


def _made_from(provenance: Mapping[str, Any], statistics: Mapping[str, Any] | frozenset[str]) -> dict[str, Any]:
    """All that the evidence depends on; paths do not matter where contents are known."""
    data = provenance.get("data")
    return {
        "weights": provenance.get("weights"),
        "data": data and {"domains": data["domains"], "hash": data["hash"]},
        "statistics": sorted(statistics),
        **{
            name: provenance.get(name)
            for name in ("calibration_batches", "batch_size", "seq_len", "seed", "dtype", "gate", "version")
        },
    }


def _there(output: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a folder holds the evidence asked for already.

    Raises:
        UserError: it holds another.
    """
    if not (output / store.DESCRIPTION).exists():
        return False
    found = store.load(output)
    _same(output, _made_from(found.provenance, found.layers[0].stats), asked)
    return True


def _same(output: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that evidence that is there, whole or in part, is the one asked for.

    Raises:
        UserError: it is another; the sentence says in what.
    """
    told = []
    for name, value in asked.items():
        other = begun.get(name)
        if other == value:
            continue
        if name == "weights":
            told.append(f"another model (weights {str(other)[:12]}, not {str(value)[:12]})")
        elif name == "data":
            told.append("other data")
        elif name == "statistics":
            more, less = sorted(set(value) - set(other or ())), sorted(set(other or ()) - set(value))
            parts = [f"{word} {', '.join(names)}" for word, names in (("without", more), ("with", less)) if names]
            told.append(f"other statistics ({' and '.join(parts)})")
        else:
            told.append(f"{name}={other}, not {value}")
    if told:
        raise UserError(
            f"the evidence in {output} was made with {'; '.join(told)}; choose another --output, or pass --overwrite=true"
        )


def _save_state(path: Path, recording: Recording, made_from: Mapping[str, Any]) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in recording.state().items()}
    with atomic(path, "wb") as file:
        file.write(serialized(state, {"calibration": json.dumps(made_from)}))


def _continue(path: Path, recording: Recording, made_from: Mapping[str, Any]) -> None:
    """Load the state that an interrupted call left.

    Raises:
        UserError: it is of another calibration, or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            begun = json.loads((file.metadata() or {})["calibration"])
            _same(path.parent, begun, made_from)
            recording.load_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"cannot go on from {path}, it is corrupt; pass --overwrite=true to begin anew") from error


def _check_folder(output: Path, overwrite: bool) -> None:
    """An output folder is new, empty, or one with evidence, whole or in part.

    Raises:
        UserError: it holds something else.
    """
    left = {path.name for path in output.iterdir()} if output.is_dir() else set()
    known = {store.DESCRIPTION, store.ARRAYS, store.PARTIAL, ".lock"}
    foreign = {name for name in left - known if not name.startswith((f".{store.PARTIAL}.", f".{store.ARRAYS}."))}
    if foreign and overwrite:
        raise UserError(f"{output} holds something else than evidence ({min(foreign)}); choose another --output")
    new_folder(output, overwrite or not foreign)


def _summary(evidence: Evidence) -> str:
    layers = evidence.layers
    n = sum(len(layer.ids) for layer in layers)
    tokens = evidence.provenance["calibration_tokens"]
    names = sorted(layers[0].stats)
    lines = [f"{len(names)} statistics of {n} experts in {len(layers)} layers on {tokens:,} tokens: {', '.join(names)}"]
    if "counts" in names and tokens:
        idle = {
            index: [i for i, count in zip(layer.ids, layer.counts.tolist(), strict=True) if not count]
            for index, layer in enumerate(layers)
        }
        if total := sum(map(len, idle.values())):
            some = [
                f"layer {index}: {' '.join(map(str, ids[:8]))}{' ...' if len(ids) > 8 else ''}"
                for index, ids in idle.items()
                if ids
            ]
            more = f"; {len(some) - 8} more layers" if len(some) > 8 else ""
            lines.append(
                f"{total} experts received no token ({'; '.join(some[:8])}{more}): what is measured on tokens is 0 there"
            )
    return "\n".join(lines)


def _note(text: str) -> None:
    print(f"moeprune: {text}", file=sys.stderr)
