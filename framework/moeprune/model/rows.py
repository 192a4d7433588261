"""The rows that the experts of a layer work on: one per token and choice, sorted by expert, cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # of a block: its scratch of about 2 D + 7 F floats per row is a few MB, near the last-level cache


class Rows(NamedTuple):
    """One row per token and choice, sorted by expert."""

    choice: Tensor  # [S] int64, t K + k
    padding: Tensor | None  # [S] bool: rows that only fill up an expert's; None where there are none
    blocks: list[tuple[int, int, list[int], list[int]]]  # see `cut`
    longest: int  # rows of the longest block


def sorted_rows(indices: Tensor, n_experts: int, multiple: int) -> Rows:
    """The rows of `indices` [T, K], those of each expert padded to a multiple of `multiple`."""
    ids = indices.reshape(-1).to(torch.int32)  # sorting int32 is several times faster than int64
    choice = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=n_experts)
    padding = None
    if multiple > 1:
        counts, choice, padding = padded(counts, choice, multiple)
    blocks = cut(counts.tolist(), ROWS)
    return Rows(choice, padding, blocks, max((b - a for a, b, *_ in blocks), default=0))


def padded(counts: Tensor, choice: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [E] rounded up, the rows with each expert's last one repeated to fill up, and which rows those are."""
    rounded = (counts + (multiple - 1)) // multiple * multiple
    ends = counts.cumsum(0)
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(rounded)
    before = (rounded - counts).cumsum(0) - (rounded - counts)  # rows added ahead of each expert's
    row = torch.arange(len(expert), device=counts.device) - before.index_select(0, expert)
    last = ends.index_select(0, expert) - 1
    return rounded, choice.index_select(0, torch.minimum(row, last)), row > last


def multiple_of(x: Tensor) -> int:
    """To how many rows an expert's are padded: oneDNN builds and caches a kernel per number of rows of half-precision
    products, and changing loads would go through more than its cache holds.
    """
    return 16 if x.device.type == "cpu" and x.element_size() == 2 else 1


def cut(counts: Sequence[int], rows: int) -> list[tuple[int, int, list[int], list[int]]]:
    """Cut the sorted rows into blocks of at most `rows`: (start, end, experts, rows of each) of every block.

    How an expert's rows are cut depends on their number alone, so its outputs are the same bits whatever other experts there
    are: products of other sizes round differently.
    """
    blocks: list[tuple[int, int, list[int], list[int]]] = []
    start = row = 0
    experts: list[int] = []
    sizes: list[int] = []
    for expert, count in enumerate(counts):
        while count:
            n = min(-(-count // -(-count // rows) // 16) * 16, rows, count)
            if row + n - start > rows:
                blocks.append((start, row, experts, sizes))
                start, experts, sizes = row, [], []
            experts.append(expert)
            sizes.append(n)
            row, count = row + n, count - n
    if experts:
        blocks.append((start, row, experts, sizes))
    return blocks
