"""Averages experts into one: how surgery carries out a plan that merges. The strategies that choose what to merge are pruners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moeprune.errors import UserError
from moeprune.model.prunable import PrunableLayer
from moeprune.pruning.plan import Merge

# What an expert is made of, and the dimension that counts its hidden neurons; a layer has some of these.
NEURONS: Mapping[str, int | None] = {
    "gate": 0,  # [F, D]
    "up": 0,  # [F, D]
    "down": 1,  # [D, F]
    "gate_bias": 0,  # [F]
    "up_bias": 0,  # [F]
    "down_bias": None,  # [D]
}


@torch.no_grad()
def merge_experts(layer: PrunableLayer, merges: Sequence[Merge], align: bool) -> None:
    """Replace, in place, the weights of each `merge.into` by the weighted mean of its members.

    The router is left alone: the row of `merge.into` stays its own, those of the other members go when the plan cuts them.

    Args:
        layer: with all members in it.
        merges: disjoint groups of original ids.
        align: permute each member's hidden neurons first, to match those of `merge.into` (see `alignment`).

    Raises:
        UserError: the experts have parameters besides weights and biases.
    """
    if not merges:
        return
    weights = {name: tensor for name, tensor in layer.weights().items() if name in NEURONS}
    known, whole = (
        sum(tensor.numel() for tensor in tensors)
        for tensors in (weights.values(), (parameter for parameter, _ in layer.expert_parameters().values()))
    )
    if known != whole:
        raise UserError(
            f"the experts have {whole:,} parameters, of which {known:,} are weights and biases that can be averaged; "
            f"use a pruner that does not merge"
        )
    position = {expert: i for i, expert in enumerate(layer.ids)}
    for merge in merges:
        target = position[merge.into]
        own = {name: tensor[target] for name, tensor in weights.items()}
        sums = {name: torch.zeros_like(part, dtype=torch.float64) for name, part in own.items()}
        for member, share in zip(merge.members, merge.weights, strict=True):
            parts = {name: tensor[position[member]] for name, tensor in weights.items()}
            if align and member != merge.into:
                order = alignment(own, parts)
                parts = {name: _reordered(part, NEURONS[name], order) for name, part in parts.items()}
            for name, part in parts.items():
                sums[name] += share * part.double()
        for name, total in sums.items():
            own[name].copy_(total)


def alignment(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """[F] the order of the other expert's hidden neurons that matches this one's best: the assignment of largest total inner
    product of the neurons' weights (gate row, up row, down column, biases). Permuting the neurons of an expert, all these
    together, does not change what it computes.

    Source: weight matching, Git Re-Basin, arXiv 2209.04836, as M-SMoE (arXiv 2310.01334) uses it.

    Args:
        own: parts of one expert, see `NEURONS`.
        other: the same parts of the other.
    """
    mine, theirs = _neurons(own), _neurons(other)
    gain = (mine @ theirs.T).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1]).to(mine.device)


def _neurons(parts: Mapping[str, Tensor]) -> Tensor:
    """[F, ...] float32, all weights of each hidden neuron in a row."""
    rows = [part.movedim(dim, 0) for name, part in parts.items() if (dim := NEURONS[name]) is not None]
    return torch.cat([row.flatten(1) if row.ndim > 1 else row[:, None] for row in rows], 1).float()


def _reordered(part: Tensor, dim: int | None, order: Tensor) -> Tensor:
    return part if dim is None else part.index_select(dim, order)
