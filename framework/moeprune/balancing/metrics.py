"""How uneven loads are: functions of one layer's counts, and a torchmetric that gathers counts over steps and ranks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

DEAD_SHARE = 1e-3  # an expert with less than 0.1 % of a layer's assignments counts as dead


def load_metrics(counts: NDArray[np.int64]) -> dict[str, float]:
    """How uneven one layer's counts [E] are.

        max_vio   max c / mean c - 1                  0 = balanced      (arXiv 2408.15664)
        entropy   H(c / sum c) / ln E                 1 = balanced
        cv        standard deviation / mean           0 = balanced
        gini      mean |c_i - c_j| / (2 mean c)       0 = balanced
        dead      share of experts with < 0.1 % of the assignments

    All are the balanced value when nothing was counted or E = 1.
    """
    E, total = len(counts), float(counts.sum())
    if total == 0 or E == 1:
        return {"max_vio": 0.0, "entropy": 1.0, "cv": 0.0, "gini": 0.0, "dead": 0.0}
    share = np.sort(counts / total)
    positive = share[share > 0]
    return {
        "max_vio": float(share[-1] * E - 1),
        "entropy": float(-(positive * np.log(positive)).sum() / np.log(E)),
        "cv": float(share.std() * E),
        "gini": float((2 * np.arange(1, E + 1) - E - 1) @ share / E),
        "dead": float((share < DEAD_SHARE).mean()),
    }


class ExpertLoad(Metric):
    """Tokens routed to each expert, per layer, summed over updates and ranks.

    Args:
        n_experts: experts of each layer; layers may differ.
    """

    full_state_update = False

    def __init__(self, n_experts: list[int]) -> None:
        super().__init__()
        self.n_layers = len(n_experts)
        for layer, n in enumerate(n_experts):
            self.add_state(f"layer{layer}", torch.zeros(n, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: list[Tensor]) -> None:
        """Add one step's counts, [E] int64 per layer."""
        for layer, count in enumerate(counts):
            state: Tensor = getattr(self, f"layer{layer}")
            state += count

    def compute(self) -> list[Tensor]:
        """[E] int64 per layer."""
        return [getattr(self, f"layer{layer}") for layer in range(self.n_layers)]

    def totals(self) -> list[NDArray[np.int64]]:
        """`compute` as numpy arrays of one dimension, also where E = 1 (torchmetrics squeezes those)."""
        return [count.reshape(-1).cpu().numpy().copy() for count in self.compute()]
