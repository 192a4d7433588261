"""The conformance suite: what every criterion, allocation and pruner must do, ready to run on your own plug-in.

    from moeprune.testing import conformance

    test_mine = conformance("criterion", "acme")                 # by short name
    test_other = conformance("pruner", lambda: AcmePruner(n=3))  # or anything that makes one

That is a pytest function, parametrised over the checks below; each check's docstring says what it asks for.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeprune import registry
from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.router import Routing
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import statistics
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Acceptance, Evidence, LayerEvidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Allocation, Criterion, Pruner, ScorePruner
from moeprune.pruning.surgery import apply_plan

E, TOP_K, D, F = 12, 2, 8, 5
CONSTRAINTS = (
    Constraints(),
    Constraints(multiple_of=4),
    Constraints(min_keep=7),
    Constraints(max_keep=5),
    Constraints(n_groups=3),
    Constraints(multiple_of=2, min_keep=3, max_keep=8, n_groups=2),
)
Make = Callable[[], Any]
FAMILY = tuple(f"g{a}f{b}" for a in range(3) for b in range(3))
SHAPES = {"w1": (E, 3), "w2": (E, 3), "w_n": (E, 3), "mean_f": (E, D), "logit_gram": (E, E), "ablation": ()}
PAIRWISE = {"logit_gram"}  # both dimensions count experts


class _Guarded(dict[str, NDArray[Any]]):
    """Statistics that tell who reads what was not declared."""

    def __init__(self, values: Mapping[str, NDArray[Any]], who: object) -> None:
        super().__init__(values)
        self._who = who

    def __missing__(self, name: str) -> NDArray[Any]:
        raise AssertionError(f"{self._who!r} reads the statistic {name!r}, which is not in its `needs`")


def synthetic_evidence(needs: frozenset[str], seed: int = 0, n_layers: int = 3) -> Evidence:
    """Random evidence with exactly the statistics in `needs`, no two experts alike.

    Args:
        needs: names of statistics, `weights` among them.
        seed: of the numbers.
        n_layers: layers of 12 experts, top-2.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(n_layers):
        tokens = rng.permutation(np.arange(1, E + 1)) * 7 + rng.integers(0, 5, E)
        stats: dict[str, NDArray[Any]] = {
            name: np.asarray(rng.random(SHAPES.get(name, (E,))) * 3 + 0.01)
            for name in sorted(needs - {"weights", "acceptance"})
        }
        stats |= {name: stats[name] @ stats[name].T for name in needs & PAIRWISE}
        stats |= {name: tokens.astype(np.int64 if name == "counts" else float) for name in needs & {"counts", "g0f0"}}
        layers.append(LayerEvidence(tuple(range(E)), E, stats, _weights(rng) if "weights" in needs else {}))
    return Evidence(tuple(layers), TOP_K, acceptance=_kept_mass(layers) if "acceptance" in needs else None)


def _kept_mass(layers: Sequence[LayerEvidence]) -> Acceptance:
    """A stand-in for a model: every expert has a worth that its statistics determine; acceptance is the worth kept."""
    worths = [
        {i: float(np.sum([np.sum(v[p]) for v in layer.stats.values() if v.ndim])) for p, i in enumerate(layer.ids)}
        for layer in layers
    ]

    def acceptance(kept: Sequence[Sequence[int]]) -> float:
        shares = [sum(worth[i] for i in ids) / sum(worth.values()) for worth, ids in zip(worths, kept, strict=True)]
        return float(np.mean(shares))

    return acceptance


def _weights(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    sizes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F), "router": (E, D)}
    return {name: torch.from_numpy(rng.normal(size=size)) for name, size in sizes.items()}


def _changed(evidence: Evidence, change: Callable[[str, Any], Any]) -> Evidence:
    """Evidence with every statistic and weight replaced by `change(name, value)`."""
    layers = [
        LayerEvidence(
            layer.ids,
            layer.n_original,
            {name: change(name, value) for name, value in layer.stats.items()},
            {name: change(name, value) for name, value in layer.weights.items()},
        )
        for layer in evidence.layers
    ]
    acceptance = _kept_mass(layers) if evidence.acceptance else None
    return Evidence(tuple(layers), evidence.top_k, evidence.provenance, acceptance)


def _as_pruner(kind: str, strategy: Any) -> Pruner:
    """The strategy at work in a pruner."""
    if isinstance(strategy, Criterion):
        return ScorePruner(strategy, ratio=0.4)
    if isinstance(strategy, Allocation):
        return ScorePruner(registry.create("criterion", "frequency"), 0.4, strategy)
    if not isinstance(strategy, Pruner):
        raise UserError(f"the conformance suite knows criterion, allocation and pruner, not {kind} ({strategy!r})")
    return strategy


def _is_random(strategy: Any) -> bool:
    """Whether it declares `random = True`, or is made of something that does."""
    parts = [strategy, getattr(strategy, "criterion", None), getattr(strategy, "allocation", None)]
    return any(getattr(part, "random", False) for part in parts)


# -- the checks: (kind, make) -> None, or an AssertionError -------------------------------------------------------------


def plan_obeys_every_constraint(kind: str, make: Make) -> None:
    """Kept >= top_k, multiples, bounds and groups, all at once, on several sets of constraints."""
    pruner = _as_pruner(kind, make())
    for seed, constraints in itertools.product(range(3), CONSTRAINTS):
        plan = pruner.plan(synthetic_evidence(pruner.needs, seed), constraints)
        for index, kept in enumerate(plan.kept):
            allowed = constraints.feasible(E, TOP_K)
            assert len(kept) in allowed, f"layer {index} keeps {len(kept)} experts under {constraints}: {pruner!r}"
            size = E // constraints.n_groups
            groups = {sum(i // size == g for i in kept) for g in range(constraints.n_groups)}
            assert len(groups) == 1, f"layer {index} keeps unequal numbers in its groups: {pruner!r}"


def same_seed_same_plan(kind: str, make: Make) -> None:
    """Made twice, asked twice: one plan."""
    one, other = _as_pruner(kind, make()), _as_pruner(kind, make())
    evidence = synthetic_evidence(one.needs)
    plans = [one.plan(evidence), one.plan(evidence), other.plan(evidence)]
    assert plans[0].kept == plans[1].kept == plans[2].kept, f"{one!r} gives another plan when asked again"


def permuted_experts_give_the_permuted_plan(kind: str, make: Make) -> None:
    """Names of experts do not matter. A strategy that draws lots declares `random = True` and is excused."""
    pruner = _as_pruner(kind, make())
    if _is_random(pruner):
        return
    evidence = synthetic_evidence(pruner.needs)
    order = np.random.default_rng(1).permutation(E)
    plan = pruner.plan(evidence)

    def permute(name: str, value: Any) -> Any:
        if value.ndim == 0:
            return value
        return value[order][:, order] if name in PAIRWISE else value[order]

    permuted = pruner.plan(_changed(evidence, permute))
    for before, after in zip(plan.kept, permuted.kept, strict=True):
        assert {int(order[i]) for i in after} == set(before), f"{pruner!r} depends on the order of the experts"


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
    evidence = synthetic_evidence(pruner.needs)

    def idle(name: str, value: Any) -> Any:
        if name not in {"counts", "max_f", "norm_mean_f", "var_f", *FAMILY}:
            return value
        return np.where(np.arange(E) < E // 2, 0, value).astype(value.dtype)

    for odd in (_changed(evidence, idle), _changed(evidence, lambda _, value: value * 0 + 1)):
        try:
            plan = pruner.plan(odd)
        except UserError:
            continue
        assert all(len(kept) >= TOP_K for kept in plan.kept)


def single_expert_stays(kind: str, make: Make) -> None:
    """A layer of one expert, top-1: it stays, or the constraints are refused with a UserError."""
    pruner = _as_pruner(kind, make())
    whole = synthetic_evidence(pruner.needs, n_layers=1).layers[0]
    stats = {n: v[:1, :1] if n in PAIRWISE else v[:1] if v.ndim else v for n, v in whole.stats.items()}
    one = LayerEvidence((0,), 1, stats, {n: v[:1] for n, v in whole.weights.items()})
    try:
        plan = pruner.plan(Evidence((one,), 1, acceptance=_kept_mass([one]) if "acceptance" in pruner.needs else None))
    except UserError:
        return
    assert plan.kept == ((0,),)


def nan_evidence_is_refused(kind: str, make: Make) -> None:
    """NaN in a statistic is a UserError that names the layer."""
    pruner = _as_pruner(kind, make())
    for name in sorted(pruner.needs - {"weights", "counts", "acceptance"}):  # counts are whole numbers
        evidence = synthetic_evidence(pruner.needs)
        broken = np.array(evidence.layers[1].stats[name])
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
    """An expert with larger statistics and weights than another in every respect does not score lower: high = keep.

    A criterion for which that is not so declares `random = True` or `direction = None`.
    """
    criterion = make() if kind == "criterion" else getattr(make(), "criterion", None)
    if criterion is None or _is_random(criterion) or getattr(criterion, "direction", "high") is None:
        return
    evidence = synthetic_evidence(criterion.needs)
    n = 2.0 if "g0f0" in criterion.needs else 1.0  # a mean is compared at equal numbers of tokens

    def grow(name: str, value: Any) -> Any:
        grown = value.clone() if isinstance(value, torch.Tensor) else np.array(value)
        grown[1] = grown[0] * (3 if name not in ("g0f0",) or n == 1.0 else 1)
        return grown

    layer = _changed(evidence, grow).layers[0]
    score = criterion.score(layer, 0)
    assert score[1] >= score[0], f"{criterion!r} scores an expert lower that has more of everything"
    if criterion.needs - {"g0f0"}:
        assert score[1] > score[0], f"{criterion!r} does not tell apart experts that differ threefold"


def pruned_equals_masked(kind: str, make: Make) -> None:
    """A model cut by the plan equals the whole model with the other experts' router logits at minus infinity (1e-5)."""
    pruner = _as_pruner(kind, make())
    plan = pruner.plan(synthetic_evidence(pruner.needs, n_layers=2))
    config = MoEConfig(
        vocab_size=31, d_model=D, n_layers=2, n_heads=2, n_experts=E, top_k=TOP_K, d_expert=F, max_seq_len=9
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = MoETransformer(config).eval()
    tokens = torch.arange(27).view(3, 9)
    cut = copy.deepcopy(whole)
    apply_plan(cut, plan)
    with torch.no_grad():
        assert (cut(tokens) - masked(whole, plan, tokens)).abs().max() <= 1e-5
        same = copy.deepcopy(whole)
        apply_plan(same, PrunePlan(plan.before, plan.before, plan.n_original, TOP_K))
        assert torch.equal(same(tokens), whole(tokens)), "pruning nothing changed a bit"


def masked(model: MoETransformer, plan: PrunePlan, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of `model` with the router logits of the experts that `plan` removes at minus infinity: the slow reference.

    Not for routers whose experts interact (see `Router.experts_interact`).
    """
    hooks = []
    for layer, gone in zip(model.moe_layers, plan.removed, strict=True):
        positions = torch.tensor([layer.ids.index(i) for i in gone], dtype=torch.int64)

        def mask(router: Any, _: Any, routing: Any, positions: torch.Tensor = positions) -> Any:
            logits = routing.logits.index_fill(1, positions, -torch.inf)
            probs, weights, indices = router.choose(logits)
            return Routing(logits, probs, weights, indices, routing.mask)

        hooks.append(layer.router.register_forward_hook(mask))
    try:
        out: torch.Tensor = model(tokens)
        return out
    finally:
        for hook in hooks:
            hook.remove()


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
    if isinstance(value, Criterion | Allocation | Pruner):
        cls = type(value)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {name: _configuration(option) for name, option in value._options().items()},
        }
    return list(value) if isinstance(value, tuple) else value


def docstring_has_a_source(kind: str, make: Make) -> None:
    """The class says where it comes from: a line `Source: ...`."""
    cls = type(make())
    assert "Source:" in (cls.__doc__ or ""), f"the docstring of {cls.__qualname__} has no line 'Source: ...'"


CHECKS: tuple[Callable[[str, Make], None], ...] = (
    plan_obeys_every_constraint,
    same_seed_same_plan,
    permuted_experts_give_the_permuted_plan,
    evidence_declared_is_evidence_used,
    evidence_is_left_alone,
    odd_layers_are_planned_or_refused,
    single_expert_stays,
    nan_evidence_is_refused,
    more_of_everything_scores_higher,
    pruned_equals_masked,
    options_survive_yaml,
    docstring_has_a_source,
)


def conformance(kind: str, strategy: str | Make) -> Callable[..., None]:
    """A pytest function that runs every check on a strategy.

    Args:
        kind: criterion, allocation or pruner.
        strategy: short name of a registered one, or a function without arguments that makes one.

    Raises:
        UserError: unknown kind or name.
    """
    import pytest

    registry.contract(kind)
    make: Make = (lambda: registry.create(kind, strategy)) if isinstance(strategy, str) else strategy

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test(check: Callable[[str, Make], None]) -> None:
        check(kind, make)

    return test
