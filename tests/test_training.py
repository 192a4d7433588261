"""Runs of the real command line on a tiny model: pruning in training, files, resume after SIGKILL, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moeprune import Evidence, checkpoints, create
from moeprune.cli import main
from moeprune.files import read_rows

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
    model = checkpoints.load(straight / "last.ckpt")
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
    model = checkpoints.load(straight / "last.ckpt")
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
        assert torch.equal(checkpoints.load(out)(x), after.model()(x))
    assert main(["prune", f"--model={out}", "--pruner=laep", f"--output={out}"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["evaluate", f"--model={out}", "--suite=offlin"]) == 2
