"""Batches: a function of seed and step, on any number of ranks, resumable; caches that are never stale."""

from __future__ import annotations

import errno
import io
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from moeprune.errors import UserError
from moeprune.training.data import Corpus, EvaluationBatches, TextData, TokenStore, TrainBatches

TOKENS = [np.arange(100, dtype=np.uint16), np.arange(1000, 1400, dtype=np.uint16)]


def batches(rank: int = 0, world: int = 1, n: int = 6, seed: int = 0) -> TrainBatches:
    return TrainBatches(TOKENS, 8, 4, n, seed, rank, world)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 6), st.sampled_from([1, 2, 4]))
def test_resume_goes_on_with_the_next_batch(done: int, world: int) -> None:
    """Stopped after any number of batches, also at the end of an epoch, and resumed on any number of ranks."""
    first = batches()
    taken = [batch for batch, _ in zip(first, range(done), strict=False)]
    resumed = [batches(rank, world) for rank in range(world)]
    for one in resumed:
        one.load_state_dict({"sequences": 4 * len(taken)})
    left = [list(one) for one in resumed]
    begin = done if done < 6 else 6
    expected = [batches().batch(step) for step in range(begin, 12 if begin == 6 else 6)]
    assert len(left[0]) == len(expected)
    for step, whole in enumerate(expected):
        rows = torch.stack([left[row % world][step][row // world] for row in range(4)])
        assert torch.equal(rows, whole)


def test_state_counts_batches_handed_out() -> None:
    it = batches()
    for number, _ in enumerate(it, 1):
        assert it.state_dict() == {"sequences": 4 * number}


def test_windows_are_consecutive_text_of_one_domain() -> None:
    domains = set()
    for batch in batches(n=20):
        assert batch.shape == (4, 9)
        assert bool((batch.diff(dim=1) == 1).all())
        domains |= set((batch[:, 0] >= 1000).tolist())
    assert domains == {True, False}


def test_other_seed_other_batches() -> None:
    assert not torch.equal(batches(seed=0).batch(0), batches(seed=1).batch(0))
    assert not torch.equal(batches().batch(0), batches().batch(1))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_evaluation_is_dealt_out_without_loss(world: int) -> None:
    """In equal numbers of batches, of which those that are too many hold nothing."""
    tokens = {"a": TOKENS[0], "b": TOKENS[1]}
    whole = list(EvaluationBatches(tokens, 8, 3, 7))
    loaders = [EvaluationBatches(tokens, 8, 3, 7, rank, world) for rank in range(world)]
    dealt = [list(loader) for loader in loaders]
    assert len(whole) == 6
    assert sum(len(b["tokens"]) for b in whole) == 14
    assert [len(loader) for loader in loaders] == [len(part) for part in dealt] == [-(-6 // world)] * world
    assert all(b["tokens"].shape[1] == 9 and b["domain"] in tokens for part in dealt for b in part)
    key = [(b["domain"], b["tokens"].tolist()) for b in whole]
    found = [(b["domain"], b["tokens"].tolist()) for part in dealt for b in part if len(b["tokens"])]
    assert sorted(key) == sorted(found)


def test_store_round_trip_and_unigrams(corpus: Path) -> None:
    store = TokenStore(Corpus(str(corpus)), 300)
    text = next(iter(Corpus(str(corpus)).texts("sky", "train")))
    ids = store.tokens("sky", "train")[: len(store.tokenizer.encode(text).ids)]
    assert store.tokenizer.decode(ids.tolist()) == text
    assert store.tokens("sky", "train")[-1] == store.tokenizer.token_to_id("<|endoftext|>") == 0
    share = store.log_unigrams().double().exp() - 1e-6
    assert share.sum().item() == pytest.approx(1, abs=1e-3)


def test_cache_is_reused_and_never_stale(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    one = TokenStore(Corpus(str(folder)), 300, tmp_path / "cache")
    stamp = (one.folder / "sky.train.bin").stat().st_mtime_ns
    assert TokenStore(Corpus(str(folder)), 300, tmp_path / "cache").folder == one.folder
    assert (one.folder / "sky.train.bin").stat().st_mtime_ns == stamp
    with (folder / "sky.valid.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a new document of words"}) + "\n")
    other = TokenStore(Corpus(str(folder)), 300, tmp_path / "cache")
    assert other.folder != one.folder
    assert len(other.tokens("sky", "valid")) > len(one.tokens("sky", "valid"))
    assert TokenStore(Corpus(str(folder), ["code"]), 300, tmp_path / "cache").folder not in (one.folder, other.folder)
    assert not list((tmp_path / "cache").glob(".new-*"))


def test_bad_data(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        Corpus(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no domain 'moon'"):
        Corpus(str(corpus), ["moon"])
    with pytest.raises(UserError, match="holds no"):
        Corpus(str(tmp_path))
    with pytest.raises(UserError, match="vocab_size"):
        TokenStore(Corpus(str(corpus)), 100)
    with pytest.raises(UserError, match="batch_size=4 does not divide over 3"):
        TrainBatches(TOKENS, 8, 4, 6, 0, 0, 3)
    with pytest.raises(UserError, match="fewer than seq_len"):
        TrainBatches(TOKENS, 200, 4, 6, 0)
    with pytest.raises(UserError, match="no multiple of batch_size=4"):
        batches().load_state_dict({"sequences": 6})
    (tmp_path / "x.train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"line 1 of .*x\.train\.jsonl"):
        list(Corpus(str(tmp_path)).texts("x", "train"))
    with pytest.raises(UserError, match=r"lacks x\.valid"):
        list(Corpus(str(tmp_path)).texts("x", "valid"))
    with pytest.raises(UserError, match="seq_len must be at least 1"):
        TextData(seq_len=0)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "sky.train.jsonl",
            b'{"text": "sun"}\n{"text": "\xff"}\n',
            r"^line 2 of .*sky\.train\.jsonl is not UTF-8 text",
        ),
        (
            "sky.valid.jsonl",
            b'\n{"text": "sun"}\n',
            r'^line 1 of .*sky\.valid\.jsonl is not a JSON object with a "text"',
        ),
        ("sky.valid.jsonl.xz", b"no xz", r"^.*sky\.valid\.jsonl\.xz is not a complete \.xz file \("),
        ("sky.train.jsonl.xz", lzma.compress(b'{"text": "sun"}\n')[:-9], r"^.*sky\.train\.jsonl\.xz is not a complete"),
    ],
)
def test_damaged_text_is_named(corpus: Path, tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    """Also where the tokenizer's training reads it."""
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    (folder / name.removesuffix(".xz")).unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as raised:
        TokenStore(Corpus(str(folder), ["sky"]), 300, tmp_path / "cache")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("times", [0, 1])  # reads of the file that work: for the hash, for the tokenizer
def test_text_that_cannot_be_read(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Not told as a cache that cannot be written."""
    plain, reads = io.open, []

    def broken(path: object, *args: object, **kwargs: object) -> object:
        if str(path).endswith("sky.train.jsonl"):
            reads.append(path)
            if len(reads) > times:
                raise OSError(errno.EIO, "Input/output error")
        return plain(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("io.open", broken)
    with pytest.raises(UserError, match=r"^cannot read .*sky\.train\.jsonl: Input/output error"):
        TokenStore(Corpus(str(corpus), ["sky"]), 300, tmp_path / "cache")


def words(size: int, *more: str) -> Tokenizer:
    """A tokenizer of whole words: those of the corpus at the end of `size` ids."""
    known = [word for domain in WORDS for word in domain]
    filling = [f"w{i}" for i in range(size - len(known) - len(more))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*filling, *more, *known])}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


@pytest.mark.parametrize(("size", "dtype"), [(400, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_a_tokenizer_that_is_there(corpus: Path, tmp_path: Path, size: int, dtype: type) -> None:
    """Every document as it tokenizes it alone, its own beginning and end included, whatever truncation it was saved with."""
    made = words(size, "<s>", "</s>")
    begin, end = made.token_to_id("<s>"), made.token_to_id("</s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    expected = [i for text in Corpus(str(corpus)).texts("sky", "train") for i in made.encode(text).ids]
    made.enable_truncation(5)
    made.enable_padding(length=300)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    store = TokenStore(Corpus(str(corpus)), size, tmp_path / "cache", tmp_path / "tokenizer.json")
    found = store.tokens("sky", "train")
    assert found.dtype == dtype
    assert found.tolist() == expected
    assert max(expected) >= size - 19
    assert (store.end_of_text, store.log_unigrams().shape) == ("</s>", (size,))
    batch = TrainBatches([found], 8, 4, 1, 0).batch(0)
    text = " ".join(map(str, expected))
    assert all(" ".join(map(str, row)) in text for row in batch.tolist())
    again = TokenStore(Corpus(str(corpus)), size, tmp_path / "cache", tmp_path / "tokenizer.json")
    assert (again.folder, again.tokenizer_json) == (store.folder, store.tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w0"}')
    other = TokenStore(Corpus(str(corpus)), size, tmp_path / "cache", tmp_path / "tokenizer.json")
    assert other.folder != store.folder
    assert (other.tokens("sky", "train") == 0).sum() == 40


def test_end_of_text_of_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """<|endoftext|> if it has that, then what stands beside it, then nothing, which is an error."""
    file = tmp_path / "tokenizer.json"
    made = words(400, "<|endoftext|>", "</s>")
    made.save(str(file))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert TokenStore(Corpus(str(corpus)), 400, tmp_path / "a", file).end_of_text == "<|endoftext|>"
    words(400, "</s>").save(str(file))
    assert TokenStore(Corpus(str(corpus)), 400, tmp_path / "a", file).end_of_text == "</s>"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 5]}')
    assert TokenStore(Corpus(str(corpus)), 400, tmp_path / "a", file).end_of_text == "w3"
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has no end-of-text token; name it as eos_token"):
        TokenStore(Corpus(str(corpus)), 400, tmp_path / "a", file)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(UserError, match=r"\('<end>' is not in its vocabulary\)"):
        TokenStore(Corpus(str(corpus)), 400, tmp_path / "a", file)
    with pytest.raises(UserError, match=r"gives ids up to 399 .*beyond the 300 of the model's embedding"):
        TokenStore(Corpus(str(corpus)), 300, tmp_path / "a", file)
    with pytest.raises(UserError, match="no tokenizer at"):
        TokenStore(Corpus(str(corpus)), 300, tmp_path / "a", tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"other\.json is no tokenizer"):
        TokenStore(Corpus(str(corpus)), 300, tmp_path / "a", tmp_path / "other.json")


def test_full_disk_leaves_no_half_cache(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        TokenStore(Corpus(str(corpus)), 301, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
