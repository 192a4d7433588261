"""How a model changes shape in the middle of a run, under each Lightning strategy."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from moeprune.errors import UserError


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse, at set-up, a strategy under which a prune would corrupt or crash the run.

    Raises:
        UserError: anything but a single device or DDP.
    """
    if type(trainer.strategy) not in (
        DDPStrategy,
        SingleDeviceStrategy,
    ):  # DeepSpeed's, among others, derives from DDP's
        raise UserError(
            f"pruning during training does not work under the strategy {type(trainer.strategy).__name__}; "
            f"use --trainer.strategy=auto (one device) or ddp"
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
