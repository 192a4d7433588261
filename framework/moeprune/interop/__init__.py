"""Existing checkpoints of the transformers library: pruning them in place, exporting, importing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(path: str | Path) -> Any:
    """The model of any checkpoint, in evaluation mode, on the CPU: a torch module, ready to be called.

    Args:
        path: moeprune's own checkpoint file or exported folder (a `MoETransformer`), or a transformers checkpoint, pruned or not, as
            a folder or a name on the hub (the model as transformers makes it, layers of unequal size included).

    Raises:
        UserError: there is none, it is corrupt, or not of a form that can be read.
    """
    from moeprune import checkpoints
    from moeprune.interop import checkpoint

    if checkpoint.is_transformers(path):
        return checkpoint.load(path).model
    return checkpoints.read(path).model()
