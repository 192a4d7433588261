"""A simulation on one or more grids of devices: as data, as Markdown, as stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeprune.parallel.simulate import PARTS, TERMS, Cost, Prediction, gain, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = "moeprune.simulation/1"
LOOKS = {  # part -> (label, colour)
    "fixed": ("fixed", "#5f6b76"),
    "dense": ("outside the experts", "#b9c2cb"),
    "tokens": ("tokens, mean device", "#0072b2"),
    "experts": ("per expert", "#009e73"),
    "parameters": ("per parameter", "#cc79a7"),
    "link": ("between devices", "#56b4e9"),
    "waiting": ("waiting for the slowest device", "#d55e00"),
}


@dataclass(frozen=True)
class Simulation:
    """Predictions, and everything that they rest on.

    Args:
        rows: per grid its variants, `no change` first.
        cost: of a step.
        measured: whether the cost is in seconds; otherwise it is 1 per token.
        notes: where loads and plan come from, warnings.
        options: how variants were made.
        experts: per layer, of the whole model and of the pruned one.
        fit: what the cost was fitted to, if it was.
    """

    rows: Sequence[Sequence[Prediction]]
    cost: Cost
    measured: bool
    notes: tuple[str, ...]
    options: Mapping[str, Any]
    experts: Sequence[Sequence[int]]
    fit: Mapping[str, Any] | None = None

    def heading(self, row: Sequence[Prediction]) -> str:
        """The grid in a line."""
        grid = row[0].grid
        shared = "one holds all experts" if grid.group == 1 else f"{grid.group} share the experts of a layer"
        more = [shared]
        if grid.pipeline > 1:
            more.append(f"{grid.pipeline} pipeline stages")
        if grid.replicas > 1:
            more.append(f"{grid.replicas} replicas")
        return f"{grid.devices} {'device' if grid.devices == 1 else 'devices'} ({', '.join(more)}), {row[0].tokens:,.0f} tokens per step"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        grids = []
        for row in self.rows:
            split = points(row)
            grids.append(
                {
                    "variants": [{**p.to_dict(), "gain_percent": gain(p, row[0])} for p in row],
                    "points": None if split is None else asdict(split),
                }
            )
        return {
            "format": FORMAT,
            "unit": "seconds" if self.measured else "assignments of the slowest device",
            "cost": asdict(self.cost),
            "fit": self.fit,
            "notes": list(self.notes),
            "options": dict(self.options),
            "experts_before": list(self.experts[0]),
            "experts_after": list(self.experts[1]),
            "grids": grids,
        }


def markdown(result: Simulation, picture: str | None = None) -> str:
    """A page with a table per grid."""
    lines = ["# Simulated training step", ""]
    lines += [f"- {note}" for note in result.notes]
    if result.measured:
        lines.append("- costs in seconds: " + ", ".join(f"{term} {getattr(result.cost, term):.4g}" for term in TERMS))
    else:
        lines.append("- no cost given: only the tokens of the slowest device count")
    order = result.options["unarranged"]
    orders = f"mean of {result.options['draws']} random orders" if order == "random" else "as they come"
    lines += [f"- experts that are not rearranged: {orders}; rearranged by {result.options['placement']}", ""]
    if picture:
        lines += [f"![Seconds of a step by part]({picture})", ""]
    for row in result.rows:
        lines += [f"## {result.heading(row)}", ""]
        shown = [part for part in PARTS if any(p.parts[part] for p in row)] if result.measured else []
        head = ["variant", "step", "throughput", *(LOOKS[part][0] for part in shown), "load factor", "least", "memory"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for p in row:
            ratio = f"{p.seconds / row[0].seconds:.3f}" if row[0].seconds else "-"
            cells = [
                p.variant,
                seconds_text(p.seconds) if result.measured else ratio,
                "" if p is row[0] else f"{gain(p, row[0]):+.1f} %",
                *(seconds_text(p.parts[part]) for part in shown),
                f"{p.load_factor:.3f}",
                f"{p.bound:.3f}",
                memory_text(p.bytes),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def seconds_text(value: float) -> str:
    """1.23 s, 12.3 ms, 123 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value / 1e-6:.3g} µs" if value else "0"


def memory_text(value: float | None) -> str:
    """1.23 GiB; - if unknown."""
    if value is None:
        return "-"
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if value >= 2**power:
            return f"{value / 2**power:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def stacked_bars(result: Simulation) -> Figure:
    """The step of every variant by part, relative to no change on the same devices; one panel per grid.

    Raises:
        UserError: matplotlib is not installed.
    """
    from moeprune.compare.plots import _figure, _legend_above, _margins, _title

    rows = result.rows
    columns = 2 if len(rows) in (2, 4) else min(3, len(rows))
    lines = -(-len(rows) // columns)
    shown = [part for part in PARTS if any(p.parts[part] > 1e-3 * p.seconds for row in rows for p in row)]
    legend = sum(0.6 + 0.073 * len(LOOKS[part][0]) for part in shown)  # inches, as is the title
    width = max(2.2 + 3.3 * columns, 0.3 + legend, 0.4 + 0.092 * len(title(result)))
    figure = _figure(width, 1.55 + 1.75 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    _margins(figure, left=1.05, right=0.7, top=1.05, bottom=0.55, wspace=0.14, hspace=0.55)
    most = max(p.seconds / row[0].seconds for row in rows for p in row if row[0].seconds)
    for axis, row in zip(axes.flat, rows, strict=False):
        _panel(axis, row, 1.12 * most, axis is axes[0, 0] or columns == 1)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for column in range(columns):
        last = [axes[line, column] for line in range(lines) if line * columns + column < len(rows)][-1]
        last.set_xlabel("step time, no change = 1")
        last.tick_params(labelbottom=True)
    _title(figure, title(result), size=11)
    keys = [(LOOKS[part][0], {"color": LOOKS[part][1], "lw": 6, "solid_capstyle": "butt"}) for part in shown]
    _legend_above(figure, keys)
    return figure


def title(result: Simulation) -> str:
    """What the figure shows, in a line."""
    best = max(result.rows, key=lambda row: max(gain(p, row[0]) for p in row))
    top = max(best, key=lambda p: gain(p, best[0]))
    n = best[0].grid.devices
    of = "tokens only" if not result.measured else "costs as given" if result.fit is None else "fitted costs"
    return f"Predicted step ({of}): at most {gain(top, best[0]):+.0f} % throughput, {top.variant} on {n} devices"


def _panel(axis: Axes, row: Sequence[Prediction], right: float, named: bool) -> None:
    from moeprune.compare.plots import FAINT, INK

    base = row[0].seconds or 1.0
    for y, p in enumerate(row):
        left = 0.0
        for part in PARTS:
            width = p.parts[part] / base
            axis.barh(y, width, left=left, height=0.72, color=LOOKS[part][1], lw=0)
            left += width
        text = f"{round(gain(p, row[0])):+d} %" if y else ""
        axis.text(left + 0.015 * right, y, text, va="center", fontsize=8, color=INK)
    axis.set_yticks(range(len(row)), [p.variant for p in row])
    axis.set_ylim(len(row) - 0.4, -0.6)
    axis.set_xlim(0, right)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=FAINT, lw=0.7)
    axis.set_axisbelow(True)
    grid = row[0].grid
    split = (
        f", {grid.group} x {grid.pipeline} x {grid.replicas}"
        if grid.pipeline > 1
        else (f", {grid.replicas} groups of {grid.group}" if grid.replicas > 1 else "")
    )
    axis.set_title(
        f"{grid.devices} {'device' if grid.devices == 1 else 'devices'}{split}", loc="left", fontsize=9, color=INK
    )
