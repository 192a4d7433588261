"""Held-out text for the loss of an existing checkpoint: the same sequences for every variant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from moeprune.errors import UserError
from moeprune.interop.text import Document, _batch, documents
from moeprune.model.prunable import PrunableModel

Rows = dict[str, list[list[int]]]  # domain -> sequences of token ids
Losses = dict[str, list[float]]  # domain -> one loss per sequence


def sequences(
    source: str,
    encode: Callable[[Document], list[int]],
    end: Sequence[int],
    length: int,
    n: int,
    domains: Sequence[str] | None = None,
) -> Rows:
    """At most `n` sequences of `length` + 1 tokens per domain, spread evenly over its text, none of which overlap.

    Text is joined, the end of text between documents, as for training; a chat is a sequence of its own, cut where it is longer.

    Args:
        source: `embedded`, or a folder of `<domain>.<split>.jsonl` files, of which the split `valid` is read, domain by domain; or
            whatever `interop.text.documents` takes, which is one domain.
        encode: token ids of a document.
        end: the end of text.
        length: tokens that the model sees.
        n: sequences per domain.
        domains: which; None for all.

    Raises:
        UserError: no such text, or less than a sequence of it.
    """
    from moeprune.training.data import Corpus

    split = source == "embedded" or (Path(source).is_dir() and any(Path(source).glob("*.valid.jsonl*")))
    if split:
        corpus = Corpus(source, domains)
        texts: dict[str, Iterable[Document]] = {domain: corpus.texts(domain, "valid") for domain in corpus.domains}
    else:
        texts = {Path(source).name: documents(source, "validation")}
    enough = None if split else 16 * n * (length + 1)  # tokens; of a large data set the beginning will do
    found: Rows = {}
    for domain, each in texts.items():
        stream, chats = _encoded(each, encode, list(end), length, enough)
        room = len(stream) - length - 1
        if room < 0 and not chats:
            raise UserError(
                f"the held-out text {source} holds {len(stream)} tokens{f' of {domain}' if split else ''}, less than one "
                f"sequence of {length + 1}; give more text or a smaller seq_len"
            )
        starts = _spread(room, min(n, len(stream) // (length + 1)))
        found[domain] = [stream[start : start + length + 1] for start in starts]
        found[domain] += [chats[i] for i in _spread(len(chats) - 1, min(n, len(chats)))]
    return found


def _encoded(
    texts: Iterable[Document],
    encode: Callable[[Document], list[int]],
    end: list[int],
    length: int,
    enough: int | None,
) -> tuple[list[int], list[list[int]]]:
    """Texts as one stream of tokens; chats one by one."""
    stream: list[int] = []
    chats: list[list[int]] = []
    for document in texts:
        ids = encode(document)
        if isinstance(document, str):
            stream += ids if ids[-1:] == end else [*ids, *end]
        elif len(ids) > 1:
            chats.append(ids[: length + 1])
        if enough is not None and len(stream) + sum(map(len, chats)) >= enough:
            break
    return stream, chats


def _spread(last: int, n: int) -> list[int]:
    """`n` positions from 0 to `last`, evenly."""
    return [int(x) for x in np.linspace(0, last, n)] if n > 0 else []


def digest(rows: Rows) -> str:
    """sha256 of the sequences, hex."""
    found = hashlib.sha256()
    for domain, sequences in rows.items():
        found.update(domain.encode())
        for row in sequences:
            found.update(np.asarray(row, dtype=np.int64).tobytes())
    return found.hexdigest()


@torch.no_grad()
def losses(model: PrunableModel, rows: Rows, batch_size: int) -> Losses:
    """Per domain the mean cross-entropy of each sequence, nats per token, in order."""
    found: Losses = {domain: [] for domain in rows}
    for domain, each in rows.items():
        for first in range(0, len(each), batch_size):
            tokens, mask = (part.to(model.device) for part in _batch(each[first : first + batch_size]))
            padded = not bool(mask.all())
            logits = model.logits(tokens[:, :-1], mask[:, :-1] if padded else None)
            for row, targets, real in zip(
                logits, tokens[:, 1:], mask[:, 1:], strict=True
            ):  # float32 logits of one at a time
                found[domain].append(F.cross_entropy(row[real].float(), targets[real]).item())
    return found
