"""Prune when a number that the run measures crosses a bound."""

from __future__ import annotations

from typing import Literal

from moeprune.errors import UserError
from moeprune.pruning.trigger import Progress, Trigger


class Metric(Trigger):
    """Fires once, when a metric is above, or below, a bound; never on a value from the warm-up.

    A load metric is that of the last complete window, mean over layers, and the window begins after the warm-up; `val_loss` is
    the last validation's, done after the warm-up. With a `deadline`, fires then at the latest and says so.

    Source: no paper's rule; the load metrics are defined in `moeprune.balancing.metrics`.

    Args:
        name: val_loss (nats per token), or of the loads: max_vio, entropy, cv, gini, dead.
        above: fire when the metric is greater than this.
        below: fire when it is smaller than this; set one of the two.
        deadline: share of the run's steps after which to fire regardless, in (0, 1]; needs a bounded run. None for never.

    Raises:
        UserError: none or both of above and below, an unknown name, or a deadline out of range.
    """

    def __init__(
        self,
        name: Literal["val_loss", "max_vio", "entropy", "cv", "gini", "dead"],
        above: float | None = None,
        below: float | None = None,
        deadline: float | None = None,
    ) -> None:
        names = ("val_loss", "max_vio", "entropy", "cv", "gini", "dead")
        if name not in names:
            raise UserError(f"name must be one of {', '.join(names)}, got {name!r}")
        if (above is None) == (below is None):
            raise UserError(f"set exactly one of above and below, got above={above} and below={below}")
        if deadline is not None and not 0 < deadline <= 1:
            raise UserError(f"deadline must lie in (0, 1], got {deadline}")
        self.name, self.above, self.below, self.deadline = name, above, below, deadline

    def fires(self, progress: Progress) -> str | None:
        """See the class."""
        if progress.prunes:
            return None
        value = self._value(progress)
        if value is not None and self.above is not None and value > self.above:
            return f"{self.name} {value:.4g} is above {self.above:g}"
        if value is not None and self.below is not None and value < self.below:
            return f"{self.name} {value:.4g} is below {self.below:g}"
        if self.deadline is not None and 0 < progress.max_steps * self.deadline <= progress.step:
            return f"deadline: {self.deadline:.0%} of {progress.max_steps} steps"
        return None

    def _value(self, progress: Progress) -> float | None:
        """The metric's last value, if it was measured after the warm-up."""
        if self.name == "val_loss":
            measured = progress.metrics.get("val_step", -1)
        else:
            measured = progress.windows[-1].first if progress.windows else -1
        return progress.metrics.get(self.name) if measured >= progress.warmup_steps else None
