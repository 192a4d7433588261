"""Records evidence: runs the model over some batches and measures what a pruner asks for, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from moeprune.errors import UserError
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.evidence import Evidence, LayerEvidence

RECORDED = frozenset({"counts", "taylor", "weights"})


def record(
    model: MoETransformer,
    batches: Iterable[Tensor],
    needs: frozenset[str],
    known: Mapping[str, list[NDArray[Any]]] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Evidence:
    """Evidence of `model` for a pruner.

    The model's weights, gradients and mode are as before when this returns.

    Args:
        model: not wrapped.
        batches: token batches [B, S + 1] on the model's device; read only if something has to be measured on data.
        needs: statistics that the pruner reads.
        known: statistics measured already, one array [E] per layer: not measured again.
        provenance: kept with the evidence.

    Raises:
        UserError: a statistic that nobody can record, or no batch where one is needed.
    """
    stats: dict[str, list[NDArray[Any]]] = {name: list(arrays) for name, arrays in (known or {}).items()}
    unknown = needs - RECORDED - stats.keys()
    if unknown:
        raise UserError(f"no recorder for the statistic {sorted(unknown)[0]!r}; known: {', '.join(sorted(RECORDED))}")
    missing = needs - {"weights"} - stats.keys()
    if missing:
        measured = _measure(model, batches, "taylor" in missing)
        stats |= {name: measured[name] for name in missing}
    layers = []
    for index, layer in enumerate(model.moe_layers):
        weights = {}
        if "weights" in needs:
            weights = {"gate_up": layer.experts.gate_up.detach(), "down": layer.experts.down.detach()} | {
                f"router.{name}": parameter.detach() for name, parameter in layer.router.named_parameters()
            }
        layers.append(LayerEvidence(layer.ids, layer.n_original, {n: a[index] for n, a in stats.items()}, weights))
    return Evidence(tuple(layers), model.config.top_k, dict(provenance or {}))


def _measure(model: MoETransformer, batches: Iterable[Tensor], gradients: bool) -> dict[str, list[NDArray[Any]]]:
    """Counts, and the Taylor sums if asked for, over all batches.

    Gradients are taken with autograd.grad, which leaves .grad and DDP's hooks alone.
    """
    layers = model.moe_layers
    counts = [np.zeros(layer.n_experts, dtype=np.int64) for layer in layers]
    weights = [w for layer in layers for w in (layer.experts.gate_up, layer.experts.down)]
    sums = [torch.zeros_like(w) for w in weights] if gradients else []
    trained = model.training
    seen = 0
    model.eval()
    try:
        for tokens in batches:
            with torch.set_grad_enabled(gradients):
                logits, routings = model.forward_with_routing(tokens[:, :-1])
                if gradients:
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
                    for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                        total += gradient
            for count, routing in zip(counts, routings, strict=True):
                count += routing.counts.cpu().numpy()
            seen += 1
    finally:
        model.train(trained)
    if not seen:
        raise UserError("calibration needs at least one batch of tokens; give data or more calibration batches")
    measured: dict[str, list[NDArray[Any]]] = {"counts": list(counts)}
    if gradients:
        products = [
            (w.detach() * g / seen).double().abs().flatten(1).sum(1) for w, g in zip(weights, sums, strict=True)
        ]
        measured["taylor"] = [(a + b).cpu().numpy() for a, b in zip(products[::2], products[1::2], strict=True)]
    return measured
