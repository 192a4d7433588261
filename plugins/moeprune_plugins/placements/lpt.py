"""Longest processing time first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.parallel.placement import Placement, experts_per_device


class LPT(Placement):
    """Longest processing time first, with equal counts: LAEP's rearranging of experts.

    Experts are visited by load, descending (of two equal loads the lower position first); each goes to the device with
    the smallest load so far that is not full (of two equal ones the lower).

    Source: Yuan3.0 Ultra technical report, arXiv 2601.14327; equals DeepSeek EPLB's balanced packing without replicas.
    """

    def place(self, loads: NDArray[np.int64], n_devices: int) -> list[list[int]]:
        """See the class."""
        size = experts_per_device(len(loads), n_devices)
        devices: list[list[int]] = [[] for _ in range(n_devices)]
        sums = [0] * n_devices
        for position in sorted(range(len(loads)), key=lambda p: (-int(loads[p]), p)):
            device = min((d for d in range(n_devices) if len(devices[d]) < size), key=lambda d: (sums[d], d))
            devices[device].append(position)
            sums[device] += int(loads[position])
        return devices
