"""The contracts of pruner, criterion and allocation.

    Criterion   evidence of one layer           -> score [E], high = keep
    Allocation  all layers' scores, constraints -> how many experts each layer keeps
    Pruner      evidence, constraints           -> PrunePlan

Most pruners are a criterion and an allocation: derive from `ScorePruner`. A pruner of another kind (LAEP) derives from
`Pruner`. Each declares in `needs` which statistics it reads (see evidence.py); only those are recorded.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints, keep_highest
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.plan import PrunePlan


class _Described:
    """repr and `describe()` from the constructor's arguments, which strategies keep as attributes of the same name."""

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if hasattr(self, name)}

    def describe(self) -> dict[str, Any]:
        """Class and options as plain data, for provenance."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name, **{key: _plain(value) for key, value in self._options().items()}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self._options().items())})"


def _plain(value: Any) -> Any:
    """What JSON can hold; infinity, which it cannot, as text."""
    if isinstance(value, _Described):
        return value.describe()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)


class Criterion(_Described, ABC):
    """Scores the experts of one layer. Reads only what it declares in `needs`."""

    needs: frozenset[str] = frozenset({"counts"})

    @abstractmethod
    def score(self, layer: LayerEvidence, index: int) -> NDArray[np.float64]:
        """[E] scores, high = keep, in the order of `layer.ids`; `index` is the layer's position, for seeding."""


class Allocation(_Described, ABC):
    """Says how many experts each layer keeps."""

    needs: frozenset[str] = frozenset()

    @abstractmethod
    def allocate(
        self, scores: Sequence[NDArray[np.float64]], evidence: Evidence, constraints: Constraints
    ) -> list[int]:
        """Experts kept per layer, each allowed by `constraints`; `scores` holds one [E] array per layer."""


class Pruner(_Described, ABC):
    """Turns evidence into a plan."""

    needs: frozenset[str] = frozenset({"counts"})

    @abstractmethod
    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008 (immutable)
        """Which experts stay.

        Raises:
            UserError: evidence that is missing or not finite, constraints that no plan can meet.
        """


class ScorePruner(Pruner):
    """Keeps the experts of highest score; a criterion scores, an allocation says how many stay.

    Args:
        criterion: scores the experts.
        allocation: how many each layer keeps.
    """

    def __init__(self, criterion: Criterion, allocation: Allocation) -> None:
        self.criterion = criterion
        self.allocation = allocation
        self.needs = criterion.needs | allocation.needs

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        """See `Pruner.plan`."""
        evidence.require(self.needs, f"pruner {self!r}")
        scores = []
        for index, layer in enumerate(evidence.layers):
            score = np.asarray(self.criterion.score(layer, index), dtype=np.float64)
            if score.shape != (len(layer.ids),) or not np.isfinite(score).all():
                raise UserError(
                    f"{self.criterion!r} gave layer {index} scores that are not {len(layer.ids)} finite numbers"
                )
            scores.append(score)
        n_kept = self.allocation.allocate(scores, evidence, constraints)
        kept = [
            keep_highest(score, n, layer.ids, layer.n_original, constraints.n_groups)
            for score, n, layer in zip(scores, n_kept, evidence.layers, strict=True)
        ]
        return PrunePlan.from_kept(kept, evidence, constraints, {"pruner": self.describe()})
