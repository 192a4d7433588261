"""The contract of placements: which expert lives on which device. numpy only."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.pruner import _Described


class Placement(_Described, ABC):
    """Orders the experts of a layer over devices."""

    @abstractmethod
    def place(self, loads: NDArray[np.int64], n_devices: int) -> list[list[int]]:
        """Per device the positions (0 ... E-1) of its experts, E / n_devices each.

        Args:
            loads: [E] tokens routed to each expert.
            n_devices: devices of the expert-parallel group; divides E.

        Raises:
            UserError: n_devices does not divide E.
        """


def experts_per_device(n_experts: int, n_devices: int) -> int:
    """E / n_devices.

    Raises:
        UserError: n_devices does not divide E.
    """
    if n_devices < 1 or n_experts % n_devices:
        raise UserError(
            f"{n_experts} experts do not divide over {n_devices} devices; prune to a multiple (multiple_of={n_devices})"
        )
    return n_experts // n_devices


def max_load_factor(loads: NDArray[np.int64], devices: list[list[int]]) -> float:
    """Largest device load over the mean device load; 1 is perfect balance."""
    sums = [float(loads[positions].sum()) for positions in devices]
    mean = sum(sums) / len(sums)
    return max(sums) / mean if mean else 1.0


def lower_bound(loads: NDArray[np.int64], n_devices: int) -> float:
    """No placement of equal counts has a smaller `max_load_factor`: max(mean, heaviest + its lightest company) / mean."""
    size = experts_per_device(len(loads), n_devices)
    ordered = np.sort(loads)
    mean = float(loads.sum()) / n_devices
    return max(mean, float(ordered[-1] + ordered[: size - 1].sum())) / mean if mean else 1.0
