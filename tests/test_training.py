"""Runs of the real command line on a tiny model: pruning in training, files, resume after SIGKILL, refusals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

from moeprune import Evidence, MoEConfig, MoETransformer, checkpoints, create
from moeprune.cli import main
from moeprune.errors import UserError
from moeprune.files import read_rows
from moeprune.model import transformer
from moeprune.pruning.trigger import Progress, Trigger
from moeprune.training.callbacks import LastCheckpoint
from moeprune.training.data import EvaluationBatches
from moeprune.training.expert_pruning import _joined, save_checkpoint
from moeprune.training.module import MoELanguageModel
from moeprune_plugins.balancers.global_batch import GlobalBatch

RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "data": {"vocab_size": 300, "seq_len": 16, "batch_size": 4, "eval_sequences": 4},
    "model": {
        "config": {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 8, "top_k": 2, "d_expert": 12},
        "warmup_steps": 3,
        "learning_rate": 0.02,
    },
    "pruning": {"window": 4, "evidence_windows": 1, "calibration_batches": 2},
    "checkpoint": {"every_n_steps": 5},
    "trainer": {
        "max_steps": 20,
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10,
    },
}
BIAS = "--model.config.router_options.selection_bias=true"
GRADUAL = [
    "--pruning.trigger=gradual",
    "--pruning.trigger.start=5",
    "--pruning.trigger.end=15",
    "--pruning.trigger.prunes=3",
]
PRUNE = ["--pruning.pruner=laep", "--pruning.pruner.beta=0.3", "--pruning.trigger=at_step", "--pruning.trigger.step=10"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "source": str(corpus)}}))
    return path


def fit(recipe: Path, folder: Path, *options: str) -> int:
    return main(["fit", f"--config={recipe}", f"--trainer.default_root_dir={folder}", *options])


@pytest.fixture(scope="module")
def straight(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that prunes at step 10 of 20 and never stops."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert fit(recipe, folder, *PRUNE) == 0
    return folder


def assert_same_state(a: Path, b: Path) -> None:
    """Bit-identical weights, optimizer state and schedule."""
    x, y = (checkpoints.read_lightning(path) for path in (a, b))
    assert x["global_step"] == y["global_step"]
    assert x["state_dict"].keys() == y["state_dict"].keys()
    for name in x["state_dict"]:
        assert torch.equal(x["state_dict"][name], y["state_dict"][name]), name
    for one, other in zip(x["optimizer_states"], y["optimizer_states"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        for index, state in one["state"].items():
            for key, value in state.items():
                assert torch.equal(value, other["state"][index][key]), (index, key)
    assert x["lr_schedulers"] == y["lr_schedulers"]


def test_prunes_and_goes_on(straight: Path) -> None:
    (event,) = read_rows(straight / "events.jsonl")
    assert event["step"] == 10
    plan = event["plan"]
    assert all(share < 0.3 for share in plan["removed_load"])
    assert sum(plan["num_experts_per_layer"]) < 16
    assert event["parameters"]["after"] < event["parameters"]["before"]
    assert set(event["val_loss"]["before"]) == {"sky", "code"}
    history = read_rows(straight / "history.jsonl")
    assert [row["step"] for row in history] == list(range(1, 21))
    assert history[-1]["loss"] < history[0]["loss"]
    validation = read_rows(straight / "validation.jsonl")
    assert [row["step"] for row in validation] == [10, 20]
    assert validation[1]["val_loss"] == pytest.approx(
        (validation[1]["val_loss/sky"] + validation[1]["val_loss/code"]) / 2
    )
    loads = read_rows(straight / "loads.jsonl")
    assert [row["step"] for row in loads] == [4, 8, 14, 18]
    assert all(sum(layer) == 2 * 4 * 4 * 16 for row in loads for layer in row["loads"])
    assert [len(layer) for layer in loads[-1]["loads"]] == plan["num_experts_per_layer"]
    model = checkpoints.read(straight / "last.ckpt").model()
    assert [list(layer.ids) for layer in model.moe_layers] == plan["kept"]
    assert model(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 300)


def test_evidence_is_the_window_before_the_prune(recipe: Path, straight: Path, tmp_path: Path) -> None:
    """Window of steps 5-8 plus the unfinished one of steps 9-10: the counts of a run that counts every step for itself."""
    assert fit(recipe, tmp_path / "steps", "--pruning.window=1", "--trainer.max_steps=10", "--model.decay=0") == 0
    steps = read_rows(tmp_path / "steps" / "loads.jsonl")
    counts = [np.sum([row["loads"][layer] for row in steps[4:10]], axis=0) for layer in range(2)]
    (event,) = read_rows(straight / "events.jsonl")
    for load, kept, share in zip(counts, event["plan"]["kept"], event["plan"]["removed_load"], strict=True):
        gone = [i for i in range(8) if i not in kept]
        assert share == pytest.approx(load[gone].sum() / load.sum(), abs=1e-12)
        expected = create("pruner", "laep", beta=0.3).plan(Evidence.from_counts([load.tolist()], 2))
        assert list(expected.kept[0]) == kept


def test_schedule_goes_on(straight: Path) -> None:
    rates = {row["step"]: row["learning_rate"] for row in read_rows(straight / "history.jsonl")}
    assert rates[9] == rates[10] == rates[11] == pytest.approx(0.02)
    assert rates[20] < rates[19] < rates[18] < 0.02


def test_optimizer_state_follows_the_survivors(recipe: Path, tmp_path: Path) -> None:
    """The moments of a kept expert just after the prune are those of the unpruned run at the same step."""
    options = ["--trainer.max_steps=10", "--checkpoint.every_n_steps=10", "--model.decay=0"]
    assert fit(recipe, tmp_path / "pruned", *PRUNE, *options) == 0
    assert fit(recipe, tmp_path / "whole", *options) == 0
    pruned, whole = (checkpoints.read_lightning(tmp_path / name / "last.ckpt") for name in ("pruned", "whole"))
    kept = pruned["moeprune"]["expert_ids"]
    names = [n for n in whole["state_dict"] if n != "model.cos" and not n.endswith("expert_ids")]
    order = [n for n in names if whole["state_dict"][n].ndim > 1] + [
        n for n in names if whole["state_dict"][n].ndim == 1
    ]
    compared = 0
    for index, name in enumerate(order):
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = (run["optimizer_states"][0]["state"][index][key] for run in (pruned, whole))
            if ".moe.router." in name or ".moe.experts." in name:
                ids = kept[int(name.split(".blocks.")[1].split(".")[0])]
                b = b[ids]
                compared += 1
            assert torch.equal(a, b), name
    assert compared == 2 * 2 * 3


def kill_at(recipe: Path, folder: Path, step: int, when: str, *options: str) -> None:
    """Run in a process of its own that kills itself with SIGKILL at the end of `step`, before or after the checkpoint."""
    script = f"""
import os, signal, sys
import pytorch_lightning as pl
from moeprune.training import callbacks
from moeprune.cli import main
save = callbacks.LastCheckpoint.on_train_batch_end
def hook(self, trainer, *args):
    if {when!r} == "after":
        save(self, trainer, *args)
    if trainer.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    if {when!r} == "before":
        save(self, trainer, *args)
callbacks.LastCheckpoint.on_train_batch_end = hook
sys.exit(main(sys.argv[1:]))
"""
    command = [
        sys.executable,
        "-c",
        script,
        "fit",
        f"--config={recipe}",
        f"--trainer.default_root_dir={folder}",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@pytest.mark.parametrize(("step", "when", "saved"), [(10, "before", 5), (10, "after", 10), (13, "after", 10)])
def test_killed_and_resumed_is_bit_identical(
    recipe: Path, straight: Path, tmp_path: Path, step: int, when: str, saved: int
) -> None:
    """Killed at the very step of the prune (its checkpoint written or not) and after it."""
    folder = tmp_path / "killed"
    kill_at(recipe, folder, step, when, *PRUNE)
    assert checkpoints.read(folder / "last.ckpt").step == saved
    torch.manual_seed(123)  # the resumed process has other random numbers
    np.random.seed(123)
    assert fit(recipe, folder, *PRUNE, f"--ckpt_path={folder / 'last.ckpt'}") == 0
    assert_same_state(folder / "last.ckpt", straight / "last.ckpt")
    names = ["history.jsonl", "loads.jsonl", "events.jsonl"]
    if (step, when) != (10, "after"):  # Lightning does not make up for a validation between checkpoint and kill
        names.append("validation.jsonl")
    for name in names:
        ours, theirs = read_rows(folder / name), read_rows(straight / name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [r["loss"] for r in read_rows(folder / "history.jsonl")] == [
        r["loss"] for r in read_rows(straight / "history.jsonl")
    ]


def test_trunk_then_variant_equals_one_run(recipe: Path, straight: Path, tmp_path: Path) -> None:
    """What `compare` does - stop at the trigger, save, go on in another run - changes no bit."""
    trigger = PRUNE[2:]
    assert fit(recipe, tmp_path / "trunk", *trigger, "--pruning.stop=true") == 0
    (event,) = read_rows(tmp_path / "trunk" / "events.jsonl")
    assert event["stop"]
    assert event["step"] == 10
    assert fit(recipe, tmp_path / "variant", *PRUNE, f"--ckpt_path={tmp_path / 'trunk' / 'trunk.ckpt'}") == 0
    assert_same_state(tmp_path / "variant" / "last.ckpt", straight / "last.ckpt")


def test_gradient_accumulation_counts_every_batch(recipe: Path, tmp_path: Path) -> None:
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=8", "--trainer.val_check_interval=16"]
    assert fit(recipe, tmp_path / "accumulated", *options) == 0
    for row in read_rows(tmp_path / "accumulated" / "loads.jsonl"):
        assert all(sum(layer) == 2 * 4 * 2 * 4 * 16 for layer in row["loads"])
    assert [row["step"] for row in read_rows(tmp_path / "accumulated" / "history.jsonl")] == list(range(1, 9))


def test_same_seed_same_run(recipe: Path, straight: Path, tmp_path: Path) -> None:
    assert fit(recipe, tmp_path / "again", *PRUNE) == 0
    assert_same_state(tmp_path / "again" / "last.ckpt", straight / "last.ckpt")


@pytest.mark.parametrize("pruner", ["taylor", "magnitude", "random", "frequency"])
def test_every_pruner_prunes_in_training(recipe: Path, tmp_path: Path, pruner: str) -> None:
    options = [f"--pruning.pruner={pruner}", "--pruning.pruner.ratio=0.5", *PRUNE[2:], "--trainer.max_steps=12"]
    assert fit(recipe, tmp_path / pruner, *options, "--model.balancers+=switch") == 0
    (event,) = read_rows(tmp_path / pruner / "events.jsonl")
    assert event["plan"]["num_experts_per_layer"] == [4, 4]


def test_validate_test_predict(
    recipe: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("validate", "test", "predict"):
        where = [f"--ckpt_path={straight / 'last.ckpt'}", f"--trainer.default_root_dir={tmp_path}"]
        assert main([command, f"--config={recipe}", *where]) == 0
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [p["domain"] for p in predictions] == ["code"] * 4 + ["sky"] * 4
    model = checkpoints.read(straight / "last.ckpt").model()
    tokens = torch.tensor([predictions[5]["tokens"]])
    with torch.no_grad():
        log_probs = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[0, :, 0]
    assert len(predictions[5]["log_probs"]) == len(predictions[5]["tokens"]) == 16
    assert log_probs.shape == (15,)
    assert all(value < 0 for value in predictions[5]["log_probs"])
    out = capsys.readouterr().out
    assert "val_loss/sky" in out
    assert "test_loss/code" in out


def test_folder_of_another_run_is_refused(recipe: Path, straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (straight / "history.jsonl").read_bytes()
    assert fit(recipe, straight) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "already holds a run" in error
    assert "--ckpt_path" in error
    assert (straight / "history.jsonl").read_bytes() == before


def test_checkpoint_of_another_config_is_refused(
    recipe: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--ckpt_path={straight / 'last.ckpt'}", "--model.config.d_model=32"]
    assert fit(recipe, tmp_path / "other", *options) == 2
    assert "d_model=16" in capsys.readouterr().err


def test_checkpoint_with_another_tokenizer_is_refused(
    recipe: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--config={recipe}", f"--ckpt_path={straight / 'last.ckpt'}", "--data.domains=[code]"]
    assert main(["validate", *options]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_checkpoint_of_another_run_does_not_overwrite_a_run(
    recipe: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "finished")
    before = (tmp_path / "finished" / "last.ckpt").read_bytes()
    assert fit(recipe, tmp_path / "finished", f"--ckpt_path={straight / 'last.ckpt'}") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "finished" / "last.ckpt").read_bytes() == before


def test_limited_validation_is_a_number(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe, tmp_path / "limited", "--trainer.limit_val_batches=1", "--trainer.max_steps=10") == 0
    (row,) = read_rows(tmp_path / "limited" / "validation.jsonl")
    assert row["val_loss"] > 0


def test_checkpoint_never_overrides_the_command_line(recipe: Path, straight: Path, tmp_path: Path) -> None:
    """Resumed from before the prune with another pruner: the command line's counts."""
    fit(recipe, tmp_path / "a", *PRUNE, "--trainer.max_steps=5")
    options = ["--pruning.pruner=random", "--pruning.pruner.ratio=0.75", *PRUNE[2:]]
    assert fit(recipe, tmp_path / "b", *options, f"--ckpt_path={tmp_path / 'a' / 'last.ckpt'}") == 0
    (event,) = read_rows(tmp_path / "b" / "events.jsonl")
    assert event["plan"]["num_experts_per_layer"] == [2, 2]
    saved = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert saved["pruning"]["pruner"]["class_path"].endswith("random")


def test_diverged_run_stops_with_a_sentence(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.learning_rate=1e30", "--trainer.gradient_clip_val=null", "--model.warmup_steps=0"]
    assert fit(recipe, tmp_path / "diverged", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "layer 0" in error
    assert "step" in error


def test_divergence_is_seen_with_frozen_routers() -> None:
    """In the experts then; nothing is to be seen where these are frozen too."""
    module = MoELanguageModel(MoEConfig(vocab_size=11, d_model=8, n_layers=2, n_heads=2, n_experts=3, d_expert=4))
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.model = model = MoETransformer(module.config)
    optimizer = torch.optim.SGD(model.parameters())
    for layer in model.moe_layers:
        layer.router.requires_grad_(False)
    model.logits(torch.arange(10)[None]).sum().backward()
    module.on_before_optimizer_step(optimizer)
    down: Any = model.moe_layers[1].experts.down
    down.grad.fill_(float("nan"))
    with pytest.raises(UserError, match="the gradient of layer 1 is not finite at step 0"):
        module.on_before_optimizer_step(optimizer)
    for layer in model.moe_layers:
        layer.zero_grad(set_to_none=True)
    module.on_before_optimizer_step(optimizer)


def test_recipes_build_on_their_base(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heir = tmp_path / "heir.yaml"
    heir.write_text(f"base: {os.path.relpath(recipe, tmp_path)}\npruning: {{pruner: laep, trigger: stable}}\n")
    with pytest.raises(SystemExit) as done:
        main(["fit", f"--config={heir}", "--pruning.pruner.alpha=0.4", "--print_config"])
    assert done.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["vocab_size"] == 300
    assert shown["pruning"]["pruner"]["init_args"]["alpha"] == 0.4


def test_prune_command(recipe: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One-shot pruning of a checkpoint that was pruned before; ids stay those of the original model."""
    out = tmp_path / "pruned"
    code = main(
        [
            "prune",
            f"--model={straight / 'last.ckpt'}",
            "--pruner=taylor",
            "--pruner.ratio=0.25",
            f"--output={out}",
            "--calibration_batches=3",
        ]
    )
    assert code == 0
    before, after = checkpoints.read(straight / "last.ckpt"), checkpoints.read(out)
    assert len(after.plans) == 2
    for one, other in zip(before.expert_ids, after.expert_ids, strict=True):
        assert set(other) < set(one)
        assert len(other) == len(one) - len(one) // 4
    assert json.loads((out / "config.json").read_text())["num_experts_per_layer"] == [len(i) for i in after.expert_ids]
    x = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(checkpoints.read(out).model()(x), after.model()(x))
    assert main(["prune", f"--model={out}", "--pruner=laep", f"--output={out}"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["evaluate", f"--model={out}", "--suite=offlin"]) == 2


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing more is saved."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, recipe: Path, folder: Path, step: int, *options: str) -> None:
    """Run until the end of `step`, its checkpoint included, but not what Lightning does after that."""
    save = LastCheckpoint.on_train_batch_end

    def hook(self: LastCheckpoint, trainer: Any, *args: Any) -> None:
        save(self, trainer, *args)
        if trainer.global_step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(LastCheckpoint, "on_train_batch_end", hook)
        with pytest.raises(Killed):
            fit(recipe, folder, *options)
    torch.manual_seed(123)  # the resumed run begins with other random numbers
    np.random.seed(123)


def assert_same_run(a: Path, b: Path) -> None:
    """The same bits at the end, the same losses and loads on the way, the same prunes."""
    assert_same_state(a / "last.ckpt", b / "last.ckpt")
    for name, keys in (
        ("history", ["step", "loss"]),
        ("loads", ["step", "loads"]),
        ("events", ["step", "reason", "plan"]),
    ):
        ours, theirs = read_rows(a / f"{name}.jsonl"), read_rows(b / f"{name}.jsonl")
        assert [[row[key] for key in keys] for row in ours] == [[row[key] for key in keys] for row in theirs], name


def kept(folder: Path) -> list[list[int]]:
    """Experts per layer after each prune."""
    return [event["plan"]["num_experts_per_layer"] for event in read_rows(folder / "events.jsonl")]


LAEP_BIASED = ["--pruning.pruner=laep", "--pruning.pruner.beta=0.3", BIAS, "--model.balancers+=loss_free"]


@pytest.fixture(scope="module")
def gradual(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prunes with LAEP at steps 5, 10 and 15, with a bias on the choice that moves after every step."""
    folder = tmp_path_factory.mktemp("runs") / "gradual"
    assert fit(recipe, folder, *LAEP_BIASED, *GRADUAL) == 0
    return folder


def test_gradual_laep_reaches_what_it_wanted_at_first(recipe: Path, gradual: Path, tmp_path: Path) -> None:
    """Its last numbers are those of a single prune at the first step; those between are on the cubic way there."""
    once = ["--pruning.trigger=at_step", "--pruning.trigger.step=5", "--trainer.max_steps=5", "--model.decay=0"]
    assert fit(recipe, tmp_path / "once", *LAEP_BIASED, *once) == 0
    (target,) = kept(tmp_path / "once")
    shares = [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1]
    assert kept(gradual) == [[round(8 - share * (8 - n)) for n in target] for share in shares]
    assert len({tuple(numbers) for numbers in kept(gradual)}) > 1
    events = read_rows(gradual / "events.jsonl")
    assert [event["step"] for event in events] == [5, 10, 15]
    assert [event["reason"][:12] for event in events] == ["prune 1 of 3", "prune 2 of 3", "prune 3 of 3"]
    for event, later in itertools.pairwise(events):
        assert event["plan"]["kept"] == later["plan"]["before"]
    saved = checkpoints.read(gradual / "last.ckpt")
    assert saved.expert_ids == events[-1]["plan"]["kept"]
    assert len(saved.plans) == 3


def test_gradual_with_a_ratio(recipe: Path, tmp_path: Path) -> None:
    options = ["--pruning.pruner=taylor", "--pruning.pruner.ratio=0.75", *GRADUAL, "--pruning.trigger.schedule=linear"]
    assert fit(recipe, tmp_path / "linear", *options) == 0
    assert kept(tmp_path / "linear") == [[6, 6], [4, 4], [2, 2]]
    options += ["--pruning.constraints.multiple_of=4", "--pruning.pruner.ratio=0.5"]
    assert fit(recipe, tmp_path / "multiples", *options) == 0
    assert kept(tmp_path / "multiples") == [[8, 8], [8, 8], [4, 4]]  # 6.7 and 5.3, raised to multiples; 4


def test_gradual_killed_between_prunes_is_bit_identical(recipe: Path, gradual: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    kill_at(recipe, folder, 12, "before", *LAEP_BIASED, *GRADUAL)
    assert checkpoints.read(folder / "last.ckpt").step == 10
    assert fit(recipe, folder, *LAEP_BIASED, *GRADUAL, f"--ckpt_path={folder / 'last.ckpt'}") == 0
    assert_same_run(folder, gradual)


@pytest.mark.parametrize("step", [9, 15])
def test_gradual_interrupted_is_bit_identical(
    recipe: Path, gradual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """In an unfinished window between prunes, and at the very step of one."""
    folder = tmp_path / "interrupted"
    interrupt_at(monkeypatch, recipe, folder, step, *LAEP_BIASED, *GRADUAL)
    assert fit(recipe, folder, *LAEP_BIASED, *GRADUAL, f"--ckpt_path={folder / 'last.ckpt'}") == 0
    assert_same_run(folder, gradual)


def test_selection_bias_follows_the_survivors(gradual: Path) -> None:
    """Cut with the experts, moved by steps of at most u less their mean."""
    saved = checkpoints.read(gradual / "last.ckpt")
    for index, ids in enumerate(saved.expert_ids):
        bias = saved.state[f"blocks.{index}.moe.router.selection_bias"]
        assert bias.shape == (len(ids),)
        assert 0 < bias.abs().max() <= 2e-3 * 20


class Due(Trigger):
    """Twice, as soon as it may from step 5 on."""

    def fires(self, progress: Progress) -> str | None:
        return "due" if progress.step >= 5 and progress.prunes < 2 else None


def test_a_step_prunes_once_whole_or_resumed(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--pruning.pruner=random", "--pruning.pruner.ratio=0.25", f"--pruning.trigger={__name__}.Due"]
    assert fit(recipe, tmp_path / "whole", *options) == 0
    assert [event["step"] for event in read_rows(tmp_path / "whole" / "events.jsonl")] == [5, 6]
    interrupt_at(monkeypatch, recipe, tmp_path / "resumed", 5, *options)
    assert fit(recipe, tmp_path / "resumed", *options, f"--ckpt_path={tmp_path / 'resumed' / 'last.ckpt'}") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_metric_of_a_validation_that_a_kill_swallowed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation of step 10, which decides at step 11, comes after its checkpoint: a resumed run makes up for it."""
    assert fit(recipe, tmp_path / "plain", "--trainer.val_check_interval=5") == 0
    losses = {row["step"]: row["val_loss"] for row in read_rows(tmp_path / "plain" / "validation.jsonl")}
    bound = (losses[5] + losses[10]) / 2
    assert losses[10] < bound < losses[5]
    options = [*PRUNE[:2], "--trainer.val_check_interval=5", "--pruning.trigger=metric"]
    options += ["--pruning.trigger.name=val_loss", f"--pruning.trigger.below={bound}"]
    assert fit(recipe, tmp_path / "whole", *options) == 0
    (event,) = read_rows(tmp_path / "whole" / "events.jsonl")
    assert event["step"] == 11
    assert event["reason"] == f"val_loss {losses[10]:.4g} is below {bound:g}"
    interrupt_at(monkeypatch, recipe, tmp_path / "resumed", 10, *options)
    assert fit(recipe, tmp_path / "resumed", *options, f"--ckpt_path={tmp_path / 'resumed' / 'last.ckpt'}") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_metric_of_the_loads_in_a_run(recipe: Path, straight: Path, tmp_path: Path) -> None:
    """Fires at the end of the first window after the warm-up whose inequality is above the bound."""
    rows = read_rows(straight / "loads.jsonl")[:2]
    means = [np.mean([layer["gini"] for layer in row["metrics"]]) for row in rows]
    options = [*PRUNE[:2], "--pruning.trigger=metric", "--pruning.trigger.name=gini"]
    bound = f"--pruning.trigger.above={min(means) - 0.01}"
    assert fit(recipe, tmp_path / "run", *options, bound) == 0
    assert [event["step"] for event in read_rows(tmp_path / "run" / "events.jsonl")] == [8]  # 0 to 4 is warm-up in part


def test_at_tokens_in_a_run(recipe: Path, tmp_path: Path) -> None:
    """64 tokens a step."""
    options = [*PRUNE[:2], "--pruning.trigger=at_tokens", "--pruning.trigger.tokens=400", "--trainer.max_steps=8"]
    assert fit(recipe, tmp_path / "run", *options) == 0
    assert [event["step"] for event in read_rows(tmp_path / "run" / "events.jsonl")] == [7]


BALANCERS = ["switch", "global_batch", "sequence_wise", "loss_free", "z_loss", "simbal"]


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_every_balancer_trains_through_a_prune(recipe: Path, tmp_path: Path, router: str) -> None:
    """All at once, on layers that LAEP has made unequal."""
    options = [f"--model.balancers+={name}" for name in BALANCERS]
    options += [f"--model.config.router={router}", *([BIAS] if router == "softmax" else [])]
    assert fit(recipe, tmp_path / "run", *options, *PRUNE, "--pruning.pruner.beta=[0.1,0.5]") == 0
    history = read_rows(tmp_path / "run" / "history.jsonl")
    assert history[-1]["loss"] < history[0]["loss"]
    ((first, second),) = kept(tmp_path / "run")
    assert second < first


@pytest.mark.parametrize("name", ["switch", "global_batch", "sequence_wise", "z_loss", "simbal"])
def test_balancing_loss_is_lower_for_it_and_logged(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Lower under a heavy coefficient than under 0, which logs it and changes nothing."""
    seen: list[float] = []
    log = MoELanguageModel.log

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.extend(float(args[1]) for key in args[:1] if key == f"balance/{name}")
        log(self, *args, **kwargs)

    monkeypatch.setattr(MoELanguageModel, "log", spy)
    short = ["--trainer.max_steps=12", "--model.decay=0"]
    heavy = [f"--model.balancers+={name}", "--model.balancers.coefficient=10"]
    assert fit(recipe, tmp_path / "heavy", *short, *heavy) == 0
    assert len(seen) == 12
    assert fit(recipe, tmp_path / "none", *short) == 0
    assert fit(recipe, tmp_path / "zero", *short, heavy[0], "--model.balancers.coefficient=0") == 0
    assert len(seen) == 24
    assert np.mean(seen[9:12]) < np.mean(seen[21:])
    assert_same_state(tmp_path / "zero" / "last.ckpt", tmp_path / "none" / "last.ckpt")


def test_loss_free_is_refused_before_the_first_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(recipe, tmp_path / "refused", "--model.balancers+=loss_free") == 2
    assert "with selection_bias: true" in capsys.readouterr().err
    assert read_rows(tmp_path / "refused" / "history.jsonl") == []


ALL_BALANCERS = [BIAS, *(f"--model.balancers+={name}" for name in BALANCERS)]


def test_activation_checkpointing_counts_nothing_twice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    options = [*ALL_BALANCERS, *PRUNE]
    assert fit(recipe, tmp_path / "without", *options) == 0
    assert not calls
    assert fit(recipe, tmp_path / "with", *options, "--model.activation_checkpointing=true") == 0
    assert len(calls) == 2 * 20  # each block of each step, and neither validation nor calibration
    ours, theirs = (read_rows(tmp_path / name / "history.jsonl") for name in ("with", "without"))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-6)
    ours, theirs = (read_rows(tmp_path / name / "loads.jsonl") for name in ("with", "without"))
    assert [row["loads"] for row in ours] == [row["loads"] for row in theirs]
    one, other = (checkpoints.read(tmp_path / name / "last.ckpt") for name in ("with", "without"))
    for name, value in one.state.items():
        torch.testing.assert_close(value, other.state[name], rtol=0, atol=1e-6)


def test_balancers_get_the_counts_of_all_micro_batches(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step the counts of both, those that the load windows saw; and global_batch weighs with them."""
    given, weighed = [], []
    after = GlobalBatch.after_step

    def spy_after(self: GlobalBatch, routers: Any, counts: Any) -> None:
        given.append([count.tolist() for count in counts])
        weighed.append([self._so_far[router].tolist() for router in routers])
        after(self, routers, counts)
        assert not self._so_far

    monkeypatch.setattr(GlobalBatch, "after_step", spy_after)
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=16", "--pruning.window=1"]
    options += [*PRUNE[:3], "--pruning.trigger.step=4", "--trainer.max_steps=8"]
    assert fit(recipe, tmp_path / "run", *options, *ALL_BALANCERS) == 0
    loads = [row["loads"] for row in read_rows(tmp_path / "run" / "loads.jsonl")]
    assert len(loads) == 8
    assert sum(loads[0][0]) == 2 * 2 * 4 * 16  # top-2 of 2 batches of 4 sequences
    assert len(loads[-1][0]) < 8  # pruned in between
    assert given == weighed == loads


class Disk:
    """What `save_checkpoint` needs of a trainer; a checkpoint is its number."""

    is_global_zero = True

    def __init__(self, folder: Path, pieces: bool) -> None:
        self.default_root_dir = str(folder)
        self.strategy = SimpleNamespace(sharded_checkpoints=pieces, barrier=lambda: None)
        self.pieces, self.path, self.number, self.broken = pieces, folder / "last.ckpt", 0, ""

    def save_checkpoint(self, path: Path) -> None:
        if self.pieces:
            path.mkdir()
            (path / "0.distcp").write_text("")
        if self.broken == "write":
            raise OSError(28, "No space left on device")
        self.number += 1
        (path / "meta.pt" if self.pieces else path).write_text(str(self.number))

    def save(self) -> None:
        save_checkpoint(self, "last.ckpt")  # type: ignore[arg-type]

    def read(self) -> int:
        return int((self.path / "meta.pt" if self.pieces else self.path).read_text())


@pytest.mark.parametrize("pieces", [False, True])
def test_a_checkpoint_that_has_its_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: bool) -> None:
    """Whatever fails: writing the next one, or removing the one before."""
    disk, remove = Disk(tmp_path, pieces), shutil.rmtree

    def rmtree(path: Path) -> None:
        if disk.broken == "remove":
            raise OSError(5, "Input/output error")
        remove(path)

    if not pieces:  # as left by a run that wrote pieces
        (tmp_path / ".last.ckpt.1").mkdir()
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for number in (1, 2, 3):
        disk.save()
        assert disk.read() == number
        disk.broken = "write"
        with pytest.raises(UserError, match=r"cannot write the checkpoint .*: No space left on device"):
            disk.save()
        assert disk.read() == number
        assert sum(path.name.startswith(".") for path in tmp_path.iterdir()) == pieces
        disk.broken = ""
    if not pieces:
        (tmp_path / ".last.ckpt.1").mkdir()
    disk.broken = "remove"
    disk.save()
    assert disk.read() == 4
    assert sum(path.name.startswith(".") for path in tmp_path.iterdir()) == 1 + pieces
    disk.broken = ""
    disk.save()
    assert disk.read() == 5
    assert sum(path.name.startswith(".") for path in tmp_path.iterdir()) == pieces


def test_a_checkpoint_in_pieces_takes_the_place_of_a_copy(tmp_path: Path) -> None:
    disk = Disk(tmp_path, True)
    disk.save()
    shutil.copytree(disk.path, tmp_path / "copy")
    disk.path.unlink()
    (tmp_path / "copy").replace(disk.path)
    disk.save()
    assert disk.read() == 2
    assert disk.path.is_symlink()
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_losses_of_shared_out_batches_are_joined_in_order(world: int) -> None:
    """7, 1 and 4 sequences in batches of 3, over any number of processes; here a sequence's loss is its first token."""
    tokens = {"a": np.arange(100, 115), "b": np.arange(200, 209), "c": np.arange(300, 312)}

    def losses(rank: int, of: int) -> list[dict[str, Any]]:
        batches = EvaluationBatches(tokens, 8, 3, 7, rank, of)  # type: ignore[arg-type]
        return [{batch["domain"]: batch["tokens"][:, 0].double().numpy()} for batch in batches]

    joined = _joined([losses(rank, world) for rank in range(world)])
    assert {domain: values.tolist() for domain, values in joined.items()} == {
        "a": list(range(100, 107)),
        "b": [200],
        "c": list(range(300, 304)),
    }
