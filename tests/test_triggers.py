"""When to prune: every trigger on made-up progress, and as a run would ask it, whole or resumed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import UserError
from moeprune.pruning.trigger import LoadWindow, Progress, Trigger
from moeprune.registry import create


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


def seen(step: int = 0, prunes: int = 0, **known: object) -> Progress:
    """Progress of a run of 1000 steps without windows."""
    given = {"max_steps": 1000, "warmup_steps": 0, "tokens": 0, "windows": [], "metrics": {}}
    return Progress(step=step, prunes=prunes, **{**given, **known})  # type: ignore[arg-type]


def ask(trigger: Trigger, steps: range, prunes: int = 0) -> list[tuple[int, float]]:
    """As a run asks: after every step, 128 tokens each; the steps of the prunes, and how much is gone after each."""
    done = []
    for step in steps:
        if trigger.fires(seen(step, prunes, tokens=128 * step)):
            done.append((step, trigger.share(prunes)))
            prunes += 1
    return done


def test_at_tokens_counts_tokens_not_steps() -> None:
    trigger = create("trigger", "at_tokens", tokens=1000)
    assert ask(trigger, range(1, 50)) == [(8, 1.0)]
    assert trigger.fires(seen(1, tokens=999)) is None
    assert trigger.fires(seen(1, tokens=1000)) == "1,000 tokens reached"
    with pytest.raises(UserError, match="tokens must be at least 1"):
        create("trigger", "at_tokens", tokens=0)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(2, 12), st.integers(0, 60), st.sampled_from(["cubic", "linear"]), st.data())
def test_gradual_prunes_on_schedule_whole_or_resumed(
    start: int, prunes: int, slack: int, schedule: str, data: st.DataObject
) -> None:
    end = start + prunes - 1 + slack
    trigger = create("trigger", "gradual", start=start, end=end, prunes=prunes, schedule=schedule)
    events = ask(trigger, range(start, end + 20))
    steps, shares = zip(*events, strict=True)
    assert len(steps) == prunes
    assert (steps[0], steps[-1]) == (start, end)
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 1
    assert shares[-1] == 1.0  # exactly
    for i, share in enumerate(shares, 1):
        wanted = 1 - (1 - i / prunes) ** 3 if schedule == "cubic" else i / prunes
        assert share == pytest.approx(wanted, abs=1e-12)
        assert 0 < share <= 1
    killed = data.draw(st.integers(start, end + 19))
    before = ask(trigger, range(start, killed))
    assert before + ask(trigger, range(killed, end + 20), prunes=len(before)) == events


def test_gradual_says_which_prune_it_is_and_catches_up() -> None:
    trigger = create("trigger", "gradual", start=10, end=30, prunes=3)
    assert trigger.fires(seen(10)) == "prune 1 of 3, step 10 reached"
    assert trigger.fires(seen(19, 1)) is None
    assert trigger.fires(seen(20, 1)) == "prune 2 of 3, step 20 reached"
    assert ask(trigger, range(28, 40)) == [(28, trigger.share(0)), (29, trigger.share(1)), (30, 1.0)]
    assert trigger.fires(seen(99, 3)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1, "end": 5}, "start must be at least 0"),
        ({"start": 1, "end": 5, "prunes": 1}, "at_step"),
        ({"start": 1, "end": 3, "prunes": 4}, "do not fit between start=1 and end=3"),
        ({"start": 1, "end": 30, "schedule": "square"}, "cubic or linear"),
    ],
)
def test_gradual_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create("trigger", "gradual", **options)


@pytest.mark.parametrize("name", ["max_vio", "entropy", "cv", "gini", "dead"])
def test_metric_of_the_loads(name: str) -> None:
    windows = [LoadWindow(10, 20, [np.array([1, 2])]), LoadWindow(20, 30, [np.array([1, 2])])]
    above, below = (create("trigger", "metric", name=name, **{side: 0.5}) for side in ("above", "below"))
    for value in (0.4, 0.5, 0.6, math.nan):
        progress = seen(31, windows=windows, warmup_steps=20, metrics={name: value})
        assert (above.fires(progress) is not None) == (value > 0.5)
        assert (below.fires(progress) is not None) == (value < 0.5)
    progress = seen(31, windows=windows, warmup_steps=20, metrics={name: 0.6})
    assert above.fires(progress) == f"{name} 0.6 is above 0.5"
    for not_yet in (
        seen(31, 1, windows=windows, metrics={name: 0.6}),  # pruned already
        seen(31, windows=windows, warmup_steps=21, metrics={name: 0.6}),  # the window began in the warm-up
        seen(31, metrics={name: 0.6}),  # no window since the prune
    ):
        assert above.fires(not_yet) is None


def test_metric_of_the_validation() -> None:
    trigger = create("trigger", "metric", name="val_loss", below=3.0)
    assert trigger.fires(seen(20)) is None  # no validation yet
    assert trigger.fires(seen(20, warmup_steps=15, metrics={"val_loss": 2.5, "val_step": 10})) is None
    assert trigger.fires(seen(20, warmup_steps=15, metrics={"val_loss": 2.5, "val_step": 15})) == (
        "val_loss 2.5 is below 3"
    )
    assert trigger.fires(seen(20, metrics={"val_loss": 3.0, "val_step": 15})) is None


def test_metric_has_a_deadline_on_request() -> None:
    make: Callable[..., Trigger] = lambda **options: create("trigger", "metric", name="gini", above=0.9, **options)  # noqa: E731
    assert make().fires(seen(1000)) is None
    assert make(deadline=0.5).fires(seen(499)) is None
    assert make(deadline=0.5).fires(seen(500)) == "deadline: 50% of 1000 steps"
    assert make(deadline=0.5).fires(seen(500, max_steps=-1)) is None
    assert make(deadline=0.5).fires(seen(500, 1)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gini"}, "exactly one of above and below"),
        ({"name": "gini", "above": 0.1, "below": 0.2}, "exactly one of above and below"),
        ({"name": "loss", "above": 0.1}, "name must be one of"),
        ({"name": "gini", "above": 0.1, "deadline": 0}, "deadline"),
    ],
)
def test_metric_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create("trigger", "metric", **options)
