"""What can only be found out by running the model without some experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from moeprune.errors import UserError
from moeprune.model.prunable import PrunableModel
from moeprune.pruning.surgery import only

Batch = Tensor | tuple[Tensor, Tensor]


def _parts(batch: Batch) -> tuple[Tensor, Tensor | None]:
    return batch if isinstance(batch, tuple) else (batch, None)


@torch.no_grad()
def _loss(model: PrunableModel, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy, nats per token."""
    total, n = 0.0, 0
    for batch in batches:
        tokens, mask = _parts(batch)
        real = None if mask is None else mask.bool()
        logits = model.logits(tokens[:, :-1], None if real is None else real[:, :-1])
        targets = tokens[:, 1:] if real is None else tokens[:, 1:].masked_fill(~real[:, 1:], -100)
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
        n += int((targets != -100).sum())
    return total / max(n, 1)


def ablation(model: PrunableModel, batches: Sequence[Batch], counts: Sequence[NDArray[Any]]) -> list[float]:
    """Per layer, how much the loss grows when the layer loses the less frequent half of its experts, all others whole.

    Args:
        model: on the batches' device.
        batches: see `calibration.record`.
        counts: per layer [E] tokens routed to each expert.

    Raises:
        UserError: no batches.
    """
    if not batches:
        raise UserError("measuring a layer's sensitivity needs at least one batch of tokens; give data")
    trained = model.training
    model.train(False)
    try:
        whole = _loss(model, batches)
        growth = []
        for index, (layer, count) in enumerate(zip(model.moe_layers, counts, strict=True)):
            n = max(model.top_k, layer.n_experts - layer.n_experts // 2)
            busiest = np.lexsort((np.asarray(layer.ids), count))[::-1][:n]
            kept: list[Sequence[int]] = [each.ids for each in model.moe_layers]
            kept[index] = sorted(layer.ids[i] for i in busiest)
            with only(model, kept):
                growth.append(_loss(model, batches) - whole)
        return growth
    finally:
        model.train(trained)


class Acceptance:
    """How much of a model's next-token distribution survives a choice of experts: mean over tokens of
    sum over the vocabulary of min(p, q). It is the probability that speculative decoding accepts a draft token of q.

    Source: the fitness of EvoESAP, arXiv 2603.06003.

    Args:
        model: the whole one.
        batches: held-out tokens, see `calibration.record`.

    Raises:
        UserError: no batches.
    """

    def __init__(self, model: PrunableModel, batches: Sequence[Batch]) -> None:
        if not batches:
            raise UserError("trying out choices of experts needs at least one batch of tokens; give data")
        self._model, self._batches = model, list(batches)
        self._whole = self._probabilities()

    @torch.no_grad()
    def _probabilities(self) -> list[Tensor]:
        """Per batch [real tokens, V] float32."""
        trained = self._model.training
        self._model.train(False)
        found = []
        for batch in self._batches:
            tokens, mask = _parts(batch)
            real = None if mask is None else mask[:, :-1].bool()
            logits = self._model.logits(tokens[:, :-1], real).float()
            found.append((logits.flatten(0, 1) if real is None else logits[real]).softmax(-1))
        self._model.train(trained)
        return found

    def __call__(self, kept: Sequence[Sequence[int]]) -> float:
        """Mean acceptance, in [0, 1], of the model with only the experts of these original ids."""
        with only(self._model, kept):
            parts = self._probabilities()
        shared = [torch.minimum(p, q).sum(-1) for p, q in zip(self._whole, parts, strict=True)]
        return float(torch.cat(shared).double().mean())
