"""Training-step times of finished variants, measured fairly: one process, the variants in turns, the same batches."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

from moeprune.compare.results import quartiles
from moeprune.compare.spec import Comparison, job_folder
from moeprune.files import write_text

ROUNDS, WARM_UP = 15, 2


def main(comparison: Comparison, folder: Path, names: list[str], path: Path) -> None:
    """Time a training step (loss with balancing terms, backward, clipping, optimizer) of each variant's final model, on the CPU.

    Quartiles over rounds go to `path`; ratios are to the reference.
    """
    with (folder / "speed.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from moeprune import checkpoints
    from moeprune.compare.job import built

    models, optimizers = {}, {}
    for name in names:
        cli = built(comparison, folder, name)
        cli.model.model = checkpoints.read(job_folder(folder, name) / "last.ckpt").model().train()
        models[name] = cli.model
        optimizers[name] = torch.optim.AdamW(cli.model.parameters(), lr=1e-6, fused=True)
        if name == names[0]:
            batches, clip = cli.datamodule.training_batches(ROUNDS + WARM_UP), cli.trainer.gradient_clip_val
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rng = random.Random(0)
    for turn in range(ROUNDS + WARM_UP):
        batch = batches.batch(turn)
        for name in rng.sample(names, len(names)):
            began = time.perf_counter()
            models[name].training_step(batch, turn)["loss"].backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), clip)
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.perf_counter() - began)
    seconds = {name: values[WARM_UP:] for name, values in seconds.items()}
    reference = seconds[comparison.reference]
    tokens = batch[:, 1:].numel()
    rows = {
        name: {
            "step_seconds": quartiles(values),
            "ratio": quartiles([a / b for a, b in zip(values, reference, strict=True)]),
            "tokens_per_second": tokens / quartiles(values)["median"],
        }
        for name, values in seconds.items()
    }
    write_text(path, json.dumps(rows, indent=1))
