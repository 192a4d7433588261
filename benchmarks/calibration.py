"""One calibration pass against a plain forward pass: time and memory, for our own models.

    python benchmarks/calibration.py [--rounds 9]

Floor: a calibration pass computes what a forward pass computes; beyond that it reads every expert's output once or twice. Ratios are
of interleaved rounds in one process, medians with quartiles; memory is the growth of the peak resident size over that of a plain
forward pass in the same process, next to the T K D floats of the outputs of one block of rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moeprune import registry
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import ROWS, record

SIZES = {
    "quick start": (MoEConfig(vocab_size=2048, max_seq_len=128), 8),
    "larger layers": (
        MoEConfig(
            vocab_size=2048, d_model=512, n_layers=2, n_heads=8, n_experts=32, top_k=4, d_expert=256, max_seq_len=512
        ),
        4,
    ),
}
REAP = frozenset({"g0f0", "g1f1"})
ALL = frozenset(entry.name for entry in registry.entries("statistic")) | {"counts"}


def peak(call: Callable[[], object]) -> float:
    """MB by which the peak resident size grows during a call."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name, (config, batch) in SIZES.items():
        torch.manual_seed(0)
        model = MoETransformer(config).eval()
        for layer in model.moe_layers:
            torch.nn.init.normal_(layer.router.weight, std=0.3)
        tokens = torch.randint(0, config.vocab_size, (batch, config.max_seq_len + 1))

        def plain(model: MoETransformer = model, tokens: torch.Tensor = tokens) -> None:
            with torch.no_grad():
                model(tokens[:, :-1])

        calls: dict[str, Callable[[], object]] = {"plain": plain}
        for label, needs in (("REAP alone", REAP), ("every statistic", ALL)):
            calls[label] = lambda model=model, tokens=tokens, needs=needs: record(model, [tokens], needs)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {label: [] for label in calls}
        for call in calls.values():
            call()
        for _ in range(options.rounds):
            for label, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[label].append(time.perf_counter() - began)
        memory = {label: peak(call) for label, call in calls.items()}
        outputs = min(ROWS, tokens[:, :-1].numel() * config.top_k) * config.d_model * 4 / 2**20
        for label in list(calls)[1:]:
            ratios = [a / b for a, b in zip(seconds[label], seconds["plain"], strict=True)]
            q1, median, q3 = statistics.quantiles(ratios, n=4)
            print(
                f"{name:<14} {label:<16} {median:.2f} x plain ({q1:.2f} to {q3:.2f})   peak growth {memory[label]:.0f} MB "
                f"(plain {memory['plain']:.0f} MB; one block of outputs {outputs:.0f} MB)"
            )


if __name__ == "__main__":
    main()
