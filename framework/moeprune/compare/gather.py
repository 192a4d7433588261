"""Puts the files of a comparison's runs together into results.json (schema: results.py)."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moeprune import registry
from moeprune.compare.job import TRUNK
from moeprune.compare.results import FORMAT, difference, mean_and_stderr
from moeprune.compare.spec import Comparison, job_folder
from moeprune.files import read_json, read_rows
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.sweep import _mean, _plain, chance, clustered, jaccard

PACKAGES = ("moeprune", "torch", "pytorch-lightning", "lm_eval", "tokenizers", "numpy")
Losses = dict[str, list[float]]  # domain -> one loss per sequence


def gather(
    comparison: Comparison, folder: Path, failed: dict[str, str], speeds: dict[str, Any], seconds: float, workers: int
) -> dict[str, Any]:
    """The results of all variants, failed ones included.

    Args:
        comparison: what was run.
        folder: where.
        failed: error by name.
        speeds: of `runner.measure_speed`.
        seconds: wall time of computing, all calls together.
        workers: runs at a time.
    """
    done = {
        name: read_json(job_folder(folder, name) / "result.json", "result")
        for name in comparison.variants
        if name not in failed
    }
    reference = done.get(comparison.reference)
    families: dict[str, list[str]] = {}
    if comparison.suite is not None:
        suite = registry.create("suite", comparison.suite)
        families = {family: list(tasks) for family, tasks in suite.families().items()}
    drifts = _drifts(comparison, done, reference, families)
    lowest = _lowest(comparison, folder, list(done)) if not comparison.train_on else {}
    variants = []
    for name, variant in comparison.variants.items():
        row: dict[str, Any] = {
            "name": name,
            "label": variant.label or name,
            "status": "failed" if name in failed else "done",
            "error": failed.get(name),
            "start": variant.start,
            "drift": variant.drift,
            "strategy": variant.strategy,
            "family": variant.family,
            "budget": variant.budget,
        }
        if name in done:
            other = None if name == comparison.reference else reference
            row |= _row(comparison, folder, name, done[name], other, drifts, families)
            best = lowest.get(variant.budget)
            row["vs_lowest"] = (
                _paired(done[name]["val_loss"], done[best]["val_loss"])
                if best and row["jump"] and best != name
                else None
            )
            row["speed"] = speeds.get(name)
        variants.append(row)
    return {
        "format": FORMAT,
        "name": comparison.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "workers": workers,
        },
        "model": _model(comparison, folder, done),
        "domains": list(next(iter(done.values()))["val_loss"]) if done else [],
        "reference": comparison.reference,
        "suite": comparison.suite,
        "limit": comparison.limit,
        "train_on": comparison.train_on,
        "families": families,
        "trunk": _trunk(comparison, folder),
        "checkpoint": reference["checkpoint"] if reference and comparison.checkpoint is not None else None,
        "overlap": _overlap(comparison, folder, done),
        "variants": variants,
    }


def _model(comparison: Comparison, folder: Path, done: dict[str, Any]) -> dict[str, Any]:
    """What the variants are variants of."""
    parameters = next(iter(done.values()))["unpruned_parameters"] if done else 0
    if comparison.checkpoint is not None:
        known = done[comparison.reference]["checkpoint"]
        counts = known["experts"]
        sizes = {"layers": len(counts), "experts": max(counts), "experts_in_all": sum(counts), "top_k": known["top_k"]}
        return {
            "parameters": parameters,
            **sizes,
            "steps": 0,
            "tokens_per_step": 0,
            "seed": known["calibration"]["seed"],
        }
    files = (job_folder(folder, name) / "config.yaml" for name in [TRUNK, *done])
    first = next((file for file in files if file.exists()), None)
    config = yaml.safe_load(first.read_text(encoding="utf-8")) if first else {}
    model, data = config.get("model", {}).get("config", {}), config.get("data", {})
    layers, experts = model.get("n_layers", 0), model.get("n_experts", 0)
    return {
        "parameters": parameters,
        "layers": layers,
        "experts": experts,
        "experts_in_all": layers * experts,
        "top_k": model.get("top_k", 0),
        "steps": config.get("trainer", {}).get("max_steps", 0),
        "tokens_per_step": data.get("batch_size", 0) * data.get("seq_len", 0),
        "seed": config.get("seed_everything", 0),
    }


def _overlap(comparison: Comparison, folder: Path, done: dict[str, Any]) -> dict[str, Any] | None:
    """How much of what they remove strategies share, of those that there are at every budget; None for less than two."""
    budgets = list(dict.fromkeys(v.budget for v in comparison.variants.values() if v.budget))
    plans: dict[str, dict[str, PrunePlan]] = {}
    for name, variant in comparison.variants.items():
        if name in done and done[name]["plan"] and variant.strategy and variant.budget:
            found = PrunePlan.load(job_folder(folder, name) / done[name]["plan"])
            plans.setdefault(variant.strategy, {})[variant.budget] = found
    names = [name for name, found in plans.items() if len(found) == len(budgets)]
    if len(names) < 2:
        return None
    groups = done[comparison.reference].get("n_groups", 1) if comparison.reference in done else 1
    each = [[plans[name][budget] for name in names] for budget in budgets]
    shared, drawn = [jaccard(found) for found in each], [chance(found, groups) for found in each]
    order, families = clustered(np.array([_mean(values) for values in shared]))
    return {
        "names": [names[i] for i in order],
        "families": [[names[i] for i in family] for family in families if len(family) > 1],
        "budgets": [
            {
                "budget": budget,
                "ratio": 1 - sum(sum(p.n_kept) / sum(map(len, p.before)) for p in found) / len(found),
                "overlap": _plain(_mean(one)[np.ix_(order, order)]),
                "chance": _plain(_mean(other)[np.ix_(order, order)]),
            }
            for budget, found, one, other in zip(budgets, each, shared, drawn, strict=True)
        ],
    }


def _row(
    comparison: Comparison,
    folder: Path,
    name: str,
    result: dict[str, Any],
    reference: dict[str, Any] | None,
    drifts: dict[str, list[float]],
    families: dict[str, list[str]],
) -> dict[str, Any]:
    place = job_folder(folder, name)
    events = _prunes(place)
    prunes = [
        {
            "step": event["step"],
            "reason": event["reason"],
            "experts_kept": event["plan"]["num_experts_per_layer"],
            "removed_load": event["plan"]["removed_load"],
            "jump": _jump([event]),
        }
        for event in events
    ]
    config = comparison.variants[name].config
    scores = {}
    for task, score in result["scores"].items():
        theirs = reference["scores"][task]["documents"] if reference else []
        both = score["documents"] and theirs  # a metric of the corpus has no value per document
        scores[task] = {k: v for k, v in score.items() if k != "documents"} | {
            "vs_reference": difference(score["documents"], theirs, drifts=drifts.get(task, ())) if both else None
        }
    return {
        "pruner": _described(events[-1]["plan"]["provenance"].get("pruner")) if events else None,
        "balancers": [
            b if isinstance(b, str) else b["class_path"] for b in config.get("model", {}).get("balancers", [])
        ],
        "parameters": result["parameters"],
        "parameters_kept": result["parameters"] / result["unpruned_parameters"],
        "active_parameters": result["active_parameters"],
        "experts_kept": result["experts_kept"],
        "removed_load": prunes[0]["removed_load"] if len(prunes) == 1 else [],
        "plan": f"{name}/{result['plan']}" if result["plan"] else None,
        "config": next((f"{name}/{file}" for file in ("config.yaml", "variant.yaml") if (place / file).exists()), None),
        "val_loss": {
            "before": _loss(events[0]["val_loss"]["before"]) if events else None,
            "after": _loss(events[-1]["val_loss"]["after"]) if events else None,
            "end": _loss(result["val_loss"]),
        },
        "prunes": prunes,
        "jump": _jump(events) if events else None,
        "vs_reference": _paired(result["val_loss"], reference["val_loss"], drifts.get("val_loss", ()))
        if reference and comparison.train_on
        else None,
        "history": _history(place),
        "loads": _loads(place),
        "memory": {key: result[key] for key in ("weights_bytes", "optimizer_bytes", "peak_bytes")},
        "scores": scores,
        "families": {
            family: _family(tasks, result, reference, drifts.get(family, ())) for family, tasks in families.items()
        },
    }


def _prunes(place: Path) -> list[dict[str, Any]]:
    """What happened at each prune of a run, in order."""
    return [row for row in read_rows(place / "events.jsonl") if "plan" in row]


def _jump(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses just after minus just before; over several prunes the sum, without what training between them gained."""
    after, before = (_summed([event["val_loss"][when] for event in events]) for when in ("after", "before"))
    return _paired(after, before)


def _summed(losses: list[Losses]) -> Losses:
    return {
        domain: [sum(values) for values in zip(*(each[domain] for each in losses), strict=True)] for domain in losses[0]
    }


def _lowest(comparison: Comparison, folder: Path, done: list[str]) -> dict[str, str]:
    """Budget -> the variant whose loss jumps least."""
    jumps: dict[str, dict[str, float]] = {}
    for name in done:
        budget, events = comparison.variants[name].budget, _prunes(job_folder(folder, name))
        if budget and events:
            jumps.setdefault(budget, {})[name] = _jump(events)["value"]
    return {budget: min(found, key=lambda name: found[name]) for budget, found in jumps.items()}


def _drifts(
    comparison: Comparison,
    done: dict[str, Any],
    reference: dict[str, Any] | None,
    families: dict[str, list[str]],
) -> dict[str, list[float]]:
    """How far each drift control ends from the reference, by task, family and for `val_loss`."""
    drifts: dict[str, list[float]] = {}
    for name, variant in comparison.variants.items():
        if not variant.drift or name not in done or reference is None:
            continue
        found = {"val_loss": _paired(done[name]["val_loss"], reference["val_loss"])["value"]}
        for task, score in done[name]["scores"].items():
            found[task] = score["value"] - reference["scores"][task]["value"]
        for family, tasks in families.items():
            found[family] = sum(found[task] for task in tasks) / len(tasks)
        for key, value in found.items():
            drifts.setdefault(key, []).append(value)
    return drifts


def _paired(a: Losses, b: Losses, drifts: Sequence[float] = ()) -> dict[str, Any]:
    """Difference of two models' losses over the same sequences, domains weighted equally."""
    strata = [index for index, domain in enumerate(a) for _ in a[domain]]
    return difference([x for d in a for x in a[d]], [x for d in a for x in b[d]], strata, drifts)


def _family(
    tasks: list[str], result: dict[str, Any], reference: dict[str, Any] | None, drifts: Sequence[float]
) -> dict[str, Any]:
    scores = [result["scores"][task] for task in tasks]
    groups = [score["documents"] for score in scores]
    stderr = mean_and_stderr(groups)[1] if all(groups) else None
    against = None
    others = [reference["scores"][task]["documents"] for task in tasks] if reference else []
    if others and all(groups) and all(others):
        strata = [index for index, group in enumerate(groups) for _ in group]
        against = difference(
            [x for group in groups for x in group], [x for group in others for x in group], strata, drifts
        )
    return {
        "metric": " and ".join(dict.fromkeys(score["metric"] for score in scores)),
        "higher_is_better": scores[0]["higher_is_better"],
        "value": sum(score["value"] for score in scores) / len(scores),
        "stderr": stderr,
        "n": sum(score["n"] for score in scores),
        "vs_reference": against,
    }


def _loss(losses: Losses) -> dict[str, Any]:
    domains = {domain: sum(values) / len(values) for domain, values in losses.items()}
    return {"mean": sum(domains.values()) / len(domains), "domains": domains}


def _history(place: Path) -> dict[str, Any]:
    rows = read_rows(place / "history.jsonl")
    return {key: [row[key] for row in rows] for key in ("step", "loss", "seconds")}


def _loads(place: Path) -> dict[str, Any]:
    rows = read_rows(place / "loads.jsonl")
    return {
        "step": [row["step"] for row in rows],
        "expert_ids": [row["expert_ids"] for row in rows],
        "shares": [[[n / max(1, sum(layer)) for n in layer] for layer in row["loads"]] for row in rows],
    }


def _trunk(comparison: Comparison, folder: Path) -> dict[str, Any] | None:
    place = job_folder(folder, TRUNK)
    event = next((row for row in read_rows(place / "events.jsonl") if row.get("stop")), None)
    if not comparison.needs_trunk or event is None:
        return None
    rows = read_rows(place / "history.jsonl")
    return {
        "step": event["step"],
        "tokens": sum(row["tokens"] for row in rows),
        "reason": event["reason"],
        "history": _history(place),
        "loads": _loads(place),
    }


def _described(strategy: Any) -> str:
    """A strategy's `describe()` as one would write it in Python."""
    if not isinstance(strategy, dict) or "class" not in strategy:
        return str(strategy)
    options = ", ".join(f"{key}={_described(value)}" for key, value in strategy.items() if key != "class")
    return f"{strategy['class'].rpartition('.')[2]}({options})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
