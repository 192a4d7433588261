"""What a layer's output loses with an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.pruning.statistic import Seen, Statistic


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
        own = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        rest = g @ (1 - own)  # [T, K] weight of the token's other experts
        shares = g[:, None] * (1 - own) / rest.masked_fill(rest == 0, 1)[:, :, None]  # weights may be negative
        # y - y' = g_k (f_k - mean of the other f, weighted by their shares): no difference of large numbers
        lost = torch.bmm((own - shares).to(f.dtype), f)
        errors = (g * torch.linalg.vector_norm(lost, dim=-1)).square()
        return torch.cat([seen.per_expert(errors), g.new_tensor([len(g)])])

    def finish(self, total: Tensor) -> Tensor:
        """[E]."""
        return total[:-1] / total[-1].clamp(min=1)
