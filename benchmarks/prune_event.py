"""How long does training stand still for a prune?

    OMP_NUM_THREADS=1 python benchmarks/prune_event.py [--rounds 7] [--quick] [--json PATH]        (70 s; 30 s)

Floor: reading and writing the survivors' weights and their two moments once. Runs of the quick start's model, pruned at step 12 of
14 by a quarter or more; timed is the prune as the callback carries it out: evidence, plan, check, surgery on model and optimizer,
rows of the log. In units of the median training step before it, CPU seconds of one thread; target 1 for pruners that read loads
only. Pruners that measure the model first take `calibration_batches` (8) forward passes, with gradients 8 passes forward and
backward: their floor is 8/3 and 8 steps, so they have no target here. The validation loss before and after, which is measurement
and not pruning, is a row of its own.
"""

from __future__ import annotations

import statistics

from bench import Spent, arguments, report, row, training

from moeprune import create
from moeprune.training import expert_pruning
from moeprune.training.expert_pruning import ExpertPruning

TARGET, AT = 1.0, 12
PRUNERS = {"laep": {"beta": 0.1}, "frequency": {"ratio": 0.25}, "reap": {"ratio": 0.25}, "taylor": {"ratio": 0.25}}
ON_LOADS = ("laep", "frequency")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="7, or 3 with --quick")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    validation = Spent().on(expert_pruning, "domain_losses")
    prune = Spent().on(ExpertPruning, "_prune")
    rows, checks = [], []
    for name in ON_LOADS if options.quick else PRUNERS:
        stops = []
        for _ in range(rounds):
            steps: list[float] = []

            def each(step: int, seconds: float, steps: list[float] = steps) -> None:
                if 2 < step < AT:
                    steps.append(seconds)

            training(
                AT + 2,
                each,
                ExpertPruning(create("pruner", name, **PRUNERS[name]), create("trigger", "at_step", step=AT)),
            )
            measured, step = validation.take(), statistics.median(steps)
            stops.append((prune.take() - measured) / step)
            checks.append(measured / step)
        rows.append(row("prune event / training step", name, stops, TARGET if name in ON_LOADS else None))
    rows.append(row("validation at a prune / training step", "before and after, 160 sequences in all", checks))
    report(rows, options)


if __name__ == "__main__":
    main()
