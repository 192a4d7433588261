"""Prunes a trunk's model in every way that a comparison names, without training on (`train_on: false`).

The model is measured once, at the end of the trunk: what all the pruners read, and its loss on the validation sequences. Each
variant plans from that, cuts a copy of the model and measures its loss on the same sequences. Plans and losses are those of
runs that prune there and train on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from moeprune import checkpoints
from moeprune.compare.job import TRUNK, arguments, sizes, unpruned_parameters
from moeprune.compare.spec import Comparison, job_folder
from moeprune.errors import UserError
from moeprune.files import read_json, write_text
from moeprune.model.transformer import MoETransformer
from moeprune.pruning import store
from moeprune.pruning.calibration import HELD_OUT, record
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Pruner
from moeprune.pruning.surgery import apply_plan
from moeprune.training import cli
from moeprune.training.expert_pruning import CALIBRATION_SEED_OFFSET, ExpertPruning
from moeprune.training.module import domain_losses

Losses = dict[str, list[float]]  # domain -> one loss per sequence


def measure(comparison: Comparison, folder: Path) -> None:
    """Save what all variants need of the trunk's model: `evidence` and `val_loss.json` in the trunk's folder."""
    trunk = _Trunk(comparison, folder, job_folder(folder, TRUNK), comparison.trunk)
    needs = frozenset[str]().union(*(pruner.needs for pruner in _pruners(comparison)))
    store.save(trunk.measured(needs - store.LIVE | {"counts"}), trunk.place / "evidence", overwrite=True)
    write_text(trunk.place / "val_loss.json", json.dumps(trunk.losses(trunk.model)))


def prune(comparison: Comparison, folder: Path, name: str) -> dict[str, Any]:
    """Prune as the variant `name` says and measure at once; writes `events.jsonl` and `plan.json`.

    Returns:
        What results.json needs.

    Raises:
        UserError: see `Pruner.plan`.
    """
    config = dict(comparison.trunk)
    config["pruning"] = {**config.get("pruning", {}), **comparison.variants[name].config.get("pruning", {})}
    trunk = _Trunk(comparison, folder, job_folder(folder, name), config)
    before: Losses = read_json(job_folder(folder, TRUNK) / "val_loss.json", "validation losses")
    model, after, pruner = trunk.model, before, trunk.pruning.pruner
    n_before = sum(parameter.numel() for parameter in model.parameters())
    if pruner is not None:
        constraints = trunk.pruning.constraints.for_model(model)
        plan = pruner.plan(trunk.evidence(pruner), constraints).made_by(pruner)
        apply_plan(model, plan)
        after = trunk.losses(model)
        plan.save(trunk.place / "plan.json")
        event = {
            "step": trunk.checkpoint.step,
            "reason": "the trunk's end",
            "plan": plan.to_dict(),
            "parameters": {"before": n_before, "after": sum(parameter.numel() for parameter in model.parameters())},
            "val_loss": {"before": before, "after": after},
        }
        write_text(trunk.place / "events.jsonl", json.dumps(event) + "\n")
    return {
        "step": trunk.checkpoint.step,
        **sizes(model, model),
        "unpruned_parameters": unpruned_parameters(trunk.checkpoint.config),
        "val_loss": after,
        "scores": {},
        "optimizer_bytes": None,
        "peak_bytes": None,
        "plan": None if pruner is None else "plan.json",
    }


class _Trunk:
    """The trunk's end, and the pruning that a configuration asks for there.

    Args:
        comparison: what is compared.
        folder: where.
        place: folder of the run.
        config: lines of the recipe that change.
    """

    def __init__(self, comparison: Comparison, folder: Path, place: Path, config: dict[str, Any]) -> None:
        self.place, self._shared = place, job_folder(folder, TRUNK)
        made = cli.run(arguments(comparison, folder, place, config), execute=False)
        self.data = made.datamodule
        self.pruning = next(each for each in made.trainer.callbacks if isinstance(each, ExpertPruning))  # type: ignore[attr-defined]
        self.checkpoint = checkpoints.read(self._shared / "trunk.ckpt")

    @cached_property
    def model(self) -> MoETransformer:
        return self.checkpoint.model()

    def losses(self, model: MoETransformer) -> Losses:
        found = domain_losses(model, self.data.evaluation_batches("valid"))
        return {domain: losses.tolist() for domain, losses in found.items()}

    def measured(self, needs: frozenset[str]) -> Evidence:
        """Loads of the trunk's last windows, and what calibration measures: as `ExpertPruning` at this step."""
        state = checkpoints.read_lightning(self._shared / "trunk.ckpt")["callbacks"][self.pruning.state_key]
        recent: list[list[Tensor]] = [w["loads"] for w in state["windows"][-self.pruning.evidence_windows :]]
        if any(count.any() for count in state["partial"] or ()):
            recent.append(state["partial"])
        if not recent:
            raise UserError("no loads were recorded before the trunk's end; let its trigger fire later")
        counts = [sum(layers[1:], layers[0]).numpy() for layers in zip(*recent, strict=True)]
        provenance = {"step": self.checkpoint.step, "tokens": state["tokens"], "source": "training loads"}
        return record(
            self.model, self._batches(self.pruning.calibration_batches), needs, {"counts": counts}, provenance
        )

    def evidence(self, pruner: Pruner) -> Evidence:
        """The shared measurement; what only a live model has is added."""
        saved = store.load(self._shared / "evidence", pruner.needs)
        live = pruner.needs & store.LIVE
        if not live:
            return saved
        known = {name: [layer.stats[name] for layer in saved.layers] for name in saved.layers[0].stats}
        n = min(HELD_OUT, self.pruning.calibration_batches)
        return record(self.model, self._batches(n), live, known, saved.provenance)

    def _batches(self, n: int) -> Iterable[Tensor]:
        batches = self.data.training_batches(n, self.data.seed + CALIBRATION_SEED_OFFSET)
        return (batches.batch(i) for i in range(n))


def _pruners(comparison: Comparison) -> list[Pruner]:
    """The pruners of the variants. One that cannot be made is left out: its own run says why."""
    from moeprune import names

    for problem in names.install(*cli.KINDS):
        print(f"moeprune: left out: {problem}", file=sys.stderr)
    parser = cli.Parser()
    parser.add_argument("--pruner", type=Pruner)
    made = []
    for variant in [comparison.trunk, *(variant.config for variant in comparison.variants.values())]:
        given = (variant.get("pruning") or {}).get("pruner")
        if given is not None:
            try:
                made.append(parser.instantiate_classes(parser.parse_object({"pruner": given})).pruner)
            except UserError as error:
                print(f"moeprune: {error}", file=sys.stderr)
    return made
