"""Which process holds which experts of a layer, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Layout:
    """The experts of one layer over the processes of an expert-parallel group.

    Args:
        ranks: per process the positions (0 ... E-1) of its experts, in the order of its rows; numbers may differ and be 0.

    Raises:
        ValueError: a position that is missing or there twice.
    """

    ranks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"a layout holds every position once, not {self.ranks}")

    @classmethod
    def of(cls, ranks: Iterable[Iterable[int]]) -> Layout:
        """From any lists of numbers."""
        return cls(tuple(tuple(map(int, positions)) for positions in ranks))

    @classmethod
    def contiguous(cls, n_experts: int, n_ranks: int) -> Layout:
        """Experts in their own order, counts as equal as possible: the first processes hold one more."""
        size, more = divmod(n_experts, n_ranks)
        ends = [(rank + 1) * size + min(rank + 1, more) for rank in range(n_ranks)]
        return cls.of(range(end - size - (rank < more), end) for rank, end in enumerate(ends))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Positions, process by process."""
        return tuple(position for positions in self.ranks for position in positions)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Of each position, where it stands in `order`."""
        slots = [0] * len(self.order)
        for slot, position in enumerate(self.order):
            slots[position] = slot
        return tuple(slots)

    @property
    def n_experts(self) -> int:
        """E, over all processes."""
        return len(self.order)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of each process."""
        return tuple(map(len, self.ranks))

    def rows(self, rank: int, positions: Iterable[int]) -> list[int]:
        """The rows of process `rank` that hold any of these positions."""
        wanted = set(positions)
        return [row for row, position in enumerate(self.ranks[rank]) if position in wanted]

    def cut(self, positions: Sequence[int]) -> Layout:
        """What is left where it was when only these positions (ascending) stay."""
        new = {old: position for position, old in enumerate(positions)}
        return Layout.of([new[p] for p in row if p in new] for row in self.ranks)
