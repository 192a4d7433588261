"""How a model changes shape in the middle of a run, under each Lightning strategy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from moeprune.errors import UserError
from moeprune.parallel.strategy import ExpertParallelStrategy

T = TypeVar("T")


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse, at set-up, a strategy under which a prune would corrupt or crash the run.

    Raises:
        UserError: anything but a single device, DDP or expert parallelism.
    """
    # by exact type: DeepSpeed's, among others, derives from DDP's
    if type(trainer.strategy) not in (DDPStrategy, SingleDeviceStrategy, ExpertParallelStrategy):
        raise UserError(
            f"pruning during training does not work under the strategy {type(trainer.strategy).__name__}; "
            f"use --trainer.strategy=auto (one device), ddp or ep"
        )


def restructure(trainer: pl.Trainer, change: Callable[[], None]) -> None:
    """Call `change`, which replaces parameters of the model; under DDP unwrap before and wrap again after, since DDP's
    gradient buckets hold the old parameters.
    """
    strategy = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = strategy.lightning_module
    change()
    if wrapped:
        assert isinstance(strategy, DDPStrategy)
        strategy.configure_ddp()


def decide(trainer: pl.Trainer, make: Callable[[], T]) -> T:
    """What process 0 makes of a whole model, on every process; plain data. Under expert parallelism the experts are gathered
    there first.

    Raises:
        UserError: that of process 0, on every process.
    """
    strategy = trainer.strategy
    answer: tuple[T | None, str] = (None, "")
    if isinstance(strategy, ExpertParallelStrategy):
        with strategy.whole():
            if trainer.is_global_zero:
                answer = _attempt(make)
    elif trainer.is_global_zero:
        answer = _attempt(make)
    made, problem = strategy.broadcast(answer)
    if problem:
        raise UserError(problem)
    return made  # type: ignore[return-value]


def _attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def agree(trainer: pl.Trainer, what: str, data: Any) -> None:
    """Compare a hash of `data`, which JSON can hold, over all processes before anything depends on it. Collective.

    Raises:
        UserError: it differs; on every process.
    """
    if trainer.world_size == 1:
        return
    digests: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(digests, hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"at step {trainer.global_step} process {others[0]} disagrees with process 0 on {what}"
            f"{f' ({len(others)} do)' if len(others) > 1 else ''}; the model was not changed: resume from the last checkpoint"
        )
