"""Experts in their own order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprune.parallel.placement import Placement, experts_per_device


class Contiguous(Placement):
    """Experts in their own order: the baseline that every rearrangement is compared with.

    Source: the layout of Megatron-LM and of every checkpoint.
    """

    def place(self, loads: NDArray[np.int64], n_devices: int) -> list[list[int]]:
        """Device d holds the d-th run of neighbours."""
        size = experts_per_device(len(loads), n_devices)
        return [list(range(d * size, (d + 1) * size)) for d in range(n_devices)]
