"""Records evidence: runs the model over some batches and measures what a pruner asks for, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.errors import UserError
from moeprune.model.moe import MoELayer
from moeprune.model.router import Routing
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.evidence import Evidence, LayerEvidence

FAMILY = tuple(f"g{a}f{b}" for a in range(3) for b in range(3))  # in the order of `_Recorder.sums`
OUTPUTS = frozenset({*FAMILY, "max_f", "norm_mean_f", "var_f"})  # need the experts' outputs
GRADIENTS = frozenset({"taylor", "fisher"})
RECORDED = frozenset({"counts", "weights"}) | OUTPUTS | GRADIENTS
Gate = Literal["weight", "topk", "softmax"]


def record(
    model: MoETransformer,
    batches: Iterable[Tensor],
    needs: frozenset[str],
    known: Mapping[str, list[NDArray[Any]]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    gate: Gate = "weight",
) -> Evidence:
    """Evidence of `model` for a pruner, from ONE pass over the batches, whatever is asked for.

    Only routed tokens go through experts: memory beyond a forward pass is O(rows of a block). The model's weights, gradients
    and mode are as before when this returns.

    Args:
        model: not wrapped.
        batches: token batches [B, S + 1] on the model's device; read only if something has to be measured on data.
        needs: statistics that the pruner reads.
        known: statistics measured already, one array [E] per layer: not measured again.
        provenance: kept with the evidence.
        gate: which g: the weight really used to combine, the router's probabilities of the chosen experts renormalised to
            sum to 1 (`topk`), or as they are (`softmax`).

    Raises:
        UserError: a statistic that nobody can record, or no batch where one is needed.
    """
    stats: dict[str, list[NDArray[Any]]] = {name: list(arrays) for name, arrays in (known or {}).items()}
    unknown = needs - RECORDED - stats.keys()
    if unknown:
        raise UserError(f"no recorder for the statistic {sorted(unknown)[0]!r}; known: {', '.join(sorted(RECORDED))}")
    missing = needs - {"weights"} - stats.keys()
    if missing:
        measured = _measure(model, batches, missing, gate)
        stats |= {name: measured[name] for name in missing}
    layers = []
    for index, layer in enumerate(model.moe_layers):
        weights = {}
        if "weights" in needs:
            weights = {"gate_up": layer.experts.gate_up.detach(), "down": layer.experts.down.detach()} | {
                f"router.{name}": parameter.detach() for name, parameter in layer.router.named_parameters()
            }
        layers.append(LayerEvidence(layer.ids, layer.n_original, {n: a[index] for n, a in stats.items()}, weights))
    extra = {"gate": gate} if missing & OUTPUTS else {}
    return Evidence(tuple(layers), model.config.top_k, {**(provenance or {}), **extra})


def _measure(
    model: MoETransformer, batches: Iterable[Tensor], wanted: frozenset[str], gate: Gate
) -> dict[str, list[NDArray[Any]]]:
    """All of `wanted`, over all batches.

    Gradients are taken with autograd.grad, which leaves .grad and DDP's hooks alone.
    """
    layers = model.moe_layers
    counts = [np.zeros(layer.n_experts, dtype=np.int64) for layer in layers]
    gradients = bool(wanted & GRADIENTS)
    weights = [w for layer in layers for w in (layer.experts.gate_up, layer.experts.down)]
    sums = [torch.zeros_like(w) for w in weights] if gradients else []
    squares = [torch.zeros(len(w), dtype=torch.float64, device=w.device) for w in weights] if gradients else []
    recorders = [_Recorder(layer, wanted, gate) for layer in layers] if wanted & OUTPUTS else []
    trained = model.training
    seen = 0
    model.eval()
    try:
        for tokens in batches:
            with torch.set_grad_enabled(gradients):
                logits, routings = model.forward_with_routing(tokens[:, :-1])
                if gradients:
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
                    for total, square, gradient in zip(sums, squares, torch.autograd.grad(loss, weights), strict=True):
                        total += gradient
                        square += gradient.double().square().flatten(1).sum(1)
            for count, routing in zip(counts, routings, strict=True):
                count += routing.counts.cpu().numpy()
            seen += 1
    finally:
        model.train(trained)
        for recorder in recorders:
            recorder.remove()
    if not seen:
        raise UserError("calibration needs at least one batch of tokens; give data or more calibration batches")
    measured: dict[str, list[NDArray[Any]]] = {"counts": list(counts)}
    if gradients:
        products = [
            (w.detach() * g / seen).double().abs().flatten(1).sum(1) for w, g in zip(weights, sums, strict=True)
        ]
        for name, parts in (("taylor", products), ("fisher", [square / seen for square in squares])):
            measured[name] = [(a + b).cpu().numpy() for a, b in zip(parts[::2], parts[1::2], strict=True)]
    for name in wanted & OUTPUTS:
        measured[name] = [recorder.statistic(name) for recorder in recorders]
    return measured


class _Recorder:
    """Stands in for a layer's expert backend: computes the same output, and sums up what was asked for on the way."""

    def __init__(self, layer: MoELayer, wanted: frozenset[str], gate: Gate) -> None:
        E, D = layer.n_experts, layer.experts.gate_up.shape[2]
        self._layer, self._gate = layer, gate
        self._vectors, self._peak = bool(wanted & {"norm_mean_f", "var_f"}), "max_f" in wanted
        device = layer.experts.gate_up.device
        self.sums = torch.zeros(E, 9, dtype=torch.float64, device=device)  # g^a f^b, b fastest
        self.total = torch.zeros(E, D if self._vectors else 0, dtype=torch.float64, device=device)
        self.largest = torch.zeros(E, dtype=torch.float64, device=device)
        self._probs = torch.empty(0)
        self._hook = layer.router.register_forward_hook(self._routed)
        self._backend, layer.experts.backend = layer.experts.backend, self

    def remove(self) -> None:
        """Give the layer its own backend back."""
        self._layer.experts.backend = self._backend
        self._hook.remove()

    def _routed(self, router: nn.Module, args: Any, routing: Routing) -> None:
        self._probs = routing.probs.gather(1, routing.indices)

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        with torch.no_grad():
            out = self._measured(x, indices, weights, gate_up, down)
        if torch.is_grad_enabled():  # a pass that takes gradients as well computes the experts once more
            return self._backend(x, indices, weights, gate_up, down)
        return out

    def _measured(self, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        T, K = indices.shape
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        norms = torch.empty(T * K, dtype=torch.float64, device=x.device)
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        start = 0
        for expert, count in enumerate(torch.bincount(flat, minlength=len(gate_up)).tolist()):
            rows = order[start : start + count]
            start += count
            if not count:
                continue
            gate, up = F.linear(x.index_select(0, rows // K), gate_up[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, down[expert])
            out.index_add_(0, rows // K, (y * weights.flatten()[rows, None]).to(out.dtype))
            norms[rows] = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64)
            if self._vectors:
                self.total[expert] += y.sum(0, dtype=torch.float64)
            if self._peak:
                self.largest[expert] = torch.maximum(self.largest[expert], y.abs().max().double())
        used = weights if self._gate == "weight" else self._probs
        if self._gate == "topk":
            used = used / used.sum(1, keepdim=True)
        g = used.flatten().double()
        powers = [torch.ones_like(g), g, g * g], [torch.ones_like(norms), norms, norms * norms]
        self.sums.index_add_(0, flat, torch.stack([a * b for a in powers[0] for b in powers[1]], 1))
        return out.to(x.dtype)

    def statistic(self, name: str) -> NDArray[np.float64]:
        """[E], see evidence.py."""
        n = self.sums[:, 0].clamp(min=1)
        if name in FAMILY:
            value = self.sums[:, FAMILY.index(name)]
        elif name == "max_f":
            value = self.largest
        else:
            mean = self.total / n[:, None]
            norm = torch.linalg.vector_norm(mean, dim=1)
            value = norm if name == "norm_mean_f" else (self.sums[:, 2] / n - norm**2).clamp(min=0)
        return np.asarray(value.cpu())
