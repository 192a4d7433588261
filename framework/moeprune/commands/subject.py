"""A model from disk, of whichever kind, and what is needed to measure it and to write it again."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from moeprune import __version__, checkpoints
from moeprune.errors import UserError
from moeprune.interop import checkpoint as interop
from moeprune.model.prunable import PrunableModel
from moeprune.pruning.calibration import GRADIENTS, TRIALS, Batch, Gate
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import PrunePlan
from moeprune.training.data import TextData
from moeprune.training.expert_pruning import CALIBRATION_SEED_OFFSET

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Reading:
    """How to read a model and the text to measure it on.

    Args:
        data: the text; None for what the model was trained on (`embedded` for a transformers checkpoint).
        calibration_batches: how many batches.
        batch_size: sequences per batch.
        seq_len: tokens per sequence; None for as many as the model takes, at most 2048 for a transformers checkpoint.
        pack: see `interop.text.token_batches`.
        seed: of the choice of text.
        dtype: of a transformers checkpoint's weights in memory.
        device: where the model runs.
    """

    data: str | None = None
    calibration_batches: int = 32
    batch_size: int = 8
    seq_len: int | None = None
    pack: bool | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seq_len", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        try:
            torch.empty(1, device=self.device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {self.device!r} cannot be used here: {str(error).splitlines()[0]}") from error


class Subject(NamedTuple):
    """A model from disk.

    Args:
        model: in evaluation mode.
        batches: to calibrate on; empty if none were asked for.
        provenance: which weights and which data: `model`, `weights` (fingerprint), the router's numbers, `data`, `calibration_tokens`, ...
        write: (plan that was applied to the model, folder, overwrite, uniform view) -> parameters before and after.
    """

    model: PrunableModel
    batches: Sequence[Batch]
    provenance: dict[str, Any]
    write: Callable[[PrunePlan, Path, bool, bool], tuple[int, int]]


def subject(path: Path, how: Reading, reads_data: bool = True) -> Subject:
    """Read a model and the text to measure it on.

    Args:
        path: a checkpoint file (.ckpt), an exported folder, or a transformers checkpoint (folder or name on the hub).
        how: see `Reading`.
        reads_data: whether anything is measured on text; without, none is read.

    Raises:
        UserError: no checkpoint, no batch, data that the model was not trained on.
    """
    if reads_data and how.calibration_batches < 1:
        raise UserError(
            f"calibration_batches must be at least 1, got {how.calibration_batches}: what is asked for is measured on data"
        )
    if interop.is_transformers(path):
        return _of_transformers(interop.resolve(path), how, reads_data)
    return _of_moeprune(path, how, reads_data)


def _router(model: PrunableModel) -> dict[str, Any]:
    return {
        "n_groups": model.n_groups,
        "min_experts": model.min_experts,
        "version": __version__,
        "calibration_tokens": 0,
    }


def _of_moeprune(path: Path, how: Reading, reads_data: bool) -> Subject:
    checkpoint = checkpoints.read(path)
    model = checkpoint.model().to(how.device)
    provenance = {"model": str(path), "weights": checkpoints.fingerprint(checkpoint.state), **_router(model)}
    batches: list[Batch] = []
    if reads_data:
        source = how.data or checkpoint.data.get("source", "embedded")
        domains = checkpoint.data.get("domains") if how.data is None else None
        length = min(how.seq_len or checkpoint.config.max_seq_len, checkpoint.config.max_seq_len)
        text = TextData(source, domains, checkpoint.config.vocab_size, length, how.batch_size)
        if checkpoint.tokenizer and text.store.tokenizer_json != checkpoint.tokenizer:  # not what it was trained on
            text = TextData(source, domains, checkpoint.config.vocab_size, length, how.batch_size, tokenizer=Path(path))
        drawn = text.training_batches(how.calibration_batches, how.seed + CALIBRATION_SEED_OFFSET)
        tokens = [drawn.batch(i).to(how.device) for i in range(how.calibration_batches)]
        batches = list(tokens)
        provenance |= _drawn(text.describe(), sum(batch[:, 1:].numel() for batch in tokens), how, len(tokens))

    def write(plan: PrunePlan, output: Path, overwrite: bool, uniform_view: bool) -> tuple[int, int]:
        if uniform_view:
            raise UserError(
                f"a uniform view is for stock code, and {path} is moeprune's own model; write it with `moeprune export` first"
            )
        pruned = checkpoints.Checkpoint(
            checkpoint.config,
            [list(layer.ids) for layer in model.moe_layers],
            model.state_dict(),
            [*checkpoint.plans, plan],
            checkpoint.tokenizer,
            checkpoint.data,
            checkpoint.step,
        )
        checkpoints.export(pruned, output, overwrite)
        before, after = (sum(value.numel() for value in state.values()) for state in (checkpoint.state, pruned.state))
        return before, after

    return Subject(model, batches, provenance, write)


def _drawn(data: dict[str, Any], tokens: int, how: Reading, batches: int) -> dict[str, Any]:
    return {
        "data": data,
        "calibration_tokens": tokens,
        "calibration_batches": batches,
        "batch_size": how.batch_size,
        "seq_len": how.seq_len,
        "seed": how.seed,
        "dtype": how.dtype,
    }


def _of_transformers(path: Path, how: Reading, reads_data: bool) -> Subject:
    interop.refuse_view(path)
    model = interop.load(path, DTYPES[how.dtype], how.device)
    before = sum(p.numel() for p in model.model.parameters())
    provenance = {"model": str(path), "weights": interop.fingerprint(path), **_router(model)}
    batches: list[Batch] = []
    if reads_data:
        batches, drawn = transformers_batches(path, how)
        provenance |= drawn

    def write(plan: PrunePlan, output: Path, overwrite: bool, uniform_view: bool) -> tuple[int, int]:
        plans = [PrunePlan.from_dict(each) for each in interop.read_record(path).get("plans", [])]
        interop.export(model, output, [*plans, plan], path, provenance, overwrite, uniform_view=uniform_view)
        return before, sum(p.numel() for p in model.model.parameters())

    return Subject(model, batches, provenance, write)


def transformers_batches(path: Path, how: Reading) -> tuple[list[Batch], dict[str, Any]]:
    """Batches for a transformers checkpoint, and their provenance."""
    from moeprune.interop.text import token_batches
    from moeprune.interop.transformers import text_config

    config = text_config(interop.configuration(path))
    longest = getattr(config, "max_position_embeddings", None) or 2048
    length = min(how.seq_len or min(longest, 2048), longest)
    source = how.data or "embedded"
    tokenizer = interop.tokenizer(path)
    found = token_batches(source, tokenizer, length, how.calibration_batches, how.batch_size, how.seed, how.pack)
    digest = hashlib.sha256()
    for tokens, mask in found:
        digest.update(tokens.numpy().tobytes() + mask.numpy().tobytes())
    if int(max(tokens.max() for tokens, _ in found)) >= config.vocab_size:
        raise UserError(f"the tokenizer of {path} gives ids beyond the model's vocabulary of {config.vocab_size}")
    batches: list[Batch] = [(tokens.to(how.device), mask.to(how.device)) for tokens, mask in found]
    count = sum(int(mask[:, :-1].sum()) for _, mask in found)
    return batches, _drawn({"source": source, "domains": None, "hash": digest.hexdigest()}, count, how, len(batches))


def layerwise_evidence(
    path: Path,
    how: Reading,
    wanted: frozenset[str],
    optional: frozenset[str],
    gate: Gate,
    there: Callable[[Mapping[str, Any], frozenset[str]], bool] = lambda provenance, statistics: False,
) -> Evidence | None:
    """Evidence of a transformers checkpoint with one decoder layer in memory at a time.

    Args:
        path: folder or name on the hub.
        how: see `Reading`.
        wanted: statistics.
        optional: those of `wanted` that are left out, with a note, where they cannot be measured layer by layer.
        gate: see `calibration.record`.
        there: (provenance, statistics) -> whether that evidence exists, so that nothing is measured.

    Returns:
        The evidence; None if it is there.

    Raises:
        UserError: moeprune's own model, or a statistic that needs the whole model and is not optional.
    """
    from moeprune.interop.layerwise import record_layerwise

    if not interop.is_transformers(path):
        raise UserError(f"{path} is moeprune's own model, which is loaded whole; leave out --layerwise")
    folder = interop.resolve(path)
    interop.refuse_view(folder)
    left_out = wanted & optional & (GRADIENTS | TRIALS)
    if left_out:
        print(f"moeprune: left out, since they need the whole model: {', '.join(sorted(left_out))}", file=sys.stderr)
    batches, provenance = transformers_batches(folder, how)
    origin = {"model": str(folder), "weights": interop.fingerprint(folder), "version": __version__}
    if there({**origin, **provenance}, wanted - left_out):
        return None
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("layers measured", total=None)
        return record_layerwise(
            folder,
            batches,
            wanted - left_out,
            {**origin, **provenance},
            gate,
            DTYPES[how.dtype],
            how.device,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
