"""Three forms of a trained model, one reader.

    file     a Lightning checkpoint (.ckpt): weights, optimizer, loops, callbacks, and a `moeprune` entry
    pieces   a folder with the same, written by several processes at once; see moeprune.parallel.pieces
    export   a folder: model.safetensors, config.json (num_experts_per_layer, expert_ids), plans.json, tokenizer.json

All hold the original ids of the experts of every layer and the history of prunes, so that a freshly built model takes
the pruned shapes before weights are loaded. Nothing is unpickled from a file: `weights_only=True`.

    python -m moeprune.checkpoints PIECES FILE      turns a checkpoint in pieces into a file
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.errors import UserError
from moeprune.files import model_folder, read_json, write_text
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.plan import PrunePlan

FORMAT = "moeprune.checkpoint/1"
ENTRY = "moeprune"  # key of our part of a Lightning checkpoint
PREFIX = "model."  # of the model's weights in a Lightning checkpoint
END_OF_TEXT = "<|endoftext|>"  # of moeprune's own tokenizers


@dataclass
class Checkpoint:
    """A model on disk.

    Args:
        config: sizes before any pruning.
        expert_ids: per layer the original ids of its experts, in order of position.
        state: the model's weights.
        plans: prunes so far, oldest first.
        tokenizer: JSON of the `tokenizers` library; "" if unknown.
        data: what the model was trained on.
        step: optimizer steps done.
        end_of_text: the token that ends a document.
    """

    config: MoEConfig
    expert_ids: list[list[int]]
    state: dict[str, Tensor]
    plans: list[PrunePlan] = field(default_factory=list)
    tokenizer: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    end_of_text: str = END_OF_TEXT

    def model(self) -> MoETransformer:
        """The model, in evaluation mode, on the CPU.

        Raises:
            UserError: weights that do not fit the configuration.
        """
        model = MoETransformer(self.config, [len(ids) for ids in self.expert_ids])
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's weights do not fit its own configuration: {_first_line(error)}"
            ) from error
        return model.eval()

    def entry(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "expert_ids": self.expert_ids,
            "num_experts_per_layer": [len(ids) for ids in self.expert_ids],
            "plans": [plan.to_dict() for plan in self.plans],
            "tokenizer": self.tokenizer,
            "data": self.data,
            "step": self.step,
            "end_of_text": self.end_of_text,
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], state: dict[str, Tensor], where: str) -> Checkpoint:
        """The inverse of `entry`.

        Raises:
            UserError: another format, or a field that is missing or garbled.
        """
        if not isinstance(entry, Mapping) or entry.get("format") != FORMAT:
            found = entry.get("format") if isinstance(entry, Mapping) else None
            raise UserError(f"{where} is no moeprune checkpoint of format {FORMAT!r} (found {found!r})")
        try:
            return cls(
                MoEConfig.from_dict(entry["config"]),
                [list(map(int, ids)) for ids in entry["expert_ids"]],
                state,
                [PrunePlan.from_dict(plan) for plan in entry["plans"]],
                entry["tokenizer"],
                entry["data"],
                entry["step"],
                entry.get("end_of_text", END_OF_TEXT),
            )
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint {where} lacks or garbles a field: {error}") from error


def read(path: str | Path, weights: bool = True) -> Checkpoint:
    """Read a Lightning checkpoint, in a file or in pieces, or an exported folder.

    Args:
        path: of it.
        weights: False for everything but the weights, whatever their size.

    Raises:
        UserError: no such file, a corrupt one, or one that is not moeprune's.
    """
    path = Path(path)
    if path.is_dir() and not _in_pieces(path):
        entry = read_json(path / "config.json", "model configuration")
        plans, tokenizer = path / "plans.json", path / "tokenizer.json"
        if isinstance(entry, dict):
            entry["plans"] = read_json(plans, "plan history") if plans.exists() else []
            entry["tokenizer"] = tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else ""
        try:
            state = load_file(path / "model.safetensors") if weights else {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the weights {path / 'model.safetensors'}: {_first_line(error)}") from error
        return Checkpoint.from_entry(entry, state, str(path))
    data = read_lightning(path, weights, optimizer=False)
    state = {key[len(PREFIX) :]: value for key, value in data["state_dict"].items() if key.startswith(PREFIX)}
    if not weights:
        state = {}
    return Checkpoint.from_entry(data.get(ENTRY, {}), state, str(path))


def read_lightning(path: str | Path, weights: bool = True, optimizer: bool = True) -> dict[str, Any]:
    """A Lightning checkpoint as it is, without unpickling anything but tensors and plain data.

    Args:
        path: of the file, or of the folder of one in pieces.
        weights: False leaves tensors in the file, mapped into memory; in pieces, None in their places.
        optimizer: False may do so with the optimizer's.

    Raises:
        UserError: no such file, or a corrupt one.
    """
    if _in_pieces(path):
        from moeprune.parallel.pieces import Folder  # half a second that most commands do not need

        folder = Folder(path)
        return folder.checkpoint(optimizer) if weights else folder.description()
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder of exported weights, not a checkpoint file of a run; give the .ckpt file")
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint at {path}; check the path")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not a readable checkpoint: it is empty, cut short or of another kind; take another one"
        )
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=not weights)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a readable checkpoint: it holds Python objects besides tensors and plain data, which are never unpickled"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({_first_line(error)}); it may be cut short") from error
    if not isinstance(data, dict) or "state_dict" not in data:
        raise UserError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    return data


def export(checkpoint: Checkpoint, path: str | Path, overwrite: bool = False) -> None:
    """Write a folder: complete, or not there.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    path = model_folder(path, overwrite)
    entry = checkpoint.entry()
    plans, tokenizer = entry.pop("plans"), entry.pop("tokenizer")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
            made = Path(name) / "export"
            made.mkdir()
            save_file({k: v.contiguous() for k, v in checkpoint.state.items()}, made / "model.safetensors")
            write_text(made / "config.json", json.dumps(entry, indent=1) + "\n")
            write_text(made / "plans.json", json.dumps(plans, indent=1) + "\n")
            if tokenizer:
                write_text(made / "tokenizer.json", tokenizer)
            if path.exists():
                shutil.rmtree(path)
            made.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {_first_line(error)}; free space or choose another --output") from error


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes of the weights, hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differing_fields(a: MoEConfig, b: MoEConfig) -> list[str]:
    """Names of the configuration fields that change the weights' meaning and differ."""
    x, y = ({**c.to_dict(), "n_kv_heads": c.kv_heads, "head_dim": c.head_width} for c in (a, b))
    return [name for name in x if name not in ("embedding_std", "expert_backend") and x[name] != y[name]]


def _in_pieces(path: str | Path) -> bool:
    return any((Path(path) / name).is_file() for name in ("meta.pt", ".metadata"))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines or [type(error).__name__])[0]


def main(args: list[str]) -> int:
    """Turn a checkpoint in pieces into a file; returns the exit code."""
    try:
        if len(args) != 2:
            raise UserError("give the folder of a checkpoint in pieces and the file to write")
        source, target = map(Path, args)
        if not _in_pieces(source):
            raise UserError(f"{source} is no checkpoint in pieces; nothing to do")
        if target.exists():
            raise UserError(f"{target} exists; choose another file")
        data = read_lightning(source)
        fresh = target.with_name(f".{target.name}.new")
        torch.save(data, fresh)
        fresh.replace(target)
    except (UserError, OSError, RuntimeError) as error:  # torch.save raises the last where a disk is full
        print(f"moeprune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
