"""When do rules for "the loads are stable" fire, and how well does the ranking then agree with the end of the run?

    python benchmarks/stability.py [--seeds 4]

Trains the quick start's model without pruning, one run per seed, and replays its load windows. Agreement is the rank
correlation (Spearman), lowest layer, of the two windows before the rule fires with the last two windows of the run.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from moeprune.cli import main
from moeprune.files import read_rows
from moeprune_plugins.triggers.stable import spearman

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
STEPS, WARM_UP = 500, 60


def correlations(windows: list[np.ndarray]) -> np.ndarray:
    """[windows - 1, L] rank correlation between neighbours."""
    return np.array([[spearman(a[layer], b[layer]) for layer in range(len(a))] for a, b in pairwise(windows)])


def total_variation(windows: list[np.ndarray]) -> np.ndarray:
    """[windows - 1, L] half the summed change of load shares between neighbours."""
    shares = [w / w.sum(1, keepdims=True) for w in windows]
    return np.array([np.abs(a - b).sum(1) / 2 for a, b in pairwise(shares)])


def first(hold: np.ndarray, run: int) -> int | None:
    """Index of the window at which `hold` was true for `run` neighbours in a row."""
    for end in range(run, len(hold) + 1):
        if hold[end - run : end].all():
            return end
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    lines = ["| seed | rule | fires at step | agreement with the end |", "|---|---|---|---|"]
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            fixed = [
                f"--trainer.default_root_dir={folder}",
                "--trainer.enable_progress_bar=false",
                f"--trainer.max_steps={STEPS}",
            ]
            assert main(["fit", f"--config={RECIPE}", *fixed, f"--data.seed={seed}", f"--model.init_seed={seed}"]) == 0
            rows = read_rows(Path(folder) / "loads.jsonl")
        windows = [np.array(row["loads"]) for row in rows]
        after = [i for i, row in enumerate(rows[:-1]) if row["first"] >= WARM_UP]
        rho, tv = correlations(windows), total_variation(windows)
        rules = {
            "TV < 0.1, all layers, no guard": (first((tv < 0.1).all(1), 1), 0),
            "mean over layers of Spearman >= 0.9, 3 in a row, after warm-up": (
                first((rho[after].mean(1) >= 0.9), 3),
                after[0],
            ),
            "min over layers of Spearman >= 0.9, 3 in a row, after warm-up": (
                first((rho[after].min(1) >= 0.9), 3),
                after[0],
            ),
        }
        end = windows[-2] + windows[-1]
        for name, (fired, offset) in rules.items():
            if fired is None:
                lines.append(f"| {seed} | {name} | never | - |")
                continue
            index = fired + offset
            then = windows[index - 1] + windows[index]
            lowest = min(spearman(then[layer], end[layer]) for layer in range(len(end)))
            lines.append(f"| {seed} | {name} | {rows[index]['step']} | {lowest:.2f} |")
    print("\n".join(lines))
