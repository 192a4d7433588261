"""`moeprune prune`: prune a checkpoint once and write it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from moeprune.commands.subject import Reading, Subject, layerwise_evidence, subject
from moeprune.errors import UserError
from moeprune.files import model_folder
from moeprune.interop import checkpoint as interop
from moeprune.pruning import store
from moeprune.pruning.calibration import HELD_OUT, WEIGHTS, Gate, record
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner
from moeprune.pruning.surgery import apply_plan

KINDS = ("pruner", "criterion", "allocation")


def command(
    model: Path,
    output: Path,
    pruner: Pruner | None = None,
    plan: Path | None = None,
    evidence: Path | None = None,
    data: str | None = None,
    calibration_batches: int = 32,
    batch_size: int = 8,
    seq_len: int | None = None,
    pack: bool | None = None,
    seed: int = 0,
    gate: Gate = "weight",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    layerwise: bool = False,
    uniform_view: bool = False,
    protected: list[list[int]] | None = None,
    multiple_of: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    n_groups: int = 1,
    overwrite: bool = False,
) -> None:
    """Prune a checkpoint once and write it as a folder of safetensors. Give a pruner, or a plan that is ready.

    Args:
        model: a checkpoint file (.ckpt), an exported folder, or a transformers checkpoint (folder or name on the hub). What needs
            no forward pass (a ready plan, saved evidence, weights alone) is applied to its files shard by shard.
        output: folder to write.
        pruner: by short name or class path, with its options: --pruner=taylor --pruner.ratio=0.25.
        plan: a plan of this model's experts, as `moeprune plan` writes it, instead of a pruner.
        evidence: folder that `moeprune calibrate` wrote for this model; the pruner reads it and nothing is measured anew.
        data: text to calibrate on, where the pruner measures something: `embedded` or a folder; for a transformers checkpoint
            also a .txt or .jsonl file (text or chats) or the name of a data set. Default: what the model was trained on,
            `embedded` if unknown.
        calibration_batches: batches to measure.
        batch_size: sequences per batch.
        seq_len: tokens per sequence; default: as many as the model takes, at most 2048 for a transformers checkpoint.
        pack: transformers checkpoints: join documents into full sequences, or one document per sequence; default: pack text,
            one chat per sequence.
        seed: of the choice of calibration text.
        gate: which gate weight statistics use: the one really used to combine, the probabilities of the chosen experts
            renormalised to sum to 1 (topk), or as they are (softmax).
        dtype: transformers checkpoints: of the weights in memory, and of what is written from there; auto takes the
            checkpoint's, which a model that is pruned file by file (a plan, evidence, layerwise, no data) keeps.
        device: where the model runs.
        layerwise: transformers checkpoints larger than memory: measure with one decoder layer in memory at a time.
        uniform_view: transformers checkpoints: pad unequal layers to the largest with experts that are never chosen, so that stock
            code loads them; refused where that is not exact.
        protected: per layer the ids of experts that stay whatever their score.
        multiple_of: experts kept per layer are a multiple of this (the expert-parallel size).
        min_keep: fewest experts a layer keeps.
        max_keep: most experts a layer keeps.
        n_groups: groups of a group-limited router.
        overwrite: replace an existing output.
    """
    if pruner is None and plan is None:
        raise UserError("missing: pruner; give --pruner=NAME, or --plan=FILE for a plan that is ready")
    if plan is not None and (pruner is not None or evidence is not None):
        raise UserError(
            f"a plan needs no {'pruner' if pruner is not None else 'evidence'}; give --plan or the other, not both"
        )
    constraints = Constraints(multiple_of, min_keep, max_keep, n_groups, protected)
    how = Reading(data, calibration_batches, batch_size, seq_len, pack, seed, dtype, device)
    model_folder(output, overwrite, model if model.exists() else None)
    ready = None if plan is None else PrunePlan.load(plan)
    needs: frozenset[str] = frozenset() if pruner is None else pruner.needs
    saved = None if evidence is None else store.load(evidence, needs)
    measured = needs - {"weights"} - WEIGHTS if saved is None else needs & {"acceptance"}
    if layerwise and measured:
        saved = layerwise_evidence(model, how, needs, frozenset(), gate)
        measured = frozenset()
    whole = measured | needs & {"weights"}
    if interop.is_transformers(model) and not whole and not uniform_view:
        if dtype != "auto":
            told = (
                f"moeprune: the model is pruned file by file, so its weights are not written as {dtype} but as they are"
            )
            print(told, file=sys.stderr)
        _stream(interop.resolve(model), output, ready, pruner, saved, evidence, constraints, overwrite)
        return
    it = subject(model, how, bool(measured))
    constraints = constraints.for_model(it.model)
    if ready is not None:
        _check_plan(ready, it, constraints)
    else:
        assert pruner is not None
        if saved is None:
            found = record(it.model, it.batches, needs, provenance=it.provenance, gate=gate)
        else:
            found = _of_this_model(saved, evidence or model, pruner, it)
        ready = pruner.plan(found, constraints).made_by(pruner)
    apply_plan(it.model, ready)
    before, after = it.write(ready, output, overwrite, uniform_view)
    print(ready)
    print(f"{before:,} -> {after:,} parameters; written to {output}")


def _stream(
    source: Path,
    output: Path,
    ready: PrunePlan | None,
    pruner: Pruner | None,
    saved: Evidence | None,
    evidence: Path | None,
    constraints: Constraints,
    overwrite: bool,
) -> None:
    """Prune a transformers checkpoint file by file, without loading the model.

    Raises:
        UserError: evidence of another model, a plan that breaks a constraint.
    """
    from moeprune.interop.streaming import prune_streaming
    from moeprune.interop.weights import OnDisk, weight_statistics

    interop.check_files(source)
    disk = OnDisk(source)
    provenance = {"model": str(source), "weights": interop.fingerprint(source)}
    it = Subject(disk.model, [], provenance, lambda plan, folder, again, view: (0, 0))
    constraints = constraints.for_model(disk.model)
    if ready is not None:
        _check_plan(ready, it, constraints)
    else:
        assert pruner is not None
        if saved is None:
            found = weight_statistics(disk, pruner.needs, provenance)
        else:
            found = _of_this_model(saved, evidence or source, pruner, it)
        ready = pruner.plan(found, constraints).made_by(pruner)
    done = prune_streaming(disk, output, ready, provenance, overwrite)
    print(ready)
    print(f"{done.read:,} bytes read, {done.written:,} bytes of weights written to {output}")


def _of_this_model(saved: Evidence, folder: Path, pruner: Pruner, it: Subject) -> Evidence:
    """Saved evidence with what only the live model has, where the pruner reads that.

    Raises:
        UserError: evidence of another model, or without a statistic that the pruner reads.
    """
    theirs, ours = saved.provenance.get("weights"), it.provenance["weights"]
    if theirs != ours:
        whose = (
            f"{saved.provenance.get('model', 'a model')} (weights {str(theirs)[:12]})" if theirs else "unknown weights"
        )
        raise UserError(
            f"the evidence in {folder} was measured on {whose}, not on {it.provenance['model']} (weights {ours[:12]}); "
            f"measure this one with `moeprune calibrate`"
        )
    saved.require(pruner.needs - store.LIVE, f"pruner {pruner!r}")
    live = pruner.needs & store.LIVE
    if not live:
        return saved
    known = {name: [layer.stats[name] for layer in saved.layers] for name in saved.layers[0].stats}
    return record(it.model, it.batches[:HELD_OUT], live, known, saved.provenance)


def _check_plan(plan: PrunePlan, it: Subject, constraints: Constraints) -> None:
    """Check a plan that is ready, and say so where it was made for other weights.

    Raises:
        UserError: it breaks a constraint.
    """
    if [set(ids) for ids in plan.before] != [set(layer.ids) for layer in it.model.moe_layers]:
        return  # which surgery refuses
    layers = tuple(LayerEvidence(layer.ids, layer.n_original, {}) for layer in it.model.moe_layers)
    PrunePlan.from_kept(plan.kept, Evidence(layers, it.model.top_k), constraints)
    theirs = plan.provenance.get("weights")
    if theirs and theirs != it.provenance["weights"]:
        print(
            f"moeprune: the plan was made for other weights ({str(theirs)[:12]}): its experts are taken by number",
            file=sys.stderr,
        )
