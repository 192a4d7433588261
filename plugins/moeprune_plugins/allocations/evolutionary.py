"""Numbers per layer found by an evolutionary search."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Allocation, Uniform

PATIENCE = 3.0  # seconds before a search shows how far it is
Counts = tuple[int, ...]


class Evolutionary(Allocation):
    """Searches the numbers per layer, at uniform's total, whose pruned model shares most of the whole one's distribution.

    Fitness of some numbers: the model keeps the highest scores of each layer, and the mean over held-out tokens of the sum
    over the vocabulary of min(p, q) is measured, p the whole model's next-token probabilities and q the pruned one's. The
    search starts from uniform. In every generation, random ones of the `elite` best so far have `population` children, none
    tried before, each with some experts moved between layers, as far as the constraints allow; of equals the earlier stays.
    So the result is never worse than uniform on the held-out tokens. One trial costs one run of the model over them, and
    there are up to 1 + population * generations. A pruner that merges is searched as if it only removed.

    Source: EvoESAP, arXiv 2603.06003: fitness, fixed order within layers, fixed total, mutation between pairs of layers. It
    starts from several profiles over depth as well; here from uniform alone. The defaults are ours.

    Args:
        population: children per generation.
        generations: at most; the search ends early when there is nothing new to try.
        mutation: most experts that a child moves between layers, in moves of the smallest step that the constraints allow;
            how many moves is drawn uniformly, one at least.
        elite: how many may have children.
        seed: same seed, same result; the draws are of layers, never of experts.

    Raises:
        UserError: an option below 1.
    """

    needs = frozenset({"acceptance"})

    def __init__(
        self, population: int = 16, generations: int = 20, mutation: int = 8, elite: int = 4, seed: int = 0
    ) -> None:
        self.population, self.generations, self.mutation = population, generations, mutation
        self.elite, self.seed = elite, seed
        for name in ("population", "generations", "mutation", "elite"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def allocate(
        self,
        scores: Sequence[NDArray[np.float64]],
        evidence: Evidence,
        constraints: Constraints,
        ratio: float,
    ) -> list[int]:
        """See `Allocation.allocate`."""
        evidence.require(self.needs, "allocation 'evolutionary'")
        acceptance = evidence.acceptance
        assert acceptance is not None
        allowed = [
            constraints.feasible(len(layer.ids), evidence.top_k, layer.n_original, index)
            for index, layer in enumerate(evidence.layers)
        ]
        fitness: dict[Counts, float] = {}

        def measure(counts: Counts) -> None:
            kept = [
                constraints.keep_highest(score, n, layer, index)
                for index, (score, n, layer) in enumerate(zip(scores, counts, evidence.layers, strict=True))
            ]
            fitness[counts] = float(acceptance(kept))
            if not np.isfinite(fitness[counts]):
                raise UserError(f"the acceptance of the model pruned to {list(counts)} experts is not a finite number")

        rng = np.random.default_rng(self.seed)
        parents: list[Counts] = [tuple(Uniform().allocate(scores, evidence, constraints, ratio))]
        shown = _Shown(self.population * self.generations)
        try:
            for _ in range(self.generations):
                children = self._children(parents, allowed, fitness, rng)
                if not children:
                    break
                for counts in parents + children:
                    if counts not in fitness:
                        measure(counts)
                        shown.update(len(fitness) - 1, max(fitness.values()))
                parents = sorted([*parents, *children], key=lambda counts: -fitness[counts])[: self.elite]
        finally:
            shown.close()
        return list(parents[0])

    def _children(
        self, parents: list[Counts], allowed: list[range], seen: dict[Counts, float], rng: np.random.Generator
    ) -> list[Counts]:
        """New numbers per layer, up to `population` of them."""
        found: dict[Counts, None] = dict.fromkeys(parents)
        for _ in range(20 * self.population):  # where most neighbours were tried, more are drawn
            child = self._mutated(parents[rng.integers(len(parents))], allowed, rng)
            if child not in seen:
                found[child] = None
            if len(found) == len(parents) + self.population:
                break
        return list(found)[len(parents) :]

    def _mutated(self, parent: Counts, allowed: list[range], rng: np.random.Generator) -> Counts:
        """`parent` with a step of experts, or several, moved from one layer to another."""
        counts = list(parent)
        step = allowed[0].step  # the same in all layers
        for _ in range(rng.integers(1, max(1, self.mutation // step) + 1)):
            givers = [i for i, n in enumerate(counts) if n > allowed[i][0]]
            takers = [i for i, n in enumerate(counts) if n < allowed[i][-1]]
            pairs = len(givers) * len(takers) - len(set(givers) & set(takers))
            if not pairs:
                break
            giver = taker = -1
            while giver == taker:
                giver, taker = givers[rng.integers(len(givers))], takers[rng.integers(len(takers))]
            counts[giver] -= step
            counts[taker] += step
        return tuple(counts)


class _Shown:
    """A bar on standard error, from the first process alone and only once the search takes long."""

    def __init__(self, total: int) -> None:
        from rich.console import Console  # here: planning imports every allocation
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("searching numbers per layer, acceptance {task.fields[best]:.4f}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, best=0.0)
        self._began = time.monotonic()
        self._on = self._console.is_terminal and os.environ.get("LOCAL_RANK", "0") == "0"
        self._started = False

    def update(self, trials: int, best: float) -> None:
        self._bar.update(self._task, completed=trials, best=best)
        if self._on and not self._started and time.monotonic() - self._began > PATIENCE:
            self._bar.start()
            self._started = True

    def close(self) -> None:
        if self._started:
            self._bar.stop()
