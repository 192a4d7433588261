"""The lm-eval model: log-likelihoods against the model itself and against lm-eval's `hf`, batches, caches, lm-eval's registry;
scores and paired differences from the command line.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import random
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moeprune import checkpoints, create
from moeprune.checkpoints import Checkpoint
from moeprune.cli import main
from moeprune.compare.results import difference
from moeprune.errors import UserError
from moeprune.evaluation import shared
from moeprune.evaluation.lm import MoEPruneLM
from moeprune.evaluation.paired import paired
from moeprune.evaluation.score import headline, save, score
from moeprune.evaluation.shared import LEAST_SAVED, log_likelihoods, packed, passes
from moeprune.interop.checkpoint import export, load
from moeprune.interop.transformers import TransformersModel
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import record
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.surgery import apply_plan
from moeprune.training.data import Corpus, TokenStore


@pytest.fixture(scope="module")
def checkpoint(corpus: Path) -> Checkpoint:
    store = TokenStore(Corpus(str(corpus)), 300)
    config = MoEConfig(
        vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_experts=6, top_k=2, d_expert=8, max_seq_len=24
    )
    torch.manual_seed(0)
    model = MoETransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Checkpoint(config, [list(range(6))] * 2, model.state_dict(), [], store.tokenizer_json)


def other(checkpoint: Checkpoint) -> Checkpoint:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in checkpoint.state.items()}
    return Checkpoint(checkpoint.config, checkpoint.expert_ids, state, [], checkpoint.tokenizer)


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("sun moon night sky", " dark"),
    ("sun moon", " night sky light"),
    ("sun moon", " star"),
    ("sun moon", " night sky"),
    ("", "def x"),
    ("if x in y", " : return"),
    ("night", " sky" * 9),
]


def by_hand(lm: MoEPruneLM, context: str, continuation: str) -> tuple[float, bool]:
    """One request, no batching, no padding."""
    start = lm.tok_encode(context) if context else [lm.prefix_token_id]
    whole = lm.tok_encode(context + continuation) if context else start + lm.tok_encode(continuation, False)
    ids = start + whole[len(start) :]  # the context's own tokens, also where the tokenizer would merge across its end
    with torch.no_grad():
        out = lm.model(torch.tensor([ids[:-1]]))
    log_probs = getattr(out, "logits", out).log_softmax(-1)[0]
    tail = ids[len(start) :]
    rows = log_probs[len(start) - 1 :]
    return sum(float(rows[i, t]) for i, t in enumerate(tail)), rows.argmax(-1).tolist() == tail


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_loglikelihood_equals_the_model(checkpoint: Checkpoint, batch_size: int) -> None:
    lm = MoEPruneLM(checkpoint, batch_size=batch_size)
    answers = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (value, greedy), pair in zip(answers, PAIRS, strict=True):
        expected, expected_greedy = by_hand(lm, *pair)
        assert math.isclose(value, expected, rel_tol=1e-5)
        assert greedy == expected_greedy


def test_rolling_covers_every_token_once(checkpoint: Checkpoint) -> None:
    """With a model that ignores its context the windows do not matter: the sum is over all tokens of the text."""
    state = {k: torch.zeros_like(v) if "embedding" in k else v for k, v in checkpoint.state.items()}
    flat = Checkpoint(checkpoint.config, checkpoint.expert_ids, state, [], checkpoint.tokenizer)
    lm = MoEPruneLM(flat)
    text = " ".join(["sun moon star if x return"] * 20)
    ids = lm.tok_encode(text)
    assert len(ids) > 3 * 24
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([[0]])).log_softmax(-1)[0, 0]
    (value,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert math.isclose(value, sum(float(log_probs[i]) for i in ids), rel_tol=1e-5)


def test_generate_is_greedy_and_stops(checkpoint: Checkpoint) -> None:
    lm = MoEPruneLM(checkpoint)
    (text,) = lm.generate_until(requests("generate_until", ("sun moon", {"until": [], "max_gen_toks": 5})))
    ids = lm.tok_encode("sun moon")
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids]))[0, -1].argmax()))
    assert text == lm.tokenizer.decode(ids[len(lm.tok_encode("sun moon")) :])
    stop = text[len(text) // 2]
    (cut,) = lm.generate_until(requests("generate_until", ("sun moon", {"until": stop, "max_gen_toks": 5})))
    assert cut == text.split(stop)[0]


def test_response_cache_never_mixes_models(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = str(tmp_path / "cache.db")
    first = CachingLM(MoEPruneLM(checkpoint), path)
    answers = first.loglikelihood(requests("loglikelihood", *PAIRS))
    first.dbdict.close()
    again = CachingLM(MoEPruneLM(checkpoint), path)  # the same weights may use it
    assert again.loglikelihood(requests("loglikelihood", *PAIRS)) == answers
    again.dbdict.close()
    with pytest.raises(UserError, match="another model"):
        CachingLM(MoEPruneLM(other(checkpoint)), path)


def test_registered_beside_lm_evals_own(checkpoint: Checkpoint) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("moeprune") is MoEPruneLM
    assert get_model("dummy").__module__.startswith("lm_eval")
    info = MoEPruneLM(checkpoint).get_model_info()
    assert info["weights_sha256"] != MoEPruneLM(other(checkpoint)).get_model_info()["weights_sha256"]


def test_too_long_request_is_one_sentence(checkpoint: Checkpoint) -> None:
    lm = MoEPruneLM(checkpoint)
    with pytest.raises(UserError, match="1 to 24"):
        lm.loglikelihood(requests("loglikelihood", ("sun", " moon" * 60)), disable_tqdm=True)


def test_checkpoint_without_tokenizer(checkpoint: Checkpoint) -> None:
    bare = Checkpoint(checkpoint.config, checkpoint.expert_ids, checkpoint.state)
    with pytest.raises(UserError, match="no tokenizer"):
        MoEPruneLM(bare)


@pytest.mark.parametrize("form", ["memory", "folder", "file"])
def test_offline_suite(checkpoint: Checkpoint, tmp_path: Path, form: str) -> None:
    """All tasks, through lm-eval's evaluator, from all three forms of a model; results in lm-eval's format."""
    long = MoEConfig(**{**checkpoint.config.to_dict(), "max_seq_len": 256})
    model = Checkpoint(long, checkpoint.expert_ids, checkpoint.state, [], checkpoint.tokenizer)
    where: object = model
    if form == "folder":
        checkpoints.export(model, tmp_path / "model")
        where = tmp_path / "model"
    if form == "file":
        state = {f"model.{k}": v for k, v in model.state.items()}
        torch.save({"state_dict": state, "moeprune": model.entry()}, tmp_path / "model.ckpt")
        where = tmp_path / "model.ckpt"
    suite = create("suite", "offline")
    results = score(where, suite, limit=2)
    rows = headline(results, suite)
    assert list(rows) == list(suite.metrics())
    assert all(row["n"] == 2 and math.isfinite(row["value"]) and row["stderr"] is not None for row in rows.values())
    assert rows["offline_bpb_lit"]["value"] > 1
    save(results, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"} <= saved.keys()
    samples = (tmp_path / "out" / "samples_offline_code_indent.jsonl").read_text().splitlines()
    assert len(samples) == 2


def test_own_checkpoints_refuse_what_they_cannot_do(checkpoint: Checkpoint) -> None:
    lm = MoEPruneLM(checkpoint)
    with pytest.raises(UserError, match="leaves no room for a prompt in the 24 tokens"):
        lm.generate_until(requests("generate_until", ("sun", {"max_gen_toks": 24})))
    with pytest.raises(UserError, match="max_length must be at most the 24 of in memory, got 25"):
        MoEPruneLM(checkpoint, max_length=25)
    with pytest.raises(UserError, match="greedily only"):
        lm.generate_until(requests("generate_until", ("sun", {"max_gen_toks": 4, "do_sample": True, "temperature": 1})))
    with pytest.raises(UserError, match="no chat template"):
        score(checkpoint, create("suite", "offline"), limit=1, apply_chat_template=True)


# --- what requests share is computed once


def of(kind: str) -> MoETransformer:
    """Tied or not, with and without the filter that looks at a row's neighbours."""
    options: dict[str, Any] = {
        "plain": {},
        "grouped heads": {"n_kv_heads": 1, "qk_norm": "head", "tied_embeddings": True},
        "filtered": {"attention": "lfa"},
    }[kind]
    config = MoEConfig(
        vocab_size=11, d_model=16, n_layers=2, n_heads=2, n_experts=5, top_k=2, d_expert=8, max_seq_len=20, **options
    )
    torch.manual_seed(0)
    model = MoETransformer(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {kind: of(kind) for kind in ("plain", "grouped heads", "filtered")}
BEGINNINGS = [(1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 0), (4,) * 10, (1,)]


@st.composite
def asked(draw: st.DrawFn) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows that often begin alike, repeat, or are the beginning of another, and the tokens that should follow their ends."""
    found = []
    for _ in range(draw(st.integers(1, 9))):
        row = draw(st.sampled_from(BEGINNINGS)) + tuple(draw(st.lists(st.integers(0, 3), max_size=8)))
        n = draw(st.integers(1, len(row)))
        found.append((row, (*row[len(row) - n + 1 :], draw(st.integers(0, 10)))))
    return found


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=25, deadline=None)
@given(asked=asked(), batch_size=st.integers(1, 4))
def test_shared_beginnings_change_no_answer(
    kind: str, asked: list[tuple[tuple[int, ...], tuple[int, ...]]], batch_size: int
) -> None:
    """Against one row at a time; passes are as small as they can be, so that there are several."""
    model = MODELS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "LEAST_TOKENS", 0)
        found = {index: (value, hit) for index, value, hit in log_likelihoods(model, asked, batch_size, 0)}
    assert sorted(found) == list(range(len(asked)))
    for index, (row, tokens) in enumerate(asked):
        with torch.no_grad():
            last = model(torch.tensor([row]))[0, -len(tokens) :].float().log_softmax(-1)
        expected = sum(float(last[i, token]) for i, token in enumerate(tokens))
        assert math.isclose(found[index][0], expected, rel_tol=1e-5, abs_tol=1e-5)
        assert found[index][1] == (last.argmax(-1).tolist() == list(tokens))


@settings(max_examples=50, deadline=None)
@given(asked=asked(), tokens=st.integers(1, 60))
def test_packed_rows_hold_every_row_once(asked: list[tuple[tuple[int, ...], tuple[int, ...]]], tokens: int) -> None:
    rows = [row for row, _ in asked]
    groups = packed(rows, 40)
    assert sorted(row for group in groups for row in group.rows) == sorted(set(rows))
    for group in groups:
        assert {row[: group.shared] for row in group.rows} == {group.rows[0][: group.shared]}
        assert len(group.rows) == 1 or group.length <= 40
        saved = sum(map(len, group.rows)) - group.length
        assert saved >= LEAST_SAVED * (len(group.rows) - 1)
    assert [len(group.rows) for group in packed(rows, 40, share=False)] == [1] * len(set(rows))
    batches = list(passes(groups, tokens))
    assert sorted(map(id, groups)) == sorted(id(group) for batch in batches for group in batch)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(group.length for group in batch) <= tokens


def test_choices_cost_their_own_tokens_only(checkpoint: Checkpoint) -> None:
    """Four choices after one text: one row, and the output head on the choices' tokens alone."""
    lm = MoEPruneLM(checkpoint)
    seen: list[int] = []
    lm.model.embedding.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    lm.model.head.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[0]))
    context = "sun moon star night sky light sun moon star"
    choices = [" sun moon", " sun", " light star", " x"]
    lm.loglikelihood(requests("loglikelihood", *((context, choice) for choice in choices)), disable_tqdm=True)
    n = len(lm.tok_encode(context))
    ends = [len(lm.tok_encode(context + choice)) - n for choice in choices]
    rows = {tuple(lm.tok_encode(context + choice)[:-1]) for choice in choices}
    own = sum(len(row) - n for row in rows)
    assert seen == [n + own, 1 + own]  # what follows the context is asked for by all, and computed once
    assert sum(ends) > 1 + own


# --- transformers models, against lm-eval's own class for them


@pytest.fixture(scope="session")
def hf() -> Any:
    """lm-eval's `hf`. It imports accelerate, which it uses to spread a model over devices only."""
    stubs = {"accelerate": types.ModuleType("accelerate"), "accelerate.utils": types.ModuleType("accelerate.utils")}
    for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size", "get_max_memory"):
        for stub in stubs.values():
            setattr(stub, name, None)
    importlib.import_module("transformers.generation.utils")
    missing = importlib.util.find_spec("accelerate") is None
    if missing:
        sys.modules.update(stubs)
    try:
        module = importlib.import_module("lm_eval.models.huggingface")
    finally:
        for name in stubs if missing else ():
            del sys.modules[name]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return module.HFLM


@pytest.fixture(scope="session")
def texts() -> list[str]:
    corpus = Corpus("embedded")
    return ["\n".join(islice(corpus.texts(domain, "valid"), 20))[:6000] for domain in ("lit", "code", "kjv")]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Any:
    """Byte-level, merges across words, and puts a beginning-of-sequence token in front, as Llama's does."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.decoder, made.pre_tokenizer = (
        decoders.ByteLevel(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([line for text in texts for line in text.splitlines()], trainer)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def small(family: str, dtype: torch.dtype = torch.float32, max_length: int = 64) -> Any:
    """A model that is sure of some tokens and not of others."""
    changes = {"vocab_size_per_layer_input": 400} if family == "gemma4_text" else {}
    model = build(family, vocab_size=400, max_position_embeddings=max_length, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.to(dtype)


def pairs(texts: list[str], number: int) -> list[tuple[str, str]]:
    """Contexts and continuations cut anywhere, inside of words as well; some do not fit into the model."""
    rng = random.Random(0)
    found = [
        ("", "of the people"),
        ("the king ", " of all"),
        ("if x", "==1:"),
        (texts[0][:700], " the end"),
        ("<s>a", " b"),
    ]
    while len(found) < number:
        text, start, n, m = rng.choice(texts), rng.randrange(5000), rng.randrange(1, 120), rng.randrange(1, 40)
        found.append((text[start : start + n], text[start + n : start + n + m]))
    return found


def kinds(texts: list[str], number: int) -> dict[str, list[tuple[Any, ...]]]:
    asked = pairs(texts, number)
    stops: list[dict[str, Any]] = [
        {"until": ["e", "\n"], "max_gen_toks": 10},
        {"until": "a", "max_gen_toks": 10},
        {"until": []},
    ]
    return {
        "loglikelihood": asked,
        "loglikelihood_rolling": [(texts[0][:700],), (texts[1][:300],), ("x",), ("",), (texts[2][:80],)],
        "generate_until": [(context or "a", dict(stops[i % 2])) for i, (context, _) in enumerate(asked)]
        + [(texts[1][:400], stops[2] | {"max_gen_toks": 20})],
    }


def test_tokenizer_merges_across_words(tokenizer: Any, texts: list[str]) -> None:
    """Without that, the boundary between context and continuation would be no test."""
    together = sum(
        tokenizer.encode(a, add_special_tokens=False) + tokenizer.encode(b, add_special_tokens=False)
        != tokenizer.encode(a + b, add_special_tokens=False)
        for a, b in pairs(texts, 40)
    )
    assert together > 5


@pytest.mark.parametrize(
    ("family", "batch_size", "options"),
    [
        ("qwen3_moe", 1, {}),
        ("qwen3_moe", 5, {}),
        ("qwen3_moe", 5, {"add_bos_token": False}),
        ("qwen3_moe", 5, {"add_bos_token": True}),
        ("qwen3_moe", 5, {"max_length": 40}),
        ("deepseek_v3", 5, {}),
        ("gpt_oss", 5, {}),
        ("gemma4_text", 1, {}),
        ("jamba", 1, {}),
        ("jamba", 5, {}),
    ],
)
def test_same_answers_as_hf(
    hf: Any, tokenizer: Any, texts: list[str], family: str, batch_size: int, options: dict[str, Any]
) -> None:
    """Bit for bit, in float32, with batches of the same size."""
    model = small(family)
    ours = MoEPruneLM(TransformersModel(model), tokenizer=tokenizer, batch_size=batch_size, **options)
    theirs = hf(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
    assert (ours.max_length, ours.eot_token_id, ours.prefix_token_id) == (
        theirs.max_length,
        theirs.eot_token_id,
        theirs.prefix_token_id,
    )
    passes: list[list[list[int]]] = []
    model.register_forward_pre_hook(
        lambda _, args, given: passes.append((args[0] if args else given["input_ids"]).tolist()), with_kwargs=True
    )
    for kind, arguments in kinds(texts, 24 if family == "qwen3_moe" else 10).items():
        answers, seen = [], []
        for lm in (ours, theirs):
            passes.clear()
            answers.append(getattr(lm, kind)(requests(kind, *arguments), disable_tqdm=True))
            seen.append(list(passes))
        assert answers[0] == answers[1]
        assert seen[0] == seen[1]  # the very same batches
        assert len({str(answer) for answer in answers[0]}) > len(answers[0]) // 2


def test_half_precision_is_hf_with_exact_softmax(hf: Any, tokenizer: Any, texts: list[str]) -> None:
    model = small("qwen3_moe", torch.bfloat16)
    asked = requests("loglikelihood", *pairs(texts, 12))
    mine = MoEPruneLM(TransformersModel(model), tokenizer=tokenizer, batch_size=4).loglikelihood(
        asked, disable_tqdm=True
    )
    exact = hf(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    assert mine == exact.loglikelihood(asked, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_transformers_against_the_model_itself(tokenizer: Any, batch_size: int) -> None:
    lm = MoEPruneLM(TransformersModel(small("mixtral")), tokenizer=tokenizer, batch_size=batch_size)
    asked = [("the king", " of all men"), ("if", " x:"), ("", "the king")]
    answers = lm.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (value, greedy), pair in zip(answers, asked, strict=True):
        expected, expected_greedy = by_hand(lm, *pair)
        assert math.isclose(value, expected, rel_tol=1e-5)
        assert greedy == expected_greedy


def test_requests_that_share_a_pass(tokenizer: Any) -> None:
    """The same tokens, split differently between context and continuation, and another last token."""
    lm = MoEPruneLM(TransformersModel(small("mixtral")), tokenizer=tokenizer)
    tokens = [1, 50, 60, 70, 80]
    asked = [(None, tokens[:n], tokens[n:]) for n in (4, 1, 2, 3)] + [(None, tokens[:3], [70, 90])]
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for (value, _), (_, context, continuation) in zip(lm._loglikelihood_tokens(asked), asked, strict=True):
        expected = sum(float(log_probs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))
        assert math.isclose(value, expected, rel_tol=1e-5)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A checkpoint with its tokenizer, and the same with unequal and with equal numbers of experts left."""
    place = tmp_path_factory.mktemp("checkpoints")
    small("qwen3_moe", max_length=256).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    for name, numbers in {"unequal": [6, 4, 8], "equal": [4, 4, 4]}.items():
        model = load(place / "base")
        evidence = record(model, [torch.arange(3, 25).reshape(2, 11)], frozenset({"counts"}))
        limits = Constraints(min_keep=numbers, max_keep=numbers).for_router(model.n_groups, model.min_experts)
        plan = create("pruner", "frequency").plan(evidence, limits)
        apply_plan(model, plan)
        export(model, place / name, [plan], source=place / "base")
    return {name: place / name for name in ("base", "unequal", "equal")}


@pytest.mark.parametrize("name", ["base", "unequal", "equal"])
def test_folder_gives_what_hf_gives_on_the_loaded_model(
    hf: Any, folders: dict[str, Path], texts: list[str], name: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(folders[name], trust_remote_code=name == "unequal")
    ours = MoEPruneLM(str(folders[name]), batch_size=4)
    theirs = hf(pretrained=stock, tokenizer=AutoTokenizer.from_pretrained(folders[name]), batch_size=4)
    for kind, arguments in kinds(texts, 6).items():
        mine = getattr(ours, kind)(requests(kind, *arguments), disable_tqdm=True)
        assert mine == getattr(theirs, kind)(requests(kind, *arguments), disable_tqdm=True)
    info = ours.get_model_info()
    assert info["num_experts_per_layer"] == {"base": [8, 8, 8], "unequal": [6, 4, 8], "equal": [4, 4, 4]}[name]
    assert info["weights_sha256"] == checkpoints.fingerprint(stock.state_dict())


def test_response_cache_of_a_pruned_model(folders: dict[str, Path], tmp_path: Path) -> None:
    path = str(tmp_path / "cache.db")
    first = CachingLM(MoEPruneLM(folders["base"]), path)
    first.loglikelihood(requests("loglikelihood", ("a", " b")))
    first.dbdict.close()
    with pytest.raises(UserError, match="another model"):
        CachingLM(MoEPruneLM(folders["unequal"]), path)


def test_a_folder_that_cannot_be_scored(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dtype 'float33'; give auto, float32"):
        MoEPruneLM(folders["base"], dtype="float33")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folders["base"].iterdir():
        if not file.name.startswith(("tokenizer", "special")):
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"cannot load a tokenizer from .*bare .*copy the tokenizer files"):
        MoEPruneLM(bare)
    with pytest.raises(UserError, match="in memory comes without a tokenizer"):
        MoEPruneLM(TransformersModel(small("qwen3_moe")))
    lent = MoEPruneLM(bare, tokenizer=str(folders["base"]))
    asked = requests("loglikelihood", ("the king", " of all"))
    assert lent.loglikelihood(asked) == MoEPruneLM(folders["base"]).loglikelihood(asked)


CHAT = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}[{{ m.role }}]{{ m.content }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_chat_template(hf: Any, tokenizer: Any) -> None:
    import copy

    spoken = copy.deepcopy(tokenizer)
    spoken.chat_template = CHAT
    model = small("qwen3_moe")
    ours, theirs = MoEPruneLM(TransformersModel(model), tokenizer=spoken), hf(pretrained=model, tokenizer=spoken)
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]
    for prompt in (True, False):
        assert ours.apply_chat_template(said, prompt) == theirs.apply_chat_template(said, prompt)
    assert ours.chat_template(True) == CHAT
    plain = MoEPruneLM(TransformersModel(model), tokenizer=tokenizer)
    assert plain.tokenizer_name != ours.tokenizer_name
    with pytest.raises(UserError, match="no chat template"):
        plain.apply_chat_template(said)


def test_thoughts_are_no_part_of_an_answer(tokenizer: Any) -> None:
    model = TransformersModel(small("qwen3_moe"))
    asked = requests("generate_until", ("the king", {"until": [], "max_gen_toks": 12}))
    (whole,) = MoEPruneLM(model, tokenizer=tokenizer).generate_until(asked)
    mark = whole[len(whole) // 2]
    (answer,) = MoEPruneLM(model, tokenizer=tokenizer, think_end_token=mark).generate_until(asked)
    assert answer == whole.rpartition(mark)[2].lstrip() != whole


# --- scores of two models, paired


@pytest.fixture(scope="module")
def scored(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `--output` writes for the pruned model and for the base."""
    place = tmp_path_factory.mktemp("scored")
    arguments = ["--suite=offline", "--limit=3", f"--output={place / 'pruned'}", f"--reference={folders['base']}"]
    assert main(["evaluate", f"--model={folders['unequal']}", *arguments]) == 0
    return {"pruned": place / "pruned", "base": place / "pruned" / "reference"}


def test_differences_are_those_of_the_samples(scored: dict[str, Path]) -> None:
    """Recomputed from lm-eval's own files of samples, per task and per family."""
    found = json.loads((scored["pruned"] / "differences.json").read_text())
    suite = create("suite", "offline")
    own: dict[str, list[list[float]]] = {}
    for task, metric in suite.metrics().items():
        rows = [[json.loads(line) for line in (place / f"samples_{task}.jsonl").open()] for place in scored.values()]
        assert [a["doc_hash"] for a in rows[0]] == [b["doc_hash"] for b in rows[1]]
        own[task] = [[sample[metric] for sample in side] for side in rows]
        expected = difference(*own[task])
        assert found["rows"][task]["difference"] == {k: v for k, v in expected.items() if k != "noise"}
        assert found["rows"][task]["n"] == 3
    assert any(row["difference"]["value"] for row in found["rows"].values())
    for family, tasks in suite.families().items():
        means = [sum(a) / 3 - sum(b) / 3 for a, b in (own[task] for task in tasks)]
        assert math.isclose(found["families"][family]["difference"]["value"], sum(means) / len(tasks), abs_tol=1e-12)
        changes = torch.tensor([own[task] for task in tasks], dtype=torch.float64)
        stderr = float(((changes[:, 0] - changes[:, 1]).var(1) / 3).sum().sqrt()) / len(tasks)
        assert math.isclose(found["families"][family]["difference"]["stderr"], stderr, abs_tol=1e-9)


def test_saved_results_are_compared_without_a_model(
    scored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"--compare={scored['pruned']},{scored['base']}"
    assert main(["evaluate", both, f"--output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "differences.json").read_text() == (scored["pruned"] / "differences.json").read_text()
    table = capsys.readouterr().out
    assert "offline_code_indent" in table
    assert "mean: bits per byte" in table
    assert "95 % interval" in table
    row = json.loads((tmp_path / "out" / "differences.json").read_text())["families"]["word order"]
    found = row["difference"]
    assert f"{found['value']:+.4f} ± {found['half_width']:.4f}" in table


def test_saved_results_serve_as_the_reference(
    folders: dict[str, Path], scored: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["--suite=offline", "--limit=3", f"--output={tmp_path / 'out'}", f"--reference={scored['base']}"]
    assert main(["evaluate", f"--model={folders['unequal']}", *arguments]) == 0
    mine, theirs = (
        json.loads((place / "differences.json").read_text()) for place in (tmp_path / "out", scored["pruned"])
    )
    assert mine == theirs


def test_what_cannot_be_paired(
    scored: dict[str, Path], folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = json.loads((scored["pruned"] / "scores.json").read_text())

    def changed(**new: Any) -> dict[str, Any]:
        return {**scores, "rows": {**scores["rows"], "offline_bpb_lit": {**scores["rows"]["offline_bpb_lit"], **new}}}

    fewer = {**scores, "rows": {task: row for task, row in scores["rows"].items() if task != "offline_bpb_lit"}}
    for other, words in [
        (fewer, r"not scored on the same tasks \(only on one of them: offline_bpb_lit\)"),
        ({**scores, "limit": None}, r"not scored on the same number of documents per task \(3 and all\)"),
        (changed(documents_sha256="0"), "different documents of offline_bpb_lit"),
        (changed(prompts_sha256="0"), "different prompts on offline_bpb_lit"),
        ({**scores, "max_length": 9}, r"different numbers of tokens at a time \(max_length 256 and 9\)"),
        (changed(metric="bits_per_byte"), "by different metrics: doc_bpb and bits_per_byte"),
        (changed(max_gen_toks=7), "answers of different lengths"),
        (changed(num_fewshot=5), "examples in the prompt: 0 and 5"),
        ({**scores, "families": {}}, "average over different tasks"),
    ]:
        with pytest.raises(UserError, match=words):
            paired(scores, other)
    same = paired(scores, scores)
    assert all(row["difference"]["value"] == 0 for row in same["rows"].values())
    model = f"--model={folders['unequal']}"
    for arguments, words in [
        (
            [model, "--limit=2", f"--reference={scored['base']}"],
            "not scored on the same number of documents per task (2 and 3)",
        ),
        ([f"--compare={scored['base']}"], "--compare takes two folders with a comma between them"),
        ([model, f"--compare={scored['base']},x"], "leave out --model"),
        ([f"--compare={scored['base']},absent"], "there is no scores"),
        ([model, "--reference=absent"], "neither a model nor a folder of results at absent"),
        ([model, "--limit=1", "--apply_chat_template"], "has no chat template; leave out --apply_chat_template"),
        ([model, "--max_gen_toks=0"], "max_gen_toks must be at least 1, got 0"),
        ([model, "--max_length=0"], "max_length must be at least 1, got 0"),
    ]:
        assert main(["evaluate", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_words_of_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Better and worse, whichever way the metric points; nothing where no difference can be detected."""
    from moeprune.commands.evaluate import show_differences

    monkeypatch.setenv("COLUMNS", "100")
    rows = {}
    for name, up, verdict in [
        ("a", True, "higher"),
        ("b", False, "higher"),
        ("c", False, "lower"),
        ("d", True, "lower"),
    ]:
        found = {"value": 1.0, "half_width": 0.5, "stderr": 0.2, "verdict": verdict}
        rows[name] = {"metric": "m", "higher_is_better": up, "value": 2.0, "reference": 1.0, "difference": found}
    rows["e"] = {**rows["a"], "difference": {**found, "verdict": "no detectable difference"}}
    rows["f"] = {**rows["a"], "difference": {**found, "half_width": None, "verdict": "no interval"}}
    show_differences({"model": "x", "reference": "y", "rows": rows, "families": {}})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    words = [line.split("│")[5].strip() for line in lines]
    assert words == [
        *(f"+1.0000 ± 0.5000 {word}" for word in ("better", "worse", "better", "worse")),
        "+1.0000 ± 0.5000",
        "+1.0000",
    ]
