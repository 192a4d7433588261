"""The contract of routers: which experts a token goes to, and with which weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one layer went.

    Args:
        logits: [T, E] float32.
        probs: [T, E] float32, the router's distribution over all experts.
        weights: [T, K] weights the experts' outputs are combined with.
        indices: [T, K] int64 positions of the chosen experts.
        mask: [T] bool, False for padding; None when there is none.
    """

    logits: Tensor
    probs: Tensor
    weights: Tensor
    indices: Tensor
    mask: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """[E] int64 tokens routed to each expert; padding does not count."""
        chosen = self.indices if self.mask is None else self.indices[self.mask]
        return torch.bincount(chosen.flatten(), minlength=self.logits.shape[1])


class Router(nn.Module, ABC):
    """Chooses K of E experts for every token.

    Every subclass takes `(d_model, n_experts, top_k, **options)` and names in `expert_dims` its tensors that hold one
    entry per expert, with the dimension that counts experts, so that surgery can cut them.
    """

    expert_dims: ClassVar[Mapping[str, int]]

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.d_model, self.n_experts, self.top_k = d_model, n_experts, top_k

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route.

        Args:
            x: [T, D].
            mask: [T] bool, False for padding.
        """
