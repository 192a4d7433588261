"""`moeprune compare --checkpoint`: losses are those of `moeprune prune`, nothing is done twice, and bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import build
from safetensors.torch import load_file
from torch.nn import functional as F

from moeprune import checkpoints
from moeprune.cli import main
from moeprune.compare import checkpoint, held_out
from moeprune.errors import UserError
from moeprune.interop.checkpoint import load
from moeprune.interop.transformers import TransformersModel
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import record
from moeprune.pruning.constraints import Constraints
from moeprune.training.data import TextData

pytestmark = pytest.mark.filterwarnings("ignore")
MEASURED = {"calibration_batches": 3, "batch_size": 2, "seq_len": 16}
LAEP = {"class_path": "laep", "init_args": {"beta": 0.3}}
BY_SEARCH = {
    "class_path": "frequency",
    "init_args": {"allocation": {"class_path": "evolutionary", "init_args": {"population": 2, "generations": 1}}},
}
BY_ABLATION = {"class_path": "frequency", "init_args": {"ratio": 0.3, "allocation": {"class_path": "sensitivity"}}}
COMPARISON: dict[str, Any] = {
    "name": "tiny",
    "suite": None,
    **MEASURED,
    "eval_sequences": 7,
    "sweep": {
        "ratios": [0.25, 0.5],
        "families": {"outputs": ["reap"], "weights": ["magnitude"], "merging": ["m_smoe", "hc_smoe"]},
    },
    "variants": {
        "laep": {"config": {"pruning": {"pruner": LAEP}}},
        "searched": {"config": {"pruning": {"pruner": BY_SEARCH}}},
        "sensitive": {"config": {"pruning": {"pruner": BY_ABLATION}}},
        "broken": {"config": {"pruning": {"pruner": LAEP, "constraints": {"multiple_of": 3, "min_keep": 7}}}},
    },
}
ORDER = [
    "whole",
    *COMPARISON["variants"],
    *(f"{n}-{r}" for n in ("reap", "magnitude", "m_smoe", "hc_smoe") for r in (25, 50)),
]


def saved(place: Path, family: str, **changes: Any) -> Path:
    """A small random model with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build(family, **changes).save_pretrained(place)
    vocabulary = {"<end>": 0} | {chr(c): i for i, c in enumerate(range(ord("A"), ord("A") + 60), 1)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, text to calibrate on and text for the loss."""
    place = tmp_path_factory.mktemp("checkpoint")
    saved(place / "qwen", "qwen3_moe")
    saved(place / "glm", "glm4_moe")
    (place / "text.txt").write_text("A quick brown fox jumps over the lazy dog. " * 12)
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("ABCDEFGH xyz"), 50)) for _ in range(6)]
    (place / "held.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return place


def written(place: Path, comparison: dict[str, Any]) -> Path:
    texts = {"data": str(place / "text.txt"), "held_out": str(place / "held.jsonl")}
    path = place / f"{comparison['name']}.yaml"
    path.write_text(yaml.safe_dump({**texts, **comparison}, sort_keys=False))
    return path


def compare(place: Path, comparison: dict[str, Any], model: Path, output: Path, *options: str) -> int:
    return main(
        ["compare", f"--config={written(place, comparison)}", f"--checkpoint={model}", f"--output={output}", *options]
    )


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """One variant fails, as it must."""
    assert compare(place, COMPARISON, place / "qwen", place / "out", "--export") == 1
    return place / "out"


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}


def losses(model: Path, text: Path, tokens: int = 16, n: int = 7) -> list[float]:
    """The slow way: `n` windows of the joined documents, spread evenly, one at a time."""
    from transformers import AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), load(model)
    ids: list[int] = []
    for line in text.read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    found = []
    for i in range(n):
        start = int(i * (len(ids) - tokens - 1) / (n - 1))
        row = torch.tensor(ids[start : start + tokens + 1])
        with torch.no_grad():
            logits = loaded.model(row[None, :-1]).logits[0].double()
        found.append(float(F.cross_entropy(logits, row[1:])))
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reap-25", ["--pruner=reap", "--pruner.ratio=0.25"]),
        ("reap-50", ["--pruner=reap", "--pruner.ratio=0.5"]),
        ("magnitude-50", ["--pruner=magnitude", "--pruner.ratio=0.5"]),
        ("m_smoe-50", ["--pruner=m_smoe", "--pruner.ratio=0.5"]),
        ("hc_smoe-25", ["--pruner=hc_smoe", "--pruner.ratio=0.25"]),
        ("laep", ["--pruner=laep", "--pruner.beta=0.3"]),
        ("sensitive", ["--pruner=frequency", "--pruner.ratio=0.3", "--pruner.allocation=sensitivity"]),
    ],
)
def test_losses_are_those_of_a_checkpoint_that_is_pruned_and_loaded_again(
    place: Path, finished: Path, tmp_path: Path, name: str, options: list[str]
) -> None:
    measured = [f"--{key}={value}" for key, value in MEASURED.items()]
    text = f"--data={place / 'text.txt'}"
    out = tmp_path / "pruned"
    assert main(["prune", f"--model={place / 'qwen'}", *options, text, *measured, f"--output={out}"]) == 0
    before, after = (np.array(losses(model, place / "held.jsonl")) for model in (place / "qwen", out))
    row = rows(finished)[name]
    assert row["val_loss"]["before"]["mean"] == pytest.approx(before.mean(), abs=1e-5)
    assert row["val_loss"]["after"]["mean"] == pytest.approx(after.mean(), abs=1e-5)
    assert row["jump"]["value"] == pytest.approx((after - before).mean(), abs=1e-5)
    assert row["jump"]["stderr"] == pytest.approx((after - before).std(ddof=1) / np.sqrt(7), abs=1e-5)
    exported = finished / name / "checkpoint"
    ours, theirs = load_file(exported / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((exported / "config.json").read_text()) == json.loads((out / "config.json").read_text())


def test_results(place: Path, finished: Path) -> None:
    found, variants = json.loads((finished / "results.json").read_text()), rows(finished)
    assert list(variants) == ORDER
    assert (found["train_on"], found["trunk"], found["suite"], found["reference"]) == (False, None, None, "whole")
    assert found["model"]["experts_in_all"] == 24
    assert found["checkpoint"]["family"] == "qwen3_moe"
    assert found["checkpoint"]["held_out"]["sequences"] == 7
    assert found["domains"] == ["held.jsonl"]
    broken = variants.pop("broken")
    assert broken["status"] == "failed"
    assert "multiple_of=3" in broken["error"]
    assert variants["whole"]["jump"] is None
    assert variants["whole"]["parameters_kept"] == 1
    assert variants["reap-25"]["experts_kept"] == [6, 6, 6]
    assert (variants["m_smoe-50"]["strategy"], variants["m_smoe-50"]["family"]) == ("m_smoe", "merging")
    n = sum(p.numel() for p in load(finished / "reap-50" / "checkpoint").model.parameters())
    assert variants["reap-50"]["parameters"] == n
    assert (
        variants["reap-50"]["active_parameters"] == variants["whole"]["active_parameters"] - 3 * 4 * 32
    )  # router rows
    for name in variants.keys() - {"whole"}:
        assert (finished / variants[name]["plan"]).exists()
        assert variants[name]["vs_reference"] is None
    for budget in ("25 %", "50 %"):
        group = [row for row in variants.values() if row["budget"] == budget]
        assert len(group) == 4
        assert sum(row["vs_lowest"] is None for row in group) == 1
    evidence = json.loads((finished / "evidence" / "evidence.json").read_text())
    assert evidence["provenance"]["data"]["source"] == str(place / "text.txt")
    assert {"counts", "g1f1", "ablation", "logit_gram", "mean_f"} <= set(evidence["statistics"])


def test_overlap_is_that_of_the_plans(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())["overlap"]
    assert sorted(found["names"]) == ["hc_smoe", "magnitude", "m_smoe", "reap"] or len(found["names"]) == 4
    plans = {name: json.loads((finished / f"{name}-25" / "plan.json").read_text()) for name in found["names"]}
    gone = {
        name: [set(b) - set(k) for b, k in zip(plan["before"], plan["kept"], strict=True)]
        for name, plan in plans.items()
    }
    for i, a in enumerate(found["names"]):
        for j, b in enumerate(found["names"]):
            shared = [len(x & y) / len(x | y) for x, y in zip(gone[a], gone[b], strict=True)]
            assert found["budgets"][0]["overlap"][i][j] == pytest.approx(np.mean(shared), abs=1e-6)
    assert found["budgets"][0]["ratio"] == pytest.approx(0.25)


def test_report(finished: Path, place: Path) -> None:
    page, text = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    assert str(place / "qwen") in page
    for words in ("the text that plans were made from", "step 0", "trunk", "trigger", "validation", "training step"):
        assert words not in text, words
    for name in ("loss_jump", "jump_against_parameters", "experts_kept", "overlap"):
        assert (finished / "plots" / f"{name}.png").exists()
        assert f"plots/{name}.png" in text
    assert "multiple\\_of=3" in text


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the model was run on."""
    seen: list[int] = []
    logits = TransformersModel.logits

    def counted(self: TransformersModel, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(len(tokens))
        return logits(self, tokens, mask)

    monkeypatch.setattr(TransformersModel, "logits", counted)
    return seen


def test_nothing_is_done_twice(place: Path, finished: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Called again: the failed variant alone is tried. With more variants: they alone are measured, from the same evidence. With
    one that reads more: that is measured and added. With all done: the model is not even loaded."""
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    assert len(stamps) == len(ORDER) - 1
    before = json.loads((finished / "results.json").read_text())
    assert compare(place, COMPARISON, place / "qwen", finished) == 1
    assert passes == []
    assert rows(finished) == {row["name"]: row for row in before["variants"]}
    more = {**COMPARISON["variants"], "other": {"config": {"pruning": {"pruner": {"class_path": "frequency"}}}}}
    del more["broken"]
    assert compare(place, {**COMPARISON, "variants": more}, place / "qwen", finished) == 0
    assert passes == [2, 2, 2, 1]  # the held-out text, once
    known = json.loads((finished / "evidence" / "evidence.json").read_text())
    more["gradients"] = {"config": {"pruning": {"pruner": "taylor"}}}
    del passes[:]
    assert compare(place, {**COMPARISON, "variants": more}, place / "qwen", finished) == 0
    assert passes == [2, 2, 2, *[2, 2, 2, 1]]  # the calibration text and the held-out text, once each
    grown = json.loads((finished / "evidence" / "evidence.json").read_text())
    assert set(grown["statistics"]) == set(known["statistics"]) | {"taylor"}
    assert grown["provenance"] == known["provenance"]
    assert {path.name for path in (finished / "evidence").iterdir()} == {"evidence.json", "evidence.safetensors"}
    weights = finished / "laep" / "checkpoint" / "model.safetensors"
    content = weights.read_bytes()
    shutil.rmtree(weights.parent)
    del passes[:]
    assert compare(place, {**COMPARISON, "variants": more}, place / "qwen", finished, "--export") == 0
    assert passes == []
    assert weights.read_bytes() == content
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}

    def loads(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoint, "subject", loads)
    assert compare(place, {**COMPARISON, "variants": more}, place / "qwen", finished) == 0
    assert set(rows(finished)) == set(ORDER) - {"broken"} | {"other", "gradients"}


def test_interrupted_calls_go_on(place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of the calibration, then of the variants; the results are those of a call that was not."""
    from moeprune.pruning.calibration import Recording

    monkeypatch.setattr("moeprune.commands.calibrate.measured.__defaults__", ("weight", 1, False))
    update, plan = Recording.update, checkpoint.Work.variant

    def stop(self: Recording, batch: Any) -> None:
        if self.seen == 2:
            raise KeyboardInterrupt
        update(self, batch)

    monkeypatch.setattr(Recording, "update", stop)
    assert compare(place, COMPARISON, place / "qwen", tmp_path / "out") == 130
    assert len(list((tmp_path / "out" / "evidence").glob("more-*/partial.safetensors"))) == 1
    seen: list[int] = []

    def go_on(self: Recording, batch: Any) -> None:
        seen.append(self.seen)
        update(self, batch)

    def at_laep(self: checkpoint.Work, name: str) -> None:
        if name == "searched":
            raise KeyboardInterrupt
        plan(self, name)

    monkeypatch.setattr(Recording, "update", go_on)
    monkeypatch.setattr(checkpoint.Work, "variant", at_laep)
    assert compare(place, COMPARISON, place / "qwen", tmp_path / "out") == 130
    assert seen == [2]
    monkeypatch.setattr(checkpoint.Work, "variant", plan)
    assert compare(place, COMPARISON, place / "qwen", tmp_path / "out") == 1
    mine, theirs = rows(tmp_path / "out"), rows(finished)
    for name in ORDER:
        if name != "broken":
            assert mine[name]["val_loss"] == theirs[name]["val_loss"], name
            assert mine[name]["experts_kept"] == theirs[name]["experts_kept"]


def test_a_router_with_sigmoid_and_groups(place: Path, tmp_path: Path) -> None:
    """GLM-4.5's router: equal numbers per group, a bias per expert; the weights are as before after all variants."""
    families = {"outputs": ["reap"], "merging": ["hc_smoe"], "weights": ["router_norm"]}
    comparison = {**COMPARISON, "name": "glm", "sweep": {"ratios": [0.25, 0.5], "families": families}, "variants": {}}
    assert compare(place, comparison, place / "glm", tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert found["reap-50"]["experts_kept"] == [4, 4]
    by_chance = np.array(json.loads((tmp_path / "out" / "results.json").read_text())["overlap"]["budgets"][0]["chance"])
    # one of four goes in each of two groups: both the same in 1/16 of all draws, one the same (1 of 3 that either removes) in 6/16
    assert by_chance[~np.eye(3, dtype=bool)] == pytest.approx(1 / 16 + 6 / 16 / 3)
    assert (tmp_path / "out" / "plots" / "loss_jump.png").exists()
    for name, pruner in (("reap-50", "reap"), ("hc_smoe-25", "hc_smoe")):
        options = [f"--pruner={pruner}", f"--pruner.ratio=0.{name[-2:]}", f"--data={place / 'text.txt'}"]
        options += [f"--{key}={value}" for key, value in MEASURED.items()]
        assert main(["prune", f"--model={place / 'glm'}", *options, f"--output={tmp_path / name}"]) == 0
        after = np.mean(losses(tmp_path / name, place / "held.jsonl"))
        assert found[name]["val_loss"]["after"]["mean"] == pytest.approx(after, abs=1e-5)


@pytest.mark.parametrize("merging", [False, True])
def test_weights_are_as_before(place: Path, merging: bool) -> None:
    from moeprune import registry

    model = load(place / "glm")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    tokens = torch.arange(3, 60)[None]
    pruner = registry.create("pruner", "m_smoe" if merging else "reap", ratio=0.5)
    evidence = record(model, [tokens], pruner.needs)
    plan = pruner.plan(evidence, Constraints().for_router(model.n_groups, model.min_experts))
    assert any(plan.merges) == merging

    def fail() -> None:
        with checkpoint.applied(model, plan):
            assert [layer.n_experts for layer in model.moe_layers] == [4, 4]
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [layer.ids for layer in model.moe_layers] == [tuple(range(8))] * 2


# --- moeprune's own models


@pytest.fixture(scope="module")
def own(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file of a fresh model, with the tokenizer of the tiny corpus."""
    data = TextData(str(corpus), None, 300, 160)
    config = MoEConfig(
        vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_experts=8, top_k=2, d_expert=12, max_seq_len=160
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MoETransformer(config)
    found = checkpoints.Checkpoint(
        config, [list(range(8))] * 2, model.state_dict(), [], data.store.tokenizer_json, data.describe(), 7
    )
    path = tmp_path_factory.mktemp("own") / "last.ckpt"
    state = {checkpoints.PREFIX + name: value for name, value in found.state.items()}
    torch.save({"state_dict": state, checkpoints.ENTRY: found.entry()}, path)
    return path


def test_own_checkpoint_with_a_suite(own: Path, corpus: Path, tmp_path: Path) -> None:
    """Scores and paired differences of moeprune's own model; the loss is that of `moeprune validate`'s sequences."""
    comparison = {
        "name": "own",
        "suite": "offline",
        "limit": 2,
        **MEASURED,
        "seq_len": 24,
        "eval_sequences": 3,
        "max_gen_toks": 5,
        "variants": {"reap": {"config": {"pruning": {"pruner": "reap"}}}},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    arguments = ["compare", f"--config={tmp_path / 'own.yaml'}", f"--checkpoint={own}", f"--output={tmp_path / 'out'}"]
    assert main([*arguments, "--export"]) == 0
    found = rows(tmp_path / "out")
    pruned = checkpoints.read(tmp_path / "out" / "reap" / "checkpoint")
    data = TextData(str(corpus), None, 300, 24, eval_sequences=3)
    from moeprune.training.module import domain_losses

    theirs = domain_losses(pruned.model(), data.evaluation_batches("valid"))
    for domain in ("sky", "code"):
        assert found["reap"]["val_loss"]["end"]["domains"][domain] == pytest.approx(theirs[domain].mean(), abs=1e-5)
    assert found["reap"]["experts_kept"] == [6, 6]
    assert len(pruned.plans) == 1
    assert len(found["reap"]["scores"]) == 15
    for score in found["reap"]["scores"].values():
        assert score["vs_reference"]["half_width"] >= 0
    assert found["whole"]["families"].keys() == found["reap"]["families"].keys() != set()
    for family, score in found["reap"]["families"].items():
        difference = score["value"] - found["whole"]["families"][family]["value"]
        assert score["vs_reference"]["value"] == pytest.approx(difference, abs=1e-9)
    scores = json.loads((tmp_path / "out" / "reap" / "evaluation" / "scores.json").read_text())
    model = f"--model={tmp_path / 'out' / 'reap' / 'checkpoint'}"
    assert not main(["evaluate", model, "--limit=2", "--max_gen_toks=5", f"--output={tmp_path / 'e'}"])
    configs = [
        json.loads((folder / "results.json").read_text())["config"]
        for folder in (tmp_path / "out" / "reap" / "evaluation", tmp_path / "e")
    ]
    assert set(configs[0]["max_gen_toks"].values()) == {5}
    assert configs[0]["max_gen_toks"] == configs[1]["max_gen_toks"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "offline, 2 documents per task, max\\_gen\\_toks=5" in report
    assert "its loss on held-out text " in report or "in loss on held-out text" in report
    assert "validation loss" not in report
    alone = json.loads((tmp_path / "e" / "scores.json").read_text())["rows"]
    assert {name: row["value"] for name, row in scores["rows"].items()} == pytest.approx(
        {name: row["value"] for name, row in alone.items()}, abs=1e-6
    )
    assert "Scores" in (tmp_path / "out" / "report.html").read_text()


def test_a_suite_with_a_chat_template(place: Path, tmp_path: Path) -> None:
    """What is scored, and how, is what `moeprune evaluate` makes of the checkpoint."""
    from transformers import AutoTokenizer

    model = saved(tmp_path / "model", "qwen3_moe", max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ 'A' + m['content'] + 'B' }}{% endfor %}"
    tokenizer.save_pretrained(model)
    comparison = {**COMPARISON, "name": "chat", "suite": "offline", "limit": 1, "sweep": None}
    comparison |= {"variants": {}, "apply_chat_template": True, "max_gen_toks": 3}
    assert compare(place, comparison, model, tmp_path / "out") == 0
    options = ["--limit=1", "--batch_size=2", "--apply_chat_template", "--max_gen_toks=3", f"--output={tmp_path / 'e'}"]
    assert not main(["evaluate", f"--model={model}", *options])
    mine, alone = (
        json.loads((f / "scores.json").read_text()) for f in (tmp_path / "out/whole/evaluation", tmp_path / "e")
    )
    assert {name: row["value"] for name, row in mine["rows"].items()} == {
        name: row["value"] for name, row in alone["rows"].items()
    }
    config = json.loads((tmp_path / "out" / "whole" / "evaluation" / "results.json").read_text())["config"]
    assert config["apply_chat_template"] is True


# --- held-out text


def test_sequences_do_not_overlap_and_chats_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    path.write_text("\n".join(json.dumps(row) for row in ({"text": "a" * 25}, chat, {"text": "b" * 6})))
    encode: Callable[[Any], list[int]] = lambda d: [ord(c) for c in d] if isinstance(d, str) else [1, 2, 3]  # noqa: E731
    (each,) = held_out.sequences(str(path), encode, [0], 9, 50).values()
    stream = [ord("a")] * 25 + [0] + [ord("b")] * 6 + [0]
    assert each == [stream[:10], stream[11:21], stream[23:33], [1, 2, 3]]


def test_too_little_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(UserError, match="holds 4 tokens, less than one sequence of 10"):
        held_out.sequences(str(tmp_path / "short.txt"), lambda d: [1] * len(d), [0], 9, 50)


def test_padding_does_not_count(place: Path) -> None:
    model = load(place / "qwen")
    each = [[5, 6, 7, 8, 9], [9, 8, 7], [1, 2, 3, 4]]
    together = held_out.losses(model, {"a": each}, 3)["a"]
    alone = [held_out.losses(model, {"a": [row]}, 1)["a"][0] for row in each]
    assert together == pytest.approx(alone, abs=1e-5)


# --- bad input


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def dense(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for file in path.glob("model*"):
        file.unlink()
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(path)


def of(name: str, **config: Any) -> dict[str, Any]:
    return {"variants": {name: config}}


REAP = {"pruning": {"pruner": "reap"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "tiny.yaml"}, "are both given"),
        ({"trunk": {}}, "trunk is an option for training"),
        ({"train_on": True}, "train_on is an option for training"),
        ({"options": ["--trainer.max_steps=3"]}, "options is an option for training"),
        ({"workers": 2}, "workers is an option for training"),
        (of("a", config={"pruning": {"pruner": "reap", "trigger": "stable"}}), "variant 'a' sets a trigger"),
        (of("a", config={**REAP, "model": {"balancers": ["switch"]}}), "variant 'a' sets model.balancers"),
        (of("a", config={"pruner": "reap"}), "pruning.pruner and pruning.constraints alone"),
        (of("a", config=REAP, start="scratch"), "variant 'a' sets start: scratch"),
        (of("a", config=REAP, drift=True), "variant 'a' sets drift"),
        (of("a"), "variant 'a' names no pruner"),
        (of("whole", config=REAP), "the reference 'whole' prunes"),
        (of("evidence", config=REAP), "cannot be called 'evidence'"),
        (of("a", config={"pruning": {"pruner": "raep"}}), "reap"),
        (
            of("a", config={"pruning": {"pruner": {"class_path": "laep", "init_args": {"beta": 3}}}}),
            "variant 'a': beta must",
        ),
        (of("a", config={"pruning": {"pruner": {"class_path": "laep", "init_args": {"bta": 3}}}}), "beta"),
        ({"reference": "base"}, "base"),
        ({"suite": "ofline"}, "offline"),
        ({"max_gen_toks": 9}, "max_gen_toks is an option for a suite, and there is none"),
        ({"suite": "offline", "max_gen_toks": 0}, "max_gen_toks must be at least 1"),
        ({"suite": "offline", "apply_chat_template": True}, "qwen has no chat template"),
        ({"data": "missing.txt"}, "no text at missing.txt"),
        ({"held_out": "missing.txt"}, "no text at missing.txt"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1"),
        ({"eval_sequences": 1}, "eval_sequences must be at least 2"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device 'tpu' cannot be used here"),
    ],
)
def test_bad_options(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    (place / "tiny.yaml").touch()
    comparison = {**COMPARISON, **change, "name": "bad"}
    assert compare(place, comparison, place / "qwen", tmp_path / "out") == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("moeprune: error: ")
    assert any(word in sentence for word in words.split(" | ")), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_tokenizer, "holds no tokenizer"),
        (dense, "no number of experts"),
        (lambda path: shutil.rmtree(path), "there is no checkpoint at"),
        (lambda path: next(path.glob("*.safetensors")).unlink(), "holds no safetensors"),
    ],
)
def test_bad_checkpoints(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], words: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / "qwen", model)
    change(model)
    assert compare(place, COMPARISON, model, tmp_path / "out") == 2
    sentence = capsys.readouterr().err
    assert words in sentence
    assert "Traceback" not in sentence
    assert not (tmp_path / "out").exists()


def test_neither_recipe_nor_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(place, {**COMPARISON, "name": "neither"})
    assert main(["compare", f"--config={config}"]) == 2
    assert "missing: recipe or checkpoint" in capsys.readouterr().err


def test_options_of_a_checkpoint_with_a_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(place, {"name": "recipe", "recipe": "tiny.yaml", "variants": {"a": {}}, "reference": "a"})
    (place / "tiny.yaml").touch()
    assert main(["compare", f"--config={config}"]) == 2
    assert "data is an option for an existing checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration_batches": 2}, "other calibration_batches"),
        ({"sweep": None, **of("reap-25", config=REAP)}, "another variant 'reap-25'"),
        ({"held_out": None}, "other held_out"),
        ({"suite": "offline", "max_gen_toks": 9}, "other max_gen_toks, suite"),
    ],
)
def test_a_folder_of_another_comparison(
    place: Path, finished: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    comparison = {key: value for key, value in {**COMPARISON, **change}.items() if key != "held_out"}
    config = written(place, comparison)
    if "held_out" in change:
        config.write_text(config.read_text().replace("held_out:", "#"))
    assert main(["compare", f"--config={config}", f"--checkpoint={place / 'qwen'}", f"--output={finished}"]) == 2
    assert words in capsys.readouterr().err


def test_another_checkpoint_and_other_text(
    place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = {key: value for key, value in COMPARISON.items() if key != "sweep"}
    comparison["variants"] = {"laep": COMPARISON["variants"]["laep"]}
    assert compare(place, comparison, place / "glm", finished) == 2
    assert "of another checkpoint (sha256" in capsys.readouterr().err
    shutil.copytree(finished / "evidence", tmp_path / "half" / "evidence")  # of a call that was interrupted there
    shutil.copy(finished / "comparison.json", tmp_path / "half")
    assert compare(place, comparison, place / "glm", tmp_path / "half") == 2
    assert "of another checkpoint (sha256" in capsys.readouterr().err
    held = (place / "held.jsonl").read_text()
    (place / "held.jsonl").write_text(held.replace("A", "B"))
    try:
        comparison["variants"]["new"] = {"config": {"pruning": {"pruner": "frequency"}}}
        assert compare(place, comparison, place / "qwen", finished) == 2
        assert "of another held-out text" in capsys.readouterr().err
    finally:
        (place / "held.jsonl").write_text(held)
    (tmp_path / "thesis.txt").write_text("do not lose")
    assert compare(place, comparison, place / "qwen", tmp_path, "--overwrite") == 2
    assert (tmp_path / "thesis.txt").exists()


def test_overwriting_starts_anew(place: Path, tmp_path: Path) -> None:
    comparison = {**COMPARISON, "sweep": None, **of("a", config=REAP)}
    assert compare(place, comparison, place / "qwen", tmp_path / "out") == 0
    before = rows(tmp_path / "out")
    other = {**comparison, "seq_len": 12}
    assert compare(place, other, place / "qwen", tmp_path / "out") == 2
    assert compare(place, other, place / "qwen", tmp_path / "out", "--overwrite") == 0
    assert rows(tmp_path / "out")["a"]["val_loss"] != before["a"]["val_loss"]


def test_what_cannot_be_measured_fails_its_variant_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statistic that this model refuses leaves the measurement of all others standing."""
    from moeprune.interop.transformers import TransformersLayer

    def refuse(self: TransformersLayer) -> Any:
        raise UserError("no module's output is this layer's input")

    monkeypatch.setattr(TransformersLayer, "residual_norm", property(refuse))
    variants = {"easy": {"config": {"pruning": {"pruner": "easy_ep"}}}, "reap": {"config": REAP}}
    comparison = {**COMPARISON, "sweep": None, "variants": variants}
    assert compare(place, comparison, place / "qwen", tmp_path / "out") == 1
    found = rows(tmp_path / "out")
    assert found["easy"]["error"] == "no module's output is this layer's input"
    assert found["reap"]["status"] == "done"
