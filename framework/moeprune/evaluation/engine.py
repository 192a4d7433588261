"""What `MoEPruneLM` asks of a model: tokens, logits, text. One engine for moeprune's own models, one for transformers'."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils import configure_pad_token, has_bos_prefix, resolve_max_length
from tokenizers import Tokenizer
from torch import Tensor, nn

from moeprune import checkpoints
from moeprune.errors import UserError
from moeprune.interop import checkpoint as interop
from moeprune.interop.transformers import TransformersModel
from moeprune.model.transformer import MoETransformer

Source = str | Path | checkpoints.Checkpoint | TransformersModel


class Engine(ABC):
    """A model with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    max_length: int  # longest sequence, in tokens
    end: int  # end of text
    prefix: int  # stands before a text without context
    padding: int  # fills short rows on the right
    windows_in_order: bool  # whether windows of long texts are batched as they come, as `hf` does, or sorted by length

    @abstractmethod
    def encode(self, text: str, special: bool | None) -> list[int]:
        """Token ids; `special` adds special tokens or leaves them out, None does what the tokenizer does."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""

    @abstractmethod
    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, S, V] from tokens [B, S] and mask [B, S] bool, False for padding, which is on the right."""

    @abstractmethod
    def generate(self, contexts: Sequence[str], until: list[str], room: int, options: dict[str, Any]) -> list[str]:
        """Continuations of at most `room` tokens, which may go on behind a stop string; `options` as for `hf`."""

    @abstractmethod
    def describe_tokenizer(self) -> str:
        """Distinct for distinct tokenizers."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the weights."""
        return checkpoints.fingerprint(self.model.state_dict())

    @property
    @abstractmethod
    def experts(self) -> list[int]:
        """Experts per MoE layer."""

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The messages as one prompt.

        Raises:
            UserError: there is no chat template.
        """
        raise UserError("a moeprune checkpoint has no chat template; leave out --apply_chat_template")


class Own(Engine):
    """A model of moeprune. Padding is masked, so that it reaches no load statistic; no special tokens are ever added.

    Args:
        checkpoint: weights and tokenizer.
        name: for messages.
        device: where to score.

    Raises:
        UserError: the checkpoint holds no tokenizer.
    """

    windows_in_order = False

    def __init__(self, checkpoint: checkpoints.Checkpoint, name: str, device: torch.device) -> None:
        if not checkpoint.tokenizer:
            raise UserError(f"the checkpoint {name} holds no tokenizer; train it with moeprune, or add tokenizer.json")
        self.tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
        self.model: MoETransformer = checkpoint.model().to(device)
        self.device, self.max_length = device, checkpoint.config.max_seq_len
        end = self.tokenizer.token_to_id(checkpoint.end_of_text)
        self.end = self.prefix = self.padding = 0 if end is None else int(end)

    def encode(self, text: str, special: bool | None) -> list[int]:
        """See `Engine`."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See `Engine`."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Engine`."""
        logits: Tensor = self.model(tokens, mask)
        return logits

    def generate(self, contexts: Sequence[str], until: list[str], room: int, options: dict[str, Any]) -> list[str]:
        """See `Engine`; greedy only.

        Raises:
            UserError: sampling was asked for.
        """
        if options.get("do_sample"):
            raise UserError("a moeprune checkpoint continues text greedily only; leave out do_sample and temperature")
        return [self._greedy(self.encode(context, None), until, room) for context in contexts]

    def _greedy(self, context: list[int], until: list[str], room: int) -> str:
        ids = context[-(self.max_length - room) :] or [self.prefix]
        new: list[int] = []
        for _ in range(room):
            tokens = torch.tensor([ids + new], device=self.device)
            token = int(self.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1].argmax())
            if token == self.end:
                break
            new.append(token)
            if any(stop in self.decode(new) for stop in until if stop):
                break
        return self.decode(new)

    def describe_tokenizer(self) -> str:
        """See `Engine`."""
        return str(self.tokenizer.to_str())

    @property
    def experts(self) -> list[int]:
        """See `Engine`."""
        return [layer.n_experts for layer in self.model.moe_layers]


class Transformers(Engine):
    """A transformers model, called exactly as lm-eval's own `hf` calls it: right padding without a mask, which no token
    before it sees; generation through the model's `generate`.

    Args:
        source: loaded by `moeprune.interop`.
        tokenizer: of transformers, or the folder or hub name of one.
        add_bos_token: whether texts begin with the beginning-of-sequence token; None: as the tokenizer says.

    Raises:
        UserError: no tokenizer.
    """

    windows_in_order = True
    padding = 0

    def __init__(self, source: TransformersModel, tokenizer: Any, add_bos_token: bool | None = None) -> None:
        if isinstance(tokenizer, str | Path):
            tokenizer = _tokenizer(tokenizer, add_bos_token)
        self.source, self.model, self.add_bos_token = source, source.model.eval(), add_bos_token
        self.device = source.device
        self.tokenizer = configure_pad_token(tokenizer, model_config=self.model.config)
        self.max_length = resolve_max_length(self.model.config, self.tokenizer)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is None and bos is None:
            raise UserError(
                "the tokenizer has neither an end-of-text nor a beginning-of-text token, so a text without context "
                "cannot be scored; set eos_token in tokenizer_config.json"
            )
        self.end = bos if eos is None else eos
        self.prefix = eos if bos is None else bos

    def encode(self, text: str, special: bool | None) -> list[int]:
        """See `Engine`."""
        if special is None and has_bos_prefix(text, self.tokenizer.decode(self.prefix)):
            special = False
        elif special is None:
            special = self.add_bos_token
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(text, **options))

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See `Engine`."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `Engine`."""
        logits: Tensor = self.model(tokens).logits
        return logits

    def generate(self, contexts: Sequence[str], until: list[str], room: int, options: dict[str, Any]) -> list[str]:
        """See `Engine`; contexts are padded on the left and cut there to what leaves `room`."""
        from lm_eval.models.utils_hf import stop_sequences_criteria

        special: dict[str, Any] = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        if has_bos_prefix(contexts[0], self.tokenizer.bos_token):
            special = {"add_special_tokens": False}
        rows = self.tokenizer(list(contexts), padding="longest", padding_side="left", return_tensors="pt", **special)
        kept = self.max_length - room
        tokens = rows["input_ids"][:, -kept:].to(self.device)
        mask = rows["attention_mask"][:, -kept:].to(self.device)
        length = options.pop("max_length", tokens.shape[1] + room)
        if not options.get("do_sample"):
            options = {key: value for key, value in options.items() if key != "temperature"} | {"do_sample": False}
        made = self.model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=mask,
            max_length=length,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, tokens.shape[1], len(tokens)),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **options,
        )
        return [self.decode(row[tokens.shape[1] :]) for row in made.tolist()]

    def describe_tokenizer(self) -> str:
        """See `Engine`."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = self.tokenizer.name_or_path if backend is None else backend.to_str()
        return f"{text}{self.tokenizer.chat_template or ''}{self.add_bos_token}"

    @property
    def experts(self) -> list[int]:
        """See `Engine`."""
        return [layer.n_experts for layer in self.source.moe_layers]

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """See `Engine`; a template that knows no system role gets the messages without it, as for `hf`."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; leave out --apply_chat_template")
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError:
            users = [message for message in messages if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(users, **options))


def engine(
    source: Source,
    device: torch.device,
    dtype: str = "auto",
    tokenizer: Any = None,
    add_bos_token: bool | None = None,
) -> Engine:
    """The engine of a model on disk or in memory.

    Args:
        source: a moeprune checkpoint file, a folder, the hub name of a transformers model, or a model in memory.
        device: where to score.
        dtype: of a transformers model's weights: auto, float32, bfloat16, ...
        tokenizer: for a transformers model; by default the one in its folder.
        add_bos_token: see `Transformers`.

    Raises:
        UserError: what cannot be read, and why.
    """
    if isinstance(source, checkpoints.Checkpoint):
        return Own(source, "in memory", device)
    if isinstance(source, TransformersModel):
        tokenizer = tokenizer or source.model.name_or_path
        if not tokenizer:
            raise UserError(
                "a transformers model in memory comes without a tokenizer; give tokenizer=FOLDER or an object"
            )
        source.model.to(device)
        return Transformers(source, tokenizer, add_bos_token)
    if not interop.is_transformers(source):
        return Own(checkpoints.read(source), str(source), device)
    interop.library().utils.logging.set_verbosity_error()
    if isinstance(tokenizer, str | Path) or tokenizer is None:
        tokenizer = _tokenizer(tokenizer or source, add_bos_token)  # before the weights, which take minutes
    return Transformers(interop.load(source, _dtype(dtype), str(device)), tokenizer, add_bos_token)


def tokenizer_folder(source: Source, scratch: Path) -> str:
    """Folder or hub name from which transformers' AutoTokenizer loads the model's tokenizer; where there is none, it is written
    to `scratch`.
    """
    if isinstance(source, TransformersModel):
        return str(source.model.name_or_path)
    if not isinstance(source, checkpoints.Checkpoint) and interop.is_transformers(source):
        return str(source)
    checkpoint = source if isinstance(source, checkpoints.Checkpoint) else checkpoints.read(source)
    fast = interop.library().PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(checkpoint.tokenizer))
    fast.save_pretrained(scratch)
    return str(scratch)


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tokenizer(where: str | Path, add_bos_token: bool | None) -> Any:
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    try:
        made = interop.library().AutoTokenizer.from_pretrained(where, **options)
        why = "" if made.encode("a word", add_special_tokens=False) else "its vocabulary is empty"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
    if why:
        raise UserError(
            f"cannot load a tokenizer from {where} ({why}); copy the tokenizer files of the model it was made from into that folder"
        )
    return made


def _dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"there is no dtype {name!r}; give auto, float32, bfloat16 or float16")
    return found
