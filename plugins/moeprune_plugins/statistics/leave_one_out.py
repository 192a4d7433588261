"""What a layer's output loses with an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.pruning.statistic import Seen, Statistic

TOKENS = 128  # whose differences stay in the cache until their norm is taken


class LeaveOneOut(Statistic):
    """Mean over all tokens of |y - y'|^2: y is the layer's output, y' its output without the expert.

    Tokens that were not routed to the expert count 0. The weights of the token's other experts are scaled up so that all its
    weights keep their sum; the token is not routed to the next expert instead. Without other experts, or when they all have
    weight 0, y' = 0. The weights are those the model combined with, whatever gate definition was asked for.

    Source: the expert removal of ModelOpt's Puzzletron, as its code computes it: there the router chooses anew among the other
    experts, and errors are averaged over the channels as well.
    """

    def measure(self, seen: Seen) -> Tensor:
        """[E + 1]: sums of squared errors, number of tokens."""
        assert seen.outputs is not None
        f, g = seen.outputs, seen.weights.double()
        lost = self._of_two(seen, g) if g.shape[1] == 2 else self._of_many(f, g)
        return torch.cat([seen.per_expert((g * lost).square()), g.new_tensor([len(g)])])

    @staticmethod
    def _of_two(seen: Seen, g: Tensor) -> Tensor:
        """[T, 2] as `_of_many`, without a small matrix product per token, which takes several times as long."""
        assert seen.outputs is not None
        apart = torch.linalg.vector_norm(seen.outputs[:, 0] - seen.outputs[:, 1], dim=-1).double()
        return torch.where(g.flip(1) != 0, apart[:, None], seen.norms)

    @staticmethod
    def _of_many(f: Tensor, g: Tensor) -> Tensor:
        """[T, K] norm of f_k minus the mean of the other f: y - y' is g_k times that, no difference of large numbers."""
        own = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        rest = g @ (1 - own)  # [T, K] weight of the token's other experts
        shares = g[:, None] * (1 - own) / rest.masked_fill(rest == 0, 1)[:, :, None]  # weights may be negative
        parts = zip(torch.split((own - shares).to(f.dtype), TOKENS), torch.split(f, TOKENS), strict=True)
        return torch.cat([torch.linalg.vector_norm(torch.bmm(share, each), dim=-1) for share, each in parts])

    def finish(self, total: Tensor) -> Tensor:
        """[E]."""
        return total[:-1] / total[-1].clamp(min=1)
