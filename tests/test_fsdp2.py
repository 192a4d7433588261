"""FSDP2, alone and with expert parallelism, over 2 and 4 gloo processes: the run of one process, whatever is pruned or resumed;
checkpoints whole and in pieces.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_expert_parallel import MORE, UNEVEN, VARIANTS, assert_close, assert_equal_runs, command, finish, start
from test_training import PRUNE, assert_same_state, fit, recipe  # noqa: F401  (a fixture)

from moeprune import checkpoints
from moeprune.cli import main
from moeprune.files import read_rows

SCRIPT = Path(__file__).with_name("fsdp2_script.py")
FSDP, EP, BOTH = "--trainer.strategy=fsdp2", "--trainer.strategy=ep", "--trainer.strategy=ep_fsdp2"
STOCK = ["--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"]
PIECES = "--checkpoint.sharded=true"
SIMBAL = ["--model.balancers+=simbal", "--model.balancers.coefficient=0.01"]
BF16 = ["--trainer.precision=bf16-mixed", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
RUNS = {
    "prune": PRUNE,
    "accumulate": [
        *VARIANTS["accumulate"],
        "--data.vocab_size=299",
    ],  # 3 experts stay; clips hard; a bias of odd length
    "merge": [*VARIANTS["merge"], *SIMBAL, "--model.config.tied_embeddings=true"],
    "calibrate": [
        *(*VARIANTS["calibrate"], *SIMBAL),
        *("--trainer.gradient_clip_algorithm=value", "--trainer.gradient_clip_val=0.01"),
    ],
}
TOGETHER = {**{name: RUNS[name] for name in ("accumulate", "merge", "calibrate")}, "rearrange": VARIANTS["rearrange"]}


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("single")
    for name, options in {**RUNS, **TOGETHER, "uneven": UNEVEN, "bf16": BF16}.items():
        assert fit(recipe, folder / name, *options) == 0
    return folder


@pytest.fixture(scope="module")
def two(recipe: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Everything that two processes have to show, in one start."""
    folder = tmp_path_factory.mktemp("two")

    def job(name: str, *options: str, **more: Any) -> dict[str, Any]:
        return {"args": command(recipe, folder / name, 2, *options), **more}

    jobs = [job(name, FSDP, *options, shares=str(folder / f"{name}.shares")) for name, options in RUNS.items()]
    jobs[0]["patch"] = "one_block_at_a_time"
    jobs.append(job("pieces", FSDP, *PRUNE, PIECES))
    jobs.append(job("ep", EP, *PRUNE, PIECES))
    jobs += [job(f"both-{name}", BOTH, *options) for name, options in TOGETHER.items() if name != "rearrange"]
    jobs.append(job("both-rearrange", BOTH, *TOGETHER["rearrange"], *MORE["rearrange"], PIECES))
    for source, step, *options in (
        ("prune", 5, FSDP),
        ("prune", 15, FSDP),
        ("pieces", 10, FSDP, PIECES),
        ("ep", 5, EP),
        ("prune", 15, BOTH),
        ("both-rearrange", 15, FSDP),
        ("both-rearrange", 15, BOTH, *MORE["rearrange"]),
        ("ep", 15, FSDP),
        ("pieces", 15, EP),
    ):
        name = f"{source}-{step}-{options[0].rpartition('=')[2]}"
        again = TOGETHER["rearrange"] if source == "both-rearrange" else PRUNE
        jobs.append(job(name, *options, *again, f"--ckpt_path={folder / source / f'step-{step}.ckpt'}"))
    jobs += [job("uneven", FSDP, *UNEVEN), job("bf16", FSDP, *BF16)]
    for verb in ("validate", "test", "predict"):
        args = command(recipe, folder / verb, 2, FSDP, f"--ckpt_path={single / 'uneven' / 'last.ckpt'}", *UNEVEN)
        jobs.append({"args": [verb, *args[1:]], "metrics": str(folder / f"{verb}.json")})
    for name, *options in (
        ("stock", "--trainer.strategy=ModelParallelStrategy", *STOCK),
        ("half", FSDP, "--trainer.precision=bf16-true"),
        ("nothing", "--trainer.strategy=ddp", PIECES),
    ):
        jobs.append(job(name, *options, error=str(folder / f"{name}.error")))
    jobs.append(job("full", FSDP, PIECES, error=str(folder / "full.error"), patch="no_space_at_step_10"))
    finish(start(jobs, 2, folder, SCRIPT), folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process(single: Path, two: Path, name: str) -> None:
    assert_equal_runs(single / name, two / name)


@pytest.mark.parametrize("name", TOGETHER)
def test_with_expert_parallelism_equals_one_process(single: Path, two: Path, name: str) -> None:
    assert_equal_runs(single / name, two / f"both-{name}")


def test_bfloat16(single: Path, two: Path) -> None:
    """Products in bfloat16, gradients clipped: as close to one process as their rounding."""
    losses = [read_rows(folder / "bf16" / "validation.jsonl")[-1]["val_loss"] for folder in (single, two)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_every_process_holds_its_share(two: Path) -> None:
    """Half of parameters and moments, up to one number of a bias, before and after a prune that leaves odd numbers of experts."""
    for name in RUNS:
        for rank in range(2):
            rows = json.loads((two / f"{name}.shares.{rank}").read_text())
            assert len(rows) == 3  # before the prune, after it, at the end
            for parameters, moments, n in rows:
                assert parameters == 4 * ((n + 1) // 2)
                assert 2 * (parameters - 4) <= moments <= 2 * parameters
            assert rows[0][2] > rows[1][2] == rows[2][2]


def test_resumed_is_bit_identical(two: Path) -> None:
    """Killed before the prune, at its very step and after it; from files and from pieces."""
    for name in ("prune-5-fsdp2", "prune-15-fsdp2", "pieces", "pieces-10-fsdp2"):
        assert_same_state(two / name / "last.ckpt", two / "prune" / "last.ckpt")
    assert_same_state(two / "ep-5-ep" / "last.ckpt", two / "ep" / "last.ckpt")
    assert_same_state(two / "both-rearrange-15-ep_fsdp2" / "last.ckpt", two / "both-rearrange" / "last.ckpt")
    layouts = [checkpoints.read_lightning(two / "both-rearrange" / f"step-{n}.ckpt")["expert_layout"] for n in (15, 5)]
    assert layouts[0] != layouts[1]  # what was resumed is not what a run starts with


def test_resumed_by_others(recipe: Path, two: Path, tmp_path: Path) -> None:  # noqa: F811
    """By one process, and by the other strategies."""
    assert_close(two / "ep-15-fsdp2" / "last.ckpt", two / "ep" / "last.ckpt", 1e-6)
    assert_close(two / "pieces-15-ep" / "last.ckpt", two / "pieces" / "last.ckpt", 1e-6)
    assert_close(two / "prune-15-ep_fsdp2" / "last.ckpt", two / "prune" / "last.ckpt", 1e-6)
    assert_close(two / "both-rearrange-15-fsdp2" / "last.ckpt", two / "both-rearrange" / "last.ckpt", 1e-6)
    for source, step in (("prune", 15), ("pieces", 5), ("ep", 15)):
        folder = tmp_path / f"{source}-{step}"
        assert fit(recipe, folder, *PRUNE, f"--ckpt_path={two / source / f'step-{step}.ckpt'}") == 0
        assert_close(folder / "last.ckpt", two / source / "last.ckpt", 1e-6)
        assert (folder / "last.ckpt").is_file()


def test_checkpoints_are_those_of_one_process(single: Path, two: Path) -> None:
    """The same keys in the same order, of tensors of the same type, in a file and in pieces."""
    expected = checkpoints.read_lightning(single / "prune" / "last.ckpt")
    for name in ("prune", "pieces", "ep"):
        found = checkpoints.read_lightning(two / name / "last.ckpt")
        assert [*found] == [*expected, *(["expert_layout"] if name == "ep" else [])]
        for one, other in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
            assert [*one["state"]] == [*other["state"]]
            assert all([*one["state"][n]] == [*other["state"][n]] for n in one["state"])
        for key, value in expected["state_dict"].items():
            assert type(found["state_dict"][key]) is torch.Tensor
            assert (found["state_dict"][key].shape, found["state_dict"][key].dtype) == (value.shape, value.dtype)
    assert (two / "prune" / "last.ckpt").is_file()


def test_pieces_are_a_checkpoint_like_any_other(two: Path, tmp_path: Path) -> None:
    folder, whole = two / "pieces" / "last.ckpt", tmp_path / "whole.ckpt"
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".last.ckpt.new")]
    assert len([*folder.parent.glob(".last.ckpt.*")]) == 1
    assert checkpoints.main([str(folder), str(whole)]) == 0
    assert_same_state(folder, whole)
    assert checkpoints.main([str(folder), str(whole)]) == 2
    assert checkpoints.main([str(whole), str(tmp_path / "other")]) == 2
    states = [checkpoints.read(path).state for path in (folder, whole)]
    assert checkpoints.fingerprint(states[0]) == checkpoints.fingerprint(states[1])
    assert checkpoints.read(folder, weights=False).step == 20
    pruned = tmp_path / "pruned"
    options = ["--pruner=magnitude", "--pruner.ratio=0.25", f"--output={pruned}"]
    assert main(["prune", f"--model={folder}", *options]) == 0
    assert len(checkpoints.read(pruned).expert_ids[0]) < len(checkpoints.read(folder).expert_ids[0])


def test_a_full_disk_leaves_the_checkpoint_before(two: Path) -> None:
    for rank in range(2):
        sentence = (two / f"full.error.{rank}").read_text()
        assert sentence.startswith("cannot write the checkpoint")
        assert "No space left" in sentence
    assert checkpoints.read(two / "full" / "last.ckpt").step == 5


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched-by-a-pickle"),)


def test_damaged_pieces_are_refused(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = two / "pieces" / "step-15.ckpt"
    for number, (name, content, message) in enumerate(
        (
            (".metadata", None, "lacks .metadata"),
            ("meta.pt", None, "lacks meta.pt"),
            (".metadata", pickle.dumps(Payload()), "never unpickled"),
            (".metadata", (good / ".metadata").read_bytes()[:-50], "not readable"),
            ("meta.pt", (good / "meta.pt").read_bytes()[:-50], "not readable"),
            ("__1_0.distcp", (good / "__1_0.distcp").read_bytes()[:500], "not readable"),
            ("__1_0.distcp", None, "not readable"),
        )
    ):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(checkpoints.UserError, match=message):
            checkpoints.read(folder)
    assert not Path("touched-by-a-pickle").exists()


def test_refusals(two: Path) -> None:
    assert "use --trainer.strategy=fsdp2" in (two / "stock.error.0").read_text()
    assert "--trainer.precision=bf16-true; use 32 or bf16-mixed" in (two / "half.error.0").read_text()
    assert "checkpoint.sharded needs processes that hold parts" in (two / "nothing.error.0").read_text()


def test_unequal_numbers_of_evaluation_batches(single: Path, two: Path) -> None:
    assert_equal_runs(single / "uneven", two / "uneven")
    expected = read_rows(single / "uneven" / "validation.jsonl")[-1]
    found = json.loads((two / "validate.json").read_text())
    assert found == pytest.approx({name: loss for name, loss in expected.items() if name != "step"}, abs=1e-5)
    assert json.loads((two / "test.json").read_text())["test_loss"] > 0
    rows = [row for rank in range(2) for row in read_rows(two / "predict" / f"predictions.{rank}.jsonl")]
    assert len({tuple(row["tokens"]) for row in rows}) == len(rows) == 40
    loss = -sum(sum(row["log_probs"]) for row in rows) / sum(len(row["log_probs"]) for row in rows)
    assert loss == pytest.approx(json.loads((two / "test.json").read_text())["test_loss"], abs=1e-4)


@pytest.mark.slow
def test_four_processes(recipe: Path, single: Path, tmp_path: Path) -> None:  # noqa: F811
    """Fewer experts than processes; pieces of four read by the same four, by `ep` and by one."""

    def job(name: str, *options: str, **more: Any) -> dict[str, Any]:
        return {"args": command(recipe, tmp_path / name, 4, *options), **more}

    jobs = [job(name, FSDP, *RUNS[name], PIECES, shares=str(tmp_path / name)) for name in RUNS]
    again = [[*PRUNE, f"--ckpt_path={tmp_path / 'prune' / f'step-{step}.ckpt'}"] for step in (5, 10)]
    jobs += [job("same", FSDP, *again[0]), job("experts", EP, *again[1], PIECES)]
    replicas = ["--trainer.strategy=ExpertParallelFullyShardedStrategy", "--trainer.strategy.ep_size=2"]
    jobs += [job(f"both-{name}", *replicas, *RUNS[name]) for name in ("accumulate", "merge")]
    finish(start(jobs, 4, tmp_path, SCRIPT), tmp_path)
    for name in RUNS:
        assert_equal_runs(single / name, tmp_path / name)
        for rank in range(4):
            for parameters, moments, n in json.loads((tmp_path / f"{name}.{rank}").read_text()):
                assert math.isclose(parameters, n, rel_tol=0.02)  # a vocabulary that four does not divide
                assert math.isclose(moments, 2 * parameters, rel_tol=0.02)
    for name in ("accumulate", "merge"):
        assert_equal_runs(single / name, tmp_path / f"both-{name}")
    assert_same_state(tmp_path / "same" / "last.ckpt", tmp_path / "prune" / "last.ckpt")
    assert_close(tmp_path / "experts" / "last.ckpt", tmp_path / "prune" / "last.ckpt", 1e-5)
    options = [*PRUNE, f"--ckpt_path={tmp_path / 'experts' / 'step-15.ckpt'}"]
    assert fit(recipe, tmp_path / "one", *options) == 0
    assert_close(tmp_path / "one" / "last.ckpt", tmp_path / "experts" / "last.ckpt", 1e-6)
