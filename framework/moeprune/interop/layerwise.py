"""Calibration layer by layer, for models larger than memory: one decoder layer is resident at a time, the hidden states of all
batches wait on disk. Weights are read once, whatever the number of batches.

The model's own forward pass is run for every layer and batch, with the decoder layers before it standing still (they hand on the
stored hidden states) and those after it left out, so masks, rotary tables and whatever else a family computes around its
layers are its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from moeprune.errors import UserError
from moeprune.interop.checkpoint import (
    check_files,
    complete,
    configuration,
    library,
    pruned_class,
    read_record,
    refuse_view,
)
from moeprune.interop.transformers import TransformersModel, text_config
from moeprune.pruning.calibration import GRADIENTS, TRIALS, WEIGHTS, Batch, Gate, Recording, watch
from moeprune.pruning.evidence import Evidence


class _Enough(Exception):  # noqa: N818 (not an error)
    """The layer in question has run."""


def record_layerwise(
    path: Path | str,
    batches: Iterable[Batch],
    needs: frozenset[str],
    provenance: Mapping[str, Any] | None = None,
    gate: Gate = "weight",
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evidence:
    """Evidence of a transformers checkpoint, as `calibration.record` gives it, with one decoder layer in memory at a time.

    Args:
        path: folder with safetensors.
        batches: see `calibration.record`; on the CPU.
        needs: statistics; not those that take gradients or run the model without some experts.
        provenance: kept with the evidence.
        gate: see `calibration.record`.
        dtype: of the weights; `auto` takes the checkpoint's.
        device: where layers run.
        progress: called with layers done and in all.

    Raises:
        UserError: a statistic that needs the whole model, or files that are missing.
    """
    if whole := sorted(needs & (GRADIENTS | TRIALS | {"weights"})):
        raise UserError(
            f"{', '.join(whole)} cannot be measured layer by layer; leave out --layerwise, or leave them out"
        )
    skeleton = Skeleton(path, dtype, device)
    model = TransformersModel(skeleton.model, skeleton.record.get("expert_ids"), skeleton.record.get("n_original"))
    recording = Recording(model, needs - WEIGHTS, gate)
    if not recording.reads_data:
        raise UserError("nothing to measure on data; use statistics of the weights through streaming instead")
    by_layer = {layer.where.block: index for index, layer in enumerate(model.moe_layers)}
    of_weights: dict[str, list[NDArray[Any]]] = {name: [] for name in sorted(needs & WEIGHTS)}
    held = list(batches)
    if not held:
        raise UserError("calibration needs at least one batch of tokens; give data or more calibration batches")
    with tempfile.TemporaryDirectory(prefix="moeprune-") as scratch, torch.no_grad():
        store = Path(scratch)
        for depth, (name, _) in enumerate(skeleton.layers):
            skeleton.load(f"{name}.")
            here = [i for block, i in by_layer.items() if block == name or block.startswith(f"{name}.")]
            for number, batch in enumerate(held):
                tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
                inputs = tokens[:, :-1].to(device)
                real = None if mask is None else mask[:, :-1].bool().to(device)
                file = store / f"{number}.pt"
                if here and number == 0 and "residual" in recording.reads:
                    model.norms(partial(skeleton.run, depth, file, inputs, real, keep=False))
                with ExitStack() as stack:
                    for index in here:
                        stack.enter_context(watch(recording, index, None if real is None else real.flatten()))
                    skeleton.run(depth, file, inputs, real)
                if depth == 0:
                    recording.seen += 1
                    recording.tokens += int(inputs.numel() if real is None else real.sum())
            for index in here:
                for statistic, value in Recording(model, frozenset(of_weights)).weights_of(index).items():
                    of_weights[statistic].append(value)
            skeleton.free(f"{name}.")
            progress(depth + 1, len(skeleton.layers))
    router = {"n_groups": model.n_groups, "min_experts": model.min_experts}
    return recording.evidence(of_weights, {**(provenance or {}), **router})


class Skeleton:
    """A transformers model on the meta device whose decoder layers are loaded and freed one at a time.

    Args:
        path: folder with safetensors.
        dtype: of the weights; `auto` takes the checkpoint's.
        device: where layers run.

    Raises:
        UserError: files are missing, or the model has no list of decoder layers.
    """

    def __init__(self, path: Path | str, dtype: torch.dtype | str, device: str) -> None:
        transformers = library()
        self.path, self.device = Path(path), device
        self.record = read_record(path)
        refuse_view(path)
        config = configuration(path)
        cls = pruned_class(config) if hasattr(config, "moeprune") else transformers.AutoModelForCausalLM
        config.dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        with torch.device("meta"):
            build = cls._from_config if hasattr(config, "moeprune") else cls.from_config
            self.model: Any = build(config, dtype=config.dtype).eval()
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == text_config(config).num_hidden_layers
        ]
        if not lists:
            raise UserError(f"{type(self.model).__name__} has no list of decoder layers; leave out --layerwise")
        prefix, layers = lists[0]
        self.layers: list[tuple[str, nn.Module]] = [(f"{prefix}.{i}", layer) for i, layer in enumerate(layers)]
        self._shape: list[Any] = [None] * len(layers)  # what each layer returned, with None for the hidden states
        check_files(self.path)
        self._files = _files(self.path)
        self._outside = f"{prefix}."
        self.load("")
        for module in self.model.modules():  # tables that are computed, not loaded
            names = [n for n in module._non_persistent_buffers_set if getattr(module, n) is not None]
            for name in names:
                setattr(module, name, torch.empty_like(getattr(module, name), device=device))
            if names:
                self.model._init_weights(module)

    def load(self, prefix: str) -> None:
        """Load the layer at `prefix`; '' for everything outside the layers."""
        from transformers import conversion_mapping, core_model_loading, modeling_utils

        loading: Any = core_model_loading
        mapping: Any = conversion_mapping.get_model_conversion_mapping(self.model)
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        names = self.model.state_dict()
        with ExitStack() as stack:
            open_files: dict[Path, Any] = {}
            wanted = {}
            for key, file in self._files.items():
                target, _ = loading.rename_source_key(key, renamings, converters, self.model.base_model_prefix, names)
                inside = target.startswith(prefix) if prefix else not target.startswith(self._outside)
                if inside:
                    if file not in open_files:
                        open_files[file] = stack.enter_context(safe_open(file, framework="pt"))
                    wanted[key] = open_files[file].get_slice(key)
            config: Any = modeling_utils.LoadStateDictConfig(
                dtype=self.model.dtype, weight_mapping=mapping, device_map={"": self.device}
            )
            loading.convert_and_load_state_dict_in_model(self.model, wanted, config)
        if not prefix:
            self.model.tie_weights()
        complete(
            self.path,
            (
                name
                for name, tensor in self.model.state_dict().items()
                if tensor.is_meta and (name.startswith(prefix) if prefix else not name.startswith(self._outside))
            ),
        )

    def free(self, prefix: str) -> None:
        """Give the memory of the layer at `prefix` back."""
        layer = self.model.get_submodule(prefix.rstrip("."))
        for module in layer.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def run(self, depth: int, file: Path, tokens: Tensor, mask: Tensor | None, keep: bool = True) -> None:
        """Run the layer at `depth` on what `file` holds (the embedded tokens for the first), and store what comes out, or not
        (`keep`).
        """
        saved = torch.load(file, weights_only=True) if depth else None
        patched = []

        def stands(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                out = hidden_states if index < depth - 1 else saved.to(self.device)  # type: ignore[union-attr]
                shape = self._shape[index]
                return out if shape is None else tuple(out if part is None else part for part in shape)

            return forward

        def runs(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = own(hidden_states, *args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            self._shape[depth] = (None, *out[1:]) if isinstance(out, tuple) else None
            if keep:
                torch.save(first.cpu(), file)
            raise _Enough

        own = self.layers[depth][1].forward
        try:
            for index in range(depth):
                self.layers[index][1].forward = stands(index)
                patched.append(self.layers[index][1])
            self.layers[depth][1].forward = runs
            patched.append(self.layers[depth][1])
            self.model(input_ids=tokens, attention_mask=None if mask is None else mask.long(), use_cache=False)
        except _Enough:
            pass
        finally:
            for layer in patched:
                del layer.forward


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file.

    Raises:
        UserError: no safetensors, or an index that disagrees with the files.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = {
            name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
        if missing := sorted({file.name for file in found.values() if not file.exists()}):
            raise UserError(f"{folder} lacks the shard {missing[0]} that its index names; complete the download")
        return found
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{folder} holds no model.safetensors and no index; give a folder of safetensors")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
