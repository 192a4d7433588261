"""What goes wrong among several processes ends in a sentence, not in a hang, and the run goes on from its last checkpoint."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_expert_parallel import EP, assert_close, assert_equal_runs, command, errors, start
from test_training import BIAS, PRUNE, assert_same_state, fit, recipe  # noqa: F401  (a fixture)

from moeprune import checkpoints
from moeprune.files import read_rows

DDP = "--trainer.strategy=ddp"
SCRIPT = Path(__file__).with_name("faults_script.py")
SHORT = ["--data.domains=[sky]", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
EVALUATION = {"three": "--data.eval_sequences=40", "one": "--data.eval_sequences=4"}  # batches, for two processes
# One expert per token; expert 3 never chosen; a single expert left per layer, so that the second process holds none.
LONELY = [
    "--model.config.top_k=1",
    BIAS,
    "--model.config.router_options.renormalize=false",
    *PRUNE,
    "--pruning.constraints.max_keep=1",
    "--trainer.max_steps=14",
]
STOPPED = [
    "--trainer.strategy=moeprune.parallel.strategy.ExpertParallelStrategy",
    "--trainer.strategy.timeout=0:00:05",
]
SECONDS = 5


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What a single process makes of it."""
    import faults_script

    folder = tmp_path_factory.mktemp("single")
    for name, option in EVALUATION.items():
        assert fit(recipe, folder / name, *SHORT, option) == 0
    faults_script.dead_expert()
    try:
        assert fit(recipe, folder / "lonely", *LONELY) == 0
    finally:
        faults_script.restore()
    return folder


def run(jobs: list[dict[str, Any]], folder: Path, stops: bool) -> float:
    """The jobs on two processes, of which the second is lost in the last one; seconds until the first has noticed."""
    processes = start(jobs, 2, folder, SCRIPT)
    try:
        while processes[1].poll() is None and not (stops and state(processes[1].pid) == "T"):
            assert processes[0].poll() is None, errors(folder)
            time.sleep(0.05)
        lost = time.monotonic()
        assert processes[0].wait(60) == 1
        assert stops or processes[1].returncode == -signal.SIGKILL, errors(folder)
        return time.monotonic() - lost
    finally:
        for process in processes:
            process.kill()
            process.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def two(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two starts of two processes: what they survive, then one that is killed; its run resumed, then one that stops answering."""
    folder = tmp_path_factory.mktemp("two")
    jobs: list[dict[str, Any]] = [
        {"args": command(recipe, folder / name, 2, DDP, *SHORT, option)} for name, option in EVALUATION.items()
    ]
    jobs += [
        {"args": command(recipe, folder / f"batches-{name}", 2, option), "patch": "fewer_batches", "error": str(folder / f"batches-{name}")}
        for name, option in (("ddp", DDP), ("ep", EP))
    ]  # fmt: skip
    jobs += [
        {"args": command(recipe, folder / "disagree", 2, DDP, *PRUNE), "patch": "another_plan", "error": str(folder / "disagree")},
        {"args": command(recipe, folder / "lonely", 2, EP, *LONELY), "patch": "dead_expert"},
        {"args": command(recipe, folder / "straight", 2, DDP, *PRUNE)},
        {"args": command(recipe, folder / "killed", 2, DDP, *PRUNE), "patch": "killed_in_a_step"},
    ]  # fmt: skip
    last = folder / "killed" / "last.ckpt"
    more = [
        {"args": command(recipe, folder / "killed", 2, DDP, *PRUNE, f"--ckpt_path={last}")},
        {"args": command(recipe, folder / "stopped", 2, *STOPPED), "patch": "stops_answering"},
    ]
    seconds = [run(jobs, folder / "first", stops=False), run(more, folder / "second", stops=True)]
    (folder / "seconds").write_text(" ".join(map(str, seconds)))
    return folder


@pytest.mark.parametrize("name", EVALUATION)
def test_unequal_numbers_of_evaluation_batches_under_ddp(single: Path, two: Path, name: str) -> None:
    """Three batches for two processes, and one batch, so that the second process has none."""
    assert_equal_runs(single / name, two / name)
    assert len(read_rows(two / name / "validation.jsonl")) == 2


@pytest.mark.parametrize("name", ["ddp", "ep"])
def test_unequal_numbers_of_training_batches(two: Path, name: str) -> None:
    for rank in range(2):
        sentence = (two / f"batches-{name}.{rank}").read_text()
        assert "all processes train on the same number of batches; here one has 7 and another 20" in sentence
    assert not (two / f"batches-{name}" / "last.ckpt").exists()  # before the first step


def test_disagreement_under_ddp_is_detected_before_the_surgery(two: Path) -> None:
    for rank in range(2):
        sentence = (two / f"disagree.{rank}").read_text()
        assert sentence.startswith("at step 10 process 1 disagrees with process 0 on the prune")
    assert read_rows(two / "disagree" / "events.jsonl") == []
    assert checkpoints.read(two / "disagree" / "last.ckpt").step == 5


def test_dead_expert_and_a_process_without_experts(single: Path, two: Path) -> None:
    assert_equal_runs(single / "lonely", two / "lonely")
    for window in read_rows(two / "lonely" / "loads.jsonl"):
        for ids, loads in zip(window["expert_ids"], window["loads"], strict=True):
            assert 3 not in ids or loads[ids.index(3)] == 0
    last = checkpoints.read_lightning(two / "lonely" / "last.ckpt")
    assert last["expert_layout"] == [[[0], []]] * 2
    assert last["global_step"] == 14


def test_killed_in_a_step_under_ddp(two: Path) -> None:
    """The other process says so at once; resumed, the run ends with the bits of one that nobody killed."""
    text = (two / "first" / "err.0").read_text()
    assert "moeprune: another process of this run has ended or does not answer" in text, text[-3000:]
    assert f"Resume with --ckpt_path={two / 'killed' / 'last.ckpt'}" in text
    assert float((two / "seconds").read_text().split()[0]) < 20
    assert_same_state(two / "killed" / "last.ckpt", two / "straight" / "last.ckpt")
    assert len(read_rows(two / "killed" / "history.jsonl")) == 20


def test_a_process_that_stops_answering(recipe: Path, two: Path, tmp_path: Path) -> None:  # noqa: F811
    """After the strategy's time-out the other one gives up, with the same words; one process resumes the run."""
    text = (two / "second" / "err.0").read_text()
    assert "moeprune: another process of this run has ended or does not answer" in text, text[-3000:]
    assert SECONDS - 1 < float((two / "seconds").read_text().split()[1]) < SECONDS + 25
    last = two / "stopped" / "last.ckpt"
    assert checkpoints.read(last).step == 5
    assert fit(recipe, tmp_path / "resumed", f"--ckpt_path={last}") == 0
    assert fit(recipe, tmp_path / "straight") == 0
    assert_close(tmp_path / "straight" / "last.ckpt", tmp_path / "resumed" / "last.ckpt", 1e-5)
