"""The sequence-wise balance loss."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.balancing.balancer import Balancer
from moeprune.model.router import Router, Routing


class SequenceWise(Balancer):
    """Sequence-wise balance loss: per sequence sum_i f_i P_i, mean over sequences; 1 when every sequence is balanced.

    With S the sequence's tokens, f_i = E / (K S) * c_i counts those that expert i received, and P_i is the mean over them of
    its probability, normalised to sum to 1 over the experts. Padding counts in neither; a sequence of padding alone is left out.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20, there the complement of `loss_free`.

    Args:
        coefficient: weight of the term; the paper uses 1e-4.
    """

    def __init__(self, coefficient: float = 1e-4) -> None:
        super().__init__(coefficient)

    def loss(self, routing: Routing, router: Router) -> Tensor:
        """See the class."""
        (T, E), K, B = routing.probs.shape, routing.indices.shape[1], routing.n_sequences
        mask = torch.ones(T, dtype=torch.bool, device=routing.probs.device) if routing.mask is None else routing.mask
        probs = routing.probs / routing.probs.sum(1, keepdim=True)
        tokens = mask.view(B, -1).sum(1)
        sequence = torch.arange(T, device=mask.device) // (T // B)
        chosen = (sequence[:, None] * E + routing.indices)[mask]
        counts = torch.bincount(chosen.flatten(), minlength=B * E).view(B, E)
        some = tokens.clamp(min=1)[:, None]
        f = E * counts.to(probs.dtype) / (K * some)
        P = (probs * mask[:, None]).view(B, -1, E).sum(1) / some
        return (f * P).sum() / (tokens > 0).sum().clamp(min=1)
