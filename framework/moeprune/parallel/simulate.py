"""What pruning and rearranging experts would do to step time and memory on many devices, from loads. numpy only.

The model of one optimizer step. Of `devices`, `pipeline` stages hold neighbouring layers each; in a stage, `group` devices
share the experts of every layer; devices / (pipeline * group) replicas of all that share the tokens equally. Device d of a
group holds n_d experts of a layer; its tokens and its replica's A assignments (token x expert) come from everywhere alike,
load_d of them go to its experts:

    layer  = max_d (per_token load_d + per_expert n_d) + link max_d max(load_d (1 - 1/G), (A - load_d) / G)
    stage  = sum over its layers of layer + per_parameter max_d (parameters of all its experts)
             + dense (tokens of a device) (share of the layers that the stage holds)
    step   = fixed + max over stages of stage

The link term is the busiest device's: load_d (1 - 1/G) assignments reach it from others, (A - load_d) / G leave it. Nothing
overlaps with anything, and nothing else grows with skew. The costs are whatever the user measured, fitted (fitting.py) or assumes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.parallel.placement import Placement, lower_bound

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rerouting = Literal["proportional", "even"]

VARIANTS = ("no change", "pruning", "rearranging", "both", "replication")
PARTS = ("fixed", "dense", "tokens", "experts", "parameters", "link", "waiting")
RESOLUTION = 2**40  # placements take whole numbers: loads are scaled to this sum


@dataclass(frozen=True)
class Cost:
    """What a training step is made of, in seconds; forward and backward together.

    A step that is run in m micro-batches pays `per_expert` (and what `fixed` stands for) m times: give m times as much.

    Args:
        fixed: per step, whatever is in it.
        dense: per token of a device's own: everything outside the experts (attention, norms, router, head).
        per_token: per assignment (token x expert) that an expert computes.
        per_expert: per expert that a device holds in a layer: kernel launches, small matrix products, reading its weights.
        per_parameter: per expert parameter that a device holds: optimizer, reduction of gradients.
        link: per assignment that goes to another device: there and back, forward and backward.

    Raises:
        UserError: a cost below 0 or not finite.
    """

    fixed: float = 0.0
    dense: float = 0.0
    per_token: float = 0.0
    per_expert: float = 0.0
    per_parameter: float = 0.0
    link: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:
                raise UserError(f"cost.{name} must be a finite number of seconds, at least 0; got {value}")


TERMS = tuple(field.name for field in fields(Cost))


@dataclass(frozen=True)
class Memory:
    """Bytes that training keeps on a device; the default is float32 with AdamW.

    Args:
        weights: per parameter.
        gradients: per parameter.
        optimizer: per parameter, master weights included.
        activation: per value kept for the backward; d_model + 2 d_expert values per assignment (the expert's input and what
            its activation function reads).
        micro_batches: parts that a step is run in; the activations of one of them are kept.

    Raises:
        UserError: a number out of range.
    """

    weights: float = 4.0
    gradients: float = 4.0
    optimizer: float = 8.0
    activation: float = 4.0
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (1 if name == "micro_batches" else 0) <= value < math.inf:
                raise UserError(f"memory.{name} must be at least {int(name == 'micro_batches')}, got {value}")


@dataclass(frozen=True)
class Shape:
    """Sizes of one SwiGLU expert.

    Args:
        d_model: width of the model.
        d_expert: width of the expert.
    """

    d_model: int
    d_expert: int

    @property
    def parameters(self) -> int:
        """Of one expert: three projections."""
        return 3 * self.d_model * self.d_expert

    @property
    def values(self) -> int:
        """Kept per assignment for the backward."""
        return self.d_model + 2 * self.d_expert


@dataclass(frozen=True)
class Grid:
    """How devices divide the work.

    Args:
        devices: all of them.
        group: devices that share the experts of a layer.
        pipeline: stages, each with a run of neighbouring layers.

    Raises:
        UserError: group * pipeline does not divide devices.
    """

    devices: int
    group: int
    pipeline: int = 1

    def __post_init__(self) -> None:
        if min(self.devices, self.group, self.pipeline) < 1 or self.devices % (self.group * self.pipeline):
            raise UserError(
                f"{self.devices} devices do not divide into groups of {self.group} in {self.pipeline} pipeline stages; "
                f"choose devices as a multiple of {max(1, self.group) * max(1, self.pipeline)}"
            )

    @property
    def replicas(self) -> int:
        """Copies of the whole model, which share the tokens."""
        return self.devices // (self.group * self.pipeline)

    @classmethod
    def widest(cls, devices: int, pipeline: int, fewest: int) -> Grid:
        """The largest group that leaves no device without an expert where a layer has `fewest`."""
        if pipeline < 1 or devices < 1 or devices % pipeline:
            raise UserError(f"{devices} devices do not divide into {pipeline} pipeline stages; choose a multiple")
        stage = devices // pipeline
        return cls(devices, next(n for n in range(min(stage, fewest), 0, -1) if stage % n == 0), pipeline)


@dataclass(frozen=True)
class Traffic:
    """Assignments (token x expert) that one optimizer step routes to every expert.

    Args:
        ids: per layer the original ids of its experts, ascending.
        seen: per layer [E] float64: what plans and placements are chosen on.
        loads: per layer [E] float64: what steps are timed with.
        top_k: experts that a token is routed to.

    Raises:
        UserError: layers that route different numbers of tokens, or an expert with more assignments than there are tokens.
    """

    ids: tuple[tuple[int, ...], ...]
    seen: tuple[Floats, ...]
    loads: tuple[Floats, ...]
    top_k: int

    def __post_init__(self) -> None:
        for rows in (self.seen, self.loads):
            total = float(rows[0].sum())
            for layer, (ids, row) in enumerate(zip(self.ids, rows, strict=True)):
                if len(ids) != len(row):
                    raise UserError(f"layer {layer} has {len(row)} loads for {len(ids)} experts")
                if total <= 0 or not math.isclose(float(row.sum()), total, rel_tol=1e-6):
                    raise UserError(
                        f"layer {layer} routes {float(row.sum()):g} assignments per step, layer 0 routes {total:g}; "
                        f"every layer must route the same, more than 0"
                    )
                if row.max() > total / self.top_k * (1 + 1e-6):
                    raise UserError(
                        f"layer {layer}: an expert has {row.max():g} assignments of {total / self.top_k:g} tokens; "
                        f"top_k={self.top_k} is too large"
                    )

    @property
    def tokens(self) -> float:
        """Per step."""
        return float(self.loads[0].sum()) / self.top_k

    def scaled(self, tokens: float) -> Traffic:
        """The same shares of another number of tokens per step."""
        rows = [tuple(row * (tokens * self.top_k / row.sum()) for row in rows) for rows in (self.seen, self.loads)]
        return Traffic(self.ids, rows[0], rows[1], self.top_k)

    def pruned(self, kept: Sequence[Sequence[int]], rule: Rerouting = "proportional") -> Traffic:
        """Without the experts that are not in `kept` (original ids); see `reroute`."""
        where = [np.searchsorted(ids, kept_ids) for ids, kept_ids in zip(self.ids, kept, strict=True)]
        rows = [
            tuple(reroute(row, at, self.top_k, rule) for row, at in zip(rows, where, strict=True))
            for rows in (self.seen, self.loads)
        ]
        return Traffic(tuple(tuple(ids) for ids in kept), rows[0], rows[1], self.top_k)


def reroute(loads: Floats, kept: Ints, top_k: int, rule: Rerouting = "proportional") -> Floats:
    """Loads of the experts that stay once the others are gone: every token still goes to top_k experts.

    What went to the others is handed out in proportion to the loads of those that stay (the softmax of a router without the
    others, if logits were independent of one another), or in equal parts; no expert gets more than every token, and what it
    cannot take goes to the rest in the same way. No model says this: recorded loads after a prune do.

    Args:
        loads: [E] assignments.
        kept: [E'] positions that stay, E' >= top_k.
        top_k: experts that a token is routed to.
        rule: proportional or even.
    """
    total = float(loads.sum())
    stay, most = loads[kept].astype(np.float64), total / top_k
    weights = stay.copy() if rule == "proportional" else np.ones_like(stay)
    for _ in range(2 * len(stay) + 1):
        left = total - stay.sum()
        free = stay < most * (1 - 1e-12)
        if left <= total * 1e-15 or not free.any():
            break
        share = np.where(free, weights, 0.0)
        if share.sum() == 0:  # all that may take more had nothing
            share = free.astype(np.float64)
        stay = np.minimum(stay + left * share / share.sum(), most)
    return stay


def copies(loads: Floats, slots: int, most: int) -> Ints:
    """[E] how many copies of each expert there are when `slots` are handed out, one by one, to the largest load per copy.

    Args:
        loads: [E] assignments.
        slots: copies beyond the first ones.
        most: copies of one expert at most: more than one per device are of no use.
    """
    found = np.ones(len(loads), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(loads)] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(slots):
        if not heap:
            break
        expert = heap[0][1]
        found[expert] += 1
        if found[expert] < most:
            heapq.heapreplace(heap, (-float(loads[expert]) / int(found[expert]), expert))
        else:
            heapq.heappop(heap)
    return found


def arranged(loads: Floats, group: int, placement: Placement) -> Ints:
    """[E] the device of each expert; a device holds at most ceil(E / group) of them.

    Where `group` does not divide E, the placement sees idle experts that make up for it, at the ends of the runs that a
    contiguous order gives one expert less.
    """
    padded, real = _padded(loads, group)
    owner = np.empty(len(padded), dtype=np.int64)
    for device, positions in enumerate(placement.place(_whole(padded), group)):
        owner[positions] = device
    return owner[real]


def least(loads: Floats, group: int) -> float:
    """No placement of at most ceil(E / group) experts per device has a smaller load factor."""
    return lower_bound(_whole(_padded(loads, group)[0]), group)


def _padded(loads: Floats, group: int) -> tuple[Floats, NDArray[np.bool_]]:
    size, short = -(-len(loads) // group), -len(loads) % group
    real = np.ones(size * group, dtype=np.bool_)
    real[(np.arange(group - short, group) + 1) * size - 1] = False
    padded = np.zeros(size * group)
    padded[real] = loads
    return padded, real


def _whole(loads: Floats) -> Ints:
    return np.asarray(np.rint(loads * (RESOLUTION / loads.sum())), dtype=np.int64)


def in_order(order: Floats, group: int) -> Ints:
    """[draws, E] devices of experts that are dealt out in runs of equal length (the first ones one longer), by ascending `order` [draws, E]."""
    E = order.shape[1]
    device = np.repeat(np.arange(group), [E // group + (d < E % group) for d in range(group)])
    owner = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(owner, order.argsort(axis=1, kind="stable"), device[None, :], axis=1)
    return owner


def per_device(loads: Floats, owner: Ints, group: int) -> tuple[Floats, Ints]:
    """[draws, G] load and number of experts of every device, of experts with `loads` [E] on devices `owner` [draws, E]."""
    draws = len(owner)
    at = (owner + group * np.arange(draws)[:, None]).ravel()
    load = np.bincount(at, np.broadcast_to(loads, owner.shape).ravel(), minlength=draws * group).astype(np.float64)
    held = np.bincount(at, minlength=draws * group).astype(np.int64)
    return load.reshape(draws, group), held.reshape(draws, group)


def stages(n_layers: int, pipeline: int) -> list[slice]:
    """Runs of neighbouring layers, the first ones one longer.

    Raises:
        UserError: more stages than layers.
    """
    if not 1 <= pipeline <= n_layers:
        raise UserError(f"{n_layers} layers do not divide into {pipeline} pipeline stages; choose at most {n_layers}")
    ends = np.cumsum([0] + [n_layers // pipeline + (s < n_layers % pipeline) for s in range(pipeline)]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def step_parts(
    load: Floats, held: Ints, tokens: float, cost: Cost, pipeline: int = 1, parameters: int = 0
) -> dict[str, Floats]:
    """Seconds of a step by part, [draws] each; with several stages, those of the slowest one. They sum to the step.

    `tokens` and `experts` are what the mean device of the stage computes, `waiting` is what its slowest ones take longer.

    Args:
        load: [draws, L, G] assignments per device of a group.
        held: [draws, L, G] experts per device.
        tokens: of one device.
        cost: see `Cost`.
        pipeline: stages.
        parameters: of one expert.
    """
    L, group = load.shape[1:]
    compute = (cost.per_token * load + cost.per_expert * held).max(2)  # [draws, L]
    crossing = np.maximum(load * (1 - 1 / group), (load.sum(2, keepdims=True) - load) / group).max(2)
    per_layer = {
        "tokens": cost.per_token * load.mean(2),
        "experts": cost.per_expert * held.mean(2),
        "link": cost.link * crossing,
        "waiting": compute,  # less the first two, below
    }
    each: list[dict[str, Floats]] = []
    for stage in stages(L, pipeline):
        parts = {name: values[:, stage].sum(1) for name, values in per_layer.items()}
        parts["waiting"] = np.maximum(parts["waiting"] - parts["tokens"] - parts["experts"], 0.0)
        parts["parameters"] = cost.per_parameter * parameters * held[:, stage].sum(1).max(1)
        parts["dense"] = np.full(len(load), cost.dense * tokens * (stage.stop - stage.start) / L)
        each.append(parts)
    slowest = np.stack([np.sum(list(parts.values()), axis=0) for parts in each]).argmax(axis=0)
    found = {name: np.stack([parts[name] for parts in each])[slowest, np.arange(len(load))] for name in each[0]}
    return {"fixed": np.full(len(load), cost.fixed), **found}


@dataclass(frozen=True)
class Prediction:
    """One variant on one grid; means over the draws of its order.

    Args:
        variant: one of VARIANTS.
        grid: the devices.
        tokens: per step, of all devices.
        parts: seconds of a step by part; they sum to it.
        spread: standard deviation of the step over draws.
        load_factor: sum over layers of the largest device load over that of the mean one.
        bound: the smallest load factor that any placement of as many experts per device could have.
        most_experts: of the device with most, over the layers that it holds.
        parameters: of that many experts; None if their shape is unknown.
        state_bytes: their weights, gradients and optimizer state.
        bytes: of the device with most, activations included.
    """

    variant: str
    grid: Grid
    tokens: float
    parts: Mapping[str, float]
    spread: float
    load_factor: float
    bound: float
    most_experts: int
    parameters: int | None
    state_bytes: float | None
    bytes: float | None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "grid": {**asdict(self.grid), "replicas": self.grid.replicas},
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
        }


@dataclass(frozen=True)
class Options:
    """How variants are made.

    Args:
        placement: rearranges experts.
        unarranged: order of the experts that nobody rearranged: drawn at random `draws` times, or as they come.
        draws: random orders; times are means over them.
        spare: slots per device and layer for copies of experts, in the variant `replication`.
        seed: of the random orders.

    Raises:
        UserError: a number out of range.
    """

    placement: Placement
    unarranged: Literal["random", "contiguous"] = "random"
    draws: int = 200
    spare: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"draws must be at least 1, got {self.draws}")
        if self.spare < 0:
            raise UserError(f"spare must be at least 0, got {self.spare}")


def simulate(
    traffic: Traffic,
    pruned: Traffic | None,
    grid: Grid,
    cost: Cost,
    options: Options,
    shape: Shape | None = None,
    memory: Memory = Memory(),
) -> list[Prediction]:
    """Every variant on one grid: no change, pruning, rearranging, both, replication (those with pruning if `pruned` is given).

    Placements and copies are chosen on `seen`, steps are timed with `loads`. An expert that survives keeps its place in the
    order, so that pruning is compared with the same draws.

    Args:
        traffic: of the whole model, all devices.
        pruned: of the pruned one, the same tokens.
        grid: the devices.
        cost: of a step.
        options: how variants are made.
        shape: of an expert; without it there is no memory and no per_parameter.
        memory: bytes per parameter and activation.

    Raises:
        UserError: per_parameter without a shape; a pruned model with other tokens; more stages than layers.
    """
    if cost.per_parameter and shape is None:
        raise UserError("cost.per_parameter needs the shape of an expert; give --d_model and --d_expert")
    if pruned is not None and not math.isclose(pruned.tokens, traffic.tokens, rel_tol=1e-6):
        raise UserError(f"the pruned model routes {pruned.tokens:g} tokens per step, the whole one {traffic.tokens:g}")
    orders = drawn_orders(traffic, options)

    def loose(of: Traffic) -> list[tuple[Floats, Ints]]:
        return [
            (load, in_order(order[:, np.searchsorted(whole, ids)], grid.group))
            for load, ids, order, whole in zip(of.loads, of.ids, orders, traffic.ids, strict=True)
        ]

    def packed(of: Traffic) -> list[tuple[Floats, Ints]]:
        return [
            (load, arranged(seen, grid.group, options.placement)[None, :])
            for load, seen in zip(of.loads, of.seen, strict=True)
        ]

    def replicated() -> list[tuple[Floats, Ints]]:
        found = []
        for load, seen in zip(traffic.loads, traffic.seen, strict=True):
            slots = grid.group * (-(-len(seen) // grid.group) + options.spare) - len(seen)
            n = copies(seen, slots, grid.group)
            found.append(
                (np.repeat(load / n, n), arranged(np.repeat(seen / n, n), grid.group, options.placement)[None, :])
            )
        return found

    ways: dict[str, Callable[[], list[tuple[Floats, Ints]]]] = {"no change": lambda: loose(traffic)}
    if pruned is not None:
        ways["pruning"] = lambda: loose(pruned)
    ways["rearranging"] = lambda: packed(traffic)
    if pruned is not None:
        ways["both"] = lambda: packed(pruned)
    ways["replication"] = replicated
    return [_predict(name, make(), grid, traffic.tokens, cost, shape, memory) for name, make in ways.items()]


def drawn_orders(traffic: Traffic, options: Options) -> list[Floats]:
    """Per layer [draws, E]: sorted, the order of its experts."""
    if options.unarranged == "contiguous":
        return [np.arange(len(ids), dtype=np.float64)[None, :] for ids in traffic.ids]
    rng = np.random.default_rng(options.seed)
    return [rng.random((options.draws, len(ids))) for ids in traffic.ids]


def _predict(
    name: str,
    layers: Sequence[tuple[Floats, Ints]],
    grid: Grid,
    tokens: float,
    cost: Cost,
    shape: Shape | None,
    memory: Memory,
) -> Prediction:
    pairs = [per_device(loads / grid.replicas, owner, grid.group) for loads, owner in layers]
    load, held = np.stack([p[0] for p in pairs], axis=1), np.stack([p[1] for p in pairs], axis=1)  # [draws, L, G]
    of_device = tokens / grid.replicas / grid.group
    n = 0 if shape is None else shape.parameters
    parts = step_parts(load, held, of_device, cost, grid.pipeline, n)
    steps = np.sum(list(parts.values()), axis=0)
    slices = stages(len(layers), grid.pipeline)
    held_in = np.stack([held[:, s].sum(1) for s in slices], axis=1)  # [draws, stages, G]
    means = [float(loads.sum()) / grid.group for loads, _ in layers]
    bounds = [least(loads, grid.group) * mean for (loads, _), mean in zip(layers, means, strict=True)]
    state = total = None
    if shape is not None:
        each = memory.weights + memory.gradients + memory.optimizer
        load_in = np.stack([load[:, s].sum(1) for s in slices], axis=1)
        kept = load_in * shape.values * memory.activation / memory.micro_batches
        state = float((held_in * n * each).max(axis=(1, 2)).mean())
        total = float((held_in * n * each + kept).max(axis=(1, 2)).mean())
    most = int(held_in.max())
    return Prediction(
        name,
        grid,
        tokens,
        {part: float(parts[part].mean()) for part in PARTS},
        float(steps.std()),
        float((load.max(2).sum(1) / load.mean(2).sum(1)).mean()),
        sum(bounds) / sum(means),
        most,
        None if shape is None else most * n,
        state,
        total,
    )


@dataclass(frozen=True)
class Points:
    """Gains in throughput over `no change`, in percent; pruning and what rearranging adds to it, and the other way round."""

    pruning: float
    then_rearranging: float
    rearranging: float
    then_pruning: float
    both: float


def gain(of: Prediction, over: Prediction) -> float:
    """Percent more steps per second."""
    return 100 * (over.seconds / of.seconds - 1) if of.seconds else 0.0


def points(predictions: Sequence[Prediction]) -> Points | None:
    """How the gain of one grid splits; None without a pruned model."""
    by = {p.variant: p for p in predictions}
    if "both" not in by:
        return None
    pruning, rearranging, both = (gain(by[name], by["no change"]) for name in ("pruning", "rearranging", "both"))
    return Points(pruning, both - pruning, rearranging, both - rearranging, both)


def amounts(
    loads: Sequence[Floats],
    devices: Sequence[Sequence[Sequence[int]]],
    tokens: float,
    parameters: int = 0,
) -> dict[str, float]:
    """How much of each cost one step of a measured run has: the columns of a fit, by the name of the term.

    Exact where every device of a layer holds as many experts; otherwise the device with most experts and the one with most
    load count as one.

    Args:
        loads: per layer [E] assignments of one replica per step.
        devices: per layer and device of the group the positions of its experts.
        tokens: of one device per step.
        parameters: of one expert.
    """
    group = len(devices[0])
    load = np.array(
        [[sum(float(row[p]) for p in own) for own in layer] for row, layer in zip(loads, devices, strict=True)]
    )
    held = np.array([[len(own) for own in layer] for layer in devices])
    crossing = np.maximum(load * (1 - 1 / group), (load.sum(1, keepdims=True) - load) / group)
    return {
        "fixed": 1.0,
        "dense": tokens,
        "per_token": float(load.max(1).sum()),
        "per_expert": float(held.max(1).sum()),
        "per_parameter": float(parameters * held.sum(0).max()),
        "link": float(crossing.max(1).sum()),
    }
