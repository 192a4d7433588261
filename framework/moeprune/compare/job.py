"""One run of a comparison, in a process of its own: train (or go on training), then score, then write result.json.

With `train_on: false` a run prunes and measures instead: see prunes.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from functools import reduce
from pathlib import Path
from typing import Any

from moeprune.compare.spec import Comparison, job_folder
from moeprune.errors import UserError
from moeprune.files import locked, read_rows, write_text
from moeprune.pruning.plan import PrunePlan

TRUNK = "trunk"


def main(comparison: Comparison, folder: Path, name: str, threads: int) -> None:
    """Run the job `name`; what it prints goes to log.txt, why it failed to error.txt. Exits with 1 on failure."""
    place = job_folder(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    (place / "error.txt").unlink(missing_ok=True)
    with (place / "log.txt").open("a", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            import torch

            torch.set_num_threads(threads)
            with locked(place, f"the run {name!r} is still going on in another process; wait for it or stop it"):
                run(comparison, folder, name)
        except BaseException as error:
            traceback.print_exc()
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            write_text(place / "error.txt", message)
            sys.stdout.flush()
            raise SystemExit(1) from error


def run(comparison: Comparison, folder: Path, name: str) -> None:
    """Train and score. Continues where an earlier call stopped."""
    from moeprune import checkpoints
    from moeprune.compare import prunes

    place = job_folder(folder, name)
    if name == TRUNK:
        config = {**comparison.trunk, "pruning": {**comparison.trunk.get("pruning", {}), "stop": True}}
        _fit(comparison, folder, TRUNK, config, None)
        if not (place / "trunk.ckpt").exists():
            raise UserError(
                "the trunk's trigger never fired; give the trunk a trigger with a deadline, or train longer"
            )
        if not comparison.train_on:
            prunes.measure(comparison, folder)
        write_text(place / "result.json", json.dumps({"step": checkpoints.read(place / "trunk.ckpt").step}))
        return
    if not comparison.train_on:
        write_text(place / "result.json", json.dumps(prunes.prune(comparison, folder, name)))
        return
    variant = comparison.variants[name]
    if variant.start == "untrained":
        checkpoint = _untrained(built(comparison, folder, name))
    else:
        config, start = variant.config, None
        if variant.start == "trunk":
            start = job_folder(folder, TRUNK) / "trunk.ckpt"
            if "pruner" in (config.get("pruning") or {}):
                step = json.loads((start.parent / "result.json").read_text(encoding="utf-8"))["step"]
                trigger = {"class_path": "at_step", "init_args": {"step": step}}
                config = {**config, "pruning": {**config["pruning"], "trigger": trigger}}
        _fit(comparison, folder, name, config, start)
        checkpoint = checkpoints.read(place / "last.ckpt")
    write_text(place / "result.json", json.dumps(_measure(comparison, folder, name, checkpoint)))


def arguments(comparison: Comparison, folder: Path, place: Path, config: dict[str, Any]) -> list[str]:
    """Arguments of the training command line for a run in `place` that changes `config`."""
    import yaml

    write_text(place / "variant.yaml", yaml.safe_dump(config, sort_keys=False))
    return [
        *(f"--config={path}" for path in sorted((folder / "recipes").iterdir())),
        f"--config={place / 'variant.yaml'}",
        f"--trainer.default_root_dir={place}",
        "--trainer.enable_progress_bar=false",
        *comparison.options,
    ]


def _fit(comparison: Comparison, folder: Path, name: str, config: dict[str, Any], start: Path | None) -> None:
    from moeprune.training import cli

    place = job_folder(folder, name)
    if (place / "trunk.ckpt").exists():  # the trunk ended; only its result was missing
        return
    if (place / "last.ckpt").exists():
        start = place / "last.ckpt"
    else:  # what a run wrote that was stopped before its first checkpoint
        for rows in place.glob("*.jsonl"):
            rows.unlink()
    resume = [] if start is None else [f"--ckpt_path={start}"]
    cli.run(["fit", *arguments(comparison, folder, place, config), *resume])


def built(comparison: Comparison, folder: Path, name: str) -> Any:
    """Model and data of the run called `name`, without running anything."""
    from moeprune.training import cli

    config = dict(comparison.variants[name].config)
    config.pop("pruning", None)  # not needed, and its trigger is not known here
    with tempfile.TemporaryDirectory() as scratch:
        return cli.run(arguments(comparison, folder, Path(scratch), config), execute=False)


def _untrained(cli: Any) -> Any:
    from moeprune.checkpoints import Checkpoint
    from moeprune.training.module import initial_model

    store = cli.datamodule.store
    bias = store.log_unigrams() if cli.model.unigram_bias else None
    model = initial_model(cli.model.config, cli.model.init_seed, bias)
    ids = [list(layer.ids) for layer in model.moe_layers]
    return Checkpoint(cli.model.config, ids, model.state_dict(), [], store.tokenizer_json, cli.datamodule.describe())


def _measure(comparison: Comparison, folder: Path, name: str, checkpoint: Any) -> dict[str, Any]:
    """Everything about the finished model that results.json needs."""
    from moeprune.training.module import domain_losses

    place = job_folder(folder, name)
    model = checkpoint.model()
    losses = domain_losses(model, built(comparison, folder, name).datamodule.evaluation_batches("valid"))
    scores = {} if comparison.suite is None else scored(checkpoint, comparison, place)
    rows = read_rows(place / "history.jsonl")
    plan = None
    if checkpoint.plans:
        plan = "plan.json"
        _combined(checkpoint.plans).save(place / plan)
    return {
        "step": checkpoint.step,
        **sizes(model, model),
        "unpruned_parameters": unpruned_parameters(checkpoint.config),
        "val_loss": {domain: values.tolist() for domain, values in losses.items()},
        "scores": scores,
        "optimizer_bytes": _optimizer_bytes(place / "last.ckpt"),
        "peak_bytes": rows[-1]["peak_memory"] if rows else None,
        "plan": plan,
    }


def scored(source: Any, comparison: Comparison, place: Path, **how: Any) -> dict[str, Any]:
    """What the comparison's suite makes of a model in memory: see `headline`; everything else goes to `evaluation` in `place`."""
    from moeprune import registry
    from moeprune.evaluation.score import headline, save, score

    suite = registry.create("suite", comparison.suite or "")
    results = score(source, suite, comparison.limit, name=place.name, **how)
    save(results, place / "evaluation")
    return headline(results, suite)


def sizes(model: Any, module: Any) -> dict[str, Any]:
    """Parameters and experts.

    Args:
        model: a `PrunableModel`.
        module: the torch module that holds its parameters.
    """
    parameters = list(module.parameters())
    total = active = sum(p.numel() for p in parameters)
    for layer in model.moe_layers:
        expert = sum(p.numel() // p.shape[dim] for p, dim in layer.expert_parameters().values())
        active -= (layer.n_experts - model.top_k) * expert
    return {
        "parameters": total,
        "active_parameters": active,
        "experts_kept": [layer.n_experts for layer in model.moe_layers],
        "n_groups": model.n_groups,
        "weights_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def unpruned_parameters(config: Any) -> int:
    """Parameters of the model that `config` builds."""
    import torch

    from moeprune.model.transformer import MoETransformer

    with torch.device("meta"):
        return sum(p.numel() for p in MoETransformer(config).parameters())


def _combined(plans: list[PrunePlan]) -> PrunePlan:
    """Several prunes as one plan; the last of them where experts were merged."""
    return plans[-1] if any(plan.merges for plan in plans) else reduce(PrunePlan.then, plans)


def _optimizer_bytes(path: Path) -> int:
    from moeprune.checkpoints import read_lightning

    if not path.exists():
        return 0
    states = (state for optimizer in read_lightning(path)["optimizer_states"] for state in optimizer["state"].values())
    return sum(v.numel() * v.element_size() for state in states for v in state.values() if hasattr(v, "element_size"))
