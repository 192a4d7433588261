"""Started by test_ddp.py with torchrun-like environment: what two gloo processes must agree on."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moeprune.balancing.metrics import ExpertLoad


def metrics(rank: int, port: str) -> None:
    """Every rank counts its own tokens; compute gives the sum on all of them, and updates go on afterwards."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    load = ExpertLoad([3, 1])
    for step in range(2):
        load.update([torch.tensor([rank + 1, 10 * step, 0]), torch.tensor([5 + rank])])
    for layer, expected in zip(load.totals(), ([6, 20, 0], [22]), strict=True):
        assert layer.tolist() == expected, (rank, layer)
    load.update([torch.tensor([1, 1, 1]), torch.tensor([1])])
    assert load.totals()[0].tolist() == [8, 22, 2], (rank, load.totals())
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(metrics, (sys.argv[1],), nprocs=2)
