"""Text as batches of tokens.

    text (embedded corpus, or a folder of yours) -> byte-level BPE, trained at first use, or a tokenizer of yours
        -> files of uint16 (uint32 for more than 65536 tokens), memory-mapped

Tokenizer and token files are cached under a hash of everything they depend on, so no cache is ever stale. A training
batch is a pure function of (seed, step): runs that share both see the same tokens, on any number of ranks, and a resumed
run goes on where the killed one stopped.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from moeprune import embedded
from moeprune.checkpoints import END_OF_TEXT
from moeprune.errors import UserError
from moeprune.files import atomic, cache_folder, write_text
from moeprune.interop.native import check_vocabulary, parsed, read_tokenizer

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
SPLITS = ("train", "valid", "test")
_FORMAT = "1"  # part of every cache key; change it when the meaning of cached files changes
_SAMPLE_CHARACTERS = 3_000_000  # text that the tokenizer is trained on; more does not help (docs/data.md)


class Corpus:
    """Documents by domain and split.

    Args:
        source: `embedded`, or a folder with `<domain>.<split>.jsonl` files (also .jsonl.xz; one {"text": ...} a line) for
            the splits train, valid and test.
        domains: which domains, in order; None for all.

    Raises:
        UserError: no such folder or domain, a domain that lacks a split.
    """

    def __init__(self, source: str = "embedded", domains: Sequence[str] | None = None) -> None:
        self.source = source
        self._folder = None if source == "embedded" else Path(source)
        if self._folder is None:
            known = list(embedded.DOMAINS)
        elif self._folder.is_dir():
            known = sorted({path.name.split(".")[0] for path in self._folder.glob("*.train.jsonl*")})
        else:
            raise UserError(
                f"there is no data folder {source}; give 'embedded' or a folder of <domain>.<split>.jsonl files"
            )
        for domain in domains or ():
            if domain not in known:
                raise UserError(f"there is no domain {domain!r} in {source}; known: {', '.join(known) or 'none'}")
        self.domains = tuple(domains or known)
        if not self.domains:
            raise UserError(f"the data folder {source} holds no <domain>.train.jsonl file")

    def _path(self, domain: str, split: str) -> Path:
        assert self._folder is not None
        for name in (f"{domain}.{split}.jsonl", f"{domain}.{split}.jsonl.xz"):
            if (self._folder / name).exists():
                return self._folder / name
        raise UserError(
            f"the data folder {self.source} lacks {domain}.{split}.jsonl; every domain needs {', '.join(SPLITS)}"
        )

    def texts(self, domain: str, split: str) -> Iterator[str]:
        """The documents' texts."""
        if self._folder is None:
            yield from (document.text for document in embedded.documents(domain, split))
            return
        path = self._path(domain, split)
        with _reading(path), lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line.decode("utf-8"))["text"]
                except UnicodeDecodeError as error:
                    raise UserError(f"line {number} of {path} is not UTF-8 text; convert the file to UTF-8") from error
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise UserError(f'line {number} of {path} is not a JSON object with a "text"') from error

    def content_hash(self) -> str:
        """Changes whenever a document does."""
        if self._folder is None:
            return embedded.content_hash(self.domains)
        digest = hashlib.sha256()
        for domain in self.domains:
            for split in SPLITS:
                path = self._path(domain, split)
                with _reading(path):
                    digest.update(f"{domain}.{split}".encode() + path.read_bytes())
        return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """One sentence for a file of the corpus that cannot be read.

    Raises:
        UserError: the sentence.
    """
    try:
        yield
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path} is not a complete .xz file ({error}); compress or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file and its permissions") from error


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909) with digits apart, trained on an equal sample of every domain's train split."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

    def sample() -> Iterator[str]:
        for domain in corpus.domains:
            left = _SAMPLE_CHARACTERS // len(corpus.domains)
            for text in corpus.texts(domain, "train"):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


class TokenStore:
    """A corpus as memory-mapped tokens, made at first use: uint16, or uint32 for a vocabulary above 65536.

    Documents end with the end-of-text token; a tokenizer that begins texts with a token of its own does so here.

    Args:
        corpus: the text.
        vocab_size: V; of a tokenizer trained here, 257 (all bytes and the end of text) to 65536.
        cache: folder; None for `cache_folder()`.
        tokenizer: a tokenizer.json, or a checkpoint that holds one; None to train one on the corpus.

    Raises:
        UserError: vocab_size out of range or less than the tokenizer's, no tokenizer, a cache that cannot be written.
    """

    def __init__(
        self, corpus: Corpus, vocab_size: int, cache: Path | None = None, tokenizer: Path | None = None
    ) -> None:
        self.corpus, self.vocab_size, self.end_of_text = corpus, vocab_size, END_OF_TEXT
        self._given: str | None = None
        self._dtype: type[np.uint16] | type[np.uint32] = np.uint16 if vocab_size <= 65536 else np.uint32
        if tokenizer is not None:
            self._given, self.end_of_text = _existing(tokenizer, vocab_size)
            of = f"{hashlib.sha256(self._given.encode()).hexdigest()} {self.end_of_text} {self._dtype.__name__}"
        elif 257 <= vocab_size <= 65536:
            of = f"{vocab_size}"
        else:
            raise UserError(f"vocab_size must lie between 257 (bytes and the end of text) and 65536, got {vocab_size}")
        key = hashlib.sha256(f"{_FORMAT} {corpus.content_hash()} {corpus.domains} {of}".encode()).hexdigest()
        self.folder = (cache or cache_folder()) / key[:20]
        if not (self.folder / "done").exists():
            self._build()
        self.tokenizer_json = (self.folder / "tokenizer.json").read_text(encoding="utf-8")
        self.tokenizer = Tokenizer.from_str(self.tokenizer_json)

    def _build(self) -> None:
        """Tokenize into a neighbour folder that takes its place once complete; two processes may both do it."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".new-") as name:
                made = Path(name) / "store"
                made.mkdir()
                if self._given is None:
                    tokenizer = train_tokenizer(self.corpus, self.vocab_size)
                else:
                    tokenizer = Tokenizer.from_str(self._given)
                write_text(made / "tokenizer.json", self._given or tokenizer.to_str())
                end = tokenizer.token_to_id(self.end_of_text)
                assert end is not None
                for domain in self.corpus.domains:
                    for split in SPLITS:
                        encoded = tokenizer.encode_batch(list(self.corpus.texts(domain, split)))
                        ids = [np.asarray(self._ended(document.ids, end), dtype=self._dtype) for document in encoded]
                        if not ids:
                            raise UserError(f"domain {domain!r} has no {split} text in {self.corpus.source}")
                        with atomic(made / f"{domain}.{split}.bin", "wb") as file:
                            file.write(np.concatenate(ids).tobytes())
                write_text(made / "done", "")
                try:
                    made.replace(self.folder)
                except OSError:
                    if not (self.folder / "done").exists():  # otherwise another process was faster
                        raise
        except OSError as error:
            raise UserError(
                f"cannot write the token cache {self.folder.parent}: {error.strerror}; free space, or set MOEPRUNE_CACHE"
            ) from error

    def _ended(self, ids: list[int], end: int) -> list[int]:
        """`ids` and the end-of-text token, unless a tokenizer that is not ours has added it."""
        return ids if self._given is not None and ids[-1:] == [end] else [*ids, end]

    def tokens(self, domain: str, split: str) -> Tokens:
        """All tokens of a split, memory-mapped."""
        return np.memmap(self.folder / f"{domain}.{split}.bin", dtype=self._dtype, mode="r")

    def log_unigrams(self) -> Tensor:
        """[V] log frequency of each token in train, domains weighted equally, smoothed by 1e-6."""
        share = np.zeros(self.vocab_size)
        for domain in self.corpus.domains:
            tokens = self.tokens(domain, "train")
            share += np.bincount(tokens, minlength=self.vocab_size) / len(tokens) / len(self.corpus.domains)
        return torch.from_numpy(np.log(share + 1e-6)).float()


def _existing(path: Path, vocab_size: int) -> tuple[str, str]:
    """A tokenizer from disk and its end-of-text token.

    Raises:
        UserError: there is none, it has no end-of-text token, or gives ids beyond `vocab_size`.
    """
    text, end = read_tokenizer(path)
    if not text:
        raise UserError(
            f"{path} holds no tokenizer.json; put the model's tokenizer there, or give another data.tokenizer"
        )
    check_vocabulary(text, vocab_size, str(path))
    if parsed(text).token_to_id(end) is None:
        told = f" ({end!r} is not in its vocabulary)" if end else ""
        raise UserError(
            f"the tokenizer of {path} has no end-of-text token{told}; name it as eos_token in a tokenizer_config.json beside it"
        )
    return text, end


class TrainBatches:
    """Endless random windows of S + 1 tokens, domains weighted equally; row r of step s is a function of (seed, s, r).

    Lightning saves and restores the position through `state_dict`, in sequences, so the number of ranks may change.

    Args:
        tokens: one array per domain.
        seq_len: S.
        batch_size: sequences per step, over all ranks; a multiple of `world_size`.
        n_batches: steps per epoch.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        seq_len: int,
        batch_size: int,
        n_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} does not divide over {world_size} processes; change one")
        for domain in tokens:
            if len(domain) < seq_len + 2:
                raise UserError(
                    f"a domain has {len(domain)} training tokens, fewer than seq_len={seq_len} + 2; add text"
                )
        self._tokens, self._seq_len, self._seed = tokens, seq_len, seed
        self._batch_size, self._n_batches = batch_size, n_batches
        self._rank, self._world_size = rank, world_size
        self._position = 0  # sequences handed out since the beginning of training

    def __len__(self) -> int:
        return self._n_batches

    def batch(self, step: int) -> Tensor:
        """[B / world_size, S + 1] int64: this rank's rows of step `step`."""
        rows = range(step * self._batch_size + self._rank, (step + 1) * self._batch_size, self._world_size)
        return torch.from_numpy(np.stack([self._row(row) for row in rows]))

    def _row(self, row: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self._seed, row))
        tokens = self._tokens[int(rng.integers(len(self._tokens)))]
        start = int(rng.integers(len(tokens) - self._seq_len))
        window: NDArray[np.int64] = tokens[start : start + self._seq_len + 1].astype(np.int64)
        return window

    def __iter__(self) -> Iterator[Tensor]:
        first = self._position // self._batch_size
        for step in range(first, (first // self._n_batches + 1) * self._n_batches):
            self._position = (step + 1) * self._batch_size
            yield self.batch(step)

    def state_dict(self) -> dict[str, int]:
        """Position, in sequences."""
        return {"sequences": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on at the position of `state_dict`.

        Raises:
            UserError: saved in the middle of a batch of this size.
        """
        if state["sequences"] % self._batch_size:
            raise UserError(
                f"the checkpoint stopped after {state['sequences']} sequences, which is no multiple of "
                f"batch_size={self._batch_size}; resume with the batch_size it was trained with"
            )
        self._position = state["sequences"]


class EvaluationBatches:
    """The same windows of S + 1 tokens every time, domain by domain: dicts of `domain` and `tokens` [B, S + 1].

    Args:
        tokens: one array per domain, by name.
        seq_len: S.
        batch_size: sequences per batch.
        n_sequences: windows per domain, spread evenly over its tokens.
        rank: this process; batches are dealt out in turn, and empty ones to those that would have one less than others: a
            process that evaluates less than the others leaves them waiting.
        world_size: number of processes.
    """

    def __init__(
        self,
        tokens: Mapping[str, Tokens],
        seq_len: int,
        batch_size: int,
        n_sequences: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._batches = []
        for domain, ids in tokens.items():
            room = len(ids) - seq_len - 1
            if room < 0:
                raise UserError(
                    f"domain {domain!r} has {len(ids)} tokens to evaluate on, fewer than seq_len={seq_len} + 1"
                )
            starts = np.unique(np.linspace(0, room, n_sequences).astype(int))
            rows = np.stack([ids[start : start + seq_len + 1] for start in starts]).astype(np.int64)
            self._batches += [
                (domain, torch.from_numpy(part)) for part in np.split(rows, range(batch_size, len(rows), batch_size))
            ]
        nothing = (next(iter(tokens)), torch.zeros(0, seq_len + 1, dtype=torch.int64))
        self._batches += [nothing] * (-len(self._batches) % world_size)
        self._batches = self._batches[rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for domain, tokens in self._batches:
            yield {"domain": domain, "tokens": tokens}


def check_equal_numbers(trainer: pl.Trainer) -> None:
    """Refuse training batches in unequal numbers, since a process that has none left leaves the others waiting. Collective.

    Raises:
        UserError: on every process.
    """
    if trainer.world_size == 1:
        return
    numbers: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(numbers, trainer.num_training_batches)
    if len(set(numbers)) > 1:
        raise UserError(
            f"all processes train on the same number of batches; here one has {min(numbers)} and another {max(numbers)}: let "
            f"the data's loaders hand out equal numbers"
        )


class TextData(pl.LightningDataModule):
    """Batches of text for training and evaluation.

    Args:
        source: `embedded`, or a folder with `<domain>.<split>.jsonl` files (also .jsonl.xz; one {"text": ...} a line).
        domains: which domains, in order; null for all. They are weighted equally.
        vocab_size: of the byte-level BPE tokenizer, which is trained at first use; of the model, with a tokenizer that is there.
        seq_len: S, tokens per sequence.
        batch_size: sequences per training step, over all devices.
        eval_sequences: sequences per domain for validation and test.
        seed: of the order of the training batches.
        cache: folder of tokenizers and tokens; null for $MOEPRUNE_CACHE or the user's cache folder.
        tokenizer: a tokenizer.json, or a checkpoint that holds one; null to train one, or, where training goes on from
            model.checkpoint, for the checkpoint's.
    """

    def __init__(
        self,
        source: str = "embedded",
        domains: list[str] | None = None,
        vocab_size: int = 2048,
        seq_len: int = 128,
        batch_size: int = 8,
        eval_sequences: int = 16,
        seed: int = 0,
        cache: Path | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("eval_sequences", eval_sequences)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.corpus = Corpus(source, domains)
        self.vocab_size, self.seq_len, self.batch_size = vocab_size, seq_len, batch_size
        self.eval_sequences, self.seed, self.cache, self.tokenizer = eval_sequences, seed, cache, tokenizer
        self._store: TokenStore | None = None

    @property
    def store(self) -> TokenStore:
        """The tokens; made at first use."""
        if self._store is None:
            self._store = TokenStore(self.corpus, self.vocab_size, self.cache, self.tokenizer)
        return self._store

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the text, once per machine."""
        _ = self.store

    def describe(self) -> dict[str, Any]:
        """What was trained on, for checkpoints."""
        return {"source": self.corpus.source, "domains": list(self.corpus.domains), "hash": self.corpus.content_hash()}

    def training_batches(
        self, n_batches: int, seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> TrainBatches:
        """`n_batches` training batches; another seed gives others, as calibration wants."""
        tokens = [self.store.tokens(domain, "train") for domain in self.corpus.domains]
        seed = self.seed if seed is None else seed
        return TrainBatches(tokens, self.seq_len, self.batch_size, n_batches, seed, rank, world_size)

    def evaluation_batches(self, split: str, rank: int = 0, world_size: int = 1) -> EvaluationBatches:
        """The batches of `valid` or `test`."""
        tokens = {domain: self.store.tokens(domain, split) for domain in self.corpus.domains}
        return EvaluationBatches(tokens, self.seq_len, max(self.batch_size, 16), self.eval_sequences, rank, world_size)

    def train_dataloader(self) -> TrainBatches:
        """As long as the run, or as the corpus if the run counts epochs."""
        trainer = self.trainer
        assert trainer is not None
        n_batches = trainer.max_steps * trainer.accumulate_grad_batches
        if n_batches < 0:
            n_tokens = sum(len(self.store.tokens(domain, "train")) for domain in self.corpus.domains)
            n_batches = max(1, n_tokens // (self.seq_len * self.batch_size))
        return self.training_batches(n_batches, None, trainer.global_rank, trainer.world_size)

    def _evaluation(self, split: str) -> EvaluationBatches:
        assert self.trainer is not None
        return self.evaluation_batches(split, self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> EvaluationBatches:
        """The `valid` split."""
        return self._evaluation("valid")

    def test_dataloader(self) -> EvaluationBatches:
        """The `test` split."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationBatches:
        """The `test` split."""
        return self._evaluation("test")
