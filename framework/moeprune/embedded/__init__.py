"""The embedded corpus: five small text domains that ship with the package and need no network.

The files are made by :mod:`moeprune.embedded.prepare`; ``provenance.json`` names the source packages,
``NOTICE`` their licences.  A *work* (a play, a Bible book, a source file, an AWS service) lies in exactly
one split, so the ``valid`` and ``test`` splits hold text of works that were never seen in ``train``.
Documents of a split are stored in a fixed pseudo-random order: the first N documents are a random sample.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

__all__ = ["DOMAINS", "SPLITS", "Document", "content_hash", "documents", "file_name"]

DOMAINS: tuple[str, ...] = ("lit", "kjv", "code", "tech", "api")
SPLITS: tuple[str, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Document:
    """One piece of text: ``id`` is unique in its domain, ``work`` is the unit by which the splits were
    made.
    """

    id: str
    work: str
    text: str


def file_name(domain: str, split: str) -> str:
    """Name of the vendored file of a domain and split; ``ValueError`` names the valid choices."""
    for kind, value, valid in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
        if value not in valid:
            raise ValueError(f"Unknown embedded {kind} {value!r}: choose one of {', '.join(valid)}.")
    return f"{domain}.{split}.jsonl.xz"


def _read(domain: str, split: str) -> bytes:
    return resources.files(__name__).joinpath(file_name(domain, split)).read_bytes()


def documents(domain: str, split: str) -> list[Document]:
    """All documents of one domain and split, in stored order.

    Raises:
        ValueError: The domain or the split does not exist.
    """
    lines = lzma.decompress(_read(domain, split)).decode("utf-8").splitlines()
    rows = (json.loads(line) for line in lines)
    return [Document(id=row["id"], work=row["work"], text=row["text"]) for row in rows]


def content_hash(domains: Sequence[str]) -> str:
    """SHA-256 (hex) over the vendored bytes of the given domains, all splits, in the given order."""
    digest = hashlib.sha256()
    for domain in domains:
        for split in SPLITS:
            data = _read(domain, split)
            digest.update(f"{domain}.{split}:{len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()
