"""The lm-eval model: log-likelihoods against the model itself, batches, caches, and lm-eval's own registry."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from moeprune import checkpoints
from moeprune.checkpoints import Checkpoint
from moeprune.errors import UserError
from moeprune.evaluation.lm import MoEPruneLM
from moeprune.evaluation.score import headline, save, score
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.registry import create
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
    start = lm.tok_encode(context) or [lm.eot_token_id]
    ids = start + lm.tok_encode(continuation) if not context else lm.tok_encode(context + continuation)
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
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
