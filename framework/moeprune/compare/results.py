"""The schema of results.json, and the statistics behind its words.

    {
      "format": "moeprune.results/1",
      "name": str, "created": ISO 8601, "seconds": wall seconds of computing,
      "versions": {package: version}, "machine": {"processor": str, "cores": int, "workers": int},
      "model": {"parameters": int, "layers": L, "experts": E, "experts_in_all": int, "top_k": K, "steps": int,
                "tokens_per_step": int, "seed": int}         E: of the largest layer
      "domains": [str], "reference": name of the variant that the others are compared with,
      "suite": str | null, "limit": int | null, "families": {family: [task]},
      "train_on": bool           false: variants end with their prune; `end` is `after`, and losses have no vs_reference
      "trunk": {"step": int, "tokens": int, "reason": str, "history": HISTORY, "loads": LOADS} | null,
      "checkpoint": CHECKPOINT | null        an existing model that was pruned instead of a trunk; train_on is false then
      "overlap": OVERLAP | null              of what strategies remove, of those there are at every budget
      "variants": [VARIANT]
    }

    CHECKPOINT {"path": str, "weights": sha256, "family": str, "experts": [int per layer], "top_k": K, "n_groups": int,
                "calibration": {"data": {"source": str, "hash": str, ...}, "calibration_tokens": int, "seq_len": int | null, ...},
                "held_out": {"source": str, "hash": str, "sequences": int, "tokens": int, "seq_len": int},
                "scoring": {option of `moeprune evaluate`: value}}
    OVERLAP  {"names": [S strategies], "families": [[strategy]],
              "budgets": [{"budget": str, "ratio": share removed, "overlap": [S][S], "chance": [S][S]}]}
             Jaccard index of the experts that two remove, mean over layers, and its mean if both drew lots; null: remove nothing

    HISTORY  {"step": [int], "loss": [float], "seconds": [float]}       training loss, one value per optimizer step
    LOADS    {"step": [int], "expert_ids": [window][layer][id], "shares": [window][layer][share of the layer's tokens]}
             `step` is the end of each load window
    DIFF     {"value": float, "stderr": float, "noise": float | null, "half_width": float, "verdict": str}
             value = variant - reference; half_width of its 95 % interval
    LOSS     {"mean": float, "domains": {domain: float}}                nats per token, validation split

    VARIANT  {
      "name": str, "label": str, "status": "done" | "failed", "error": str | null,
      "start": "trunk" | "scratch" | "untrained", "drift": bool,
      "strategy": str, "family": str, "budget": str      for plots and rankings, each may be ""
      ... and if done:
      "pruner": str | null, "balancers": [str],
      "parameters": int, "parameters_kept": share of the unpruned model's, "active_parameters": per token,
      "experts_kept": [int per layer], "plan": file | null, "config": file | null,
      "removed_load": [share per layer] or []    of a single prune; of several, see prunes
      "val_loss": {"before": LOSS | null, "after": LOSS | null, "end": LOSS},
      "prunes": [{"step": int, "reason": str, "experts_kept": [int per layer], "removed_load": [share per layer] or [],
                  "jump": DIFF}]                 before: of the first, after: of the last
      "jump": DIFF | null        validation loss just after minus just before the prune, paired over sequences; of several
                                 prunes the sum, which leaves out what training between them gained
      "vs_lowest": DIFF | null   without training on: `after` minus that of the variant of the same budget that jumps least
      "vs_reference": DIFF | null    final validation loss, paired over sequences; null for the reference itself
      "history": HISTORY, "loads": LOADS          from the trunk's end (or the start) on
      "speed": {"step_seconds": QUARTILES, "ratio": QUARTILES, "tokens_per_second": float} | null
               training steps of all variants in turns in one process after training; ratio to the reference
      "memory": {"weights_bytes": int, "optimizer_bytes": int | null, "peak_bytes": int | null}
      "scores": {task: {"metric": str, "higher_is_better": bool, "value": float, "stderr": float | null, "n": int,
                        "vs_reference": DIFF | null}},
      "families": {family: {"metric": str, "higher_is_better": bool, "value": float, "stderr": float, "n": int,
                            "vs_reference": DIFF | null}}
    }
             vs_reference of a score: null for the reference, and where the metric is the corpus's and no document has a value
    QUARTILES {"median": float, "q1": float, "q3": float}

A failed variant holds what comes before `and if done` only. Every word of judgement comes from `difference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

FORMAT = "moeprune.results/1"
NO_DIFFERENCE = "no detectable difference"
Z = 1.96  # half-width of the 95 % interval of a single score, in standard errors


def difference(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    strata: Sequence[int] | None = None,
    drifts: Sequence[float] = (),
) -> dict[str, Any]:
    """Mean of a - b over the same documents, its standard error, half of its 95 % interval, and a word for it.

    The documents are a sample, and so is the run: with drift controls their mean square adds to the squared standard error,
    and the interval is Student's t with the degrees of freedom of that sum (Welch 1947, Satterthwaite 1946). One control
    leaves one degree of freedom where the drift dominates, so a single control makes intervals wide; in simulation they then
    hold about 90 % of the time, with three controls 95 % (tests/test_compare.py).

    Args:
        a: [N] one value per document (or sequence).
        b: [N] the same documents under the reference.
        strata: [N] stratum (domain) of each document: strata are weighted equally, as in the means that are reported.
        drifts: how far each drift control ended from the reference.

    Returns:
        value, stderr, noise (root mean square of the drifts, or null), half_width, and verdict: `lower`, `higher` or
        `no detectable difference`.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    labels = np.zeros(len(d), dtype=int) if strata is None else np.asarray(strata)
    parts = [d[labels == label] for label in np.unique(labels)]
    value = float(np.mean([part.mean() for part in parts]))
    if min(map(len, parts)) > 1:
        stderr = float(np.sqrt(np.sum([part.var(ddof=1) / len(part) for part in parts])) / len(parts))
    else:  # a stratum of one document has no variance of its own
        stderr = float(np.sqrt(d.var(ddof=1) / len(d))) if len(d) > 1 else 0.0
    noise = float(np.sqrt(np.mean(np.square(drifts)))) if len(drifts) else None
    variances = [(stderr**2, max(1, len(d) - len(parts))), ((noise or 0.0) ** 2, max(1, len(drifts)))]
    total = sum(variance for variance, _ in variances)
    degrees = 1 / sum((variance / total) ** 2 / df for variance, df in variances) if total else 1.0
    half = float(student_t.ppf(0.975, degrees) * np.sqrt(total))
    detectable = abs(value) > half and len(d) > 1
    verdict = ("higher" if value > 0 else "lower") if detectable else NO_DIFFERENCE
    return {"value": value, "stderr": stderr, "noise": noise, "half_width": half, "verdict": verdict}


def mean_and_stderr(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Equally weighted mean over groups of documents, and its standard error."""
    arrays = [np.asarray(group, dtype=np.float64) for group in values]
    variances = [group.var(ddof=1) / len(group) if len(group) > 1 else 0.0 for group in arrays]
    return float(np.mean([group.mean() for group in arrays])), float(np.sqrt(np.sum(variances)) / len(arrays))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}
