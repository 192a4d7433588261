"""Text for calibration: sources, packing, chats, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeprune.errors import UserError
from moeprune.interop.text import documents, token_batches


class Letters:
    """A tokenizer of letters; end of text is 0."""

    eos_token_id = 0
    name_or_path = "letters"
    chat_template: str | None = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


def test_packed_text_is_the_stream_cut_into_windows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "abcd"}\n\n"efg"\n{"text": "hi"}\n')
    batches = token_batches(str(file), Letters(), 3, 2, batch_size=2, seed=1)
    rows = sorted("".join(map(chr, row.tolist())) for tokens, _ in batches for row in tokens)
    assert rows == sorted(["abcd", "\0efg", "\0hi\0"])
    assert sum(len(tokens) for tokens, _ in batches) == 3
    assert all(mask.all() for _, mask in batches)
    again = token_batches(str(file), Letters(), 3, 2, batch_size=2, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_chats_go_one_per_row_through_the_template(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    turns = [[("user", "hello")], [("user", "q"), ("assistant", "a longer answer that is cut")]]
    file.write_text("\n".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in t]}) for t in turns))
    ((tokens, mask),) = token_batches(str(file), Letters(), 19, 1, batch_size=2)
    texts = {"".join(map(chr, row[keep].tolist())) for row, keep in zip(tokens, mask, strict=True)}
    assert texts == {"<user>hello", "<user>q<assistant>a longer answer"[:20]}
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        token_batches(str(file), plain, 19, 1)


def test_lines_of_jsonl_end_where_json_says(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "e\u2029"]
    (tmp_path / "a.jsonl").write_text("\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts))
    assert list(documents(str(tmp_path / "a.jsonl"))) == texts


def test_folder_embedded_and_limits(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one")
    (tmp_path / "y.md").write_text("two")
    assert list(documents(str(tmp_path))) == ["one", "two"]
    batches = token_batches("embedded", Letters(), 64, 2, batch_size=3)
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(3, 65), (3, 65)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "less than one window"),
        ("short.txt", "abc", "3|4 tokens"),
        ("bad.jsonl", "{", "line 1: no JSON"),
        ("odd.jsonl", '{"body": 1}', "neither `text` nor `messages`"),
        ("none.json", "{}", "no list of documents"),
        ("none.jsonl", "", "holds no text"),
    ],
)
def test_bad_text_is_one_sentence(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        token_batches(str(tmp_path / name), Letters(), 8, 1)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    tokenizer: Any = Letters()
    with pytest.raises(UserError, match="no text at"):
        token_batches(str(tmp_path / "missing.txt"), tokenizer, 8, 1)
    with pytest.raises(UserError, match="cannot read the data set 'nobody/nothing'"):
        token_batches("nobody/nothing", tokenizer, 8, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text"):
        token_batches(str(tmp_path / "empty"), tokenizer, 8, 1)
