"""The sweep of `moeprune plan`: overlaps in the terminal, in sweep.json and as heat maps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from moeprune.errors import UserError
from moeprune.files import atomic, write_text
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.sweep import AGREE, RATIOS, Budget, Sweep, mean_of_pairs, sweep

MOST_COLUMNS = 7  # pruners that get a column each in 100 columns of text
NEAREST = 3


def compare(
    evidence: Evidence,
    pruners: list[str] | None,
    ratios: list[float] | None,
    constraints: Constraints,
    output: Path | None,
) -> Sweep:
    """Sweep, print, and write what the terminal has no room for.

    Args:
        evidence: what all pruners read.
        pruners: by short name; None for every criterion that the evidence suffices for, and laep.
        ratios: shares of the experts to remove; None for the usual five.
        constraints: bounds for every plan.
        output: folder for sweep.json and overlap.png; None writes nothing.

    Raises:
        UserError: see `moeprune.pruning.sweep.sweep`.
    """
    found = sweep(evidence, pruners, RATIOS if ratios is None else ratios, constraints)
    for name, why in found.left_out.items():
        print(f"moeprune: left out: {name}: {why}", file=sys.stderr)
    width = None if sys.stdout.isatty() else 100
    console = Console(width=width)
    console.print("Overlap: Jaccard index of the sets of experts that two pruners remove, mean over layers.")
    for budget in found.budgets:
        console.print(_title(budget), highlight=False)
        console.print(_matrix(budget) if len(found.names) <= MOST_COLUMNS else _neighbours(budget))
    for family in found.families:
        console.print(f"overlap of at least {AGREE} over all budgets: {', '.join(family)}", highlight=False)
    if output is None:
        return found
    write_text(output / "sweep.json", json.dumps(found.to_dict(evidence)) + "\n")
    written = "sweep.json"
    try:
        from moeprune.compare.overlap import overlap_map

        figure = overlap_map(found)
        with atomic(output / "overlap.png", "wb") as file:
            figure.savefig(file, format="png")
        written += " and overlap.png"
    except UserError as error:
        print(f"moeprune: no heat map: {error}", file=sys.stderr)
    print(f"{written} written to {output}")
    return found


def _title(budget: Budget) -> str:
    shares: dict[str, list[str]] = {}
    for name, share in zip(budget.plans, budget.removed, strict=True):
        shares.setdefault(f"{100 * share:.1f} %", []).append(name)
    usual = max(shares, key=lambda share: len(shares[share]))
    odd = "".join(f"; {', '.join(names)}: {share}" for share, names in shares.items() if share != usual)
    overlap, by_chance = _number(mean_of_pairs(budget.overlap)), _number(mean_of_pairs(budget.expected))
    return f"{usual} of the experts removed{odd}; two pruners overlap by {overlap} on average, by chance {by_chance}"


def _matrix(budget: Budget) -> Table:
    """Every pair."""
    names = list(budget.plans)
    table = _table("pruner", *names)
    for i, name in enumerate(names):
        table.add_row(name, *(_number(x) for x in budget.overlap[i]))
    return table


def _neighbours(budget: Budget) -> Table:
    """One line per pruner: the nearest others, the mean over all others, and what chance gives."""
    names = list(budget.plans)
    table = _table("pruner", "nearest others", "mean", "chance")
    table.columns[1].justify = "left"
    overlap, expected = budget.overlap, budget.expected
    for i, name in enumerate(names):
        others = sorted(
            (j for j in range(len(names)) if j != i), key=lambda j: (-np.nan_to_num(overlap[i, j]), names[j])
        )
        near = ", ".join(f"{names[j]} {_number(overlap[i, j])}" for j in others[:NEAREST])
        table.add_row(name, near, *(_number(float(np.mean(values[i, others]))) for values in (overlap, expected)))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
