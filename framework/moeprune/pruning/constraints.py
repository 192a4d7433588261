"""What a deployment allows: bounds and multiples on the number of experts a layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError


@dataclass(frozen=True)
class Constraints:
    """Bounds that every plan obeys, all of them at once, besides kept >= top_k.

    Args:
        multiple_of: experts kept per layer are a multiple of this (the expert-parallel size).
        min_keep: fewest experts a layer keeps.
        max_keep: most experts a layer keeps; None for no bound.
        n_groups: groups of a group-limited router (DeepSeek-V3); each keeps the same number of experts. A group is a
            run of E / n_groups neighbouring original ids.

    Raises:
        UserError: a bound that no layer could meet.
    """

    multiple_of: int = 1
    min_keep: int = 1
    max_keep: int | None = None
    n_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("multiple_of", "min_keep", "n_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_keep is not None and self.max_keep < self.min_keep:
            raise UserError(f"max_keep={self.max_keep} is below min_keep={self.min_keep}; raise one or lower the other")

    def feasible(self, n_experts: int, top_k: int, n_original: int | None = None, layer: int | None = None) -> range:
        """Every number of experts that a layer of `n_experts` may keep, ascending; never empty.

        Args:
            n_experts: experts the layer has now.
            top_k: experts the router picks per token.
            n_original: experts the layer had at first, which define the groups; default `n_experts`.
            layer: index for the message.

        Raises:
            UserError: no number meets all constraints; the sentence names the two that collide.
        """
        where = "a layer" if layer is None else f"layer {layer}"
        n_original = n_experts if n_original is None else n_original
        if top_k > n_experts:
            raise UserError(f"top_k={top_k} is more than the {n_experts} experts of {where}; lower top_k")
        if n_original % self.n_groups:
            raise UserError(
                f"n_groups={self.n_groups} does not divide the {n_original} experts of {where}; "
                f"choose a divisor of {n_original}"
            )
        if self.multiple_of > n_experts:
            raise UserError(
                f"multiple_of={self.multiple_of} is more than the {n_experts} experts of {where}; "
                f"choose at most {n_experts}"
            )
        if self.min_keep > n_experts:
            raise UserError(f"min_keep={self.min_keep} is more than the {n_experts} experts of {where}; lower min_keep")
        lower_name, lower = max(("top_k", top_k), ("min_keep", self.min_keep), key=lambda item: item[1])
        upper = n_experts if self.max_keep is None else min(n_experts, self.max_keep)
        upper_name = "max_keep" if self.max_keep is not None and self.max_keep < n_experts else "number of experts"
        if lower > upper:
            raise UserError(f"{lower_name}={lower} is above {upper_name}={upper} in {where}; no plan meets both")
        step = math.lcm(self.multiple_of, self.n_groups)
        allowed = range(-(-lower // step) * step, upper + 1, step)
        if not allowed:
            steps = [
                f"{name}={value}"
                for name, value in (("multiple_of", self.multiple_of), ("n_groups", self.n_groups))
                if value > 1
            ]
            bound = f"{lower_name}={lower}" if upper // step else f"{upper_name}={upper}"
            raise UserError(
                f"{' and '.join(steps)} collide{'s' if len(steps) == 1 else ''} with {bound} in {where}: between "
                f"{lower} and {upper} there is no multiple of {step}"
            )
        return allowed

    def nearest_at_least(
        self, wanted: int, n_experts: int, top_k: int, n_original: int | None = None, layer: int | None = None
    ) -> int:
        """The smallest allowed number that is at least `wanted`; the largest allowed one if there is none."""
        allowed = self.feasible(n_experts, top_k, n_original, layer)
        return next((n for n in allowed if n >= wanted), allowed[-1])


def keep_highest(
    scores: NDArray[np.float64], n_keep: int, ids: Sequence[int], n_original: int, n_groups: int = 1
) -> tuple[int, ...]:
    """Original ids of the `n_keep` experts of highest score, ascending; of two equal scores the higher id stays.

    Args:
        scores: [E], finite; high = keep.
        n_keep: how many stay; a multiple of `n_groups`.
        ids: [E] original ids.
        n_original: experts the layer had at first; group of an id = id // (n_original / n_groups).
        n_groups: every group keeps n_keep / n_groups experts.

    Raises:
        UserError: a group has fewer experts left than it must keep.
    """
    order = sorted(range(len(ids)), key=lambda position: (scores[position], ids[position]), reverse=True)
    size = n_original // n_groups
    kept: list[int] = []
    for group in range(n_groups):
        members = [ids[position] for position in order if ids[position] // size == group]
        if len(members) < n_keep // n_groups:
            raise UserError(
                f"group {group} has {len(members)} experts left, but {n_keep // n_groups} must stay in each of "
                f"n_groups={n_groups}; lower min_keep"
            )
        kept += members[: n_keep // n_groups]
    return tuple(sorted(kept))
