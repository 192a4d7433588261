"""`moeprune export`: moeprune's own models to transformers, and back."""

from __future__ import annotations

import sys
from pathlib import Path

from moeprune import checkpoints
from moeprune.checkpoints import Checkpoint
from moeprune.files import model_folder
from moeprune.interop import checkpoint as interop
from moeprune.interop import native


def command(model: Path, output: Path, overwrite: bool = False) -> None:
    """Write a model in the other form: one of moeprune's for transformers, one of transformers' as moeprune's own.

    Logits stay the same; the tokenizer, the experts' original ids and the plans come along.

    Args:
        model: moeprune's own (a .ckpt file or an exported folder), which becomes a Mixtral, Qwen3-MoE or OLMoE checkpoint, as
            its qk_norm is none, head or full; or a transformers checkpoint of these families (folder or name on the hub),
            which becomes moeprune's own. Layers of unequal size, and a bias of the output head that is not zero, take
            trust_remote_code=True to load with transformers.
        output: folder to write.
        overwrite: replace an existing output.
    """
    model_folder(output, overwrite, model if model.exists() else None)
    if interop.is_transformers(model):
        checkpoint = native.from_transformers(model)
        checkpoints.export(checkpoint, output, overwrite)
        form, reasons = "moeprune's own model", []
    else:
        checkpoint = checkpoints.read(model)
        reasons = native.export(checkpoint, output, overwrite, model)
        form = f"a transformers model of type {native.FAMILIES[checkpoint.config.qk_norm]}"
    print(f"{output}: {form} with {_experts(checkpoint)} experts per layer")
    if reasons:
        print(f"it takes trust_remote_code=True to load it, for {' and '.join(reasons)}")
    if not checkpoint.tokenizer:
        print(f"moeprune: {model} holds no tokenizer.json, so {output} has no tokenizer", file=sys.stderr)


def _experts(checkpoint: Checkpoint) -> str:
    numbers = [len(ids) for ids in checkpoint.expert_ids]
    return " ".join(map(str, numbers)) if len(set(numbers)) > 1 else str(numbers[0])
