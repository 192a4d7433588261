"""Two gloo processes under DDP: the same run as one process, prune included, and the same bits after a kill."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import BIAS, GRADUAL, PRUNE, assert_same_state, fit, recipe  # noqa: F401  (a fixture)

from moeprune import checkpoints
from moeprune.files import read_rows

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
# Kills this rank at the end of a step, before the checkpoint of that step is written.
KILL = """
import os, signal, sys
from moeprune.training import callbacks
from moeprune.cli import main
save = callbacks.LastCheckpoint.on_train_batch_end
def hook(self, trainer, *args):
    if trainer.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, trainer, *args)
callbacks.LastCheckpoint.on_train_batch_end = hook
if __name__ == "__main__":
    sys.exit(main())
"""


def run(arguments: list[str], script: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`moeprune <arguments>` in processes of its own."""
    start = [sys.executable, *(["-m", "moeprune"] if script is None else [str(script)])]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=300, check=False)


def command(recipe: Path, folder: Path, *options: str) -> list[str]:  # noqa: F811
    return ["fit", f"--config={recipe}", f"--trainer.default_root_dir={folder}", *PRUNE, *DDP, *options]


@pytest.fixture(scope="module")
def two(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("ddp") / "two"
    done = run(command(recipe, folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_equals_one_process(recipe: Path, two: Path, tmp_path: Path) -> None:  # noqa: F811
    assert fit(recipe, tmp_path / "one", *PRUNE) == 0
    one, both = (checkpoints.read(folder / "last.ckpt") for folder in (tmp_path / "one", two))
    assert one.expert_ids == both.expert_ids
    for name, value in one.state.items():
        torch.testing.assert_close(both.state[name], value, rtol=0, atol=1e-5)
    loads = [read_rows(folder / "loads.jsonl") for folder in (tmp_path / "one", two)]
    assert [row["loads"] for row in loads[0][:2]] == [
        row["loads"] for row in loads[1][:2]
    ]  # counts are summed over ranks
    assert len(read_rows(two / "history.jsonl")) == 20
    (event,), (expected,) = (read_rows(folder / "events.jsonl") for folder in (two, tmp_path / "one"))
    for when, losses in expected["val_loss"].items():  # each rank evaluated one of the two domains
        assert list(event["val_loss"][when]) == list(losses)
        for domain, values in losses.items():
            assert event["val_loss"][when][domain] == pytest.approx(values, abs=1e-5)
    losses = [read_rows(folder / "validation.jsonl") for folder in (tmp_path / "one", two)]
    assert len(losses[0]) == 2
    for row, expected in zip(*losses, strict=True):  # a domain is one batch here, so each rank evaluates one of the two
        assert row == pytest.approx(expected, abs=1e-5)
        assert abs(row["val_loss/sky"] - row["val_loss/code"]) > 1e-3


def test_balancers_over_all_ranks_equal_one_process(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """Counts of both ranks in f and in the bias, nothing counted twice, equal decisions at two prunes."""
    options = ["--pruning.pruner=laep", "--pruning.pruner.beta=0.3", BIAS, "--trainer.max_steps=10"]
    options += [*GRADUAL[:1], "--pruning.trigger.start=3", "--pruning.trigger.end=6", "--pruning.trigger.prunes=2"]
    options += ["--model.balancers+=global_batch", "--model.balancers.coefficient=1"]
    options += ["--model.balancers+=loss_free", "--model.balancers.u=0.01", "--pruning.window=2"]
    where = ["fit", f"--config={recipe}", f"--trainer.default_root_dir={tmp_path / 'two'}"]
    done = run([*where, *options, *DDP])
    assert done.returncode == 0, done.stderr[-3000:]
    assert fit(recipe, tmp_path / "one", *options) == 0
    one, both = (checkpoints.read(tmp_path / name / "last.ckpt") for name in ("one", "two"))
    assert one.expert_ids == both.expert_ids
    for name, value in one.state.items():
        torch.testing.assert_close(both.state[name], value, rtol=0, atol=1e-5)
    loads = [[row["loads"] for row in read_rows(tmp_path / name / "loads.jsonl")] for name in ("one", "two")]
    assert loads[0] == loads[1]


@pytest.mark.parametrize("step", [10, 13])
def test_killed_and_resumed_is_bit_identical(recipe: Path, two: Path, tmp_path: Path, step: int) -> None:  # noqa: F811
    """Killed at the very step of the prune (resumes before it) and after it."""
    script, folder = tmp_path / "kill.py", tmp_path / "killed"
    script.write_text(KILL.format(step=step))
    done = run(command(recipe, folder), script)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGTERM), done.stderr[-3000:]
    assert checkpoints.read(folder / "last.ckpt").step == (5 if step == 10 else 10)
    done = run(command(recipe, folder, f"--ckpt_path={folder / 'last.ckpt'}"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_state(folder / "last.ckpt", two / "last.ckpt")


def test_load_metrics_under_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("ddp_script.py")
    done = subprocess.run([sys.executable, str(script), port], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_unsupported_strategy_is_refused() -> None:
    from moeprune.errors import UserError
    from moeprune.parallel.restructure import check_strategy

    class Trainer:
        strategy = object()

    with pytest.raises(UserError, match="ddp"):
        check_strategy(Trainer())  # type: ignore[arg-type]
