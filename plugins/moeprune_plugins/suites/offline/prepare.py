"""Build the offline tasks from the ``test`` split of the embedded corpus.

Usage::

    python -m moeprune_plugins.suites.offline.prepare --output DIR

Only ``moeprune.embedded`` is read; the result depends on nothing else (all draws are seeded by the task's
name). Common rules: no document shares a 13-gram with the training text, gold positions are balanced
exactly, rows are shuffled so that the first N are a random sample, and a document gives at most
``PER_DOCUMENT`` of them.

* ``wordorder``: a sentence and the same sentence with two adjacent words swapped (a minimal pair in the
  manner of Warstadt et al. 2020, "BLiMP"); the first and last words stay.
* ``lastword``: the last word of a clause among words of the same length and like frequency (in the manner of
  Paperno et al. 2016, "LAMBADA", but four-way and *without* the answer in the context).  Frequencies are
  those of the training text; the gold word's frequency rank among the four is balanced.
* ``code_indent``: a line of code at four depths: two levels less, one less, the same, one more than the line
  before it; each is the truth equally often.
* ``bpb``: plain text for bits per byte.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import lzma
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.embedded import DOMAINS, Document, documents
from moeprune.embedded.prepare import ngrams

__all__ = ["TASKS", "build", "main"]

Row = dict[str, Any]
SIZE = 200
BPB_DOCUMENTS, BPB_CHARS, BPB_MIN_CHARS = 30, 1500, 300
PER_DOCUMENT = 12
LASTWORD_DOMAINS = tuple(domain for domain in DOMAINS if domain != "code")


@dataclass
class Known:
    """What is known of a domain's training text: 13-grams, words, counts of (clause-final) words."""

    grams: set[str] = field(default_factory=set)
    words: str = ""
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    final: collections.Counter[str] = field(default_factory=collections.Counter)

    @classmethod
    def of(cls, domain: str) -> Known:
        """Read the ``train`` split of a domain."""
        known = cls()
        parts: list[str] = []
        for document in documents(domain, "train"):
            known.grams |= ngrams(document.text)
            parts.append(_normal(document.text))
            known.counts.update(re.findall(r"\b[a-z]{4,}\b", document.text))
            known.final.update(re.findall(r" ([a-z]{4,})[.;:!?]\s", document.text))
        known.words = f" {' | '.join(parts)} "
        return known

    def contains(self, text: str) -> bool:
        """Whether the training text holds a 13-gram of ``text``, or all of it if it is shorter."""
        return bool(ngrams(text) & self.grams) or f" {_normal(text)} " in self.words


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _rng(name: str) -> random.Random:
    return random.Random(int(hashlib.sha256(name.encode()).hexdigest()[:16], 16))


def _prose(domain: str, document: Document) -> str:
    """The running text of a document: without stage business of ``lit`` and the frame of ``api``."""
    text = document.text
    if domain == "api":
        match = re.search(r"^task: (.*)$", text, flags=re.M)
        text = match[1] if match else ""
    if domain == "lit":
        text = re.sub(r"\[[^\]]*\]", " ", text)
        speeches = re.findall(r"^[A-Z][\w' ]{1,25}\.\n((?:.+\n?)+)", text, flags=re.M)
        text = "\n".join(speeches)
    return re.sub(r"[ \n]+", " ", text).strip()


def _spread(rows: Iterable[Row], rng: random.Random, per_gold: int = SIZE) -> list[Row]:
    """Shuffle and keep at most ``PER_DOCUMENT`` rows of a document and ``per_gold`` rows of one answer."""
    pool = list(rows)
    rng.shuffle(pool)
    kept: list[Row] = []
    count: collections.Counter[str] = collections.Counter()
    for row in pool:
        if count[row["source"]] < PER_DOCUMENT and count[row["gold"]] < per_gold:
            count.update((row["source"], row["gold"]))
            kept.append(row)
    return kept


def _place(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Turn ``gold``/``others`` into shuffled ``choices`` with the gold position balanced exactly (up to one).

    The list is cut to a multiple of the number of choices.
    """
    width = 1 + len(rows[0]["others"])
    usable = len(rows) - len(rows) % width
    labels = [i % width for i in range(usable)]
    rng.shuffle(labels)
    placed: list[Row] = []
    for row, label in zip(rows, labels, strict=False):
        choices = list(row["others"])
        rng.shuffle(choices)
        choices.insert(label, row["gold"])
        placed.append({"source": row["source"], "context": row["context"], "choices": choices, "label": label})
    return placed


# --- word order


def _sentences(domain: str, document: Document) -> Iterator[str]:
    if domain == "code":
        yield from (line.strip() for line in document.text.split("\n"))
    else:
        yield from re.split(r"(?<=[.!?])\s+", _prose(domain, document))


def _is_sentence(domain: str, text: str) -> bool:
    if not 30 <= len(text) <= 160:
        return False
    if domain == "code":
        return text[0] not in "#\"'" and re.search(r"[=(]", text) is not None
    return re.fullmatch(r"[A-Z][^\[\]_|=<>]*[.!?]", text) is not None


def _swap(text: str, domain: str, rng: random.Random) -> str | None:
    """The text with two adjacent inner words swapped, or None when there is no such pair."""
    words = text.split(" ")
    low, high = (5, 20) if domain == "code" else (7, 24)
    if not low <= len(words) <= high or "" in words:
        return None
    plain = re.compile(r"\S+" if domain == "code" else r"[a-z']+")
    pairs = [
        i
        for i in range(1, len(words) - 2)
        if words[i] != words[i + 1] and plain.fullmatch(words[i]) and plain.fullmatch(words[i + 1])
    ]
    if not pairs:
        return None
    i = rng.choice(pairs)
    return " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])


def wordorder(domain: str, known: Known) -> list[Row]:
    """Rows of ``offline_wordorder_<domain>``."""
    rng = _rng(f"wordorder_{domain}")
    rows: list[Row] = []
    seen: set[str] = set()
    for document in documents(domain, "test"):
        for text in _sentences(domain, document):
            if text in seen or not _is_sentence(domain, text) or known.contains(text):
                continue
            seen.add(text)
            swapped = _swap(text, domain, rng)
            if swapped is not None:
                rows.append({"source": document.id, "context": "", "gold": text, "others": [swapped]})
    return _place(_spread(rows, rng)[:SIZE], rng)


# --- last word


@dataclass(frozen=True)
class Vocabulary:
    """Words that end clauses in the training text, by length, from frequent to rare."""

    by_length: dict[int, list[str]]
    window: int = 8

    @classmethod
    def of(cls, known: Known, least: int = 2) -> Vocabulary:
        """Words that end at least ``least`` clauses of the training text.

        Gold words are drawn by how often they end a clause, but rare counts are noisy: the frequency that
        distractors share is the product of the clause-final count and the plain count.
        """
        by_length: dict[int, list[str]] = {}
        for word in sorted(known.final, key=lambda w: (-known.final[w] * known.counts[w], w)):
            if known.final[word] >= least:
                by_length.setdefault(len(word), []).append(word)
        return cls(by_length)

    def distractors(self, gold: str, rank: int, banned: str, rng: random.Random) -> list[str] | None:
        """Three words of the gold's length, ``rank`` of them more frequent; none occurs in ``banned``."""
        ranked = self.by_length.get(len(gold), [])
        if gold not in ranked:
            return None
        at = ranked.index(gold)
        if at < self.window or at + self.window >= len(ranked):
            return None
        above = [word for word in ranked[at - self.window : at] if word not in banned]
        below = [word for word in ranked[at + 1 : at + 1 + self.window] if word not in banned]
        if len(above) < rank or len(below) < 3 - rank:
            return None
        return rng.sample(above, rank) + rng.sample(below, 3 - rank)


def _clauses(text: str) -> Iterator[tuple[str, str]]:
    """(context of 40-200 characters from a word's start, last word of the clause)."""
    for match in re.finditer(r" ([a-z]{4,})(?=[.;:!?](?: |$))", text):
        start = max(0, match.start() - 200)
        context = text[start : match.start()]
        if start:
            context = context[context.find(" ") + 1 :]
        if len(context) >= 40:
            yield context, match[1]


def lastword(domain: str, known: Known) -> list[Row]:
    """Rows of ``offline_lastword_<domain>``."""
    rng = _rng(f"lastword_{domain}")
    vocabulary = Vocabulary.of(known)
    found: list[Row] = []
    seen: set[str] = set()
    for document in documents(domain, "test"):
        for context, gold in _clauses(_prose(domain, document)):
            banned = context.lower()
            if gold in banned or context in seen or known.contains(f"{context} {gold}"):
                continue
            seen.add(context)
            # the rank is drawn before looking whether distractors exist, so it says nothing about the gold
            rank = rng.randrange(4)
            others = vocabulary.distractors(gold, rank, banned, rng)
            if others is not None:
                choices = [f" {word}" for word in others]
                row = {"source": document.id, "context": context, "gold": f" {gold}", "others": choices}
                found.append({**row, "rank": rank})
    spread = _spread(found, rng, per_gold=2)
    pools = [[row for row in spread if row["rank"] == rank] for rank in range(4)]
    each = min(SIZE // 4, *(len(pool) for pool in pools))
    rows = [row for pool in pools for row in pool[:each]]
    rng.shuffle(rows)
    return _place(rows, rng)


# --- indentation


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _indent_rows(document: Document) -> Iterator[tuple[int, Row]]:
    """(offset in levels, row) of every usable line: -2, -1, 0, +1 relative to the line before.

    One empty line in between belongs to the choices, so that the context never ends in white space.
    """
    lines = document.text.split("\n")
    quoted = False
    for i, line in enumerate(lines):
        was_quoted, quoted = quoted, quoted ^ (len(re.findall(r'"""|\'\'\'', line)) % 2 == 1)
        body = line.strip()
        gap = "\n" if i and not lines[i - 1].strip() else ""
        above = i - 1 - len(gap)
        previous = lines[above] if above >= 0 else ""
        if was_quoted or quoted or not previous.strip() or not 6 <= len(body) <= 100 or body[0] in "#\"')]}":
            continue
        level, offset = _indent(previous), (_indent(line) - _indent(previous)) // 4
        if level % 4 or _indent(line) % 4 or level < 8 or not -2 <= offset <= 1:
            continue
        context = _tail(lines[: above + 1], 250)
        if context.count("\n") < 1:
            continue
        depths = {o: f"{gap}\n{' ' * (level + 4 * o)}{body}" for o in (-2, -1, 0, 1)}
        others = [text for o, text in depths.items() if o != offset]
        yield offset, {"source": document.id, "context": context, "gold": depths[offset], "others": others}


def _tail(lines: Sequence[str], limit: int) -> str:
    """The last lines that fit in ``limit`` characters."""
    kept: list[str] = []
    for line in reversed(lines):
        if sum(len(k) + 1 for k in kept) + len(line) > limit:
            break
        kept.insert(0, line)
    return "\n".join(kept).lstrip("\n")


def code_indent(known: Known) -> list[Row]:
    """Rows of ``offline_code_indent``."""
    rng = _rng("code_indent")
    pools: dict[int, list[Row]] = {-2: [], -1: [], 0: [], 1: []}
    for document in documents("code", "test"):
        for offset, row in _indent_rows(document):
            if not ngrams(f"{row['context']}{row['gold']}") & known.grams:
                pools[offset].append(row)
    spread = [_spread(rows, rng) for rows in pools.values()]
    each = min(SIZE // 4, *(len(rows) for rows in spread))
    rows = [row for pool in spread for row in pool[:each]]
    rng.shuffle(rows)
    return _place(rows, rng)


# --- bits per byte


def bpb(domain: str, known: Known) -> list[Row]:
    """Rows of ``offline_bpb_<domain>``: the works take turns."""
    rng = _rng(f"bpb_{domain}")
    works: dict[str, list[Row]] = {}
    for document in documents(domain, "test"):
        text = document.text[:BPB_CHARS]
        if len(document.text) > BPB_CHARS:
            text = text[: max(text.rfind("\n"), text.rfind(" "))]
        if len(text) >= BPB_MIN_CHARS and not ngrams(text) & known.grams:
            works.setdefault(document.work, []).append({"source": document.id, "text": text})
    names = sorted(works)
    rng.shuffle(names)
    deepest = max(len(rows) for rows in works.values())
    rows = [works[name][i] for i in range(deepest) for name in names if i < len(works[name])][:BPB_DOCUMENTS]
    rng.shuffle(rows)
    return rows


# --- output

_YAML = """include: {base}
task: offline_{name}
dataset_kwargs: {{file: {name}.jsonl.xz}}
"""


def _task_yaml(name: str) -> str:
    form = name.split("_")[0]
    base = "_bpb.yaml" if form == "bpb" else "_choice.yaml"
    return _YAML.format(base=base, name=name)


def _rows_of(name: str, known: Callable[[str], Known]) -> list[Row]:
    form, domain = name.split("_")
    if name == "code_indent":
        return code_indent(known("code"))
    return {"bpb": bpb, "wordorder": wordorder, "lastword": lastword}[form](domain, known(domain))


TASKS: tuple[str, ...] = (
    *(f"bpb_{domain}" for domain in DOMAINS),
    *(f"wordorder_{domain}" for domain in DOMAINS),
    *(f"lastword_{domain}" for domain in LASTWORD_DOMAINS),
    "code_indent",
)


def build(output: Path) -> dict[str, int]:
    """Write data and task files into ``output``; returns the number of rows of each task."""
    output.mkdir(parents=True, exist_ok=True)
    cache: dict[str, Known] = {}

    def known(domain: str) -> Known:
        if domain not in cache:
            cache[domain] = Known.of(domain)
        return cache[domain]

    sizes: dict[str, int] = {}
    for name in TASKS:
        rows = _rows_of(name, known)
        lines = (json.dumps({"id": i, **row}, ensure_ascii=False) + "\n" for i, row in enumerate(rows))
        data = lzma.compress("".join(lines).encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
        (output / f"{name}.jsonl.xz").write_bytes(data)
        (output / f"{name}.yaml").write_text(_task_yaml(name), encoding="utf-8")
        sizes[name] = len(rows)
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moeprune_plugins.suites.offline.prepare",
        description="Build the offline lm-eval tasks.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the task and data files")
    for name, size in build(parser.parse_args(argv).output).items():
        print(f"offline_{name} {size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
