"""How well and how fast do placements even out loads, at the size of large models? And what is a training step made of here?

    OMP_NUM_THREADS=1 python benchmarks/simulate.py [--rounds 3] [--seed 0]
    OMP_NUM_THREADS=1 python benchmarks/simulate.py --costs [--rounds 30]

No peer: load factors stand next to the computable lower bound (no placement of equal counts has a smaller one) and to the mean of
200 random orders. Load factor: sum over layers of the largest device load over that of the mean one. Time: process CPU
time to place all layers, the smallest of `rounds` (wall time means little on a shared machine).

Loads: lognormal with sigma 0.5 and 1, Zipf with exponent 1, and `yuan3_ultra`, whose layers are the lognormals that LAEP with
beta 0.1 cuts to the published numbers (sigma 0.6 to 2.4). A single too-busy expert sets the bound in some layers; "at the
bound" counts the layers that lie within 1.02 of theirs.

`--costs` fits the simulator's cost terms to training steps (loss, backward, clipping, fused AdamW) of the quick start's model
with other numbers of experts, other top-k and other batches, one process, the models in random turns, process CPU time of
one thread; medians over rounds. Two models stay out of the fit and are predicted.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from moeprune import create
from moeprune.parallel import fitting, simulate, traffic

SHAPES = {"103 x 64": ((103, 64), (8, 16, 32, 64)), "61 x 256": ((61, 256), (8, 16, 32, 64))}
LAWS = ("lognormal,sigma=0.5", "lognormal,sigma=1", "zipf,exponent=1")
NAMES = ("contiguous", "lpt", "lpt_swap")
DRAWS = 200
MEASURED = [(E, 2, 8) for E in (16, 32, 64, 128)] + [(32, K, 8) for K in (1, 4)] + [(32, 2, B) for B in (4, 16)]
HELD_OUT = [(24, 2, 8), (96, 3, 12)]  # experts, top-k, sequences of 128 tokens
WARM_UP = 3


def sources(layers: int, experts: int, seed: int) -> dict[str, traffic.Source]:
    """Loads by name, 4 million tokens per step, so that rounding to whole tokens is no matter."""
    size = f"layers={layers},experts={experts},tokens=4000000,seed={seed}"
    found = {law: traffic.named(f"synthetic:{law},{size}") for law in LAWS}
    if (layers, experts) == (103, 64):
        found["yuan3_ultra"] = traffic.named(f"yuan3_ultra:,seed={seed}")
    return {name: source for name, source in found.items() if source is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--costs", action="store_true")
    args = parser.parse_args()
    if args.costs:
        costs(args.rounds or 30, args.seed)
    else:
        placements(args.rounds or 3, args.seed)


def placements(rounds: int, seed: int) -> None:
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
        for law, source in sources(layers, experts, seed).items():
            for n in grids:
                print("| " + " | ".join([shape, law, str(n), *row(source, n, rounds, seed)]) + " |", flush=True)


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


def costs(rounds: int, seed: int) -> None:
    import torch
    from torch.nn import functional as F

    from moeprune import MoEConfig, MoETransformer

    torch.manual_seed(seed)
    steps: dict[tuple[int, int, int], Callable[[], None]] = {}

    def add(E: int, K: int, B: int) -> None:
        model = MoETransformer(MoEConfig(n_experts=E, top_k=K)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        text = torch.randint(2048, (B, 129))

        def step() -> None:
            F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        steps[E, K, B] = step

    for sizes in MEASURED + HELD_OUT:
        add(*sizes)
    seconds: dict[tuple[int, int, int], list[float]] = {sizes: [] for sizes in steps}
    for turn in range(rounds + WARM_UP):
        for sizes in random.Random(turn).sample(list(steps), len(steps)):
            began = time.process_time()
            steps[sizes]()
            if turn >= WARM_UP:
                seconds[sizes].append(time.process_time() - began)
    shape, layers = simulate.Shape(128, 64), 4
    observed = {}
    for E, K, B in steps:
        loads = [np.full(E, B * 128 * K / E)] * layers  # on one device only the sum matters
        amounts = simulate.amounts(loads, [[range(E)]] * layers, B * 128, shape.parameters)
        name = f"E={E} K={K}, {B} sequences"
        observed[E, K, B] = fitting.Observation(name, float(np.median(seconds[E, K, B])), amounts, (shape, layers))
    found = fitting.fit([observed[sizes] for sizes in MEASURED])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds\n{found}")
    terms = asdict(found.cost)
    print("\n| model | measured ms (quartiles) | predicted ms | error |\n|---|---|---|---|")
    for sizes, o in observed.items():
        predicted = sum(terms[term] * amount for term, amount in o.amounts.items())
        q1, median, q3 = (1e3 * q for q in np.percentile(seconds[sizes], [25, 50, 75]))
        held = ", held out" if sizes in HELD_OUT else ""
        print(
            f"| {o.run}{held} | {median:.1f} ({q1:.1f} to {q3:.1f}) | {1e3 * predicted:.1f} | {predicted / o.seconds - 1:+.1%} |"
        )
    per_expert = found.cost.per_expert + found.cost.per_parameter * shape.parameters
    if found.cost.per_token:
        print(f"\none expert costs as much as {per_expert / found.cost.per_token:.0f} of the tokens it computes")


if __name__ == "__main__":
    main()
