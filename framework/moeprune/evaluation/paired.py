"""A model minus its reference, over the same documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeprune.compare.results import difference
from moeprune.errors import UserError

FORMAT = "moeprune.differences/1"


def paired(scores: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Differences per task and per family with 95 % intervals, from the documents' own values.

    Args:
        scores: `scores` of `moeprune.evaluation.score.score`.
        reference: of the model to subtract, on the same documents.

    Returns:
        `rows` and `families`: name -> metric, higher_is_better, value, reference, n and `difference`: value, half_width of its
        interval, stderr, and a word for it. A metric that has no values per document has a difference without an interval.

    Raises:
        UserError: other tasks, documents, prompts, limits or metrics.
    """
    comparable(scores, reference)
    rows, families = {}, {}
    for task, mine in scores["rows"].items():
        other = reference["rows"][task]
        rows[task] = _row(mine, other, [mine["documents"]], [other["documents"]])
    for family, mine in scores["families"].items():
        documents, others = (
            [side["rows"][task]["documents"] for task in mine["tasks"]] for side in (scores, reference)
        )
        families[family] = _row(mine, reference["families"][family], documents, others)
    return {
        "format": FORMAT,
        "model": scores["model"],
        "reference": reference["model"],
        "limit": scores["limit"],
        "rows": rows,
        "families": families,
    }


AGAIN = "evaluate both in the same way"


def same_tasks(a: str, tasks: Iterable[str], limit: int | None, reference: Mapping[str, Any]) -> None:
    """Check that the model called `a` is, or will be, scored on as many documents of the same tasks as the reference.

    Raises:
        UserError: it is not; what differs is named.
    """
    b, differing = reference["model"], set(tasks) ^ set(reference["rows"])
    if differing:
        raise UserError(
            f"{a} and {b} are not scored on the same tasks (only on one of them: {', '.join(sorted(differing))}); {AGAIN}"
        )
    if limit != reference["limit"]:
        shown = " and ".join("all" if n is None else str(n) for n in (limit, reference["limit"]))
        raise UserError(f"{a} and {b} are not scored on the same number of documents per task ({shown}); {AGAIN}")


def comparable(scores: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Check that two results are of the same documents.

    Raises:
        UserError: they are not; what differs is named.
    """
    a, b = scores["model"], reference["model"]
    same_tasks(a, scores["rows"], scores["limit"], reference)
    if scores["max_length"] != reference["max_length"]:
        shown = f"{scores['max_length']} and {reference['max_length']}"
        raise UserError(f"{a} and {b} were given different numbers of tokens at a time (max_length {shown}); {AGAIN}")
    for task, row in scores["rows"].items():
        other = reference["rows"][task]
        for key, what in (
            ("metric", "by different metrics"),
            ("num_fewshot", "with different numbers of examples in the prompt"),
            ("max_gen_toks", "with answers of different lengths (max_gen_toks)"),
        ):
            if row[key] != other[key]:
                raise UserError(f"{a} and {b} were scored on {task} {what}: {row[key]} and {other[key]}; {AGAIN}")
        if row["documents_sha256"] != other["documents_sha256"]:
            raise UserError(f"{a} and {b} were scored on different documents of {task}; {AGAIN}, with the same data")
        if row["prompts_sha256"] != other["prompts_sha256"]:
            raise UserError(
                f"{a} and {b} were scored with different prompts on {task} (examples, chat template); {AGAIN}"
            )
    if {k: v["tasks"] for k, v in scores["families"].items()} != {
        k: v["tasks"] for k, v in reference["families"].items()
    }:
        raise UserError(f"{a} and {b} were scored with suites that average over different tasks; {AGAIN}")


def _row(
    mine: Mapping[str, Any],
    other: Mapping[str, Any],
    documents: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
) -> dict[str, Any]:
    if all(documents) and all(others):
        strata = [index for index, group in enumerate(documents) for _ in group]
        found = difference([x for group in documents for x in group], [x for group in others for x in group], strata)
        del found["noise"]
    else:
        found = {"value": mine["value"] - other["value"], "stderr": None, "half_width": None, "verdict": "no interval"}
    return {
        "metric": mine["metric"],
        "higher_is_better": mine["higher_is_better"],
        "value": mine["value"],
        "reference": other["value"],
        "n": mine["n"],
        "difference": found,
    }
