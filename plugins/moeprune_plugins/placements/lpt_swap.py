"""Longest processing time first, then swaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.parallel.placement import Placement, lower_bound
from moeprune_plugins.placements.lpt import LPT

GOOD_ENOUGH = 1.001  # times the lower bound: no kicks after that


class LPTSwap(Placement):
    """LPT, improved by swaps until none between the heaviest device and another one lowers the heaviest load.

    Each step takes the swap of one expert for one that leaves the smaller load on the heavier of its two devices. Where
    none helps and the result is not within 0.1 % of the lower bound, a kick swaps two random pairs of experts and the
    steps begin again; the kick stays if the heaviest load did not grow. Never worse than LPT; the same loads give the
    same placement.

    Source: LPT as in Yuan3.0 Ultra (arXiv 2601.14327); iterated local search by swaps is textbook. The choice of swap
    and kick is ours.

    Args:
        kicks: at most so many.
        seed: of the kicks.

    Raises:
        UserError: kicks < 0.
    """

    def __init__(self, kicks: int = 16, seed: int = 0) -> None:
        if kicks < 0:
            raise UserError(f"kicks must be at least 0, got {kicks}")
        self.kicks, self.seed = kicks, seed

    def place(self, loads: NDArray[np.int64], n_devices: int) -> list[list[int]]:
        """See the class; each device's positions ascend."""
        devices = LPT().place(loads, n_devices)
        size = len(devices[0])
        if size > 2:  # with one or two experts per device, LPT is the best there is
            load = np.asarray(loads).astype(np.int64)
            best = _descend(np.array(devices), load)
            goal = GOOD_ENOUGH * lower_bound(load, n_devices) * load.sum() / n_devices
            rng = np.random.default_rng(self.seed)
            for _ in range(self.kicks):
                if load[best].sum(1).max() <= goal:
                    break
                kicked = best.copy().ravel()
                for a, b in rng.integers(len(load), size=(2, 2)).tolist():
                    kicked[a], kicked[b] = kicked[b], kicked[a]
                kicked = _descend(kicked.reshape(best.shape), load)
                if load[kicked].sum(1).max() <= load[best].sum(1).max():
                    best = kicked
            devices = best.tolist()
        return [sorted(positions) for positions in devices]


def _descend(devices: NDArray[np.int64], load: NDArray[np.int64]) -> NDArray[np.int64]:
    """Swap, in `devices` [devices, experts of each], until no swap with the heaviest one lowers its load."""
    held = load[devices]
    sums = held.sum(1)
    while True:
        heavy = int(sums.argmax())
        moved = held[heavy][:, None, None] - held  # [x, d, y]: load that goes to device d when x is swapped for its y
        heavier = np.maximum(sums[heavy] - moved, sums[:, None] + moved)
        heavier[:, heavy] = sums[heavy]
        x, d, y = (int(i) for i in np.unravel_index(heavier.argmin(), heavier.shape))
        if heavier[x, d, y] >= sums[heavy]:
            return devices
        sums[heavy] -= moved[x, d, y]
        sums[d] += moved[x, d, y]
        for table in (held, devices):
            table[heavy, x], table[d, y] = table[d, y], table[heavy, x]
