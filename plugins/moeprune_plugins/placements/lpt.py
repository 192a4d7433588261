"""Longest processing time first."""

from __future__ import annotations

import heapq

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
        load = np.asarray(loads).astype(np.int64)
        devices: list[list[int]] = [[] for _ in range(n_devices)]
        lightest = [(0, device) for device in range(n_devices)]  # a heap of those that are not full
        for position in np.argsort(-load, kind="stable").tolist():
            total, device = lightest[0]
            devices[device].append(position)
            if len(devices[device]) < size:
                heapq.heapreplace(lightest, (total + int(load[position]), device))
            else:
                heapq.heappop(lightest)
        return devices
