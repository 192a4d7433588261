"""What pruning and rearranging are worth under expert parallelism, measured on 2 and 4 processes beside what the simulator predicts.

    python benchmarks/expert_parallel.py [--output runs/expert_parallel] [--rounds 20] [--worlds 2 4] [--dry]
    python benchmarks/expert_parallel.py --table                    # table and plot again from benchmarks/expert_parallel.json

Under five minutes on two idle cores. Writes benchmarks/expert_parallel.json, the table in docs/throughput.md and
docs/images/expert_parallel.png; with --dry, results.json and the plot in --output alone.

Two trunks are trained first and kept in --output: recipes/quickstart.yaml with experts of width 256 (instead of 64, so that they
weigh more in a step), up to step 300, and the same with the Switch loss, at a coefficient of 0.1: at the usual 0.01 loads are
far from even by step 300.
LAEP (beta 0.1, numbers that divide by the number of processes) plans from the first trunk's last two load windows, and
placements see the same windows. Then, in the same gloo processes and all side by side:

    no change             the trunk, experts in random order
    Switch loss           the other trunk, trained and stepped with the loss
    pruning               the trunk without LAEP's experts, survivors in the same orders
    pruning + placement   the same survivors, placed by lpt and by lpt_swap
    rearranging alone     the whole trunk, placed by lpt and by lpt_swap

take turns of one untimed and two timed training steps (forward, backward, clipping, fused AdamW with a learning rate of 1e-6, so
that routers stay as they are) on the same batches of training text, in another order in every round. Random orders change from round to round, among ten. Four
more entries of the trunk alone, for the fit only: heaviest experts together, uneven numbers of experts, uneven numbers of equal
load, half the batch.

Processes share cores here, so that wall time says little about as many devices. CPU time of a process counts its work
(gloo's copies included) and no waiting. Between two all-to-alls every process works by itself; a step's *critical path* is the sum over these
stretches of the busiest process's CPU time: the step if every process had a core of its own and the wire took no time.

The simulator's costs are fitted to the critical paths of the trunk's entries, loads come from the trunks' load windows, and
`simulate` predicts all variants from these; pruned and placed variants are in no fit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moeprune import __version__, checkpoints, create
from moeprune.balancing.balancer import Balancer
from moeprune.compare.results import quartiles
from moeprune.files import write_text
from moeprune.model.experts import Experts
from moeprune.parallel import fitting, simulate, traffic
from moeprune.parallel.dispatch import AllToAll
from moeprune.parallel.layout import Layout
from moeprune.parallel.rearrange import factor, rearrange
from moeprune.parallel.strategy import shard
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan
from moeprune.training.data import TextData
from moeprune.training.module import MoELanguageModel

ROOT = Path(__file__).parent.parent
RESULT, PAGE, PICTURE = (
    ROOT / "benchmarks" / "expert_parallel.json",
    ROOT / "docs" / "throughput.md",
    ROOT / "docs" / "images" / "expert_parallel.png",
)
BEGIN, END = "<!-- benchmarks/expert_parallel.py writes from here -->", "<!-- to here -->"
SWITCH = 0.1  # coefficient
TRUNKS = {
    "trunk": [],
    "switch": ["--model.balancers+=switch", f"--model.balancers.coefficient={SWITCH}"],
}
BETA, PLACEMENTS = 0.1, ("lpt", "lpt_swap")
UNTIMED, TIMED = 1, 2  # steps of a turn
BUSY = 8.0  # percent between the quartiles of equal steps from which a page says so
ORDER_SEED, TEXT_SEED = 0, 77
VARIANTS = {  # entry -> (label, trunk, pruned, placement: "" for random orders, row of `simulate`)
    "base": ("no change", "trunk", False, "", "no change"),
    "switch": ("Switch loss", "switch", False, "", "no change"),
    "laep": ("pruning", "trunk", True, "", "pruning"),
    "laep lpt": ("pruning + lpt", "trunk", True, "lpt", "both"),
    "laep lpt_swap": ("pruning + lpt_swap", "trunk", True, "lpt_swap", "both"),
    "base lpt": ("lpt alone", "trunk", False, "lpt", "rearranging"),
    "base lpt_swap": ("lpt_swap alone", "trunk", False, "lpt_swap", "rearranging"),
}
FITTED = ("base", "heaviest together", "uneven numbers", "equal loads", "half the batch")
Layouts = list[Layout]  # one per layer


# --- in every process


class Clock:
    """CPU seconds of this process in the stretches between all-to-alls."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self._exchange = dist.all_to_all_single
        dist.all_to_all_single = self.exchange

    def exchange(self, *args: Any, **kwargs: Any) -> Any:
        """all_to_all_single, after a mark: copying counts to the stretch that begins."""
        self.mark()
        return self._exchange(*args, **kwargs)

    def mark(self) -> None:
        """A stretch ends here."""
        self.marks.append(time.process_time())

    def stretches(self) -> list[float]:
        """Since the last call."""
        marks, self.marks = self.marks, []
        return np.diff(marks).tolist()


class Step(nn.Module):
    """What DDP wraps: the loss of a batch, balancing terms included."""

    def __init__(self, module: MoELanguageModel) -> None:
        super().__init__()
        self.module = module
        self.counts: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        """The loss."""
        out = self.module.training_step(batch, 0)
        self.counts = out["counts"]
        return out["loss"]


class Entry:
    """One model that takes turns, and what was measured of it.

    Args:
        checkpoint: of its trunk.
        plan: experts to keep; None for all.
        balancers: of its trunk.
        orders: layouts per layer that it goes through, one a round.
        share: of the batch.
    """

    def __init__(
        self,
        checkpoint: Path,
        plan: PrunePlan | None,
        balancers: list[Balancer],
        orders: list[Layouts],
        share: float = 1.0,
    ) -> None:
        trunk = checkpoints.read(checkpoint)
        module = MoELanguageModel(config=trunk.config, balancers=balancers)
        module.model = trunk.model().train()
        if plan is not None:
            apply_plan(module.model, plan)
        self.experts: list[Experts] = [layer.experts for layer in module.model.moe_layers]
        for experts, layout in zip(self.experts, orders[0], strict=True):
            shard(experts, AllToAll(layout, dist.group.WORLD))
        mine = [f"{n}.{p}" for n, m in module.named_modules() if isinstance(m, Experts) for p in m.expert_dims]
        self.step = Step(module)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.step, [f"module.{n}" for n in mine])
        self.ddp = DistributedDataParallel(self.step)
        self.module, self.orders, self.share = module, orders, share
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
        self.wall: list[float] = []  # of a round: per step, this process
        self.cpu: list[list[list[float]]] = []  # of a round, per step: stretches
        self.counts: list[list[Tensor]] = []  # of a round: per layer, of this process's tokens
        self.moving: list[float] = []  # seconds of a change of layouts

    def train(self, batch: Tensor, clock: Clock) -> None:
        """One optimizer step, as under the strategy `ep`."""
        self.ddp(batch).backward()
        clock.mark()
        own = [p for experts in self.experts for p in experts.parameters()]
        for parameter in own:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad.div_(dist.get_world_size())
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        local = {id(p) for p in own}
        squares = [
            sum((p.grad.square().sum() for p in parameters if (id(p) in local) == x), torch.zeros(()))
            for x in (False, True)
        ]
        dist.all_reduce(squares[1])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, (squares[0] + squares[1]).sqrt())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, number: int, batches: Sequence[Tensor], clock: Clock) -> None:
        """Untimed and timed steps under the layouts of this round."""
        began = time.perf_counter()
        layouts = self.orders[number % len(self.orders)]
        moved = sum(rearrange(e, layout, [self.optimizer]) for e, layout in zip(self.experts, layouts, strict=True))
        if moved and number:
            self.moving.append(time.perf_counter() - began)
        cpu, counts = [], [torch.zeros(e.dispatcher.layout.n_experts, dtype=torch.int64) for e in self.experts]
        for index, batch in enumerate(batches):
            if index == UNTIMED:
                dist.barrier()
                began = time.perf_counter()
            rows = batch[: max(1, round(self.share * len(batch)))]
            clock.marks = [time.process_time()]
            self.train(rows, clock)
            clock.mark()
            if index >= UNTIMED:
                cpu.append(clock.stretches())
                counts = [a + b for a, b in zip(counts, self.step.counts, strict=True)]
        self.wall.append((time.perf_counter() - began) / TIMED)
        self.cpu.append(cpu)
        self.counts.append(counts)


def work(rank: int, world: int, port: str, job: dict[str, Any]) -> None:
    """One process: all entries in turns; process 0 writes what was measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*self.trainer. reference")  # a step without a Trainer logs nothing
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    clock = Clock()
    plan = PrunePlan.from_dict(job["plan"])
    entries = {}
    for name, entry in job["entries"].items():
        orders = [[Layout.of(ranks) for ranks in layers] for layers in entry["orders"]]
        checkpoint = Path(job["output"]) / entry["trunk"] / "trunk.ckpt"
        balancers = [create("balancer", "switch", coefficient=SWITCH)] if entry["trunk"] == "switch" else []
        entries[name] = Entry(checkpoint, plan if entry["pruned"] else None, balancers, orders, entry["share"])
    data = TextData(batch_size=job["sequences"])
    batches = data.training_batches(job["rounds"] * (UNTIMED + TIMED), TEXT_SEED, rank, world)
    for number in range(job["rounds"]):
        text = [batches.batch(number * (UNTIMED + TIMED) + i) for i in range(UNTIMED + TIMED)]
        for name in random.Random(number).sample(list(entries), len(entries)):
            entries[name].turn(number, text, clock)
    mine = {name: {"wall": e.wall, "cpu": e.cpu, "moving": e.moving} for name, e in entries.items()}
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, mine)
    for entry in entries.values():
        for counts in entry.counts:
            for layer in counts:
                dist.all_reduce(layer)
    if rank == 0:
        found = {
            name: {
                "wall": np.max([each[name]["wall"] for each in everybody], axis=0).tolist(),
                "cpu": [each[name]["cpu"] for each in everybody],  # [process][round][step][stretch]
                "moving": np.max([each[name]["moving"] for each in everybody], axis=0).tolist(),
                "loads": [[(layer / TIMED).tolist() for layer in counts] for counts in entry.counts],
            }
            for name, entry in entries.items()
        }
        write_text(job["result"], json.dumps(found))
    dist.destroy_process_group()


# --- trunks, layouts, the fit


def train_trunks(output: Path, steps: int, width: int) -> None:
    """Both at once; those that are there already are kept."""
    running = []
    for name, options in TRUNKS.items():
        if (output / name / "trunk.ckpt").exists():
            there = checkpoints.read(output / name / "trunk.ckpt")
            if (there.step, there.config.d_expert) != (steps, width):
                raise SystemExit(f"{output / name} holds a trunk of other length or width; choose another --output")
            continue
        arguments = [
            f"--config={ROOT / 'recipes' / 'quickstart.yaml'}",
            f"--trainer.default_root_dir={output / name}",
            f"--model.config.d_expert={width}",
            "--pruning.trigger=at_step",
            f"--pruning.trigger.step={steps}",
            "--pruning.stop=true",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
            *options,
        ]
        running.append(subprocess.Popen([sys.executable, "-m", "moeprune", "fit", *arguments]))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a trunk could not be trained")


def of_owner(owner: Any, world: int) -> Layout:
    """The layout that puts the expert at each position on the process that `owner` names."""
    return Layout.of([position for position, rank in enumerate(owner) if rank == r] for r in range(world))


def entries_of(
    world: int, whole: traffic.Source, plan: PrunePlan, options: simulate.Options
) -> dict[str, dict[str, Any]]:
    """What takes turns: trunk, pruned or not, share of the batch, layouts of the rounds."""
    orders = simulate.drawn_orders(whole.traffic, options)

    def random_layouts(kept: Sequence[Sequence[int]]) -> list[Layouts]:
        owners = [
            simulate.in_order(order[:, np.searchsorted(ids, own)], world)
            for order, ids, own in zip(orders, whole.traffic.ids, kept, strict=True)
        ]
        return [[of_owner(layer[draw], world) for layer in owners] for draw in range(options.draws)]

    def placed(kept: Sequence[Sequence[int]], placement: str) -> list[Layouts]:
        rows = [
            np.array(counts)[np.searchsorted(ids, own)]
            for counts, ids, own in zip(whole.counts, whole.traffic.ids, kept, strict=True)
        ]
        return [[Layout.of(create("placement", placement).place(row, world)) for row in rows]]

    found = {}
    for name, (_, trunk, pruned, placement, _) in VARIANTS.items():
        kept = plan.kept if pruned else whole.traffic.ids
        layouts = placed(kept, placement) if placement else random_layouts(kept)
        found[name] = {"trunk": trunk, "pruned": pruned, "share": 1.0, "orders": layouts}
    by_load = [np.argsort(-np.array(counts), kind="stable") for counts in whole.counts]
    E = len(by_load[0])
    few = E // (2 * world)  # experts of every process but the last, where numbers are uneven
    ends = [few * (r + 1) for r in range(world - 1)] + [E]
    shuffled = np.random.default_rng(ORDER_SEED).permutation(E)
    base = {"trunk": "trunk", "pruned": False, "share": 1.0}
    together = [Layout.of(np.array_split(order, world)) for order in by_load]
    uneven = [Layout.of(np.split(shuffled, ends[:-1]))] * len(by_load)
    equal = []
    for counts, order in zip(
        whole.counts, by_load, strict=True
    ):  # runs of experts, hottest first, of as much load each
        done = np.cumsum(np.array(counts)[order]) / sum(counts)
        equal.append(Layout.of(np.split(order, np.searchsorted(done, np.arange(1, world) / world) + 1)))
    found["heaviest together"] = {**base, "orders": [together]}
    found["uneven numbers"] = {**base, "orders": [uneven]}
    found["equal loads"] = {**base, "orders": [equal]}
    found["half the batch"] = {**base, "share": 0.5, "orders": random_layouts(whole.traffic.ids)}
    plain = lambda layers: [[list(own) for own in layout.ranks] for layout in layers]  # noqa: E731
    return {name: {**entry, "orders": [plain(layers) for layers in entry["orders"]]} for name, entry in found.items()}


def critical(cpu: Sequence[Any]) -> np.ndarray:
    """[round] median over its steps of the critical path, from [process][round][step][stretch]."""
    return np.median(np.array(cpu).max(0).sum(-1), axis=-1)


def busy(cpu: Sequence[Any]) -> np.ndarray:
    """[round, process] median over its steps of the CPU time."""
    return np.median(np.array(cpu).sum(-1), axis=-1).T


def fit_costs(job: Mapping[str, Any], measured: Mapping[str, Any], shape: simulate.Shape, world: int) -> fitting.Fit:
    """The simulator's costs from the entries of the trunk alone: an observation per entry and layout."""
    observations = []
    for name in FITTED:
        entry, seconds = job["entries"][name], critical(measured[name]["cpu"])
        for index, layers in enumerate(entry["orders"]):
            rounds = range(index, job["rounds"], len(entry["orders"]))
            if not rounds:
                continue
            loads = [
                np.mean([measured[name]["loads"][r][layer] for r in rounds], axis=0) for layer in range(len(layers))
            ]
            tokens = job["sequences"] * entry["share"] * 128 / world
            amounts = simulate.amounts(loads, layers, tokens, shape.parameters)
            median = float(np.median(seconds[list(rounds)]))
            observations.append(fitting.Observation(f"{name}, layout {index}", median, amounts, (shape, len(loads))))
    return fitting.fit(observations)


def predict(
    world: int, sources: Mapping[str, traffic.Source], kept: Any, cost: simulate.Cost, shape: simulate.Shape, job: Any
) -> dict[str, simulate.Prediction]:
    """Every variant's step from the load windows and the costs."""
    tokens = job["sequences"] * 128
    grid = simulate.Grid(world, world)
    found = {}
    for name, (_, trunk, _, placement, row) in VARIANTS.items():
        options = simulate.Options(create("placement", placement or "lpt"), draws=job["draws"], seed=ORDER_SEED)
        whole = sources[trunk].traffic.scaled(tokens)
        pruned = whole.pruned(kept) if trunk == "trunk" else None
        rows = simulate.simulate(whole, pruned, grid, cost, options, shape)
        found[name] = next(prediction for prediction in rows if prediction.variant == row)
    return found


def gains(seconds: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Percent more steps per second than `base` in the same round: quartiles over rounds."""
    return quartiles((100 * (base / seconds - 1)).tolist())


def measure(world: int, output: Path, rounds: int, sequences: int) -> dict[str, Any]:
    """Everything about one number of processes, as plain data."""
    sources = {name: traffic.recorded(output / name, own=True) for name in TRUNKS}
    whole = sources["trunk"]
    plan = create("pruner", "laep", beta=BETA).plan(whole.evidence(), Constraints(multiple_of=world))
    draws = min(rounds, 10)
    options = simulate.Options(create("placement", "lpt"), draws=draws, seed=ORDER_SEED)
    job = {
        "output": str(output),
        "rounds": rounds,
        "sequences": sequences,
        "draws": draws,
        "plan": plan.to_dict(),
        "entries": entries_of(world, whole, plan, options),
        "result": str(output / f"measured-{world}.json"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    began = time.perf_counter()
    torch.multiprocessing.spawn(work, (world, port, job), nprocs=world)
    seconds = time.perf_counter() - began
    measured = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    shape = whole.shape
    assert shape is not None
    fit = fit_costs(job, measured, shape, world)
    predicted = predict(world, sources, plan.kept, fit.cost, shape, job)
    paths = {name: critical(each["cpu"]) for name, each in measured.items()}
    walls = {name: np.array(each["wall"]) for name, each in measured.items()}
    tokens = sequences * 128
    rows = {}
    for name, (label, *_) in VARIANTS.items():
        each = measured[name]
        orders = [[Layout.of(ranks) for ranks in layers] for layers in job["entries"][name]["orders"]]
        heaviest = mean = 0.0
        for index, layers in enumerate(each["loads"]):
            for load, layout in zip(layers, orders[index % len(orders)], strict=True):
                load = np.array(load)
                mean += load.sum() / world
                heaviest += factor(load, layout) * load.sum() / world
        ranks = np.median(busy(each["cpu"]), axis=0)
        rows[name] = {
            "label": label,
            "experts": sum(len(layer) for layer in orders[0] for layer in layer.ranks),
            "load_factor": heaviest / mean,
            "tokens_per_second": quartiles((tokens / walls[name]).tolist()),
            "wall_gain_percent": gains(walls[name], walls["base"]),
            "busy_seconds": ranks.tolist(),
            "critical_seconds": quartiles(paths[name].tolist()),
            "critical_gain_percent": gains(paths[name], paths["base"]),
            "predicted_seconds": predicted[name].seconds,
            "predicted_gain_percent": simulate.gain(predicted[name], predicted["base"]),
            "predicted_load_factor": predicted[name].load_factor,
        }
    moving = measured["base"]["moving"]
    return {
        "processes": world,
        "seconds": seconds,
        "rounds": rounds,
        "tokens_per_step": tokens,
        "orders": draws,
        "rearranging_seconds": quartiles(moving) if moving else None,
        "variants": rows,
        "points": {key: split(rows, key) for key in ("wall", "critical", "predicted")},
        "fit": fit.to_dict(),
        "fit_text": str(fit),
    }


def split(rows: Mapping[str, Any], key: str) -> dict[str, float]:
    """How the gain divides, in points over no change; placed by lpt."""

    def of(name: str) -> float:
        value = rows[name][f"{key}_gain_percent"]
        return float(value["median"] if isinstance(value, dict) else value)

    return {
        "pruning": of("laep"),
        "then_rearranging": of("laep lpt") - of("laep"),
        "both": of("laep lpt"),
        "rearranging": of("base lpt"),
        "switch": of("switch"),
    }


# --- what is shown


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a table per number of processes."""
    lines = []
    for found in result["worlds"]:
        lines += [
            f"**{found['processes']} processes**, {found['tokens_per_step']} tokens per step, medians of {found['rounds']} rounds (quartiles)",
            "",
            "| variant | experts | load factor | tokens/s, wall | wall | critical path, ms | critical path | predicted, ms | predicted |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in found["variants"].items():
            first = name == "base"
            path = row["critical_seconds"]
            cells = [
                row["label"],
                str(row["experts"]),
                f"{row['load_factor']:.2f}",
                f"{row['tokens_per_second']['median']:.0f}",
                "" if first else spread(row["wall_gain_percent"]),
                f"{1e3 * path['median']:.1f}",
                "" if first else spread(row["critical_gain_percent"]),
                f"{1e3 * row['predicted_seconds']:.1f}",
                "" if first else f"{row['predicted_gain_percent']:+.1f} %",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        path = found["variants"]["base"]["critical_seconds"]
        scatter = 100 * (path["q3"] - path["q1"]) / path["median"]
        if scatter > BUSY:
            lines += [
                f"The machine was busy: half of the rounds of *no change* lie {scatter:.0f} % apart, so that differences of this "
                f"size mean nothing here.",
                "",
            ]
    lines += [
        "| points over no change (lpt) | pruning | then rearranging | both | rearranging alone | Switch loss |",
        "|---|---|---|---|---|---|",
    ]
    for found in result["worlds"]:
        for key, text in (("wall", "wall time"), ("critical", "critical path"), ("predicted", "predicted")):
            values = found["points"][key]
            names = ("pruning", "then_rearranging", "both", "rearranging", "switch")
            lines.append(
                f"| {found['processes']} processes, {text} | " + " | ".join(f"{values[n]:+.1f}" for n in names) + " |"
            )
    return "\n".join(lines) + "\n"


def spread(value: Mapping[str, float]) -> str:
    """+12.3 % (+11 to +14)."""
    return f"{value['median']:+.1f} % ({value['q1']:+.0f} to {value['q3']:+.0f})"


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Gains over no change, measured and predicted; one panel per number of processes."""
    from moeprune.compare.plots import FAINT, INK, MUTED, PALETTE, _figure, _legend_above, _margins, _title

    worlds = result["worlds"]
    names = [name for name in VARIANTS if name != "base"]
    figure = _figure(2.2 + 3.4 * len(worlds), 1.6 + 0.34 * len(names))
    axes = figure.subplots(1, len(worlds), squeeze=False, sharey=True)[0]
    _margins(figure, left=1.5, right=0.3, top=1.05, bottom=0.55, wspace=0.1)
    looks = {"critical": (PALETTE[0], -0.17), "wall": (MUTED, 0.17)}
    for axis, found in zip(axes, worlds, strict=True):
        for y, name in enumerate(names):
            row = found["variants"][name]
            for key, (colour, shift) in looks.items():
                gain = row[f"{key}_gain_percent"]
                axis.barh(y + shift, gain["median"], height=0.32, color=colour, lw=0)
                axis.plot([gain["q1"], gain["q3"]], [y + shift] * 2, color=INK, lw=1)
            axis.plot(
                row["predicted_gain_percent"], y - 0.17, "D", color=PALETTE[3], ms=5, mec="white", mew=0.7, zorder=3
            )
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_yticks(range(len(names)), [VARIANTS[name][0] for name in names])
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color=FAINT, lw=0.7)
        axis.set_axisbelow(True)
        axis.set_xlabel("throughput over no change, %")
        axis.set_title(f"{found['processes']} processes", loc="left", fontsize=9, color=INK)
    _title(figure, "Expert parallelism: what pruning and rearranging are worth", size=11)
    bar = {"lw": 6, "solid_capstyle": "butt"}
    keys = [
        ("critical path", {"color": PALETTE[0], **bar}),
        ("wall time", {"color": MUTED, **bar}),
        ("predicted critical path", {"color": PALETTE[3], "marker": "D", "lw": 0, "ms": 5}),
    ]
    _legend_above(figure, keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show(result: Mapping[str, Any]) -> None:
    """Table into the page, plot beside it."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has no place for the table: {BEGIN} ... {END}")
    write_text(PAGE, f"{before}{BEGIN}\n\n{table(result)}\n{END}{after}")
    picture(result, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "expert_parallel")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=8, help="of 128 tokens per step, over all processes")
    parser.add_argument("--steps", type=int, default=300, help="of the trunks")
    parser.add_argument("--width", type=int, default=256, help="of an expert")
    parser.add_argument("--dry", action="store_true", help="write into --output alone")
    parser.add_argument("--table", action="store_true", help="from the last result")
    args = parser.parse_args()
    if args.table:
        show(json.loads(RESULT.read_text(encoding="utf-8")))
        return
    for world in args.worlds:
        if args.sequences % (2 * world):
            raise SystemExit(f"--sequences={args.sequences} does not divide by 2 x {world} processes")
    args.output.mkdir(parents=True, exist_ok=True)
    train_trunks(args.output, args.steps, args.width)
    result = {
        "versions": {"moeprune": __version__, "torch": torch.__version__},
        "cores": len(os.sched_getaffinity(0)),
        "trunk": {"recipe": "quickstart", "steps": args.steps, "d_expert": args.width},
        "worlds": [measure(world, args.output, args.rounds, args.sequences) for world in args.worlds],
    }
    for found in result["worlds"]:
        print(f"{found['processes']} processes, {found['seconds']:.0f} s\n{found['fit_text']}\n")
    print(table(result))
    text = json.dumps(result, indent=1) + "\n"
    write_text(args.output / "results.json", text)
    if args.dry:
        picture(result, args.output / "expert_parallel.png")
    else:
        write_text(RESULT, text)
        show(result)


if __name__ == "__main__":
    main()
