"""Does the initialisation decide whether routers collapse? Embedding scale and output bias, each with and without the other.

    python benchmarks/initialisation.py [--steps 280] [--seeds 2]

Prints, per setting, MaxVio (max / mean - 1; 15 is the most that 32 experts with top-2 can reach), Gini and the share of
experts that LAEP (beta 0.1) would cut, per layer, at the end of the run. No peer: this is about our own model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from moeprune import Evidence, create
from moeprune.cli import main
from moeprune.files import read_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
SETTINGS = {
    "embedding 0.5, unigram bias (default)": [],
    "embedding 0.5, zero bias": ["--model.unigram_bias=false"],
    "embedding 0.02, unigram bias": ["--model.config.embedding_std=0.02"],
    "embedding 0.02, zero bias": ["--model.config.embedding_std=0.02", "--model.unigram_bias=false"],
}


def run(options: list[str], seed: int, steps: int) -> tuple[list[dict[str, float]], list[float]]:
    """Load metrics and the share LAEP would cut, per layer, in the last window."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false", f"--data.seed={seed}"]
        stop = ["--pruning.trigger=at_step", f"--pruning.trigger.step={steps}", "--pruning.stop=true"]
        code = main(["fit", f"--config={RECIPE}", *fixed, *stop, f"--model.init_seed={seed}", *options])
        assert code == 0
        row = read_rows(Path(folder) / "loads.jsonl")[-1]
        plan = create("pruner", "laep", beta=0.1).plan(Evidence.from_counts(row["loads"], 2))
        return row["metrics"], [len(gone) / 32 for gone in plan.removed]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    lines = ["| setting | seed | MaxVio per layer | Gini per layer | LAEP would cut |", "|---|---|---|---|---|"]
    for name, options in SETTINGS.items():
        for seed in range(args.seeds):
            metrics, cut = run(options, seed, args.steps)
            cells = [" ".join(f"{m[key]:.{digits}f}" for m in metrics) for key, digits in (("max_vio", 1), ("gini", 2))]
            lines.append(f"| {name} | {seed} | {cells[0]} | {cells[1]} | {np.mean(cut):.0%} |")
    print("\n".join(lines))
