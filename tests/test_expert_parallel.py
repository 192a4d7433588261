"""Expert parallelism over 2 and 4 gloo processes: the run of one process, whatever is pruned, merged, moved or resumed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.plugins.precision import MixedPrecision
from test_training import BIAS, PRUNE, assert_same_state, fit, recipe  # noqa: F401  (a fixture)

from moeprune import checkpoints
from moeprune.cli import main
from moeprune.errors import UserError
from moeprune.files import read_rows
from moeprune.parallel.layout import Layout
from moeprune.parallel.placement import lower_bound
from moeprune.parallel.rearrange import factor, figures
from moeprune.parallel.strategy import ExpertParallelStrategy
from moeprune.training.expert_pruning import ExpertPruning

SCRIPT = Path(__file__).with_name("ep_script.py")
EP = "--trainer.strategy=ep"
REPLICAS = [
    "--trainer.strategy=moeprune.parallel.strategy.ExpertParallelStrategy",
    "--trainer.strategy.ep_size=2",
]
LPT = "--pruning.placement=moeprune_plugins.placements.lpt.LPT"
HARD = ["--pruning.pruner=frequency", "--pruning.pruner.ratio=0.7", *PRUNE[2:]]  # 3 of 8 experts stay
VARIANTS: dict[str, list[str]] = {
    "prune": PRUNE,
    "rearrange": [*PRUNE, "--pruning.constraints.multiple_of=2"],
    "accumulate": [*HARD, "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.05"],
    "merge": [
        *("--pruning.pruner=m_smoe", "--pruning.pruner.ratio=0.4", *PRUNE[2:], "--trainer.max_steps=12", BIAS),
        *("--model.balancers+=global_batch", "--model.balancers.coefficient=1"),
        *("--model.balancers+=loss_free", "--model.balancers.u=0.01", "--trainer.accumulate_grad_batches=2"),
    ],
    "calibrate": [
        *("--pruning.pruner=reap", "--pruning.pruner.ratio=0.4", *PRUNE[2:], "--trainer.max_steps=12"),
        "--model.activation_checkpointing=true",
    ],
}
# Three validation batches for two processes, five for four.
UNEVEN = ["--data.domains=[sky]", "--data.eval_sequences=40", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
MORE = {"rearrange": [LPT, "--pruning.rearrange_every=3", "--pruning.rearrange_above=1.0"]}  # under `ep` only


def start(jobs: list[dict[str, Any]], world: int, folder: Path, script: Path = SCRIPT) -> list[subprocess.Popen[str]]:
    """One process per rank, as SLURM or torchrun would; they do the jobs one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "jobs.json")],
            env={**os.environ, **common, "LOCAL_RANK": str(rank)},
            stdout=(folder / f"out.{rank}").open("w"),
            stderr=(folder / f"err.{rank}").open("w"),
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], folder: Path, timeout: float = 240) -> None:
    """All end well, or none goes on."""
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            assert not any(process.poll() for process in processes), errors(folder)
            assert time.monotonic() < end, f"still running\n{errors(folder)}"
            time.sleep(0.1)
        assert not any(process.returncode for process in processes), errors(folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def errors(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("err.*")))


def command(recipe: Path, folder: Path, world: int, *options: str) -> list[str]:  # noqa: F811
    at = [f"--config={recipe}", f"--trainer.default_root_dir={folder}", f"--trainer.devices={world}"]
    return ["fit", *at, *options]


def assert_close(a: Path, b: Path, tolerance: float) -> float:
    """Same experts, weights and optimizer state up to `tolerance`; returns the largest difference of a weight."""
    x, y = (checkpoints.read_lightning(path) for path in (a, b))
    assert x["global_step"] == y["global_step"]
    assert x["moeprune"]["expert_ids"] == y["moeprune"]["expert_ids"]
    assert list(x["state_dict"]) == list(y["state_dict"])
    worst = 0.0
    for name, value in x["state_dict"].items():
        torch.testing.assert_close(
            y["state_dict"][name], value, rtol=1e-6, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
        worst = max(worst, float((y["state_dict"][name] - value).abs().max()))
    for one, other in zip(x["optimizer_states"], y["optimizer_states"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        for number, state in one["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(other["state"][number][key], value, rtol=1e-3, atol=tolerance)
    return worst


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("single")
    for name, options in {**VARIANTS, "uneven": UNEVEN}.items():
        assert fit(recipe, folder / name, *options) == 0
    return folder


@pytest.fixture(scope="module")
def two(recipe: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Everything that two processes have to show, in one start."""
    folder = tmp_path_factory.mktemp("two")
    jobs: list[dict[str, Any]] = [{"call": "experts_over_processes"}]
    jobs += [
        {"args": command(recipe, folder / name, 2, EP, *options, *MORE.get(name, [])), "patch": "keep_every_checkpoint"}
        for name, options in VARIANTS.items()
    ]
    jobs += [
        {
            "args": command(
                recipe, folder / f"{name}-{step}", 2, EP, *VARIANTS[name], *MORE.get(name, []),
                f"--ckpt_path={folder / name / f'step-{step}.ckpt'}",
            )
        }
        for name, step in (("prune", 5), ("prune", 10), ("prune", 15), ("rearrange", 10), ("rearrange", 15))
    ]  # fmt: skip
    jobs.append({"args": command(recipe, folder / "uneven", 2, EP, *UNEVEN)})
    for verb in ("validate", "test", "predict"):
        path = single / "uneven" / "last.ckpt"
        args = [verb, *command(recipe, folder / verb, 2, EP, f"--ckpt_path={path}", *UNEVEN)[1:]]
        jobs.append({"args": args, "metrics": str(folder / f"{verb}.json")})
    jobs += [
        {"args": command(recipe, folder / "disagree", 2, EP, *PRUNE), "patch": "another_plan", "error": str(folder / "disagree")},
        {"args": command(recipe, folder / "third", 2, REPLICAS[0], "--trainer.strategy.ep_size=3"), "error": str(folder / "third")},
    ]  # fmt: skip
    finish(start(jobs, 2, folder), folder)
    return folder


def assert_equal_runs(one: Path, other: Path) -> None:
    """Of one process and of several: weights, optimizer, losses, loads, and the decision at the prune."""
    assert_close(one / "last.ckpt", other / "last.ckpt", 1e-5)
    loads = [read_rows(folder / "loads.jsonl") for folder in (one, other)]
    assert [row["step"] for row in loads[0]] == [row["step"] for row in loads[1]]
    assert all(a["loads"] == b["loads"] for a, b in zip(*loads, strict=True) if a["step"] <= 10)
    validation = [read_rows(folder / "validation.jsonl") for folder in (one, other)]
    for row, expected in zip(*validation, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    events = [[row for row in read_rows(folder / "events.jsonl") if "plan" in row] for folder in (one, other)]
    for a, b in zip(*events, strict=True):
        assert a["plan"]["kept"] == b["plan"]["kept"]
        assert a["parameters"] == b["parameters"]
        for when in ("before", "after"):
            for domain, losses in a["val_loss"][when].items():
                assert b["val_loss"][when][domain] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_one_process(single: Path, two: Path, name: str) -> None:
    assert_equal_runs(single / name, two / name)
    assert len(read_rows(two / name / "history.jsonl")) == len(read_rows(single / name / "history.jsonl"))
    a, b = (checkpoints.read_lightning(folder / name / "last.ckpt") for folder in (single, two))
    assert set(b) == {*a, "expert_layout"}  # the rest as a single process would save it
    assert a["moeprune"].keys() == b["moeprune"].keys()
    assert {k: (v.shape, v.dtype) for k, v in a["state_dict"].items()} == {
        k: (v.shape, v.dtype) for k, v in b["state_dict"].items()
    }
    model = checkpoints.read(two / name / "last.ckpt").model()  # as evaluate and prune read it
    tokens = torch.arange(17)[None]
    torch.testing.assert_close(
        model(tokens[:, :16]), checkpoints.read(single / name / "last.ckpt").model()(tokens[:, :16]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "step"), [("prune", 5), ("prune", 10), ("prune", 15), ("rearrange", 10), ("rearrange", 15)]
)
def test_resumed_is_bit_identical(two: Path, name: str, step: int) -> None:
    """Before, at and after the prune; with the layout that a rearrangement had left."""
    resumed = two / f"{name}-{step}"
    assert_same_state(resumed / "last.ckpt", two / name / "last.ckpt")
    layouts = [checkpoints.read_lightning(folder / "last.ckpt")["expert_layout"] for folder in (resumed, two / name)]
    assert layouts[0] == layouts[1]


def test_resumed_by_one_process(recipe: Path, two: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("prune", "rearrange"):
        start_at = two / name / "step-15.ckpt"
        assert fit(recipe, tmp_path / name, *VARIANTS[name], f"--ckpt_path={start_at}") == 0
        assert_close(tmp_path / name / "last.ckpt", two / name / "last.ckpt", 1e-6)


def test_contiguous_uneven_counts_by_default(two: Path) -> None:
    layout = checkpoints.read_lightning(two / "prune" / "last.ckpt")["expert_layout"]
    assert layout == [[[0, 1, 2], [3, 4]]] * 2
    (event,) = read_rows(two / "prune" / "events.jsonl")
    assert event["rearrangement"]["ranks"] == layout


def test_rearrangements(two: Path) -> None:
    """After the prune by its loads, and every third step where it helps; what is written is what the loads say."""
    rows = read_rows(two / "rearrange" / "events.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 10, 12, 15, 18]
    assert any(sum(row["rearrangement"]["moved"]) for row in rows if "plan" not in row)
    final = checkpoints.read_lightning(two / "rearrange" / "last.ckpt")["expert_layout"]
    assert rows[-1]["rearrangement"]["ranks"] == final
    for row in rows:
        it = row["rearrangement"]
        for layer in range(2):
            assert it["lower_bound"][layer] <= it["after"][layer] + 1e-9
            assert "plan" in row or it["after"][layer] <= it["before"][layer]
            assert {len(ranks) for ranks in it["ranks"][layer]} == {sum(map(len, it["ranks"][layer])) // 2}
            assert it["moved"][layer] or it["after"][layer] == it["before"][layer]
    by_step = {row["step"]: row for row in rows}
    windows = {row["step"]: row for row in read_rows(two / "rearrange" / "loads.jsonl")}
    for layer, loads in enumerate(windows[4]["loads"]):  # counted under the layout of step 3
        layout = Layout.of(by_step[3]["rearrangement"]["ranks"][layer])
        heaviest = max(sum(loads[i] for i in row) for row in layout.ranks)
        assert windows[4]["max_load_factor"][layer] == pytest.approx(2 * heaviest / sum(loads))


def test_unequal_numbers_of_evaluation_batches(recipe: Path, single: Path, two: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_equal_runs(single / "uneven", two / "uneven")
    expected = read_rows(single / "uneven" / "validation.jsonl")[-1]
    found = json.loads((two / "validate.json").read_text())
    assert found == pytest.approx({name: loss for name, loss in expected.items() if name != "step"}, abs=1e-5)
    assert json.loads((two / "test.json").read_text())["test_loss"] > 0
    options = [f"--ckpt_path={single / 'uneven' / 'last.ckpt'}", *UNEVEN]
    assert main(["predict", *command(recipe, tmp_path, 1, *options)[1:]]) == 0
    whole = read_rows(tmp_path / "predictions.jsonl")
    parts = [row for rank in range(2) for row in read_rows(two / "predict" / f"predictions.{rank}.jsonl")]
    assert len(whole) == len(parts) == 40
    by_tokens = {tuple(row["tokens"]): row["log_probs"] for row in parts}
    for row in whole:
        assert by_tokens[tuple(row["tokens"])] == pytest.approx(row["log_probs"], abs=1e-5)


def test_disagreement_is_detected_before_the_surgery(two: Path) -> None:
    for rank in range(2):
        sentence = (two / f"disagree.{rank}").read_text()
        assert sentence.startswith("at step 10 process 1 disagrees with process 0 on the prune")
    assert read_rows(two / "disagree" / "events.jsonl") == []
    assert checkpoints.read(two / "disagree" / "last.ckpt").step == 5


def test_refusals(two: Path) -> None:
    assert "ep_size=3 does not divide the 2 processes" in (two / "third.0").read_text()
    with pytest.raises(UserError, match="bf16-mixed"):
        ExpertParallelStrategy(precision_plugin=MixedPrecision("16-mixed", "cpu")).setup(None)
    with pytest.raises(UserError, match="rearrange_every is set but"):
        ExpertPruning(rearrange_every=5)
    with pytest.raises(UserError, match="ep_size must be at least 1"):
        ExpertParallelStrategy(ep_size=0)


def test_a_killed_process_ends_the_job(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nobody waits for it: the other one says that the connection is gone, and its last checkpoint is whole."""
    jobs = [{"args": command(recipe, tmp_path / "killed", 2, EP), "patch": "killed"}]
    processes = start(jobs, 2, tmp_path)
    try:
        assert processes[1].wait(120) == -signal.SIGKILL
        assert processes[0].wait(60) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "moeprune: another process of this run has ended" in (text := (tmp_path / "err.0").read_text()), text
    assert checkpoints.read(tmp_path / "killed" / "last.ckpt").step == 5


def test_four_processes(recipe: Path, single: Path, tmp_path: Path) -> None:  # noqa: F811
    """Replicas of two; four with an expert each and one without; fewer batches than processes; another number resumes."""
    unused = "--trainer.strategy.find_unused_parameters=true"  # without it, DDP sums in another order after a resume
    step = tmp_path / "rearrange" / "step-15.ckpt"
    jobs: list[dict[str, Any]] = [{"call": "experts_over_processes"}]
    jobs += [
        {"args": command(recipe, tmp_path / name, 4, *options, *VARIANTS[name], *MORE.get(name, [])), "patch": "keep_every_checkpoint"}
        for name, options in (("rearrange", [*REPLICAS, unused]), ("accumulate", [EP]), ("merge", REPLICAS))
    ]  # fmt: skip
    again = [*VARIANTS["rearrange"], *MORE["rearrange"], f"--ckpt_path={step}"]
    jobs += [
        {"args": command(recipe, tmp_path / "same", 4, *REPLICAS, unused, *again)},
        {"args": command(recipe, tmp_path / "other", 4, EP, *VARIANTS["rearrange"], f"--ckpt_path={step}")},
    ]
    finish(start(jobs, 4, tmp_path), tmp_path)
    for name in ("rearrange", "accumulate", "merge"):
        assert_equal_runs(single / name, tmp_path / name)
    layouts = checkpoints.read_lightning(tmp_path / "accumulate" / "last.ckpt")["expert_layout"]
    assert layouts == [[[0], [1], [2], []]] * 2
    assert_same_state(tmp_path / "same" / "last.ckpt", tmp_path / "rearrange" / "last.ckpt")
    assert_close(tmp_path / "other" / "last.ckpt", tmp_path / "rearrange" / "last.ckpt", 1e-6)


loads = st.integers(1, 12).flatmap(lambda n: st.lists(st.integers(0, 1000), min_size=n, max_size=n))


@given(counts=loads, n=st.integers(1, 5), data=st.data())
def test_layout(counts: list[int], n: int, data: st.DataObject) -> None:
    """Contiguous counts differ by one at most; `slots` inverts `order`; a cut keeps everybody where it was."""
    layout = Layout.contiguous(len(counts), n)
    assert list(layout.order) == list(range(len(counts)))
    assert max(layout.counts) - min(layout.counts) <= 1
    order = data.draw(st.permutations(range(len(counts))))
    ends = sorted(data.draw(st.lists(st.integers(0, len(counts)), min_size=n - 1, max_size=n - 1)))
    layout = Layout.of(order[a:b] for a, b in zip([0, *ends], [*ends, len(counts)], strict=True))
    assert [layout.slots[position] for position in layout.order] == list(range(len(counts)))
    stay = sorted(data.draw(st.sets(st.integers(0, len(counts) - 1))))
    cut = layout.cut(stay)
    for rank in range(n):
        assert [stay[p] for p in cut.ranks[rank]] == [p for p in layout.ranks[rank] if p in stay]
        assert [layout.ranks[rank][row] for row in layout.rows(rank, stay)] == [stay[p] for p in cut.ranks[rank]]
    load = np.array(counts)
    found = figures(load, n)
    if load.any():
        assert found["lower_bound"] <= found["contiguous"] + 1e-9
        assert found["lower_bound"] <= found["random"] + 1e-9
        assert factor(load, layout) == pytest.approx(
            max(load[list(row)].sum() for row in layout.ranks) * n / load.sum()
        )
        if len(counts) % n == 0:
            assert found["lower_bound"] == lower_bound(load, n)


def test_random_figure_is_the_mean_of_random_orders() -> None:
    rng = np.random.default_rng(1)
    load = rng.integers(0, 100, 7)
    sums = [[part.sum() for part in np.split(load[rng.permutation(7)], [3, 5])] for _ in range(4000)]
    assert figures(load, 3)["random"] == pytest.approx(np.mean(np.max(sums, 1)) * 3 / load.sum(), rel=0.03)


def test_a_layout_holds_every_expert_once() -> None:
    for ranks in ([[0, 1], [1]], [[0, 2]], [[1]]):
        with pytest.raises(ValueError, match="every position once"):
            Layout.of(ranks)
