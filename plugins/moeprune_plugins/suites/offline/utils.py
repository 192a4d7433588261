"""Functions that the task files name with ``!function``: loading the rows and scoring a document.

lm-eval loads this file by its path, so it imports nothing of the package.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

HERE = Path(__file__).parent


def load(file: str = "", **_unused: Any) -> dict[str, Any]:
    """Rows of ``file`` (next to this module) as the ``test`` split; lm-eval's own keywords are not used."""
    path = HERE / file
    if not path.is_file():
        raise FileNotFoundError(f"The offline task data {file!r} is missing: rebuild it with prepare.py.")
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in stream])}


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def choice_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Scores of a multiple-choice document.

    ``acc`` picks the choice of highest log-likelihood; ``acc_chance_adj`` maps chance to 0 and perfect to
    1, so tasks of different form can be averaged; ``gold_prob`` is the softmax weight of the right choice
    among the choices, a smooth companion of ``acc`` that shows small damage earlier.  There is no
    ``acc_norm``: the choices of a document have the same length (so it equals ``acc``) or differ in
    indentation only (where it misleads).
    """
    scores = [float(result[0]) for result in results]
    gold, chance = int(doc["label"]), 1.0 / len(scores)
    top = max(scores)
    norm = top + math.log(sum(math.exp(score - top) for score in scores))
    acc = float(_argmax(scores) == gold)
    return {
        "acc": acc,
        "acc_chance_adj": (acc - chance) / (1.0 - chance),
        "gold_prob": math.exp(scores[gold] - norm),
    }


def bpb_results(doc: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """Bits per UTF-8 byte: of the whole set (``bits_per_byte``), and per document (``doc_bpb``, has a
    stderr).
    """
    (loglikelihood,) = results
    size = len(doc["text"].encode("utf-8"))
    return {"bits_per_byte": (loglikelihood, size), "doc_bpb": -loglikelihood / size / math.log(2)}
