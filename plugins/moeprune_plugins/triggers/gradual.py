"""Prune in several small steps."""

from __future__ import annotations

from typing import Literal

from moeprune.errors import UserError
from moeprune.pruning.trigger import Progress, Trigger


class Gradual(Trigger):
    """Fires `prunes` times, at `start`, at `end` and evenly in between; each prune takes a part of what shall go.

    After prune i of n the share of it that is gone is

        cubic     1 - (1 - i / n)^3      much at first, less and less towards the end
        linear    i / n

    Numbers of experts are rounded, then raised to the next that the constraints allow. How many shall go is asked of the pruner
    at the first prune; which experts those are, at every prune anew. The loads it then sees were counted since the prune before,
    so keep prunes at least a load window apart.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1, from nothing pruned; its t_0 lies one interval before `start`.

    Args:
        start: optimizer steps before the first prune.
        end: optimizer steps before the last prune.
        prunes: how many.
        schedule: cubic or linear.

    Raises:
        UserError: start < 0, fewer than two prunes, or fewer steps from start to end than prunes need.
    """

    def __init__(self, start: int, end: int, prunes: int = 4, schedule: Literal["cubic", "linear"] = "cubic") -> None:
        if start < 0:
            raise UserError(f"start must be at least 0, got {start}")
        if prunes < 2:
            raise UserError(f"prunes must be at least 2, got {prunes}; the trigger `at_step` prunes once")
        if end - start < prunes - 1:
            raise UserError(
                f"{prunes} prunes do not fit between start={start} and end={end}, one a step at most; raise end or lower prunes"
            )
        if schedule not in ("cubic", "linear"):
            raise UserError(f"schedule must be cubic or linear, got {schedule!r}")
        self.start, self.end, self.prunes, self.schedule = start, end, prunes, schedule

    def step(self, prunes: int) -> int:
        """Optimizer steps after which prune number `prunes`, counted from 0, is due."""
        return self.start + prunes * (self.end - self.start) // (self.prunes - 1)

    def fires(self, progress: Progress) -> str | None:
        """True from the next prune's step on until it was done."""
        if progress.prunes >= self.prunes or progress.step < self.step(progress.prunes):
            return None
        return f"prune {progress.prunes + 1} of {self.prunes}, step {self.step(progress.prunes)} reached"

    def share(self, prunes: int) -> float:
        """See `Trigger.share` and the class; exactly 1 at the last prune."""
        left = max(0, self.prunes - prunes - 1) / self.prunes
        return 1 - (left**3 if self.schedule == "cubic" else left)
