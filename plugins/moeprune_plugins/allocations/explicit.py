"""Numbers per layer, as given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Allocation


class Explicit(Allocation):
    """Keeps exactly the given number of experts in each layer; `ratio` plays no part.

    Source: our own; the published list of a layer-adaptively pruned model (arXiv 2601.14327) is such numbers.

    Args:
        n_kept: experts to keep, one number per layer.
    """

    exact = True  # bounds that its numbers break are refused, not obeyed

    def __init__(self, n_kept: list[int]) -> None:
        self.n_kept = n_kept

    def allocate(
        self,
        scores: Sequence[NDArray[np.float64]],
        evidence: Evidence,
        constraints: Constraints,
        ratio: float,
    ) -> list[int]:
        """The given numbers.

        Raises:
            UserError: not one number per layer, or a number that the constraints do not allow; nothing is rounded.
        """
        if len(self.n_kept) != len(evidence.layers):
            raise UserError(
                f"n_kept holds {len(self.n_kept)} numbers for {len(evidence.layers)} MoE layers; give one per layer"
            )
        sizes = [
            (len(layer.ids), evidence.top_k, layer.n_original, index) for index, layer in enumerate(evidence.layers)
        ]
        possible = [constraints.feasible(*size) for size in sizes]
        for index, (n, size, allowed) in enumerate(zip(self.n_kept, sizes, possible, strict=True)):
            if n not in allowed:
                near = sorted(allowed, key=lambda number: (abs(number - n), number))[:2]
                raise UserError(
                    f"n_kept asks for {n} experts in layer {index}, which {_culprit(n, size, constraints)} does not "
                    f"allow; nearest allowed: {' or '.join(map(str, sorted(near)))}"
                )
        return list(self.n_kept)


def _culprit(n: int, size: tuple[int, int, int, int], constraints: Constraints) -> str:
    """The first constraint that forbids `n` all by itself."""
    n_experts, top_k, _, index = size
    if n > n_experts:
        return f"the layer's size of {n_experts}"
    if n < top_k:
        return f"top_k={top_k}"
    for name in ("multiple_of", "n_groups", "min_keep", "max_keep"):
        value = getattr(constraints, name)
        if n not in replace(Constraints(), **{name: value}).feasible(*size):
            return f"{name}={value[index] if isinstance(value, list) else value}"
    return f"protected={list(constraints.protected_in(index))}"
