"""When to prune during training: the contract. A trigger is a pure function of the run's progress, so that a resumed run
decides as the one that never stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeprune.pruning.pruner import _Described


@dataclass(frozen=True)
class LoadWindow:
    """Loads over some consecutive steps: [E] int64 per layer, summed over all ranks.

    Args:
        first: optimizer steps done before the window.
        last: optimizer steps done at its end.
        loads: tokens routed to each expert, one array per layer.
    """

    first: int
    last: int
    loads: Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: optimizer steps done.
        max_steps: optimizer steps of the whole run; -1 if unbounded.
        warmup_steps: steps of learning-rate warm-up.
        tokens: tokens seen, over all ranks.
        windows: complete load windows since the last prune, oldest first.
        prunes: prunes done.
        metrics: last known values by name, the same on all ranks: once a validation ran `val_loss`, nats per token, and
            `val_step`, the optimizer steps done when it was measured; and the load metrics of the last complete window, mean
            over layers (`max_vio`, `entropy`, `cv`, `gini`, `dead`).
    """

    step: int
    max_steps: int
    warmup_steps: int
    tokens: int
    windows: Sequence[LoadWindow]
    prunes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trigger(_Described, ABC):
    """Asked after every optimizer step."""

    @abstractmethod
    def fires(self, progress: Progress) -> str | None:
        """None, or the reason to prune now, in a few words for the log."""

    def share(self, prunes: int) -> float:
        """How much of what the pruner wants gone is gone after this prune, in (0, 1]; 1 unless pruning is gradual.

        What the pruner wants is asked once, at the first prune: later ones go on towards the same number per layer.

        Args:
            prunes: prunes done before this one.
        """
        return 1.0
