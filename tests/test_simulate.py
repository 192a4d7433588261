"""The simulator against the same sums in plain loops, its conservation laws, the fit, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune import Constraints, Evidence, PrunePlan, create
from moeprune.cli import main
from moeprune.compare.simulation import memory_text, seconds_text
from moeprune.errors import UserError
from moeprune.parallel import fitting, simulate, traffic
from moeprune.parallel.fitting import Observation
from moeprune.parallel.placement import max_load_factor
from moeprune.parallel.simulate import Cost, Grid, Memory, Options, Shape, Traffic

LPT, CONTIGUOUS = create("placement", "lpt"), create("placement", "contiguous")
SHAPE = Shape(8, 4)


@st.composite
def traffics(draw: st.DrawFn, most_layers: int = 4, most_experts: int = 12) -> Traffic:
    """Loads with zeros, ties and giants; layers of unequal length; no expert above the number of tokens."""
    top_k = draw(st.integers(1, 3))
    layers = []
    for _ in range(draw(st.integers(1, most_layers))):
        E = draw(st.integers(top_k, most_experts))
        weights = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 3.0, 50.0]), min_size=E, max_size=E))
        if sum(w > 0 for w in weights) < top_k:
            weights = [1.0] * E
        layers.append(traffic.bounded(np.array(weights), top_k) * 600 * top_k)
    ids = tuple(tuple(range(0, 2 * len(row), 2)) for row in layers)
    return Traffic(ids, tuple(layers), tuple(layers), top_k)


def costs() -> st.SearchStrategy[Cost]:
    value = st.one_of(st.just(0.0), st.floats(1e-3, 10))
    return st.builds(Cost, value, value, value, value, value.map(lambda x: x / 1000), value)


@st.composite
def prunes(draw: st.DrawFn, of: Traffic) -> list[tuple[int, ...]]:
    kept = []
    for ids in of.ids:
        n = draw(st.integers(of.top_k, len(ids)))
        kept.append(tuple(sorted(draw(st.permutations(ids))[:n])))
    return kept


def owners(of: Traffic, group: int, seed: int) -> list[np.ndarray]:
    """Any assignment of experts to devices, some of which may be empty."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, group, (3, len(ids))) for ids in of.ids]


# --- the step, in loops


def step_in_loops(
    loads: list[list[float]], owner: list[list[int]], group: int, pipeline: int, tokens: float, cost: Cost, n: int
) -> float:
    """The model's docstring, said slowly; traffic between devices is counted route by route."""
    L = len(loads)
    by_stage: list[list[int]] = [part.tolist() for part in np.array_split(np.arange(L), pipeline)]
    slowest = 0.0
    for layers in by_stage:
        stage = cost.dense * tokens * len(layers) / L
        own = [0] * group
        for layer in layers:
            compute, crossing = [0.0] * group, [[0.0] * group for _ in range(group)]
            for load, device in zip(loads[layer], owner[layer], strict=True):
                compute[device] += cost.per_token * load + cost.per_expert
                own[device] += n
                for source in range(group):
                    crossing[source][device] += load / group
            sent = [sum(crossing[s][d] for d in range(group) if d != s) for s in range(group)]
            received = [sum(crossing[s][d] for s in range(group) if d != s) for d in range(group)]
            stage += max(compute) + cost.link * max(sent + received)
        slowest = max(slowest, stage + cost.per_parameter * max(own))
    return cost.fixed + slowest


@settings(max_examples=80, deadline=None)
@given(data=st.data(), of=traffics(), cost=costs(), group=st.integers(1, 5), seed=st.integers(0, 99))
def test_step_is_the_sum_in_loops(data: st.DataObject, of: Traffic, cost: Cost, group: int, seed: int) -> None:
    pipeline = data.draw(st.integers(1, len(of.loads)))
    at = owners(of, group, seed)
    pairs = [simulate.per_device(loads, owner, group) for loads, owner in zip(of.loads, at, strict=True)]
    load, held = (np.stack([p[i] for p in pairs], axis=1) for i in (0, 1))
    parts = simulate.step_parts(load, held, 7.5, cost, pipeline, 96)
    assert tuple(sorted(parts)) == tuple(sorted(simulate.PARTS))
    for draw in range(3):
        expected = step_in_loops(
            [row.tolist() for row in of.loads], [o[draw].tolist() for o in at], group, pipeline, 7.5, cost, 96
        )
        assert sum(part[draw] for part in parts.values()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert all((part >= 0).all() for part in parts.values())


@settings(max_examples=40, deadline=None)
@given(of=traffics(), cost=costs(), group=st.integers(1, 5), seed=st.integers(0, 99))
def test_amounts_times_costs_are_the_step_where_devices_hold_as_many_experts(
    of: Traffic, cost: Cost, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    loads = [np.concatenate([row, np.zeros(-len(row) % group)]) for row in of.loads]
    devices = [rng.permutation(len(row)).reshape(group, -1).tolist() for row in loads]
    owner = [
        [next(d for d in range(group) if p in layer[d]) for p in range(len(row))]
        for row, layer in zip(loads, devices, strict=True)
    ]
    found = simulate.amounts(loads, devices, 7.5, 96)
    expected = step_in_loops([row.tolist() for row in loads], owner, group, 1, 7.5, cost, 96)
    assert sum(getattr(cost, term) * amount for term, amount in found.items()) == pytest.approx(expected, rel=1e-9)


def step(name: str, predictions: list[simulate.Prediction]) -> simulate.Prediction:
    return next(p for p in predictions if p.variant == name)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), of=traffics(), cost=costs())
def test_on_one_device_only_experts_and_parameters_change(data: st.DataObject, of: Traffic, cost: Cost) -> None:
    kept = data.draw(prunes(of))
    options = Options(LPT, draws=4, spare=0)
    found = simulate.simulate(of, of.pruned(kept), Grid(1, 1), cost, options, SHAPE)
    assert [p.variant for p in found] == list(simulate.VARIANTS)
    plain = step("no change", found)
    E, assignments = sum(map(len, of.ids)), sum(row.sum() for row in of.loads)
    parts = (cost.fixed, cost.dense * of.tokens, cost.per_token * assignments, cost.per_expert * E)
    assert plain.seconds == pytest.approx(sum(parts) + cost.per_parameter * 96 * E)
    assert plain.parts["link"] == 0
    assert plain.parts["waiting"] <= 1e-12 * plain.seconds
    for name in ("rearranging", "replication"):
        assert step(name, found).seconds == pytest.approx(plain.seconds)
    gone = E - sum(map(len, kept))
    saved = gone * (cost.per_expert + cost.per_parameter * 96)
    assert plain.seconds - step("pruning", found).seconds == pytest.approx(saved, abs=1e-9 * plain.seconds)
    assert step("both", found).seconds == pytest.approx(step("pruning", found).seconds)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), of=traffics(), group=st.integers(1, 6), replicas=st.integers(1, 3), per_token=st.floats(1e-3, 5))
def test_tokens_alone_make_the_step_the_load_factor(
    data: st.DataObject, of: Traffic, group: int, replicas: int, per_token: float
) -> None:
    pruned = of.pruned(data.draw(prunes(of)))
    options = Options(create("placement", "lpt_swap"), draws=3)
    found = simulate.simulate(of, pruned, Grid(group * replicas, group), Cost(per_token=per_token), options)
    balanced = per_token * of.tokens * of.top_k * len(of.loads) / group / replicas
    for p in found:
        assert p.seconds == pytest.approx(p.load_factor * balanced)
        assert p.parts["tokens"] == pytest.approx(balanced)  # nobody loses or makes a token
        assert p.bound - 1e-9 <= p.load_factor
        assert p.bytes is None
    assert step("rearranging", found).bound == pytest.approx(step("no change", found).bound)


@settings(max_examples=30, deadline=None)
@given(of=traffics(), cost=costs(), group=st.integers(1, 4))
def test_a_replica_is_a_smaller_job(of: Traffic, cost: Cost, group: int) -> None:
    options = Options(LPT, draws=3)
    two = simulate.simulate(of, None, Grid(2 * group, group), cost, options, SHAPE)
    one = simulate.simulate(of.scaled(of.tokens / 2), None, Grid(group, group), cost, options, SHAPE)
    for a, b in zip(two, one, strict=True):
        assert a.variant == b.variant
        assert a.seconds == pytest.approx(b.seconds)
        assert a.bytes == pytest.approx(b.bytes)
    assert simulate.points(two) is None


@settings(max_examples=30, deadline=None)
@given(of=traffics(), group=st.integers(1, 4), data=st.data(), micro=st.integers(1, 3))
def test_memory_in_loops(of: Traffic, group: int, data: st.DataObject, micro: int) -> None:
    pipeline = data.draw(st.integers(1, len(of.loads)))
    memory = Memory(2, 3, 5, 7, micro)
    options = Options(LPT, unarranged="contiguous")
    grid = Grid(group * pipeline, group, pipeline)
    found = simulate.simulate(of, None, grid, Cost(per_token=1), options, SHAPE, memory)[0]
    most = state = experts = 0.0
    for layers in np.array_split(np.arange(len(of.loads)), pipeline):
        for device in range(group):
            mine = [float(x) for i in layers for x in np.array_split(of.loads[i], group)[device]]
            state = max(state, len(mine) * 3 * 8 * 4 * (2 + 3 + 5))
            most = max(most, len(mine) * 3 * 8 * 4 * (2 + 3 + 5) + sum(mine) * (8 + 2 * 4) * 7 / micro)
            experts = max(experts, len(mine))
    assert (found.bytes, found.state_bytes) == pytest.approx((most, state))
    assert found.most_experts == experts
    assert found.parameters == experts * 96


# --- who goes where


@settings(max_examples=100, deadline=None)
@given(of=traffics(most_layers=1), group=st.integers(1, 15), name=st.sampled_from(["lpt", "lpt_swap", "contiguous"]))
def test_rearranging_moves_every_expert_once(of: Traffic, group: int, name: str) -> None:
    loads = of.loads[0]
    owner = simulate.arranged(loads, group, create("placement", name))
    assert owner.shape == loads.shape
    assert np.bincount(owner, minlength=group).max() <= -(-len(loads) // group)
    load, held = simulate.per_device(loads, owner[None, :], group)
    assert load.sum() == pytest.approx(loads.sum())
    assert held.sum() == len(loads)
    assert load.max() * group / loads.sum() >= simulate.least(loads, group) - 1e-9
    if len(loads) % group == 0:
        devices = [np.flatnonzero(owner == d).tolist() for d in range(group)]
        assert load.max() * group / loads.sum() == pytest.approx(max_load_factor(loads, devices))
        whole = np.rint(loads * (simulate.RESOLUTION / loads.sum())).astype(np.int64)
        assert devices == [sorted(own) for own in create("placement", name).place(whole, group)]
    if name == "contiguous":
        assert owner.tolist() == [d for d, run in enumerate(np.array_split(loads, group)) for _ in run]


@given(E=st.integers(1, 20), group=st.integers(1, 8), seed=st.integers(0, 9))
def test_unarranged_is_dealt_out_in_runs(E: int, group: int, seed: int) -> None:
    order = np.random.default_rng(seed).random((4, E))
    for row, owner in zip(order, simulate.in_order(order, group), strict=True):
        runs = np.array_split(np.argsort(row), group)
        assert [owner[p] for run in runs for p in run] == [d for d, run in enumerate(runs) for _ in run]


def test_survivors_keep_their_place() -> None:
    """The pruned model's orders are the whole model's without the experts that went."""
    of = traffic.named("synthetic:lognormal,layers=2,experts=12,tokens=1000")
    assert of is not None
    whole, options = of.traffic, Options(LPT, draws=50, seed=3)
    kept = [tuple(range(12)), tuple(range(12))]
    found = simulate.simulate(whole, whole.pruned(kept), Grid(4, 4), Cost(per_token=1), options)
    assert step("pruning", found).seconds == step("no change", found).seconds  # draw by draw the same
    assert step("pruning", found).spread == step("no change", found).spread > 0
    orders = simulate.drawn_orders(whole, options)
    order = orders[0][:, [1, 5, 7]]
    for row, cut in zip(np.argsort(orders[0]), np.argsort(order), strict=True):
        assert [p for p in row if p in (1, 5, 7)] == [(1, 5, 7)[i] for i in cut]


@settings(max_examples=100, deadline=None)
@given(of=traffics(most_layers=1), slots=st.integers(0, 20), most=st.integers(1, 6))
def test_copies_one_by_one_and_loads_split_exactly(of: Traffic, slots: int, most: int) -> None:
    loads = of.loads[0]
    n = [1] * len(loads)
    for _ in range(slots):
        open_ = [e for e in range(len(loads)) if n[e] < most]
        if open_:
            n[min(open_, key=lambda e: (-loads[e] / n[e], e))] += 1
    assert simulate.copies(loads, slots, most).tolist() == n
    split = np.repeat(loads / n, n)
    assert split.sum() == pytest.approx(loads.sum())
    for expert, k in enumerate(n):
        own = split[sum(n[:expert]) : sum(n[: expert + 1])]
        assert len(own) == k
        assert own == pytest.approx([loads[expert] / k] * k)


def test_replication_mends_what_placement_cannot() -> None:
    """One expert takes a third of all: no placement on 8 devices helps, copies do."""
    loads = np.array([*([2.0] * 16), 16.0])
    of = Traffic((tuple(range(17)),), (loads,), (loads,), 1)
    found = simulate.simulate(of, None, Grid(8, 8), Cost(per_token=1), Options(LPT, spare=2), SHAPE)
    placed, copied = step("rearranging", found), step("replication", found)
    assert placed.load_factor == pytest.approx(16 / 6) == placed.bound
    assert copied.load_factor < 1.4
    assert copied.most_experts == 5  # ceil(17 / 8) and the two spare ones
    assert copied.state_bytes is not None
    assert placed.state_bytes is not None
    assert copied.state_bytes == placed.state_bytes * 5 / 3


# --- where the tokens of experts that are cut go


def rerouted_by_bisection(loads: np.ndarray, kept: np.ndarray, top_k: int, rule: str) -> np.ndarray:
    """The one multiple (or addend) at which the survivors, cut off at the number of tokens, take everything."""
    stay, total = loads[kept], loads.sum()
    most = total / top_k

    def at(x: float) -> np.ndarray:
        return np.minimum(stay * x if rule == "proportional" else stay + x, most)

    low, high = (1.0, 1e12) if rule == "proportional" else (0.0, total)
    for _ in range(200):
        middle = math.sqrt(low * high) if rule == "proportional" else (low + high) / 2
        low, high = (middle, high) if at(middle).sum() < total else (low, middle)
    return at(high)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), of=traffics(most_layers=1), rule=st.sampled_from(["proportional", "even"]))
def test_every_token_still_goes_to_top_k_experts(data: st.DataObject, of: Traffic, rule: Any) -> None:
    kept = np.array(data.draw(prunes(of))[0]) // 2
    loads = of.loads[0]
    found = simulate.reroute(loads, kept, of.top_k, rule)
    assert found.sum() == pytest.approx(loads.sum(), rel=1e-9)
    assert found.max() <= of.tokens * (1 + 1e-9)
    assert (found >= loads[kept] * (1 - 1e-12)).all()
    expected = rerouted_by_bisection(loads, kept, of.top_k, rule)
    if expected.sum() == pytest.approx(loads.sum(), rel=1e-6):  # the idle ones need not step in
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * loads.sum())
    assert of.pruned([tuple(kept * 2)], rule).loads[0].tolist() == found.tolist()


def test_rerouting_by_hand() -> None:
    loads = np.array([60.0, 20, 10, 10])
    assert simulate.reroute(loads, np.array([0, 1]), 1).tolist() == [75, 25]
    assert simulate.reroute(loads, np.array([0, 1]), 1, "even").tolist() == [70, 30]
    loads = np.array([90.0, 60, 30, 20])  # 100 tokens, top-2
    assert simulate.reroute(loads, np.array([0, 1, 2]), 2) == pytest.approx([100, 100 * 2 / 3, 100 / 3])
    assert simulate.reroute(loads, np.array([0, 2]), 2) == pytest.approx([100, 100])
    idle = np.array([100.0, 100, 0, 0, 0])
    assert simulate.reroute(idle, np.array([0, 2, 3]), 2) == pytest.approx([100, 50, 50])


def test_traffic_is_checked() -> None:
    def made(rows: list[list[float]], top_k: int = 1) -> Traffic:
        loads = tuple(np.array(row) for row in rows)
        return Traffic(tuple(tuple(range(len(row))) for row in rows), loads, loads, top_k)

    with pytest.raises(UserError, match="layer 1 routes 4 assignments per step, layer 0 routes 3"):
        made([[1, 2], [2, 2]])
    with pytest.raises(UserError, match="layer 0 routes 0 assignments"):
        made([[0, 0]])
    with pytest.raises(UserError, match=r"an expert has 4 assignments of 2\.5 tokens; top_k=2 is too large"):
        made([[4, 1]], 2)
    of = made([[1, 2]])
    with pytest.raises(UserError, match="the pruned model routes 6 tokens per step, the whole one 3"):
        simulate.simulate(of, of.scaled(6), Grid(1, 1), Cost(), Options(LPT))
    with pytest.raises(UserError, match="per_parameter needs the shape"):
        simulate.simulate(of, None, Grid(1, 1), Cost(per_parameter=1), Options(LPT))
    with pytest.raises(UserError, match="1 layers do not divide into 2 pipeline stages"):
        simulate.simulate(of, None, Grid(2, 1, 2), Cost(), Options(LPT))
    with pytest.raises(UserError, match=r"cost\.link must be a finite number of seconds, at least 0; got -1"):
        Cost(link=-1)
    with pytest.raises(UserError, match=r"memory\.micro_batches must be at least 1, got 0"):
        Memory(micro_batches=0)


@pytest.mark.parametrize(
    ("devices", "pipeline", "fewest", "group"),
    [(8, 1, 8, 8), (8, 1, 7, 4), (1024, 1, 8, 8), (12, 1, 7, 6), (7, 1, 5, 1), (416, 104, 8, 4), (1, 1, 1, 1)],
)
def test_widest_group(devices: int, pipeline: int, fewest: int, group: int) -> None:
    grid = Grid.widest(devices, pipeline, fewest)
    assert (grid.group, grid.replicas * grid.group * grid.pipeline) == (group, devices)


# --- loads


def test_published_numbers_are_what_laep_cuts_the_assumed_loads_to() -> None:
    source = traffic.named("yuan3_ultra")
    assert source is not None
    assert source.kept is not None
    plan = create("pruner", "laep", beta=0.1).plan(source.evidence())
    assert plan.kept == source.kept
    assert plan.n_kept == tuple(traffic.published()["num_experts_per_layer"])
    assert (len(plan.kept), sum(plan.n_kept)) == (103, 4360)
    assert source.shape is not None
    assert source.shape.parameters == 226492416
    assert source.traffic.tokens == 2160 * 32768


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), min_size=3, max_size=20).filter(any),
    st.integers(1, 3),
    st.integers(1, 10**9),
)
def test_shares_are_bounded_and_rounded_without_loss(weights: list[float], top_k: int, total: int) -> None:
    shares = traffic.bounded(np.array(weights), top_k)
    assert shares.sum() == pytest.approx(1)
    assert shares.max() <= 1 / top_k * (1 + 1e-9)
    given_ = np.array(weights)
    free = (shares < (1 - 1e-9) / top_k) & (given_ > 0)
    if free.any():  # those below the bound keep their proportions
        assert shares[free] / shares[free].sum() == pytest.approx(given_[free] / given_[free].sum())
    rounded = traffic.whole(shares, total)
    assert rounded.sum() == total
    assert np.abs(rounded - shares * total).max() <= 1 + 1e-6 * total
    assert (rounded == np.floor(rounded)).all()


def test_laws() -> None:
    zipf = traffic.named("synthetic:zipf,exponent=2,layers=2,experts=4,top_k=1,tokens=205")
    assert zipf is not None
    for row in zipf.traffic.loads:  # 1, 1/4, 1/9, 1/16 of 205 / (1 + 1/4 + 1/9 + 1/16) = 144
        assert sorted(row) == [9, 16, 36, 144]
    drawn = traffic.named("synthetic:lognormal,sigma=0.5,layers=40,experts=64,tokens=1000000")
    assert drawn is not None
    logs = np.log(np.array(drawn.traffic.loads))
    assert np.std(logs, axis=1).mean() == pytest.approx(0.5, abs=0.02)
    again = traffic.named("synthetic:lognormal,sigma=0.5,layers=40,experts=64,tokens=1000000")
    assert again is not None
    assert again.counts == drawn.counts
    assert traffic.named("runs/x/loads.jsonl") is None
    median = traffic.lognormal(65, 1.3)
    assert np.log(median[-1] / median[32]) == pytest.approx(
        1.3 * 2.422, abs=0.01
    )  # the 1 - 0.5/65 quantile of the normal


# --- the fit

TRUE = {"fixed": 0.02, "dense": 1e-5, "per_token": 3e-6, "per_expert": 2e-4, "per_parameter": 1e-9, "link": 4e-6}


def observation(run: str, rng: np.random.Generator, noise: float = 0.0, **fixed: float) -> Observation:
    """A window with random amounts, unless given."""
    drawn = {
        "dense": rng.uniform(500, 2000),
        "per_token": rng.uniform(4000, 20000),
        "per_expert": rng.uniform(50, 500),
        "per_parameter": rng.uniform(1e6, 5e6),
        "link": rng.uniform(1000, 5000),
    }
    amounts = {"fixed": 1.0, **drawn, **fixed}
    seconds = sum(TRUE[term] * amount for term, amount in amounts.items())
    return Observation(run, seconds * (1 + noise * rng.standard_normal()), amounts)


def test_fit_finds_the_costs() -> None:
    rng = np.random.default_rng(0)
    exact = fitting.fit([observation(f"run{i % 3}", rng) for i in range(20)])
    assert dataclasses.asdict(exact.cost) == pytest.approx(TRUE, rel=1e-6)
    assert exact.rms < 1e-6
    assert not exact.left
    noisy = fitting.fit([observation("run", rng, 0.02) for _ in range(400)])
    for term, value in TRUE.items():
        assert abs(getattr(noisy.cost, term) - value) < 4 * noisy.stderr[term] < 2 * value
    assert 1.6 < noisy.rms < 2.4
    assert f"{noisy.rms:.1f} % rms" in str(noisy)
    assert "warning" not in str(noisy)
    assert "measure again" in str(fitting.fit([observation("run", rng, 0.3) for _ in range(50)]))
    run = noisy.by_run()["run"]
    assert run["windows"] == 400
    assert run["error"] == pytest.approx(100 * (run["predicted"] / run["measured"] - 1))


def test_fit_says_what_the_runs_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    one = [
        observation("a", rng, dense=1024, per_token=8192, per_expert=n, per_parameter=n * 24576.0, link=0)
        for n in (64, 128, 128)
    ]
    found = fitting.fit(one)
    assert set(found.left) == {"dense", "per_token", "per_parameter", "link"}
    assert "cannot tell it from fixed" in found.left["per_token"]
    assert "vary top_k" in found.left["per_token"]
    assert "per_expert holds both" in found.left["per_parameter"]
    assert "no run sent tokens" in found.left["link"]
    together = TRUE["per_expert"] + TRUE["per_parameter"] * 24576
    assert found.cost.per_expert == pytest.approx(together)
    assert found.cost.fixed == pytest.approx(TRUE["fixed"] + TRUE["dense"] * 1024 + TRUE["per_token"] * 8192)
    assert found.rms < 1e-6
    known = fitting.fit(one, {"per_token": TRUE["per_token"], "per_parameter": TRUE["per_parameter"]})
    assert known.cost.per_token == TRUE["per_token"]
    assert known.left["per_token"] == "given"
    assert known.cost.per_expert == pytest.approx(TRUE["per_expert"])
    assert known.cost.fixed == pytest.approx(TRUE["fixed"] + TRUE["dense"] * 1024)
    alike = fitting.fit([observation("a", rng, per_expert=64, per_parameter=64e4, link=0) for _ in range(9)])
    assert "cannot tell it from fixed; vary n_experts, or prune" in alike.left["per_expert"]
    proportional = [
        observation("a", rng, per_token=2.0 * t, dense=t, per_expert=9, per_parameter=9, link=0)
        for t in (500, 900, 1300)
    ]
    assert "cannot tell it from per_token; vary batch_size and top_k" in fitting.fit(proportional).left["dense"]


def test_fit_never_gives_a_negative_cost() -> None:
    """Runs in which more experts took less time."""
    found = fitting.fit(
        [
            Observation("a", 1 - n / 1000, {**dict.fromkeys(simulate.TERMS, 0.0), "fixed": 1, "per_expert": n})
            for n in (1, 50, 100)
        ]
    )
    assert found.cost.per_expert == 0
    assert found.cost.fixed > 0.9
    assert "none beyond their noise" in str(found)
    with pytest.raises(UserError, match="more than 0 seconds"):
        fitting.fit([])


# --- runs on disk, and the command

CONFIG = """
model: {config: {d_model: 8, n_layers: 2, n_heads: 1, d_expert: 4, n_experts: 4, top_k: %(top_k)d}, activation_checkpointing: false}
data: {seq_len: 16, vocab_size: 64, batch_size: 4}
trainer: {accelerator: auto, devices: %(devices)d, num_nodes: 1, strategy: %(strategy)s, precision: null, accumulate_grad_batches: 1}
"""
IDS = [[0, 1, 2, 3], [0, 1, 2, 3]]
LOADS = [
    [[40, 30, 20, 10], [70, 10, 10, 10]],
    [[44, 26, 20, 10], [64, 16, 10, 10]],
    [[50, 20, 20, 10], [70, 14, 6, 10]],
    [[46, 26, 14, 14], [72, 12, 6, 10]],
]


def write_run(
    folder: Path, *, top_k: int = 1, devices: int = 1, strategy: str = "auto", seconds: float = 0.5, pruned: bool = True
) -> Path:
    """Windows of 2 steps, 50 tokens each: four before a prune of one expert per layer, two after it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG % {"top_k": top_k, "devices": devices, "strategy": strategy})
    rows = [
        {"step": 2 * i + 2, "first": 2 * i, "expert_ids": IDS, "loads": (np.array(w) * top_k).tolist()}
        for i, w in enumerate(LOADS)
    ]
    kept = [[0, 1, 2], [0, 1, 3]]
    if pruned:
        for step, load in ((10, [[50, 30, 20], [80, 10, 10]]), (12, [[60, 20, 20], [70, 20, 10]])):
            rows.append(
                {"step": step, "first": step - 2, "expert_ids": kept, "loads": (np.array(load) * top_k).tolist()}
            )
        evidence = Evidence.from_counts(LOADS[-1], top_k)
        plan = PrunePlan.from_kept(kept, evidence, Constraints())
        (folder / "events.jsonl").write_text(
            json.dumps({"step": 8, "plan": plan.to_dict()}) + "\n" + json.dumps({"step": 12, "stop": True}) + "\n"
        )
    (folder / "loads.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = [
        {"step": s, "seconds": seconds + (0.1 if s == 3 else 0.0), "tokens": 50} for s in range(1, rows[-1]["step"] + 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    return folder


def test_recorded_windows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    source = traffic.recorded(run / "loads.jsonl", windows=1)
    assert [row.tolist() for row in source.traffic.seen] == [[25, 10, 10, 5], [35, 7, 3, 5]]
    assert [row.tolist() for row in source.traffic.loads] == [[23, 13, 7, 7], [36, 6, 3, 5]]
    assert source.counts == ((50, 20, 20, 10), (70, 14, 6, 10))
    assert source.traffic.tokens == 50
    assert source.shape == SHAPE
    assert "planned on steps 5 to 6, timed with 7 to 8" in source.note
    two = traffic.recorded(run, windows=9)  # half of what there is
    assert two.counts == ((84, 56, 40, 20), (134, 26, 20, 20))
    assert [row.tolist() for row in two.traffic.loads] == [[24, 11.5, 8.5, 6], [35.5, 6.5, 3, 5]]
    own = traffic.recorded(run, windows=2, own=True)
    assert own.counts == ((96, 46, 34, 24), (142, 26, 12, 20))
    assert own.traffic.seen[0].tolist() == own.traffic.loads[0].tolist() == [24, 11.5, 8.5, 6]
    after = traffic.recorded(run, windows=2, events=run / "events.jsonl")
    assert after.kept == ((0, 1, 2), (0, 1, 3))
    assert after.after is not None
    assert [row.tolist() for row in after.after.seen] == [[25, 15, 10], [40, 5, 5]]
    assert [row.tolist() for row in after.after.loads] == [[30, 10, 10], [35, 10, 5]]


def test_command_with_a_recorded_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded loads after the prune are what the pruned variants are timed with."""
    run = write_run(tmp_path / "run")
    cost = ["--cost.per_token=0.01", "--cost.per_expert=0.5", "--unarranged=contiguous"]
    args = [f"--loads={run}/loads.jsonl", f"--events={run}/events.jsonl", "--devices=[1,2]", "--windows=1", *cost]
    assert main(["simulate", *args, f"--output={tmp_path / 'out'}"]) == 0
    text = capsys.readouterr().out
    # survivors 23 13 7 of 50 would get 26.7 15.1 8.1 and got 30 10 10; 36 6 5 would get 38.3 6.4 5.3 and got 35 10 5
    off = (30 - 26.744 + 10 - 8.140 + 10 - 6.383) / 100
    assert (
        f"6 of 8 experts stay (75.0%); loads as recorded after the prune, of which {off:.1%} lie elsewhere"
        in " ".join(text.split())
    )
    result = json.loads((tmp_path / "out/simulation.json").read_text())
    assert result["format"] == "moeprune.simulation/1"
    assert result["experts_before"] == [4, 4]
    assert result["experts_after"] == [3, 3]
    one, two = ({v["variant"]: v for v in grid["variants"]} for grid in result["grids"])
    assert one["no change"]["seconds"] == pytest.approx(0.01 * 100 + 0.5 * 8)
    assert one["pruning"]["seconds"] == pytest.approx(0.01 * 100 + 0.5 * 6)
    assert one["pruning"]["gain_percent"] == pytest.approx(25)
    # two devices, experts as they come, the last window: 36 and 42 of 50 on the first
    assert two["no change"]["seconds"] == pytest.approx(0.01 * (36 + 42) + 0.5 * 4)
    # pruned: 40 and 45 of 50 on the first, which holds two experts
    assert two["pruning"]["seconds"] == pytest.approx(0.01 * (40 + 45) + 0.5 * 4)
    # rearranged by the window before: 0 3 | 1 2 and 0 2 | 1 3, timed with the last: 30 and 39
    assert two["rearranging"]["seconds"] == pytest.approx(0.01 * (30 + 39) + 0.5 * 4)
    # pruned, rearranged by the window before: 0 | 1 2 and 0 | 1 3; the device with more experts is the slower one
    assert two["both"]["seconds"] == pytest.approx(
        max(0.01 * 30 + 0.5, 0.01 * 20 + 1.0) + max(0.01 * 35 + 0.5, 0.01 * 15 + 1.0)
    )
    points = result["grids"][1]["points"]
    assert points["pruning"] + points["then_rearranging"] == pytest.approx(points["both"])
    assert points["rearranging"] + points["then_pruning"] == pytest.approx(points["both"])
    page = (tmp_path / "out/simulation.md").read_text()
    assert "| both |" in page
    assert "simulation.png" in page
    assert (tmp_path / "out/simulation.png").read_bytes().startswith(b"\x89PNG")


def test_command_with_pruners_plans_and_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    base = ["simulate", f"--loads={run}", "--devices=2"]
    assert main([*base, "--pruner=frequency", "--pruner.ratio=0.5"]) == 0
    assert "4 of 8 experts stay" in capsys.readouterr().out
    for multiple, kept in ((1, [3, 2]), (2, [4, 2])):  # of 84 56 40 20 and 134 26 20 20, less than 50
        args = ["--windows=9", f"--multiple_of={multiple}", "--pruner=laep", "--pruner.beta=0.25", "--overwrite"]
        assert main([*base, *args, f"--output={tmp_path / 'laep'}"]) == 0
        assert json.loads((tmp_path / "laep/simulation.json").read_text())["experts_after"] == kept
    capsys.readouterr()
    evidence = Evidence.from_counts(LOADS[0], 1)
    plan = create("pruner", "frequency", ratio=0.25).plan(evidence)
    plan.save(tmp_path / "plan.json")
    assert main([*base, f"--plan={tmp_path / 'plan.json'}"]) == 0
    assert "plan.json; 6 of 8 experts stay" in capsys.readouterr().out.replace("\n", " ")
    from moeprune.pruning import store

    store.save(evidence, tmp_path / "evidence")
    assert main(["simulate", f"--evidence={tmp_path / 'evidence'}", "--devices=2", "--d_model=8", "--d_expert=4"]) == 0
    text = capsys.readouterr().out
    assert "counts of the calibration" in text.replace("\n", " ")
    assert "100 tokens per step" in text


def test_observations_of_runs(tmp_path: Path) -> None:
    alone = fitting.observe([write_run(tmp_path / "a")])
    assert len(alone) == 6
    assert alone[0].amounts == {
        "fixed": 1,
        "dense": 50,
        "per_token": 100,
        "per_expert": 8,
        "per_parameter": 8 * 96,
        "link": 0,
    }
    assert alone[4].amounts["per_expert"] == 6
    assert alone[1].seconds == pytest.approx(0.55)  # the median of steps 3 and 4
    assert alone[0].shape == (SHAPE, 2)
    two = fitting.observe([write_run(tmp_path / "b", devices=2, strategy="ddp", top_k=2)])
    text = (tmp_path / "b/config.yaml").read_text()
    for devices in ("'2'", "[0, 1]"):
        (tmp_path / "b/config.yaml").write_text(text.replace("devices: 2", f"devices: {devices}"))
        assert fitting.observe([tmp_path / "b"]) == two
    (tmp_path / "b/config.yaml").write_text(text.replace("devices: 2", "devices: auto"))
    with pytest.raises(UserError, match=r"trainer\.devices=auto; a fit takes runs with a number of devices"):
        fitting.observe([tmp_path / "b"])
    assert two[0].amounts == {
        "fixed": 1,
        "dense": 25,
        "per_token": 100,
        "per_expert": 8,
        "per_parameter": 8 * 96,
        "link": 0,
    }


def test_observations_under_expert_parallelism(tmp_path: Path) -> None:
    """Four processes, two of which share the experts; the layout is contiguous until a row of events says otherwise."""
    strategy = "{class_path: moeprune.parallel.strategy.ExpertParallelStrategy, init_args: {ep_size: 2}}"
    run = write_run(tmp_path / "run", devices=4, strategy=strategy)
    events = [
        {"step": 2, "rearrangement": {"ranks": [[[0, 3], [1, 2]], [[0, 1], [2, 3]]]}},
        {"step": 5, "rearrangement": {"ranks": [[[0], [1, 2, 3]], [[0, 1], [2, 3]]]}},
        {"step": 8, "rearrangement": {"ranks": [[[0, 1], [2]], [[0], [1, 2]]]}},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    found = fitting.observe([run])
    assert len(found) == 5  # steps 5 and 6 lie before and after a move
    # per replica a quarter of two steps' loads: 10 7.5 5 2.5 and 17.5 2.5 2.5 2.5, experts in order
    assert found[0].amounts == pytest.approx(
        {
            "fixed": 1,
            "dense": 12.5,
            "per_token": 17.5 + 20,
            "per_expert": 4,
            "per_parameter": 4 * 96,
            "link": 17.5 / 2 + 10,
        }
    )
    # 11 6.5 5 2.5 as 0 3 | 1 2 and 16 4 2.5 2.5 as before
    assert found[1].amounts["per_token"] == pytest.approx(13.5 + 20)
    # 11.5 6.5 3.5 3.5 as 0 | 1 2 3, and 18 3 1.5 2.5
    assert found[2].amounts["per_token"] == pytest.approx(13.5 + 21)
    assert (found[2].amounts["per_expert"], found[2].amounts["per_parameter"]) == (3 + 2, 5 * 96)
    assert found[3].amounts["per_token"] == pytest.approx(20 + 20)  # 12.5 7.5 | 5 and 20 | 2.5 2.5
    rows = [json.loads(line) for line in (run / "loads.jsonl").read_text().splitlines()]
    noted = [17.5 / 12.5, 20 / 12.5]
    (run / "loads.jsonl").write_text("".join(json.dumps({**row, "max_load_factor": noted}) + "\n" for row in rows[:1]))
    assert len(fitting.observe([run])) == 1
    (run / "loads.jsonl").write_text(
        "".join(json.dumps({**row, "max_load_factor": [1.1, 1.6]}) + "\n" for row in rows[:1])
    )
    with pytest.raises(UserError, match="does not say how experts lay at step 2"):
        fitting.observe([run])


def test_command_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs that differ in top_k tell per_token from the rest; the prune tells per_expert."""
    for top_k in (1, 2):
        run = write_run(tmp_path / f"top{top_k}", top_k=top_k)
        history = []
        for row in map(json.loads, (run / "loads.jsonl").read_text().splitlines()):
            seconds = 0.1 + 0.001 * np.sum(row["loads"]) / 2 + 0.01 * sum(map(len, row["expert_ids"]))
            history += [{"step": row["first"] + i, "seconds": seconds, "tokens": 50} for i in (1, 2)]
        (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    runs = f"--fit=[{tmp_path / 'top1'},{tmp_path / 'top2'}]"
    assert main(["simulate", runs, f"--output={tmp_path / 'cost'}"]) == 0
    text = capsys.readouterr().out
    assert "residual 0.0 % rms" in text
    assert (
        "dense          0 s per token of a device; not fitted: these runs cannot tell it from fixed; vary batch_size"
        in text
    )
    saved = (tmp_path / "cost/cost.yaml").read_text()
    assert "  per_token: 1.000000e-03" in saved
    assert "  per_expert: 1.000000e-02" in saved
    args = [f"--loads={tmp_path / 'top1'}", "--devices=1", "--windows=1", "--pruner=frequency"]
    assert main(["simulate", f"--config={tmp_path / 'cost/cost.yaml'}", *args, f"--output={tmp_path / 'a'}"]) == 0
    assert main(["simulate", runs, *args, f"--output={tmp_path / 'b'}"]) == 0
    capsys.readouterr()
    for folder in "ab":
        variants = json.loads((tmp_path / folder / "simulation.json").read_text())["grids"][0]["variants"]
        assert variants[0]["seconds"] == pytest.approx(0.1 + 0.1 + 0.08, rel=1e-5)
        assert variants[1]["seconds"] == pytest.approx(0.1 + 0.1 + 0.06, rel=1e-5)
    assert main(["simulate", runs, "--loads=yuan3_ultra", "--devices=8", "--draws=2"]) == 0
    assert "fitted on a model of another shape or depth" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["missing: loads", "--loads=FILE"]),
        (["--loads=nowhere.jsonl"], ["no loads at nowhere.jsonl", "synthetic:zipf"]),
        (["--loads=synthetic:zipff"], ["no law of loads 'zipff'", "did you mean 'zipf'"]),
        (["--loads=synthetic:zipf,expnent=2"], ["no option 'expnent'", "did you mean 'exponent'"]),
        (["--loads=synthetic:zipf,experts=many"], ["experts must be a number, got 'many'"]),
        (["--loads=synthetic:zipf,layers=0"], ["layers=0 is too small"]),
        (["--loads=synthetic:zipf,experts=2,top_k=3"], ["top_k=3 is more than 2 experts"]),
        (["--loads=synthetic:zipf", "--devices=12", "--group=8"], ["12 devices do not divide into groups of 8"]),
        (["--loads=synthetic:zipf", "--devices=0"], ["0 devices do not divide"]),
        (["--loads=synthetic:zipf", "--pipeline=200", "--devices=200"], ["103 layers do not divide into 200"]),
        (["--loads=synthetic:zipf", "--tokens=5", "--tokens_per_device=5"], ["not both"]),
        (["--loads=synthetic:zipf", "--tokens=-5"], ["tokens must be above 0"]),
        (["--loads=synthetic:zipf", "--cost.per_parameter=1"], ["--d_model and --d_expert"]),
        (["--loads=synthetic:zipf", "--cost.per_token=-1"], ["cost.per_token must be"]),
        (["--loads=synthetic:zipf", "--cost.per_tokn=1"], ["per_tokn"]),
        (["--loads=synthetic:zipf", "--top_k=3"], ["top_k=3 differs from top_k=2"]),
        (["--loads=synthetic:zipf", "--pruner=reap"], ["needs the statistic", "recorded were: counts"]),
        (["--loads=synthetic:zipf", "--draws=0"], ["draws must be at least 1"]),
        (["--loads=synthetic:zipf", "--events=e.jsonl"], ["--events are those of a run"]),
        (["--loads={run}", "--events={run}/history.jsonl"], ["records no prune"]),
        (["--loads={run}", "--windows=0"], ["windows must be at least 1"]),
        (["--loads={run}", "--top_k=2"], ["top_k=2 is too large"]),
        (["--loads={run}", "--plan={plan}"], ["is for 1 layers of 4 experts", "are of 2 layers of 4 experts"]),
        (["--loads={run}", "--plan={plan}", "--pruner=laep"], ["one of --plan, --pruner and --events"]),
        (["--fit={run}/nothing"], ["is no finished run"]),
        (["--fit=[{run},{other}]"], ["data.seq_len=32", "one fit takes runs of the same model"]),
        (["--fit={fsdp}"], ["trainer.strategy=fsdp", "a fit takes runs on one device, under ddp, or under ep"]),
    ],
)
def test_bad_input_is_one_sentence(
    args: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, fsdp = write_run(tmp_path / "run"), write_run(tmp_path / "fsdp", strategy="fsdp", devices=2)
    other = write_run(tmp_path / "other")
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("seq_len: 16", "seq_len: 32"))
    create("pruner", "frequency").plan(Evidence.from_counts([[4, 3, 2, 1]], 1)).save(tmp_path / "plan.json")
    places = {"run": run, "fsdp": fsdp, "other": other, "plan": tmp_path / "plan.json"}
    assert main(["simulate", *(arg.format(**places) for arg in args)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("moeprune: error: ")
    assert message.count("\n") == 1
    assert all(word in message for word in words)


def test_needs_no_torch_and_no_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from moeprune.cli import main\n"
        "code = main(['simulate', '--loads=synthetic:zipf,layers=3,experts=8', '--devices=[2,4]', '--output=' + sys.argv[1]])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    args = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "no plot" in done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"simulation.json", "simulation.md"}


def test_texts() -> None:
    assert [seconds_text(x) for x in (0, 2.5e-5, 0.0123, 1.5, 1234)] == ["0", "25 µs", "12.3 ms", "1.5 s", "1,234 s"]
    assert [memory_text(x) for x in (None, 512, 3 * 2**20, 5 * 2**30)] == ["-", "0.5 KiB", "3 MiB", "5 GiB"]
