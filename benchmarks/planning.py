"""How long does planning take for a large model, and how long does the command line take to start?

    python benchmarks/planning.py [--rounds 7] [--quick] [--json PATH]        (60 s; 20 s)

Evidence of 94 layers x 128 experts, random, with every statistic that a criterion or an allocation reads, is saved as `moeprune
calibrate` saves it. Every registered criterion with every registered allocation that evidence on disk can serve (all but
`evolutionary`, which runs the model), and every other pruner that it can serve, then loads what it needs and plans to cut half;
CPU seconds, median over the rounds of each pair; the row is the slowest pair, the quartiles are over all pairs; target 0.2 s. Floor:
reading the counts and sorting 94 rows of 128 numbers, 4 ms. Start-up: CPU seconds of whole processes (`--help`, `plugins`, `plan` of
that evidence), the file cache warm; target 1 s; a process that imports torch to plan stops the script. Floor: Python's own start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench import arguments, quartiles, report, row

from moeprune import registry
from moeprune.errors import UserError
from moeprune.pruning import store
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence

EXPERTS = 128
PLAN, START = 0.2, 1.0
STATISTICS = [
    *(f"g{a}f{b}" for a in range(3) for b in range(3)),
    *("max_f", "norm_mean_f", "var_f", "leave_one_out", "easy_ep", "router_w2", "taylor", "fisher"),
]
CLI = "import sys; from moeprune.cli import main; code = main(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else code)"


def evidence(n_layers: int) -> Evidence:
    """Random, of the shapes that calibration gives; mean_f of width 64."""
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(n_layers):
        stats: dict[str, Any] = {name: rng.lognormal(size=EXPERTS) for name in STATISTICS}
        stats |= {name: rng.lognormal(size=(EXPERTS, 3)) for name in ("w1", "w2", "w_n")}
        gram = rng.normal(size=(EXPERTS, 300))
        stats |= {
            "logit_gram": gram @ gram.T,
            "mean_f": rng.normal(size=(EXPERTS, 64)),
            "ablation": np.array(rng.random()),
        }
        counts = rng.integers(1, 10**6, EXPERTS)
        layers.append(
            LayerEvidence(tuple(range(EXPERTS)), EXPERTS, {**stats, "counts": counts, "g0f0": counts.astype(float)})
        )
    return Evidence(tuple(layers), 8, {"step": 0})


def pruners(n_layers: int) -> dict[str, Any]:
    """Every criterion with every allocation, and the other pruners."""
    laep = registry.create("pruner", "laep", beta=0.5)
    options = {"match": {"pruner": laep}, "explicit": {"n_kept": [EXPERTS // 2] * n_layers}}
    found: dict[str, Any] = {"laep": laep}
    for criterion in registry.entries("criterion"):
        for allocation in registry.entries("allocation"):
            if allocation.name != "evolutionary":
                made = registry.create("allocation", allocation.name, **options.get(allocation.name, {}))
                pruner = registry.create("pruner", criterion.name, ratio=0.5, allocation=made)
                found[f"{criterion.name}, {allocation.name}"] = pruner
    for entry in registry.entries("pruner"):
        if not entry.criterion and entry.name not in ("laep", "score", "protect"):
            found[entry.name] = registry.create("pruner", entry.name, ratio=0.5)
    return found


def children() -> float:
    """CPU seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="7, or 3 with --quick")
    parser.add_argument("--layers", type=int, default=94)
    options = parser.parse_args()
    shape = f"{options.layers} x {EXPERTS}"
    rounds = options.rounds or (3 if options.quick else 7)
    rows, medians, merging = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "evidence"
        store.save(evidence(options.layers), folder)
        for name, pruner in pruners(options.layers).items():
            times = []
            for _ in range(rounds):
                began = time.process_time()
                try:
                    pruner.plan(store.load(folder, pruner.needs), Constraints())
                except UserError as error:
                    sys.exit(f"{name}: {error}")
                times.append(time.process_time() - began)
            (merging if name in ("m_smoe", "hc_smoe") else medians)[name] = quartiles(times)[1]
        slowest = max(medians, key=medians.__getitem__)
        found = row(
            f"planning {shape} from saved evidence", f"slowest of {len(medians)}: {slowest}", [0], PLAN, "seconds"
        )
        q1, _, q3 = quartiles(list(medians.values()))
        rows.append({**found, "seconds": medians[slowest], "q1": q1, "q3": q3, "met": medians[slowest] <= PLAN})
        rows += [
            row(f"planning {shape}, merging", name, [seconds], None, "seconds") for name, seconds in merging.items()
        ]
        counts = Path(scratch) / "counts.json"
        counts.write_text(json.dumps(np.random.default_rng(0).integers(1, 10**6, (options.layers, EXPERTS)).tolist()))
        starts = {
            "python alone": ["-c", "pass"],
            "--help": ["-c", CLI, "--help"],
            "plugins": ["-c", CLI, "plugins"],
            "plan --help": ["-c", CLI, "plan", "--help"],
            f"plan --counts ({shape})": ["-c", CLI, "plan", "--pruner=laep", f"--counts={counts}", "--top_k=8"],
            f"plan --evidence ({shape})": ["-c", CLI, "plan", "--pruner=reap", f"--evidence={folder}"],
        }
        for name, call in starts.items():
            times = []
            for turn in range(rounds + 1):
                began = children()
                done = subprocess.run([sys.executable, *call], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {'torch was imported' if done.returncode == 3 else done.stderr.strip()}")
                if turn:
                    times.append(children() - began)
            target = None if name == "python alone" else START
            rows.append(row("start-up, whole process", name, times, target, "seconds"))
    if "torch" in sys.modules:
        sys.exit("planning imported torch")
    report(rows, options)


if __name__ == "__main__":
    main()
