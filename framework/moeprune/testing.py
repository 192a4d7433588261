"""The conformance suite: what every strategy must do, ready to run on your own plug-in.

    from moeprune.testing import conformance

    test_mine = conformance("criterion", "acme")                 # by short name
    test_more = conformance("pruner", "acme_quota", share=0.5)   # with options
    test_other = conformance("router", AcmeRouter)               # or anything that makes one

That is a pytest function, parametrised over the checks of its kind (`CHECKS`); each check's docstring says what it asks for.
Beyond what a contract says, a strategy may declare: `random = True` (draws lots, so that the order of experts matters),
`direction = None` (more of everything need not mean a higher score), `exact = True` (keeps the numbers it was told, and
refuses constraints that do not allow them), `immediate = True` (a trigger that may fire at step 0).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moeprune import registry
from moeprune.balancing.balancer import Balancer
from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.router import Router, Routing
from moeprune.model.transformer import MoETransformer
from moeprune.parallel.placement import lower_bound, max_load_factor
from moeprune.pruning.calibration import statistics
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Allocation, Criterion, Pruner, ScorePruner, _Described
from moeprune.pruning.statistic import Seen
from moeprune.pruning.surgery import apply_plan
from moeprune.pruning.trigger import LoadWindow, Progress

Make = Callable[..., Any]
Check = Callable[[str, Make], None]
E, TOP_K, D, F, L = 12, 2, 8, 5, 3
CONSTRAINTS = (
    Constraints(),
    Constraints(multiple_of=4),
    Constraints(min_keep=7),
    Constraints(max_keep=5),
    Constraints(n_groups=3),
    Constraints(multiple_of=2, min_keep=3, max_keep=8, n_groups=2),
    Constraints(min_keep=[4, 9, 2], max_keep=[6, 11, 3]),
    Constraints(min_keep=[7, 5, 9], max_keep=[7, 5, 9]),
    Constraints(protected=[[0, 5], [], [3, 4, 11]]),
    Constraints(max_keep=4, protected=[[0, 1, 2, 3], [8, 9, 10, 11], [1, 4, 6, 9]]),
    Constraints(2, [4, 2, 8], [8, 6, 10], n_groups=2, protected=[[0, 1], [7, 11], [2, 3, 4]]),
)
TOKENS = frozenset({"counts", "g0f0"})  # numbers of tokens
BUILT_IN = {"taylor": (E,), "fisher": (E,), "ablation": ()}  # statistics of a whole model, drawn here


# -- inputs: what the suite feeds ---------------------------------------------------------------------------------------


def synthetic_tokens(seed: int = 0, idle: int = 0) -> Seen:
    """What a layer of 12 experts, top-2, does with some 300 tokens; no two experts with tokens get the same number.

    Args:
        seed: of everything.
        idle: the first so many experts get no token; at most half.
    """
    return _rows(_tokens(seed, idle), slice(None))  # a copy: nobody's strategy spoils it for the next


@cache
def _tokens(seed: int, idle: int) -> Seen:
    rng = np.random.default_rng((seed, 1))
    counts = rng.permutation(np.arange(1, E + 1)) * 7 + rng.integers(0, 5, E)
    counts[:idle] = 0
    counts[int(counts.argmax())] += counts.sum() % 2
    # a token's two experts differ: neighbours of the sorted list are alike, entries half its length apart are not
    chosen = np.repeat(np.arange(E), counts).reshape(2, -1).T[rng.permutation(counts.sum() // 2)]
    T = len(chosen)
    logits = rng.uniform(-1, 1, (T, E)) + 0.1 * rng.normal(size=E)
    np.put_along_axis(logits, chosen, 2 + rng.uniform(0, 1, (T, TOP_K)), 1)
    chosen = np.argsort(-logits, 1)[:, :TOP_K]
    scores = torch.from_numpy(logits).float()
    indices = torch.from_numpy(np.ascontiguousarray(chosen))
    weights = scores.softmax(1).gather(1, indices)
    weights = weights / weights.sum(1, keepdim=True)
    center, spread = rng.normal(size=(E, D)), rng.uniform(0.3, 3, (E, 1))
    outputs = torch.from_numpy((center[chosen] + rng.normal(size=(T, TOP_K, D))) * spread[chosen]).float()
    residual = torch.from_numpy(rng.normal(size=(T, D)) * 2).float()
    return Seen(
        n_experts=E,
        x=residual / residual.square().mean(1, keepdim=True).sqrt(),
        outputs=outputs,
        combined=torch.einsum("tk,tkd->td", weights, outputs),
        indices=indices,
        weights=weights,
        gates=weights.double(),
        logits=scores,
        residual=residual,
    )


def synthetic_evidence(needs: frozenset[str], seed: int = 0, n_layers: int = L, idle: int = 0) -> Evidence:
    """Evidence with exactly the statistics in `needs`, no two experts alike; registered ones are measured on `synthetic_tokens`.

    Args:
        needs: names of statistics, `weights` and `acceptance` among them.
        seed: of the numbers.
        n_layers: layers of 12 experts, top-2.
        idle: the first so many experts of each layer get no token.
    """
    layers = []
    worths = []
    for index in range(n_layers):
        rng = np.random.default_rng((seed, index))
        weights = _weights(rng)
        stats = {
            name: _statistic(name, synthetic_tokens(seed * n_layers + index, idle), weights, rng)
            for name in sorted(needs - {"weights", "acceptance"})
        }
        layers.append(LayerEvidence(tuple(range(E)), E, stats, weights if "weights" in needs else {}))
        worths.append(rng.random(E))
    acceptance = _KeptWorth([layer.ids for layer in layers], worths) if "acceptance" in needs else None
    return Evidence(tuple(layers), TOP_K, acceptance=acceptance)


def _weights(rng: np.random.Generator) -> dict[str, Tensor]:
    sizes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F), "router": (E, D)}
    return {
        name: torch.from_numpy(rng.normal(size=size) * rng.uniform(0.5, 2, (E, *(1 for _ in size[1:]))))
        for name, size in sizes.items()
    }


def _statistic(name: str, seen: Seen, weights: Mapping[str, Tensor], rng: np.random.Generator) -> NDArray[Any]:
    flat = [weights[matrix].flatten(1) for matrix in ("gate", "up", "down")]
    if name == "counts":
        return np.bincount(seen.indices.flatten().numpy(), minlength=E)
    if name in ("w1", "w2"):
        return np.stack([(w.abs() if name == "w1" else w.square()).sum(1).numpy() for w in flat], 1)
    if name == "w_n":
        return np.full((E, 3), float(F * D))
    if name == "router_w2":
        return np.asarray(weights["router"].square().sum(1))
    if name in BUILT_IN or name not in statistics():
        return np.asarray(rng.random(BUILT_IN.get(name, (E,))) * 3 + 0.01)
    statistic = registry.create("statistic", name)
    return np.asarray(statistic.finish(statistic.measure(seen)))


@dataclass(frozen=True)
class _KeptWorth:
    """A stand-in for a model's acceptance: every expert has a worth, of which a choice keeps a share."""

    ids: Sequence[tuple[int, ...]]
    worths: Sequence[NDArray[Any]]

    def __call__(self, kept: Sequence[Sequence[int]]) -> float:
        shares = [
            sum(worth[ids.index(i)] for i in chosen) / worth.sum()
            for ids, worth, chosen in zip(self.ids, self.worths, kept, strict=True)
        ]
        return float(np.mean(shares))


def _pairwise(value: Any) -> bool:
    """Whether both dimensions count experts."""
    return bool(value.ndim == 2 and value.shape[0] == value.shape[1])


def _changed(
    evidence: Evidence,
    change: Callable[[str, Any], Any],
    ids: Callable[[int, tuple[int, ...]], tuple[int, ...]] = lambda _, ids: ids,
    n_original: int | None = None,
) -> Evidence:
    """Evidence with every statistic and weight replaced by `change(name, value)`, a layer's ids by `ids(index, ids)`."""
    layers = [
        LayerEvidence(
            ids(index, layer.ids),
            n_original or layer.n_original,
            {name: change(name, value) for name, value in layer.stats.items()},
            {name: change(name, value) for name, value in layer.weights.items()},
        )
        for index, layer in enumerate(evidence.layers)
    ]
    acceptance = evidence.acceptance
    if isinstance(acceptance, _KeptWorth):
        acceptance = _KeptWorth([layer.ids for layer in layers], [change("worth", w) for w in acceptance.worths])
    return Evidence(tuple(layers), evidence.top_k, evidence.provenance, acceptance)


def _taken(evidence: Evidence, positions: Sequence[Sequence[int]]) -> Evidence:
    """Only the experts at these positions of each layer, numbered from 0."""

    def take(value: Any, at: Sequence[int]) -> Any:
        if value.ndim == 0:
            return value
        return value[list(at)][:, list(at)] if _pairwise(value) else value[list(at)]

    layers = tuple(
        LayerEvidence(
            tuple(range(len(at))),
            len(at),
            {name: take(value, at) for name, value in layer.stats.items()},
            {name: take(value, at) for name, value in layer.weights.items()},
        )
        for layer, at in zip(evidence.layers, positions, strict=True)
    )
    acceptance = evidence.acceptance
    if isinstance(acceptance, _KeptWorth):
        acceptance = _KeptWorth(
            [layer.ids for layer in layers],
            [take(worth, at) for worth, at in zip(acceptance.worths, positions, strict=True)],
        )
    return Evidence(layers, evidence.top_k, evidence.provenance, acceptance)


class _Guarded(dict[str, NDArray[Any]]):
    """Statistics that tell who reads what was not declared."""

    def __init__(self, values: Mapping[str, NDArray[Any]], who: object) -> None:
        super().__init__(values)
        self._who = who

    def __missing__(self, name: str) -> NDArray[Any]:
        raise AssertionError(f"{self._who!r} reads the statistic {name!r}, which is not in its `needs`")

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


@contextmanager
def _seeded(seed: int = 0) -> Iterator[None]:
    """The generator of torch at a seed, and as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# -- every kind ---------------------------------------------------------------------------------------------------------


def options_survive_yaml(kind: str, make: Make) -> None:
    """Written into a recipe and read back, it is the same strategy."""
    import yaml
    from jsonargparse import ArgumentParser

    strategy = make()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=registry.contract(kind))
    text = yaml.safe_dump({"it": _configuration(strategy)})
    again = parser.instantiate_classes(parser.parse_string(text)).it
    assert repr(again) == repr(strategy), f"{strategy!r} comes back from YAML as {again!r}"


def _configuration(value: Any) -> Any:
    if isinstance(value, _Described):
        cls = type(value)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {name: _configuration(option) for name, option in value._options().items()},
        }
    if isinstance(value, list | tuple):
        return [_configuration(item) for item in value]
    return {key: _configuration(item) for key, item in value.items()} if isinstance(value, dict) else value


def docstring_has_a_source(kind: str, make: Make) -> None:
    """The class says where it comes from: a line `Source: ...`."""
    cls = type(_router(make) if kind == "router" else make())
    assert "Source:" in (cls.__doc__ or ""), f"the docstring of {cls.__qualname__} has no line 'Source: ...'"


# -- pruner, criterion, allocation --------------------------------------------------------------------------------------


def _as_pruner(kind: str, strategy: Any) -> Pruner:
    """The strategy at work in a pruner."""
    if isinstance(strategy, Criterion):
        return ScorePruner(strategy, ratio=0.4)
    if isinstance(strategy, Allocation):
        return ScorePruner(registry.create("criterion", "frequency"), 0.4, strategy)
    assert isinstance(strategy, Pruner), f"{strategy!r} is no {kind}"
    return strategy


def _declares(strategy: Any, name: str, value: Any) -> bool:
    """Whether it, or anything that it is made of, declares `name = value`."""
    if isinstance(strategy, list | tuple):
        return any(_declares(item, name, value) for item in strategy)
    if not isinstance(strategy, _Described):
        return False
    parts = [*strategy._options().values(), getattr(strategy, "criterion", None)]
    return getattr(strategy, name, ...) is value or any(_declares(part, name, value) for part in parts)


def plan_obeys_every_constraint(kind: str, make: Make) -> None:
    """Kept >= top_k, multiples, bounds for all layers and for each, groups and protected experts, all at once.

    One that keeps the numbers it was told declares `exact = True` and may refuse constraints with a UserError.
    """
    pruner = _as_pruner(kind, make())
    for seed, constraints in itertools.product(range(2), CONSTRAINTS):
        try:
            plan = pruner.plan(synthetic_evidence(pruner.needs, seed), constraints)
        except UserError as error:
            if constraints == Constraints() or not _declares(pruner, "exact", True):
                raise AssertionError(f"{pruner!r} refuses {constraints}, which can be met: {error}") from error
            continue
        assert len(plan.kept) == L, f"{pruner!r} plans {len(plan.kept)} of {L} layers"
        for index, kept in enumerate(plan.kept):
            allowed = constraints.feasible(E, TOP_K, E, index)
            assert len(kept) in allowed, f"layer {index} keeps {len(kept)} experts under {constraints}: {pruner!r}"
            size = E // constraints.n_groups
            groups = {sum(i // size == g for i in kept) for g in range(constraints.n_groups)}
            assert len(groups) == 1, f"layer {index} keeps unequal numbers in its groups: {pruner!r}"
            lost = set(constraints.protected_in(index)) - set(kept)
            assert not lost, f"layer {index} loses the protected experts {sorted(lost)}: {pruner!r}"


def same_seed_same_plan(kind: str, make: Make) -> None:
    """Made twice, asked twice: one plan."""
    one, other = _as_pruner(kind, make()), _as_pruner(kind, make())
    evidence = synthetic_evidence(one.needs)
    plans = [one.plan(evidence), one.plan(evidence), other.plan(evidence)]
    assert plans[0] == plans[1] == plans[2], f"{one!r} gives another plan when asked again"


def _groups(plan: PrunePlan, layer: int, name: Callable[[int], int]) -> set[tuple[int, frozenset[int]]]:
    """What a plan merges, every id i called name(i)."""
    merges = plan.merges[layer] if plan.merges else ()
    return {(name(merge.into), frozenset(map(name, merge.members))) for merge in merges}


def permuted_experts_give_the_permuted_plan(kind: str, make: Make) -> None:
    """The order of experts does not matter. A strategy that draws lots declares `random = True` and is excused."""
    pruner = _as_pruner(kind, make())
    if _declares(pruner, "random", True):
        return
    evidence = synthetic_evidence(pruner.needs)
    order = np.random.default_rng(1).permutation(E)
    plan = pruner.plan(evidence)

    def permute(name: str, value: Any) -> Any:
        if value.ndim == 0:
            return value
        return value[order][:, order] if _pairwise(value) else value[order]

    permuted = pruner.plan(_changed(evidence, permute))
    for layer, (before, after) in enumerate(zip(plan.kept, permuted.kept, strict=True)):
        assert {int(order[i]) for i in after} == set(before), f"{pruner!r} depends on the order of the experts"
        merged = _groups(permuted, layer, lambda i: int(order[i]))
        assert merged == _groups(plan, layer, int), f"{pruner!r} merges by the order of the experts"


def experts_are_named_by_their_original_ids(kind: str, make: Make) -> None:
    """On a model that was pruned before, of unequal layers, the plan is the same experts by their original ids."""
    pruner = _as_pruner(kind, make())
    lots = _declares(pruner, "random", True)
    n = (E, E - 4, E - 1)
    evidence = _taken(synthetic_evidence(pruner.needs), [range(k) for k in n])
    later = _changed(evidence, lambda _, value: value, lambda _, ids: tuple(2 * i + 1 for i in ids), 2 * E)
    plan, named = pruner.plan(evidence), pruner.plan(later)
    for layer, (kept, ids) in enumerate(zip(plan.kept, named.kept, strict=True)):
        same = lots or ids == tuple(2 * i + 1 for i in kept)
        assert same, f"{pruner!r} confuses an expert's position and its original id"
        merged = _groups(plan, layer, lambda i: 2 * i + 1)
        same = lots or merged == _groups(named, layer, int)
        assert same, f"{pruner!r} confuses positions and ids where it merges"
    assert named.before == tuple(layer.ids for layer in later.layers)
    assert named.n_original == (2 * E,) * L


def evidence_declared_is_evidence_used(kind: str, make: Make) -> None:
    """Nothing is read that `needs` does not name, and every name in it can be recorded."""
    strategy = make()
    pruner = _as_pruner(kind, strategy)
    evidence = synthetic_evidence(pruner.needs)
    for layer in evidence.layers:
        object.__setattr__(layer, "stats", _Guarded(layer.stats, strategy))
    pruner.plan(evidence)
    unknown = pruner.needs - statistics()
    assert not unknown, f"{strategy!r} needs {sorted(unknown)}, which nobody records"


def evidence_is_left_alone(kind: str, make: Make) -> None:
    """Statistics and weights are the same afterwards."""
    pruner = _as_pruner(kind, make())
    evidence = synthetic_evidence(pruner.needs)
    for layer in evidence.layers:  # writable, so that a strategy that writes is found out rather than stopped
        object.__setattr__(layer, "stats", {name: np.array(value) for name, value in layer.stats.items()})
    before = copy.deepcopy([(dict(layer.stats), dict(layer.weights)) for layer in evidence.layers])
    pruner.plan(evidence)
    for (stats, weights), layer in zip(before, evidence.layers, strict=True):
        same = all(np.array_equal(stats[name], layer.stats[name]) for name in stats)
        same = same and all(torch.equal(weights[name], layer.weights[name]) for name in weights)
        assert same, f"{pruner!r} changes its evidence"


def odd_layers_are_planned_or_refused(kind: str, make: Make) -> None:
    """Experts without a token, experts all alike: a plan, or a UserError; nothing else."""
    pruner = _as_pruner(kind, make())
    idle = synthetic_evidence(pruner.needs, idle=E // 2)
    alike = _changed(synthetic_evidence(pruner.needs), lambda _, value: value * 0 + 1)
    for odd in (idle, alike):
        try:
            plan = pruner.plan(odd)
        except UserError:
            continue
        assert all(len(kept) >= TOP_K for kept in plan.kept)


def single_expert_stays(kind: str, make: Make) -> None:
    """A layer of one expert, top-1: it stays, or the constraints are refused with a UserError."""
    pruner = _as_pruner(kind, make())
    evidence = replace(_taken(synthetic_evidence(pruner.needs, n_layers=1), [[0]]), top_k=1)
    try:
        plan = pruner.plan(evidence)
    except UserError:
        return
    assert plan.kept == ((0,),)


def nan_evidence_is_refused(kind: str, make: Make) -> None:
    """NaN in a statistic is a UserError that names the layer."""
    pruner = _as_pruner(kind, make())
    for name in sorted(pruner.needs - {"weights", "counts", "acceptance"}):  # counts are whole numbers
        evidence = synthetic_evidence(pruner.needs)
        broken = np.array(evidence.layers[1].stats[name], dtype=np.float64)
        broken[3 if broken.ndim else ()] = np.nan
        object.__setattr__(evidence.layers[1], "stats", {**evidence.layers[1].stats, name: broken})
        refusal = None
        try:
            pruner.plan(evidence)
        except UserError as error:
            refusal = str(error)
        assert refusal is not None, f"{pruner!r} plans from NaN in {name!r}"
        assert "layer 1" in refusal, f"the refusal of {pruner!r} does not name the layer: {refusal}"


def more_of_everything_scores_higher(kind: str, make: Make) -> None:
    """An expert with larger statistics and weights than another in every respect scores higher: high = keep.

    Compared at equal numbers of tokens and of weights, unless the criterion reads nothing else. A criterion for which it is
    not so declares `direction = None`.
    """
    criterion = make() if kind == "criterion" else getattr(make(), "criterion", None)
    if criterion is None or _declares(criterion, "random", True) or _declares(criterion, "direction", None):
        return
    sizes = TOKENS | {"w_n"}
    grows = criterion.needs - sizes or criterion.needs

    def grow(name: str, value: Any) -> Any:
        grown = value.clone() if isinstance(value, Tensor) else np.array(value)
        if value.ndim:
            grown[1] = grown[0] * (3 if name in grows or isinstance(value, Tensor) else 1)
        return grown

    layer = _changed(synthetic_evidence(criterion.needs), grow).layers[0]
    score = criterion.score(layer, 0)
    assert score[1] >= score[0], f"{criterion!r} scores an expert lower that has more of everything"
    assert score[1] > score[0], f"{criterion!r} does not tell apart experts that differ threefold"


def plan_survives_json(kind: str, make: Make) -> None:
    """Written as JSON, provenance and all, and read back, the plan is the same."""
    pruner = _as_pruner(kind, make())
    plan = pruner.plan(synthetic_evidence(pruner.needs)).made_by(pruner)
    again = PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert again == plan, f"the plan of {pruner!r} is another one when read back"


def pruned_equals_masked(kind: str, make: Make) -> None:
    """A model cut by the plan equals the whole model, its experts merged as the plan says, with the router logits of
    those that go at minus infinity (1e-5).
    """
    pruner = _as_pruner(kind, make())
    plan = pruner.plan(synthetic_evidence(pruner.needs))
    config = MoEConfig(
        vocab_size=31, d_model=D, n_layers=L, n_heads=2, n_experts=E, top_k=TOP_K, d_expert=F, max_seq_len=9
    )
    with _seeded():
        whole = MoETransformer(config).eval()
    with torch.no_grad():
        for layer in whole.moe_layers:  # outputs that matter
            layer.experts.gate_up.mul_(10)
            layer.experts.down.mul_(30)
    tokens = torch.arange(27).view(3, 9)
    cut = copy.deepcopy(whole)
    apply_plan(cut, plan)
    with torch.no_grad():
        expected = masked(merged(whole, plan), plan, tokens)
        assert (cut(tokens) - expected).abs().max() <= 1e-5, f"what {pruner!r} cuts does not equal what its plan says"
        same = copy.deepcopy(whole)
        apply_plan(same, PrunePlan(plan.before, plan.before, plan.n_original, TOP_K))
        assert torch.equal(same(tokens), whole(tokens)), "pruning nothing changed a bit"


def masked(model: MoETransformer, plan: PrunePlan, tokens: Tensor) -> Tensor:
    """Logits of `model` with the router logits of the experts that `plan` removes at minus infinity: the slow reference.

    Not for routers whose experts interact (see `Router.experts_interact`).
    """
    hooks = []
    for layer, gone in zip(model.moe_layers, plan.removed, strict=True):
        positions = torch.tensor([layer.ids.index(i) for i in gone], dtype=torch.int64)

        def mask(router: Any, _: Any, routing: Any, positions: Tensor = positions) -> Any:
            logits = routing.logits.index_fill(1, positions, -torch.inf)
            probs, weights, indices = router.choose(logits)
            return Routing(logits, probs, weights, indices, routing.mask)

        hooks.append(layer.router.register_forward_hook(mask))
    try:
        out: Tensor = model(tokens)
        return out
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def merged(model: MoETransformer, plan: PrunePlan) -> MoETransformer:
    """A copy of `model` whose experts are merged as `plan` says, none removed: the slow reference.

    An expert is a list of hidden neurons, each a vector of its gate row, up row and down column. Aligning two experts tries
    every order of the neurons for the smallest sum of squared distances, so d_expert is at most 7.
    """
    out = copy.deepcopy(model)

    def neurons(layer: Any, expert: int) -> Tensor:
        position = layer.ids.index(expert)
        gate, up, down = (layer.weights()[name][position].double() for name in ("gate", "up", "down"))
        return torch.stack([torch.cat([gate[n], up[n], down[:, n]]) for n in range(len(gate))])

    for source, target, merges in zip(model.moe_layers, out.moe_layers, plan.merges, strict=False):
        for merge in merges:
            home = neurons(source, merge.into)
            mean = torch.zeros_like(home)
            for member, share in zip(merge.members, merge.weights, strict=True):
                vectors = neurons(source, member)
                if plan.align:
                    distance = torch.cdist(home, vectors).square().tolist()
                    assert len(distance) <= 7, "aligning by trying every order takes small experts"
                    orders = itertools.permutations(range(len(distance)))
                    best = min(orders, key=lambda order: sum(row[n] for row, n in zip(distance, order, strict=True)))
                    vectors = vectors[list(best)]
                mean += share * vectors
            position, d = target.ids.index(merge.into), model.config.d_model
            weights = target.weights()
            for n, vector in enumerate(mean):
                weights["gate"][position, n] = vector[:d]
                weights["up"][position, n] = vector[d : 2 * d]
                weights["down"][position, :, n] = vector[2 * d :]
    return out


# -- statistic ----------------------------------------------------------------------------------------------------------

FIELDS = {"outputs": ("outputs", "combined", "norms", "sums"), "routing": ("logits",), "residual": ("residual",)}


class _Spied(Seen):
    """Notes which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            super().__getattribute__("__dict__").setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


def _rows(seen: Seen, at: slice | Tensor, reads: frozenset[str] | None = None) -> Seen:
    """Some of the tokens, the fields that are not read None, in tensors of their own."""
    hidden = {name for field, names in FIELDS.items() if reads is not None and field not in reads for name in names}
    values: dict[str, Any] = {
        field.name: value[at].clone() if isinstance(value := getattr(seen, field.name), Tensor) else value
        for field in fields(seen)
    }
    values |= dict.fromkeys(values.keys() & hidden)
    return Seen(**values)


def _measured(statistic: Any, *parts: Seen) -> Tensor:
    """The statistic of some parts of the data, combined as the recorder does."""
    total: Tensor | None = None
    combine = torch.add if statistic.reduce == "sum" else torch.maximum
    for part in parts:
        state = statistic.measure(part)
        total = state if total is None else combine(total, state)
    assert total is not None
    finished: Tensor = statistic.finish(total)
    return finished


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def reads_are_declared(kind: str, make: Make) -> None:
    """Of what is seen, exactly what `reads` names is used: computing the rest costs time."""
    statistic = make()
    unknown = set(statistic.reads) - set(FIELDS)
    assert not unknown, f"{statistic!r} reads {sorted(unknown)}, of which the recorder has nothing"
    part = _rows(synthetic_tokens(), slice(0, 50), statistic.reads)
    try:
        _measured(statistic, part)
    except Exception as error:
        raise AssertionError(f"{statistic!r} fails on what its `reads` declares: {error!r}") from error
    spied = _Spied(**{field.name: getattr(synthetic_tokens(), field.name) for field in fields(Seen)})
    statistic.measure(spied)
    used = {field for field, names in FIELDS.items() if spied.__dict__.get("_read", set()) & set(names)}
    assert used == set(statistic.reads), f"{statistic!r} declares {sorted(statistic.reads)} and reads {sorted(used)}"


def blocks_add_up(kind: str, make: Make) -> None:
    """The states of any cut of the tokens, combined by `reduce`, are that of the whole; blocks without tokens add nothing."""
    statistic, seen = make(), synthetic_tokens()
    whole = _measured(statistic, seen)
    for ends in ([100], [1, 2, 150], [0, 40, 40]):
        edges = [0, *ends, len(seen.x)]
        parts = [_rows(seen, slice(a, b), statistic.reads) for a, b in itertools.pairwise(edges)]
        assert _close(_measured(statistic, *parts), whole, 1e-5), f"the blocks of {statistic!r} do not add up"


def one_instance_serves_all_layers(kind: str, make: Make) -> None:
    """It keeps nothing between calls, and changes neither what it sees nor the total that it finishes."""
    statistic = make()
    one, other = (_rows(synthetic_tokens(seed), slice(0, 80), statistic.reads) for seed in (0, 1))
    before = _rows(one, slice(None))
    expected = statistic.measure(one).clone()
    statistic.measure(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(before, field.name)
        assert not isinstance(a, Tensor) or torch.equal(a, b), f"{statistic!r} changes {field.name} of what it sees"
    total = statistic.measure(before)
    assert torch.equal(total, expected), f"{statistic!r} remembers earlier calls"
    statistic.finish(total)
    assert torch.equal(total, expected), f"{statistic!r} changes the total when it finishes"


def one_row_per_expert(kind: str, make: Make) -> None:
    """float64 and finite, the first dimension counting experts, also where some or all experts get no token."""
    statistic = make()
    nothing = _rows(synthetic_tokens(), slice(0, 0), statistic.reads)
    for seen in (synthetic_tokens(), synthetic_tokens(idle=E // 2), nothing):
        state = statistic.measure(seen)
        assert state.dtype == torch.float64, f"{statistic!r} sums in {state.dtype}; use float64"
        value = statistic.finish(state)
        assert value.ndim >= 1, (
            f"{statistic!r} has shape {tuple(value.shape)}, its first dimension does not count experts"
        )
        assert value.shape[0] == E, f"{statistic!r} has shape {tuple(value.shape)} for {E} experts"
        assert torch.isfinite(value).all(), f"{statistic!r} is not finite"


def permuted_experts_give_the_permuted_statistic(kind: str, make: Make) -> None:
    """The order of experts does not matter; a square one counts experts in both dimensions."""
    statistic, seen = make(), synthetic_tokens()
    order = torch.from_numpy(np.random.default_rng(1).permutation(E))  # the expert now at i was at order[i]
    assert seen.logits is not None
    permuted = replace(seen, indices=order.argsort()[seen.indices], logits=seen.logits[:, order])
    value = _measured(statistic, seen)
    expected = value[order][:, order] if _pairwise(value) else value[order]
    assert _close(_measured(statistic, permuted), expected, 1e-6), f"{statistic!r} depends on the order of the experts"


def any_precision_is_summed_in_double(kind: str, make: Make) -> None:
    """On a bfloat16 or float64 model's tensors it gives float64, and what it gives on the same numbers in float32."""
    statistic, seen = make(), synthetic_tokens()
    for dtype, names in (
        (torch.bfloat16, ("x", "residual", "weights")),  # outputs are float32 at least
        (torch.float64, ("x", "residual", "weights", "outputs", "combined")),
    ):
        model = replace(seen, **{name: getattr(seen, name).to(dtype) for name in names})
        plain = replace(model, **{name: getattr(model, name).float() for name in names})
        value = _measured(statistic, model)
        assert value.dtype == torch.float64, f"{statistic!r} of a {dtype} model is {value.dtype}"
        assert _close(value, _measured(statistic, plain), 0.01), f"{statistic!r} loses precision on a {dtype} model"


# -- trigger ------------------------------------------------------------------------------------------------------------

RUN = 120  # optimizer steps of the synthetic run


def synthetic_run(trigger: Any, max_steps: int = RUN, metrics: bool = True) -> Iterator[tuple[Progress, Any]]:
    """A run's progress after each of 120 steps with the trigger's answer, which counts as a prune where it is not None.

    Loads settle down, the loss falls and flattens, load windows are of 3 steps and begin anew after a prune.
    """
    rng = np.random.default_rng(0)
    taste = rng.lognormal(0, 1, (L, E)) * 1000
    windows: list[LoadWindow] = []
    prunes, first = 0, 0
    for step in range(1, RUN + 1):
        if step - first == 3:
            noise = rng.lognormal(0, 3 * math.exp(-step / 12), (L, E))
            loads = [(t * n)[: E - min(prunes, 8)].astype(np.int64) for t, n in zip(taste, noise, strict=True)]
            windows = [*windows, LoadWindow(first, step, loads)]
            first = step
        measured = step - step % 10
        known = {"val_loss": 3 + math.exp(-measured / 15), "val_step": measured} if metrics and measured else {}
        if metrics and windows:
            even = math.exp(-step / 30)
            known |= {"max_vio": 4 - 3 * even, "entropy": 0.6 + 0.3 * even, "cv": 1.5 - even, "gini": 0.7 - 0.5 * even}
            known |= {"dead": 0.2 - 0.2 * even}
        progress = Progress(step, max_steps, 10, step * 1000, tuple(windows), prunes, known)
        answer = trigger.fires(progress)
        yield progress, answer
        if answer is not None:
            prunes, windows, first = prunes + 1, [], step


def asked_again_it_answers_the_same(kind: str, make: Make) -> None:
    """A pure function of the progress, whose answer is None or a reason: a fresh one, a copy and an unpickled one agree."""
    for max_steps, metrics in ((RUN, True), (-1, False)):
        trigger = make()
        options = repr(trigger)
        for progress, answer in synthetic_run(trigger, max_steps, metrics):
            assert answer is None or (isinstance(answer, str) and answer), f"{trigger!r} answers {answer!r}"
            others = [trigger, make()]
            if answer or progress.step % 10 == 0:
                others += [copy.deepcopy(trigger), pickle.loads(pickle.dumps(trigger))]
            for other in others:
                again = other.fires(progress)
                assert again == answer, f"{trigger!r} at step {progress.step}: {answer!r}, asked again {again!r}"
        assert repr(trigger) == options, f"{trigger!r} has changed during a run; it was {options}"


def progress_is_left_alone(kind: str, make: Make) -> None:
    """Windows and metrics are the same afterwards."""

    class Never:
        def fires(self, progress: Progress) -> None:
            return None

    trigger = make()
    for progress, _ in synthetic_run(Never()):
        before = copy.deepcopy(progress)
        trigger.fires(progress)
        assert progress.metrics == before.metrics, f"{trigger!r} changes the metrics"
        for one, other in zip(progress.windows, before.windows, strict=True):
            same = all(np.array_equal(a, b) for a, b in zip(one.loads, other.loads, strict=True))
            assert same, f"{trigger!r} changes the load windows"


def nothing_fires_before_the_first_step(kind: str, make: Make) -> None:
    """An empty progress at step 0 is no reason, unless the trigger declares `immediate = True`."""
    trigger = make()
    if _declares(trigger, "immediate", True):
        return
    answer = trigger.fires(Progress(0, RUN, 10, 0, (), 0))
    assert answer is None, f"{trigger!r} fires before the first step: {answer!r}"


def shares_rise_to_one(kind: str, make: Make) -> None:
    """Of all prunes of a run, each share lies in (0, 1], none is below the one before, and the last is 1."""
    trigger = make()
    prunes = sum(answer is not None for _, answer in synthetic_run(trigger))
    shares = [float(trigger.share(n)) for n in range(max(prunes, 1))]
    assert all(0 < share <= 1 for share in shares), f"{trigger!r} has shares outside (0, 1]: {shares}"
    assert shares == sorted(shares), f"{trigger!r} has shares that fall: {shares}"
    if prunes:
        assert shares[-1] == 1, f"{trigger!r} ends a run of {RUN} steps with a share of {shares[-1]}"
    assert shares == [float(make().share(n)) for n in range(len(shares))], f"{trigger!r} does not repeat its shares"


# -- placement ----------------------------------------------------------------------------------------------------------


def _loads() -> Iterator[tuple[NDArray[np.int64], int]]:
    """Loads and numbers of devices, awkward ones among them."""
    rng = np.random.default_rng(0)
    for n_experts, n_devices in ((12, 4), (12, 1), (12, 12), (7, 7), (7, 1), (64, 8), (1, 1)):
        uneven = rng.lognormal(3, 1.5, n_experts).astype(np.int64)
        one = np.zeros(n_experts, np.int64)
        one[n_experts // 2] = 2**40
        for loads in (uneven, np.sort(uneven), np.zeros(n_experts, np.int64), np.full(n_experts, 5), one):
            loads.setflags(write=False)
            yield loads, n_devices


def every_expert_has_one_place(kind: str, make: Make) -> None:
    """Each position 0 ... E-1 is on exactly one device, and all devices hold as many, whatever the loads."""
    placement = make()
    for loads, n_devices in _loads():
        devices = placement.place(loads, n_devices)
        assert len(devices) == n_devices, f"{placement!r} uses {len(devices)} of {n_devices} devices"
        sizes = {len(positions) for positions in devices}
        assert sizes == {len(loads) // n_devices}, f"{placement!r} puts unequal numbers on devices: {devices}"
        placed = sorted(position for positions in devices for position in positions)
        assert placed == list(range(len(loads))), f"{placement!r} loses or doubles experts: {devices}"
        assert all(isinstance(p, int) for row in devices for p in row), f"{placement!r} gives positions that are no int"


def same_loads_same_places(kind: str, make: Make) -> None:
    """Made twice, asked twice: one answer, and the loads are left alone."""
    placement = make()
    for loads, n_devices in _loads():
        mine = loads.copy()
        answers = [placement.place(mine, n_devices), placement.place(mine, n_devices), make().place(loads, n_devices)]
        assert answers[0] == answers[1] == answers[2], f"{placement!r} gives another answer when asked again"
        assert np.array_equal(mine, loads), f"{placement!r} changes the loads"


def no_device_is_below_the_bound(kind: str, make: Make) -> None:
    """The largest load is at least the bound that holds for every placement of equal counts."""
    placement = make()
    for loads, n_devices in _loads():
        factor = max_load_factor(loads, placement.place(loads, n_devices))
        bound = lower_bound(loads, n_devices)
        assert factor >= bound * (1 - 1e-12), f"{placement!r} reaches {factor}, below the lower bound {bound}"


def odd_numbers_of_devices_are_refused(kind: str, make: Make) -> None:
    """A number of devices that does not divide that of experts, or is not positive, is a UserError."""
    placement = make()
    for n_experts, n_devices in ((12, 5), (7, 2), (3, 6), (4, 0)):
        refused = False
        try:
            placement.place(np.arange(n_experts), n_devices)
        except UserError:
            refused = True
        assert refused, f"{placement!r} places {n_experts} experts on {n_devices} devices"


# -- router -------------------------------------------------------------------------------------------------------------


def _router(make: Make, n_experts: int = E, seed: int = 0) -> Router:
    """A router in evaluation mode, its parameters off their initial values, which may hide what they do."""
    with _seeded(seed), torch.no_grad():
        router: Router = make(d_model=D, n_experts=n_experts, top_k=TOP_K)
        named = {id(getattr(router, name)) for name in router.expert_dims}
        for tensor in [*router.parameters(), *router.buffers()]:
            if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or id(tensor) in named):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return router.eval()


def _x(n_tokens: int = 40, seed: int = 5) -> Tensor:
    with _seeded(seed):
        return torch.randn(n_tokens, D)


def _tensors(router: Router) -> dict[str, Tensor]:
    """Every tensor it holds, by name."""
    own = {name: value for name, value in vars(router).items() if isinstance(value, Tensor)}
    return {**dict(router.named_parameters()), **dict(router.named_buffers()), **own}


def _some(router: Router) -> list[int]:
    """Positions of some of its experts, equally many of each group, with which it works."""
    size = router.n_experts // router.n_groups
    stay = size - max(1, size // 3)
    while stay * router.n_groups < router.min_experts:
        stay += 1
    return [group * size + i for group in range(router.n_groups) for i in range(size - stay, size)]


def _with_experts(router: Router, positions: Sequence[int]) -> Router:
    """A copy that has only these experts, in this order, as surgery cuts it."""
    router = copy.deepcopy(router)
    at = torch.tensor(list(positions))
    for name, dim in router.expert_dims.items():
        old = getattr(router, name)
        if old is not None:
            new = old.detach().index_select(dim, at)
            setattr(router, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    router.n_experts = len(at)
    return router


def routing_is_consistent(kind: str, make: Make) -> None:
    """forward(x) is choose(logits(x)), in the contract's shapes: K different experts, finite weights, a distribution."""
    router = _router(make)
    x = _x()
    with torch.no_grad():
        routing = router(x)
        logits = router.logits(x)
        before = logits.clone()
        probs, weights, indices = router.choose(logits)
    T = len(x)
    assert routing.logits.shape == routing.probs.shape == (T, E), f"{router} gives logits {tuple(routing.logits.shape)}"
    assert routing.weights.shape == routing.indices.shape == (T, TOP_K)
    assert routing.indices.dtype == torch.int64
    assert torch.equal(logits, before), f"{router} changes the logits that it chooses from"
    for mine, its in zip((logits, probs, weights, indices), _parts(routing), strict=True):
        assert torch.equal(mine, its), f"forward of {router} is not choose(logits)"
        assert torch.isfinite(its.double()).all()
    assert (probs >= 0).all(), f"{router} has negative probabilities"
    assert _close(probs.sum(1), torch.ones(T), 1e-4), f"probs of {router} do not sum to 1"
    assert (weights >= 0).all(), f"{router} has negative weights"
    assert all(len(set(row)) == TOP_K and set(row) <= set(range(E)) for row in indices.tolist())


def _parts(routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return routing.logits, routing.probs, routing.weights, routing.indices


def float32_under_autocast(kind: str, make: Make) -> None:
    """Under bfloat16 autocast it computes what it computes without, in float32, and tells apart what bfloat16 cannot."""
    router = _router(make)
    x = _x().bfloat16().float()
    finer = x.clone()
    finer[:, ::2] *= 1 + 2**-10  # a quarter of bfloat16's last place: rounded away in it
    with torch.no_grad():
        plain, nudged = router(x), router(finer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, half = router(x), router(x.bfloat16())
    for name in ("logits", "probs", "weights"):
        for routing in (plain, mixed, half):
            assert getattr(routing, name).dtype == torch.float32, (
                f"{name} of {router} are {getattr(routing, name).dtype}"
            )
    for routing in (mixed, half):
        same = all(torch.equal(a, b) for a, b in zip(_parts(plain), _parts(routing), strict=True))
        assert same, f"{router} computes something else under autocast"
    differ = (plain.logits != nudged.logits).any(1)
    assert differ.all(), f"{router} computes its logits in less than float32"


def minus_infinity_is_never_chosen(kind: str, make: Make) -> None:
    """An expert whose logit is minus infinity is not chosen, has probability 0, and nothing becomes NaN."""
    router = _router(make)
    stay = _some(router)
    gone = torch.tensor([i for i in range(E) if i not in stay])
    with torch.no_grad():
        logits = router.logits(_x())
        for columns in (gone, gone[:1]):
            probs, weights, indices = router.choose(logits.index_fill(1, columns, -torch.inf))
            assert not torch.isin(indices, columns).any(), f"{router} chooses experts whose logit is minus infinity"
            finite = torch.isfinite(probs).all() and torch.isfinite(weights).all()
            assert finite, f"{router} gives NaN or infinity"
            assert (probs[:, columns] == 0).all(), f"{router} gives a probability to an expert that cannot be chosen"


def expert_dims_are_complete(kind: str, make: Make) -> None:
    """`expert_dims` names every tensor that grows with E, with the dimension that does, and nothing else."""
    small, large = (_tensors(_router(make, n)) for n in (E, 2 * E))
    assert small.keys() == large.keys(), "its tensors depend on the number of experts"
    router = _router(make)
    for name, tensor in small.items():
        grows = [dim for dim in range(tensor.ndim) if tensor.shape[dim] != large[name].shape[dim]]
        declared = [router.expert_dims[name]] if name in router.expert_dims else []
        assert grows == declared, f"{name} grows with the experts in dimensions {grows}, expert_dims says {declared}"
    unknown = [name for name in router.expert_dims if getattr(router, name, ...) is ...]
    assert not unknown, f"expert_dims names {unknown}, which {type(router).__name__} does not have"


def cut_router_is_a_smaller_router(kind: str, make: Make) -> None:
    """Cut to some experts it runs, exactly as one that was made with so many and loads the same tensors."""
    router = _router(make)
    stay = _some(router)
    cut = _with_experts(router, stay)
    made = _router(make, len(stay), seed=1)
    made.load_state_dict(cut.state_dict())
    x = _x()
    with torch.no_grad():
        one, other = cut(x), made(x)
    assert one.logits.shape == (len(x), len(stay)), f"{router} cut to {len(stay)} experts has logits {one.logits.shape}"
    same = all(torch.equal(a, b) for a, b in zip(_parts(one), _parts(other), strict=True))
    assert same, f"{router}, cut, remembers how many experts it had"


def permuted_experts_give_the_permuted_routing(kind: str, make: Make) -> None:
    """The order of experts within a group does not matter."""
    router = _router(make)
    size = E // router.n_groups
    rng = np.random.default_rng(1)
    order = torch.from_numpy(np.concatenate([g * size + rng.permutation(size) for g in range(router.n_groups)]))
    x = _x()
    with torch.no_grad():
        whole, permuted = router(x), _with_experts(router, order.tolist())(x)
    assert _close(permuted.logits, whole.logits[:, order], 1e-5), f"logits of {router} do not follow its experts"
    assert _close(permuted.probs, whole.probs[:, order], 1e-5), f"probabilities of {router} do not follow its experts"
    assert torch.equal(order[permuted.indices], whole.indices), f"{router} chooses by the order of the experts"
    assert _close(permuted.weights, whole.weights, 1e-5), f"weights of {router} depend on the order of the experts"


def cut_router_equals_masked(kind: str, make: Make) -> None:
    """Cut to some experts it routes as the whole one with the others' logits at minus infinity (1e-5).

    A router for which that is not so declares `experts_interact = True`.
    """
    router = _router(make)
    if router.experts_interact:
        return
    stay = torch.tensor(_some(router))
    gone = torch.tensor([i for i in range(E) if i not in stay.tolist()])
    x = _x()
    with torch.no_grad():
        cut = _with_experts(router, stay.tolist())(x)
        probs, weights, indices = router.choose(router.logits(x).index_fill(1, gone, -torch.inf))
    assert torch.equal(stay[cut.indices], indices), f"{router}, cut, chooses other experts than with the others masked"
    assert _close(cut.weights, weights, 1e-5), f"{router}, cut, has other weights than with the others masked"
    assert _close(cut.probs, probs[:, stay], 1e-5), (
        f"{router}, cut, has other probabilities than with the others masked"
    )


def tokens_are_routed_one_by_one(kind: str, make: Make) -> None:
    """Where a token goes depends on that token alone: not on later ones, not on padding; the mask is handed on."""
    router = _router(make)
    x = _x()
    other = torch.cat([x[:25], 100 * _x(15, seed=6)])
    mask = torch.arange(len(x)) < 25
    with torch.no_grad():
        alone, whole, padded = router(x[:25]), router(x), router(other, mask)
    assert padded.mask is mask, f"{router} does not hand the mask on"
    for routing in (whole, padded):
        assert _close(routing.logits[:25], alone.logits, 1e-5), f"{router}: a token's logits depend on other tokens"
        assert torch.equal(routing.indices[:25], alone.indices), f"{router}: a token's experts depend on other tokens"


def gradients_reach_all_parameters(kind: str, make: Make) -> None:
    """The combine weights have finite gradients that are not all 0 for every parameter that is trained."""
    router = _router(make).train()
    with _seeded():
        routing = router(_x(200))
    (routing.weights * torch.arange(1.0, TOP_K + 1)).square().sum().backward()
    for name, parameter in router.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros(()) if parameter.grad is None else parameter.grad
            assert grad.any(), f"no gradient reaches {name} of {router}"
            assert torch.isfinite(grad).all(), f"the gradient of {name} of {router} is not finite"


def state_dict_round_trip(kind: str, make: Make) -> None:
    """Another one that loads its state dict routes the same, bit for bit."""
    router, other = _router(make), _router(make, seed=1)
    other.load_state_dict(router.state_dict())
    x = _x()
    with torch.no_grad():
        same = all(torch.equal(a, b) for a, b in zip(_parts(router(x)), _parts(other(x)), strict=True))
    assert same, f"{router} keeps something that its state dict does not hold"


# -- balancer -----------------------------------------------------------------------------------------------------------


def _routers(make: Make, n_experts: int = E) -> list[Router]:
    """Registered routers that the balancer works with; it refuses the others with a UserError."""
    found = []
    for name in registry.usable("router")[0]:
        try:
            router = _router(partial(registry.create, "router", name), n_experts)
            _loss(make(), router, _x())
            make().after_step([router], [torch.ones(n_experts, dtype=torch.int64)])
        except UserError:
            continue
        found.append(_router(partial(registry.create, "router", name), n_experts))
    assert found, f"{make()!r} works with no registered router"
    return found


def _loss(balancer: Balancer, router: Router, x: Tensor, mask: Tensor | None = None, n_sequences: int = 1) -> Tensor:
    return balancer.loss(replace(router(x, mask), n_sequences=n_sequences), router)


def _gradients(loss: Tensor, router: Router) -> list[Tensor]:
    """Of all parameters of the router; zeros where the loss does not reach."""
    parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
    if not loss.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def loss_is_a_finite_scalar(kind: str, make: Make) -> None:
    """A float scalar, finite as its gradients are, for layers of any E, few tokens and saturated routers."""
    balancer = make()
    for n_experts in (E, 2 * E, E):
        for router in _routers(make, n_experts):
            for x in (_x(), _x(1), 1000 * _x(), 0 * _x()):
                loss = _loss(balancer, router, x)
                scalar = loss.shape == () and loss.is_floating_point()
                assert scalar, f"{balancer!r} gives {loss}, no float scalar"
                assert torch.isfinite(loss), f"{balancer!r} gives {loss.item()}"
                finite = all(torch.isfinite(gradient).all() for gradient in _gradients(loss, router))
                assert finite, f"{balancer!r} has gradients that are not finite"


def padding_does_not_count(kind: str, make: Make) -> None:
    """Loss and gradients are those of the tokens without the padding, whatever the padding holds."""
    B, S, real = 3, 10, 6
    mask = (torch.arange(S) < real).repeat(B)
    x = _x(B * S)
    x[~mask] = 50 * _x(B * S, seed=6)[~mask]
    for router in _routers(make):
        padded, dropped = _loss(make(), router, x, mask, B), _loss(make(), router, x[mask], None, B)
        assert _close(padded, dropped, 1e-5), f"{make()!r} counts padding: {padded} instead of {dropped}"
        for one, other in zip(_gradients(padded, router), _gradients(dropped, router), strict=True):
            assert _close(one, other, 1e-5), f"{make()!r} has gradients from padding"


def permuted_experts_balance_the_same(kind: str, make: Make) -> None:
    """The order of experts within a group does not matter."""
    for router in _routers(make):
        size = E // router.n_groups
        rng = np.random.default_rng(1)
        order = np.concatenate([g * size + rng.permutation(size) for g in range(router.n_groups)])
        loss, permuted = (_loss(make(), r, _x()) for r in (router, _with_experts(router, order.tolist())))
        assert _close(permuted, loss, 1e-5), f"{make()!r} depends on the order of the experts"


def routing_is_left_alone(kind: str, make: Make) -> None:
    """`loss` changes neither the routing nor the router."""
    balancer = make()
    for router in _routers(make):
        routing = router(_x())
        before = [part.clone() for part in _parts(routing)]
        tensors = {name: tensor.clone() for name, tensor in _tensors(router).items()}
        balancer.loss(routing, router)
        same = all(torch.equal(a, b) for a, b in zip(before, _parts(routing), strict=True))
        assert same, f"{balancer!r} changes the routing"
        same = all(torch.equal(tensor, tensors[name]) for name, tensor in _tensors(router).items())
        assert same, f"loss of {balancer!r} changes the router; what acts on it belongs into after_step"


def steps_balance(kind: str, make: Make) -> None:
    """`after_step`, where there is one, takes layers of unequal E, leaves the counts alone and balances no worse than it found."""
    balancer = make()
    if type(balancer).after_step is Balancer.after_step:
        return
    for routers in zip(_routers(make, E), _routers(make, 2 * E), strict=True):
        x = _x(300) + 0.5

        def counts(routers: Sequence[Router] = routers, x: Tensor = x) -> list[Tensor]:
            with torch.no_grad():
                return [router(x).counts for router in routers]

        first = counts()
        for _ in range(300):
            seen = counts()
            handed = [count.clone() for count in seen]
            with torch.no_grad():
                balancer.after_step(routers, handed)
            same = all(torch.equal(a, b) for a, b in zip(seen, handed, strict=True))
            assert same, f"{balancer!r} changes the counts"
        for before, after in zip(first, counts(), strict=True):
            assert after.max() <= before.max(), f"steps of {balancer!r} make the largest load larger: {after.tolist()}"


def coefficient_is_not_negative(kind: str, make: Make) -> None:
    """Its coefficient is a finite number, at least 0."""
    coefficient = make().coefficient
    assert isinstance(coefficient, int | float), f"the coefficient is {coefficient!r}"
    assert 0 <= coefficient < math.inf, f"the coefficient is {coefficient}"


# -- suite --------------------------------------------------------------------------------------------------------------


def tasks_are_named_once(kind: str, make: Make) -> None:
    """A task at least, each under a name of its own, numbers that mean something; asked twice, the same."""
    suite = make()
    tasks = list(suite.tasks())
    assert tasks, f"{suite!r} has no task"
    names = [task.name for task in tasks]
    assert all(isinstance(name, str) and name for name in names), f"{suite!r} has tasks without a name: {names}"
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"{suite!r} has tasks twice: {twice}"
    for task in tasks:
        assert task.num_fewshot is None or task.num_fewshot >= 0, f"{task} of {suite!r} asks for fewer than no examples"
        assert task.max_gen_toks is None or task.max_gen_toks >= 1, f"{task} of {suite!r} leaves no room for an answer"
    assert tasks == list(suite.tasks()) == list(make().tasks()), f"{suite!r} changes when asked again"
    assert list(suite.metrics()) == names, f"metrics() of {suite!r} is of other tasks"


def families_hold_its_tasks(kind: str, make: Make) -> None:
    """A family holds tasks of the suite, at least one, each once."""
    suite = make()
    names = {task.name for task in suite.tasks()}
    for family, tasks in suite.families().items():
        assert tasks, f"family {family!r} of {suite!r} is empty"
        assert len(set(tasks)) == len(tasks), f"family {family!r} of {suite!r} counts a task twice: {list(tasks)}"
        foreign = sorted(set(tasks) - names)
        assert not foreign, f"family {family!r} of {suite!r} holds {foreign}, which are no tasks of it"


def task_files_exist(kind: str, make: Make) -> None:
    """Every folder of task files is there and defines a task of the suite."""
    suite = make()
    names = {task.name for task in suite.tasks()}
    own = suite.task_folder()
    assert own is None or own in suite.folders(), f"folders() of {suite!r} lacks {own}"
    for folder in suite.folders():
        assert folder.is_dir(), f"{folder} of {suite!r} is no folder"
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.yaml"))]
        pattern = r"^(?:task|group):\s*[\"']?([\w.-]+)"
        defined = {name for text in texts for name in re.findall(pattern, text, re.MULTILINE)}
        assert defined & names, f"no file in {folder} defines a task of {suite!r}"


# -- the suite ----------------------------------------------------------------------------------------------------------

_PRUNING: tuple[Check, ...] = (
    plan_obeys_every_constraint,
    same_seed_same_plan,
    permuted_experts_give_the_permuted_plan,
    experts_are_named_by_their_original_ids,
    evidence_declared_is_evidence_used,
    evidence_is_left_alone,
    odd_layers_are_planned_or_refused,
    single_expert_stays,
    nan_evidence_is_refused,
    more_of_everything_scores_higher,
    plan_survives_json,
    pruned_equals_masked,
    options_survive_yaml,
    docstring_has_a_source,
)
CHECKS: Mapping[str, tuple[Check, ...]] = {
    "pruner": _PRUNING,
    "criterion": _PRUNING,
    "allocation": _PRUNING,
    "statistic": (
        reads_are_declared,
        blocks_add_up,
        one_instance_serves_all_layers,
        one_row_per_expert,
        permuted_experts_give_the_permuted_statistic,
        any_precision_is_summed_in_double,
        docstring_has_a_source,
    ),
    "trigger": (
        asked_again_it_answers_the_same,
        progress_is_left_alone,
        nothing_fires_before_the_first_step,
        shares_rise_to_one,
        options_survive_yaml,
        docstring_has_a_source,
    ),
    "balancer": (
        loss_is_a_finite_scalar,
        padding_does_not_count,
        permuted_experts_balance_the_same,
        routing_is_left_alone,
        steps_balance,
        coefficient_is_not_negative,
        options_survive_yaml,
        docstring_has_a_source,
    ),
    "placement": (
        every_expert_has_one_place,
        same_loads_same_places,
        no_device_is_below_the_bound,
        odd_numbers_of_devices_are_refused,
        options_survive_yaml,
        docstring_has_a_source,
    ),
    "router": (
        routing_is_consistent,
        float32_under_autocast,
        minus_infinity_is_never_chosen,
        expert_dims_are_complete,
        cut_router_is_a_smaller_router,
        permuted_experts_give_the_permuted_routing,
        cut_router_equals_masked,
        tokens_are_routed_one_by_one,
        gradients_reach_all_parameters,
        state_dict_round_trip,
        docstring_has_a_source,
    ),
    "suite": (
        tasks_are_named_once,
        families_hold_its_tasks,
        task_files_exist,
        options_survive_yaml,
        docstring_has_a_source,
    ),
}


def conformance(kind: str, strategy: str | Make, **options: Any) -> Callable[..., None]:
    """A pytest function that runs every check of its kind on a strategy.

    Args:
        kind: pruner, criterion, allocation, statistic, trigger, balancer, placement, router or suite.
        strategy: short name of a registered one, or a function (or class) that makes one. A router's is called with
            d_model, n_experts and top_k.
        options: of the strategy.

    Raises:
        UserError: unknown kind.
    """
    import pytest

    registry.contract(kind)
    make: Make = partial(registry.create, kind, strategy) if isinstance(strategy, str) else strategy

    @pytest.mark.parametrize("check", CHECKS[kind], ids=lambda check: check.__name__)
    def test(check: Check) -> None:
        check(kind, partial(make, **options) if options else make)

    return test
