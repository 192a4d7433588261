"""What does watching the experts' loads cost a training run?

    OMP_NUM_THREADS=1 python benchmarks/watching.py [--steps 200] [--quick] [--json PATH]        (40 s; 15 s)

Floor: one increment per assignment (token x expert), 8192 in a step here. A run of the quick start's model as `moeprune fit` runs
it, with `ExpertPruning` and no pruner; counted is the time in `Routing.counts` and in the callback's hook after each batch, which
adds the counts up, closes a window of 20 steps, computes its metrics and writes its row. Per step: time of all / time of all but
that, CPU seconds of one thread; median and quartiles over blocks of 20 steps, each with one window; target 1.005.
"""

from __future__ import annotations

from bench import Spent, arguments, report, row, training

from moeprune.model.router import Routing
from moeprune.training.expert_pruning import ExpertPruning

TARGET, WINDOW = 1.005, 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, help="200, or 60 with --quick")
    options = parser.parse_args()
    steps = options.steps or (60 if options.quick else 200)
    watch = Spent().on(Routing, "counts").on(ExpertPruning, "on_train_batch_end")
    all_of_it, watching = [], []

    def each(step: int, seconds: float) -> None:
        all_of_it.append(seconds)
        watching.append(watch.take())

    training(steps, each, ExpertPruning(window=WINDOW))
    blocks = [slice(i, i + WINDOW) for i in range(0, steps - WINDOW + 1, WINDOW)]
    sums = [(sum(all_of_it[block]), sum(watching[block])) for block in blocks]
    over = [total / (total - part) for total, part in sums]
    case = f"quick start's model, {1e3 * sum(all_of_it) / steps:.0f} ms per step"
    report([row("watching loads: training step on / off", case, over, TARGET)], options)


if __name__ == "__main__":
    main()
