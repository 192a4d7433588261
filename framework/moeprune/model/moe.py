"""The MoE layer: a router and its experts, with the layout of the experts as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.model.config import MoEConfig
from moeprune.model.experts import Experts
from moeprune.model.router import Router, Routing
from moeprune.registry import create


class MoELayer(nn.Module):
    """Routes every token to K of the layer's experts and adds up their outputs.

    `expert_ids` holds the original id of the expert at each position; pruning shortens it.

    Args:
        config: sizes and router.
        n_experts: experts this layer has.
    """

    expert_ids: Tensor
    residual_norm: nn.Module  # set by the block

    def __init__(self, config: MoEConfig, n_experts: int) -> None:
        super().__init__()
        self.n_original = config.n_experts
        self.router: Router = create(
            "router",
            config.router,
            d_model=config.d_model,
            n_experts=n_experts,
            top_k=config.top_k,
            **config.router_options,
        )
        output_std = 0.02 / (2 * config.n_layers) ** 0.5
        self.experts = Experts(n_experts, config.d_model, config.d_expert, output_std, config.expert_backend)
        self.register_buffer("expert_ids", torch.arange(n_experts))

    @property
    def n_experts(self) -> int:
        """Experts the layer has now."""
        return len(self.expert_ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """Original ids, in order of position."""
        return tuple(self.expert_ids.tolist())

    def expert_tensors(self) -> Iterator[tuple[nn.Module, str, int]]:
        """(owner, name, dimension) of every tensor with one entry per expert: what surgery cuts."""
        yield self, "expert_ids", 0
        for owner in (self.router, self.experts):
            for name, dim in owner.expert_dims.items():
                if getattr(owner, name) is not None:  # a router's option may leave a buffer out
                    yield owner, name, dim

    def expert_parameters(self) -> Mapping[str, tuple[Tensor, int]]:
        """See `PrunableLayer`."""
        return {name: (parameter, 0) for name, parameter in self.experts.named_parameters()}

    def weights(self) -> Mapping[str, Tensor]:
        """See `PrunableLayer`."""
        gate, up = self.experts.gate_up.chunk(2, 1)
        found = {"gate": gate, "up": up, "down": self.experts.down}
        rows = getattr(self.router, "weight", None)
        if isinstance(rows, Tensor) and rows.shape == (self.n_experts, self.router.d_model):
            found["router"] = rows
        return found

    def logits_of(self, routed: Any) -> tuple[Tensor, Tensor]:
        """See `PrunableLayer`."""
        return routed.logits, routed.probs

    def resized(self, n_experts: int) -> None:
        """See `PrunableLayer`."""
        self.router.n_experts = n_experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Combined output [T, D] of the chosen experts, and where the tokens went.

        Args:
            x: [T, D].
            mask: [T] bool, False for padding.
        """
        routing = self.router(x, mask)
        return self.experts(x, routing.indices, routing.weights), routing
