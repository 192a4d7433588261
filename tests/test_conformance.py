"""Every strategy that comes with moeprune passes the conformance suite of its kind, and mutants show that each check bites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moeprune import Allocation, Constraints, Criterion, Evidence, PrunePlan, Pruner, create
from moeprune.balancing.balancer import Balancer
from moeprune.errors import UserError
from moeprune.evaluation.suite import Suite, Task
from moeprune.model.router import Router, Routing
from moeprune.parallel.placement import Placement, experts_per_device
from moeprune.pruning import surgery
from moeprune.pruning.merging import merge_experts
from moeprune.pruning.pruner import ScorePruner
from moeprune.pruning.statistic import Statistic
from moeprune.pruning.trigger import Trigger
from moeprune.registry import KINDS, entries
from moeprune.testing import CHECKS, CONSTRAINTS, conformance, synthetic_evidence

# -- the registry -------------------------------------------------------------------------------------------------------

Options = Callable[[], dict[str, Any]]
# Options for those that cannot be made without, and further ones worth a run.
OPTIONS: dict[tuple[str, str], list[Options]] = {
    ("allocation", "explicit"): [lambda: {"n_kept": [8, 8, 8]}],
    ("allocation", "match"): [
        lambda: {"pruner": create("pruner", "laep")},
        lambda: {"pruner": create("pruner", "laep"), "spread": "uniform"},
    ],
    ("pruner", "hc_smoe"): [dict, lambda: {"align": True, "ratio": 0.6}],
    ("pruner", "laep"): [dict, lambda: {"alpha": [0.5, 0.9, 0.3], "beta": 0.5}],
    ("pruner", "m_smoe"): [dict, lambda: {"align": False, "ratio": 0.6}],
    ("pruner", "protect"): [
        lambda: {"pruner": create("pruner", "reap")},
        lambda: {"pruner": create("pruner", "m_smoe", ratio=0.5)},
    ],
    ("pruner", "score"): [lambda: {"criterion": create("criterion", "reap")}],
    ("router", "sigmoid"): [dict, lambda: {"n_groups": 4, "top_groups": 2}, lambda: {"renormalize": False}],
    ("router", "softmax"): [dict, lambda: {"renormalize": False}, lambda: {"selection_bias": True}],
    ("trigger", "at_step"): [lambda: {"step": 30}],
    ("trigger", "at_tokens"): [lambda: {"tokens": 30_000}],
    ("trigger", "gradual"): [lambda: {"start": 20, "end": 80}, lambda: {"start": 9, "end": 90, "schedule": "linear"}],
    ("trigger", "metric"): [lambda: {"name": "val_loss", "below": 3.2}, lambda: {"name": "max_vio", "above": 1.5}],
}
REGISTERED = [
    pytest.param(kind, entry.name, options, id=f"{kind}-{entry.name}" + (f"-{variant}" if variant else ""))
    for kind in KINDS
    for entry in entries(kind)
    if entry.distribution == "moeprune"
    for variant, options in enumerate(OPTIONS.get((kind, entry.name), [dict]))
]


@pytest.mark.parametrize(("kind", "name", "options"), REGISTERED)
def test_registered(kind: str, name: str, options: Options) -> None:
    def make(**sizes: int) -> Any:
        return create(kind, name, **sizes, **options())

    failures = {}
    for check in CHECKS[kind]:
        try:
            check(kind, make)
        except (AssertionError, UserError) as error:
            failures[check.__name__] = str(error)
    assert not failures


# A third party's one line:
test_one_line = conformance("criterion", "reap")
test_with_options = conformance("router", "softmax", renormalize=False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_of_every_kind_says_what_it_asks_for(kind: str) -> None:
    assert len(CHECKS[kind]) >= 4
    for check in CHECKS[kind]:
        assert (check.__doc__ or "").strip().endswith("."), check.__name__


def test_evidence_is_what_was_asked_for() -> None:
    needs = frozenset({"counts", "g1f1", "mean_f", "logit_gram", "w2", "weights", "ablation"})
    evidence = synthetic_evidence(needs)
    for layer in evidence.layers:
        assert layer.stats.keys() == needs - {"weights"}
        assert layer.stats["logit_gram"].shape == (12, 12)
        assert layer.stats["ablation"].shape == ()
        assert len(set(layer.counts)) == 12, "no two experts alike"
        np.testing.assert_allclose(
            layer.stats["w2"][:, 0], layer.weights["gate"].square().sum((1, 2)), err_msg="one model"
        )
    idle = synthetic_evidence(frozenset({"counts", "g0f0"}), idle=5).layers[0]
    assert (idle.counts[:5] == 0).all()
    assert (idle.counts[5:] > 0).all()
    np.testing.assert_array_equal(idle.stats["g0f0"], idle.counts)


def test_every_set_of_constraints_can_be_met() -> None:
    for constraints in CONSTRAINTS:
        for layer in range(3):
            assert constraints.feasible(12, 2, 12, layer)


# -- mutants ------------------------------------------------------------------------------------------------------------


class GoodPruner(Pruner):
    """Keeps the busiest.

    Source: here.
    """

    keep = 6

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        evidence.require(self.needs, "good")
        kept = []
        for index, layer in enumerate(evidence.layers):
            n = constraints.nearest_at_least(self.keep, len(layer.ids), evidence.top_k, layer.n_original, index)
            kept.append(self.choose(layer, n, constraints, index))
        return PrunePlan(
            tuple(map(tuple, kept)),
            tuple(layer.ids for layer in evidence.layers),
            tuple(layer.n_original for layer in evidence.layers),
            1,
            self.provenance(),
        )

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return list(constraints.keep_highest(layer.counts.astype(float), n, layer, index))

    def provenance(self) -> dict[str, Any]:
        return {}


class IgnoresTopK(GoodPruner):
    """Keeps one. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return [int(np.argmax(layer.counts))]


class IgnoresGroups(GoodPruner):
    """Keeps the busiest of all groups. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return super().choose(layer, n, replace(constraints, n_groups=1), index)


class IgnoresProtected(GoodPruner):
    """Keeps the busiest, whoever is protected. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return super().choose(layer, n, replace(constraints, protected=None), index)


class IgnoresLayers(GoodPruner):
    """Takes the first layer's bounds for all. Source: here."""

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        first = {
            name: value[0] if isinstance(value := getattr(constraints, name), list) else value
            for name in ("min_keep", "max_keep")
        }
        return super().plan(evidence, replace(constraints, **first))


class RefusesBounds(GoodPruner):
    """Says no. Source: here."""

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        if constraints != Constraints():
            raise UserError("no")
        return super().plan(evidence, constraints)


class Unseeded(GoodPruner):
    """Draws lots. Source: here."""

    random = True

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return sorted(np.random.default_rng().permutation(layer.ids)[:n].tolist())


class Mutates(GoodPruner):
    """Writes into its evidence. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        kept = super().choose(layer, n, constraints, index)
        if layer.counts.flags.writeable:
            layer.counts[0] += 1
        return kept


class ReadsMore(GoodPruner):
    """Reads what it does not declare. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        layer.stats.get("g1f1")
        return super().choose(layer, n, constraints, index)


class NeedsTheUnknown(GoodPruner):
    """Needs what nobody records. Source: here."""

    needs = frozenset({"counts", "aura"})


class DependsOnOrder(GoodPruner):
    """Keeps the first ones. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return list(layer.ids[:n])


class KeepsPositions(GoodPruner):
    """Takes positions for ids. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        return sorted(np.argsort(layer.counts)[-n:].tolist())


class KeepsEvenIds(GoodPruner):
    """Keeps the busiest of even id first. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        scores = layer.counts + 1e6 * (np.array(layer.ids) % 2 == 0)
        return list(constraints.keep_highest(scores, n, layer, index))


class NoSource(GoodPruner):
    """Says nothing about where it comes from."""


class TrustsNaN(GoodPruner):
    """Does not look whether its evidence is finite. Source: here."""

    needs = frozenset({"counts", "taylor"})

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        return create("pruner", "frequency").plan(evidence, constraints)


class FailsOnIdle(GoodPruner):
    """Divides by the number of tokens. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        if (layer.counts == 0).any():
            raise ZeroDivisionError
        return super().choose(layer, n, constraints, index)


class ComparesTwo(GoodPruner):
    """Takes for granted that there is a second expert. Source: here."""

    def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
        assert layer.counts[1] >= 0
        return super().choose(layer, n, constraints, index)


class WritesSets(GoodPruner):
    """Its provenance is no JSON. Source: here."""

    def provenance(self) -> dict[str, Any]:
        return {"pruner": {"aura"}}


class GoodCriterion(Criterion):
    """Scores by tokens. Source: here."""

    def score(self, layer: Any, index: int) -> Any:
        return layer.counts.astype(float)


class Upside(Criterion):
    """Scores the busiest lowest. Source: here."""

    def score(self, layer: Any, index: int) -> Any:
        return -layer.counts.astype(float)


class Flat(Criterion):
    """Scores all alike. Source: here."""

    def score(self, layer: Any, index: int) -> Any:
        return np.zeros(len(layer.ids))


class Forgets(GoodCriterion):
    """Loses its option. Source: here."""

    def __init__(self, power: float = 2.0) -> None:
        self.power = power + 1


class GoodAllocation(Allocation):
    """Half of every layer. Source: here."""

    def allocate(self, scores: Any, evidence: Evidence, constraints: Constraints, ratio: float) -> list[int]:
        return [
            constraints.nearest_at_least(len(layer.ids) // 2, len(layer.ids), evidence.top_k, layer.n_original, i)
            for i, layer in enumerate(evidence.layers)
        ]


class IgnoresBounds(GoodAllocation):
    """Half of every layer, whatever the bounds. Source: here."""

    def allocate(self, scores: Any, evidence: Evidence, constraints: Constraints, ratio: float) -> list[int]:
        return super().allocate(scores, evidence, Constraints(), ratio)


class GoodStatistic(Statistic):
    """Sum of norms. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        return seen.per_expert(seen.norms)


class Averages(GoodStatistic):
    """Mean over the tokens at hand instead of a sum. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        return super().measure(seen) / seen.counts.clamp(min=1)


class SumsMaxima(GoodStatistic):
    """Says that sums combine by their maximum. Source: here."""

    reduce = "max"


class ReadsUndeclared(GoodStatistic):
    """Reads outputs without saying so. Source: here."""

    reads = frozenset()


class ReadsTooLittle(GoodStatistic):
    """Declares more than it reads. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        return seen.per_expert(seen.gates)


class ReadsTheMoon(GoodStatistic):
    """Declares what does not exist. Source: here."""

    reads = frozenset({"outputs", "moon"})  # type: ignore[arg-type]


class Remembers(GoodStatistic):
    """Adds up by itself. Source: here."""

    def __init__(self) -> None:
        self._total: Any = 0

    def measure(self, seen: Any) -> Tensor:
        self._total = self._total + super().measure(seen)
        return self._total


class WritesOutputs(GoodStatistic):
    """Takes absolute values in place. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        seen.outputs.abs_()
        return super().measure(seen)


class FinishesInPlace(GoodStatistic):
    """Takes the root in place. Source: here."""

    def finish(self, total: Tensor) -> Tensor:
        return total.sqrt_()


class SinglePrecision(GoodStatistic):
    """Sums in float32. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        return super().measure(seen).float()


class DividesByZero(GoodStatistic):
    """NaN without tokens. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        return torch.stack([seen.counts.double(), super().measure(seen)], 1)

    def finish(self, total: Tensor) -> Tensor:
        return total[:, 1] / total[:, 0]


class OneNumber(GoodStatistic):
    """One number per layer. Source: here."""

    def finish(self, total: Tensor) -> Tensor:
        return total.sum()


class ByPosition(GoodStatistic):
    """Weighs by the expert's position. Source: here."""

    def measure(self, seen: Any) -> Tensor:
        return super().measure(seen) * torch.arange(1, seen.n_experts + 1)


class MixesPrecisions(GoodStatistic):
    """Multiplies what may be of two dtypes. Source: here."""

    reads = frozenset({"outputs", "residual"})

    def measure(self, seen: Any) -> Tensor:
        return seen.per_expert(torch.einsum("td,tkd->tk", seen.residual, seen.outputs))


class GoodTrigger(Trigger):
    """Fires once, in the middle. Source: here."""

    def __init__(self, after: float = 0.5) -> None:
        self.after = after

    def fires(self, progress: Any) -> str | None:
        return "middle" if progress.step >= self.after * 120 and not progress.prunes else None


class CountsCalls(GoodTrigger):
    """Fires when it was asked often enough. Source: here."""

    def __init__(self) -> None:
        self._calls = 0

    def fires(self, progress: Any) -> str | None:
        self._calls += 1
        return "asked" if self._calls > 30 and not progress.prunes else None


class FiresAtOnce(GoodTrigger):
    """Fires before the first step. Source: here."""

    def fires(self, progress: Any) -> str | None:
        return None if progress.prunes else "now"


class SaysTrue(GoodTrigger):
    """Gives no reason. Source: here."""

    def fires(self, progress: Any) -> str | None:
        return super().fires(progress) is not None or None  # type: ignore[return-value]


class WindsBack(GoodTrigger):
    """Sorts the loads of the last window in place. Source: here."""

    def fires(self, progress: Any) -> str | None:
        if progress.windows:
            progress.windows[-1].loads[0].sort()
        return super().fires(progress)


class NeedsMetrics(GoodTrigger):
    """Fails where no validation ran. Source: here."""

    def fires(self, progress: Any) -> str | None:
        if progress.windows:
            progress.metrics["max_vio"]
        return super().fires(progress)


class AskTwice(GoodTrigger):
    """Prunes half, and never the rest. Source: here."""

    def share(self, prunes: int) -> float:
        return 0.5


class TooMuch(GoodTrigger):
    """Prunes more than all. Source: here."""

    def share(self, prunes: int) -> float:
        return 1.5


class ForgetsWhen(GoodTrigger):
    """Loses its option. Source: here."""

    def __init__(self, after: float = 0.5) -> None:
        self.after = after / 2


class GoodBalancer(Balancer):
    """Sum of squared mean probabilities. Source: here."""

    def __init__(self, coefficient: float = 0.01) -> None:
        super().__init__(coefficient)

    def loss(self, routing: Any, router: Any) -> Tensor:
        probs = routing.probs if routing.mask is None else routing.probs[routing.mask]
        return probs.mean(0).square().sum()


class CountsPadding(GoodBalancer):
    """Means over padding as well. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        return routing.probs.mean(0).square().sum()


class GradientsOfPadding(GoodBalancer):
    """The padding's part is 0, its gradient is not. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        if routing.mask is None:
            return super().loss(routing, router)
        padding = routing.probs[~routing.mask].square().sum()
        return super().loss(routing, router) + padding - padding.detach()


class PerExpert(GoodBalancer):
    """A number per expert. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        return routing.probs.mean(0)


class Logarithms(GoodBalancer):
    """The logarithm of what may be 0. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        return -routing.probs.log().mean()


class SmallLayersOnly(GoodBalancer):
    """Knows layers of 12 experts. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        return super().loss(routing, router) + (routing.counts - torch.ones(12)).sum() * 0


class FirstExpert(GoodBalancer):
    """Looks at the first expert only. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        return routing.probs[:, 0].sum() if routing.mask is None else routing.probs[routing.mask][:, 0].sum()


class WritesRouter(GoodBalancer):
    """Shrinks the router. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        for parameter in router.parameters():
            parameter.data.mul_(0.9)
        return super().loss(routing, router)


class WritesRouting(GoodBalancer):
    """Doubles probabilities. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        routing.probs.data.mul_(2)
        return super().loss(routing, router)


class Unbalances(GoodBalancer):
    """Rows of busy experts grow. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        if not isinstance(getattr(router, "selection_bias", None), Tensor):
            raise UserError("no bias")
        return super().loss(routing, router)

    def after_step(self, routers: Any, counts: Any) -> None:
        for router, count in zip(routers, counts, strict=True):
            router.selection_bias += 0.01 * (count - count.double().mean()).sign().float()


class KeepsCounts(GoodBalancer):
    """Sets the counts to zero when done. Source: here."""

    def after_step(self, routers: Any, counts: Any) -> None:
        for count in counts:
            count.zero_()


class Negative(GoodBalancer):
    """A coefficient below 0. Source: here."""

    def __init__(self, coefficient: float = 1) -> None:
        self.coefficient = -coefficient


class RefusesAll(GoodBalancer):
    """Works with no router. Source: here."""

    def loss(self, routing: Any, router: Any) -> Tensor:
        raise UserError("no")


class GoodPlacement(Placement):
    """One after the other. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        experts_per_device(len(loads), n_devices)
        return [list(range(device, len(loads), n_devices)) for device in range(n_devices)]


class LosesOne(GoodPlacement):
    """Forgets the last expert. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        return [[p for p in row if p < len(loads) - 1] for row in super().place(loads, n_devices)]


class Doubles(GoodPlacement):
    """Puts the lightest expert everywhere. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        size = experts_per_device(len(loads), n_devices)
        return [[int(np.argmin(loads))] * size for _ in range(n_devices)]


class Unequal(GoodPlacement):
    """Balances loads with unequal counts. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        experts_per_device(len(loads), n_devices)
        rows: list[list[int]] = [[] for _ in range(n_devices)]
        for p in np.argsort(-loads).tolist():
            min(rows, key=lambda row: loads[row].sum()).append(p)
        return rows


class DrawsLots(GoodPlacement):
    """Unseeded. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        experts_per_device(len(loads), n_devices)
        return np.random.default_rng().permutation(len(loads)).reshape(n_devices, -1).tolist()


class SortsInPlace(GoodPlacement):
    """Sorts the loads. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        if loads.flags.writeable:
            loads.sort()
        return super().place(loads, n_devices)


class TakesAnyNumber(GoodPlacement):
    """Leaves a rest. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        return [list(range(device, len(loads), n_devices)) for device in range(n_devices)]


class NumpyIntegers(GoodPlacement):
    """Gives numbers that JSON does not take. Source: here."""

    def place(self, loads: Any, n_devices: int) -> list[list[int]]:
        return [list(np.array(row)) for row in super().place(loads, n_devices)]


class GoodRouter(Router):
    """Linear with a bias; softmax. Source: here."""

    expert_dims: Mapping[str, int] = {"weight": 0, "bias": 0}

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.weight = nn.Parameter(torch.randn(n_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(n_experts))

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        weights, indices = probs.topk(self.top_k, -1)
        return probs, weights / weights.sum(-1, keepdim=True), indices


test_from_a_class = conformance("router", GoodRouter)


class MissesTensor(GoodRouter):
    """Leaves its bias as long as it was. Source: here."""

    expert_dims: Mapping[str, int] = {"weight": 0}


class NamesTheWrongDimension(GoodRouter):
    """Names the width. Source: here."""

    expert_dims: Mapping[str, int] = {"weight": 1, "bias": 0}


class HidesBuffer(GoodRouter):
    """Keeps a count per expert, which nobody cuts. Source: here."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.register_buffer("seen", torch.zeros(n_experts), persistent=False)


class HidesModule(GoodRouter):
    """A linear layer of its own, where surgery cannot reach. Source: here."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.linear = nn.Linear(d_model, n_experts)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + self.linear(x)


class ChoosesMasked(GoodRouter):
    """Takes minus infinity for a number. Source: here."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().choose(logits.masked_fill(logits.isinf(), 0))


class NotANumber(GoodRouter):
    """Centres logits, which minus infinity does not survive. Source: here."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().choose(logits - logits.mean(1, keepdim=True))


class HalfPrecision(GoodRouter):
    """Computes logits in bfloat16. Source: here."""

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).float()


class Autocast(GoodRouter):
    """Computes as autocast likes it. Source: here."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = self.logits(x.float())
        return Routing(logits.float(), *self.choose(logits.float()), mask)


class Inconsistent(GoodRouter):
    """Weighs otherwise than it says. Source: here."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        routing = super().forward(x, mask)
        return replace(routing, weights=routing.weights**2)


class TheSameTwice(GoodRouter):
    """Chooses one expert K times. Source: here."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs, weights, indices = super().choose(logits)
        return probs, weights, indices[:, :1].expand(-1, self.top_k)


class RemembersE(GoodRouter):
    """Scales by the number of experts it was made with. Source: here."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self._scale = n_experts**0.5

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) / self._scale


class Interacts(GoodRouter):
    """Scales by the spread of all experts' logits. Source: here."""

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits / logits.std(1, keepdim=True)


class PrefersTheFirst(GoodRouter):
    """A bonus by position. Source: here."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) - torch.arange(self.n_experts)


class LooksAround(GoodRouter):
    """Subtracts the mean of the other tokens. Source: here."""

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits - logits.mean(0)


class DropsMask(GoodRouter):
    """Loses the mask. Source: here."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        return super().forward(x)


class DeadParameter(GoodRouter):
    """Has a parameter that it does not use. Source: here."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.temperature = nn.Parameter(torch.ones(()))


class HiddenState(GoodRouter):
    """Keeps a random direction out of its state dict. Source: here."""

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.direction = torch.randn(d_model)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x * self.direction)


class GoodSuite(Suite):
    """Three tasks, two families.

    Source: here.

    Args:
        folder: where its files are.
    """

    def __init__(self, folder: str = "") -> None:
        self.folder = folder

    def tasks(self) -> list[Task]:
        return [Task("a", "acc", "one"), Task("b", "acc", "one", num_fewshot=5), Task("c", "bpb", "two")]

    def task_folder(self) -> Path | None:
        return Path(self.folder) if self.folder else None


class Empty(GoodSuite):
    """Nothing. Source: here."""

    def tasks(self) -> list[Task]:
        return []


class Twice(GoodSuite):
    """One task with two metrics. Source: here."""

    def tasks(self) -> list[Task]:
        return [Task("a", "acc"), Task("a", "acc_norm")]


class NoRoom(GoodSuite):
    """Answers of no token. Source: here."""

    def tasks(self) -> list[Task]:
        return [Task("a", max_gen_toks=0)]


class Shuffled(GoodSuite):
    """Another order every time. Source: here."""

    def tasks(self) -> list[Task]:
        tasks = [Task(f"t{i}") for i in range(20)]
        return [tasks[i] for i in np.random.default_rng().permutation(20)]


class Foreign(GoodSuite):
    """Averages what it does not score. Source: here."""

    def families(self) -> Mapping[str, list[str]]:
        return {"one": ["a", "z"]}


class CountsTwice(GoodSuite):
    """Averages a task twice. Source: here."""

    def families(self) -> Mapping[str, list[str]]:
        return {"one": ["a", "a", "b"]}


class NoFolder(GoodSuite):
    """Its folder is not there. Source: here."""

    def __init__(self) -> None:
        super().__init__("no/such/folder")


def failing(kind: str, make: Callable[..., Any], checks: Sequence[Callable[..., None]]) -> set[str]:
    found = set()
    for check in checks:
        try:
            check(kind, make)
        except Exception:
            found.add(check.__name__)
    return found


GOOD = {
    "pruner": GoodPruner,
    "criterion": GoodCriterion,
    "allocation": GoodAllocation,
    "statistic": GoodStatistic,
    "trigger": GoodTrigger,
    "balancer": GoodBalancer,
    "placement": GoodPlacement,
    "router": GoodRouter,
    "suite": GoodSuite,
}
MUTANTS = {
    "pruner": [
        (IgnoresTopK, "plan_obeys_every_constraint"),
        (IgnoresGroups, "plan_obeys_every_constraint"),
        (IgnoresProtected, "plan_obeys_every_constraint"),
        (IgnoresLayers, "plan_obeys_every_constraint"),
        (RefusesBounds, "plan_obeys_every_constraint"),
        (Unseeded, "same_seed_same_plan"),
        (DependsOnOrder, "permuted_experts_give_the_permuted_plan"),
        (KeepsPositions, "experts_are_named_by_their_original_ids"),
        (KeepsEvenIds, "experts_are_named_by_their_original_ids"),
        (ReadsMore, "evidence_declared_is_evidence_used"),
        (NeedsTheUnknown, "evidence_declared_is_evidence_used"),
        (Mutates, "evidence_is_left_alone"),
        (FailsOnIdle, "odd_layers_are_planned_or_refused"),
        (ComparesTwo, "single_expert_stays"),
        (TrustsNaN, "nan_evidence_is_refused"),
        (WritesSets, "plan_survives_json"),
        (NoSource, "docstring_has_a_source"),
    ],
    "criterion": [
        (Upside, "more_of_everything_scores_higher"),
        (Flat, "more_of_everything_scores_higher"),
        (Forgets, "options_survive_yaml"),
    ],
    "allocation": [(IgnoresBounds, "plan_obeys_every_constraint")],
    "statistic": [
        (ReadsUndeclared, "reads_are_declared"),
        (ReadsTooLittle, "reads_are_declared"),
        (ReadsTheMoon, "reads_are_declared"),
        (Averages, "blocks_add_up"),
        (SumsMaxima, "blocks_add_up"),
        (Remembers, "one_instance_serves_all_layers"),
        (WritesOutputs, "one_instance_serves_all_layers"),
        (FinishesInPlace, "one_instance_serves_all_layers"),
        (SinglePrecision, "one_row_per_expert"),
        (DividesByZero, "one_row_per_expert"),
        (OneNumber, "one_row_per_expert"),
        (ByPosition, "permuted_experts_give_the_permuted_statistic"),
        (MixesPrecisions, "any_precision_is_summed_in_double"),
    ],
    "trigger": [
        (CountsCalls, "asked_again_it_answers_the_same"),
        (SaysTrue, "asked_again_it_answers_the_same"),
        (NeedsMetrics, "asked_again_it_answers_the_same"),
        (WindsBack, "progress_is_left_alone"),
        (FiresAtOnce, "nothing_fires_before_the_first_step"),
        (AskTwice, "shares_rise_to_one"),
        (TooMuch, "shares_rise_to_one"),
        (ForgetsWhen, "options_survive_yaml"),
    ],
    "balancer": [
        (PerExpert, "loss_is_a_finite_scalar"),
        (Logarithms, "loss_is_a_finite_scalar"),
        (SmallLayersOnly, "loss_is_a_finite_scalar"),
        (RefusesAll, "loss_is_a_finite_scalar"),
        (CountsPadding, "padding_does_not_count"),
        (GradientsOfPadding, "padding_does_not_count"),
        (FirstExpert, "permuted_experts_balance_the_same"),
        (WritesRouter, "routing_is_left_alone"),
        (WritesRouting, "routing_is_left_alone"),
        (Unbalances, "steps_balance"),
        (KeepsCounts, "steps_balance"),
        (Negative, "coefficient_is_not_negative"),
    ],
    "placement": [
        (LosesOne, "every_expert_has_one_place"),
        (Unequal, "every_expert_has_one_place"),
        (NumpyIntegers, "every_expert_has_one_place"),
        (DrawsLots, "same_loads_same_places"),
        (SortsInPlace, "same_loads_same_places"),
        (Doubles, "no_device_is_below_the_bound"),
        (TakesAnyNumber, "odd_numbers_of_devices_are_refused"),
    ],
    "router": [
        (Inconsistent, "routing_is_consistent"),
        (TheSameTwice, "routing_is_consistent"),
        (HalfPrecision, "float32_under_autocast"),
        (Autocast, "float32_under_autocast"),
        (ChoosesMasked, "minus_infinity_is_never_chosen"),
        (NotANumber, "minus_infinity_is_never_chosen"),
        (MissesTensor, "expert_dims_are_complete"),
        (NamesTheWrongDimension, "expert_dims_are_complete"),
        (HidesBuffer, "expert_dims_are_complete"),
        (HidesModule, "expert_dims_are_complete"),
        (MissesTensor, "cut_router_is_a_smaller_router"),
        (RemembersE, "cut_router_is_a_smaller_router"),
        (PrefersTheFirst, "permuted_experts_give_the_permuted_routing"),
        (Interacts, "cut_router_equals_masked"),
        (LooksAround, "tokens_are_routed_one_by_one"),
        (DropsMask, "tokens_are_routed_one_by_one"),
        (DeadParameter, "gradients_reach_all_parameters"),
        (HiddenState, "state_dict_round_trip"),
    ],
    "suite": [
        (Empty, "tasks_are_named_once"),
        (Twice, "tasks_are_named_once"),
        (NoRoom, "tasks_are_named_once"),
        (Shuffled, "tasks_are_named_once"),
        (Foreign, "families_hold_its_tasks"),
        (CountsTwice, "families_hold_its_tasks"),
        (NoFolder, "task_files_exist"),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_one_passes(kind: str) -> None:
    for check in CHECKS[kind]:
        check(kind, GOOD[kind])


@pytest.mark.parametrize(
    ("kind", "mutant", "name"), [(kind, mutant, name) for kind, rows in MUTANTS.items() for mutant, name in rows]
)
def test_the_suite_bites(kind: str, mutant: type[Any], name: str) -> None:
    assert name in failing(kind, mutant, [check for check in CHECKS[kind] if check.__name__ == name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_has_a_mutant(kind: str) -> None:
    shared = {"options_survive_yaml", "docstring_has_a_source"}
    pruning = {name for each in ("pruner", "criterion", "allocation") for _, name in MUTANTS[each]}
    bitten = {name for _, name in MUTANTS[kind]} | (pruning if kind in ("criterion", "pruner", "allocation") else set())
    left = {check.__name__ for check in CHECKS[kind]} - shared - bitten
    assert left <= {"pruned_equals_masked"}  # its mutants are of surgery, below


def test_declarations_excuse() -> None:
    class Lots(Unseeded):
        """Draws lots, seeded. Source: here."""

        def choose(self, layer: Any, n: int, constraints: Constraints, index: int) -> list[int]:
            return sorted(np.random.default_rng(index).permutation(layer.ids)[:n].tolist())

    class Small(Upside):
        """The seldom used stay. Source: here."""

        direction = None

    class Told(RefusesBounds):
        """Keeps six. Source: here."""

        exact = True

    class Immediate(FiresAtOnce):
        """At once. Source: here."""

        immediate = True

    def check(kind: str, name: str) -> Any:
        return next(check for check in CHECKS[kind] if check.__name__ == name)

    check("pruner", "permuted_experts_give_the_permuted_plan")("pruner", Lots)
    check("pruner", "permuted_experts_give_the_permuted_plan")(
        "pruner", lambda: create("pruner", "protect", pruner=Lots())
    )
    check("criterion", "more_of_everything_scores_higher")("criterion", Small)
    check("pruner", "more_of_everything_scores_higher")("pruner", lambda: ScorePruner(Small()))
    check("pruner", "plan_obeys_every_constraint")("pruner", Told)
    check("trigger", "nothing_fires_before_the_first_step")("trigger", Immediate)


@pytest.mark.parametrize(("name", "wrong"), [("m_smoe", "order"), ("m_smoe", "none"), ("hc_smoe", "shares")])
def test_merging_is_checked_against_its_own_reference(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(check for check in CHECKS["pruner"] if check.__name__ == "pruned_equals_masked")
    check("pruner", lambda: create("pruner", name, ratio=0.5))

    def other(layer: Any, merges: Any, align: bool) -> None:
        if wrong == "none":
            return
        flat = [replace(m, weights=tuple(1 / len(m.members) for _ in m.members)) for m in merges]
        merge_experts(layer, flat if wrong == "shares" else merges, align and wrong != "order")

    monkeypatch.setattr(surgery, "merge_experts", other)
    with pytest.raises(AssertionError, match="does not equal what its plan says"):
        check("pruner", lambda: create("pruner", name, ratio=0.5))


def test_surgery_that_takes_the_wrong_experts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(check for check in CHECKS["pruner"] if check.__name__ == "pruned_equals_masked")
    cut = surgery._cut
    monkeypatch.setattr(
        surgery, "_cut", lambda owner, name, dim, at, optimizers: cut(owner, name, dim, range(len(at)), optimizers)
    )
    with pytest.raises(AssertionError, match="does not equal what its plan says"):
        check("pruner", GoodPruner)


def test_suite_files_are_looked_for(tmp_path: Path) -> None:
    check = next(check for check in CHECKS["suite"] if check.__name__ == "task_files_exist")
    (tmp_path / "x.yaml").write_text("include: a\ntask: abc\n")
    with pytest.raises(AssertionError, match=r"no file in .* defines a task"):
        check("suite", lambda: GoodSuite(str(tmp_path)))
    (tmp_path / "c.yaml").write_text('include: x.yaml\ntask: "c"\n')
    check("suite", lambda: GoodSuite(str(tmp_path)))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="no kind 'prunr'; did you mean 'pruner'"):
        conformance("prunr", "laep")
