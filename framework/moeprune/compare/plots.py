"""Figures of a results dict (schema: `moeprune.compare.results`), for the report and for reuse.

Every function takes the whole dict and returns a new `matplotlib.figure.Figure`; `figures` makes all that have data.
A variant has the same colour and marker everywhere; the accent colour is kept for experts that were cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprune.compare.results import Z
from moeprune.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, ACCENT = "#222222", "#8c9aa8", "#d9dee3", "#d55e00"
PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255", "#999933")
MARKERS = "osD^vP*X"
DASHES = ("-", "--", ":")
MOST_PANELS = 12
MOST_ROWS = 20  # variants that get a row each where those that keep equal numbers can share one
DPI = 150
NARROW = {"columnspacing": 1.3, "handletextpad": 0.5, "handlelength": 1.4}  # legends of many families
METRICS = {"acc": "accuracy", "doc_bpb": "bits per byte"}
Results = Mapping[str, Any]
Variant = Mapping[str, Any]


def done(results: Results) -> list[Variant]:
    """The variants that ran to their end."""
    return [v for v in results["variants"] if v["status"] == "done"]


def reference(results: Results) -> Variant | None:
    """The variant that the others are compared with; None if it failed."""
    return next((v for v in done(results) if v["name"] == results["reference"]), None)


def is_pruned(variant: Variant) -> bool:
    """Whether experts were cut from it."""
    return bool(variant.get("pruner"))


def focus(results: Results) -> Variant | None:
    """The variant to show in detail: the first LAEP one, else the first pruned one, else the reference."""
    pruned = [v for v in done(results) if is_pruned(v)]
    laep = [v for v in pruned if v["pruner"].startswith("LAEP")]
    return next(iter(laep + pruned), reference(results))


def scored(results: Results) -> tuple[str, list[str]]:
    """Where the scores to show are and their names: families, or single tasks where the suite has no families."""
    for field in ("families", "scores"):
        names = dict.fromkeys(name for v in done(results) for name in v.get(field) or {})
        if names:
            return field, list(names)
    return "families", []


def trained_on(results: Results) -> bool:
    """Whether variants went on training after their prune."""
    return bool(results.get("train_on", True))


def budgets(results: Results) -> list[str]:
    """The budgets that variants are ranked at, in the order of the variants."""
    return list(dict.fromkeys(v["budget"] for v in done(results) if v.get("budget") and v.get("jump")))


def ranking(results: Results) -> list[tuple[str, dict[str, Variant]]]:
    """Strategy -> its variant at each budget, those whose loss jumps least at the first budget first."""
    rows: dict[str, dict[str, Variant]] = {}
    for v in done(results):
        if v.get("budget") and v.get("jump"):
            rows.setdefault(_strategy(v), {})[v["budget"]] = v
    order = budgets(results)

    def place(row: tuple[str, dict[str, Variant]]) -> tuple[int, float]:
        first = next(i for i, budget in enumerate(order) if budget in row[1])
        return first, float(row[1][order[first]]["jump"]["value"])

    return sorted(rows.items(), key=place)


def experts_in_all(results: Results) -> int:
    """Experts of the whole model, all layers together."""
    model = results["model"]
    return int(model.get("experts_in_all") or model["layers"] * model["experts"])


def alike(variants: Sequence[Variant]) -> list[tuple[str, Variant]]:
    """One label and variant for all that keep the same numbers of experts, in order."""
    groups: dict[tuple[int, ...], list[Variant]] = {}
    for v in variants:
        groups.setdefault(tuple(v["experts_kept"]), []).append(v)
    named = []
    for group in groups.values():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        named.append((f"{group[0]['label']}{more}", group[0]))
    return named


def half_width(difference: Mapping[str, Any]) -> float:
    """Half of a difference's 95 % interval: sampling of documents, and the drift from run to run where it is known."""
    return float(difference["half_width"])


def figures(results: Results) -> dict[str, Figure]:
    """Name -> figure, without those that there is no data for."""
    ran = done(results)
    wanted: dict[str, tuple[Callable[[Results], Figure], bool]] = {
        "load_shares": (load_shares, bool(_loads(results, focus(results)))),
        "load_inequality": (load_inequality, bool(_loads(results, reference(results)))),
        "loss_jump": (loss_jump, any(v.get("jump") for v in ran)),
        "jump_against_parameters": (jump_against_parameters, bool(_lines(results))),
        "loss_curves": (loss_curves, any(len(v["history"]["step"]) > 0 for v in ran)),
        "experts_kept": (experts_kept, any(is_pruned(v) for v in ran)),
        "overlap": (overlap, bool(results.get("overlap"))),
        "score_against_parameters": (score_against_parameters, bool(scored(results)[1]) and not _sweeps(results)),
        "score_differences": (score_differences, _sweeps(results)),
    }
    return {name: plot(results) for name, (plot, possible) in wanted.items() if possible}


# --- the loads of experts


def load_shares(results: Results) -> Figure:
    """Share of the layer's tokens of every expert over training, one panel per layer."""
    shown = focus(results)
    steps = _prune_steps(results, shown)
    loads = _loads(results, shown)
    L = len(loads[0]["shares"][0])
    layers = _some_layers(L)
    columns = len(layers) if len(layers) < 4 else 2 if len(layers) == 4 else 4
    rows = -(-len(layers) // columns)
    figure = _figure(10, 1.3 + (2.5 if columns < 4 else 1.9) * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    _margins(figure, left=0.75, right=0.2, top=1.0, bottom=0.55, wspace=0.08, hspace=0.28)
    positive = [s for part in loads for window in part["shares"] for i in layers for s in window[i] if s > 0]
    floor = max(min(positive, default=1e-3) / 1.5, 1e-6)
    cuts = 0
    for axis, layer in zip(axes.flat, layers, strict=False):
        cuts += _layer_shares(axis, loads, layer, floor)
        axis.set_title(f"layer {layer}", loc="left", y=1.0, fontsize=9.5, color=INK)
        axis.set_ylim(floor, min(1.0, max(positive, default=1.0) * 1.5))
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    for column in range(columns):
        _mark_prune(axes[0, column], steps, _named(steps) if column == 0 and cuts else "")
    for axis in axes[1:].flat:
        _mark_prune(axis, steps, "")
    axes[0, 0].yaxis.set_major_formatter(lambda y, _: f"{y * 100:g} %")
    if any(s == 0 for part in loads for window in part["shares"] for i in layers for s in window[i]):
        figure.text(0.99, 0.01, "no tokens: drawn at the lower edge", ha="right", fontsize=7.5, color=MUTED)
    figure.supylabel("share of the layer's tokens (log scale)", fontsize=9.5, x=0.008, color=INK)
    figure.supxlabel("training step", fontsize=9.5, y=0.012, color=INK)
    some = f", {len(layers)} of {L} layers" if len(layers) < L else ""
    title = f"Load of every expert{some}"
    _title(figure, f"{title}; {_label(shown)} cuts the orange ones" if cuts and shown else title)
    keys: list[tuple[str, dict[str, Any]]] = [("kept experts" if cuts else "experts", {"color": MUTED, "lw": 1.5})]
    if cuts:
        keys.insert(0, ("experts that were cut", {"color": ACCENT, "lw": 1.5}))
    keys.append(("uniform share (1 / experts)", {"color": INK, "lw": 1.0, "ls": (0, (4, 3))}))
    _legend_above(figure, keys)
    return figure


def _trunk_end(results: Results) -> list[int]:
    """The step at which the trunk ends, if there is one."""
    return [int(results["trunk"]["step"])] if results["trunk"] else []


def _prune_steps(results: Results, variant: Variant | None) -> list[int]:
    """The steps at which `variant` was pruned; the trunk's end if it was not."""
    own = [int(prune["step"]) for prune in (variant or {}).get("prunes") or ()]
    return own or _trunk_end(results)


def _named(steps: Sequence[int]) -> str:
    return f"prune{'s' if len(steps) > 1 else ''}, step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _loads(results: Results, variant: Variant | None) -> list[Mapping[str, Any]]:
    """The load windows that led to `variant`: the trunk's if it starts there, then its own; those there are."""
    parts = [results["trunk"]["loads"]] if results["trunk"] and (not variant or variant["start"] == "trunk") else []
    return [part for part in [*parts, *([variant["loads"]] if variant else [])] if part["step"]]


def _layer_shares(axis: Axes, loads: Sequence[Mapping[str, Any]], layer: int, floor: float) -> int:
    """Draw one panel; how many experts of the layer were cut."""
    lines: dict[int, tuple[list[int], list[float]]] = {}
    uniform: tuple[list[int], list[float]] = ([], [])
    for part in loads:
        for step, ids, shares in zip(part["step"], part["expert_ids"], part["shares"], strict=True):
            uniform[0].append(step)
            uniform[1].append(1 / len(ids[layer]))
            for i, share in zip(ids[layer], shares[layer], strict=True):
                x, y = lines.setdefault(i, ([], []))
                x.append(step)
                y.append(max(share, floor))
    last = max(uniform[0])
    cut = {i for i, (x, _) in lines.items() if x[-1] < last}
    for i, (x, y) in sorted(lines.items(), key=lambda item: item[0] in cut):
        accent = i in cut
        axis.plot(x, y, color=ACCENT if accent else MUTED, lw=1.0 if accent else 0.7, alpha=0.9 if accent else 0.75)
        if accent:
            axis.plot(x[-1], y[-1], "x", color=ACCENT, ms=3.5, mew=1.0)
    axis.step(*uniform, where="pre", color=INK, lw=0.9, ls=(0, (4, 3)), zorder=4)
    axis.set_yscale("log")
    return len(cut)


def load_inequality(results: Results) -> Figure:
    """Gini coefficient of the loads of every layer over training, without pruning."""
    base, prune = reference(results), _trunk_end(results)
    parts = _loads(results, base)
    L = len(parts[0]["shares"][0])
    figure = _figure(8, 4)
    axis = figure.subplots()
    _margins(figure, left=0.75, right=1.0, top=0.65, bottom=0.6)
    colours = _sequential("viridis", L)
    steps = [step for part in parts for step in part["step"]]
    ends = []
    for layer in range(L):
        values = [_gini(window[layer]) for part in parts for window in part["shares"]]
        axis.plot(steps, values, color=colours[layer], lw=1.8 if L <= 8 else 0.9)
        ends.append(values[-1])
    axis.set_ylim(0, max(0.05, axis.get_ylim()[1] * 1.08))
    named = range(L) if L <= 8 else _some_layers(L)[:: max(1, MOST_PANELS // 6)]
    _side_labels(axis, [(steps[-1], ends[i], f"layer {i}", {"color": colours[i]}) for i in named])
    _mark_prune(axis, prune, _named(prune) if focus(results) is not base else "end of trunk")
    axis.set_ylabel("Gini coefficient of expert loads")
    axis.set_xlabel("training step")
    _title(figure, "Inequality of the experts' loads in each layer, without pruning (0: all equal)", size=11)
    return figure


# --- losses


def loss_curves(results: Results) -> Figure:
    """Smoothed training loss of every variant, and its difference to the reference around the prune."""
    base, prune = reference(results), _trunk_end(results)
    before = results["trunk"]["history"] if results["trunk"] else {"step": [], "loss": []}
    ran = [v for v in done(results) if len(v["history"]["step"]) > 0]
    looks = _looks(results)
    figure = _figure(10, max(6.2, 1.5 + 0.2 * len(ran)))
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1])
    _margins(figure, left=0.9, right=3.25, top=0.7, bottom=0.6, hspace=0.32)
    everything = [before, *(v["history"] for v in ran)]
    width = max(1, max((h["step"][-1] for h in everything if h["step"]), default=1) // 40)
    heights: list[float] = []
    marked = False
    for v, history, look in [
        (None, before, {"color": MUTED}),
        *((v, v["history"], looks[v["name"]]) for v in ran),
    ]:
        loss = _smooth(history["loss"], width)
        top.plot(history["step"], loss, lw=1.3, color=look["color"], ls=look.get("ls", "-"))
        heights.extend(loss[np.isfinite(loss)][2 * width :])
        at = [step for step in (_prune_steps(results, v) if v and is_pruned(v) else []) if step not in prune]
        places = [i for i, step in enumerate(history["step"]) if step in at]
        if places:  # prunes of its own
            steps, values = [history["step"][i] for i in places], loss[places]
            top.plot(steps, values, look["marker"], color=look["color"], ms=5, mec="white", mew=0.6, zorder=5)
            marked = True
    if heights:
        low, high = min(heights), float(np.percentile(heights, 94))
        top.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-3)
    top.set_ylabel("training loss (nats per token)")
    _subtitle(top, f"mean of the last {width} steps")
    _mark_prune(top, prune, _named(prune))
    _difference_to(bottom, prune[0] if prune else 0, base, ran, looks)
    handles = [_line(label="before the prune, shared", color=MUTED, lw=1.8)] if before["step"] else []
    handles += [_line(label=_label(v), color=looks[v["name"]]["color"], ls=looks[v["name"]]["ls"], lw=1.8) for v in ran]
    handles += [_line(label="marks: where it was pruned", color=MUTED, marker="s", ms=5, ls="")] if marked else []
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.685, top.get_position().y1 + 0.02),
        frameon=False,
        fontsize=9,
    )
    _title(figure, "Training loss of every variant")
    return figure


def _difference_to(
    axis: Axes,
    prune: int,
    base: Variant | None,
    ran: Sequence[Variant],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    """The lower panel of `loss_curves`: variants that saw the same text as the reference, drift controls did not."""
    known = dict(zip(base["history"]["step"], base["history"]["loss"], strict=True)) if base else {}
    last = max(known, default=prune)
    until = prune + max(30, round(0.5 * (last - prune)))
    width = max(1, (until - prune) // 12)
    for v in ran:
        pairs = [
            (step, loss - known[step])
            for step, loss in zip(v["history"]["step"], v["history"]["loss"], strict=True)
            if v["start"] == "trunk"
            and not v.get("drift")
            and v is not base
            and step <= until
            and None not in (loss, known.get(step))
        ]
        if pairs:
            steps, values = [prune, *(p[0] for p in pairs)], _smooth([p[1] for p in pairs], width)
            look = looks[v["name"]]
            axis.plot(steps[1:], values, lw=1.5, color=look["color"], ls=look["ls"])
            axis.plot(steps[:2], [0, values[0]], lw=0.8, color=look["color"], ls=look["ls"], alpha=0.6)
            own = {int(each["step"]) for each in v.get("prunes") or ()} - {prune}
            later = [(step, y) for (step, _), y in zip(pairs, values, strict=True) if step in own]
            if later:
                x, y = zip(*later, strict=True)
                axis.plot(x, y, look["marker"], color=look["color"], ms=5, mec="white", mew=0.6, zorder=5)
    lead = max(2, (until - prune) // 15)
    axis.plot([prune - lead, until], [0, 0], color=INK, lw=1.3)
    axis.set_xlim(prune - lead, until)
    _mark_prune(axis, [prune], "")
    axis.set_ylabel("difference to the\nreference (nats per token)")
    axis.set_xlabel("training step")
    name = f"difference to {_label(base)}" if base else "no reference to subtract"
    _subtitle(axis, f"after the prune: {name}, mean of the last {width} steps")


def loss_jump(results: Results) -> Figure:
    """Validation loss just after minus just before the prune, with 95 % intervals; a panel per budget if there are any."""
    looks = _looks(results)
    if budgets(results):
        return _ranked(results, looks)
    rows = sorted((v for v in done(results) if v.get("jump")), key=lambda v: float(v["jump"]["value"]), reverse=True)
    figure = _figure(8, 1.2 + 0.32 * len(rows))
    axis = figure.subplots()
    _margins(figure, left=2.75, right=1.3, top=0.5, bottom=0.6)
    for y, v in enumerate(rows):
        _jump(axis, y, v, looks[v["name"]], f"{v['jump']['value']:+.3f} ± {half_width(v['jump']):.3f}")
    axis.set_yticks(range(len(rows)), [_label(v) for v in rows])
    _jump_axis(axis, len(rows))
    axis.set_xlabel(f"{_measured(results)} just after minus just before the prune (nats per token, 95 % interval)")
    _title(figure, "What the prune costs at once", size=11)
    return figure


def _ranked(results: Results, looks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A row per strategy, a panel per budget."""
    rows, columns = ranking(results)[::-1], budgets(results)
    families = _families(results)
    figure = _figure(2.2 + 3.6 * len(columns), (1.35 if families else 1.1) + 0.235 * len(rows))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    _margins(figure, left=1.75, right=1.15, top=0.95 if families else 0.65, bottom=0.6, wspace=0.48)
    for axis, budget in zip(axes, columns, strict=True):
        for y, (_, variants) in enumerate(rows):
            if budget in variants:
                v = variants[budget]
                _jump(
                    axis, y, v, looks[v["name"]], f"{v['jump']['value']:.3f} ± {half_width(v['jump']):.3f}", small=True
                )
        _jump_axis(axis, len(rows))
        axis.set_title(f"{_plain(budget)} removed", loc="left", y=1.0, fontsize=10, color=INK, fontweight="bold")
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), [_plain(name) for name, _ in rows])
    figure.supxlabel(
        f"{_measured(results)} just after minus just before the prune (nats per token, 95 % interval)",
        fontsize=9.5,
        color=INK,
    )
    _title(figure, "What pruning costs at once, by strategy", size=11)
    if families:
        _legend_above(figure, [(name, {"color": c, "marker": "o", "ls": "", "ms": 5}) for name, c in families.items()])
    return figure


def _measured(results: Results) -> str:
    return "held-out loss" if results.get("checkpoint") else "validation loss"


def _jump(axis: Axes, y: int, v: Variant, look: Mapping[str, Any], text: str, small: bool = False) -> None:
    value, half = v["jump"]["value"], half_width(v["jump"])
    marker, size = ("o", 4.0) if small else (look["marker"], 6.5)
    if small:
        axis.plot([0, value], [y, y], color=look["color"], lw=1.0, alpha=0.35, zorder=2)
    axis.errorbar(
        value, y, xerr=half, fmt=marker, color=look["color"], ms=size, capsize=size / 2, lw=size / 4, zorder=3
    )
    where = axis.get_yaxis_transform()
    axis.text(1.02, y, text, transform=where, va="center", fontsize=7.5 if small else 9, color=INK)


def _jump_axis(axis: Axes, rows: int) -> None:
    axis.axvline(0, color=INK, lw=1)
    axis.set_ylim(-0.6, rows - 0.4)
    axis.grid(axis="x", color=FAINT, lw=0.7)


def jump_against_parameters(results: Results) -> Figure:
    """The jump of every strategy over the share of parameters it kept: a line each, labelled where it removes most; variants
    that are the only one of their strategy are points.
    """
    lines, looks, families = _lines(results), _looks(results), _families(results)
    joined = {v["name"] for variants in lines.values() for v in variants}
    alone = {_label(v): [v] for v in done(results) if v.get("jump") and v["name"] not in joined}
    figure = _figure(9.4, max(4.6, 1.7 + 0.165 * (len(lines) + len(alone))))
    axis = figure.subplots()
    _margins(figure, left=0.85, right=2.1, top=0.95 if families else 0.6, bottom=0.6)
    ends = []
    for name, variants in {**lines, **alone}.items():
        points = sorted(((100 * v["parameters_kept"], v) for v in variants), key=lambda p: -p[0])
        look = looks[points[-1][1]["name"]]
        x, y = [p[0] for p in points], [p[1]["jump"]["value"] for p in points]
        if name in lines:
            axis.plot([100.0, *x], [0.0, *y], color=look["color"], lw=1.1, alpha=0.8)
        half = [half_width(p[1]["jump"]) for p in points]
        mark, size = ("o", 3.5) if name in lines else (look["marker"], 5.5)
        axis.errorbar(x, y, yerr=half, fmt=mark, color=look["color"], ms=size, lw=1.0, capsize=2, zorder=4)
        shown = {"color": look["color"]} if name in lines else {"color": look["color"], "marker": look["marker"]}
        ends.append((x[-1], y[-1], _plain(name) if name in lines else name, shown))
    axis.invert_xaxis()
    axis.axhline(0, color=INK, lw=0.9)
    axis.grid(axis="y", color=FAINT, lw=0.7)
    _side_labels(axis, ends)
    axis.set_xlabel("parameters kept (%)")
    axis.set_ylabel("loss jump at the prune (nats per token)")
    _title(figure, "What pruning costs at once, by what is kept", size=11)
    if families:
        _legend_above(figure, [(name, {"color": c, "lw": 1.8}) for name, c in families.items()])
    return figure


def _lines(results: Results) -> dict[str, list[Variant]]:
    """Strategy -> its variants, of strategies that were pruned to more than one size."""
    found: dict[str, list[Variant]] = {}
    for v in done(results):
        if v.get("strategy") and v.get("jump"):
            found.setdefault(_strategy(v), []).append(v)
    return {name: vs for name, vs in found.items() if len({v["parameters_kept"] for v in vs}) > 1}


def _strategy(v: Variant) -> str:
    return str(v.get("strategy") or v["label"])


def _families(results: Results) -> dict[str, str]:
    """Family -> colour."""
    names = dict.fromkeys(v["family"] for v in results["variants"] if v.get("family"))
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


# --- experts and scores


def experts_kept(results: Results) -> Figure:
    """Experts left in every layer of the pruned variants."""
    shown_variants = [v for v in done(results) if is_pruned(v)] or done(results)
    several = len(shown_variants) > MOST_ROWS
    rows = alike(shown_variants) if several else [(v["label"], v) for v in shown_variants]
    whole, E, counts = (
        experts_in_all(results),
        results["model"]["experts"],
        np.array([v["experts_kept"] for _, v in rows]),
    )
    L = counts.shape[1]
    figure = _figure(8 if L <= 8 else 10, 1.3 + 0.34 * len(rows))
    axis = figure.subplots()
    _margins(figure, left=2.75, right=1.55, top=0.5, bottom=0.65)
    shown = axis.imshow(counts, cmap="GnBu", vmin=0, vmax=E * 1.12, aspect="auto", interpolation="nearest")
    if L <= 24:
        for (y, x), n in np.ndenumerate(counts):
            axis.text(x, y, str(n), ha="center", va="center", fontsize=9.5, color="white" if n > 0.72 * E else INK)
        axis.set_xticks(range(L))
    else:
        where = axis.inset_axes((0.0, -0.62 / (0.34 * len(rows)) - 0.02, 0.28, 0.12 / (0.34 * len(rows))))
        bar = figure.colorbar(shown, cax=where, orientation="horizontal", ticks=[0, E // 2, E], boundaries=range(E + 2))
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set_visible(False)
        figure.set_size_inches(10, 1.6 + 0.34 * len(rows))
        _margins(figure, left=2.75, right=1.55, top=0.5, bottom=0.95)
    axis.set_yticks(range(len(rows)), [_short(label) for label, _ in rows])
    for y, (_, v) in enumerate(rows):
        n = sum(v["experts_kept"])
        text = f"{n} of {whole} ({100 * n / whole:.0f} %)"
        axis.text(1.02, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9, color=INK)
    axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axis.grid(which="minor", axis="y", color="white", lw=3)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel("layer", loc="right" if L > 24 else "center")
    _title(figure, f"Experts kept in each layer, of {E}", size=11)
    return figure


def overlap(results: Results) -> Figure:
    """How much of what they remove strategies share: a heat map per budget."""
    from moeprune.compare.overlap import overlap_map
    from moeprune.pruning.sweep import Budget, Sweep

    found = results["overlap"]
    budgets = []
    for budget in found["budgets"]:
        named = re.fullmatch(r"([\d.]+) ?%", budget["budget"])
        ratio = float(named[1]) / 100 if named else budget["ratio"]
        shared, drawn = (np.array([budget[key]], dtype=np.float64) for key in ("overlap", "chance"))
        budgets.append(Budget(ratio, {}, shared, drawn))
    names, *families = (tuple(map(_plain, each)) for each in (found["names"], *found["families"]))
    return overlap_map(Sweep(names, tuple(budgets), tuple(families), {}))


def score_against_parameters(results: Results) -> Figure:
    """Score of every variant against the share of parameters it kept, one panel per family of tasks."""
    field, names = scored(results)
    names = names[:MOST_PANELS]
    ran = [v for v in done(results) if v["start"] != "untrained" and v.get(field)]
    control = next((v for v in done(results) if v["start"] == "untrained" and v.get(field)), None)
    columns, looks = min(2, len(names)), _looks(results)
    rows, height = -(-len(names) // columns), max(2.7, 0.16 * len(ran) + 0.8)
    figure = _figure(11.5 if columns == 2 else 7.5, 1.0 + height * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    _margins(figure, left=0.85, right=2.1, top=0.8, bottom=0.55, wspace=1.05, hspace=0.36)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(v, v[field][name]) for v in ran if name in v[field]]
        _score_panel(axis, points, looks, control[field].get(name) if control else None)
        axis.set_title(_plain(name), loc="left", y=1.0, fontsize=10, color=INK, fontweight="bold")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("parameters kept (%)")
    _title(figure, "Scores against parameters kept (bars: 95 % interval of the score)")
    return figure


def _sweeps(results: Results) -> bool:
    """Whether strategies were scored at several budgets, with differences to the reference."""
    place, names = scored(results)
    return any(
        (v.get(place) or {}).get(name, {}).get("vs_reference")
        for v in done(results)
        if v.get("budget")
        for name in names
    )


def score_differences(results: Results) -> Figure:
    """Score of every strategy minus the reference's at each budget, paired, with 95 % intervals; a panel per family of tasks."""
    place, names = scored(results)
    names = names[:MOST_PANELS]
    rows, columns, looks, families = ranking(results)[::-1], budgets(results), _looks(results), _families(results)
    across = min(2, len(names))
    down = -(-len(names) // across)
    height = max(1.0, 0.24 * len(rows))
    figure = _figure(2.0 + 4.4 * across, 1.35 + (height + 0.85) * down)
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    _margins(figure, left=1.75, right=0.25, top=1.3, bottom=0.6, wspace=0.1, hspace=0.85 / height)
    fills = [1.0, 0.0] if len(columns) == 2 else list(np.linspace(1, 0, len(columns)))
    for axis, name in zip(axes.flat, names, strict=False):
        kind = None
        for y, (_, variants) in enumerate(rows):
            for i, budget in enumerate(columns):
                score = (variants[budget].get(place) or {}).get(name) if budget in variants else None
                if not score or not score["vs_reference"]:
                    continue
                kind, d = score, score["vs_reference"]
                colour = looks[variants[budget]["name"]]["color"]
                at = y + 0.3 * ((len(columns) - 1) / 2 - i) / max(1, len(columns) - 1)
                face = _blend(colour, fills[i])
                axis.errorbar(
                    d["value"], at, xerr=half_width(d), fmt="o", color=colour, mfc=face, ms=4.5, lw=1.0, capsize=1.5
                )
        axis.axvline(0, color=INK, lw=1)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_yticks(range(len(rows)), [_plain(strategy) for strategy, _ in rows])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color=FAINT, lw=0.7)
        told = ""
        if kind:
            better = "higher" if kind["higher_is_better"] else "lower"
            metric = METRICS.get(kind["metric"], _plain(kind["metric"]))
            told = f" ({better} is better)" if metric == name else f" ({metric}, {better} is better)"
        axis.set_title(f"{_plain(name)}{told}", loc="left", y=1.0, fontsize=9.5, color=INK)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.supxlabel(f"score minus that of the reference ({_label(reference(results))})", fontsize=9.5, color=INK)
    _title(figure, "What pruning does to scores (paired differences, bars: 95 % interval)", size=11)
    marks: list[tuple[str, dict[str, Any]]] = [
        (f"{budget} removed", {"color": MUTED, "mfc": _blend(MUTED, fill), "marker": "o", "ls": ""})
        for budget, fill in zip(columns, fills, strict=True)
    ]
    _legend_above(figure, marks)
    if families:
        colours = [(name, {"color": c, "marker": "o", "ls": "", "ms": 5}) for name, c in families.items()]
        _legend_above(figure, colours, row=1)
    return figure


def _blend(colour: str, share: float) -> tuple[float, ...]:
    """`share` of a colour in white."""
    from matplotlib.colors import to_rgb

    return tuple(1 - share * (1 - x) for x in to_rgb(colour))


def _score_panel(
    axis: Axes,
    points: Sequence[tuple[Variant, Mapping[str, Any]]],
    looks: Mapping[str, Mapping[str, Any]],
    control: Mapping[str, Any] | None,
) -> None:
    ends = [s["value"] + sign * Z * (s["stderr"] or 0) for _, s in points for sign in (-1, 1)]
    if not ends:
        ends = [control["value"]] if control else [0.0]
    low, high = min(ends), max(ends)
    margin = 0.12 * ((high - low) or abs(high) or 1.0)
    near = control is not None and low - (high - low) <= control["value"] <= high + (high - low)
    if near and control:
        low, high = min(low, control["value"]), max(high, control["value"])
    axis.set_ylim(low - margin, high + margin)
    x = [100 * v["parameters_kept"] for v, _ in points]
    span = max([*x, 100.0]) - min([*x, 100.0]) or 10.0
    axis.set_xlim(min([*x, 100.0]) - 0.1 * span, max([*x, 100.0]) + 0.1 * span)
    labels = []
    for i, (v, s) in enumerate(points):
        same = [j for j in range(len(x)) if abs(x[j] - x[i]) < 0.015 * span]
        at = x[i] + 0.022 * span * (same.index(i) - (len(same) - 1) / 2)
        look = looks[v["name"]]
        half = Z * (s["stderr"] or 0)
        axis.errorbar(at, s["value"], yerr=half, fmt=look["marker"], color=look["color"], ms=5, lw=1.1, capsize=2)
        labels.append((at, s["value"], _label(v, 32), look))
    _side_labels(axis, labels)
    axis.grid(axis="y", color=FAINT, lw=0.7)
    one = next((s for _, s in points), control)
    if one:
        axis.set_ylabel(
            f"{METRICS.get(one['metric'], _plain(one['metric']))}\n({'higher' if one['higher_is_better'] else 'lower'} is better)"
        )
    if control:
        above = control["value"] > high
        edge = high + 0.93 * margin if above else low - 0.93 * margin
        y = control["value"] if near else edge
        axis.axhline(y, color="#777777", lw=1.1, ls=(0, (5, 2)))
        text = f"untrained: {control['value']:.3g}" + ("" if near else " (off the axis)")
        up = y < (low + high) / 2
        axis.annotate(
            text,
            (0.02, y),
            xycoords=axis.get_yaxis_transform(),
            xytext=(0, 3 if up else -3),
            textcoords="offset points",
            va="bottom" if up else "top",
            fontsize=7.5,
            color="#555555",
        )


# --- shared parts


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report needs matplotlib: pip install 'moeprune[report]'") from error
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def _margins(
    figure: Figure,
    *,
    left: float,
    right: float,
    top: float,
    bottom: float,
    wspace: float = 0.0,
    hspace: float = 0.0,
) -> None:
    """Fixed margins in inches, and one look for all axes."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, wspace, hspace)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(which="both", labelsize=8.5, color=MUTED, labelcolor=INK)
        axis.xaxis.label.set(fontsize=9.5, color=INK)
        axis.yaxis.label.set(fontsize=9.5, color=INK)


def _title(figure: Figure, text: str, size: float = 12) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.13 / height, text, fontsize=size, fontweight="bold", color=INK, va="top")


def _subtitle(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", y=1.0, fontsize=9, color="#555555")


def _line(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _legend_above(figure: Figure, keys: Sequence[tuple[str, dict[str, Any]]], row: int = 0) -> None:
    width, height = figure.get_size_inches()
    handles = [_line(label=_plain(label), **look) for label, look in keys]
    where = (0.05 / width, 1 - (0.38 + 0.26 * row) / height)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=where, ncols=len(keys), frameon=False, fontsize=9, **NARROW
    )


def _mark_prune(axis: Axes, steps: Sequence[int], text: str) -> None:
    for step in steps:
        axis.axvline(step, color=INK, lw=0.9, ls=":", zorder=1)
    if text and steps:
        where = axis.get_xaxis_transform()
        axis.annotate(
            text,
            (steps[0], 1.0),
            xycoords=where,
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )


def _side_labels(axis: Axes, points: Sequence[tuple[float, float, str, Mapping[str, Any]]]) -> None:
    """Labels (x, y, text, look) in a column right of the axes, moved apart, each tied to its point by a thin line."""
    low, high = axis.get_ylim()
    order = sorted(points, key=lambda p: p[1])
    height = axis.get_window_extent().height / DPI * 72  # points
    places = spread([(p[1] - low) / (high - low) for p in order], 10.5 / height)
    for (x, y, text, look), place in zip(order, places, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(1.065, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.6,
                "color": look["color"],
                "alpha": 0.5,
                "shrinkA": 7,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
        if "marker" in look:
            at: dict[str, Any] = {"transform": axis.transAxes, "clip_on": False, "ls": ""}
            axis.plot(1.035, place, marker=look["marker"], color=look["color"], ms=4.5, **at)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved as little as possible (least squares) so that they lie `gap` apart within [0, 1]."""
    n = len(positions)
    gap = min(gap, 1 / max(1, n - 1))
    blocks: list[tuple[float, int]] = []  # mean of (position - rank * gap), size: pool-adjacent-violators
    for i, position in enumerate(positions):
        mean, size = position - i * gap, 1
        while blocks and blocks[-1][0] >= mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    free = [mean for mean, size in blocks for _ in range(size)]
    return [min(max(mean, 0.0), 1 - (n - 1) * gap) + i * gap for i, mean in enumerate(free)]


def _looks(results: Results) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of every variant, by its place among them; of one in a family, the family's."""
    looks: dict[str, dict[str, Any]] = {}
    families = _families(results)
    others = len(families)  # whose colours and round marks are taken
    for v in results["variants"]:
        if v["name"] == results["reference"]:
            looks[v["name"]] = {"color": INK, "marker": "o", "ls": "-"}
        elif v["start"] == "untrained":
            looks[v["name"]] = {"color": "#777777", "marker": "o", "ls": ":"}
        elif v.get("family"):
            looks[v["name"]] = {"color": families[v["family"]], "marker": "o", "ls": "-"}
        else:
            colour, round_ = PALETTE[others % len(PALETTE)], others // len(PALETTE)
            marker = MARKERS[(others + round_) % len(MARKERS)]
            looks[v["name"]] = {"color": colour, "marker": marker, "ls": DASHES[round_ % len(DASHES)]}
            others += 1
    return looks


def _plain(text: str) -> str:
    """`text` without mathematics: matplotlib reads $...$ as a formula."""
    return text.replace("$", r"\$")


def _label(variant: Variant | None, longest: int = 38) -> str:
    """A variant's label, with the number of its prunes if there were several."""
    if variant is None:
        return ""
    n = len(variant.get("prunes") or ())
    more = f" ({n} prunes)" if n > 1 else ""
    return _short(str(variant["label"]), longest - len(more)) + more


def _short(text: str, longest: int = 38) -> str:
    return _plain(text if len(text) <= longest else text[: longest - 1].rstrip() + "…")


def _some_layers(L: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, L - 1, min(L, MOST_PANELS))})


def _sequential(name: str, n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps[name](0.85 * (n - 1 - i) / max(1, n - 1)) for i in range(n)]


def _gini(shares: Sequence[float]) -> float:
    x, n = np.sort(np.asarray(shares, dtype=np.float64)), len(shares)
    return float((2 * np.arange(1, n + 1) - n - 1) @ x / (n * x.sum())) if x.sum() > 0 else 0.0


def _smooth(values: Sequence[float | None], width: int) -> NDArray[np.float64]:
    """Mean of the last `width` values that are there; of fewer at the start."""
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    total, count = np.cumsum(np.where(known, x, 0.0)), np.cumsum(known)
    total[width:], count[width:] = total[width:] - total[:-width], count[width:] - count[:-width]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
