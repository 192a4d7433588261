"""Evidence on disk: the same after a round trip and after an interruption, refused where it does not belong, enough to plan."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moeprune import Constraints, Evidence, PrunePlan, checkpoints, files, registry
from moeprune.cli import main
from moeprune.commands import prune
from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning import store, sweep
from moeprune.pruning.calibration import Recording, record, statistics
from moeprune.pruning.evidence import LayerEvidence
from moeprune.pruning.pruner import Pruner
from moeprune.pruning.sweep import Budget
from moeprune.testing import synthetic_evidence
from moeprune.training.data import TextData
from moeprune.training.expert_pruning import CALIBRATION_SEED_OFFSET

CONFIG = MoEConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_experts=8, d_expert=6, max_seq_len=16)
SAVED = statistics() - store.LIVE
BATCHES = ["--calibration_batches=5", "--batch_size=2", "--every=2"]


class Killed(BaseException):
    """Ends a call as nothing that is caught does."""


def model(seed: int) -> MoETransformer:
    torch.manual_seed(seed)
    made = MoETransformer(CONFIG)
    for layer in made.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.5)
        torch.nn.init.normal_(layer.experts.down, std=0.4)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Exports `a`, `b` (other weights), `pruned` (a, pruned), and evidence of `a` and `pruned`."""
    folder = tmp_path_factory.mktemp("evidence")
    for name, seed in (("a", 0), ("b", 1)):
        ids = [list(range(8))] * 2
        checkpoint = checkpoints.Checkpoint(CONFIG, ids, model(seed).state_dict(), data={"source": str(corpus)})
        checkpoints.export(checkpoint, folder / name)
    run("prune", f"--model={folder / 'a'}", "--pruner=random", f"--output={folder / 'pruned'}")
    for name in ("a", "pruned"):
        run("calibrate", f"--model={folder / name}", f"--output={folder / f'{name}_evidence'}", *BATCHES)
    return folder


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moeprune: error: "), err
    assert err.count("\n") == 1, err
    return err.removeprefix("moeprune: error: ").strip()


def same(one: Evidence, other: Evidence) -> bool:
    """Bit by bit."""
    return one.top_k == other.top_k and all(
        a.ids == b.ids
        and a.n_original == b.n_original
        and a.stats.keys() == b.stats.keys()
        and all(
            a.stats[name].dtype == b.stats[name].dtype
            and a.stats[name].shape == b.stats[name].shape
            and a.stats[name].tobytes() == b.stats[name].tobytes()
            for name in a.stats
        )
        for a, b in zip(one.layers, other.layers, strict=True)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- round trip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [tuple(range(12)), (0, 3, 4, 7, 9, 10, 11, 13, 14, 16, 18, 19)])
def test_round_trip(tmp_path: Path, ids: tuple[int, ...]) -> None:
    found = synthetic_evidence(SAVED)
    layers = tuple(LayerEvidence(ids, 20, layer.stats) for layer in found.layers)
    odd = np.array(layers[1].stats["taylor"])
    odd[3:6] = np.finfo(odd.dtype).tiny / 2, np.finfo(odd.dtype).max, -0.0
    layers[1].stats["taylor"] = odd  # type: ignore[index]
    evidence = Evidence(layers, 2, {"model": "m", "n_groups": 4, "min_experts": 3, "data": {"hash": "é"}})
    store.save(evidence, tmp_path / "e")
    again = store.load(tmp_path / "e")
    assert same(evidence, again)
    assert again.provenance == evidence.provenance
    assert store.respecting(Constraints(n_groups=10), again) == Constraints(n_groups=20, min_keep=3)
    assert set(contents(tmp_path / "e")) == {"evidence.json", "evidence.safetensors"}
    described = json.loads((tmp_path / "e" / "evidence.json").read_text())
    assert (described["format"], described["top_k"], described["n_groups"]) == ("moeprune.evidence/1", 2, 4)
    assert described["layers"][1] == {"ids": list(ids), "n_original": 20}
    assert "n_groups" not in described["provenance"]
    again.require(SAVED, "a test")


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    store.save(synthetic_evidence(frozenset({"counts", "g0f0", "g1f1", "mean_f", "ablation"})), tmp_path)
    assert set(store.load(tmp_path, {"g1f1"}).layers[0].stats) == {"counts", "g1f1"}
    assert set(store.load(tmp_path, {"g1f1", "weights"}).layers[0].stats) == {"counts", "g1f1"}
    with pytest.raises(UserError, match=r"'taylor', recorded were: ablation, counts, g0f0, g1f1, mean_f; .*calibrate"):
        store.load(tmp_path, {"taylor"}).require({"taylor"}, "a test")


def test_same_evidence_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store.save(replace(synthetic_evidence(SAVED), provenance={"n_groups": 1, "x": [1]}), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_is_saved_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = synthetic_evidence(frozenset({"counts"})), synthetic_evidence(frozenset({"counts", "w2"}), seed=1)
    store.save(old, tmp_path / "old")
    with pytest.raises(UserError, match="exists and is not empty"):
        store.save(new, tmp_path / "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            store.save(new, tmp_path / "old", overwrite=True)
    assert same(store.load(tmp_path / "old"), old)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            store.save(new, tmp_path / "new")
    assert not (tmp_path / "new").exists()

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_text", kill)
        with pytest.raises(Killed):
            store.save(new, tmp_path / "old", overwrite=True)
    with pytest.raises(UserError, match="there is no evidence at"):
        store.load(tmp_path / "old")
    store.save(new, tmp_path / "old", overwrite=True)
    assert same(store.load(tmp_path / "old"), new)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    layers = (LayerEvidence((0,), 1, {"w1": np.ones(1)}), LayerEvidence((0,), 1, {"w2": np.ones(1)}))
    with pytest.raises(UserError, match="layer 1 and layer 0 do not hold the same statistics"):
        store.save(Evidence(layers, 1), tmp_path / "e")
    with pytest.raises(UserError, match="there is no statistic to write"):
        store.save(synthetic_evidence(frozenset({"weights"})), tmp_path / "e")
    for value in (np.nan, np.inf):
        evidence = synthetic_evidence(frozenset({"counts", "w2", "taylor"}))
        odd = np.array(evidence.layers[1].stats["taylor"])
        odd[3] = value
        evidence.layers[1].stats["taylor"] = odd  # type: ignore[index]
        with pytest.raises(UserError, match="taylor of MoE layer 1 is not finite"):
            store.save(evidence, tmp_path / "e")
        with pytest.raises(UserError, match="statistic 'taylor' of layer 1 holds NaN or infinity"):
            evidence.require({"taylor"}, "a test")
    assert not (tmp_path / "e").exists()


def _edited(folder: Path, change: Callable[[dict], object]) -> None:
    described = json.loads((folder / "evidence.json").read_text())
    change(described)
    (folder / "evidence.json").write_text(json.dumps(described))


def _cut(folder: Path) -> None:
    raw = (folder / "evidence.safetensors").read_bytes()
    (folder / "evidence.safetensors").write_bytes(raw[:-8])


def _swapped(folder: Path) -> None:
    arrays = load_file(folder / "evidence.safetensors")
    with safe_open(folder / "evidence.safetensors", "numpy") as file:
        metadata = file.metadata()
    arrays["1.w2"] = arrays["1.w2"][:5].copy()
    save_file(arrays, folder / "evidence.safetensors", metadata)


def _without(folder: Path) -> None:
    arrays = load_file(folder / "evidence.safetensors")
    with safe_open(folder / "evidence.safetensors", "numpy") as file:
        metadata = file.metadata()
    save_file(
        {name: value for name, value in arrays.items() if name != "1.w2"}, folder / "evidence.safetensors", metadata
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "there is no evidence at E | `moeprune calibrate`"),
        (lambda e: (e / "evidence.json").unlink(), "there is no evidence at E"),
        (lambda e: (e / "evidence.json").write_text("{"), "evidence.json is not JSON (line 1"),
        (
            lambda e: (e / "evidence.json").write_text("[]"),
            "evidence.json is not of format 'moeprune.evidence/1' | 'list'",
        ),
        (lambda e: _edited(e, lambda d: d.update(format="x/2")), "not of format 'moeprune.evidence/1' (found 'x/2')"),
        (lambda e: _edited(e, lambda d: d.pop("layers")), "evidence.json lacks 'layers'; calibrate anew"),
        (lambda e: _edited(e, lambda d: d.update(layers=[])), "evidence.json is garbled (no layers"),
        (lambda e: _edited(e, lambda d: d.update(layers=3)), "evidence.json is garbled"),
        (lambda e: _edited(e, lambda d: d.update(top_k="x")), "evidence.json is garbled | 'x'"),
        (lambda e: _edited(e, lambda d: d["layers"][1]["ids"].append(3)), "evidence.json is garbled | layer 1"),
        (lambda e: _edited(e, lambda d: d.update(top_k=99)), "evidence.json is garbled | top_k of layer 0"),
        (lambda e: _edited(e, lambda d: d["provenance"].update(seed=9)), "do not belong together; calibrate anew"),
        (
            lambda e: (e / "evidence.safetensors").unlink(),
            "cannot read E/evidence.safetensors | missing, cut short or corrupt",
        ),
        (lambda e: (e / "evidence.safetensors").write_bytes(b"x" * 100), "cannot read E/evidence.safetensors"),
        (_cut, "cannot read E/evidence.safetensors | cut short"),
        (_swapped, "statistic 'w2' of layer 1 | shape (5, 3) for 12 experts"),
        (_without, "cannot read E/evidence.safetensors | 1.w2"),
    ],
)
def test_spoiled_evidence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    store.save(synthetic_evidence(frozenset({"counts", "w2"})), "E")
    spoil(Path("E"))
    sentence = refusal(capsys, "plan", "--evidence=E", "--pruner=magnitude")
    for word in words.split(" | "):
        assert word in sentence, sentence


# -- calibrate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "pruned"])
def test_calibrate_measures_what_recording_does(folder: Path, corpus: Path, name: str) -> None:
    saved = store.load(folder / f"{name}_evidence")
    subject = checkpoints.read(folder / name).model()
    data = TextData(str(corpus), None, 300, 16, 2)
    drawn = data.training_batches(5, CALIBRATION_SEED_OFFSET)
    assert same(saved, record(subject, [drawn.batch(i) for i in range(5)], SAVED))
    ids = [layer.ids for layer in subject.moe_layers]
    assert [layer.ids for layer in saved.layers] == ids
    if name == "pruned":
        assert all(row != tuple(range(len(row))) for row in ids)
        assert [layer.n_original for layer in saved.layers] == [8, 8]
    provenance = saved.provenance
    assert provenance["weights"] == checkpoints.fingerprint(checkpoints.read(folder / name).state)
    assert provenance["data"] == {**data.describe(), "source": str(corpus)}
    expected = {
        "model": str(folder / name),
        "calibration_tokens": 5 * 2 * 16,
        "calibration_batches": 5,
        "batch_size": 2,
    }
    expected |= {"seed": 0, "gate": "weight", "n_groups": 1, "min_experts": 2}
    assert {key: provenance[key] for key in expected} == expected


def test_statistics_and_pruners_narrow(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("calibrate", f"--model={folder / 'a'}", "--output", tmp_path / "x", "--statistics=[counts,g1f1]", *BATCHES)
    assert set(store.load(tmp_path / "x").layers[0].stats) == {"counts", "g1f1"}
    run("calibrate", f"--model={folder / 'a'}", "--output", tmp_path / "y", "--pruners=[reap,magnitude]", *BATCHES)
    assert set(store.load(tmp_path / "y").layers[0].stats) == {"g0f0", "g1f1", "w2"}
    capsys.readouterr()
    run("calibrate", f"--model={folder / 'a'}", "--output", tmp_path / "z", "--statistics=[w2]", "--data=absent")
    assert store.load(tmp_path / "z").provenance["calibration_tokens"] == 0  # nothing on data, so none is read
    assert capsys.readouterr().err == ""
    softmax = ["--statistics=[g1f1]", "--gate=softmax", *BATCHES]
    run("calibrate", f"--model={folder / 'a'}", "--output", tmp_path / "s", *softmax)
    gates = [store.load(tmp_path / each).layers[0].stats["g1f1"] for each in ("x", "s")]
    assert (gates[1] <= gates[0]).all()
    assert (gates[1] < gates[0]).any()


def test_experts_without_tokens_are_told(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = model(0)
    with torch.no_grad():
        made.moe_layers[1].router.weight[2:].zero_()
        made.moe_layers[1].router.weight[:2] = 1e-6 * made.moe_layers[1].router.weight[:2]
        for i in (6, 7):  # the same row as expert 2: whoever is above it is above them, and ties go to the lower index
            made.moe_layers[1].router.weight[i] = 0
    checkpoint = checkpoints.Checkpoint(CONFIG, [list(range(8))] * 2, made.state_dict(), data={"source": str(corpus)})
    checkpoints.export(checkpoint, tmp_path / "m")
    run("calibrate", "--model", tmp_path / "m", "--output", tmp_path / "e", "--statistics=[counts]", *BATCHES)
    idle = np.flatnonzero(store.load(tmp_path / "e").layers[1].counts == 0)
    assert len(idle) > 0
    assert f"layer 1: {' '.join(map(str, idle))}" in capsys.readouterr().out


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Recording dies in the middle of the batch after `after` more; the list counts batches."""
    update, seen = Recording.update, [0]

    def dying(self: Recording, batch: torch.Tensor) -> None:
        if seen[0] == after:
            self._counts[0] += 1000  # half a batch
            raise Killed
        seen[0] += 1
        update(self, batch)

    monkeypatch.setattr(Recording, "update", dying)
    return seen


@pytest.mark.parametrize(("first", "second", "kept"), [(1, 9, 0), (2, 9, 2), (3, 9, 2), (4, 9, 4), (3, 2, 4)])
def test_an_interrupted_calibration_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, kept: int
) -> None:
    """Killed once or twice, the files are those of a call that was not, byte by byte."""
    call = ["calibrate", f"--model={folder / 'a'}", f"--output={tmp_path / 'e'}", *BATCHES]
    for after in (first, second):
        if after > 5:
            break
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(Killed):
                main(call)
        with pytest.raises(UserError, match="is unfinished; call the same" if kept else "there is no evidence"):
            store.load(tmp_path / "e")
    if kept:
        (tmp_path / "e" / f".{store.PARTIAL}.abc").write_bytes(b"half a file of a call that was killed")
    with monkeypatch.context() as patch:
        seen = interrupt(patch, 9)
        run(*call)
    assert seen == [5 - kept]
    assert contents(tmp_path / "e") == contents(folder / "a_evidence")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed=3"], "seed=0, not 3"),
        (["--calibration_batches=6"], "calibration_batches=5, not 6"),
        (["--batch_size=3"], "batch_size=2, not 3"),
        (["--gate=topk"], "gate=weight, not topk"),
        (["--statistics=[counts,fisher]"], "other statistics (with ablation, "),
        (["--model=b"], "another model (weights "),
        (["--data=other"], "other data"),
        (["--seed=3", "--batch_size=3"], "batch_size=2, not 3; seed=0, not 3"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "begun"])
def test_evidence_made_otherwise_is_never_reused(
    folder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
    whole: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "b", "b")
    shutil.copytree(corpus, "other")
    with (tmp_path / "other" / "sky.train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "moon " * 20}) + "\n")
    call = ["calibrate", f"--model={folder / 'a'}", "--output=e", *BATCHES]
    if whole:
        shutil.copytree(folder / "a_evidence", "e")
    else:
        with monkeypatch.context() as patch:
            interrupt(patch, 3)
            with pytest.raises(Killed):
                main(call)
    before = contents(tmp_path / "e")
    sentence = refusal(capsys, *call, *options)
    assert f"the evidence in e was made with {words}" in sentence
    assert "--output" in sentence
    assert "--overwrite=true" in sentence
    assert contents(tmp_path / "e") == before


def test_whole_evidence_is_not_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "a_evidence", tmp_path / "e")
    shutil.copytree(folder / "a", tmp_path / "moved")  # where the weights are does not matter
    seen = interrupt(monkeypatch, 9)
    run("calibrate", f"--model={tmp_path / 'moved'}", f"--output={tmp_path / 'e'}", *BATCHES)
    assert seen == [0]
    assert "holds this evidence already" in capsys.readouterr().out
    call = ["calibrate", f"--model={folder / 'a'}", f"--output={tmp_path / 'e'}", *BATCHES, "--overwrite"]
    run(*call)
    assert seen == [5]
    assert contents(tmp_path / "e") == contents(folder / "a_evidence")
    raw = (tmp_path / "e" / "evidence.safetensors").read_bytes()
    (tmp_path / "e" / "evidence.safetensors").write_bytes(raw[:-1])
    assert "cut short" in refusal(capsys, *call[:-1])


def test_a_corrupt_state_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["calibrate", f"--model={folder / 'a'}", f"--output={tmp_path / 'e'}", *BATCHES]
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Killed):
            main(call)
    raw = (tmp_path / "e" / store.PARTIAL).read_bytes()
    (tmp_path / "e" / store.PARTIAL).write_bytes(raw[:-1])
    assert "it is corrupt; pass --overwrite=true" in refusal(capsys, *call)
    run(*call, "--overwrite")
    assert contents(tmp_path / "e") == contents(folder / "a_evidence")


def test_two_calls_do_not_write_to_one_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["calibrate", f"--model={folder / 'a'}", f"--output={tmp_path / 'e'}", *BATCHES]
    (tmp_path / "e").mkdir()
    with files.locked(tmp_path / "e", "busy"):
        assert "another call is writing evidence to" in refusal(capsys, *call)


# -- plan and prune ----------------------------------------------------------------------------------------------------

HALF = "--pruner.ratio=0.5"
PRUNERS = [["reap", HALF], ["taylor", HALF], ["laep", "--pruner.beta=0.5"], ["magnitude", HALF], ["random", HALF]]


@pytest.mark.parametrize("options", PRUNERS, ids=lambda options: options[0])
@pytest.mark.parametrize("name", ["a", "pruned"])
def test_a_plan_from_evidence_is_that_of_prune(folder: Path, tmp_path: Path, options: list[str], name: str) -> None:
    """Planned from evidence, pruned with evidence, with the plan, or measured on the spot: one plan, the same weights."""
    pruner = [f"--pruner={options[0]}", *options[1:], "--multiple_of=2"]
    origin = [f"--model={folder / name}", "--calibration_batches=5", "--batch_size=2"]
    evidence = f"--evidence={folder / f'{name}_evidence'}"
    run("plan", evidence, *pruner, f"--output={tmp_path / 'plan.json'}")
    run("prune", *origin, *pruner, f"--output={tmp_path / 'measured'}")
    run("prune", *origin, evidence, *pruner, f"--output={tmp_path / 'saved'}")
    run("prune", *origin, f"--plan={tmp_path / 'plan.json'}", f"--output={tmp_path / 'planned'}")
    plan = PrunePlan.load(tmp_path / "plan.json")
    assert all(plan.removed)
    states = []
    for made in ("measured", "saved", "planned"):
        checkpoint = checkpoints.read(tmp_path / made)
        assert checkpoint.plans[-1] == plan
        states.append(checkpoints.fingerprint(checkpoint.state))
    assert len(set(states)) == 1
    assert plan.provenance["weights"] == store.load(folder / f"{name}_evidence").provenance["weights"]


def test_evidence_says_top_k_and_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = replace(synthetic_evidence(frozenset({"counts"})), provenance={"n_groups": 3, "min_experts": 5})
    store.save(evidence, tmp_path / "e")
    plan = ["plan", f"--evidence={tmp_path / 'e'}", "--pruner=frequency", "--pruner.ratio=0.7"]
    run(*plan, f"--output={tmp_path / 'plan.json'}", "--n_groups=2", "--top_k=2")
    kept = PrunePlan.load(tmp_path / "plan.json").kept
    assert {len(ids) for ids in kept} == {6}
    for ids in kept:
        assert [sum(i // 2 == group for i in ids) for group in range(6)] == [1] * 6
    assert "top_k=3 differs from top_k=2 of the evidence" in refusal(capsys, *plan, "--top_k=3")
    assert "n_groups=8 does not divide the 12 experts of layer 0" in refusal(capsys, *plan, "--n_groups=8")
    assert "'taylor'" in refusal(capsys, *plan, "--pruner=taylor")
    sentence = refusal(capsys, *plan, "--pruner=laep", "--max_keep=4")
    assert "max_keep=4 is below 5, the fewest experts that the router works with" in sentence


def test_evidence_of_another_model_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["prune", "--pruner=reap", f"--output={tmp_path / 'out'}"]
    sentence = refusal(capsys, *call, f"--model={folder / 'b'}", f"--evidence={folder / 'a_evidence'}")
    theirs, ours = (checkpoints.fingerprint(checkpoints.read(folder / name).state)[:12] for name in "ab")
    assert f"was measured on {folder / 'a'} (weights {theirs}), not on {folder / 'b'} (weights {ours})" in sentence
    store.save(replace(store.load(folder / "a_evidence"), provenance={}), tmp_path / "nobody")
    assert "unknown weights" in refusal(capsys, *call, f"--model={folder / 'a'}", f"--evidence={tmp_path / 'nobody'}")
    counts = tmp_path / "counts"
    run("calibrate", f"--model={folder / 'a'}", f"--output={counts}", "--statistics=[counts]", *BATCHES)
    sentence = refusal(capsys, *call, f"--model={folder / 'a'}", f"--evidence={counts}")
    assert "reap(" in sentence
    assert "recorded were: counts" in sentence
    assert not (tmp_path / "out").exists()


class Live(Pruner):
    """Reads all that a pruner can."""

    needs = frozenset({"counts", "weights", "acceptance"})

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        evidence.require(self.needs, "a test")
        assert evidence.acceptance is not None
        everything = [layer.ids for layer in evidence.layers]
        assert evidence.acceptance(everything) == pytest.approx(1)
        self.seen = [layer.stats["counts"].sum() for layer in evidence.layers]
        kept = []
        for index, layer in enumerate(evidence.layers):
            norms = layer.weights["down"].flatten(1).norm(dim=1).numpy().astype(np.float64)
            kept.append(constraints.keep_highest(norms, 4, layer, index))
        return PrunePlan.from_kept(kept, evidence, constraints)


def test_what_only_the_model_has_comes_from_the_model(folder: Path, tmp_path: Path) -> None:
    pruner = Live()
    prune.command(folder / "a", tmp_path / "out", pruner, evidence=folder / "a_evidence", calibration_batches=2)
    assert pruner.seen == [5 * 2 * 16 * 2] * 2  # of the five batches that were calibrated on
    assert [len(ids) for ids in checkpoints.read(tmp_path / "out").expert_ids] == [4, 4]


def test_a_ready_plan(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", f"--evidence={folder / 'a_evidence'}", "--pruner=reap", f"--output={tmp_path / 'plan.json'}")
    call = ["prune", f"--plan={tmp_path / 'plan.json'}"]
    assert "does not allow" in refusal(
        capsys, *call, f"--model={folder / 'a'}", "--multiple_of=4", f"--output={tmp_path / 'x'}"
    )
    assert "other experts than layer 0" in refusal(
        capsys, *call, f"--model={folder / 'pruned'}", f"--output={tmp_path / 'x'}"
    )
    assert not (tmp_path / "x").exists()
    run(*call, f"--model={folder / 'b'}", f"--output={tmp_path / 'y'}")
    assert "the plan was made for other weights" in capsys.readouterr().err
    assert checkpoints.read(tmp_path / "y").plans[-1] == PrunePlan.load(tmp_path / "plan.json")


def large(folder: Path, n_layers: int = 94, E: int = 128) -> None:
    """Evidence of a large model, with everything that registered criteria read."""
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(n_layers):
        counts = rng.lognormal(6, 1.2, E).astype(np.int64) + 1
        output = rng.lognormal(0, 0.4, E)
        stats = {name: counts * output * rng.lognormal(0, 0.3, E) for name in SAVED}
        stats |= {name: rng.lognormal(0, 0.2, (E, 3)) for name in ("w1", "w2", "w_n")}
        stats |= {"counts": counts, "g0f0": counts.astype(float), "ablation": np.asarray(rng.random())}
        stats |= {"mean_f": rng.normal(size=(E, 64)), "logit_gram": np.eye(E)}
        layers.append(LayerEvidence(tuple(range(E)), E, stats))
    store.save(Evidence(tuple(layers), 8), folder)


def test_planning_from_evidence_takes_no_torch_and_no_time(tmp_path: Path) -> None:
    large(tmp_path / "e")
    code = (
        "import sys, time; from moeprune.cli import main\n"
        f"code = main(['plan', '--evidence={tmp_path / 'e'}', '--pruner=reap', '--output={tmp_path / 'p.json'}'])\n"
        "heavy = {'torch', 'pytorch_lightning', 'lm_eval', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "print(time.process_time())\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1  # seconds of computing from the start of the interpreter
    assert PrunePlan.load(tmp_path / "p.json").n_kept == (96,) * 94


# -- sweep -------------------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, most: int = 4) -> list[PrunePlan]:
    """A few plans of the same layers, of unequal sizes, not all ids there."""
    n_layers = draw(st.integers(1, 3))
    before = [sorted(draw(st.sets(st.integers(0, 11), min_size=1, max_size=7))) for _ in range(n_layers)]
    made = []
    for _ in range(draw(st.integers(2, most))):
        kept = [sorted(draw(st.sets(st.sampled_from(ids), min_size=1))) for ids in before]
        made.append(PrunePlan(tuple(map(tuple, kept)), tuple(map(tuple, before)), (12,) * n_layers, 1))
    return made


@given(plans())
def test_overlap_is_the_jaccard_index_of_what_is_removed(made: list[PrunePlan]) -> None:
    found = sweep.jaccard(made)
    means = Budget(0.5, dict(enumerate(made)), found, found).overlap  # type: ignore[arg-type]
    for a, b in itertools.product(range(len(made)), repeat=2):
        values = []
        for layer, (x, y) in enumerate(zip(made[a].removed, made[b].removed, strict=True)):
            union = set(x) | set(y)
            if union:
                values.append(len(set(x) & set(y)) / len(union))
                assert found[layer, a, b] == pytest.approx(values[-1])
            else:
                assert np.isnan(found[layer, a, b])
        assert (means[a, b] == pytest.approx(np.mean(values))) if values else np.isnan(means[a, b])


@given(plans(most=2), st.sampled_from([1, 2, 3]))
def test_chance_is_the_mean_over_all_draws(made: list[PrunePlan], n_groups: int) -> None:
    found = sweep.chance(made, n_groups)
    for layer, before in enumerate(made[0].before):
        a, b = (plan.removed[layer] for plan in made)
        groups = [[i for i in before if i // (12 // n_groups) == group] for group in range(n_groups)]

        def draws(removed: tuple[int, ...], groups: list[list[int]] = groups) -> list[set[int]]:
            parts = [itertools.combinations(group, len(set(group) & set(removed))) for group in groups]
            return [set().union(*parts) for parts in itertools.product(*parts)]

        if not a and not b:
            assert np.isnan(found[layer, 0, 1])
            continue
        every = [len(x & y) / len(x | y) for x, y in itertools.product(draws(a), draws(b))]
        assert found[layer, 0, 1] == pytest.approx(np.mean(every))
        assert found[layer, 1, 0] == found[layer, 0, 1]


@pytest.mark.parametrize("bounds", [{}, {"multiple_of": 4}, {"min_keep": 7}, {"n_groups": 4}], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_laep_keeps_as_many_as_the_others(ratio: float, bounds: dict[str, int]) -> None:
    """Exactly, or at most one allowed step more; one step of beta further it would keep fewer."""
    rng = np.random.default_rng(0)
    counts = [rng.lognormal(5, 0.3 + 0.3 * layer, 16).astype(int).tolist() for layer in range(6)]
    found = sweep.sweep(Evidence.from_counts(counts, 2), ["laep", "frequency"], [ratio], Constraints(**bounds))
    plan, other = (found.budgets[0].plans[name] for name in ("laep", "frequency"))
    more = sum(plan.n_kept) - sum(other.n_kept)
    assert 0 <= more < max(bounds.get("multiple_of", 1), bounds.get("n_groups", 1))
    beta = plan.provenance["pruner"]["beta"]
    again = registry.create("pruner", "laep", beta=beta).plan(Evidence.from_counts(counts, 2), Constraints(**bounds))
    assert again == plan
    if ratio == 0.5 and not bounds:
        assert len(set(plan.n_kept)) > 1


def test_families_stand_together() -> None:
    """Three pairs that agree, given in disorder."""
    rng = np.random.default_rng(0)
    near = np.full((6, 6), 0.1) + 0.05 * rng.random((6, 6))
    for a, b in ((0, 3), (1, 4), (2, 5)):
        near[a, b] = 0.9
    near = np.maximum(near, near.T)
    np.fill_diagonal(near, 1)
    order, families = sweep.clustered(np.array([near, np.full((6, 6), np.nan)]))
    assert sorted(order) == list(range(6))
    assert {frozenset(family) for family in families} == {frozenset({0, 3}), frozenset({1, 4}), frozenset({2, 5})}
    assert all(abs(order.index(a) - order.index(b)) == 1 for a, b in ((0, 3), (1, 4), (2, 5)))


def test_sweep_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every criterion and laep; what is printed fits 100 columns; the folder holds every plan."""
    run("plan", f"--evidence={folder / 'a_evidence'}", "--sweep", f"--output={tmp_path / 's'}")
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert data["format"] == "moeprune.sweep/1"
    criteria = {entry.name for entry in registry.entries("criterion")}
    assert set(data["names"]) | set(data["left_out"]) == criteria | {"laep"}
    assert {"reap", "taylor", "magnitude", "random", "laep"} <= set(data["names"])
    assert [budget["ratio"] for budget in data["budgets"]] == [0.1, 0.25, 0.375, 0.5, 0.75]
    assert all(name in out for name in data["names"])
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    assert (tmp_path / "s" / "overlap.png").read_bytes().startswith(b"\x89PNG")
    half = data["budgets"][3]
    for name in ("reap", "taylor", "magnitude"):
        plan = ["plan", f"--evidence={folder / 'a_evidence'}", f"--pruner={name}", "--pruner.ratio=0.5"]
        run(*plan, f"--output={tmp_path / f'{name}.json'}")
        assert half["kept"][name] == [list(ids) for ids in PrunePlan.load(tmp_path / f"{name}.json").kept]
        assert half["pruners"][name]["ratio"] == 0.5
    a, b = data["names"].index("reap"), data["names"].index("taylor")
    removed = [[set(range(8)) - set(ids) for ids in half["kept"][name]] for name in ("reap", "taylor")]
    slow = [len(x & y) / len(x | y) for x, y in zip(*removed, strict=True)]
    assert [layer[a][b] for layer in half["jaccard_per_layer"]] == pytest.approx(slow, abs=1e-6)
    assert half["overlap"][a][b] == pytest.approx(np.mean(slow), abs=1e-6)
    assert data["budgets"][0]["overlap"][a][b] is None  # a tenth of 8 experts is none
    draws = [frozenset(c) for c in itertools.combinations(range(8), 4)]
    by_chance = np.mean([len(x & y) / len(x | y) for x, y in itertools.product(draws, repeat=2)])
    assert half["chance"][a][b] == pytest.approx(by_chance, abs=1e-6)


def test_a_small_sweep_of_recorded_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps([[5, 1, 9, 3, 0, 2, 8, 4]] * 2))
    call = ["plan", f"--counts={tmp_path / 'c.json'}", "--sweep", "--ratios=[0.5]"]
    run(*call)
    out, err = capsys.readouterr()
    assert "left out: reap: " in err
    assert "overlap of at least 0.7 over all budgets: " in out
    assert {"frequency", "laep"} <= set(out.splitlines()[-1].replace(",", "").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json"]


def test_without_matplotlib_the_sweep_is_written_all_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--pruners=[reap,taylor]", "--ratios=[0.5]", f"--output={tmp_path / 's'}"]
    run("plan", f"--evidence={folder / 'a_evidence'}", "--sweep", *options)
    out, err = capsys.readouterr()
    assert "no heat map: " in err
    assert "pip install 'moeprune[report]'" in err
    assert "sweep.json written to" in out
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["sweep.json"]
