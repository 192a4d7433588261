"""How a model changes shape in the middle of a run, under each Lightning strategy."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from moeprune.errors import UserError
from moeprune.parallel.fsdp import FullyShardedStrategy
from moeprune.parallel.hybrid import ExpertParallelFullyShardedStrategy
from moeprune.parallel.strategy import ExpertParallelStrategy
from moeprune.parallel.together import Together
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan

T = TypeVar("T")


PRUNING = (
    SingleDeviceStrategy,
    DDPStrategy,
    ExpertParallelStrategy,
    FullyShardedStrategy,
    ExpertParallelFullyShardedStrategy,
)


def check_strategy(trainer: pl.Trainer, prunes: bool = True) -> None:
    """Refuse, at set-up, a strategy under which the run would crash or be silently wrong.

    Args:
        trainer: of the run.
        prunes: whether it may prune.

    Raises:
        UserError: Lightning's own ModelParallelStrategy, which would train a model of its own on every process; and if the run
            prunes, anything but a single device, DDP, expert parallelism, FSDP2 or both of these.
    """
    strategy = type(trainer.strategy)
    if strategy is ModelParallelStrategy:
        raise UserError("the strategy ModelParallelStrategy does not shard this model; use --trainer.strategy=fsdp2")
    if prunes and strategy not in PRUNING:  # by exact type: DeepSpeed's, among others, derives from DDP's
        raise UserError(
            f"pruning during training does not work under the strategy {strategy.__name__}; use --trainer.strategy=auto (one "
            f"device), ddp, ep, fsdp2 or ep_fsdp2"
        )


def prune(trainer: pl.Trainer, plan: PrunePlan) -> None:
    """Carry a plan out on the model in training and its optimizers. Collective.

    Under DDP the model is unwrapped before and wrapped again after, since DDP's gradient buckets hold the old parameters.
    """
    strategy: Any = trainer.strategy
    module: Any = strategy.lightning_module
    if isinstance(strategy, FullyShardedStrategy):
        strategy.prune(plan, strategy.optimizers)
        gc.collect()  # the old model's modules and their hooks hold each other, and the experts that went
        return
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = module
    apply_plan(module.transformer, plan, trainer.optimizers)
    if wrapped:
        strategy.configure_ddp()


def decide(trainer: pl.Trainer, make: Callable[[], T], whole: bool = True) -> T:
    """What process 0 makes, on every process; plain data.

    Args:
        trainer: of the run.
        make: called on process 0.
        whole: whether it reads weights or runs the model, all of which is then gathered on process 0 where it is spread.

    Raises:
        UserError: that of process 0, on every process.
    """
    strategy = trainer.strategy
    answer: tuple[T | None, str] = (None, "")
    if whole and isinstance(strategy, Together):
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
