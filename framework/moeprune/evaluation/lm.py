"""A moeprune model as lm-eval sees it: `moeprune` among lm-eval's models.

    python -m moeprune.evaluation --model moeprune --model_args pretrained=runs/laep/last.ckpt --tasks ...

runs lm-eval's own command line with this class registered beside lm-eval's own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (registers lm-eval's own models; registering ours first would hide them)
import torch
from lm_eval import utils
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from moeprune import checkpoints
from moeprune.errors import UserError
from moeprune.model.transformer import MoETransformer

_FINGERPRINT = "moeprune weights"  # key of a response cache that says whose answers it holds


@register_model("moeprune")
class MoEPruneLM(TemplateLM):  # type: ignore[misc]
    """Scores requests with a moeprune model.

    Requests are sorted by length, padded on the right and masked, so that padding reaches no load statistic.

    Args:
        pretrained: a checkpoint file or exported folder, or a `Checkpoint` in memory.
        batch_size: requests per forward pass.
        max_length: longest sequence; default: what the model takes.
        device: torch device; a CUDA device falls back to the CPU where there is none (lm-eval's command line asks for
            one by default).
        max_gen_toks: longest generation, in tokens.
        rolling_context: tokens of context that each further window of a long text sees (lm-eval's own models use 1).

    Raises:
        UserError: a checkpoint that cannot be read or holds no tokenizer.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Path | checkpoints.Checkpoint,
        batch_size: int | str | None = 16,
        max_length: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 64,
        rolling_context: int = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._name = "in memory" if isinstance(pretrained, checkpoints.Checkpoint) else str(pretrained)
        checkpoint = pretrained if isinstance(pretrained, checkpoints.Checkpoint) else checkpoints.read(pretrained)
        if not checkpoint.tokenizer:
            raise UserError(
                f"the checkpoint {self._name} holds no tokenizer; train it with moeprune, or add tokenizer.json"
            )
        self.tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
        self._device = _device(device)
        self.model: MoETransformer = checkpoint.model().to(self._device)
        self.fingerprint = checkpoints.fingerprint(checkpoint.state)
        self._batch_size = 16 if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        if self._batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self._max_length = int(max_length or checkpoint.config.max_seq_len)
        self.max_gen_toks, self.rolling_context = int(max_gen_toks), int(rolling_context)
        end = self.tokenizer.token_to_id("<|endoftext|>")
        self._end = 0 if end is None else int(end)

    @property
    def eot_token_id(self) -> int:
        """End of text, which also stands before a text without context."""
        return self._end

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """Distinct for distinct tokenizers, as lm-eval's prompt cache needs."""
        return f"moeprune-{hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:12]}"

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the `config` of lm-eval's results."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.model.head.weight.dtype),
            "weights_sha256": self.fingerprint,
            "num_experts_per_layer": [layer.n_experts for layer in self.model.moe_layers],
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """lm-eval keys its response cache by request only; a cache that holds another model's answers is refused.

        Raises:
            UserError: the cache belongs to other weights, or to an unknown model.
        """
        answers = getattr(cache_hook, "dbdict", None)
        if answers is not None:
            if _FINGERPRINT not in answers and len(answers) == 0:
                answers[_FINGERPRINT] = self.fingerprint
            if answers.get(_FINGERPRINT) != self.fingerprint:
                raise UserError(
                    f"the response cache {answers.filename} holds answers of another model; give each model its own "
                    f"--use_cache path"
                )
        super().set_cache_hook(cache_hook)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; no special tokens are ever added."""
        return list(self.tokenizer.encode(string, add_special_tokens=False).ids)

    @torch.inference_mode()
    def _log_probs(self, rows: list[list[int]]) -> Tensor:
        """[B, S, V] float32, rows padded on the right."""
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self._end, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        logits: Tensor = self.model(tokens.to(self._device), mask.to(self._device))
        return logits.float().log_softmax(-1).cpu()

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) per request.

        Requests that share a context and differ in one final token share a forward pass (lm-eval's Collator).
        """
        limit = self.max_length
        for key, context, continuation in requests:
            if not context or not continuation or len(continuation) > limit:
                raise UserError(
                    f"a request has {len(context)} context and {len(continuation)} continuation tokens, the model takes "
                    f"1 to {limit}: {str(key)[:80]!r}"
                )
        collator = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[-2] + request[-1][:-1],
        )
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="requests")
        answers = []
        for chunk in collator.get_batched(n=self._batch_size):
            rows = [(context + continuation)[-(limit + 1) :][:-1] for _, context, continuation in chunk]
            log_probs = self._log_probs(rows)
            for (key, context, continuation), row, scores in zip(chunk, rows, log_probs, strict=True):
                for request, tokens, shared in collator.get_cache(
                    req_str=key, cxt_toks=context, cont_toks=continuation, logits=scores[: len(row)][None]
                ):
                    target = torch.tensor(tokens)[None]
                    own = shared[:, -len(tokens) :]  # requests that share a pass may split its tokens differently
                    picked = own.gather(2, target[..., None])[..., 0]
                    answer = (float(picked.sum()), bool((own.argmax(-1) == target).all()))
                    answers.append(answer)
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, answer)
            bar.update(len(answers) - bar.n)
        bar.close()
        return list(collator.get_original(answers))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        numbers = []
        for (text,) in (request.args for request in requests):
            parts = [
                (None, *utils.make_disjoint_window(pair))
                for pair in utils.get_rolling_token_windows(
                    self.tok_encode(text),
                    prefix_token=self._end,
                    max_seq_len=self.max_length,
                    context_len=self.rolling_context,
                )
            ]
            windows += parts
            numbers.append(len(parts))
        scores = iter([score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)])
        totals = []
        for request, number in zip(requests, numbers, strict=True):
            total = sum(next(scores) for _ in range(number))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation up to a stop string, the end of text or `max_gen_toks`."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        room = min(int(options.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1)
        ids = self.tok_encode(context)[-(self.max_length - room) :] or [self._end]
        new: list[int] = []
        text = ""
        for _ in range(room):
            token = int(self._log_probs([ids + new])[0, -1].argmax())
            if token == self._end:
                break
            new.append(token)
            text = self.tokenizer.decode(new)
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop)[0]
        self.cache_hook.add_partial("generate_until", (context, options), text)
        return text


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r}; give cpu, cuda or cuda:0") from error
    return torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device
