"""The contracts of pruner, criterion and allocation.

    Criterion   evidence of one layer           -> score [E], high = keep
    Allocation  all layers' scores, constraints -> how many experts each layer keeps
    Pruner      evidence, constraints           -> PrunePlan

Most pruners are a criterion and an allocation: every registered criterion is a pruner by its own name, `ScorePruner` with
that criterion. A pruner of another kind (LAEP) derives from `Pruner`. Each declares in `needs` which statistics it reads
(see evidence.py); only those are recorded.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
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
        """[E] finite scores, high = keep, in the order of `layer.ids`; `index` is the layer's position, for seeding."""


class Allocation(_Described, ABC):
    """Says how many experts each layer keeps."""

    needs: frozenset[str] = frozenset()

    @abstractmethod
    def allocate(
        self, scores: Sequence[NDArray[np.float64]], evidence: Evidence, constraints: Constraints, ratio: float
    ) -> list[int]:
        """Experts kept per layer, each allowed by `constraints`.

        Args:
            scores: one [E] array per layer, high = keep; they compare within a layer.
            evidence: of all layers.
            constraints: bounds that hold per layer.
            ratio: share of all experts to cut, in [0, 1).
        """


class Uniform(Allocation):
    """Cuts the same share of every layer's experts, int(E * ratio) of them, as far as the constraints allow.

    Source: REAP, arXiv 2510.13999.
    """

    def allocate(
        self, scores: Sequence[NDArray[np.float64]], evidence: Evidence, constraints: Constraints, ratio: float
    ) -> list[int]:
        """E - int(E * ratio) per layer, raised to the next allowed number."""
        return [
            constraints.nearest_at_least(
                len(layer.ids) - int(len(layer.ids) * ratio), len(layer.ids), evidence.top_k, layer.n_original, index
            )
            for index, layer in enumerate(evidence.layers)
        ]


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
    """Keeps the experts of highest score: any criterion as a pruner.

    Source: the criterion's own.

    Args:
        criterion: scores the experts.
        ratio: share of the experts to cut, in [0, 1).
        allocation: how many each layer keeps; default: the same share of every layer.

    Raises:
        UserError: ratio out of range.
    """

    def __init__(self, criterion: Criterion, ratio: float = 0.25, allocation: Allocation | None = None) -> None:
        if not 0 <= ratio < 1:
            raise UserError(f"ratio must lie in [0, 1), got {ratio}; it is the share of experts to cut")
        self.criterion, self.ratio = criterion, ratio
        self.allocation = allocation or Uniform()
        self.needs = criterion.needs | self.allocation.needs

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
        n_kept = self.allocation.allocate(scores, evidence, constraints, self.ratio)
        kept = [
            constraints.keep_highest(score, n, layer, index)
            for index, (score, n, layer) in enumerate(zip(scores, n_kept, evidence.layers, strict=True))
        ]
        return PrunePlan.from_kept(kept, evidence, constraints, {"pruner": self.describe()})


@cache
def pruner_of(criterion: type[Criterion], name: str) -> type[ScorePruner]:
    """The pruner called `name` that scores with `criterion`: takes the criterion's options, and ScorePruner's others."""
    own = list(inspect.signature(criterion, eval_str=True).parameters.values())
    rest = list(inspect.signature(ScorePruner, eval_str=True).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword) for p in (*own, *rest)]

    def __init__(self: ScorePruner, **options: Any) -> None:  # noqa: N807
        bound = signature.bind(self, **options)
        bound.apply_defaults()
        given = {key: value for key, value in bound.arguments.items() if key != "self"}
        made = criterion(**{p.name: given[p.name] for p in own})
        ScorePruner.__init__(self, made, given["ratio"], given["allocation"])
        for p in own:  # as the criterion keeps them
            setattr(self, p.name, getattr(made, p.name))

    signature = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters])
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    described = f"{(criterion.__doc__ or '').rstrip()}"
    options = """    ratio: share of the experts to cut, in [0, 1).
        allocation: how many each layer keeps; default: the same share of every layer.
    """
    head, args, tail = described.partition("    Args:")
    documented = (
        f"{head}{args}{tail.partition('Raises:')[0].rstrip()}\n        {options.strip()}\n    "
        if args
        else f"{described}\n\n    Args:\n        {options.strip()}\n    "
    )
    body = {"__init__": __init__, "__module__": "moeprune.names.pruner", "__qualname__": name, "__doc__": documented}
    return type(name, (ScorePruner,), body)
