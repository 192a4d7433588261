"""Runs a suite through lm-eval's evaluator, and sums it up: one row per task, one average per family."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from moeprune.compare.results import mean_and_stderr
from moeprune.errors import UserError
from moeprune.evaluation.suite import Suite, Task
from moeprune.files import read_json, write_text

BOOTSTRAPS = 200  # for metrics without an analytic standard error
LONGEST_ANSWER = 256  # tokens; lm-eval's own, where neither suite nor task says one
FEWSHOT_SEED = 1234  # lm-eval's own
FORMAT = "moeprune.scores/1"
HEADLINE = ("metric", "higher_is_better", "value", "stderr", "n", "documents")
# metrics of a corpus that are a function of a ratio of sums: the divisor, or None for the exponential
RATES = {"bits_per_byte": math.log(2), "byte_perplexity": None, "word_perplexity": None, "perplexity": None}


def score(
    checkpoint: Any,
    suite: Suite,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    name: str = "moeprune",
    *,
    dtype: str = "auto",
    max_length: int | None = None,
    max_gen_toks: int | None = None,
    apply_chat_template: bool = False,
    think_end_token: str | None = None,
    run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """lm-eval's results of a model on a suite, samples included, and under `scores` what `headline` returns.

    Data is loaded before the model, so that what is missing is said at once.

    Args:
        checkpoint: path of a model, or one in memory; see `MoEPruneLM`.
        suite: tasks.
        limit: documents per task; None for all. lm-eval takes the first ones.
        batch_size: requests per forward pass.
        device: torch device.
        name: of the model, in the results.
        dtype: of a transformers model's weights; `auto` takes the checkpoint's.
        max_length: longest sequence in tokens, where the model takes more than memory does; longer prompts are cut on the left.
        max_gen_toks: longest answer in tokens, for every task that generates; None takes what the suite or the task says, at most
            half of what the model takes.
        apply_chat_template: put prompts into the tokenizer's chat template; examples become turns of their own.
        think_end_token: text that ends a reasoning model's thoughts.
        run_unsafe_code: allow tasks that run code which the model wrote.

    Raises:
        UserError: limit < 1, a task without data, a model that cannot be read, too little memory.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    for option, value in (("max_gen_toks", max_gen_toks), ("max_length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    import torch

    from moeprune.evaluation.lm import MoEPruneLM

    members, tasks = load(suite, checkpoint, run_unsafe_code)
    lm = MoEPruneLM(
        checkpoint,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype=dtype,
        think_end_token=think_end_token,
    )
    if apply_chat_template and not lm.chat_template(True):
        raise UserError(f"the tokenizer of {name} has no chat template; leave out --apply_chat_template")
    answers = {}
    for task in suite.tasks():
        room = max_gen_toks or (task.max_gen_toks and min(task.max_gen_toks, lm.max_length // 2))
        for leaf in members[task.name]:
            prepare(tasks[leaf], task.num_fewshot, room)
            answers[leaf] = room
    try:
        results = lm_eval.evaluate(
            lm,
            {"tasks": tasks},
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=run_unsafe_code,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with {batch_size} requests at a time; give a smaller --batch_size") from error
    if results is None:
        raise UserError("lm-eval gives results on the first process only; evaluate outside of a distributed launch")
    results["config"] = {
        "model": "moeprune",
        "model_args": {"pretrained": name},
        "batch_size": batch_size,
        "device": str(lm._device),
        "limit": limit,
        "bootstrap_iters": BOOTSTRAPS,
        "fewshot_seed": FEWSHOT_SEED,
        "max_length": lm.max_length,
        "max_gen_toks": {leaf: room for leaf, room in answers.items() if room},
        "apply_chat_template": apply_chat_template,
        "think_end_token": think_end_token,
        **lm.get_model_info(),
    }
    results["date"] = time.time()
    for package in ("lm_eval", "torch", "transformers", "moeprune"):
        try:
            results[f"{package}_version"] = version(package)
        except PackageNotFoundError:  # transformers is an extra
            continue
    rows = {task.name: _row(results, task, members[task.name], answers) for task in suite.tasks()}
    families = suite.families()
    results["scores"] = {
        "format": FORMAT,
        "model": name,
        "weights_sha256": results["config"]["weights_sha256"],
        "limit": limit,
        "max_length": lm.max_length,
        "rows": rows,
        "families": {family: {"tasks": list(names), **averaged(rows, names)} for family, names in families.items()},
    }
    return dict(results)


def load(suite: Suite, checkpoint: Any, run_unsafe_code: bool = False) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Names of the leaf tasks per task of the suite, and the leaf tasks themselves, each once.

    Raises:
        UserError: unknown names, data that is not at hand, code that may not be run.
    """
    from moeprune.evaluation.catalogue import Catalogue
    from moeprune.evaluation.engine import tokenizer_folder

    folders = suite.folders()
    plain = Catalogue([task.name for task in suite.tasks()], folders)
    unsafe = [task.name for task in suite.tasks() if plain.runs_code(task.name)]
    if unsafe and not run_unsafe_code:
        others = [task.name for task in suite.tasks() if task.name not in unsafe]
        rest = f", or leave them out: --tasks={','.join(others)}" if others else ""
        raise UserError(
            f"{' and '.join(unsafe)} run code that the model writes; pass --run_unsafe_code=true where that is safe{rest}"
        )
    if unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    members: dict[str, list[str]] = {}
    tasks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in suite.tasks():
            catalogue = plain
            if task.metadata:
                tokenizer = {"tokenizer": tokenizer_folder(checkpoint, Path(scratch))}
                catalogue = Catalogue([task.name], folders, {**tokenizer, **task.metadata})
            loaded = catalogue.load(task.name, task.data)
            members[task.name] = list(loaded)
            for leaf, made in loaded.items():
                tasks.setdefault(leaf, made)
    return members, tasks


def prepare(task: Any, num_fewshot: int | None, max_gen_toks: int | None) -> None:
    """Set the number of examples, their seed and the length of answers, whichever way the task states its requests."""
    if num_fewshot is not None or task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if max_gen_toks is None:
        return
    construct = task.construct_requests

    def limited(*args: Any, **kwargs: Any) -> Any:
        made = construct(*args, **kwargs)
        for instance in made if isinstance(made, list) else [made]:
            if instance.request_type == "generate_until":
                context, options, *rest = instance.arguments
                kept = {
                    k: v
                    for k, v in options.items()
                    if k not in ("max_new_tokens", "max_tokens", "max_completion_tokens")
                }
                instance.arguments = (context, {**kept, "max_gen_toks": max_gen_toks}, *rest)
        return made

    task.construct_requests = limited


def headline(results: dict[str, Any], suite: Suite) -> dict[str, dict[str, Any]]:
    """Per task of the suite: metric, value, standard error, number of documents, and each document's value in their order.

    `documents` is empty where a metric is of the corpus and no sum over documents (`per_document`).
    """
    rows = results["scores"]["rows"]
    return {task.name: {key: rows[task.name][key] for key in HEADLINE} for task in suite.tasks()}


def averaged(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Mean over tasks, all equally weighted, and its standard error (None where a task has none).

    Raises:
        UserError: tasks of which one is better when higher and another when lower.
    """
    chosen = [rows[name] for name in names]
    if len({row["higher_is_better"] for row in chosen}) > 1:
        raise UserError(f"{', '.join(names)} cannot be averaged: for some of them higher is better, for others lower")
    documents = [row["documents"] for row in chosen]
    stderr = mean_and_stderr(documents)[1] if all(documents) else None
    return {
        "metric": " and ".join(dict.fromkeys(row["metric"] for row in chosen)),
        "higher_is_better": chosen[0]["higher_is_better"],
        "value": float(np.mean([row["value"] for row in chosen])),
        "stderr": stderr,
        "n": sum(row["n"] for row in chosen),
    }


def _row(
    results: Mapping[str, Any], task: Task, leaves: Sequence[str], answers: Mapping[str, int | None]
) -> dict[str, Any]:
    first = results["results"][leaves[0]]
    key = f"{task.metric},none" if task.metric and "," not in task.metric else task.metric
    known = [name for name in first if "," in name and "_stderr," not in name]
    if not key:
        key = known[0]
    if key not in first:
        shown = ", ".join(name.removesuffix(",none") for name in known)
        raise UserError(f"the task {task.name!r} has no metric {task.metric!r}; it has: {shown}")
    metric, _, filtered = key.rpartition(",")
    documents: list[float] = []
    values, counts, identities = [], [], []
    for leaf in leaves:
        samples = [sample for sample in results["samples"][leaf] if sample["filter"] == filtered]
        samples.sort(key=lambda sample: sample["doc_id"])
        value = float(results["results"][leaf][key])
        found = per_document(metric, [sample[metric] for sample in samples if metric in sample], value)
        values.append(value)
        counts.append(len(samples))
        documents += found
        identities += [(leaf, sample["doc_hash"], sample["prompt_hash"]) for sample in samples]
    if len(documents) != sum(counts):
        documents = []
    own = first.get(f"{metric}_stderr,{filtered}")
    if len(leaves) > 1 or not isinstance(own, int | float):
        own = float(np.std(documents, ddof=1) / np.sqrt(len(documents))) if len(documents) > 1 else None
    better = results["higher_is_better"][leaves[0]].get(metric)
    return {
        "metric": metric if filtered == "none" else key,
        "higher_is_better": metric not in RATES if better is None else bool(better),
        "value": float(np.average(values, weights=counts)),
        "stderr": own,
        "n": sum(counts),
        "num_fewshot": results["n-shot"][leaves[0]],
        "max_gen_toks": answers[leaves[0]],
        "documents_sha256": _digest([(leaf, document) for leaf, document, _ in identities]),
        "prompts_sha256": _digest(identities),
        "documents": documents,
    }


def per_document(metric: str, values: Sequence[Any], total: float) -> list[float]:
    """One number per document whose mean is the corpus's `total` and whose variance gives its standard error.

    Where lm-eval averages, these are the documents' own values. Rates (bits per byte, perplexities) are functions g of a ratio
    r = sum x / sum w over the documents, log-likelihoods over bytes, words or documents; their numbers are the first-order
    terms of g: g(r) + g'(r) (x - r w) / mean(w), so that paired differences have the variance of a difference of ratios.
    Any other metric of a corpus has none.

    Args:
        metric: lm-eval's name.
        values: what lm-eval has per document: a number, or (log-likelihood, weight).
        total: lm-eval's number for the corpus.
    """
    if not values:
        return []
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return []
    if metric in RATES and (found.ndim == 1 or found.shape[1] == 2):
        x, w = (found, np.ones(len(found))) if found.ndim == 1 else (found[:, 0], found[:, 1])
        r = -x.sum() / w.sum()
        scale = RATES[metric]
        rate, slope = (np.exp(r), np.exp(r)) if scale is None else (r / scale, 1 / scale)
        found = rate + slope * (-x - r * w) / w.mean()
    if found.ndim != 1 or not math.isclose(found.mean(), total, rel_tol=1e-6, abs_tol=1e-9):
        return []
    return [float(value) for value in found]


def save(results: dict[str, Any], folder: Path) -> None:
    """Write `results.json` in lm-eval's format, `samples_<task>.jsonl` and `scores.json`, which comparisons read.

    Raises:
        UserError: the folder cannot be written.
    """
    aggregated = {key: value for key, value in results.items() if key not in ("samples", "scores")}
    for task, samples in results.get("samples", {}).items():
        lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
        write_text(folder / f"samples_{task}.jsonl", "".join(line + "\n" for line in lines))
    write_text(folder / "scores.json", json.dumps(results["scores"]) + "\n")
    write_text(folder / "results.json", json.dumps(aggregated, indent=1, default=str, ensure_ascii=False) + "\n")


def read_scores(folder: Path) -> dict[str, Any]:
    """What `save` wrote of a model's scores.

    Raises:
        UserError: no such folder, or not of this format.
    """
    found = read_json(folder / "scores.json", "scores (of moeprune evaluate --output)")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{folder / 'scores.json'} is not of format {FORMAT!r}; evaluate the model anew")
    return found


def _digest(parts: Sequence[tuple[str, ...]]) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()
