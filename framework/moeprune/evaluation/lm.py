"""A model as lm-eval sees it: `moeprune` among lm-eval's models.

    python -m moeprune.evaluation --model moeprune --model_args pretrained=pruned/ --tasks ...

runs lm-eval's own command line with this class registered beside lm-eval's own. It scores moeprune's checkpoints and transformers
checkpoints, pruned or not; on the latter it gives the same answers as lm-eval's `hf`.
"""

from __future__ import annotations

from typing import Any

import lm_eval.models  # noqa: F401  (registers lm-eval's own models; registering ours first would hide them)
import torch
from lm_eval import utils
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm

from moeprune import checkpoints
from moeprune.errors import UserError
from moeprune.evaluation.engine import Engine, Own, Source, digest, engine
from moeprune.evaluation.score import LONGEST_ANSWER
from moeprune.evaluation.shared import log_likelihoods
from moeprune.interop.transformers import TransformersModel

_FINGERPRINT = "moeprune weights"  # key of a response cache that says whose answers it holds


@register_model("moeprune")
class MoEPruneLM(TemplateLM):  # type: ignore[misc]
    """Scores requests with a moeprune model or a transformers model.

    Requests are sorted by length and padded on the right. Log-probabilities are float32 whatever the weights are.

    Args:
        pretrained: a checkpoint file, an exported folder, a folder or hub name of a transformers checkpoint, or a `Checkpoint`
            or `TransformersModel` in memory.
        batch_size: requests per forward pass; `auto` is 16.
        max_length: longest sequence; default: what the model takes.
        device: torch device; a CUDA device falls back to the CPU where there is none (lm-eval's command line asks for
            one by default).
        max_gen_toks: longest generation, in tokens, where a task says nothing; default: 256, or half of `max_length` if that
            is less.
        rolling_context: tokens of context that each further window of a long text sees (lm-eval's own models use 1).
        dtype: of a transformers model's weights; `auto` takes the checkpoint's.
        tokenizer: of transformers, or its folder, for a transformers model whose folder holds none.
        add_bos_token: whether a transformers model's texts begin with its beginning-of-sequence token; default: as its
            tokenizer says.
        think_end_token: text that ends a reasoning model's thoughts; what comes before it is no part of an answer.
        max_batch_size: ignored; lm-eval's command line gives it.

    Raises:
        UserError: a checkpoint that cannot be read or holds no tokenizer.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Source,
        batch_size: int | str | None = 16,
        max_length: int | None = None,
        device: str | None = None,
        max_gen_toks: int | None = None,
        rolling_context: int = 1,
        dtype: str = "auto",
        tokenizer: Any = None,
        add_bos_token: bool | None = None,
        think_end_token: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        memory = isinstance(pretrained, checkpoints.Checkpoint | TransformersModel)
        self._name = "in memory" if memory else str(pretrained)
        self.engine: Engine = engine(pretrained, _device(device), dtype, tokenizer, add_bos_token)
        self._device = self.engine.device
        self._batch_size = 16 if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        if self._batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self._max_length = int(max_length or self.engine.max_length)
        if isinstance(self.engine, Own) and self._max_length > self.engine.max_length:
            raise UserError(
                f"max_length must be at most the {self.engine.max_length} of {self._name}, got {max_length}"
            )
        self.engine.max_length = self._max_length
        self.max_gen_toks = int(max_gen_toks or min(LONGEST_ANSWER, self._max_length // 2))
        self.rolling_context, self.think_end_token = int(rolling_context), think_end_token

    @property
    def model(self) -> Any:
        """The torch module."""
        return self.engine.model

    @property
    def tokenizer(self) -> Any:
        """The engine's."""
        return self.engine.tokenizer

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights."""
        return self.engine.fingerprint

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.engine.end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.engine.prefix

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return self._max_length

    @property
    def batch_size(self) -> int:
        """Requests per forward pass."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """Distinct for distinct tokenizers, as lm-eval's prompt cache needs."""
        return f"moeprune-{digest(self.engine.describe_tokenizer())}"

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the `config` of lm-eval's results."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(next(self.model.parameters()).dtype),
            "weights_sha256": self.fingerprint,
            "num_experts_per_layer": self.engine.experts,
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
        """Token ids."""
        return self.engine.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one prompt."""
        return self.engine.chat(chat_history, add_generation_prompt)

    @torch.inference_mode()
    def _logits(self, rows: list[list[int]]) -> Tensor:
        """[B, S, V] on the device, rows padded on the right."""
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self.engine.padding, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        return self.engine.logits(tokens.to(self._device), mask.to(self._device))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) per request.

        Of moeprune's own models whatever requests share is computed once (`shared.py`). With transformers models those that share a
        context and differ in one final token share a forward pass (lm-eval's Collator), as with `hf`.
        """
        limit = self.max_length
        for key, context, continuation in requests:
            if not context or not continuation or len(continuation) > limit:
                raise UserError(
                    f"a request has {len(context)} context and {len(continuation)} continuation tokens, the model takes "
                    f"1 to {limit}: {str(key)[:80]!r}"
                )
        if isinstance(self.engine, Own):
            return self._own(self.engine, requests, disable_tqdm)
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
            for (key, context, continuation), row, logits in zip(chunk, rows, self._logits(rows), strict=True):
                asked = logits[len(row) - len(continuation) : len(row)].float().log_softmax(-1)
                for request, tokens, shared in collator.get_cache(
                    req_str=key, cxt_toks=context, cont_toks=continuation, logits=asked[None]
                ):
                    target = torch.tensor(tokens, device=self._device)[None]
                    own = shared[:, -len(tokens) :]  # requests that share a pass may split its tokens differently
                    picked = own.gather(2, target[..., None])[..., 0]
                    answer = (float(picked.sum()), bool((own.argmax(-1) == target).all()))
                    answers.append(answer)
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, answer)
            bar.update(len(answers) - bar.n)
        bar.close()
        return list(collator.get_original(answers))

    def _own(
        self, engine: Own, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        asked = [
            (tuple((context + continuation)[-(self.max_length + 1) :][:-1]), tuple(continuation))
            for _, context, continuation in requests
        ]
        answers = [(0.0, False)] * len(requests)
        greedy = any(key is not None for key, _, _ in requests)  # windows of long texts have no key
        scored = log_likelihoods(engine.model, asked, self._batch_size, engine.padding, greedy)
        for index, value, hit in tqdm(scored, total=len(requests), disable=disable_tqdm, desc="requests"):
            answers[index] = (value, hit)
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length`."""
        windows: list[tuple[None, list[int], list[int]]] = []
        numbers = []
        for (text,) in (request.args for request in requests):
            parts = [
                (None, *utils.make_disjoint_window(pair))
                for pair in utils.get_rolling_token_windows(
                    self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=self.rolling_context,
                )
            ]
            windows += parts
            numbers.append(len(parts))
        together = self._batch_size if self.engine.windows_in_order else max(1, len(windows))
        answers: list[tuple[float, bool]] = []
        for start in tqdm(range(0, len(windows), together), disable=disable_tqdm, desc="batches of windows"):
            answers += self._loglikelihood_tokens(windows[start : start + together], disable_tqdm=True)
        scores = iter([score for score, _ in answers])
        totals = []
        for request, number in zip(requests, numbers, strict=True):
            total = float(sum(next(scores) for _ in range(number)))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, the end of text or `max_gen_toks`; greedy unless a task samples.

        Raises:
            UserError: `max_gen_toks` leaves no room for a prompt.
        """
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        end = self.engine.decode([self.engine.end], skip_special_tokens=False)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generations")
        answers = []
        for chunk in collator.get_batched(n=self._batch_size):
            asked = chunk[0][1]
            options = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            until = handle_stop_sequences(options.pop("until"), eos=end)
            room = int(options.pop("max_gen_toks"))
            if room >= self.max_length:
                raise UserError(
                    f"max_gen_toks {room} leaves no room for a prompt in the {self.max_length} tokens that the model takes; "
                    f"give a smaller --max_gen_toks"
                )
            texts = self.engine.generate([context for context, _ in chunk], until, room, options)
            for (context, _), text in zip(chunk, texts, strict=True):
                answer = postprocess_generated_text(text, until, self.think_end_token)
                answers.append(answer)
                self.cache_hook.add_partial("generate_until", (context, asked), answer)
            bar.update(len(chunk))
        bar.close()
        return list(collator.get_original(answers))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r}; give cpu, cuda or cuda:0") from error
    return torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device
