"""Prunes inside a Lightning run: gathers loads, asks the trigger, asks the pruner, applies the plan, goes on training."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moeprune.balancing.metrics import ExpertLoad, load_metrics
from moeprune.errors import UserError
from moeprune.files import JsonLines
from moeprune.parallel.dispatch import Sharded
from moeprune.parallel.layout import Layout
from moeprune.parallel.placement import Placement
from moeprune.parallel.rearrange import factor, figures, rearrange
from moeprune.parallel.restructure import agree, check_strategy, decide, prune
from moeprune.parallel.strategy import ExpertParallel
from moeprune.pruning.calibration import record
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner
from moeprune.pruning.trigger import LoadWindow, Progress, Trigger
from moeprune.training.module import MoELanguageModel, domain_losses

CALIBRATION_SEED_OFFSET = 1_000_003  # calibration batches are training text in an order that training does not use


class ExpertPruning(pl.Callback):
    """Watches the experts' loads during training and prunes when the trigger fires.

    Loads are summed over windows of `window` steps and over all ranks. After each step the trigger is asked; when it
    fires, the pruner plans from the last `evidence_windows` windows (and, where it reads more than loads, from calibration
    batches), the plan is applied to the model and its optimizer, and training goes on. Windows and events are rows of
    `loads.jsonl` and `events.jsonl` in the run's folder, and are part of every checkpoint.

    A gradual trigger prunes several times towards the numbers that the pruner wants at the first prune; each of them is a row
    of `events.jsonl`. A step prunes once at most. Where the router limits its choice to groups, every group keeps the same
    number.

    Under expert parallelism (docs/parallel.md) the experts that a prune leaves are placed anew, and between prunes as well
    where that is asked for; weights and optimizer state move, what the model computes does not change. Process 0 plans, and
    nothing is cut before all processes have compared a hash of the decision and of their own state.

    Args:
        pruner: what to prune with; null watches the loads only.
        trigger: when to prune; null never does.
        constraints: bounds that the plan obeys.
        window: optimizer steps per load window; enough to hold 20 000 tokens.
        evidence_windows: how many of the last windows the pruner sees.
        calibration_batches: batches of training text measured for a pruner that reads more than loads and weights.
        stop: when the trigger fires, save `trunk.ckpt` in the run's folder and end the run instead of pruning.
        placement: of the experts over the processes of an expert-parallel group. It needs equal numbers, so plans keep a
            multiple of ep_size; null keeps experts in their own order, in numbers that differ by one at most.
        rearrange_every: optimizer steps between looks at the loads of the last windows, at which `placement` is asked again;
            0 for after prunes only.
        rearrange_above: largest over mean load of a process above which a layer is then rearranged.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(
        self,
        pruner: Pruner | None = None,
        trigger: Trigger | None = None,
        constraints: Constraints = Constraints(),  # noqa: B008 (immutable)
        window: int = 20,
        evidence_windows: int = 2,
        calibration_batches: int = 8,
        stop: bool = False,
        placement: Placement | None = None,
        rearrange_every: int = 0,
        rearrange_above: float = 1.05,
    ) -> None:
        for name, value in (
            ("window", window),
            ("evidence_windows", evidence_windows),
            ("calibration_batches", calibration_batches),
        ):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if pruner is not None and trigger is None:
            raise UserError("pruning.pruner is set but pruning.trigger is not, so it would never prune; set a trigger")
        if rearrange_every < 0 or rearrange_above < 1:
            raise UserError(
                f"rearrange_every must be at least 0 and rearrange_above at least 1, got {rearrange_every} and {rearrange_above}"
            )
        if rearrange_every and placement is None:
            raise UserError("pruning.rearrange_every is set but pruning.placement is not; set one, lpt for example")
        self.placement, self.rearrange_every, self.rearrange_above = placement, rearrange_every, rearrange_above
        self.pruner, self.trigger, self.constraints = pruner, trigger, constraints
        self.window, self.evidence_windows, self.calibration_batches = window, evidence_windows, calibration_batches
        self.stop = stop
        self.events: list[dict[str, Any]] = []
        self._windows: list[LoadWindow] = []
        self._partial: ExpertLoad | None = None  # this rank's loads since the last complete window
        self._partial_state: list[torch.Tensor] | None = None  # the same, over all ranks, from a checkpoint
        self._tokens = 0
        self._metrics: dict[str, float] = {}
        self._target: list[list[int]] = []  # of a gradual prune: experts per layer before the first and after the last

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Windows, the unfinished window over all ranks, events; called on all ranks."""
        return {
            "events": self.events,
            "tokens": self._tokens,
            "metrics": self._metrics,
            "target": self._target,
            "partial": None if self._partial is None else [torch.from_numpy(count) for count in self._partial.totals()],
            "windows": [
                {"first": w.first, "last": w.last, "loads": [torch.from_numpy(np.asarray(x)) for x in w.loads]}
                for w in self._windows
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.events = list(state_dict["events"])
        self._tokens = state_dict["tokens"]
        self._metrics, self._target = dict(state_dict.get("metrics", {})), list(state_dict.get("target", []))
        self._partial_state = state_dict["partial"]
        self._windows = [
            LoadWindow(w["first"], w["last"], [loads.cpu().numpy() for loads in w["loads"]])
            for w in state_dict["windows"]
        ]

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is trained."""
        strategy = trainer.strategy
        if stage == "fit" and self.placement is not None and isinstance(strategy, ExpertParallel):
            together = math.lcm(self.constraints.multiple_of, strategy.ep_size)
            self.constraints = replace(self.constraints, multiple_of=together)
        check_strategy(trainer, stage == "fit" and self.trigger is not None)
        if stage != "fit" or self.trigger is None:
            return
        config = _module(pl_module).config
        for layer in range(config.n_layers):
            self.constraints.feasible(config.n_experts, config.top_k, layer=layer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files, dropping rows of steps that a killed run did not save; prune if it is due already."""
        module = _module(pl_module)
        self._partial = self._new_partial(module)
        if self._partial_state is not None:
            share = 1 if trainer.is_global_zero else 0  # it holds the sum over all ranks
            self._partial.update([share * count.to(module.device) for count in self._partial_state])
            self._partial_state = None
        if trainer.is_global_zero:
            folder = run_folder(trainer)
            self._loads_file = JsonLines(folder / "loads.jsonl", trainer.global_step)
            self._events_file = JsonLines(folder / "events.jsonl", trainer.global_step)
        if trainer.global_step == 0 or self.trigger is None:
            return
        if not self.events or self.events[-1]["step"] < trainer.global_step:
            self._ask(trainer, module)
        loop = trainer.fit_loop
        if loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            # the validation of a step runs after its checkpoint is written, and a resumed run does not repeat it
            self._keep_validation(trainer, module.validation_loss())

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count; close the window if it is full; ask the trigger once the optimizer has stepped."""
        module = _module(pl_module)
        assert self._partial is not None
        self._partial.update(outputs["counts"])
        self._tokens += batch[:, 1:].numel() * trainer.world_size
        if trainer.fit_loop._should_accumulate():
            return
        first = self._windows[-1].last if self._windows else (self.events[-1]["step"] if self.events else 0)
        if trainer.global_step - first >= self.window:
            loads = self._partial.totals()
            self._windows.append(LoadWindow(first, trainer.global_step, loads))
            self._partial = self._new_partial(module)
            self._log_window(trainer, module)
        self._ask(trainer, module)
        if self.rearrange_every and trainer.global_step % self.rearrange_every == 0:
            self._look_at_layout(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the loss for triggers."""
        if not trainer.sanity_checking and "val_loss" in trainer.callback_metrics:
            self._keep_validation(trainer, float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave complete files."""
        if trainer.is_global_zero:
            self._loads_file.flush()
            self._events_file.flush()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rows up to a checkpoint are on disk before it."""
        self.on_train_end(trainer, pl_module)

    # -- the prune -----------------------------------------------------------------------------------------------------

    def _ask(self, trainer: pl.Trainer, module: MoELanguageModel) -> None:
        if self.trigger is None:
            return
        progress = Progress(
            trainer.global_step,
            trainer.max_steps,
            module.warmup_steps,
            self._tokens,
            self._windows,
            len(self.events),
            self._metrics,
        )
        reason = self.trigger.fires(progress)
        if reason is None:
            return
        if self.stop:
            pl.utilities.rank_zero_info(f"step {trainer.global_step}: {reason}; the trunk ends here")
            if trainer.is_global_zero:
                self._events_file.append({"step": trainer.global_step, "reason": reason, "stop": True})
            self.trigger = None  # do not ask again while Lightning winds down
            trainer.should_stop = True
            save_checkpoint(trainer, "trunk.ckpt")
        elif self.pruner is not None:
            self._prune(trainer, module, reason)

    def _prune(self, trainer: pl.Trainer, module: MoELanguageModel, reason: str) -> None:
        assert self.pruner is not None
        step = trainer.global_step
        self.constraints = self.constraints.for_router(module.transformer.n_groups, module.transformer.min_experts)
        began = time.perf_counter()
        counts = self._recent_loads(trainer)
        plan = self._decide(trainer, module, counts)
        planned = time.perf_counter()
        layouts = self._layouts(module, plan, counts)
        own = [list(layer.ids) for layer in module.transformer.moe_layers]
        now = [[list(row) for row in d.layout.ranks] for d in _sharded(module)]
        state = [
            step,
            plan.to_dict(),
            own,
            now,
            [count.tolist() for count in counts],
            [layout.ranks for layout in layouts],
        ]
        agree(trainer, "the prune, or on the experts it starts from", state)
        before = self._validation(trainer, module)
        n_before = _n_parameters(module)
        cutting = time.perf_counter()
        prune(trainer, plan)
        cut = time.perf_counter()
        moved = self._move(trainer, module, layouts, _survivors(plan, counts))
        after = self._validation(trainer, module)
        module.plans = [*module.plans, plan]
        event = {
            "step": step,
            "reason": reason,
            "plan": plan.to_dict(),
            "parameters": {"before": n_before, "after": _n_parameters(module)},
            "val_loss": {
                "before": {domain: losses.tolist() for domain, losses in before.items()},
                "after": {domain: losses.tolist() for domain, losses in after.items()},
            },
            "seconds": {"plan": planned - began, "surgery": cut - cutting},
            **({"rearrangement": moved} if moved else {}),
        }
        self.events.append(event)
        self._windows = []
        self._partial = self._new_partial(module)
        if trainer.is_global_zero:
            self._events_file.append(event)
            self._events_file.flush()
        jump = _mean(after) - _mean(before)
        pl.utilities.rank_zero_info(
            f"step {step}: pruned ({reason}); validation loss {_mean(before):.4f} -> {_mean(after):.4f} ({jump:+.4f})\n{plan}"
        )

    @staticmethod
    def _validation(trainer: pl.Trainer, module: MoELanguageModel) -> dict[str, NDArray[np.float64]]:
        """Per domain the validation loss of each of its sequences, in order; batches are shared out. Collective."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = data.evaluation_batches("valid", trainer.global_rank, trainer.world_size)
        own = [domain_losses(module.transformer, [batch]) for batch in batches]
        dealt: list[Any] = [own]
        if trainer.world_size > 1:
            dealt = [None] * trainer.world_size
            dist.all_gather_object(dealt, own)
        return _joined(dealt)

    def _bounds(self, evidence: Evidence) -> Constraints:
        """The constraints of this prune: of a gradual one, they say how many experts each layer keeps this time."""
        assert self.pruner is not None
        assert self.trigger is not None
        share = self.trigger.share(len(self.events))
        if share >= 1 and not self._target:
            return self.constraints
        if not self._target:
            wanted = self.pruner.plan(evidence, self.constraints).n_kept
            self._target = [[len(layer.ids) for layer in evidence.layers], list(wanted)]
        numbers = [
            self.constraints.nearest_at_least(
                round(before - share * (before - after)), len(layer.ids), evidence.top_k, layer.n_original, index
            )
            for index, (before, after, layer) in enumerate(zip(*self._target, evidence.layers, strict=True))
        ]
        return replace(self.constraints, min_keep=numbers, max_keep=numbers)

    def _recent_loads(self, trainer: pl.Trainer) -> list[NDArray[np.int64]]:
        """Loads of the last windows and of the unfinished one, over all processes. Collective."""
        assert self._partial is not None
        recent = [window.loads for window in self._windows[-self.evidence_windows :]]
        unfinished = self._partial.totals()
        if any(count.any() for count in unfinished):
            recent.append(unfinished)
        if not recent:
            raise UserError(f"no loads were recorded before the prune at step {trainer.global_step}; prune later")
        return [np.sum(layer, axis=0) for layer in zip(*recent, strict=True)]

    def _decide(self, trainer: pl.Trainer, module: MoELanguageModel, counts: list[NDArray[np.int64]]) -> PrunePlan:
        """The plan that process 0 makes, on every process."""
        pruner = self.pruner
        assert pruner is not None

        def make() -> tuple[dict[str, Any], list[list[int]]]:
            evidence = self._evidence(trainer, module, counts)
            return pruner.plan(evidence, self._bounds(evidence)).made_by(pruner).to_dict(), self._target

        chosen, self._target = decide(trainer, make, whole=not pruner.needs <= {"counts"})
        return PrunePlan.from_dict(chosen)

    def _evidence(self, trainer: pl.Trainer, module: MoELanguageModel, counts: list[NDArray[np.int64]]) -> Evidence:
        """Loads, plus what calibration measures for this pruner."""
        assert self.pruner is not None
        provenance = {"step": trainer.global_step, "tokens": self._tokens, "source": "training loads"}
        layers = module.transformer.moe_layers
        checked = Evidence.from_counts(
            [count.tolist() for count in counts],
            module.config.top_k,
            [sorted(layer.ids) for layer in layers],
            [layer.n_original for layer in layers],
            provenance,
        )
        needs = self.pruner.needs
        if needs <= {"counts"}:
            return checked
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = data.training_batches(self.calibration_batches, data.seed + CALIBRATION_SEED_OFFSET)
        on_device = (batches.batch(i).to(module.device) for i in range(self.calibration_batches))
        return record(module.transformer, on_device, needs, {"counts": counts}, provenance)

    # -- the layout ----------------------------------------------------------------------------------------------------

    def _layouts(self, module: MoELanguageModel, plan: PrunePlan, counts: list[NDArray[np.int64]]) -> list[Layout]:
        """Where the survivors go; nowhere where all experts are on this process."""
        return [
            self._placed(loads, sharded.size)
            for sharded, loads in zip(_sharded(module), _survivors(plan, counts), strict=False)
        ]

    def _placed(self, loads: NDArray[np.int64], n_ranks: int) -> Layout:
        if self.placement is None:
            return Layout.contiguous(len(loads), n_ranks)
        return Layout.of(self.placement.place(loads, n_ranks))

    def _look_at_layout(self, trainer: pl.Trainer, module: MoELanguageModel) -> None:
        """Rearrange the layers whose loads are too uneven over the processes, where that helps."""
        assert self._partial is not None
        if not _sharded(module) or not (self._windows or any(count.any() for count in self._partial.totals())):
            return  # nothing counted since a prune, which placed the experts
        counts = self._recent_loads(trainer)
        layouts = []
        for sharded, loads in zip(_sharded(module), counts, strict=True):
            layout, now = sharded.layout, factor(loads, sharded.layout)
            if now > self.rearrange_above and len(loads) % sharded.size == 0:
                placed = self._placed(loads, sharded.size)
                layout = placed if factor(loads, placed) < now else layout
            layouts.append(layout)
        agree(
            trainer,
            "where experts go",
            [trainer.global_step, [count.tolist() for count in counts], [layout.ranks for layout in layouts]],
        )
        moved = self._move(trainer, module, layouts, counts)
        if trainer.is_global_zero:
            self._events_file.append({"step": trainer.global_step, "rearrangement": moved})

    def _move(
        self, trainer: pl.Trainer, module: MoELanguageModel, layouts: list[Layout], counts: list[NDArray[np.int64]]
    ) -> dict[str, Any]:
        """Carry layouts out; per layer the max-load factors on `counts` and what to compare them with, and the cost."""
        if not layouts:
            return {}
        layers, sharded = module.transformer.moe_layers, _sharded(module)
        before = [factor(loads, d.layout) for d, loads in zip(sharded, counts, strict=True)]
        began = time.perf_counter()
        moved = [
            rearrange(layer.experts, layout, trainer.optimizers) for layer, layout in zip(layers, layouts, strict=True)
        ]
        seconds = time.perf_counter() - began
        compared = [figures(loads, sharded[0].size) for loads in counts]
        return {
            "ranks": [[list(row) for row in layout.ranks] for layout in layouts],
            "moved": moved,
            "seconds": seconds,
            "before": before,
            "after": [factor(loads, layout) for layout, loads in zip(layouts, counts, strict=True)],
            **{name: [found[name] for found in compared] for name in compared[0]},
        }

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _keep_validation(self, trainer: pl.Trainer, loss: float | None) -> None:
        if loss is not None:
            self._metrics["val_loss"] = trainer.strategy.broadcast(loss)
            self._metrics["val_step"] = trainer.global_step

    @staticmethod
    def _new_partial(module: MoELanguageModel) -> ExpertLoad:
        return ExpertLoad([layer.n_experts for layer in module.transformer.moe_layers]).to(module.device)

    def _log_window(self, trainer: pl.Trainer, module: MoELanguageModel) -> None:
        window = self._windows[-1]
        metrics = [load_metrics(loads) for loads in window.loads]
        for name in metrics[0]:
            self._metrics[name] = float(np.mean([metric[name] for metric in metrics]))
            module.log(f"load/{name}", self._metrics[name], rank_zero_only=True)
        factors = [factor(loads, d.layout) for d, loads in zip(_sharded(module), window.loads, strict=False)]
        if factors:
            module.log("load/max_load_factor", float(np.mean(factors)), rank_zero_only=True)
        if trainer.is_global_zero:
            self._loads_file.append(
                {
                    "step": window.last,
                    "first": window.first,
                    "expert_ids": [list(layer.ids) for layer in module.transformer.moe_layers],
                    "loads": [loads.tolist() for loads in window.loads],
                    "metrics": metrics,
                    **({"max_load_factor": factors} if factors else {}),
                }
            )


def run_folder(trainer: pl.Trainer) -> Path:
    """Where a run's files go: the trainer's default_root_dir."""
    return Path(trainer.default_root_dir)


def save_checkpoint(trainer: pl.Trainer, name: str) -> None:
    """Save into the run's folder, whole or not at all. All ranks call it.

    A file is written beside and takes the name once it is on disk. A checkpoint in pieces goes into one of two folders
    (`.NAME.0`, `.NAME.1`), in turn, and the name is a link to the newer one.

    Raises:
        UserError: the disk is full; the checkpoint of that name, if there is one, is as it was.
    """
    path = run_folder(trainer) / name
    pieces = bool(getattr(trainer.strategy, "sharded_checkpoints", False))
    slots = [path.with_name(f".{name}.{i}") for i in range(2)]
    fresh = path.with_name(f".{name}.new")
    if pieces:
        fresh = slots[path.is_symlink() and path.readlink().name == slots[0].name]
    try:
        if trainer.is_global_zero:
            _remove(fresh)
            fresh.parent.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(fresh)
        if trainer.is_global_zero:
            with (fresh / "meta.pt" if pieces else fresh).open("rb+") as file:
                os.fsync(file.fileno())
            if pieces:
                link = path.with_name(f".{name}.new")
                _remove(link)
                link.symlink_to(fresh.name)
                if path.is_dir() and not path.is_symlink():  # a copy of a checkpoint; `fresh` is the first slot
                    _remove(slots[1])
                    path.replace(slots[1])
                link.replace(path)
            else:
                fresh.replace(path)
            for slot in slots:
                if slot != fresh:
                    with suppress(OSError):  # the new one is in place; the next save tries again
                        _remove(slot)
    except OSError as error:
        if trainer.is_global_zero:
            with suppress(OSError):
                _remove(fresh)
        raise UserError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; free space and resume from the one before"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _module(module: pl.LightningModule) -> MoELanguageModel:
    assert isinstance(module, MoELanguageModel)
    return module


def _sharded(module: MoELanguageModel) -> list[Sharded]:
    """Per layer where its experts live, under expert parallelism; none otherwise."""
    dispatchers = [layer.experts.dispatcher for layer in module.transformer.moe_layers]
    return [dispatcher for dispatcher in dispatchers if isinstance(dispatcher, Sharded)]


def _n_parameters(module: MoELanguageModel) -> int:
    """Of the whole model, wherever its experts live."""
    model = module.transformer
    of_experts = {id(p) for layer in model.moe_layers for p in layer.experts.parameters()}
    shared = sum(p.numel() for p in model.parameters() if id(p) not in of_experts)
    return shared + sum(
        math.prod(p.shape[1:]) * layer.n_experts for layer in model.moe_layers for p in layer.experts.parameters()
    )


def _survivors(plan: PrunePlan, counts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Loads of the experts that stay."""
    return [
        loads[[expert in set(kept) for expert in before]]
        for loads, before, kept in zip(counts, plan.before, plan.kept, strict=True)
    ]


def _joined(dealt: Sequence[Sequence[Mapping[str, NDArray[np.float64]]]]) -> dict[str, NDArray[np.float64]]:
    """Per domain the losses of batches that were dealt out in turn, [processes][batches], in their order."""
    parts: dict[str, list[NDArray[np.float64]]] = {}
    for turn in zip(*dealt, strict=True):
        for losses in turn:
            for domain, values in losses.items():
                parts.setdefault(domain, []).append(values)
    return {domain: np.concatenate(values) for domain, values in parts.items()}


def _mean(losses: dict[str, NDArray[np.float64]]) -> float:
    return float(np.mean([values.mean() for values in losses.values()]))
