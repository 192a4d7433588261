"""The contract of statistics: what is summed up over the tokens of a calibration set, per expert."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from moeprune.pruning.pruner import _Described


@dataclass(frozen=True)
class Seen:
    """What one layer did with some tokens; padding is left out.

    Args:
        n_experts: E.
        x: [T, D] input of the layer.
        outputs: [T, K, D] f, the chosen experts' outputs before the combine weight is applied, float32 or float64; None
            unless read.
        combined: [T, D] sum over the chosen experts of weight times output; None unless outputs are read.
        indices: [T, K] positions of the chosen experts.
        weights: [T, K] weights they were combined with.
        gates: [T, K] float64 g, by the gate definition that was asked for.
        logits: [T, E] float32 of the router; None unless `routing` is read.
        residual: [T, D] the residual stream before the layer; None unless read.
    """

    n_experts: int
    x: Tensor
    outputs: Tensor | None
    combined: Tensor | None
    indices: Tensor
    weights: Tensor
    gates: Tensor
    logits: Tensor | None
    residual: Tensor | None

    @cached_property
    def _chosen(self) -> Tensor:
        return self.indices.flatten()

    @cached_property
    def norms(self) -> Tensor:
        """[T, K] float64, Euclidean norm of the experts' outputs."""
        assert self.outputs is not None
        norms: Tensor = torch.linalg.vector_norm(self.outputs, dim=-1).double()
        return norms

    @cached_property
    def counts(self) -> Tensor:
        """[E] int64, tokens that chose the expert."""
        return torch.bincount(self._chosen, minlength=self.n_experts)

    @cached_property
    def sums(self) -> Tensor:
        """[E, D] float64, sum of the expert's outputs; computed once for all statistics that need it."""
        assert self.outputs is not None
        return self.per_expert(self.outputs)

    def per_expert(self, values: Tensor) -> Tensor:
        """Sum of values [T, K, ...] by expert: [E, ...] float64."""
        flat, chosen = values.flatten(0, 1), self._chosen
        if flat.ndim == 1 and len(flat):
            return torch.bincount(chosen, flat.double(), minlength=self.n_experts)
        sums = flat.new_zeros(self.n_experts, *flat.shape[1:], dtype=torch.float64)
        rows = max(1, 2**17 // math.prod(flat.shape[1:]))  # whose float64 copy fits the cache
        for i in range(0, len(flat), rows):
            sums.index_add_(0, chosen[i : i + rows], flat[i : i + rows].double())
        return sums


class Statistic(_Described, ABC):
    """Sums something up over the tokens that the calibration routes to the experts of a layer.

    Derive, register under the name by which pruners ask for it in `needs`, and take no arguments.

    `reads` says what of `Seen` is used besides the routing: `outputs` (the experts' outputs), `routing` (the router's
    logits), `residual` (the residual stream).
    """

    reads: frozenset[Literal["outputs", "routing", "residual"]] = frozenset({"outputs"})
    reduce: Literal["sum", "max"] = "sum"  # how the states of two halves of the data combine

    @abstractmethod
    def measure(self, seen: Seen) -> Tensor:
        """Contribution of some tokens, float64, of a shape that does not depend on them; combined by `reduce`."""

    def finish(self, total: Tensor) -> Tensor:
        """The statistic, first dimension E, from the combined contributions; they themselves unless overridden."""
        return total
