"""Output-aware importance of experts, weighted by what the layer does to the token."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.pruning.statistic import Seen, Statistic


class EasyEP(Statistic):
    """Sum of g |f| (1 - cos(h, h + y)): h is the residual stream before the layer, y what the routed experts add to it.

    Over the tokens routed to the expert; shared experts are no part of y.

    Source: EASY-EP, arXiv 2504.06792, as its authors' code computes it, which also cuts the cosine off at 1.
    """

    reads = frozenset({"outputs", "residual"})

    def measure(self, seen: Seen) -> Tensor:
        """[E]."""
        assert seen.combined is not None
        assert seen.residual is not None
        h, y = seen.residual.to(seen.combined.dtype), seen.combined
        length = torch.linalg.vector_norm(h, dim=1).clamp(min=torch.finfo(h.dtype).tiny)
        share = torch.linalg.vecdot(h, y) / length
        across = torch.linalg.vector_norm(torch.addcmul(y, (share / length)[:, None], h, value=-1), dim=1)
        # a small angle is lost in its cosine, but not in the parts of y along h and across it
        angle = torch.atan2(across.double(), length.double() + share)
        return seen.per_expert(seen.gates * seen.norms * 2 * torch.sin(angle / 2).square()[:, None])
