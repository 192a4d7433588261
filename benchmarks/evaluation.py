"""How much faster are a suite's requests scored here than by lm-eval's own `hf`, on the same model?

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--rounds 3] [--limit N] [--quick] [--json PATH]     (4 min; 60 s)

The requests of the offline suite (`--limit` documents per task: all; 12 with --quick) are built once. A model of the quick start's
size with the quick start's tokenizer, random weights, is scored as moeprune's own, and, exported by `moeprune export`, as a stock
Qwen3-MoE through lm-eval's `hf` with the same batch size. Floor: one forward pass over every distinct token in its context, and the
output head where an answer is asked for. CPU seconds of one thread, tokenizing
included, calls in random turns; the ratio is hf's time over ours, target at least 1.2. Every answer is compared: log-likelihoods that
differ by more than 1e-4 of their size stop the script.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; hf shows a bar for every text otherwise

import torch
from bench import arguments, interleave, ratios, report, row

from moeprune.checkpoints import Checkpoint
from moeprune.evaluation.lm import MoEPruneLM
from moeprune.evaluation.score import load, prepare
from moeprune.interop import native
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.registry import create
from moeprune.training.data import Corpus, TokenStore

TARGET = 1.2
NAMES = {"loglikelihood": "choices", "loglikelihood_rolling": "whole texts"}


def hf_class() -> Any:
    """lm-eval's `hf`. It imports accelerate, which it uses to spread a model over devices only."""
    importlib.import_module("transformers.generation.utils")
    if importlib.util.find_spec("accelerate") is None:
        stub = types.ModuleType("accelerate")
        for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size", "get_max_memory"):
            setattr(stub, name, None)
        sys.modules |= {"accelerate": stub, "accelerate.utils": stub}
    try:
        return importlib.import_module("lm_eval.models.huggingface").HFLM
    finally:
        if not hasattr(sys.modules["accelerate"], "__version__"):
            del sys.modules["accelerate"], sys.modules["accelerate.utils"]


def checkpoint() -> Checkpoint:
    """The quick start's sizes, in the form of Qwen3-MoE."""
    config = MoEConfig(qk_norm="head", head_bias=False)
    torch.manual_seed(0)
    model = MoETransformer(config)
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    store = TokenStore(Corpus("embedded"), config.vocab_size)
    ids = [list(range(config.n_experts))] * config.n_layers
    return Checkpoint(config, ids, model.state_dict(), [], store.tokenizer_json)


def requests(limit: int | None) -> dict[str, list[Any]]:
    """The suite's requests by kind."""
    suite = create("suite", "offline")
    _, tasks = load(suite, None)
    found: dict[str, list[Any]] = {kind: [] for kind in NAMES}
    for task in tasks.values():
        prepare(task, None, None)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        for instance in task.instances:
            found[instance.request_type].append(instance)
    return found


def score(name: str, lm: Any, kind: str, instances: list[Any], answers: dict[str, Any]) -> None:
    """Keep a model's answers under its name."""
    answers[name] = getattr(lm, kind)(instances, disable_tqdm=True)


def compare(mine: Any, theirs: Any) -> None:
    """Stop where answers differ."""
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        a, b = (float(value[0] if isinstance(value, tuple) else value) for value in (one, other))
        if abs(a - b) > 1e-4 * max(1.0, abs(b)):
            sys.exit(f"answer {index} is {a}, lm-eval's hf says {b}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    limit = options.limit or (12 if options.quick else None)
    own = checkpoint()
    asked = requests(limit)
    hf = hf_class()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        native.export(own, Path(scratch) / "model", False, Path("memory"))
        stock = AutoModelForCausalLM.from_pretrained(Path(scratch) / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(Path(scratch) / "model")
    ours = MoEPruneLM(own, batch_size=options.batch_size)
    theirs = hf(pretrained=stock, tokenizer=tokenizer, batch_size=options.batch_size)
    rows = []
    both: dict[str, list[float]] = {"ours": [0.0] * options.rounds, "hf": [0.0] * options.rounds}
    for kind, instances in asked.items():
        answers: dict[str, Any] = {}
        calls = {
            name: functools.partial(score, name, lm, kind, instances, answers)
            for name, lm in (("ours", ours), ("hf", theirs))
        }
        seconds = interleave(calls, options.rounds)
        compare(answers["ours"], answers["hf"])
        for name in both:
            both[name] = [a + b for a, b in zip(both[name], seconds[name], strict=True)]
        case = f"{NAMES[kind]}, {len(instances)} requests"
        rows.append(row("lm-eval's hf / moeprune", case, ratios(seconds["hf"], seconds["ours"]), None, at_least=True))
    name = "the offline suite" if limit is None else f"the offline suite, {limit} documents per task"
    rows.append(row("lm-eval's hf / moeprune", name, ratios(both["hf"], both["ours"]), TARGET, at_least=True))
    report(rows, options)


if __name__ == "__main__":
    main()
