"""Evidence on disk: a folder that is whole or not there, and that planning reads without torch.

    evidence.safetensors    one array per layer and statistic, `<layer>.<statistic>`
    evidence.json           format, top_k, n_groups and min_experts (of the router), statistics, per layer `ids` and
                            `n_original`, provenance

The description is written last, and the arrays hold its sha256: a folder without it is not evidence yet, and the two cannot
come from different calls.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialized

from moeprune.errors import UserError
from moeprune.files import atomic, new_folder, read_json, write_text
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence

FORMAT = "moeprune.evidence/1"
ARRAYS, DESCRIPTION = "evidence.safetensors", "evidence.json"
PARTIAL = "partial.safetensors"  # of a calibration under way
ROUTER = ("n_groups", "min_experts")  # what a plan must respect: see `Constraints.for_router`
LIVE = frozenset({"weights", "acceptance"})  # a model's; they cannot be saved


def save(evidence: Evidence, folder: str | Path, overwrite: bool = False) -> None:
    """Write the statistics of `evidence`; live weights and acceptance stay behind.

    Args:
        evidence: every layer holds the same statistics; provenance is what JSON can hold; its `n_groups` and `min_experts` are the router's.
        folder: where to.
        overwrite: replace evidence that is there.

    Raises:
        UserError: the folder is not empty, layers hold different statistics, a number is not finite, or the disk is full.
    """
    folder = new_folder(folder, overwrite)
    names = sorted(evidence.layers[0].stats) if evidence.layers else []
    if not names:
        raise UserError(f"there is no statistic to write to {folder}; live weights and acceptance cannot be saved")
    for index, layer in enumerate(evidence.layers):
        if odd := set(layer.stats) ^ set(names):
            raise UserError(
                f"layer {index} and layer 0 do not hold the same statistics ({sorted(odd)[0]!r}); record them together"
            )
        if wrong := [name for name in names if not np.isfinite(layer.stats[name]).all()]:
            raise UserError(
                f"{wrong[0]} of MoE layer {index} is not finite: the model's weights or outputs hold NaN or infinity; check "
                f"the model, or measure in float32"
            )
    provenance = dict(evidence.provenance)
    description = {
        "format": FORMAT,
        "top_k": evidence.top_k,
        **{name: int(provenance.pop(name, 1)) for name in ROUTER},
        "statistics": names,
        "layers": [{"ids": list(layer.ids), "n_original": layer.n_original} for layer in evidence.layers],
        "provenance": provenance,
    }
    text = json.dumps(description, indent=1) + "\n"
    arrays = {
        f"{index}.{name}": np.array(layer.stats[name], order="C")
        for index, layer in enumerate(evidence.layers)
        for name in names
    }
    made = not folder.exists()
    try:
        with atomic(folder / ARRAYS, "wb") as file:
            file.write(serialized(arrays, {"description": hashlib.sha256(text.encode()).hexdigest()}))
            file.flush()
            os.fsync(file.fileno())
            (folder / DESCRIPTION).unlink(missing_ok=True)  # no evidence from here on, until there is the new one
        write_text(folder / DESCRIPTION, text)
    except UserError:
        if made and folder.exists() and not (folder / DESCRIPTION).exists():
            (folder / ARRAYS).unlink(missing_ok=True)
            folder.rmdir()
        raise


def load(folder: str | Path, needs: Iterable[str] | None = None) -> Evidence:
    """Read what `save` wrote.

    Args:
        folder: with evidence.
        needs: read only these statistics (and counts) if all of them are there; default: all there are.

    Raises:
        UserError: no evidence there, an unfinished calibration, a file that is corrupt, cut short or of another format.
    """
    folder = Path(folder)
    described = folder / DESCRIPTION
    if not described.is_file():
        if (folder / PARTIAL).is_file():
            raise UserError(
                f"the evidence in {folder} is unfinished; call the same `moeprune calibrate` again, which goes on from there"
            )
        raise UserError(f"there is no evidence at {folder}; give a folder that `moeprune calibrate` wrote")
    top_k, names, layers, provenance = _fields(read_json(described, "description of evidence"), described)
    wanted = set(names)
    if needs is not None and (asked := set(needs) - LIVE) <= wanted:
        wanted &= asked | {"counts"}
    digest = hashlib.sha256(described.read_bytes()).hexdigest()
    stats: list[dict[str, NDArray[Any]]] = []
    try:
        with safe_open(folder / ARRAYS, framework="numpy") as file:
            if (file.metadata() or {}).get("description") != digest:
                raise UserError(
                    f"{ARRAYS} and {DESCRIPTION} in {folder} do not belong together; calibrate anew, or copy both"
                )
            for index, (ids, _) in enumerate(layers):
                for name in names:
                    shape = tuple(file.get_slice(f"{index}.{name}").get_shape())
                    if shape and shape[0] != len(ids):
                        raise UserError(
                            f"statistic {name!r} of layer {index} in {folder / ARRAYS} has shape {shape} for {len(ids)} "
                            f"experts; calibrate anew"
                        )
                stats.append({name: file.get_tensor(f"{index}.{name}") for name in names if name in wanted})
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise UserError(
            f"cannot read {folder / ARRAYS} ({reason}): it is missing, cut short or corrupt; calibrate anew"
        ) from error
    made = [LayerEvidence(ids, n, found) for (ids, n), found in zip(layers, stats, strict=True)]
    return Evidence(tuple(made), top_k, provenance)


def respecting(constraints: Constraints, evidence: Evidence) -> Constraints:
    """`constraints`, and what the router asks for on which `evidence` was measured."""
    n_groups, min_experts = (int(evidence.provenance.get(name, 1)) for name in ROUTER)
    return constraints.for_router(n_groups, min_experts, [layer.n_original for layer in evidence.layers])


def _fields(data: Any, path: Path) -> tuple[int, list[str], list[tuple[tuple[int, ...], int]], dict[str, Any]]:
    """top_k, statistics, ids and n_original per layer, and provenance (with the router's numbers), checked.

    Raises:
        UserError: another format, or a field that is missing or garbled.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path} is not of format {FORMAT!r} (found {found!r}); calibrate anew")
    try:
        top_k, router = int(data["top_k"]), {name: int(data[name]) for name in ROUTER}
        names = [str(name) for name in data["statistics"]]
        layers = [(tuple(int(i) for i in layer["ids"]), int(layer["n_original"])) for layer in data["layers"]]
        provenance = {**data["provenance"], **router}
        if not layers or not names or min(router.values()) < 1:
            raise ValueError(f"no layers, no statistics, or {' or '.join(ROUTER)} below 1")
        for index, (ids, n) in enumerate(layers):
            if not 1 <= top_k <= len(ids) or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < n:
                raise ValueError(f"ids, n_original or top_k of layer {index}")
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; calibrate anew") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is garbled ({error}); calibrate anew") from error
    return top_k, names, layers, provenance
