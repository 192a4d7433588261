"""What does a calibration pass cost beside a plain forward pass, for our own models: time and memory?

    OMP_NUM_THREADS=1 python benchmarks/calibration.py [--rounds 15] [--quick] [--json PATH]        (40 s; 15 s)

Floor: a calibration pass computes what a forward pass computes; beyond that it reads every expert's output a few times. A call
runs `--batches` (8, as many as a prune in training takes) batches without gradients: through the model, or through `record`
with what REAP needs, or with every registered statistic at once. Ratios of CPU seconds of interleaved calls in one process on one
thread; target 1.15. Memory: growth of the peak resident size during a call over what the process held before it, less that of
the plain call, in units of T K D float32 values, the outputs of all chosen experts of a batch; target 6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
TARGET, MEMORY = 1.15, 6.0


def peak(call: Callable[[], object]) -> float:
    """Bytes by which the peak resident size grows during a call."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="15, or 7 with --quick")
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (config, size) in SIZES.items():
        torch.manual_seed(0)
        model = MoETransformer(config).eval()
        for layer in model.moe_layers:
            torch.nn.init.normal_(layer.router.weight, std=0.3)
        few = max(1, options.batches // 4) if options.quick and config.d_model > 128 else options.batches
        batches = [torch.randint(0, config.vocab_size, (size, config.max_seq_len + 1)) for _ in range(few)]

        def plain(model: MoETransformer = model, batches: list[torch.Tensor] = batches) -> None:
            with torch.no_grad():
                for tokens in batches:
                    model(tokens[:, :-1])

        calls: dict[str, Callable[[], object]] = {"plain": plain}
        for label, needs in (("REAP alone", REAP), ("every statistic", ALL)):
            calls[label] = lambda model=model, batches=batches, needs=needs: record(model, batches, needs)  # type: ignore[misc]
        seconds = interleave(calls, options.rounds or (7 if options.quick else 15))
        memory = {label: peak(call) for label, call in calls.items()}
        outputs = batches[0][:, :-1].numel() * config.top_k * config.d_model * 4
        for label in list(calls)[1:]:
            over = ratios(seconds[label], seconds["plain"])
            rows.append(row("calibration / forward pass", f"{name}, {label}", over, TARGET))
            grown = max(0.0, memory[label] - memory["plain"]) / outputs
            rows.append(row("calibration's memory / T K D floats", f"{name}, {label}", [grown], MEMORY))
    report(rows, options)


if __name__ == "__main__":
    main()
