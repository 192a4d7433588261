"""Load metrics and the Switch loss against their definitions; triggers; placements."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.balancing.metrics import ExpertLoad, load_metrics
from moeprune.errors import UserError
from moeprune.model.router import Routing
from moeprune.parallel.placement import lower_bound, max_load_factor
from moeprune.pruning.trigger import LoadWindow, Progress
from moeprune.registry import create

counts = st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any)


@given(counts)
def test_load_metrics_from_their_definitions(load: list[int]) -> None:
    metrics = load_metrics(np.array(load))
    mean, E, total = sum(load) / len(load), len(load), sum(load)
    assert metrics["max_vio"] == pytest.approx(max(load) / mean - 1)
    assert metrics["gini"] == pytest.approx(sum(abs(a - b) for a in load for b in load) / (2 * E * E * mean))
    assert metrics["entropy"] == pytest.approx(-sum(c / total * math.log(c / total) for c in load if c) / math.log(E))
    assert metrics["cv"] == pytest.approx(math.sqrt(sum((c - mean) ** 2 for c in load) / E) / mean)
    assert metrics["dead"] == pytest.approx(sum(c / total < 1e-3 for c in load) / E)


def test_balanced_and_degenerate_loads() -> None:
    balanced = {"max_vio": 0.0, "entropy": 1.0, "cv": 0.0, "gini": 0.0, "dead": 0.0}
    for load in ([7, 7, 7], [0, 0], [5]):
        assert load_metrics(np.array(load)) == pytest.approx(balanced, abs=1e-12)


def test_expert_load_sums_unequal_layers() -> None:
    metric = ExpertLoad([3, 1])
    metric.update([torch.tensor([1, 2, 3]), torch.tensor([4])])
    metric.update([torch.tensor([1, 0, 0]), torch.tensor([1])])
    assert [t.tolist() for t in metric.totals()] == [[2, 2, 3], [5]]


def routing(T: int, E: int, K: int, mask: torch.Tensor | None = None, uniform: bool = False) -> Routing:
    logits = torch.zeros(T, E) if uniform else torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    indices = torch.arange(T * K).view(T, K) % E if uniform else probs.topk(K).indices
    return Routing(logits, probs, probs.gather(1, indices), indices, mask)


def test_switch_loss_is_one_at_balance_and_equals_its_formula() -> None:
    switch = create("balancer", "switch")
    assert switch.loss(routing(12, 6, 2, uniform=True), None).item() == pytest.approx(1)
    mask = torch.arange(30) < 17
    r = routing(30, 6, 2, mask)
    expected = 0.0
    for i in range(6):
        f = sum(int(e == i) for t in range(17) for e in r.indices[t].tolist()) / (2 * 17)
        expected += 6 * f * sum(r.probs[t, i].item() for t in range(17)) / 17
    assert switch.loss(r, None).item() == pytest.approx(expected, rel=1e-5)


def test_switch_loss_pushes_towards_balance() -> None:
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1.0
    logits.requires_grad_()
    probs = logits.softmax(-1)
    indices = probs.topk(1).indices
    create("balancer", "switch").loss(Routing(logits, probs, probs, indices), None).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()
    with pytest.raises(UserError, match="coefficient"):
        create("balancer", "switch", coefficient=-1)


def progress(
    orders: list[list[list[int]]], step: int | None = None, warmup: int = 0, prunes: int = 0, max_steps: int = 1000
) -> Progress:
    windows = [LoadWindow(10 * i, 10 * i + 10, [np.array(layer) for layer in w]) for i, w in enumerate(orders)]
    return Progress(step if step is not None else 10 * len(windows), max_steps, warmup, 0, windows, prunes)


STILL = [[1, 2, 3, 4], [9, 8, 7, 6]]


def test_stable_needs_every_layer_and_enough_windows() -> None:
    stable = create("trigger", "stable", windows=2)
    assert stable.fires(progress([STILL] * 2)) is None
    assert stable.fires(progress([STILL] * 3)).startswith("stable")
    moving = [STILL[0], [6, 7, 8, 9]]
    assert stable.fires(progress([STILL, STILL, moving])) is None  # one layer turned round
    assert stable.fires(progress([moving, STILL, STILL, STILL])).startswith("stable")
    assert stable.fires(progress([STILL] * 3, prunes=1)) is None


def test_stable_ignores_warmup_and_has_a_deadline() -> None:
    stable = create("trigger", "stable", windows=2, deadline=0.5)
    assert stable.fires(progress([STILL] * 4, warmup=15)) is None  # windows 2 and 3 begin after it: one pair only
    assert stable.fires(progress([STILL] * 5, warmup=15)).startswith("stable")
    assert stable.fires(progress([STILL], step=499)) is None
    assert stable.fires(progress([STILL], step=500)).startswith("deadline")
    assert stable.fires(progress([STILL], step=500, max_steps=-1)) is None
    for bad in ({"threshold": 0}, {"windows": 0}, {"deadline": 2}):
        with pytest.raises(UserError, match=next(iter(bad))):
            create("trigger", "stable", **bad)


def test_at_step_fires_once() -> None:
    trigger = create("trigger", "at_step", step=30)
    assert trigger.fires(progress([], step=29)) is None
    assert trigger.fires(progress([], step=31))
    assert trigger.fires(progress([], step=31, prunes=1)) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=6, max_size=6))
def test_lpt_places_everyone_once_and_respects_the_bound(load: list[int]) -> None:
    loads = np.array(load)
    best = min(
        max_load_factor(loads, [list(group), [i for i in range(6) if i not in group]])
        for group in itertools.combinations(range(6), 3)
    )
    for name in ("lpt", "contiguous"):
        devices = create("placement", name).place(loads, 2)
        assert sorted(i for device in devices for i in device) == list(range(6))
        assert [len(device) for device in devices] == [3, 3]
        assert lower_bound(loads, 2) - 1e-9 <= best <= max_load_factor(loads, devices) + 1e-9


def test_lpt_worked_example() -> None:
    """Loads 9 7 6 5 4 1 on two devices: 9, then 7, 6 to the second, 5 to the first, 4 to the second, 1 to the first."""
    assert create("placement", "lpt").place(np.array([9, 7, 6, 5, 4, 1]), 2) == [[0, 3, 5], [1, 2, 4]]
    with pytest.raises(UserError, match="multiple_of=4"):
        create("placement", "lpt").place(np.array([1, 2, 3, 4, 5, 6]), 4)
