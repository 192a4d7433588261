"""How well and how fast do placements even out loads, at the size of large models?

    OMP_NUM_THREADS=1 python benchmarks/simulate.py [--rounds 3] [--seed 0]

No peer: load factors stand next to the computable lower bound (no placement of equal counts has a smaller one) and to the mean of
200 random orders. Load factor: sum over layers of the largest device load over that of the mean one. Time: process CPU
time to place all layers, the smallest of `rounds` (wall time means little on a shared machine).

Loads: lognormal with sigma 0.5 and 1, Zipf with exponent 1, and `yuan3_ultra`, whose layers are the lognormals that LAEP with
beta 0.1 cuts to the published numbers (sigma 0.6 to 2.4). A single too-busy expert sets the bound in some layers; "at the
bound" counts the layers that lie within 1.02 of theirs.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from moeprune import create
from moeprune.parallel import simulate, traffic

SHAPES = {"103 x 64": ((103, 64), (8, 16, 32, 64)), "61 x 256": ((61, 256), (8, 16, 32, 64))}
LAWS = ("lognormal,sigma=0.5", "lognormal,sigma=1", "zipf,exponent=1")
NAMES = ("contiguous", "lpt", "lpt_swap")
DRAWS = 200


def sources(layers: int, experts: int, seed: int) -> dict[str, traffic.Source]:
    """Loads by name, 4 million tokens per step, so that rounding to whole tokens is no matter."""
    size = f"layers={layers},experts={experts},tokens=4000000,seed={seed}"
    found = {law: traffic.named(f"synthetic:{law},{size}") for law in LAWS}
    if (layers, experts) == (103, 64):
        found["yuan3_ultra"] = traffic.named(f"yuan3_ultra:,seed={seed}")
    return {name: source for name, source in found.items() if source is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    head = [
        "layers x experts",
        "loads",
        "devices",
        "bound",
        "random",
        *NAMES,
        "lpt_swap / bound: mean, worst",
        "at the bound",
    ]
    head += [f"{name} s" for name in NAMES[1:]]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    for shape, ((layers, experts), grids) in SHAPES.items():
        for law, source in sources(layers, experts, args.seed).items():
            for n in grids:
                print(
                    "| " + " | ".join([shape, law, str(n), *row(source, n, args.rounds, args.seed)]) + " |", flush=True
                )


def row(source: traffic.Source, n: int, rounds: int, seed: int) -> list[str]:
    """Cells of one line: factors of all layers together, the gap of lpt_swap per layer, times."""
    counts = [np.array(layer, dtype=np.int64) for layer in source.counts]
    mean = np.array([load.sum() / n for load in counts])
    bound = np.array([simulate.least(load.astype(np.float64), n) for load in counts]) * mean
    rng = np.random.default_rng(seed)
    drawn = [simulate.per_device(load, simulate.in_order(rng.random((DRAWS, len(load))), n), n)[0] for load in counts]
    factors = {"random": np.mean([load.max(1).mean() for load in drawn]) / mean.mean()}
    seconds = {}
    for name in NAMES:
        placement = create("placement", name)
        times = []
        for _ in range(rounds):
            began = time.process_time()
            placed = [placement.place(load, n) for load in counts]
            times.append(time.process_time() - began)
        heaviest = np.array(
            [max(load[own].sum() for own in devices) for load, devices in zip(counts, placed, strict=True)]
        )
        factors[name], seconds[name] = heaviest.sum() / mean.sum(), min(times)
    gap = heaviest / bound  # of lpt_swap, the last
    return [
        f"{bound.sum() / mean.sum():.3f}",
        *(f"{factors[name]:.3f}" for name in ("random", *NAMES)),
        f"{gap.mean():.3f}, {gap.max():.3f}",
        f"{(gap <= 1.02).sum()} of {len(gap)}",
        *(f"{seconds[name]:.3f}" for name in NAMES[1:]),
    ]


if __name__ == "__main__":
    main()
