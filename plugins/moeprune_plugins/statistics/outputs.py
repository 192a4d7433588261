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
        peaks = torch.maximum(seen.outputs.amax(-1), -seen.outputs.amin(-1)).flatten().double()
        return peaks.new_zeros(seen.n_experts).scatter_reduce_(0, seen.indices.flatten(), peaks, "amax")


class MeanOutput(Statistic):
    """Mean of f(t) over the tokens routed to the expert, [E, D]; 0 without tokens.

    Source: the constants that MoNE (arXiv 2507.00390) puts in place of experts. HC-SMoE (arXiv 2410.08589) clusters means over
    all tokens, whether routed to the expert or not, which would take every expert on every token.
    """

    def measure(self, seen: Seen) -> Tensor:
        """[E, 1 + D]: number of tokens, sum of f."""
        return torch.cat([seen.counts[:, None], seen.sums], 1)

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
    """Mean of |f(t) - mean|^2, the sum of the channels' variances; 0 without tokens.

    Source: MoNE, arXiv 2507.00390, which divides by one token less and takes the root.
    """

    def measure(self, seen: Seen) -> Tensor:
        """[E, 2 + D]: number of tokens, sum of f, sum of |f|^2."""
        return torch.cat([super().measure(seen), seen.per_expert(seen.norms.square())[:, None]], 1)

    def finish(self, total: Tensor) -> Tensor:
        """[E]."""
        mean = super().finish(total[:, :-1])
        return (total[:, -1] / total[:, 0].clamp(min=1) - mean.square().sum(1)).clamp(min=0)
