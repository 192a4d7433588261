"""Text for calibrating a model with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeprune.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".json")
Document = str | list[dict[str, str]]  # text, or the messages of a chat


def documents(source: str, split: str = "train") -> Iterator[Document]:
    """Documents of a source, in its order.

    Args:
        source: `embedded`; a .txt file (one document), a .jsonl file (a line each: {"text": ...}, {"messages": [...]}, or a
            string) or a folder of such files; or the name of a data set on the hub (`name` or `name:configuration`), of which
            the columns `text` or `messages` are read.
        split: of the embedded corpus or the data set.

    Raises:
        UserError: no such source, or a line that holds no text.
    """
    path = Path(source)
    if source == "embedded":
        from moeprune import embedded

        parts = [embedded.documents(domain, split) for domain in embedded.DOMAINS]
        for row in range(max(map(len, parts))):  # the domains in turn
            for part in parts:
                if row < len(part):
                    yield part[row].text
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"the folder {source} holds no text ({', '.join(SUFFIXES)}); give another --data")
        for file in files:
            yield from _file(file)
    elif path.is_file():
        yield from _file(path)
    elif path.suffix in SUFFIXES or source.startswith(("/", ".")):
        raise UserError(f"there is no text at {source}; give a file, a folder, `embedded` or the name of a data set")
    else:
        yield from _dataset(source, split)


def _file(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    if path.suffix in (".txt", ".md"):
        yield text
        return
    try:
        rows = json.loads(text) if path.suffix == ".json" else None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: no JSON ({error.msg})") from error
    if rows is not None:
        if not isinstance(rows, list):
            raise UserError(f"{path} holds no list of documents; give a list of strings or of objects with `text`")
        for number, row in enumerate(rows):
            yield _document(row, f"{path}, entry {number}")
        return
    # not splitlines, which ends lines at characters that a JSON string may hold
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error.msg})") from error
            yield _document(row, f"{path}, line {number}")


def _document(row: Any, where: str) -> Document:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        messages = row.get("messages", row.get("conversations"))
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return messages
    raise UserError(f"{where} holds neither `text` nor `messages`: {str(row)[:60]}")


def _dataset(name: str, split: str) -> Iterator[Document]:
    import datasets

    name, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _document(row, f"data set {name}, row {number}")
    except UserError:
        raise
    except Exception as error:  # the hub's client raises whatever its transport does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read the data set {name!r}: {reason}; give a file, a folder or `embedded` where there is no network"
        ) from error


def token_batches(
    source: str,
    tokenizer: Any,
    length: int,
    n_batches: int,
    batch_size: int = 8,
    seed: int = 0,
    pack: bool | None = None,
    split: str = "train",
) -> list[tuple[Tensor, Tensor]]:
    """(tokens, mask) batches [B, length + 1] for `calibration.record`, drawn at random without repeats.

    Args:
        source: see `documents`.
        tokenizer: of transformers; chats go through its chat template.
        length: tokens that the model sees per row.
        n_batches: at most so many; fewer if the text gives out.
        batch_size: rows per batch.
        seed: of the choice of rows.
        pack: join documents, the end-of-text token between them, and cut the stream into full rows; otherwise one document per
            row, cut or padded. Default: pack text, one chat per row.
        split: see `documents`.

    Raises:
        UserError: no text, or less than one window of it; a chat without a chat template.
    """
    rows: list[list[int]] = []
    stream: list[int] = []
    wanted = n_batches * batch_size
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    found = False
    for document in documents(source, split):
        found = True
        chat = not isinstance(document, str)
        ids = _ids(tokenizer, document)
        if pack or (pack is None and not chat):
            stream += [*ids, *end]
            while len(stream) > length:
                rows.append(stream[: length + 1])
                stream = stream[length + 1 :]
        elif len(ids) > 1:
            rows.append(ids[: length + 1])
        if len(rows) >= 4 * wanted:  # enough to draw from
            break
    if not found:
        raise UserError(f"{source} holds no text; give another --data")
    if not rows:
        raise UserError(
            f"{source} holds {len(stream)} tokens, less than one window of {length + 1}; give more text or a smaller --seq_len"
        )
    order = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    return [_batch([rows[i] for i in order[a : a + batch_size]]) for a in range(0, len(order), batch_size)]


def _ids(tokenizer: Any, document: Document) -> list[int]:
    if isinstance(document, str):
        ids: list[int] = tokenizer(document)["input_ids"]
        return ids
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the data holds chats, but the tokenizer of {tokenizer.name_or_path} has no chat template; give plain text"
        )
    turns = [
        {"role": turn.get("role", turn.get("from", "user")), "content": turn.get("content", turn.get("value", ""))}
        for turn in document
    ]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    chat: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat


def _batch(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded tokens and the mask of the real ones."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return tokens, mask
