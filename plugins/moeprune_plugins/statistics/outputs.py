"""Moments and extremes of the experts' outputs f(t), before the combine weight is applied."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.pruning.statistic import Seen, Statistic


class MaxOutput(Statistic):
    """Largest |f(t)_d| over tokens and channels; 0 without tokens.

    Source: the mark of super experts, arXiv 2507.23279.
    """

    reduce = "max"

    def measure(self, seen: Seen) -> Tensor:
        """[E]."""
        assert seen.outputs is not None
        peaks = seen.outputs.abs().amax(-1).flatten().double()
        return peaks.new_zeros(seen.n_experts).scatter_reduce_(0, seen.indices.flatten(), peaks, "amax")


class MeanOutput(Statistic):
    """[E, D] mean of f(t); 0 without tokens.

    Source: the mean outputs that HC-SMoE clusters, arXiv 2410.08589, over the tokens routed to the expert.
    """

    def measure(self, seen: Seen) -> Tensor:
        """[E, 1 + D]: number of tokens, sum of f."""
        assert seen.outputs is not None
        ones = torch.ones_like(seen.indices)[..., None]
        return torch.cat([seen.per_expert(ones), seen.per_expert(seen.outputs)], 1)

    def finish(self, total: Tensor) -> Tensor:
        """[E, D]."""
        return total[:, 1:] / total[:, :1].clamp(min=1)


class MeanOutputNorm(MeanOutput):
    """Norm of the mean of f(t); 0 without tokens.

    Source: see `mean_f`.
    """

    def finish(self, total: Tensor) -> Tensor:
        """[E]."""
        norms: Tensor = torch.linalg.vector_norm(super().finish(total), dim=1)
        return norms


class OutputVariance(MeanOutput):
    """Mean of |f(t) - mean|^2; 0 without tokens.

    Source: MoNE, arXiv 2507.00390.
    """

    def measure(self, seen: Seen) -> Tensor:
        """[E, 2 + D]: number of tokens, sum of f, sum of |f|^2."""
        return torch.cat([super().measure(seen), seen.per_expert(seen.norms**2)[:, None]], 1)

    def finish(self, total: Tensor) -> Tensor:
        """[E]."""
        mean = super().finish(total[:, :-1])
        return (total[:, -1] / total[:, 0].clamp(min=1) - mean.square().sum(1)).clamp(min=0)
