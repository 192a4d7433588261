"""Reading and writing transformers checkpoints: folders or hub names in; pruned folders out.

    equal counts      a stock checkpoint of the same family, with a smaller number of experts in its configuration
    unequal counts    renumbered tensors, `num_experts_per_layer` in the configuration, and a modeling file that
                      AutoModelForCausalLM loads with trust_remote_code=True
    head with a bias  (of moeprune's own models) the modeling file as well

Both hold `moeprune.json`: the original ids of the experts of every layer, the plans, and where the model came from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moeprune.errors import UserError
from moeprune.files import model_folder, read_json, write_text
from moeprune.interop import modeling_moeprune, uniform
from moeprune.interop.transformers import TransformersModel, count_field, text_config
from moeprune.pruning.plan import PrunePlan

FORMAT = "moeprune.transformers/1"
RECORD = "moeprune.json"


def is_transformers(path: Path | str) -> bool:
    """Whether `path` is a folder with a transformers checkpoint, or no path at all but a name on the hub."""
    folder = Path(path)
    if folder.is_dir():
        config = folder / "config.json"
        return config.exists() and "model_type" in read_json(config, "configuration")
    return (
        not folder.exists() and str(path).count("/") == 1 and not folder.suffix and not str(path).startswith(("/", "."))
    )


def resolve(path: Path | str) -> Path:
    """The folder of a checkpoint: itself, or where the hub's cache holds the name.

    Raises:
        UserError: the name is not on the hub, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        hub: Any = import_module("huggingface_hub")
        files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(hub.snapshot_download(str(path), allow_patterns=files))
    except ImportError as error:
        raise UserError(f"there is no folder {path}, and names on the hub need the extra [hf]") from error
    except Exception as error:  # the hub's client raises whatever its transport does
        raise UserError(f"there is no folder {path}, and the hub does not give it: {_first_line(error)}") from error


def tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        UserError: there is none.
    """
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(
            f"{path} holds no tokenizer (tokenizer.json, tokenizer.model, ...); put the model's tokenizer there"
        )
    try:
        return library().AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no tokenizer that transformers can read; put the model's tokenizer there"
        ) from error


def check_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order of name.

    Raises:
        UserError: there are none, one that the index names is missing, truncated, or holds other tensors than the index says.
    """
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _mapping(index, "index of shards").get("weight_map", {})
        files = sorted({path / name for name in weight_map.values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{path} lacks the shard {missing[0]} that its index names; complete the download")
    if not files:
        pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        told = f" ({pickles[0].name} is a pickle, which is not read: convert it)" if pickles else ""
        raise UserError(f"{path} holds no safetensors{told}; give a checkpoint in safetensors")
    names: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                names |= dict.fromkeys(opened.keys(), file.name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is truncated or no safetensors file ({_first_line(error)}); fetch it again"
            ) from error
    if index.exists():
        odd = [name for name, file in weight_map.items() if names.get(name) != file]
        if odd:
            raise UserError(
                f"the index of {path} says that {odd[0]} is in {weight_map[odd[0]]}, which does not hold it"
            )
    return files


def fingerprint(path: Path) -> str:
    """sha256 over the bytes of the checkpoint's safetensors files, in order of name, hex.

    Raises:
        UserError: see `check_files`.
    """
    files = check_files(path)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_record(path: Path | str) -> dict[str, Any]:
    """What moeprune wrote beside a checkpoint; {} if it is nobody's but the model's author's.

    Raises:
        UserError: the record is garbled.
    """
    file = Path(path) / RECORD
    if not file.exists():
        return {}
    record = _mapping(file, "record of pruned experts")
    if record.get("format") != FORMAT:
        raise UserError(f"{file} is not of format {FORMAT!r} (found {record.get('format')!r}); prune the model anew")
    return record


def load(path: Path | str, dtype: torch.dtype | str = "auto", device: str = "cpu") -> TransformersModel:
    """A transformers checkpoint, pruned before or not.

    Args:
        path: a folder, or a name on the hub.
        dtype: of the weights; `auto` takes the checkpoint's.
        device: where to load it to.

    Raises:
        UserError: transformers is not installed, no such checkpoint, or a family that is not supported.
    """
    transformers = library()
    path = resolve(path)
    record = read_record(path)
    check_files(path)
    config = configuration(path)
    loads = pruned_class(config) if hasattr(config, "moeprune") else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what its report would say is in the sentence below
    try:
        model, told = loads.from_pretrained(path, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        from moeprune.interop.weights import OnDisk

        OnDisk(path)  # says which tensor is missing, if one is
        raise UserError(f"cannot load {path} with transformers: {_first_line(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    for name, found, wanted in sorted(told["mismatched_keys"]):
        raise UserError(f"{path}: {name} has shape {tuple(found)}, its configuration asks for {tuple(wanted)}")
    complete(path, told["missing_keys"])
    ids = record.get("expert_ids")
    if any(-1 in layer for layer in ids or []):
        ids = None  # a uniform view: its padding counts as experts
        record = {}
    return TransformersModel(model.eval().to(device), ids, record.get("n_original"))


def complete(path: Path | str, missing: Iterable[str]) -> None:
    """Check that a checkpoint has every tensor.

    Raises:
        UserError: it lacks one.
    """
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 1} more tensors" if names[1:] else ""
        raise UserError(f"{path} lacks {names[0]}{more}; complete the download")


def configuration(path: Path | str) -> Any:
    """The configuration of a checkpoint.

    Raises:
        UserError: transformers cannot read it.
    """
    try:
        return library().AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {Path(path) / 'config.json'}: {_first_line(error)}") from error


def refuse_view(path: Path | str) -> None:
    """Check that a checkpoint is no uniform view, whose padding would count as experts.

    Raises:
        UserError: it is one.
    """
    if any(-1 in layer for layer in read_record(path).get("expert_ids", [])):
        raise UserError(
            f"{path} is a uniform view, padded with experts that are never chosen; take the export without it"
        )


def _mapping(path: Path, what: str) -> dict[str, Any]:
    found = read_json(path, what)
    if not isinstance(found, dict):
        raise UserError(f"the {what} at {path} is no JSON object; fetch it again")
    return found


def library() -> Any:
    """The transformers package.

    Raises:
        UserError: it is not installed.
    """
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise UserError("transformers checkpoints need the extra [hf]: pip install 'moeprune[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def stock_class(config: Any) -> type[Any]:
    """The causal language model class of transformers for `config`."""
    transformers = library()
    cls: type[Any] = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return cls


def pruned_class(config: Any) -> type[Any]:
    """The class that holds layers of unequal size, as the modeling file of an export defines it."""
    stock = stock_class(config)
    return type(f"Pruned{stock.__name__}", (modeling_moeprune.PrunedExperts, stock), {})


def export(
    model: TransformersModel,
    path: Path,
    plans: Sequence[PrunePlan],
    source: Path | str | None = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    uniform_view: bool = False,
) -> None:
    """Write a pruned model; the folder is complete or not there.

    Args:
        model: after surgery.
        path: folder to write.
        plans: prunes so far, oldest first.
        source: checkpoint whose tokenizer and generation files come along.
        provenance: written into the record.
        overwrite: replace an existing folder.
        max_shard_size: of the safetensors files.
        uniform_view: pad unequal layers to the largest with experts that are never chosen (see uniform.py); `model` is padded.

    Raises:
        UserError: the folder exists, the disk is full, or a uniform view would not be exact.
    """
    model_folder(path, overwrite, source)
    kept = [list(layer.ids) for layer in model.moe_layers]
    if uniform_view:
        positions = uniform.pad(model)
        model = TransformersModel(model.model, positions, model.n_original)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            made = Path(scratch) / "made"
            _prepare_config(model)
            try:
                model.model.save_pretrained(made, max_shard_size=max_shard_size)
            finally:
                _restore_config(model)
            finish(model, made, plans, source, provenance, kept)
            if path.exists():
                shutil.rmtree(path)
            made.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --output"
        ) from error


def counts_of(model: TransformersModel) -> list[int]:
    """Experts per MoE layer."""
    return [layer.n_experts for layer in model.moe_layers]


def _prepare_config(model: TransformersModel) -> None:
    counts = counts_of(model)
    if len(set(counts)) == 1:
        setattr(text_config(model.config), count_field(model.config), counts[0])


def _restore_config(model: TransformersModel) -> None:
    text = text_config(model.config)
    setattr(text, count_field(model.config), model.n_original)


def finish(
    model: TransformersModel,
    folder: Path,
    plans: Sequence[PrunePlan],
    source: Path | str | None,
    provenance: dict[str, Any] | None,
    kept: Sequence[Sequence[int]],
) -> None:
    """Everything beside the weights: configuration, modeling file, record, tokenizer."""
    write_config(folder, layout(model))
    positions = [list(layer.ids) for layer in model.moe_layers]  # -1 for padding
    record = {
        "format": FORMAT,
        "n_original": model.n_original,
        "num_experts_per_layer": list(map(len, kept)),
        "expert_ids": positions,
        "plans": [plan.to_dict() for plan in plans],
        "provenance": provenance or {},
    }
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    if source is not None and Path(source).is_dir():
        for file in Path(source).iterdir():
            beside = file.suffix in (".json", ".model", ".txt", ".jinja") and not file.name.endswith(".index.json")
            if file.is_file() and beside and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)


def layout(model: TransformersModel) -> dict[str, Any]:
    """What a configuration must say of the pruned layers and of a head with a bias."""
    config = model.config
    counts = counts_of(model)
    head = {"head_bias": True} if getattr(config, "moeprune", {}).get("head_bias") else {}
    if len(set(counts)) == 1:
        found = {"count_field": count_field(config), "n_experts": counts[0], "class": stock_class(config).__name__}
        return {**found, "moeprune": head} if head else found
    layers = [
        {"n_experts": layer.n_experts, "tensors": layer.where.tensors, "attributes": layer.where.attributes}
        for layer in model.moe_layers
    ]
    return {
        "count_field": count_field(config),
        "n_experts": model.n_original,
        "num_experts_per_layer": counts,
        "class": stock_class(config).__name__,
        "moeprune": {"layers": layers, **head},
    }


def write_config(folder: Path, found: dict[str, Any]) -> None:
    """Put `layout` into a folder's config.json, and the modeling file beside it where stock code does not do."""
    data = read_json(folder / "config.json", "configuration")
    text = data.get("text_config", data)
    text[found["count_field"] if found["count_field"] in text else _spelled(text, found["count_field"])] = found[
        "n_experts"
    ]
    for key in ("num_experts_per_layer", "moeprune", "auto_map"):  # of an earlier export
        data.pop(key, None)
    if "num_experts_per_layer" in found:
        data["num_experts_per_layer"] = found["num_experts_per_layer"]
    if "moeprune" in found:
        name = f"Pruned{found['class']}"
        data |= {
            "moeprune": found["moeprune"],
            "architectures": [name],
            "auto_map": {"AutoModelForCausalLM": f"modeling_moeprune.{name}"},
        }
        code = Path(modeling_moeprune.__file__).read_text(encoding="utf-8")
        head, _, body = code.partition("from torch import nn\n")
        imports = f"from torch import nn\nfrom transformers import {found['class']}\n"
        what = f"{found['class']} as moeprune changed it."
        tail = f'\n\nclass {name}(PrunedExperts, {found["class"]}):\n    """{what}"""\n'
        write_text(folder / "modeling_moeprune.py", head + imports + body + tail)
    else:
        data["architectures"] = [found["class"]]  # not that of an earlier export with unequal layers
    write_text(folder / "config.json", json.dumps(data, indent=2) + "\n")


def _spelled(text: dict[str, Any], name: str) -> str:
    """The name under which a configuration on disk keeps the number of experts, where it is an alias of `name`."""
    from moeprune.interop.transformers import COUNTS

    return next((each for each in COUNTS if each in text), name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
