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
        n_sequences: B; the T tokens are B sequences one after the other.
    """

    logits: Tensor
    probs: Tensor
    weights: Tensor
    indices: Tensor
    mask: Tensor | None = None
    n_sequences: int = 1

    @property
    def counts(self) -> Tensor:
        """[E] int64 tokens routed to each expert; padding does not count."""
        chosen = self.indices if self.mask is None else self.indices[self.mask]
        return torch.bincount(chosen.flatten(), minlength=self.logits.shape[1])


class Router(nn.Module, ABC):
    """Chooses K of E experts for every token: `logits`, then `choose`, both in float32 under mixed precision as well.

    Every subclass takes `(d_model, n_experts, top_k, **options)` and names in `expert_dims` its tensors that hold one
    entry per expert (or are None), with the dimension that counts experts, so that surgery can cut them. Layers may
    differ in E.

    Attributes:
        n_groups: groups to which the choice is limited; pruning keeps equal numbers in each.
        experts_interact: whether a token's logit for one expert depends on which other experts there are. Where it does,
            a pruned layer does not equal one whose removed experts are masked.
    """

    expert_dims: ClassVar[Mapping[str, int]]
    n_groups: int = 1
    experts_interact: ClassVar[bool] = False

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.d_model, self.n_experts, self.top_k = d_model, n_experts, top_k

    @property
    def min_experts(self) -> int:
        """Fewest experts with which it works: top_k, or more where groups ask for it."""
        return self.top_k

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """[T, E] from x [T, D], both float32."""

    @abstractmethod
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [T, E], and the chosen experts' weights [T, K] and positions [T, K], from logits [T, E].

        A logit of minus infinity means that this expert cannot be chosen.
        """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route.

        Args:
            x: [T, D].
            mask: [T] bool, False for padding.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x.float())
            probs, weights, indices = self.choose(logits)
        return Routing(logits, probs, weights, indices, mask)
