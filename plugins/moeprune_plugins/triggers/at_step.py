"""Prune at a given step."""

from __future__ import annotations

from moeprune.errors import UserError
from moeprune.pruning.trigger import Progress, Trigger


class AtStep(Trigger):
    """Fires once, as soon as `step` optimizer steps are done.

    Source: fixed-schedule pruning, e.g. Zhu and Gupta 2017 (arXiv 1710.01878), with a single event.

    Args:
        step: optimizer steps.

    Raises:
        UserError: step < 0.
    """

    def __init__(self, step: int) -> None:
        if step < 0:
            raise UserError(f"step must be at least 0, got {step}")
        self.step = step

    def fires(self, progress: Progress) -> str | None:
        """True from `step` on until a prune was done."""
        return f"step {self.step} reached" if progress.step >= self.step and progress.prunes == 0 else None
