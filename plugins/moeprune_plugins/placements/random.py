"""Experts in random order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.parallel.placement import Placement, experts_per_device


class RandomPlacement(Placement):
    """Experts in random order, whatever their loads: what a rearrangement gains by luck alone.

    The same permutation for every layer of the same size.

    Source: the usual baseline.

    Args:
        seed: of the permutation.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def place(self, loads: NDArray[np.int64], n_devices: int) -> list[list[int]]:
        """See the class; each device's positions ascend."""
        size = experts_per_device(len(loads), n_devices)
        order = np.random.default_rng(self.seed).permutation(len(loads))
        return [sorted(positions) for positions in order.reshape(n_devices, size).tolist()]
