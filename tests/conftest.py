"""Shared by all tests: no network, a token cache of their own, a tiny corpus, uninitialised memory made visible."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # here and in processes that tests start: bit-identity needs one number of threads

WORDS = [
    ["sun", "moon", "star", "night", "sky", "light", "dark", "dawn"],
    ["def", "return", "if", "else", "for", "in", "x", "y", "(", ")", ":"],
]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("MOEPRUNE_CACHE")
    os.environ["MOEPRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MOEPRUNE_CACHE"]
    else:
        os.environ["MOEPRUNE_CACHE"] = before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two domains of random words, small enough to tokenize in no time."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for domain, words in zip(("sky", "code"), WORDS, strict=True):
        for split, documents in (("train", 40), ("valid", 8), ("test", 8)):
            rows = [{"text": " ".join(rng.choices(words, k=120))} for _ in range(documents)]
            (folder / f"{domain}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised float memory is NaN: whoever reads what nobody wrote is found out."""
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
