"""Callbacks that every run has: a durable record of its steps, the random state in checkpoints, the last checkpoint."""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter, Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from moeprune.errors import UserError
from moeprune.files import JsonLines
from moeprune.parallel.together import Together
from moeprune.training.expert_pruning import run_folder, save_checkpoint

LOST = "(?i)connection (closed|reset)|broken pipe|timed out|timeout|NCCL"  # of gloo and NCCL, when a process is gone


class RunRecorder(pl.Callback):
    """Writes `history.jsonl` (loss of the first rank's share, learning rate, seconds of every optimizer step) and `validation.jsonl` into the run's folder.

    Rows up to a checkpoint are on disk before it; a resumed run drops later rows and goes on, so each step is there once.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file."""
        if trainer.is_global_zero:
            self._file = JsonLines(run_folder(trainer) / "history.jsonl", trainer.global_step)
            self._validation = JsonLines(run_folder(trainer) / "validation.jsonl", trainer.global_step)
        self._began, self._losses = time.perf_counter(), list[float]()
        reset_peak_memory()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step, at its first batch if gradients accumulate."""
        if not self._losses:
            self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add a row."""
        self._losses.append(float(outputs["lm_loss"]))
        if not trainer.is_global_zero or trainer.fit_loop._should_accumulate():
            return
        self._file.append(
            {
                "step": trainer.global_step,
                "loss": float(np.mean(self._losses)),
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                "seconds": time.perf_counter() - self._began,
                "tokens": batch[:, 1:].numel() * trainer.world_size * len(self._losses),
                "peak_memory": peak_memory(),
            }
        )
        self._losses = []
        if trainer.global_step % 10 == 0:
            self._file.flush()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a row to `validation.jsonl`, in training only."""
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_loss")}
            self._validation.append({"step": trainer.global_step, **losses})
            self._validation.flush()  # after the checkpoint of this step; a resumed run does not measure it again

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave complete files."""
        if trainer.is_global_zero:
            self._file.flush()
            self._validation.flush()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rows up to a checkpoint are on disk before it."""
        self.on_train_end(trainer, pl_module)


def reset_peak_memory() -> None:
    """Start measuring anew, where the system can (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the device's peak allocation on CUDA, otherwise the process's peak resident memory since the reset."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class RandomState(pl.Callback):
    """Keeps the state of every rank's random generators in checkpoints, which Lightning does not."""

    _restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather torch, CUDA, numpy and Python state; called on all ranks."""
        name, keys, position, has_gauss, gauss = np.random.get_state()
        version, internal, gauss_next = random.getstate()
        mine = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": [
                str(name),
                torch.from_numpy(np.asarray(keys, dtype=np.int64)),
                int(position),
                int(has_gauss),
                float(gauss),
            ],
            "python": [version, list(internal), gauss_next],
        }
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        checkpoint["random_state"] = everyone

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember this rank's state."""
        states = checkpoint.get("random_state", [])
        self._restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put it back, in the last hook before the first batch."""
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["torch"].cpu())
        if self._restored["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._restored["cuda"].cpu())
        name, keys, *rest = self._restored["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
        version, internal, gauss_next = self._restored["python"]
        random.setstate((version, tuple(internal), gauss_next))
        self._restored = None


class LastCheckpoint(Checkpoint):
    """Keeps the newest state of the run in `last.ckpt`, in the run's folder; written whole or not at all.

    Args:
        every_n_steps: optimizer steps between saves; the end of the run is saved as well.
        sharded: write a folder of pieces, every process what it holds, instead of gathering all in one file; for the strategies
            `fsdp2`, `ep` and `ep_fsdp2`.

    Raises:
        UserError: every_n_steps < 1.
    """

    def __init__(self, every_n_steps: int = 100, sharded: bool = False) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.sharded = every_n_steps, sharded
        self._saved = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the strategy how to save.

        Raises:
            UserError: one that has nothing to save in pieces.
        """
        strategy = trainer.strategy
        if isinstance(strategy, Together):
            strategy.sharded_checkpoints = self.sharded
        elif self.sharded and stage == "fit":
            raise UserError(
                "checkpoint.sharded needs processes that hold parts of the model; use --trainer.strategy=fsdp2, ep or "
                "ep_fsdp2, or leave it out"
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save every n steps and after the last one; Lightning calls checkpoint callbacks after all others."""
        step = trainer.global_step
        if not trainer.fit_loop._should_accumulate() and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a run that ends for another reason than its number of steps."""
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what a broken connection means, and where to go on from."""
        if trainer.world_size == 1 or not (isinstance(exception, RuntimeError) and re.search(LOST, str(exception))):
            return
        last = run_folder(trainer) / "last.ckpt"
        way_out = (
            f"Resume with --ckpt_path={last}" if last.exists() else "There is no checkpoint yet; start the run again"
        )
        exception.add_note(
            f"moeprune: another process of this run has ended or does not answer; its own message says why. {way_out}"
        )

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        save_checkpoint(trainer, "last.ckpt")


class Predictions(BasePredictionWriter):
    """`moeprune predict` writes `predictions.jsonl` into the run's folder: per sequence its domain, tokens and log-probabilities."""

    def __init__(self) -> None:
        super().__init__("batch")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add the batch's rows; the first batch starts the file anew."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.jsonl"
        rows = zip(batch["tokens"][:, 1:].tolist(), prediction.tolist(), strict=True)
        with (folder / name).open("a" if batch_idx else "w", encoding="utf-8") as file:
            for tokens, log_probs in rows:
                file.write(json.dumps({"domain": batch["domain"], "tokens": tokens, "log_probs": log_probs}) + "\n")
