"""`moeprune prune | calibrate | plan` on transformers checkpoints: the ways agree, and bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build
from safetensors import safe_open

from moeprune.cli import main
from moeprune.interop.checkpoint import load, read_record

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT = ["--calibration_batches=2", "--batch_size=2", "--seq_len=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE checkpoint in several shards, with a tokenizer and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("qwen")
    build("qwen3_moe").save_pretrained(place / "model", max_shard_size="60KB")
    vocabulary = {"<end>": 0} | {chr(c): i for i, c in enumerate(range(ord("A"), ord("A") + 60), 1)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>").save_pretrained(place / "model")
    (place / "text.txt").write_text("A quick brown fox jumps over the lazy dog. " * 40)
    return place


def run(command: str, folder: Path, *options: str, model: Path | None = None) -> int:
    return main([command, f"--model={model or folder / 'model'}", *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    configs = [json.loads((each / "config.json").read_text()) for each in (a, b)]
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) and configs[0] == configs[1]


def test_all_ways_give_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    """In memory; layer by layer; from saved evidence; from a plan made without the model."""
    data = f"--data={folder / 'text.txt'}"
    prune = ["--pruner=reap", "--pruner.ratio=0.4"]
    assert run("prune", folder, *prune, data, *SHORT, f"--output={tmp_path / 'a'}") == 0
    assert run("prune", folder, *prune, data, *SHORT, "--layerwise", f"--output={tmp_path / 'b'}") == 0
    assert run("calibrate", folder, data, *SHORT, "--statistics=[counts,g0f0,g1f1]", f"--output={tmp_path / 'e'}") == 0
    evidence = f"--evidence={tmp_path / 'e'}"
    assert run("prune", folder, *prune, evidence, f"--output={tmp_path / 'c'}") == 0
    assert main(["plan", evidence, *prune, f"--output={tmp_path / 'plan.json'}"]) == 0
    assert run("prune", folder, f"--plan={tmp_path / 'plan.json'}", f"--output={tmp_path / 'd'}") == 0
    assert all(same(tmp_path / "a", tmp_path / other) for other in "bcd")
    assert [layer.n_experts for layer in load(tmp_path / "a").moe_layers] == [5, 5, 5]
    provenance = read_record(tmp_path / "a")["plans"][0]["provenance"]
    assert provenance["data"]["source"] == str(folder / "text.txt")
    assert provenance["calibration_tokens"] == 2 * 2 * 16


def test_unequal_layers_and_twice(folder: Path, tmp_path: Path) -> None:
    """LAEP's numbers differ by layer; the pruned checkpoint is pruned again, by original ids."""
    data = f"--data={folder / 'text.txt'}"
    laep = ["--pruner=laep", "--pruner.beta=0.3", data, *SHORT]
    assert run("prune", folder, *laep, f"--output={tmp_path / 'once'}") == 0
    once = load(tmp_path / "once")
    protect = ["--pruner=magnitude", "--pruner.ratio=0.3", f"--protected=[[{once.moe_layers[0].ids[0]}],[],[]]"]
    assert run("prune", folder, *protect, f"--output={tmp_path / 'twice'}", model=tmp_path / "once") == 0
    twice = load(tmp_path / "twice")
    for before, after in zip(once.moe_layers, twice.moe_layers, strict=True):
        assert set(after.ids) < set(before.ids)
    assert once.moe_layers[0].ids[0] in twice.moe_layers[0].ids
    assert len(read_record(tmp_path / "twice")["plans"]) == 2


def broken(change: Callable[[Path], None]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tmp_path: Path) -> Path:
        copy = tmp_path / "broken"
        shutil.copytree(folder / "model", copy)
        change(copy)
        return copy

    return make


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def truncate(path: Path) -> None:
    data = shards(path)[1].read_bytes()
    shards(path)[1].write_bytes(data[: len(data) // 2])


def disagree(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    names = sorted(data["weight_map"])
    data["weight_map"][names[0]] = shards(path)[-1].name
    index.write_text(json.dumps(data))


def without(name: str) -> Callable[[Path], None]:
    """The tensor is in no file, and no index names it."""

    def change(path: Path) -> None:
        from safetensors.torch import save_file

        index = path / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        shard = path / data["weight_map"].pop(name)
        index.write_text(json.dumps(data))
        with safe_open(shard, framework="pt") as opened:
            left = {each: opened.get_tensor(each) for each in opened.keys() if each != name}  # noqa: SIM118
        save_file(left, shard, metadata={"format": "pt"})

    return change


def wider(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 24}))


def pickled(path: Path) -> None:
    for shard in shards(path):
        shard.unlink()
    (path / "model.safetensors.index.json").unlink()
    torch.save({}, path / "pytorch_model.bin")


def dense(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for file in path.glob("model*"):
        file.unlink()
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(path)


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


REAP = ["--pruner=reap", *SHORT]
ATTENTION, ROUTER = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
MAGNITUDE = ["--pruner=magnitude"]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda path: shards(path)[0].unlink(), REAP, "lacks the shard model-00001"),
        (lambda path: shards(path)[0].unlink(), MAGNITUDE, "lacks the shard model-00001"),
        (truncate, REAP, "is truncated or no safetensors file"),
        (truncate, MAGNITUDE, "is truncated or no safetensors file"),
        (disagree, MAGNITUDE, "the index of | does not hold it"),
        (pickled, MAGNITUDE, "pytorch_model.bin is a pickle, which is not read"),
        (pickled, REAP, "pytorch_model.bin is a pickle, which is not read"),
        (dense, REAP, "no number of experts | 'llama'"),
        (no_tokenizer, REAP, "holds no tokenizer"),
        (lambda path: (path / "config.json").write_text('{"model_type": "nothing"}'), REAP, "cannot read | nothing"),
        *(
            (without(name), options, f"lacks | {name.rpartition('.experts.')[0] or name} | complete the download")
            for name in (ATTENTION, ROUTER, EXPERT)
            for options in (REAP, [*REAP, "--layerwise"], MAGNITUDE)
            if name != EXPERT or "--layerwise" in options
        ),
        (without(EXPERT), REAP, "up_proj.weight is there for 7 experts, MoE layer 1 has 8"),
        (without(EXPERT), MAGNITUDE, "up_proj.weight is there for 7 experts, MoE layer 1 has 8"),
        (wider, REAP, "has shape | its configuration asks for"),
        (lambda path: (path / "model.safetensors.index.json").write_text("[]"), REAP, "is no JSON object"),
        (lambda path: (path / "moeprune.json").write_text("[]"), REAP, "is no JSON object"),
    ],
)
def test_broken_checkpoints(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    options: list[str],
    words: str,
) -> None:
    model = broken(change)(folder, tmp_path)
    assert run("prune", folder, *options, f"--output={tmp_path / 'out'}", model=model) == 2
    sentence = capsys.readouterr().err
    assert all(word in sentence for word in words.split(" | ")), sentence
    assert "Traceback" not in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pruner=magnitude", "--pruner.ratio=1"], "ratio must lie in [0, 1)"),
        (
            ["--pruner=magnitude", "--max_keep=1"],
            "max_keep=1 is below 2, the fewest experts that the router works with",
        ),
        (["--pruner=magnitude", "--n_groups=3"], "n_groups=3 does not divide the 8 experts"),
        (["--pruner=reap", "--data=missing.txt"], "no text at missing.txt"),
        (["--pruner=reap", "--device=tpu"], "device 'tpu' cannot be used here"),
        (["--pruner=taylor", "--layerwise", *SHORT], "taylor cannot be measured layer by layer"),
        (["--pruner=reap", "--uniform_view", "--min_keep=[8,4,4]", *SHORT], "expected int"),
        ([*REAP, "--calibration_batches=0"], "calibration_batches must be at least 1"),
        ([*REAP, "--batch_size=0"], "batch_size must be at least 1"),
        ([*REAP, "--seq_len=-5"], "seq_len must be at least 1"),
        ([*REAP, "--seed=-1"], "seed must be at least 0"),
        ([*REAP, "--device=meta"], "device 'meta' cannot be used here"),
        ([*REAP, "--output=/proc/nowhere/out"], "cannot write /proc/nowhere/out"),
    ],
)
def test_bad_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run("prune", folder, f"--output={tmp_path / 'out'}", *options) == 2
    sentence = capsys.readouterr().err
    assert any(word in sentence for word in words.split(" | ")), sentence
    assert "Traceback" not in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--pruner=frequency", *SHORT], MAGNITUDE], ids=["in memory", "streaming"])
def test_nothing_but_another_model_is_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    shutil.copytree(folder / "model", tmp_path / "all" / "in")
    model, data = tmp_path / "all" / "in", f"--data={folder / 'text.txt'}"
    before = weights(model)
    for output, words in (
        (precious, "holds something else than a model"),
        (model, "holds the source itself"),
        (model.parent, "holds the source itself"),
    ):
        assert run("prune", folder, *options, data, f"--output={output}", "--overwrite", model=model) == 2
        assert words in capsys.readouterr().err
    assert (precious / "thesis.tex").exists()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    for _ in range(2):
        assert run("prune", folder, *options, data, f"--output={tmp_path / 'out'}", "--overwrite", model=model) == 0


def test_a_uniform_view_is_not_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its padding would count as experts."""
    model = tmp_path / "model"
    build("dots1").save_pretrained(model)
    (model / "moeprune.json").write_text(
        json.dumps({"format": "moeprune.transformers/1", "expert_ids": [[0, 1, 2, 3, 4, 5, 6, -1]], "n_original": 8})
    )
    for options in (["--layerwise"], []):
        assert main(["prune", f"--model={model}", *REAP, *options, f"--output={tmp_path / 'out'}"]) == 2
        assert "is a uniform view" in capsys.readouterr().err


def test_names_that_are_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--model=nobody/nothing", "--pruner=magnitude", f"--output={tmp_path / 'out'}"]) == 2
    assert "there is no folder nobody/nothing" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def full(self: PreTrainedModel, path: Path, **_: object) -> None:
        Path(path).mkdir()
        (Path(path) / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert run("prune", folder, *REAP, f"--data={folder / 'text.txt'}", f"--output={tmp_path / 'out'}") == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_load_takes_either_kind(folder: Path, tmp_path: Path) -> None:
    import moeprune

    tokens = torch.arange(3, 12)[None]
    assert moeprune.load(folder / "model")(tokens).logits.shape == (1, 9, 64)
    assert run("prune", folder, "--pruner=random", "--pruner.allocation=global", f"--output={tmp_path / 'cut'}") == 0
    assert moeprune.load(str(tmp_path / "cut"))(tokens).logits.shape == (1, 9, 64)
