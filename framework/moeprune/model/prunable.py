"""What pruning needs to know of a model: its MoE layers, as objects that say where everything is.

`MoETransformer` is one such model; `moeprune.interop` makes one of a transformers checkpoint. Calibration, surgery and
pruners work on these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class PrunableLayer(Protocol):
    """One MoE layer."""

    @property
    def n_original(self) -> int:
        """Experts the layer had before any pruning."""
        ...

    @property
    def router(self) -> nn.Module:
        """Called once per forward pass, before the experts."""
        ...

    @property
    def experts(self) -> nn.Module:
        """forward(x [T, D], indices [T, K], weights [T, K]) -> [T, D], linear in the weights."""
        ...

    @property
    def ids(self) -> tuple[int, ...]:
        """Original ids of the experts, in order of position."""
        ...

    @property
    def n_experts(self) -> int:
        """Experts the layer has now."""
        ...

    @property
    def residual_norm(self) -> nn.Module:
        """The module whose input is the residual stream before this layer."""
        ...

    def logits_of(self, routed: Any) -> tuple[Tensor, Tensor]:
        """Router logits and probabilities over all experts, both [T, E] float32, from what `router` returned."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """`gate`, `up` [E, F, D], `down` [E, D, F] and, where the router has one row per expert, `router` [E, D]; views of the
        live parameters.
        """
        ...

    def expert_tensors(self) -> Iterator[tuple[Any, str, int]]:
        """(owner, attribute, dimension) of every tensor with one entry per expert: what surgery cuts."""
        ...

    def expert_parameters(self) -> Mapping[str, tuple[Tensor, int]]:
        """The experts' parameters by name, with the dimension that counts experts: what gradients are taken of."""
        ...

    def resized(self, n_experts: int) -> None:
        """Called after surgery: set whatever else holds the number of experts."""
        ...


class PrunableModel(Protocol):
    """A language model with MoE layers."""

    @property
    def training(self) -> bool:
        """As nn.Module."""
        ...

    @property
    def moe_layers(self) -> Sequence[PrunableLayer]:
        """In order."""
        ...

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        ...

    @property
    def n_groups(self) -> int:
        """Groups of a group-limited router; 1 without."""
        ...

    @property
    def min_experts(self) -> int:
        """Fewest experts a layer must keep for the router to work; top_k unless it says otherwise."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        ...

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, V] from tokens [B, S] and mask [B, S] bool, False for padding."""
        ...

    def train(self, mode: bool = True) -> Any:
        """As nn.Module."""
        ...
