"""`moeprune prune`: prune a checkpoint once and write it."""

from __future__ import annotations

from pathlib import Path

import torch

from moeprune import checkpoints
from moeprune.errors import UserError
from moeprune.files import new_folder
from moeprune.pruning.calibration import record
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.pruner import Pruner
from moeprune.pruning.surgery import apply_plan
from moeprune.training.data import TextData
from moeprune.training.expert_pruning import CALIBRATION_SEED_OFFSET

KINDS = ("pruner", "criterion", "allocation")


def command(
    model: Path,
    pruner: Pruner,
    output: Path,
    data: str | None = None,
    calibration_batches: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    multiple_of: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    n_groups: int = 1,
    overwrite: bool = False,
) -> None:
    """Prune a checkpoint once and write it as a folder of safetensors.

    Args:
        model: a checkpoint file (.ckpt) or an exported folder.
        pruner: by short name or class path, with its options: --pruner=taylor --pruner.ratio=0.25.
        output: folder to write.
        data: text to calibrate on, where the pruner measures something: `embedded` or a folder; default: what the model
            was trained on.
        calibration_batches: batches to measure.
        batch_size: sequences per batch, each as long as the model takes.
        seed: of the choice of calibration text.
        multiple_of: experts kept per layer are a multiple of this (the expert-parallel size).
        min_keep: fewest experts a layer keeps.
        max_keep: most experts a layer keeps.
        n_groups: groups of a group-limited router.
        overwrite: replace an existing output.
    """
    constraints = Constraints(multiple_of, min_keep, max_keep, n_groups)
    new_folder(output, overwrite)
    checkpoint = checkpoints.read(model)
    transformer = checkpoint.model()
    constraints = constraints.with_groups(transformer.n_groups)
    batches: list[torch.Tensor] = []
    if pruner.needs - {"weights"}:
        if calibration_batches < 1:
            raise UserError(
                f"calibration_batches must be at least 1, got {calibration_batches}: {pruner!r} measures on data"
            )
        source = data or checkpoint.data.get("source", "embedded")
        domains = checkpoint.data.get("domains") if data is None else None
        config = checkpoint.config
        text = TextData(source, domains, config.vocab_size, config.max_seq_len, batch_size)
        if checkpoint.tokenizer and text.store.tokenizer_json != checkpoint.tokenizer:
            raise UserError(
                f"the data {source!r} is tokenized differently from what {model} was trained on; calibrate on its own data"
            )
        drawn = text.training_batches(calibration_batches, seed + CALIBRATION_SEED_OFFSET)
        batches = [drawn.batch(i) for i in range(calibration_batches)]
    provenance = {
        "model": str(model),
        "weights": checkpoints.fingerprint(checkpoint.state),
        "calibration_tokens": sum(batch[:, 1:].numel() for batch in batches),
    }
    evidence = record(transformer, batches, pruner.needs, provenance=provenance)
    plan = pruner.plan(evidence, constraints).made_by(pruner)
    apply_plan(transformer, plan)
    pruned = checkpoints.Checkpoint(
        checkpoint.config,
        [list(layer.ids) for layer in transformer.moe_layers],
        transformer.state_dict(),
        [*checkpoint.plans, plan],
        checkpoint.tokenizer,
        checkpoint.data,
        checkpoint.step,
    )
    checkpoints.export(pruned, output, overwrite)
    before = sum(value.numel() for value in checkpoint.state.values())
    after = sum(value.numel() for value in pruned.state.values())
    print(plan)
    print(f"{before:,} -> {after:,} parameters; written to {output}")
