"""What does a calibration pass cost beside a plain forward pass, for our own models: time and memory?

    OMP_NUM_THREADS=1 python benchmarks/calibration.py [--rounds 15] [--quick] [--json PATH]        (40 s; 15 s)

Floor: a calibration pass computes what a forward pass computes; beyond that it reads every expert's output a few times. A call
runs `--batches` (8, as many as a prune in training takes) batches without gradients: through the model, or through `record`
with what REAP needs, or with every registered statistic at once. Ratios of CPU seconds of interleaved calls in one process on one
thread; target 1.15. Memory: the most bytes that tensors hold at a time during one batch, less that of the plain call (with a
vocabulary of 16, so that logits do not hide it), in units of the outputs of all chosen experts of a batch, T K D float32 values,
of which calibration holds at most 8192 / K tokens' at a time; target 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from bench import arguments, interleave, ratios, report, row

from moeprune import registry
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import record

SIZES = {
    "quick start's model": (MoEConfig(vocab_size=2048, max_seq_len=128), 8),
    "larger layers": (
        MoEConfig(
            vocab_size=2048, d_model=512, n_layers=2, n_heads=8, n_experts=32, top_k=4, d_expert=256, max_seq_len=512
        ),
        4,
    ),
}
REAP = frozenset({"counts", "g0f0", "g1f1"})
ALL = frozenset(entry.name for entry in registry.entries("statistic")) | {"counts"}
TARGET, MEMORY = 1.15, 4.0


def peak(call: Callable[[], object]) -> int:
    """The most bytes that tensors made during a call hold at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def make(config: MoEConfig) -> MoETransformer:
    """A model whose routers have preferences."""
    torch.manual_seed(0)
    model = MoETransformer(config).eval()
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    return model


def both(model: MoETransformer, batches: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """The plain pass and the calibrations."""

    def plain() -> None:
        with torch.no_grad():
            for tokens in batches:
                model(tokens[:, :-1])

    return {
        "plain": plain,
        "REAP alone": lambda: record(model, batches, REAP),
        "every statistic": lambda: record(model, batches, ALL),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="15, or 7 with --quick")
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (config, size) in SIZES.items():
        model = make(config)
        few = max(1, options.batches // 4) if options.quick and config.d_model > 128 else options.batches
        batches = [torch.randint(0, config.vocab_size, (size, config.max_seq_len + 1)) for _ in range(few)]
        calls = both(model, batches)
        seconds = interleave(calls, options.rounds or (7 if options.quick else 15))
        tokens = batches[0] % 16
        held = {label: peak(call) for label, call in both(make(replace(config, vocab_size=16)), [tokens]).items()}
        outputs = tokens[:, :-1].numel() * config.top_k * config.d_model * 4
        for label in list(calls)[1:]:
            over = ratios(seconds[label], seconds["plain"])
            rows.append(row("calibration / forward pass", f"{name}, {label}", over, TARGET))
            more = (held[label] - held["plain"]) / outputs
            rows.append(row("calibration's memory / T K D floats", f"{name}, {label}", [more], MEMORY))
    report(rows, options)


if __name__ == "__main__":
    main()
