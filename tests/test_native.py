"""moeprune's own models to and from transformers: the same logits; training goes on where another run or model stopped."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from moeprune import checkpoints
from moeprune.checkpoints import Checkpoint
from moeprune.cli import main
from moeprune.errors import UserError
from moeprune.files import read_rows
from moeprune.interop import checkpoint as interop
from moeprune.interop import native
from moeprune.model.attention import Attention
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan
from moeprune.training.callbacks import LastCheckpoint
from moeprune.training.data import Corpus, TextData, TokenStore

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = MoEConfig(vocab_size=300, d_model=32, n_layers=3, n_heads=4, n_experts=8, d_expert=12, max_seq_len=48)
PLAIN = {"renormalize": False}


def plan(kept: list[list[int]], n: int = 8) -> PrunePlan:
    return PrunePlan(tuple(map(tuple, kept)), (tuple(range(n)),) * len(kept), (n,) * len(kept), 2)


def own(config: MoEConfig, kept: list[list[int]] | None = None, bias: bool = True, tokenizer: str = "") -> Checkpoint:
    """A model whose every parameter matters, pruned to `kept`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MoETransformer(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "router" in name or "down" in name:
                    parameter.normal_(std=0.4)
                elif parameter.ndim == 1 and (bias or name != "head.bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    plans = [] if kept is None else [plan(kept)]
    for each in plans:
        apply_plan(model, each)
    ids = [list(layer.ids) for layer in model.moe_layers]
    return Checkpoint(config, ids, model.state_dict(), plans, tokenizer, {"source": "embedded", "domains": ["lit"]}, 7)


def tokens(rows: int = 2, length: int = 48, size: int = 300) -> Tensor:
    return torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, MoETransformer):
            return model(x)
        return model.eval()(x, use_cache=False).logits


EQUAL, UNEQUAL = [[0, 2, 3, 5, 7], [1, 2, 3, 4, 5], [0, 1, 2, 6, 7]], [[1, 2, 4, 5, 6, 7], [0, 3, 5, 7], list(range(8))]
FORMS: list[tuple[dict[str, Any], str]] = [
    ({}, "Mixtral"),
    ({"n_kv_heads": 2}, "Mixtral"),
    ({"n_kv_heads": 1, "head_dim": 10, "rope_theta": 500.0, "norm_eps": 1e-3}, "Mixtral"),
    ({"qk_norm": "head", "n_kv_heads": 2, "top_k": 3}, "Qwen3Moe"),
    ({"qk_norm": "head", "head_dim": 16, "router_options": PLAIN}, "Qwen3Moe"),
    ({"qk_norm": "full", "n_kv_heads": 2, "norm_eps": 1e-3}, "Olmoe"),
    ({"qk_norm": "full", "router_options": PLAIN}, "Olmoe"),
    ({"tied_embeddings": True, "embedding_std": 0.1}, "Mixtral"),
]


@pytest.mark.parametrize(("changes", "family"), FORMS, ids=[str(changes) for changes, _ in FORMS])
@pytest.mark.parametrize(
    ("kept", "bias"),
    [(None, True), (None, False), (EQUAL, False), (UNEQUAL, True), (UNEQUAL, False)],
    ids=["whole", "whole without bias", "equal without bias", "unequal", "unequal without bias"],
)
def test_logits_are_the_same_both_ways(
    changes: dict[str, Any], family: str, kept: list[list[int]] | None, bias: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = own(replace(CONFIG, head_bias=bias, **changes), kept)
    expected = logits(source.model(), tokens())
    reasons = native.export(source, tmp_path / "hf")
    assert reasons == ["layers of unequal size"] * (kept is UNEQUAL) + ["the bias of the output head"] * bias
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=bool(reasons))
    assert type(model).__name__ == f"{'Pruned' if reasons else ''}{family}ForCausalLM"
    assert (logits(model, tokens()) - expected).abs().max() <= 1e-5
    again = native.read(tmp_path / "hf")
    if changes.get("tied_embeddings") and bias:  # the biased head has a weight of its own
        assert not again.config.tied_embeddings
    else:
        assert replace(again.config, embedding_std=source.config.embedding_std) == source.config
        assert again.state.keys() == source.state.keys()
        assert all(torch.equal(again.state[name], value) for name, value in source.state.items())
    assert torch.equal(logits(again.model(), tokens()), expected)
    assert (again.expert_ids, again.plans, again.data, again.step) == (
        source.expert_ids, source.plans, source.data, source.step
    )  # fmt: skip


@pytest.mark.parametrize(("changes", "family"), FORMS[:2] + FORMS[4:6], ids=["default", "grouped", "head", "full"])
def test_generation_with_a_cache_equals_step_by_step(changes: dict[str, Any], family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = own(replace(CONFIG, **changes), UNEQUAL)
    native.export(source, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    made = model.generate(tokens(1, 5), max_new_tokens=9, do_sample=False)
    slow = tokens(1, 5)
    for _ in range(9):
        slow = torch.cat([slow, logits(source.model(), slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)


def test_a_head_bias_of_zero_is_left_out(tmp_path: Path) -> None:
    source = own(CONFIG, bias=False)
    assert not native.export(source, tmp_path / "hf")
    again = native.read(tmp_path / "hf")
    assert not again.config.head_bias
    assert torch.equal(logits(again.model(), tokens()), logits(source.model(), tokens()))


def test_stock_code_does_not_load_a_biased_head_without_its_bias(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    native.export(own(CONFIG), tmp_path / "hf")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("kept", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_a_biased_head_survives_pruning_in_memory_and_on_disk(kept: list[list[int]], tmp_path: Path) -> None:
    source = own(CONFIG)
    expected = logits(own(CONFIG, kept).model(), tokens())
    native.export(source, tmp_path / "hf")
    plan(kept).save(tmp_path / "plan.json")
    assert main(["prune", f"--model={tmp_path}/hf", f"--plan={tmp_path}/plan.json", f"--output={tmp_path}/disk"]) == 0
    model = interop.load(tmp_path / "hf")
    apply_plan(model, plan(kept))
    interop.export(model, tmp_path / "memory", [plan(kept)])
    for folder in ("disk", "memory"):
        again = native.read(tmp_path / folder)
        assert again.expert_ids == kept
        assert torch.equal(logits(again.model(), tokens()), expected)
        assert (logits(interop.load(tmp_path / folder).model, tokens()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mixtral", {"head_dim": 12}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False, "head_dim": 16, "rms_norm_eps": 1e-3}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"norm_topk_prob": False, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": 77.0}}),
    ],
)
def test_models_of_transformers_become_our_own(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    x = tokens(size=64)
    expected = logits(model, x)
    mine = native.from_transformers(model)
    assert (logits(mine.model(), x) - expected).abs().max() <= 1e-5
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert (logits(native.read(tmp_path / "half").model(), x) - logits(half, x)).abs().max() <= 1e-5
    pruned = interop.load(tmp_path / "half", torch.float32)
    apply_plan(pruned, plan(UNEQUAL))
    interop.export(pruned, tmp_path / "pruned", [plan(UNEQUAL)])
    back = native.read(tmp_path / "pruned")
    assert (back.expert_ids, back.plans, back.config.n_experts) == (UNEQUAL, [plan(UNEQUAL)], 8)
    assert (logits(back.model(), x) - logits(pruned.model, x)).abs().max() <= 1e-5
    native.export(back, tmp_path / "again")
    assert torch.equal(logits(interop.load(tmp_path / "again").model, x), logits(pruned.model, x))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mixtral", {"sliding_window": 16}, "sliding_window=16"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("olmoe", {"clip_qkv": 4.0}, "clip_qkv=4.0"),
        ("olmoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ("qwen2_moe", {}, r"model_type='qwen2_moe', with shared_expert_intermediate_size=\d+ \(shared experts\)"),
        ("deepseek_v3", {}, r"model_type='deepseek_v3', with n_shared_experts=1"),
        ("glm4_moe", {}, "model_type='glm4_moe'"),
    ],
)
def test_what_ours_does_not_compute_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = build(family, **changes)
    with pytest.raises(UserError, match=words):
        native.from_transformers(model)
    model.save_pretrained(tmp_path / "hf")
    for weights in (True, False):
        with pytest.raises(UserError, match=words):
            native.read(tmp_path / "hf", weights)


def test_a_tensor_without_a_place_is_refused() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.gate.bias = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(UserError, match=r"no place for the tensor model\.layers\.1\.mlp\.gate\.bias"):
        native.from_transformers(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "sigmoid"}, r"model\.config\.router=sigmoid"),
        ({"router": "attention"}, r"model\.config\.router=attention"),
        ({"router_options": {"selection_bias": True}}, "selection_bias"),
        ({"attention": "lfa"}, r"model\.config\.attention=lfa"),
        ({"router_options": PLAIN}, "renormalize: false and qk_norm: none"),
        ({"qk_norm": "full", "head_dim": 12}, r"model\.config\.head_dim=12"),
    ],
)
def test_what_has_no_form_in_transformers_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        native.export(own(replace(CONFIG, **changes)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_uniform_view_is_refused(tmp_path: Path) -> None:
    native.export(own(CONFIG, UNEQUAL), tmp_path / "hf")
    record = json.loads((tmp_path / "hf" / "moeprune.json").read_text())
    record["expert_ids"][0][0] = -1
    (tmp_path / "hf" / "moeprune.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="uniform view"):
        native.read(tmp_path / "hf")


# -- the model's options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_attention_is_what_its_options_say(qk_norm: str) -> None:
    """Head by head and position by position, rotation as complex numbers; heads wider than d_model / n_heads."""
    B, S, D, H, KV, C = 2, 5, 12, 4, 2, 6
    config = replace(CONFIG, d_model=D, n_heads=H, n_kv_heads=KV, head_dim=C, qk_norm=qk_norm, norm_eps=1e-3)
    attention = Attention(config).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(B, S, D, dtype=torch.float64)
    whole = MoETransformer(config)
    with torch.no_grad():
        got = attention(x, whole.cos[:S].double(), whole.sin[:S].double())
    q, k, v = (x @ attention.qkv.weight.detach().T).split([H * C, KV * C, KV * C], -1)

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.detach()

    if qk_norm == "full":
        q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)
    q, k, v = (y.view(B, S, -1, C) for y in (q, k, v))
    if qk_norm == "head":
        q, k = norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight)

    def turned(y: Tensor, t: int) -> Tensor:
        angle = t * config.rope_theta ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
        z = torch.complex(*y.chunk(2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    expected = torch.zeros(B, S, H * C, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(S):
                scores = [turned(q[b, t, h], t) @ turned(k[b, s, h // 2], s) / C**0.5 for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                expected[b, t, h * C : (h + 1) * C] = sum(weights[s] * v[b, s, h // 2] for s in range(t + 1))
    torch.testing.assert_close(got, expected @ attention.out.weight.detach().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["standard", "lfa"])
@pytest.mark.parametrize("qk_norm", ["head", "full"])
def test_normed_queries_and_keys_train(attention: str, qk_norm: str) -> None:
    model = MoETransformer(replace(CONFIG, attention=attention, qk_norm=qk_norm, n_kv_heads=2, head_dim=6))
    model(tokens()).square().mean().backward()
    for block in model.blocks:
        assert block.attention.q_norm.weight.grad.abs().sum() > 0
        assert block.attention.k_norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_is_the_embedding(bias: bool, tmp_path: Path) -> None:
    """Gradients are those of embedding and head together; the weight is saved once; copies stay tied."""
    source = own(replace(CONFIG, tied_embeddings=True, head_bias=bias))
    assert ("head.bias" in source.state, "head.weight" in source.state) == (bias, False)
    untied = MoETransformer(replace(CONFIG, head_bias=bias))
    untied.load_state_dict({**source.state, "head.weight": source.state["embedding.weight"]})
    tied = source.model()
    checkpoints.export(source, tmp_path / "own")
    for model in (tied, checkpoints.read(tmp_path / "own").model()):
        assert torch.equal(logits(model, tokens()), logits(untied, tokens()))
    tied(tokens()).square().mean().backward()
    untied(tokens()).square().mean().backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)
    copied = copy.deepcopy(tied)
    with torch.no_grad():
        copied.embedding.weight.zero_()
    assert not copied.head.weight.any()
    assert tied.head.weight.any()


def test_configurations_from_before_these_options_load() -> None:
    new = {"head_dim", "qk_norm", "head_bias", "tied_embeddings"}
    old = {name: value for name, value in CONFIG.to_dict().items() if name not in new}
    assert MoEConfig.from_dict(old) == CONFIG
    with pytest.raises(UserError, match="head_dim must be even"):
        replace(CONFIG, head_dim=5)
    with pytest.raises(UserError, match="no qk_norm 'heads'; did you mean 'head'"):
        replace(CONFIG, qk_norm="heads")
    assert replace(CONFIG, d_model=30, head_dim=8).head_width == 8


# -- the command line --------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "data": {"vocab_size": 300, "seq_len": 16, "batch_size": 4, "eval_sequences": 4},
    "model": {
        "config": {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 8, "top_k": 2, "d_expert": 12},
        "warmup_steps": 3,
        "learning_rate": 0.02,
    },
    "pruning": {"window": 4, "evidence_windows": 1, "calibration_batches": 2},
    "checkpoint": {"every_n_steps": 1},
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
    },
}
PRUNE = ["--pruning.pruner=laep", "--pruning.pruner.beta=0.3", "--pruning.trigger=at_step", "--pruning.trigger.step=4"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "source": str(corpus)}}))
    return path


def fit(recipe: Path, folder: Path, *options: str) -> int:
    return main(["fit", f"--config={recipe}", f"--trainer.default_root_dir={folder}", *options])


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that pruned at step 4, and what `export` makes of it: own/ and hf/."""
    folder = tmp_path_factory.mktemp("trained")
    assert fit(recipe, folder / "run", *PRUNE) == 0
    assert main(["export", f"--model={folder / 'run' / 'last.ckpt'}", f"--output={folder / 'hf'}"]) == 0
    assert main(["export", f"--model={folder / 'hf'}", f"--output={folder / 'own'}"]) == 0
    return folder


def test_export_there_and_back_is_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, back = checkpoints.read(trained / "run" / "last.ckpt"), checkpoints.read(trained / "own")
    assert back.entry() == run.entry()
    assert back.tokenizer
    assert len(back.plans) == 1
    assert all(torch.equal(back.state[name], value) for name, value in run.state.items())
    assert main(["export", f"--model={trained / 'own'}", f"--output={trained / 'hf'}"]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main(["export", f"--model={trained / 'own'}", f"--output={trained / 'hf'}", "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert "a transformers model of type mixtral" in out
    assert "trust_remote_code=True" in out
    assert "the bias of the output head" in out


def test_the_tokenizer_goes_along(trained: Path) -> None:
    from transformers import AutoTokenizer

    text = "the moon  in 123 nights <|endoftext|> def f(x):\n\treturn \u00e9"
    theirs = AutoTokenizer.from_pretrained(trained / "hf")
    run = checkpoints.read(trained / "run" / "last.ckpt")
    ours = Tokenizer.from_str(run.tokenizer)
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", ours.token_to_id("<|endoftext|>"))
    assert theirs.model_max_length == 16
    config = json.loads((trained / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id
    assert native.read_tokenizer(trained / "hf") == native.read_tokenizer(trained / "run" / "last.ckpt")


def first_loss(source: Path, corpus: Path, tokenizer: Path) -> float:
    """Of the first training batch, by the model at `source`."""
    data = TextData(str(corpus), None, 300, 16, 4, tokenizer=tokenizer)
    batch = data.training_batches(1).batch(0)
    model = interop.load(source).model if interop.is_transformers(source) else checkpoints.read(source).model()
    return float(F.cross_entropy(logits(model, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))


@pytest.mark.parametrize("form", ["hf", "own", "run/last.ckpt"])
def test_training_goes_on_from_a_checkpoint(
    trained: Path, recipe: Path, corpus: Path, tmp_path: Path, form: str
) -> None:
    """From each form, with a recipe that names other sizes: the source's loss at first, its experts, then a prune."""
    other = yaml.safe_load(recipe.read_text())
    other["model"]["config"] |= {"d_model": 64, "n_experts": 4}
    other["data"]["vocab_size"] = 280
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    run = tmp_path / "on"
    assert fit(tmp_path / "other.yaml", run, f"--model.checkpoint={trained / form}", *PRUNE) == 0
    history = read_rows(run / "history.jsonl")
    assert [row["step"] for row in history] == list(range(1, 7))
    assert history[0]["loss"] == pytest.approx(first_loss(trained / form, corpus, trained / form), abs=1e-6)
    source, end = checkpoints.read(trained / "run" / "last.ckpt"), checkpoints.read(run / "last.ckpt")
    assert end.config == source.config
    assert end.tokenizer == source.tokenizer
    assert len(end.plans) == 2
    assert end.plans[0] == source.plans[0]
    assert end.plans[1].before == source.plans[0].kept
    assert [set(ids) for ids in end.expert_ids] == [set(ids) for ids in end.plans[1].kept]
    assert sum(map(len, end.expert_ids)) < sum(map(len, source.expert_ids))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["config"]["d_model"] == 16
    assert saved["data"]["tokenizer"] == str(trained / form)
    assert main(["export", f"--model={run / 'last.ckpt'}", f"--output={tmp_path / 'hf'}"]) == 0
    assert native.read(tmp_path / "hf").entry() == end.entry()


class Killed(BaseException):
    """Ends a run in this process as a kill would."""


@pytest.fixture(scope="module")
def whole(trained: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on from the exported model and never stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert fit(recipe, folder, *PRUNE, f"--model.checkpoint={trained / 'hf'}") == 0
    return folder


@pytest.mark.parametrize("step", [2, 4, 5])
def test_resumed_is_bit_identical(
    trained: Path, recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the prune, at its very step, and after it."""
    options = [*PRUNE, f"--model.checkpoint={trained / 'hf'}"]
    save = LastCheckpoint.on_train_batch_end

    def hook(self: LastCheckpoint, trainer: Any, *args: Any) -> None:
        save(self, trainer, *args)
        if trainer.global_step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(LastCheckpoint, "on_train_batch_end", hook)
        with pytest.raises(Killed):
            fit(recipe, tmp_path / "killed", *options)
    torch.manual_seed(123)
    np.random.seed(123)
    assert fit(recipe, tmp_path / "killed", *options, f"--ckpt_path={tmp_path / 'killed' / 'last.ckpt'}") == 0
    x, y = (checkpoints.read_lightning(folder / "last.ckpt") for folder in (whole, tmp_path / "killed"))
    assert x["moeprune"] == y["moeprune"]
    assert all(torch.equal(value, y["state_dict"][name]) for name, value in x["state_dict"].items())
    for one, two in zip(x["optimizer_states"], y["optimizer_states"], strict=True):
        for index, state in one["state"].items():
            assert all(torch.equal(value, two["state"][index][name]) for name, value in state.items())
    a, b = ([row["loss"] for row in read_rows(folder / "history.jsonl")] for folder in (whole, tmp_path / "killed"))
    assert a == b


def test_validation_of_a_checkpoint(trained: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --ckpt_path the model is the one of model.checkpoint, in either form the same."""
    shown = []
    for form in ("hf", "own"):
        assert main(["validate", f"--config={recipe}", f"--model.checkpoint={trained / form}"]) == 0
        out, err = capsys.readouterr()
        assert "untrained" not in err
        shown.append([line for line in out.splitlines() if "val_loss" in line])
    assert shown[0] == shown[1]
    assert shown[0]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.config.d_model=32", "--model.config.d_model asks for 32, but model.checkpoint=%s has 16"),
        ("--model.config.qk_norm=head", "--model.config.qk_norm asks for head"),
        ("--model.config.router_options.selection_bias=true", "--model.config.router_options asks for"),
        ("--data.vocab_size=301", "--data.vocab_size asks for 301, but model.checkpoint=%s has 300"),
        ("--data.seq_len=17", "data.seq_len=17 is more than the 16 that model.checkpoint=%s takes"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    trained: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    assert fit(recipe, tmp_path / "run", f"--model.checkpoint={trained / 'hf'}", option) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words.replace("%s", str(trained / "hf")) in error
    assert not (tmp_path / "run").exists()


def test_what_agrees_with_the_checkpoint_is_not(trained: Path, recipe: Path, tmp_path: Path) -> None:
    options = ["--model.config.d_model=16", "--model.config.n_kv_heads=2", "--model.config.head_dim=8"]
    options += ["--data.vocab_size=300", f"--data.tokenizer={trained / 'run' / 'last.ckpt'}", "--trainer.max_steps=1"]
    assert fit(recipe, tmp_path / "run", f"--model.checkpoint={trained / 'hf'}", *options) == 0


def test_no_tokenizer_and_another_one(
    trained: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(trained / "hf", bare)
    (bare / "tokenizer.json").unlink()
    start = f"--model.checkpoint={bare}"
    assert fit(recipe, tmp_path / "a", start) == 2
    assert f"model.checkpoint={bare} holds no tokenizer.json" in capsys.readouterr().err
    assert fit(recipe, tmp_path / "a", start, f"--data.tokenizer={bare}") == 2
    assert f"{bare} holds no tokenizer.json" in capsys.readouterr().err
    assert fit(recipe, tmp_path / "a", start, f"--data.tokenizer={trained / 'own'}", "--trainer.max_steps=1") == 0
    assert main(["export", f"--model={bare}", f"--output={tmp_path / 'own'}"]) == 0
    assert "has no tokenizer" in capsys.readouterr().err
    words = tokenizer_of(["a", "b", "<|endoftext|>"])
    (tmp_path / "words.json").write_text(words)
    start = f"--model.checkpoint={trained / 'hf'}"
    assert fit(recipe, tmp_path / "b", start, f"--data.tokenizer={tmp_path / 'words.json'}") == 2
    assert "is another tokenizer than that of model.checkpoint" in capsys.readouterr().err
    (bare / "tokenizer.json").write_text(tokenizer_of([f"w{i}" for i in range(301)]))
    for command in (["export", f"--model={bare}", f"--output={tmp_path / 'x'}"], ["fit", f"--model.checkpoint={bare}"]):
        assert main(command) == 2
        assert f"the tokenizer of {bare} gives ids up to 300 ('w300'), beyond the 300" in capsys.readouterr().err
    (bare / "tokenizer.json").write_text("{}")
    assert main(["export", f"--model={bare}", f"--output={tmp_path / 'x'}"]) == 2
    assert "tokenizer.json is no tokenizer" in capsys.readouterr().err


def tokenizer_of(words: list[str]) -> str:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made.to_str()


def test_a_foreign_model_with_a_large_vocabulary_trains_on(
    recipe: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3's form, 70000 tokens of which the text's have ids above 65535, and an end of text of its own."""
    words = sorted({word for d in ("sky", "code") for t in Corpus(str(corpus)).texts(d, "train") for word in t.split()})
    vocabulary = [*(f"w{i}" for i in range(69_000)), "</s>", *words]
    model = build("qwen3_moe", vocab_size=70_000, num_hidden_layers=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer_of(vocabulary))
    start = [f"--model.checkpoint={tmp_path / 'hf'}", "--trainer.max_steps=2", "--model.learning_rate=1e-3"]
    assert fit(recipe, tmp_path / "run", *start) == 2
    assert "has no end-of-text token" in capsys.readouterr().err
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert fit(recipe, tmp_path / "run", *start) == 0
    end = checkpoints.read(tmp_path / "run" / "last.ckpt")
    assert (end.end_of_text, end.config.qk_norm, end.config.vocab_size) == ("</s>", "head", 70_000)
    store = TokenStore(Corpus(str(corpus)), 70_000, tokenizer=tmp_path / "hf")
    found = store.tokens("sky", "train")
    assert found.dtype == np.uint32
    assert {vocabulary[i] for i in found} <= {*words, "</s>"}
    assert int((found == 69_000).sum()) == 40
    loss = read_rows(tmp_path / "run" / "history.jsonl")[0]["loss"]
    batch = TextData(str(corpus), None, 70_000, 16, 4, tokenizer=tmp_path / "hf").training_batches(1).batch(0)
    expected = F.cross_entropy(logits(model, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), abs=1e-5)
    native.export(end, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 69_000


def test_a_pruner_of_any_kind_prunes_what_goes_on(trained: Path, recipe: Path, tmp_path: Path) -> None:
    """Gradients and weights of a model that came from transformers; ids stay those of the first model."""
    options = ["--pruning.pruner=taylor", "--pruning.pruner.ratio=0.25", *PRUNE[2:]]
    assert fit(recipe, tmp_path / "run", f"--model.checkpoint={trained / 'hf'}", *options) == 0
    before, after = checkpoints.read(trained / "own"), checkpoints.read(tmp_path / "run" / "last.ckpt")
    assert all(set(a) < set(b) for a, b in zip(after.expert_ids, before.expert_ids, strict=True))
