"""What the strategies share under which a pass of the model needs all processes, each of which holds a part of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moeprune.errors import UserError
from moeprune.parallel import pieces


class Together(ParallelStrategy):
    """Goes before Lightning's class among the bases of a strategy.

    Attributes:
        sharded_checkpoints: write checkpoints in pieces (`moeprune.parallel.pieces`), every process what it holds, instead of
            gathering them on process 0.
    """

    strategy_name: str
    sharded_checkpoints = False
    _folder: pieces.Folder | None = None  # being restored

    @property
    def _module(self) -> Any:
        module: Any = self.lightning_module
        assert module is not None
        return module

    @property
    def passes_need_all(self) -> bool:
        """Whether a process waits for others in a pass of the model."""
        return True

    @abstractmethod
    def whole(self) -> AbstractContextManager[None]:
        """While the context lasts, the model of process 0 is whole and works without the others. Collective to enter."""

    @abstractmethod
    def clip_gradients_by_norm(self, optimizer: Optimizer, max_norm: float) -> None:
        """Clip by the norm over the parameters of the whole model, wherever they live. Collective."""

    def clip_gradients_by_value(self, optimizer: Optimizer, value: float) -> None:
        """Bring every number of the gradients into [-value, value]."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    local(parameter.grad).clamp_(-value, value)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        """See `evened`."""
        return self.evened(dataloader, training=bool(self._module.trainer.training))

    def evened(self, loader: Any, training: bool = False) -> Any:
        """The loader with as many batches as the process with the most has, since a pass needs all of them: empty ones are
        added. Collective.

        Raises:
            UserError: a loader without a length, or training batches in unequal numbers.
        """
        if not self.passes_need_all:
            return loader
        try:
            length = len(loader)
        except TypeError as error:
            raise UserError(f"the strategy `{self.strategy_name}` needs data loaders that know their length") from error
        most = torch.tensor([length, -length], device=self.root_device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        longest, shortest = int(most[0]), -int(most[1])
        if training and longest > shortest:
            raise UserError(
                f"under the strategy `{self.strategy_name}` all processes train on the same number of batches; here one has "
                f"{shortest} and another {longest}"
            )
        return Padded(loader, [self._module.empty_batch()] * (longest - length)) if longest > length else loader

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Into a file, or in pieces into a folder. Collective.

        Raises:
            OSError: it cannot be written.
        """
        if self.sharded_checkpoints:
            first = bool(self.is_global_zero)
            pieces.write(checkpoint, Path(self.broadcast(str(filepath))), first)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Whatever is in the file; of a checkpoint in pieces all but the tensors, which are read where they go."""
        self._folder = None
        if not pieces.is_folder(checkpoint_path):
            return self._read(checkpoint_path, weights_only)
        self._folder = pieces.Folder(checkpoint_path)
        return self._folder.description()

    def _read(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        read: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        return read


class Padded:
    """A loader followed by more batches.

    Args:
        loader: with a length.
        more: batches.
    """

    def __init__(self, loader: Any, more: Sequence[Any]) -> None:
        self._loader, self._more = loader, more

    def __len__(self) -> int:
        return len(self._loader) + len(self._more)

    def __iter__(self) -> Iterator[Any]:
        yield from self._loader
        yield from self._more


def local(tensor: Tensor | None) -> Tensor:
    """What this process has of a tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_names(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise what torch raises where a checkpoint holds other tensors than the model.

    Raises:
        RuntimeError: they differ.
    """
    missing, more = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    if missing or more:
        raise RuntimeError(f"the checkpoint lacks {missing[:3]} and holds {more[:3]}, which the model does not have")
