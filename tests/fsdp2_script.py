"""Started once per process by test_fsdp2.py: `fsdp2_script.py JOBS`, a JSON list of jobs done one after the other.

A job is {"args": [...]} for `moeprune <args>`. Optional keys: "metrics", a file for the metrics at the end; "error", a file (.<rank>
is added) for the sentence of the UserError that is expected; "shares", a file (.<rank> is added) for the bytes of this process's
share of the parameters and of the optimizer's moments before and after every prune and at the end; "patch", a function of this
file that returns a context to run it in.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
from ranks import RANK, ending, note_metrics, start
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import FSDPModule

from moeprune.model import transformer
from moeprune.parallel import pieces
from moeprune.parallel.fsdp import FullyShardedStrategy
from moeprune.parallel.together import local
from moeprune.training import callbacks, expert_pruning
from moeprune.training.cli import run

SAVE, PRUNE, WRITE = callbacks.save_checkpoint, expert_pruning.prune, pieces.write


def keep_every_checkpoint(trainer: Any, name: str) -> None:
    """Besides last.ckpt, step-<n>.ckpt."""
    SAVE(trainer, name)
    if trainer.is_global_zero:
        folder = expert_pruning.run_folder(trainer)
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, folder / f"step-{trainer.global_step}.ckpt")


def shares(trainer: pl.Trainer) -> list[int]:
    """Bytes in memory of this process's parameters and moments, and how many numbers the whole model has."""
    strategy: Any = trainer.strategy
    assert isinstance(strategy, FullyShardedStrategy)
    strategy.reshard()
    assert not trainer.fit_loop.epoch_loop.val_loop.inference_mode  # gloo has none anyway
    parameters = [*strategy.lightning_module.transformer.parameters()]
    (optimizer,) = strategy.optimizers
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(parameters)
    moments = [value for p in parameters for value in optimizer.state[p].values() if value.ndim]
    bytes_of_moments = sum(local(value).untyped_storage().nbytes() for value in moments)
    return [strategy.local_bytes(), bytes_of_moments, sum(p.numel() for p in parameters)]


def no_space_at_step_10() -> Any:
    """The disk of process 1 is full."""

    def write(checkpoint: dict[str, Any], path: Path, first: bool) -> None:
        late = checkpoint["global_step"] >= 10
        with mock.patch.object(FileSystemWriter, "write_data", full) if late and RANK else nullcontext():
            WRITE(checkpoint, path, first)

    return mock.patch.object(pieces, "write", write)


def one_block_at_a_time() -> Any:
    """When a block is built in memory, those before it are sharded."""
    blocks: weakref.WeakSet[Any] = weakref.WeakSet()

    class Checked(transformer.Block):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if not self.moe.experts.down.is_meta:
                assert all(isinstance(block, FSDPModule) for block in blocks)
                blocks.add(self)

    return mock.patch.object(transformer, "Block", Checked)


def full(*args: Any) -> None:
    """What the writer meets."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(jobs: list[dict[str, Any]]) -> None:
    callbacks.save_checkpoint = keep_every_checkpoint
    for job in jobs:
        found: list[list[int]] = []

        def pruned(trainer: Any, plan: Any, found: list[list[int]] = found) -> None:
            if isinstance(trainer.strategy, FullyShardedStrategy):
                found.append(shares(trainer))
            before = weakref.ref(trainer.lightning_module.model)
            PRUNE(trainer, plan)
            assert (before() is None) == isinstance(trainer.strategy, FullyShardedStrategy)  # nothing holds its memory
            if isinstance(trainer.strategy, FullyShardedStrategy):
                found.append(shares(trainer))

        expert_pruning.prune = pruned
        with ending(job):
            with globals()[job["patch"]]() if "patch" in job else nullcontext():
                trainer = run(job["args"]).trainer
            if "shares" in job:
                Path(f"{job['shares']}.{RANK}").write_text(json.dumps([*found, shares(trainer)]))
            note_metrics(job, trainer)


if __name__ == "__main__":
    start(main)
