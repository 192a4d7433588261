"""Prune at a given number of tokens."""

from __future__ import annotations

from moeprune.errors import UserError
from moeprune.pruning.trigger import Progress, Trigger


class AtTokens(Trigger):
    """Fires once, as soon as the run has seen `tokens` training tokens, over all ranks.

    The same point of training whatever the batch size, the sequence length and the number of devices.

    Source: fixed-schedule pruning, e.g. Zhu and Gupta 2017 (arXiv 1710.01878), with a single event; counted in tokens here.

    Args:
        tokens: tokens.

    Raises:
        UserError: tokens < 1.
    """

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise UserError(f"tokens must be at least 1, got {tokens}")
        self.tokens = tokens

    def fires(self, progress: Progress) -> str | None:
        """True from `tokens` on until a prune was done."""
        due = progress.tokens >= self.tokens and progress.prunes == 0
        return f"{self.tokens:,} tokens reached" if due else None
