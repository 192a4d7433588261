"""moeprune's own models to and from transformers: weights by name, nothing computed anew.

    moeprune's model             transformers
    qk_norm: none                Mixtral (whose router always divides the chosen probabilities by their sum)
    qk_norm: head                Qwen3-MoE
    qk_norm: full                OLMoE (heads of width d_model / n_heads)

Everything else of a configuration that either side could not compute is refused. The original ids of the experts, the plans,
the training data and the step go through `moeprune.json`. A bias of the output head has no place in these families: if it is not
zero, the modeling file saved beside the weights holds it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moeprune import checkpoints
from moeprune.checkpoints import END_OF_TEXT, Checkpoint
from moeprune.errors import UserError
from moeprune.files import read_json, write_text
from moeprune.interop import checkpoint as interop
from moeprune.interop.transformers import COUNTS, TransformersModel, count_field, on_meta
from moeprune.model.config import MoEConfig, QKNorm
from moeprune.pruning.plan import PrunePlan

FAMILIES: dict[QKNorm, str] = {"none": "mixtral", "head": "qwen3_moe", "full": "olmoe"}  # qk_norm -> model type
KNOWN = ", ".join(sorted(FAMILIES.values()))
PLAIN: dict[
    str, Any
] = {  # fields of a configuration, and the value without which the model computes something else than ours
    "attention_bias": False,
    "sliding_window": None,
    "clip_qkv": None,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
ELSEWHERE = {  # why a model of another type has no counterpart: field -> what it stands for
    "shared_expert_intermediate_size": "shared experts",
    "n_shared_experts": "shared experts",
    "num_shared_experts": "shared experts",
    "moe_num_shared_experts": "shared experts",
    "shared_intermediate_size": "shared experts",
    "first_k_dense_replace": "dense layers",
    "num_dense_layers": "dense layers",
    "topk_method": "a router with a bias or groups",
    "scoring_func": "another router",
}


def read(path: Path | str, weights: bool = True) -> Checkpoint:
    """Any checkpoint as moeprune's own: a file of a run, an exported folder, or a transformers folder or hub name.

    Args:
        path: of it.
        weights: False for everything but the weights.

    Raises:
        UserError: there is none, it is corrupt, or a model that ours is not.
    """
    if not interop.is_transformers(path):
        return checkpoints.read(path, weights)
    folder = interop.resolve(path)
    return from_transformers(folder) if weights else _described(folder)


def from_transformers(source: Path | str | Any) -> Checkpoint:
    """A transformers model as moeprune's own, in float32.

    Args:
        source: a folder, a hub name, or a model in memory (with which the checkpoint may share tensors, and which brings no
            tokenizer).

    Raises:
        UserError: see `read`; the field of the configuration that ours has not is named with its value.
    """
    if isinstance(source, Path | str):
        folder = interop.resolve(source)
        checkpoint = _described(folder)
        model = interop.load(folder, torch.float32)
    else:
        model = source if isinstance(source, TransformersModel) else TransformersModel(source)
        ids = [list(layer.ids) for layer in model.moe_layers]
        checkpoint = Checkpoint(_sizes(model.config, model.n_original, "the model"), ids, {})
    found: dict[str, Tensor] = dict(model.model.state_dict())
    config = checkpoint.config
    if config.tied_embeddings:
        found.pop("lm_head.weight", None)
    try:
        for name, parts in _names(config):
            tensors = [found.pop(part).float() for part in parts]
            checkpoint.state[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    except KeyError as error:
        raise UserError(
            f"the model has no tensor {error}; its transformers version differs from what is known"
        ) from error
    if found:
        raise UserError(f"moeprune's own model has no place for the tensor {min(found)}; prune it as it is")
    if config.head_bias:
        weight = checkpoint.state["head.weight"]
        checkpoint.state |= {"head.weight": weight[:, :-1].contiguous(), "head.bias": weight[:, -1].contiguous()}
    for layer, kept in enumerate(checkpoint.expert_ids):
        checkpoint.state[f"blocks.{layer}.moe.expert_ids"] = torch.tensor(kept)
    return checkpoint


@torch.no_grad()
def to_transformers(checkpoint: Checkpoint) -> TransformersModel:
    """A transformers model that computes what moeprune's own does, in float32 and evaluation mode.

    Raises:
        UserError: it computes something that the three families do not; what is named.
    """
    own, ids = checkpoint.config, checkpoint.expert_ids
    state = dict(checkpoint.state)
    bias = state.pop("head.bias", None)
    biased = bias is not None and bool(bias.any())
    config = _configuration(checkpoint, tied=own.tied_embeddings and not biased)
    if biased:
        config.moeprune = {"head_bias": True}
    layout = interop.layout(TransformersModel(on_meta(config), ids, own.n_experts))
    setattr(config, count_field(config), layout["n_experts"])
    if "moeprune" in layout:
        config.moeprune = layout["moeprune"]
    cls = interop.pruned_class(config) if "moeprune" in layout else interop.stock_class(config)
    with torch.random.fork_rng(devices=[]):
        model = cls(config).eval()
    if own.tied_embeddings:
        state["head.weight"] = state["embedding.weight"]
    if biased:
        assert bias is not None
        state["head.weight"] = torch.cat([state["head.weight"], bias[:, None]], 1)
    head = own.head_width
    made: dict[str, Tensor] = {}
    for name, parts in _names(own, with_head=True):
        sizes = [own.n_heads * head, own.kv_heads * head, own.kv_heads * head] if len(parts) > 1 else [len(state[name])]
        made |= dict(zip(parts, torch.split(state[name], sizes), strict=True))
    try:
        model.load_state_dict(made)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its own configuration: {str(error)[:200]}") from error
    return TransformersModel(model, ids, own.n_experts)


def export(checkpoint: Checkpoint, path: Path, overwrite: bool = False, source: Path | str | None = None) -> list[str]:
    """Write moeprune's own model as a transformers folder, complete or not there.

    Args:
        checkpoint: the model.
        path: folder to write.
        overwrite: replace an existing folder.
        source: where the model came from, for the record.

    Returns:
        Why it takes `trust_remote_code=True` to load it; nothing where stock transformers does.

    Raises:
        UserError: see `to_transformers`; the folder exists, or cannot be written.
    """
    model = to_transformers(checkpoint)
    trained = {"data": checkpoint.data, "step": checkpoint.step, "end_of_text": checkpoint.end_of_text}
    with tempfile.TemporaryDirectory() as scratch:
        if checkpoint.tokenizer:
            options = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": checkpoint.end_of_text,
                "model_max_length": checkpoint.config.max_seq_len,
                "clean_up_tokenization_spaces": False,
            }
            write_text(Path(scratch) / "tokenizer.json", checkpoint.tokenizer)
            write_text(Path(scratch) / "tokenizer_config.json", json.dumps(options, indent=2) + "\n")
        provenance = {"model": str(source or ""), "trained": trained}
        interop.export(model, path, checkpoint.plans, Path(scratch), provenance, overwrite)
    changed = getattr(model.config, "moeprune", {})
    reasons = {"layers": "layers of unequal size", "head_bias": "the bias of the output head"}
    return [reason for key, reason in reasons.items() if key in changed]


def read_tokenizer(path: Path | str) -> tuple[str, str]:
    """A tokenizer as JSON of the `tokenizers` library, without padding and truncation, and its end-of-text token.

    Args:
        path: a tokenizer.json, or a checkpoint of any form that holds one.

    Returns:
        ("", ...) for a checkpoint without tokenizer. The end-of-text token is `<|endoftext|>` where the tokenizer has that,
        else the end-of-sequence token that the files beside it name; "" if they name none.

    Raises:
        UserError: there is no such file, or no tokenizer in it.
    """
    path = Path(path)
    if path.suffix != ".json" and not interop.is_transformers(path):
        own = checkpoints.read(path, weights=False)
        return own.tokenizer, own.end_of_text
    file = path if path.suffix == ".json" else interop.resolve(path) / "tokenizer.json"
    if not file.exists() and path.suffix != ".json":
        return "", ""
    text = _tokenizer(file)
    if parsed(text).token_to_id(END_OF_TEXT) is not None:
        return text, END_OF_TEXT
    end = _beside(file, "tokenizer_config.json").get("eos_token")
    if isinstance(end, Mapping):
        end = end.get("content")
    if end is None:
        number = _beside(file, "config.json").get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        end = parsed(text).id_to_token(number) if isinstance(number, int) else None
    return text, str(end or "")


@lru_cache(maxsize=2)
def parsed(tokenizer: str) -> Tokenizer:
    """The tokenizer of a JSON text; large ones take a second, so the last two are kept. Not to be changed."""
    return Tokenizer.from_str(tokenizer)


@lru_cache(maxsize=2)
def _last_id(tokenizer: str) -> int:
    return max(parsed(tokenizer).get_vocab().values())


def check_vocabulary(tokenizer: str, vocab_size: int, where: str) -> None:
    """Check that a tokenizer gives no id beyond a model's embedding.

    Args:
        tokenizer: JSON.
        vocab_size: rows of the embedding.
        where: names the tokenizer.

    Raises:
        UserError: it does.
    """
    last = _last_id(tokenizer)
    if last >= vocab_size:
        raise UserError(
            f"the tokenizer of {where} gives ids up to {last} ({parsed(tokenizer).id_to_token(last)!r}), beyond the {vocab_size} of the model's embedding; "
            f"take the model's own tokenizer, or for a new model a larger vocab_size"
        )


def _tokenizer(file: Path) -> str:
    data = read_json(file, "tokenizer")
    try:
        text = file.read_text(encoding="utf-8")
        if data.get("truncation") or data.get("padding"):
            text = json.dumps({**data, "truncation": None, "padding": None}, ensure_ascii=False)
        parsed(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{file} is no tokenizer of the tokenizers library ({str(error)[:100]})") from error
    return text


def _beside(file: Path, name: str) -> dict[str, Any]:
    other = file.with_name(name)
    data = read_json(other, name) if other.exists() else {}
    return data if isinstance(data, dict) else {}


def _described(folder: Path) -> Checkpoint:
    """A transformers folder without its weights."""
    transformers = interop.library()
    record = interop.read_record(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {str(error).partition(chr(10))[0]}") from error
    _check(config, str(folder))
    n_original = record.get("n_original") or getattr(config, count_field(config))
    sizes = _sizes(config, n_original, str(folder))
    ids = record.get("expert_ids") or [list(range(n_original))] * sizes.n_layers
    if any(-1 in layer for layer in ids):
        raise UserError(
            f"{folder} is a uniform view, padded with experts that are never chosen; take the export without it"
        )
    text, end = read_tokenizer(folder)
    if text:
        check_vocabulary(text, sizes.vocab_size, str(folder))
    trained = record.get("provenance", {}).get("trained", {})
    return Checkpoint(
        sizes,
        [list(layer) for layer in ids],
        {},
        [PrunePlan.from_dict(plan) for plan in record.get("plans", [])],
        text,
        trained.get("data", {}),
        trained.get("step", 0),
        trained.get("end_of_text") or end or END_OF_TEXT,
    )


def _names(config: MoEConfig, with_head: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(own name, transformers' names of what lies one after the other in it) of every tensor; of the head, also if tied."""
    yield "embedding.weight", ["model.embed_tokens.weight"]
    for i in range(config.n_layers):
        own, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{own}.attention_norm.weight", [f"{theirs}.input_layernorm.weight"]
        yield f"{own}.attention.qkv.weight", [f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"]
        if config.qk_norm != "none":
            for x in "qk":
                yield f"{own}.attention.{x}_norm.weight", [f"{theirs}.self_attn.{x}_norm.weight"]
        yield f"{own}.attention.out.weight", [f"{theirs}.self_attn.o_proj.weight"]
        yield f"{own}.moe_norm.weight", [f"{theirs}.post_attention_layernorm.weight"]
        yield f"{own}.moe.router.weight", [f"{theirs}.mlp.gate.weight"]
        yield f"{own}.moe.experts.gate_up", [f"{theirs}.mlp.experts.gate_up_proj"]
        yield f"{own}.moe.experts.down", [f"{theirs}.mlp.experts.down_proj"]
    yield "norm.weight", ["model.norm.weight"]
    if with_head or not config.tied_embeddings:
        yield "head.weight", ["lm_head.weight"]


def _configuration(checkpoint: Checkpoint, tied: bool) -> Any:
    """The transformers configuration of moeprune's own model, for its full number of experts.

    Raises:
        UserError: see `to_transformers`.
    """
    own = checkpoint.config
    family = FAMILIES[own.qk_norm]
    options = {"renormalize": True, "selection_bias": False, **own.router_options}
    where = f"model.config.router={own.router}"
    if own.router != "softmax":
        raise UserError(f"{where} has no form in transformers' {KNOWN}, which route by softmax over a linear map")
    if options["selection_bias"]:
        raise UserError(
            f"{where} with selection_bias has no form in transformers' {KNOWN}: none has a bias on the choice"
        )
    if own.attention != "standard":
        raise UserError(f"model.config.attention={own.attention} has no form in transformers' {KNOWN}")
    if family == "mixtral" and not options["renormalize"]:
        raise UserError(
            f"{where} with renormalize: false and qk_norm: none has no form in transformers: mixtral divides the chosen "
            f"probabilities by their sum; qwen3_moe and olmoe need not, but have qk_norm: head and full"
        )
    if family == "olmoe" and own.head_width * own.n_heads != own.d_model:
        raise UserError(
            f"model.config.head_dim={own.head_dim} with qk_norm: full has no form in transformers: olmoe has heads of width "
            f"d_model / n_heads"
        )
    end = parsed(checkpoint.tokenizer).token_to_id(checkpoint.end_of_text) if checkpoint.tokenizer else None
    width = {"moe_intermediate_size": own.d_expert} if family == "qwen3_moe" else {}
    return interop.library().CONFIG_MAPPING[family](
        vocab_size=own.vocab_size,
        hidden_size=own.d_model,
        num_hidden_layers=own.n_layers,
        num_attention_heads=own.n_heads,
        num_key_value_heads=own.kv_heads,
        intermediate_size=own.d_expert,
        num_experts_per_tok=own.top_k,
        max_position_embeddings=own.max_seq_len,
        rms_norm_eps=own.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": own.rope_theta},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
        dtype="float32",
        **{"num_local_experts" if family == "mixtral" else "num_experts": own.n_experts},
        **({} if family == "olmoe" else {"head_dim": own.head_width}),
        **({} if family == "mixtral" else {"norm_topk_prob": options["renormalize"]}),
        **width,
    )


def _check(config: Any, where: str) -> None:
    """Check that moeprune's own model computes what `config` describes.

    Raises:
        UserError: it does not; field and value are named.
    """
    if config.model_type not in FAMILIES.values():
        found = [
            f"{name}={getattr(config, name)} ({what})" for name, what in ELSEWHERE.items() if getattr(config, name, 0)
        ]
        if not any(getattr(config, name, 0) for name in COUNTS):
            found = ["no experts"]
        told = f", with {found[0]}" if found else ""
        raise UserError(
            f"{where} is of model_type={config.model_type!r}{told}, which moeprune's own model has not (it is like {KNOWN}); "
            f"prune it as it is with `moeprune prune`"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    values = {name: getattr(config, name, value) for name, value in PLAIN.items()}
    values["partial_rotary_factor"] = rope.get("partial_rotary_factor", values["partial_rotary_factor"])
    odd = {name: value for name, value in values.items() if value is not None and value != PLAIN[name]}
    if config.hidden_act not in ("silu", "swish"):
        odd["hidden_act"] = config.hidden_act
    if rope.get("rope_type", "default") != "default":
        odd["rope_type"] = rope["rope_type"]
    if odd:
        name, value = next(iter(odd.items()))
        raise UserError(
            f"{where} has {name}={value!r}, which moeprune's own model has not; prune it as it is with `moeprune prune`"
        )


def _sizes(config: Any, n_original: int, where: str) -> MoEConfig:
    """Sizes of a transformers model of the three families."""
    _check(config, where)
    family = config.model_type
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    renormalize = family == "mixtral" or config.norm_topk_prob
    return MoEConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=None if kv == heads else kv,
        n_experts=n_original,
        top_k=config.num_experts_per_tok,
        d_expert=config.moe_intermediate_size if family == "qwen3_moe" else config.intermediate_size,
        max_seq_len=config.max_position_embeddings,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        router_options={} if renormalize else {"renormalize": False},
        head_dim=None if width * heads == config.hidden_size else width,
        qk_norm=next(norm for norm, name in FAMILIES.items() if name == family),
        head_bias=bool(getattr(config, "moeprune", {}).get("head_bias")),
        tied_embeddings=config.tie_word_embeddings,
    )
