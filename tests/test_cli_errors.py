"""Bad input on the command line: one sentence that names the thing and the value, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeprune import checkpoints, files
from moeprune.cli import COMMANDS, main
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer

ROOT = Path(__file__).parents[1]
BASE = f"--config={ROOT / 'recipes' / 'base.yaml'}"
Refused = Callable[..., str]


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: ok.ckpt, the export `ok`, and what can be wrong with either."""
    folder = tmp_path_factory.mktemp("store")
    config = MoEConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_experts=8, d_expert=8, max_seq_len=32)
    state = MoETransformer(config).state_dict()
    checkpoint = checkpoints.Checkpoint(config, [list(range(8))] * 2, state)
    data = {
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "moeprune": checkpoint.entry(),
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(data, folder / "ok.ckpt")
    raw = (folder / "ok.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(raw[: len(raw) // 2])
    (folder / "random.ckpt").write_bytes(bytes(range(7, 256)) * 20)
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "x": Malicious(folder / "executed")}, folder / "code.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Malicious(folder / "executed"), protocol=2))
    torch.save({"a": 1}, folder / "no_state.ckpt")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    torch.save({"state_dict": {}, "moeprune": {"format": checkpoints.FORMAT}}, folder / "no_fields.ckpt")
    torch.save({k: v for k, v in data.items() if k != "pytorch-lightning_version"}, folder / "weights.ckpt")
    checkpoints.export(checkpoint, folder / "ok")
    for name in ("no_config", "broken_config", "list_config", "cut_weights", "no_weights", "misfit"):
        shutil.copytree(folder / "ok", folder / name)
    (folder / "no_config" / "config.json").unlink()
    (folder / "broken_config" / "config.json").write_text("{")
    (folder / "list_config" / "config.json").write_text("[1]")
    weights = folder / "cut_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (folder / "no_weights" / "model.safetensors").unlink()
    entry = json.loads((folder / "misfit" / "config.json").read_text())
    entry["config"]["d_model"] = 32
    (folder / "misfit" / "config.json").write_text(json.dumps(entry))
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(*arguments): the one sentence; run in an empty folder, which stays as it is."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = snapshot(tmp_path)
        monkeypatch.setattr("sys.argv", ["moeprune"])
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2, (out, err)
        assert "Traceback" not in err
        assert err.startswith("moeprune: error: "), err
        assert err.count("\n") == 1, err
        assert err.count("moeprune: error: ") == 1
        for jargon in ("Parser key", "Union", "NestedArg", "<class"):
            assert jargon not in err
        assert snapshot(tmp_path) == before
        return err.removeprefix("moeprune: error: ")

    return run


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    (tmp_path / "counts.json").write_text(json.dumps([[5, 1, 9, 3, 0, 2, 8, 4]] * 2))
    return tmp_path / "counts.json"


def words_in(sentence: str, words: str) -> None:
    for word in words.split(" | "):
        assert word in sentence, sentence


RANDOM = ["--pruner=random", "--pruner.allocation=uniform"]
MATCH = ["--pruner=random", "--pruner.allocation=match"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--pruner=laap"],
            "pruner: there is no pruner 'laap'; did you mean 'laep' | known: | calibrated, characteristic",
        ),
        (["--pruner={class_path: leap}"], "no pruner 'leap' | 'laep'"),
        (["--pruner=3"], "no pruner '3' | known: | calibrated"),
        (["--pruner="], "pruner: | known: | calibrated | class_path"),
        (["--pruner=null"], "missing: pruner | --pruner=NAME | --sweep"),
        (["--pruner=[laep]"], "pruner: | known: | calibrated | class_path"),
        (["--pruner={class_pth: laep}"], "pruner: | known: | calibrated | class_path"),
        (["--pruner=no.such.Class"], "cannot import 'no.such.Class' | No module named 'no' | known: | laep"),
        (["--pruner=collections.OrderedDict"], "'collections.OrderedDict' does not derive from | Pruner"),
        (["--pruner=laep", "--pruner.bta=1"], "pruner: there is no option bta; did you mean beta?"),
        (["--pruner={class_path: laep, init_args: {bta: 1}}"], "pruner: there is no option bta; did you mean beta?"),
        (["--pruner=laep", "--pruner.beta=x"], "pruner.beta: expected float or list[float], got 'x'"),
        (["--pruner=laep", "--pruner.beta=[0.1,x]"], "pruner.beta: expected float or list[float], got [0.1, 'x']"),
        (["--pruner=laep", "--pruner.beta=1.5"], "beta must lie in [0, 1], got 1.5"),
        (["--pruner=laep", "--pruner.beta=-0.5"], "beta must lie in [0, 1], got -0.5"),
        (["--pruner=laep", "--pruner.alpha=-1"], "alpha must be at least 0 | got -1"),
        (["--pruner=laep", "--pruner.beta=[0.1]"], "beta holds 1 numbers for 2 layers | one per layer"),
        (
            ["--pruner=random", "--pruner.allocation=unifrm"],
            "pruner.allocation: there is no allocation 'unifrm' | 'uniform'",
        ),
        ([*RANDOM, "--pruner.ratio=x"], "pruner.ratio: expected float, got 'x'"),
        ([*RANDOM, "--pruner.ratio=2"], "ratio must lie in [0, 1), got 2.0"),
        ([*RANDOM, "--pruner.rato=1"], "pruner: there is no option rato; did you mean ratio"),
        ([*RANDOM, "--pruner.allocation.ratio=1"], "pruner.allocation: there is no option ratio"),
        (MATCH, "pruner.allocation: missing: pruner"),
        ([*MATCH, "--pruner.allocation.pruner=leap"], "pruner.allocation.pruner: there is no pruner 'leap' | 'laep'"),
        (
            [*MATCH, "--pruner.allocation.pruner=laep", "--pruner.allocation.spread=wide"],
            "pruner.allocation.spread: expected 'per_layer' or 'uniform', got 'wide'",
        ),
        (["--pruner=magnitude"], "magnitude( | 'w2' | `moeprune prune`"),
        (["--pruner=taylor"], "taylor( | 'taylor' | `moeprune prune`"),
        ([], "missing: pruner"),
        (["--pruner=laep", "--evidence=absent"], "--counts or --evidence, not both"),
        (["--pruner=laep", "--pruners=[reap]"], "pruners are those of a sweep; add --sweep"),
        (["--pruner=laep", "--ratios=[0.5]"], "ratios are those of a sweep; add --sweep"),
        (["--pruner=laep", "--sweep"], "--pruner or --sweep, not both"),
        (["--sweep", "--pruners=[laep,leap]"], "there is no pruner 'leap'; did you mean | 'laep'"),
        (["--sweep", "--pruners=[laep]"], "at least two pruners, got laep"),
        (["--sweep", "--pruners=[laep,reap]"], "reap( | 'g0f0' | recorded were: counts"),
        (["--sweep", "--pruners=[laep,score]"], "pruner 'score': missing a required argument: 'criterion'"),
        (["--sweep", "--pruners=laep"], "pruners: expected list[str], got 'laep'"),
        (["--sweep", "--ratios=[0.5,1]"], "ratios must lie in (0, 1), got 1.0"),
        (["--sweep", "--ratios=[]"], "ratios are empty"),
        (["--sweep", "--ratios=[half]"], "ratios: expected list[float], got ['half']"),
        (["--sweep", "--output=counts.json"], "counts.json is a file; choose another --output"),
        (["--sweep", "--multiple_of=64"], "multiple_of=64 is more than the 8 experts"),
        (["--pruner=laep", "--topk=3"], "no option --topk; did you mean --top_k?"),
        (["--pruner=laep", "stray"], "unexpected argument 'stray' | --name=value"),
        (["--pruner=laep", "--top_k"], "--top_k"),
        (["--pruner=laep", "--top_k=many"], "top_k: expected int, got 'many'"),
        (["--pruner=laep", "--top_k=0"], "top_k must be at least 1, got 0"),
        (["--pruner=laep", "--top_k=9"], "top_k=9 is more than the 8 experts"),
        (["--pruner=laep", "--multiple_of=0"], "multiple_of must be at least 1, got 0"),
        (["--pruner=laep", "--multiple_of=64"], "multiple_of=64 is more than the 8 experts"),
        (["--pruner=laep", "--n_groups=3"], "n_groups=3 does not divide the 8 experts"),
        (["--pruner=laep", "--output=counts.json"], "counts.json exists | --output | --overwrite=true"),
        (["--pruner=laep", "--output=.", "--overwrite=true"], ". exists; choose another --output"),
        (["--pruner=laep", "--output=counts.json/plan.json"], "cannot write counts.json/plan.json | another place"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_plan(refused: Refused, counts: Path, arguments: list[str], words: str) -> None:
    words_in(refused("plan", f"--counts={counts}", *arguments), words)


NESTED = "pruner:\n  class_path: random\n  init_args:\n    allocation:\n      class_path: "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "recipe.yaml is no YAML mapping"),
        ("hello\n", "recipe.yaml is no YAML mapping"),
        ("", "recipe.yaml is no YAML mapping"),
        ("pruner: laep\ntop_k: [1, 2\nfoo: {\n", "YAML error in recipe.yaml, line 3"),
        ("pruner:\n\tlaep: 1\n", "YAML error in recipe.yaml, line 2"),
        ("prunr: laep\n", "there is no option prunr; did you mean pruner"),
        ("pruner: leap\n", "pruner: there is no pruner 'leap' | 'laep'"),
        ("pruner:\n  class_path: leap\n", "pruner: there is no pruner 'leap' | 'laep'"),
        ("pruner:\n  class_path: laep\n  init_args: {bta: 1}\n", "pruner: there is no option bta | beta"),
        ("pruner:\n  class_path: laep\n  init_args: {beta: high}\n", "pruner.beta: expected float | 'high'"),
        (NESTED + "unifrm\n", "pruner.allocation: there is no allocation 'unifrm' | 'uniform'"),
        (
            NESTED + "match\n      init_args: {pruner: laep, spread: x}\n",
            "pruner.allocation.spread: expected 'per_layer' or 'uniform', got 'x'",
        ),
        ("pruner: laep\ntop_k: many\n", "top_k: expected int, got 'many'"),
    ],
)
def test_plan_from_yaml(refused: Refused, counts: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    words_in(refused("plan", f"--counts={counts}", "--config", "recipe.yaml"), words)


def test_configs_that_are_no_text(refused: Refused, counts: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x81")
    words_in(refused("plan", f"--counts={counts}", "--config=recipe.yaml"), "recipe.yaml | not UTF-8 text")
    words_in(refused("plan", f"--counts={counts}", "--config=absent.yaml"), "no recipe at absent.yaml")
    words_in(refused("plan", f"--counts={counts}", "--config", tmp_path), f"{tmp_path} | directory")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "no layer"),
        ('{"counts": []}', "no layer"),
        ('{"foo": 1}', 'c.json has no "counts"'),
        ("[[1,2", "c.json is not JSON (line 1"),
        ("3", "c.json are no list but 3"),
        ('"text"', "c.json are no list but text"),
        ("[[1,2],[1,2,3]]", "layer 0 has 2 experts, layer 1 has 3 | expert_ids"),
        ("[[1,2],[]]", "layer 1 | not a list of numbers: []"),
        ("[1,2]", "layer 0 | not a list of numbers: 1"),
        ("[[[1,2]]]", "layer 0 | not a list of numbers: [[1, 2]]"),
        ('["ab"]', "layer 0 | not a list of numbers: ab"),
        ('[["1","2"]]', "layer 0 | not a list of numbers: ['1', '2']"),
        ("[[true,false]]", "layer 0 | not a list of numbers"),
        ("[[1,null]]", "layer 0 | not a list of numbers"),
        ("[[1,-2]]", "layer 0 are negative (expert 1: -2)"),
        ("[[1,NaN]]", "layer 0 hold NaN (expert 1)"),
        ("[[1.5,2]]", "layer 0 must be whole numbers"),
        ("[[Infinity,2]]", "layer 0 must be whole numbers"),
        ("[[0,0]]", "layer 0 received no tokens"),
        ('{"counts": [[1,2]], "expert_ids": 3}', "expert_ids | no list but 3"),
        ('{"counts": [[1,2]], "expert_ids": [["a","b"]]}', "expert_ids of layer 0 | not a list of numbers"),
        ('{"counts": [[1,2]], "expert_ids": [[]]}', "expert_ids of layer 0 | not a list of numbers"),
        ('{"counts": [[1,2]], "expert_ids": [[1]]}', "layer 0 has 2 counts but 1 expert_ids"),
        ('{"counts": [[1,2]], "expert_ids": [[1,1]]}', "expert_ids of layer 0 must ascend"),
    ],
)
def test_counts(refused: Refused, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.json").write_text(text)
    words_in(refused("plan", "--counts=c.json", "--pruner=laep", "--output=plan.json"), words)


def test_counts_that_are_not_there(refused: Refused) -> None:
    words_in(refused("plan", "--counts=absent.json", "--pruner=laep"), "no counts file at absent.json")
    words_in(refused("plan", "--pruner=laep"), "missing: counts or evidence; give --counts=FILE or --evidence=FOLDER")
    words_in(refused("plan", "--sweep"), "missing: counts or evidence")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pln"], "no command 'pln'; did you mean 'plan'"),
        (["--foo"], "no command '--foo' | known: fit"),
        (["plugins", "pruners"], "no kind 'pruners'; did you mean 'pruner'"),
        (["plugins", "--chek"], "no option --chek; did you mean --check"),
        (["plugins", "a", "b"], "unexpected argument 'b'"),
        (["evaluate", "--model=x", "--suite=ofline"], "no suite 'ofline'; did you mean 'offline'"),
        (["evaluate", "--model=absent.ckpt"], "no checkpoint at absent.ckpt"),
        (["evaluate"], "missing: model"),
        (["compare", "--config=absent.yaml"], "no recipe at absent.yaml"),
        (["fit", "--config"], "--config needs the path"),
    ],
)
def test_names_of_commands_kinds_and_suites(refused: Refused, arguments: list[str], words: str) -> None:
    words_in(refused(*arguments), words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--limit=0", "limit must be at least 1, got 0"),
        ("--workers=0", "workers must be at least 1, got 0"),
        ("--suite=ofline", "no suite 'ofline' | 'offline'"),
        ("--recipe=absent.yaml", "recipe: | absent.yaml"),
        ("--reference=zz", "'zz' | known: a"),
        ("--variants={a: {lable: A}}", "there is no option 'lable'; did you mean 'label'"),
        ("--variants={a: {start: sratch}}", "start must be trunk, scratch or untrained, got 'sratch'"),
        ("--variants={a: {config: {pruning: {pruner: leap}}}}", "variant 'a' | no pruner 'leap' | 'laep'"),
    ],
)
def test_compare(refused: Refused, tmp_path: Path, line: str, words: str) -> None:
    recipe = ROOT / "recipes" / "base.yaml"
    text = f"name: x\nrecipe: {recipe}\nreference: a\nvariants:\n  a: {{label: A, start: scratch}}\n"
    (tmp_path / "compare.yaml").write_text(text)
    words_in(refused("compare", "--config=compare.yaml", line), words)


CORRUPT = [
    ("absent.ckpt", "no checkpoint at | absent.ckpt"),
    ("cut.ckpt", "cut.ckpt is not a readable checkpoint"),
    ("random.ckpt", "random.ckpt is not a readable checkpoint"),
    ("empty.ckpt", "empty.ckpt is not a readable checkpoint"),
    ("code.ckpt", "code.ckpt is not a readable checkpoint"),
    ("pickle.ckpt", "pickle.ckpt is not a readable checkpoint"),
    ("no_state.ckpt", "no_state.ckpt is no Lightning checkpoint"),
    ("foreign.ckpt", "foreign.ckpt is no moeprune checkpoint"),
    ("no_fields.ckpt", "no_fields.ckpt lacks or garbles a field | config"),
]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *CORRUPT,
        ("no_config", "no model configuration at | config.json"),
        ("broken_config", "config.json is not JSON (line 1"),
        ("list_config", "list_config is no moeprune checkpoint"),
        ("cut_weights", "cannot read the weights | model.safetensors"),
        ("no_weights", "cannot read the weights | model.safetensors"),
        ("misfit", "weights do not fit"),
    ],
)
def test_prune_refuses_corrupt_checkpoints(refused: Refused, store: Path, name: str, words: str) -> None:
    before = snapshot(store)
    words_in(refused("prune", f"--model={store / name}", "--pruner=random", "--output=out"), words)
    assert snapshot(store) == before  # no `executed`: nothing was unpickled


@pytest.mark.parametrize(("name", "words"), [*CORRUPT, ("weights.ckpt", "weights.ckpt holds weights but no training")])
def test_fit_refuses_corrupt_checkpoints(refused: Refused, store: Path, name: str, words: str) -> None:
    before = snapshot(store)
    words_in(refused("fit", BASE, "--trainer.default_root_dir=run", f"--ckpt_path={store / name}"), words)
    assert snapshot(store) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pruner=leap"], "no pruner 'leap'"),
        (["--pruner=random", "--pruner.ratio=1"], "ratio must lie in [0, 1), got 1.0"),
        (["--pruner=random", "--multiple_of=64"], "multiple_of=64 is more than the 8 experts"),
        (["--pruner=taylor", "--calibration_batches=0"], "calibration_batches must be at least 1, got 0"),
        (["--pruner=taylor", "--data=absent"], "no data folder absent"),
        (["--pruner=random", "--output=full"], "full exists and is not empty | --overwrite=true"),
        (["--pruner=random", "--output=full/file"], "full/file is a file | --output"),
        ([], "missing: pruner; give --pruner=NAME, or --plan=FILE"),
        (["--plan=absent.json"], "no prune plan at absent.json"),
        (["--plan=full/file"], "the prune plan at full/file is not JSON (line 1"),
        (["--plan=full/file", "--pruner=random"], "a plan needs no pruner; give --plan or the other, not both"),
        (["--plan=full/file", "--evidence=full"], "a plan needs no evidence; give --plan or the other, not both"),
        (["--pruner=reap", "--evidence=full"], "no evidence at full | `moeprune calibrate`"),
        (["--pruner=reap", "--batch_size=0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_prune(refused: Refused, store: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    words_in(refused("prune", f"--model={store / 'ok.ckpt'}", "--output=out", *arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=absent.ckpt"], "no checkpoint at absent.ckpt"),
        (["--statistics=[counts,g1f3]"], "no statistic 'g1f3'; did you mean | 'g1f1' | known: | counts"),
        (["--statistics=g1f1"], "statistics: expected list[str] or 'all', got 'g1f1'"),
        (["--statistics=[]"], "there is nothing to measure"),
        (["--statistics=[weights]"], "'weights' is a live model's and cannot be saved | `moeprune prune`"),
        (["--pruners=[leap]"], "no pruner 'leap'; did you mean | 'laep'"),
        (["--gate=sum"], "gate: expected 'weight' or 'topk' or 'softmax', got 'sum'"),
        (["--every=0"], "every must be at least 1, got 0"),
        (["--calibration_batches=0"], "calibration_batches must be at least 1, got 0"),
        (["--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["--data=absent"], "no data folder absent"),
        (["--output=full"], "full exists and is not empty | --output"),
        (["--output=full", "--overwrite"], "full holds something else than evidence (file); choose another --output"),
        (["--output=full/file"], "full/file is a file; choose another --output"),
        (["--modle=x"], "no option --modle; did you mean --model?"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_calibrate(refused: Refused, store: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    words_in(refused("calibrate", f"--model={store / 'ok.ckpt'}", "--output=out", *arguments), words)


def test_a_full_disk_leaves_nothing_behind(
    refused: Refused, store: Path, counts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    sentence = refused("plan", f"--counts={counts}", "--pruner=laep", "--output=plan.json")
    words_in(sentence, "cannot write plan.json | No space left on device | free space")
    for command in ("prune --pruner=random", "calibrate --statistics=[w2]"):
        sentence = refused(*command.split(), f"--model={store / 'ok.ckpt'}", "--output=out")
        words_in(sentence, "cannot write | No space left on device | free space")


STABLE = "--pruning.trigger=stable"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pruning.pruner=leap", STABLE], "pruning.pruner: there is no pruner 'leap' | 'laep'"),
        (
            ["--pruning.pruner=laep", "--pruning.trigger=stble"],
            "pruning.trigger: there is no trigger 'stble' | 'stable'",
        ),
        (["--pruning.trigger=at_step"], "pruning.trigger: missing: step"),
        (["--pruning.trigger=at_step", "--pruning.trigger.step=x"], "pruning.trigger.step: expected int, got 'x'"),
        (["--pruning.trigger=at_step", "--pruning.trigger.step=-1"], "step must be at least 0, got -1"),
        (["--pruning.pruner=laep"], "pruning.pruner is set but pruning.trigger is not"),
        (["--pruning.pruner=laep", "--pruning.pruner.beta=2", STABLE], "beta must lie in [0, 1], got 2.0"),
        (["--pruning.pruner=laep", "--pruning.pruner.bta=2"], "pruning.pruner: there is no option bta | beta"),
        (["--model.balancers=[swich]"], "model.balancers: there is no balancer 'swich' | 'switch'"),
        (
            ["--model.balancers=[{class_path: switch, init_args: {coef: 1}}]"],
            "model.balancers: there is no option coef",
        ),
        (
            ["--model.balancers=[{class_path: switch, init_args: {coefficient: x}}]"],
            "model.balancers.coefficient: expected float, got 'x'",
        ),
        (["--model.config.d_mdel=3"], "no option --model.config.d_mdel; did you mean --model.config.d_model"),
        (["--model.config.d_model=x"], "model.config.d_model: expected int, got 'x'"),
        (["--model.config.top_k=99"], "top_k=99 is more than n_experts=32"),
        (["--model.config.router=sofmax"], "no router 'sofmax' | 'softmax'"),
        (["--pruning.window=0"], "window must be at least 1, got 0"),
        (["--pruning.constraints.multiple_of=0"], "multiple_of must be at least 1, got 0"),
        (["--trainer.max_stps=3"], "no option --trainer.max_stps; did you mean --trainer.max_steps"),
        (["--trainer.accelerator=quantum"], "trainer: | accelerator | 'quantum' | cpu"),
        (["--data.source=absent"], "no data folder absent"),
        (["--data.batch_size=0"], "batch_size must be at least 1, got 0"),
        (["stray"], "unexpected argument 'stray'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_fit(refused: Refused, arguments: list[str], words: str) -> None:
    words_in(refused("fit", BASE, "--trainer.default_root_dir=run", *arguments), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "recipe.yaml is no YAML mapping"),
        ("pruning: {\nmodel: ]\n", "YAML error in recipe.yaml, line 2"),
        ("prunng: {window: 2}\n", "no option prunng.window; did you mean pruning.window"),
        ("pruning: {windw: 2}\n", "no option pruning.windw; did you mean pruning.window"),
        ("model: 3\n", "model: 3 in the recipe recipe.yaml is no mapping"),
        ("pruning: {trigger: 3}\n", "pruning.trigger: | known: at_step"),
        ("base: absent.yaml\n", "no recipe at absent.yaml"),
        ("base: recipe.yaml\n", "recipe.yaml is its own base"),
        ("base: 3\n", "base: 3 in the recipe recipe.yaml"),
    ],
)
def test_fit_from_yaml(refused: Refused, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    words_in(refused("fit", BASE, "--trainer.default_root_dir=run", "--config=recipe.yaml"), words)


def test_fit_refuses_a_checkpoint_of_another_configuration(
    store: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["moeprune"])
    options = ["--data.vocab_size=300", "--data.seq_len=32", f"--data.source={corpus}", "--trainer.accelerator=cpu"]
    sizes = ["n_layers=2", "n_heads=2", "n_experts=8", "d_expert=8", "d_model=32"]
    options += [f"--model.config.{size}" for size in sizes]
    arguments = [BASE, *options, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={store / 'ok.ckpt'}"]
    assert main(["fit", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    words_in(last, "moeprune: error: | model.config.d_model=16 | says 32")
    assert not list(tmp_path.iterdir())


def test_a_bug_still_shows_its_traceback(counts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("moeprune.pruning.evidence.Evidence.from_counts", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["plan", f"--counts={counts}", "--pruner=laep"])


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["moeprune"])
    if command:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code in (0, None)
    else:
        assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert f"moeprune {command}".strip() in out or "usage:" in out
    assert not err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"moeprune \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--counts=c.json", "--pruner=laep", "--pruner.beta=0.2"],
        ["fit", BASE, "--pruning.pruner=laep", "--pruning.pruner.beta=0.2", STABLE],
    ],
)
def test_print_config(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["moeprune"])
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code in (0, None)
    out = capsys.readouterr().out
    assert re.search(r"pruner:\n\s+class_path: \S*laep\n\s+init_args:\n(.*\n)*?\s+beta: 0\.2\n", out)
