"""Averages experts into one: how surgery carries out a plan that merges. The strategies that choose what to merge are pruners."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moeprune.model.prunable import PrunableLayer
from moeprune.pruning.plan import Merge


@torch.no_grad()
def merge_experts(layer: PrunableLayer, merges: Sequence[Merge], align: bool) -> None:
    """Replace, in place, the weights of each `merge.into` by the weighted mean of its members.

    The router is left alone: the row of `merge.into` stays its own, those of the other members go when the plan cuts them.

    Args:
        layer: with all members in it.
        merges: disjoint groups of original ids.
        align: permute each member's hidden neurons first, to match those of `merge.into` (see `alignment`).
    """
    position = {expert: i for i, expert in enumerate(layer.ids)}
    weights = layer.weights()
    gate, up, down = (weights[name] for name in ("gate", "up", "down"))
    for merge in merges:
        target = position[merge.into]
        sums = [torch.zeros_like(w[target], dtype=torch.float64) for w in (gate, up, down)]
        for member, share in zip(merge.members, merge.weights, strict=True):
            i = position[member]
            order = (
                alignment(*(w[target] for w in (gate, up, down)), *(w[i] for w in (gate, up, down)))
                if (align and i != target)
                else slice(None)
            )
            for total, part in zip(sums, (gate[i][order], up[i][order], down[i][:, order]), strict=True):
                total += share * part.double()
        for w, total in zip((gate, up, down), sums, strict=True):
            w[target] = total.to(w.dtype)


def alignment(
    gate: Tensor, up: Tensor, down: Tensor, other_gate: Tensor, other_up: Tensor, other_down: Tensor
) -> Tensor:
    """[F] the order of the other expert's hidden neurons that matches this one's best: the assignment of largest total inner
    product of the neurons' weights (gate row, up row, down column). Permuting the neurons of a SwiGLU changes nothing else.

    Source: weight matching, Git Re-Basin, arXiv 2209.04836, as M-SMoE (arXiv 2310.01334) uses it.

    Args:
        gate: [F, D], as the others of `gate` and `up`.
        up: [F, D].
        down: [D, F].
        other_gate: [F, D].
        other_up: [F, D].
        other_down: [D, F].
    """
    gain = gate @ other_gate.T + up @ other_up.T + down.T @ other_down
    return torch.from_numpy(linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)[1]).to(gate.device)
