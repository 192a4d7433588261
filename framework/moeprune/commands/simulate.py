"""`moeprune simulate`: step time and memory on many devices, predicted from loads, without a model and without torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from moeprune import registry
from moeprune.compare.simulation import Simulation, markdown, memory_text, seconds_text
from moeprune.errors import UserError
from moeprune.files import atomic, new_folder, write_text
from moeprune.parallel import fitting, traffic
from moeprune.parallel.placement import Placement
from moeprune.parallel.simulate import (
    TERMS,
    Cost,
    Grid,
    Memory,
    Options,
    Points,
    Prediction,
    Rerouting,
    Shape,
    Traffic,
    gain,
    points,
    simulate,
)
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner

KINDS = ("pruner", "criterion", "allocation", "placement")
PRUNER, PLACEMENT = "laep", "lpt"  # unless given


@dataclass(frozen=True)
class Given:
    """Costs that the user knows; see `moeprune.parallel.simulate.Cost`.

    Args:
        fixed: seconds per step, whatever is in it.
        dense: seconds per token of a device's own, outside the experts.
        per_token: seconds per assignment (token x expert) that an expert computes.
        per_expert: seconds per step and expert that a device holds in a layer.
        per_parameter: seconds per step and expert parameter that a device holds.
        link: seconds per assignment that goes to another device, there and back, forward and backward.
    """

    fixed: float | None = None
    dense: float | None = None
    per_token: float | None = None
    per_expert: float | None = None
    per_parameter: float | None = None
    link: float | None = None

    def known(self) -> dict[str, float]:
        """Those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def command(
    loads: str | None = None,
    devices: int | list[int] = 8,
    group: int | None = None,
    pipeline: int = 1,
    cost: Given = Given(),
    fit: str | list[str] | None = None,
    memory: Memory = Memory(),  # noqa: B008 (immutable)
    plan: Path | None = None,
    pruner: Pruner | None = None,
    evidence: Path | None = None,
    events: Path | None = None,
    multiple_of: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    rerouting: Rerouting = "proportional",
    placement: Placement | None = None,
    unarranged: Literal["random", "contiguous"] = "random",
    draws: int = 200,
    spare: int = 1,
    seed: int = 0,
    windows: int = 2,
    own_window: bool = False,
    tokens: float | None = None,
    tokens_per_device: float | None = None,
    top_k: int | None = None,
    d_model: int | None = None,
    d_expert: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Predict step time and memory per device without change, with pruning, rearranging, both, and copies of busy experts.

    Args:
        loads: a run's loads.jsonl or folder; synthetic:zipf,exponent=1,layers=103,experts=64,top_k=2,tokens=65536,seed=0 or
            synthetic:lognormal,sigma=1,...; yuan3_ultra (published shape and numbers kept, assumed loads), also with a law.
        devices: how many in all; a list for several.
        group: devices that share the experts of a layer; the others hold replicas of those. Default: as many as leave no
            device without an expert in any layer of any variant.
        pipeline: stages, each with a run of layers; the slowest one sets the pace.
        cost: seconds per step by term, yours; without any and without --fit only the tokens of the slowest device count.
        fit: folders of measured runs that the other costs are fitted to.
        memory: bytes per parameter and per activation.
        plan: prune plan (JSON) of these experts.
        pruner: plans from the loads, or from --evidence; default: laep, of yuan3_ultra the published numbers.
        evidence: folder of `moeprune calibrate`, for a pruner that reads more than loads; its counts are the loads if --loads
            is not given.
        events: events.jsonl of the run: the prunes that it made, and the loads recorded after them.
        multiple_of: of a pruner: experts kept per layer are a multiple of this.
        min_keep: of a pruner: fewest experts a layer keeps.
        max_keep: of a pruner: most experts a layer keeps.
        rerouting: how the tokens of experts that are cut spread over the others: in proportion to their loads, or evenly.
        placement: rearranges experts; default: lpt.
        unarranged: order of experts that are not rearranged: means over random ones, or as they come.
        draws: random orders.
        spare: slots per device and layer for copies of experts.
        seed: of the random orders.
        windows: load windows that plans and placements see; as many later ones are timed.
        own_window: time the windows that plans and placements see.
        tokens: per step on all devices together; default: as recorded.
        tokens_per_device: instead, so that a step grows with the devices.
        top_k: experts per token, where a run's config.yaml does not say.
        d_model: width of the model, where a run's config.yaml does not say.
        d_expert: width of an expert, likewise.
        output: folder for simulation.json, simulation.md, simulation.png and, of a fit, cost.yaml.
        overwrite: write into a folder that is not empty.
    """
    if loads is None and evidence is None and fit is None:
        raise UserError(f"missing: loads; give --loads=FILE (a run's loads.jsonl, synthetic:zipf, {traffic.PUBLISHED})")
    if tokens is not None and tokens_per_device is not None:
        raise UserError("give --tokens or --tokens_per_device, not both")
    for name, number in (("tokens", tokens), ("tokens_per_device", tokens_per_device)):
        if number is not None and not number > 0:
            raise UserError(f"{name} must be above 0, got {number}")
    if sum(x is not None for x in (plan, pruner, events)) > 1:
        raise UserError("give one of --plan, --pruner and --events: each says which experts are cut")
    if output is not None:
        new_folder(output, overwrite)
    console = Console(width=None if sys.stdout.isatty() else 120)
    given, fitted = cost.known(), None
    if fit is not None:
        folders = [fit] if isinstance(fit, str) else fit
        fitted = fitting.fit(fitting.observe(folders), given)
        console.print(str(fitted), highlight=False, markup=False)
    if loads is None and evidence is None:
        assert fitted is not None
        if output is not None:
            _write_cost(output, fitted)
        return
    measured = fitted is not None or bool(given)
    costs = fitted.cost if fitted else Cost(**given) if given else Cost(per_token=1.0)
    found = _evidence(evidence) if evidence is not None else None
    source = _source(loads, found, evidence, windows, own_window, top_k, events)
    shape = Shape(d_model, d_expert) if d_model and d_expert else source.shape
    pruned, how = _pruned(source, found, plan, pruner, Constraints(multiple_of, min_keep, max_keep), rerouting)
    notes = [source.note, how, *_warnings(costs, fitted, shape, source)]
    options = Options(placement or registry.create("placement", PLACEMENT), unarranged, draws, spare, seed)
    fewest = min(len(ids) for ids in (*source.traffic.ids, *pruned.ids))
    predictions = []
    for n in [devices] if isinstance(devices, int) else devices:
        grid = Grid(n, group, pipeline) if group else Grid.widest(n, pipeline, fewest)
        total = tokens_per_device * n if tokens_per_device else tokens or source.traffic.tokens
        whole, cut = source.traffic.scaled(total), pruned.scaled(total)
        predictions.append(simulate(whole, cut, grid, costs, options, shape, memory))
    result = Simulation(
        predictions,
        costs,
        measured,
        tuple(notes),
        {
            "placement": repr(options.placement),
            "unarranged": unarranged,
            "draws": draws if unarranged == "random" else 1,
            "spare": spare,
            "seed": seed,
            "memory": asdict(memory),
            "shape": asdict(shape) if shape else None,
        },
        [list(map(len, source.traffic.ids)), list(map(len, pruned.ids))],
        None if fitted is None else fitted.to_dict(),
    )
    for note in notes:
        console.print(note, highlight=False, markup=False)
    if not measured:
        console.print("no cost given: only the tokens of the slowest device count", highlight=False)
    for row in predictions:
        console.print(_table(result, row))
        split = points(row)
        if split:
            console.print(split_text(split), highlight=False)
    if output is not None:
        _write(output, result, fitted)


def _evidence(folder: Path) -> Evidence:
    from moeprune.pruning import store

    return store.load(folder)


def _source(
    loads: str | None,
    evidence: Evidence | None,
    folder: Path | None,
    windows: int,
    own_window: bool,
    top_k: int | None,
    events: Path | None,
) -> traffic.Source:
    if loads is None:
        assert evidence is not None
        source: traffic.Source | None = traffic.of_evidence(evidence, f"{folder}: counts of the calibration")
    else:
        source = traffic.named(loads)
    if source is not None:
        if events is not None:
            raise UserError("--events are those of a run; give its loads.jsonl as --loads")
        if top_k is not None and top_k != source.traffic.top_k:
            raise UserError(f"top_k={top_k} differs from top_k={source.traffic.top_k} of the loads; leave it out")
        return source
    assert loads is not None
    return traffic.recorded(loads, windows, own_window, top_k, events)


def _pruned(
    source: traffic.Source,
    evidence: Evidence | None,
    plan: Path | None,
    pruner: Pruner | None,
    constraints: Constraints,
    rule: Rerouting,
) -> tuple[Traffic, str]:
    """Traffic of the pruned model, and how it came about."""
    ids = source.traffic.ids
    if plan is not None:
        loaded = PrunePlan.load(plan)
        if loaded.before != ids:
            raise UserError(
                f"the plan {plan} is for {_sizes(loaded.before)}, the loads are of {_sizes(ids)}; plan from these loads"
            )
        kept, by = loaded.kept, str(plan)
    elif source.kept is not None and pruner is None:
        kept, by = source.kept, "the published numbers" if source.after is None and source.shape else "the run's prunes"
    else:
        pruner = pruner or registry.create("pruner", PRUNER)
        base = source.evidence() if evidence is None else evidence
        if tuple(layer.ids for layer in base.layers) != ids:
            raise UserError("the evidence and the loads are of different experts; give those of one model")
        from moeprune.pruning import store

        kept, by = pruner.plan(base, store.respecting(constraints, base)).kept, repr(pruner)
    n, total = sum(map(len, kept)), sum(map(len, ids))
    text = f"pruning: {by}; {n} of {total} experts stay ({n / total:.1%})"
    rerouted = source.traffic.pruned(kept, rule)
    if source.after is None or plan is not None or pruner is not None:
        return rerouted, f"{text}; the tokens of the others spread {_ways(rule)}"
    off = np.mean(
        [np.abs(a - b).sum() / (2 * a.sum()) for a, b in zip(source.after.loads, rerouted.loads, strict=True)]
    )
    return source.after, (
        f"{text}; loads as recorded after the prune, of which {off:.1%} lie elsewhere than tokens that spread {_ways(rule)} would"
    )


def _ways(rule: str) -> str:
    return "evenly" if rule == "even" else "in proportion to loads"


def _sizes(ids: tuple[tuple[int, ...], ...]) -> str:
    sizes = sorted({len(layer) for layer in ids})
    return f"{len(ids)} layers of {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} experts"


def _warnings(cost: Cost, fitted: fitting.Fit | None, shape: Shape | None, source: traffic.Source) -> list[str]:
    notes = []
    if cost.per_token == 0:
        notes.append("warning: per_token is 0, so that loads and placements change no time; give --cost.per_token")
    if fitted is not None and fitted.shape != (shape, len(source.traffic.ids)):
        notes.append("warning: the costs were fitted on a model of another shape or depth than that of the loads")
    return notes


def _table(result: Simulation, row: list[Prediction]) -> Table:
    base = row[0]
    table = Table(title=result.heading(row), title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    table.add_column("variant")
    for name in ("step", "ratio", "throughput", "waiting", "load factor", "least", "experts", "memory"):
        table.add_column(name, justify="right")
    if not result.measured:
        table.columns[1].header = ""
    for p in row:
        table.add_row(
            p.variant,
            seconds_text(p.seconds) if result.measured else "",
            f"{p.seconds / base.seconds:.3f}" if base.seconds else "-",
            "" if p is base else f"{gain(p, base):+.1f} %",
            f"{p.parts['waiting'] / p.seconds:.1%}" if p.seconds else "-",
            f"{p.load_factor:.3f}",
            f"{p.bound:.3f}",
            str(p.most_experts),
            memory_text(p.bytes),
        )
    return table


def split_text(split: Points) -> str:
    """The two ways to divide the gain."""
    return (
        f"both {split.both:+.1f} % = pruning {split.pruning:+.1f}, then rearranging {split.then_rearranging:+.1f} points; "
        f"or rearranging {split.rearranging:+.1f}, then pruning {split.then_pruning:+.1f}"
    )


def _write(output: Path, result: Simulation, fitted: fitting.Fit | None) -> None:
    write_text(output / "simulation.json", json.dumps(result.to_dict(), indent=1) + "\n")
    written = ["simulation.json", "simulation.md"]
    picture = None
    try:
        from moeprune.compare.simulation import stacked_bars

        figure = stacked_bars(result)
        with atomic(output / "simulation.png", "wb") as file:
            figure.savefig(file, format="png")
        picture = "simulation.png"
        written.append(picture)
    except UserError as error:
        print(f"moeprune: no plot: {error}", file=sys.stderr)
    write_text(output / "simulation.md", markdown(result, picture))
    if fitted is not None:
        _write_cost(output, fitted)
        written.append("cost.yaml")
    print(f"{', '.join(written)} written to {output}")


def _write_cost(output: Path, fitted: fitting.Fit) -> None:
    lines = [f"  {term}: {getattr(fitted.cost, term):.6e}" for term in TERMS]
    text = "".join(f"# {line}\n" for line in str(fitted).splitlines())
    write_text(output / "cost.yaml", f"{text}cost:\n" + "\n".join(lines) + "\n")
