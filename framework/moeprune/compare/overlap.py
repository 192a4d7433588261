"""Heat maps of a sweep: how much of what they remove pruners share, one panel per budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moeprune.compare.plots import ACCENT, INK, MUTED, _figure, _margins, _title
from moeprune.pruning.sweep import AGREE, Budget, Sweep, mean_of_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "GnBu"
LEAST_WIDTH = 9.5  # inches, for the title
MOST_NUMBERS = 8  # pruners up to which every cell says its number


def overlap_map(sweep: Sweep) -> Figure:
    """Small multiples of [S, S] overlaps, pruners in the order of the clustering, families framed.

    Raises:
        UserError: matplotlib is not installed.
    """
    S, budgets = len(sweep.names), sweep.budgets
    columns = min(len(budgets), 3)
    rows = -(-len(budgets) // columns)
    side = max(2.6, 0.165 * S)
    name = 0.075 * max(map(len, sweep.names)) + 0.25  # inches for the longest label
    bar = 1.7
    width, height = name + columns * side + (columns - 1) * 0.3 + bar, 0.95 + rows * (side + 0.5) + name - 0.2
    figure = _figure(max(width, LEAST_WIDTH), height)
    axes = figure.subplots(rows, columns, squeeze=False)
    left, right = name, max(width, LEAST_WIDTH) - name - columns * side - (columns - 1) * 0.3
    _margins(figure, left=left, right=right, top=1.1, bottom=name, wspace=0.3 / side, hspace=0.45 / side)
    for position, axis in enumerate(axes.flat):
        if position >= len(budgets):
            axis.set_axis_off()
            continue
        _panel(axis, budgets[position], sweep)
        above = position + columns < len(budgets)  # another panel
        axis.set_xticks(range(S), [] if above else sweep.names, rotation=90)
        axis.set_yticks(range(S), sweep.names if position % columns == 0 else [])
        axis.tick_params(length=0, labelsize=8, labelcolor=INK)
    _colour_bar(figure, axes, budgets)
    heading, explained = found(sweep)
    _title(figure, heading, size=11.5)
    figure.text(
        0.12 / figure.get_size_inches()[0], 1 - 0.42 / height, explained, fontsize=8.5, color="#555555", va="top"
    )
    return figure


def found(sweep: Sweep) -> tuple[str, str]:
    """What the figure shows, in a line, and how to read it, in another."""
    S = len(sweep.names)
    middle = sweep.budgets[len(sweep.budgets) // 2]
    mean, expected = mean_of_pairs(middle.overlap), mean_of_pairs(middle.expected)
    agreeing = sum(map(len, sweep.families))
    n = len(sweep.families)
    families = (
        f"{agreeing} of {S} pruners form {n} {'family' if n == 1 else 'families'}"
        if n
        else f"No two of {S} pruners agree"
    )
    heading = f"{families}; with {percent(middle.ratio)} removed two overlap by {mean:.2f} on average, by chance {expected:.2f}"
    return heading, (
        "Overlap: Jaccard index of the sets of experts that two pruners remove, mean over layers. Like pruners stand together "
        f"(average linkage);\nframed are families with an overlap of at least {AGREE} over all budgets."
    )


def percent(ratio: float) -> str:
    """0.375 as 37.5 %."""
    return f"{100 * ratio:.3g} %"


def _panel(axis: Axes, budget: Budget, sweep: Sweep) -> None:
    overlap = budget.overlap
    S = len(overlap)
    axis.imshow(np.ma.masked_invalid(overlap), cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    mean = mean_of_pairs(overlap)
    said = "too few to compare" if np.isnan(mean) else f"mean {mean:.2f}, chance {mean_of_pairs(budget.expected):.2f}"
    axis.set_title(f"{percent(budget.ratio)} removed: {said}", loc="left", y=1.0, fontsize=9, color=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if S <= MOST_NUMBERS:
        for (y, x), value in np.ndenumerate(overlap):
            if np.isfinite(value):
                colour = "white" if value > 0.72 else INK
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    _frames(axis, sweep)


def _frames(axis: Axes, sweep: Sweep) -> None:
    from matplotlib.patches import Rectangle

    for family in sweep.families:
        first = sweep.names.index(family[0]) - 0.5
        n = len(family)
        axis.add_patch(Rectangle((first, first), n, n, fill=False, edgecolor=ACCENT, linewidth=1.3))


def _colour_bar(figure: Figure, axes: np.ndarray, budgets: tuple[Budget, ...]) -> None:
    """The scale, with a mark at each budget's chance."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    top, right = axes[0, 0].get_position().y1, axes[0, -1].get_position().x1
    where = figure.add_axes((right + 0.2 / width, top - 2.4 / height, 0.14 / width, 2.4 / height))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), MAP), cax=where)
    bar.ax.set_title("overlap", loc="left", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, color=MUTED, labelcolor=INK, length=2)
    bar.outline.set_visible(False)
    lowest = -1.0
    for budget in budgets:
        at = mean_of_pairs(budget.expected)
        if np.isnan(at):
            continue
        bar.ax.plot([0, 1], [at, at], color=ACCENT, lw=1.2, transform=bar.ax.get_yaxis_transform())
        lowest = max(at, lowest + 0.055)  # labels do not overlap
        bar.ax.text(
            3.4,
            lowest,
            f"chance, {percent(budget.ratio)}",
            transform=bar.ax.get_yaxis_transform(),
            va="center",
            fontsize=7.5,
            color=ACCENT,
        )
