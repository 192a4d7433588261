"""Moves experts between processes, weights and optimizer state alike, and says what a layout is worth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from moeprune.parallel.dispatch import Sharded
from moeprune.parallel.layout import Layout
from moeprune.parallel.placement import lower_bound, max_load_factor
from moeprune.pruning.surgery import replace_tensor

RANDOM = 200  # random layouts whose mean a layout is compared with


@torch.no_grad()
def rearrange(experts: Any, layout: Layout, optimizers: Iterable[Optimizer] = ()) -> int:
    """Give a layer's experts another layout: rows of weights and optimizer state move by all-to-all, bit by bit.

    Collective over the expert-parallel group; between optimizer steps, when gradients are used up: they are dropped. The layer
    computes the same as before.

    Args:
        experts: the layer's experts, under a `Sharded` dispatcher.
        layout: of as many experts over as many processes.
        optimizers: those that train them.

    Returns:
        how many experts changed process.
    """
    now: Sharded = experts.dispatcher
    if layout == now.layout:
        return 0
    if layout.n_experts != now.layout.n_experts or len(layout.ranks) != now.size:
        raise ValueError(f"a layout of {layout.n_experts} experts over {len(layout.ranks)} processes does not fit")
    optimizers = list(optimizers)
    for name in experts.expert_dims:
        getattr(experts, name).grad = None
        replace_tensor(experts, name, lambda tensor: now.move(tensor, layout), optimizers)
    experts.dispatcher = now.placed(layout)
    return sum(len(set(new) - set(old)) for new, old in zip(layout.ranks, now.layout.ranks, strict=True))


def factor(loads: NDArray[np.int64], layout: Layout) -> float:
    """Largest load of a process over the mean load; 1 is perfect balance."""
    return max_load_factor(loads, [list(positions) for positions in layout.ranks])


def figures(loads: NDArray[np.int64], n_ranks: int) -> dict[str, float]:
    """What max-load factor to expect of a layer's experts on `n_ranks` processes.

        contiguous   experts in their own order
        random       mean over 200 random orders, in counts as equal as possible
        lower_bound  no layout has less (in equal numbers, where these are possible)

    Args:
        loads: [E] tokens routed to each expert.
        n_ranks: processes.
    """
    even = Layout.contiguous(len(loads), n_ranks)
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *even.counts])
    shuffled = rng.permuted(np.tile(np.asarray(loads, dtype=np.int64), (RANDOM, 1)), axis=1)
    sums = np.diff(np.pad(shuffled.cumsum(1), ((0, 0), (1, 0)))[:, starts], axis=1)
    mean = max(float(loads.sum()), 1.0) / n_ranks
    even_split = len(loads) % n_ranks == 0
    bound = lower_bound(loads, n_ranks) if even_split else max(1.0, float(loads.max()) / mean)
    return {
        "contiguous": factor(loads, even),
        "random": float(sums.max(1).mean()) / mean if loads.any() else 1.0,
        "lower_bound": bound,
    }
