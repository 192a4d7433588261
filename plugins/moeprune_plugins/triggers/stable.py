"""Prune when the experts' loads have become stable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from moeprune.errors import UserError
from moeprune.pruning.trigger import Progress, Trigger


class Stable(Trigger):
    """Fires when the ranking of the experts by load holds still: the stable phase of LAEP.

    Over each of the last `windows` pairs of neighbouring load windows, the rank correlation (Spearman) of the loads is
    at least `threshold` in EVERY layer. Warm-up never counts: all the windows compared begin after it. If that has not
    happened after `deadline` of the run, fires anyway and says so.

    Source: the two phases are those of arXiv 2601.14327, which does not publish a rule for finding the second. The minimum
    over layers is taken since a mean fires while some layer still moves (docs/stability.md has the measurements).

    Args:
        threshold: lowest rank correlation that counts as stable, in (0, 1].
        windows: pairs of windows in a row that must be stable.
        deadline: share of the run's steps after which to fire regardless, in (0, 1]; needs a bounded run.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(self, threshold: float = 0.9, windows: int = 3, deadline: float = 0.55) -> None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold must lie in (0, 1], got {threshold}")
        if windows < 1:
            raise UserError(f"windows must be at least 1, got {windows}")
        if not 0 < deadline <= 1:
            raise UserError(f"deadline must lie in (0, 1], got {deadline}")
        self.threshold, self.windows, self.deadline = threshold, windows, deadline

    def fires(self, progress: Progress) -> str | None:
        """See the class."""
        if progress.prunes:
            return None
        after_warmup = [window.loads for window in progress.windows if window.first >= progress.warmup_steps]
        recent = after_warmup[-(self.windows + 1) :]
        if len(recent) == self.windows + 1:
            lowest = min(min(spearman(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(recent))
            if lowest >= self.threshold:
                return f"stable: lowest rank correlation {lowest:.3f} >= {self.threshold} over {self.windows} windows"
        if progress.max_steps > 0 and progress.step >= self.deadline * progress.max_steps:
            return f"deadline: {self.deadline:.0%} of {progress.max_steps} steps"
        return None


def spearman(a: Sequence[int] | NDArray[np.int64], b: Sequence[int] | NDArray[np.int64]) -> float:
    """Rank correlation of two load vectors [E], ties averaged; 1 if one of them is constant or E = 1."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 1.0
