"""What a deployment allows: bounds and multiples on the number of experts a layer keeps, and experts that must stay."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.evidence import Evidence, LayerEvidence

if TYPE_CHECKING:
    from moeprune.model.prunable import PrunableModel


@dataclass(frozen=True)
class Constraints:
    """Bounds that every plan obeys, all of them at once, besides kept >= top_k.

    Args:
        multiple_of: experts kept per layer are a multiple of this (the expert-parallel size).
        min_keep: fewest experts a layer keeps: one number, or one per layer.
        max_keep: most experts a layer keeps: one number, or one per layer; None for no bound.
        n_groups: groups of a group-limited router (DeepSeek-V3); each keeps the same number of experts. A group is a
            run of E / n_groups neighbouring original ids.
        protected: per layer the original ids of experts that stay whatever their score; None for none.

    Raises:
        UserError: a bound that no layer could meet.
    """

    multiple_of: int = 1
    min_keep: int | list[int] = 1
    max_keep: int | list[int] | None = None
    n_groups: int = 1
    protected: list[list[int]] | None = None

    def __post_init__(self) -> None:
        for name in ("multiple_of", "n_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_keep", "max_keep"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                object.__setattr__(self, name, list(value))
            for number in value if isinstance(value, list | tuple) else [value]:
                if number is not None and number < 1:
                    raise UserError(f"{name} must be at least 1, got {number}")
        if isinstance(self.min_keep, int) and isinstance(self.max_keep, int) and self.max_keep < self.min_keep:
            raise UserError(f"max_keep={self.max_keep} is below min_keep={self.min_keep}; raise one or lower the other")

    def _bound(self, name: str, layer: int | None) -> int | None:
        value: int | list[int] | None = getattr(self, name)
        if not isinstance(value, list):
            return value
        if layer is None or layer >= len(value):
            raise UserError(f"{name} holds {len(value)} numbers, too few for layer {layer}; give one per layer")
        return value[layer]

    def _check_groups(self, n_original: int, where: str) -> None:
        if n_original % self.n_groups:
            raise UserError(
                f"n_groups={self.n_groups} does not divide the {n_original} experts of {where}; choose a divisor of {n_original}"
            )

    def protected_in(self, layer: int | None) -> tuple[int, ...]:
        """Original ids that must stay in a layer."""
        if self.protected is None or layer is None:
            return ()
        if layer >= len(self.protected):
            raise UserError(
                f"protected holds {len(self.protected)} lists, too few for layer {layer}; give one per layer"
            )
        return tuple(sorted(set(self.protected[layer])))

    def feasible(self, n_experts: int, top_k: int, n_original: int | None = None, layer: int | None = None) -> range:
        """Every number of experts that a layer of `n_experts` may keep, ascending; never empty.

        Args:
            n_experts: experts the layer has now.
            top_k: experts the router picks per token.
            n_original: experts the layer had at first, which define the groups; default `n_experts`.
            layer: index, for bounds that differ from layer to layer and for the message.

        Raises:
            UserError: no number meets all constraints; the sentence names the two that collide.
        """
        where = "a layer" if layer is None else f"layer {layer}"
        n_original = n_experts if n_original is None else n_original
        if top_k > n_experts:
            raise UserError(f"top_k={top_k} is more than the {n_experts} experts of {where}; lower top_k")
        self._check_groups(n_original, where)
        if self.multiple_of > n_experts:
            raise UserError(
                f"multiple_of={self.multiple_of} is more than the {n_experts} experts of {where}; "
                f"choose at most {n_experts}"
            )
        least, most = self._bound("min_keep", layer) or 1, self._bound("max_keep", layer)
        if least > n_experts:
            raise UserError(f"min_keep={least} is more than the {n_experts} experts of {where}; lower min_keep")
        safe = self.protected_in(layer)
        size = n_original // self.n_groups
        fullest = max((sum(i // size == group for i in safe) for group in range(self.n_groups)), default=0)
        lower_name, lower = max(
            ("top_k", top_k),
            ("min_keep", least),
            ("number of protected experts", fullest * self.n_groups),
            key=lambda item: item[1],
        )
        upper = n_experts if most is None else min(n_experts, most)
        upper_name = "max_keep" if most is not None and most < n_experts else "number of experts"
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

    def distribute(self, wanted: Sequence[float], total: int, evidence: Evidence) -> list[int]:
        """Allowed numbers per layer, as near to `wanted` (least squares) as a sum of at least `total` permits.

        The sum is the smallest that single allowed steps reach; all a layer's experts stay where `total` asks for more.

        Args:
            wanted: per layer, any real numbers.
            total: experts to keep over all layers.
            evidence: the layers.
        """
        allowed = [
            self.feasible(len(layer.ids), evidence.top_k, layer.n_original, index)
            for index, layer in enumerate(evidence.layers)
        ]
        numbers = [choices[0] for choices in allowed]

        def regret(layer: int) -> float:  # growth of (n - wanted)^2 per expert, for the next step
            return 2 * (numbers[layer] - wanted[layer]) + allowed[layer].step

        queue = [(regret(layer), layer) for layer in range(len(numbers)) if len(allowed[layer]) > 1]
        heapq.heapify(queue)
        kept = sum(numbers)
        while kept < total and queue:
            _, layer = heapq.heappop(queue)
            numbers[layer] += allowed[layer].step
            kept += allowed[layer].step
            if numbers[layer] < allowed[layer][-1]:
                heapq.heappush(queue, (regret(layer), layer))
        return numbers

    def keep_highest(
        self, scores: NDArray[np.float64], n_keep: int, layer: LayerEvidence, index: int
    ) -> tuple[int, ...]:
        """Original ids of the `n_keep` experts of highest score, ascending; of two equal scores the higher id stays.

        Protected experts stay first of all, and every group keeps n_keep / n_groups.

        Args:
            scores: [E], finite; high = keep.
            n_keep: how many stay; a number that `feasible` allows.
            layer: its experts.
            index: of the layer.

        Raises:
            UserError: a group has fewer experts left than it must keep, or a protected expert is not there.
        """
        safe = self.protected_in(index)
        if gone := sorted(set(safe) - set(layer.ids)):
            raise UserError(f"protected experts {gone[:8]} are not among the experts of layer {index}; name others")
        ids = layer.ids
        order = sorted(range(len(ids)), key=lambda p: (ids[p] in safe, scores[p], ids[p]), reverse=True)
        size = layer.n_original // self.n_groups
        kept: list[int] = []
        for group in range(self.n_groups):
            members = [ids[position] for position in order if ids[position] // size == group]
            if len(members) < n_keep // self.n_groups:
                raise UserError(
                    f"group {group} has {len(members)} experts left, but {n_keep // self.n_groups} must stay in each of "
                    f"n_groups={self.n_groups}; lower min_keep"
                )
            kept += members[: n_keep // self.n_groups]
        return tuple(sorted(kept))

    def for_model(self, model: PrunableModel) -> Constraints:
        """These constraints, and what the routers of `model` ask for; see `for_router`."""
        return self.for_router(model.n_groups, model.min_experts, [layer.n_original for layer in model.moe_layers])

    def for_router(self, n_groups: int, min_experts: int, n_original: Sequence[int] = ()) -> Constraints:
        """These constraints for a router that limits its choice to `n_groups` groups and needs `min_experts` to work.

        Args:
            n_groups: of the router; 1 if it has none.
            min_experts: fewest experts that a layer works with.
            n_original: experts of each layer at first, where they are known: groups of these constraints that do not divide
                them are refused before the router's are joined with them.

        Raises:
            UserError: max_keep below `min_experts`, or groups that do not divide a layer.
        """
        for layer, n in enumerate(n_original):
            self._check_groups(n, f"layer {layer}")
        most = self.max_keep if isinstance(self.max_keep, list) else [self.max_keep]
        if low := [n for n in most if n is not None and n < min_experts]:
            raise UserError(
                f"max_keep={low[0]} is below {min_experts}, the fewest experts that the router works with (its top_k and groups); "
                f"raise max_keep"
            )
        least = self.min_keep if isinstance(self.min_keep, list) else [self.min_keep]
        raised = [max(n, min_experts) for n in least] if min_experts > 1 else least
        return replace(
            self,
            n_groups=math.lcm(self.n_groups, n_groups),
            min_keep=raised if isinstance(self.min_keep, list) else raised[0],
        )
