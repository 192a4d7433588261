"""What was measured per MoE layer, over a window of training or a calibration set. Pruners read nothing else.

Statistics are arrays by name whose first dimension is E, in the order of the layer's `ids` (`logit_gram` is [E, E]), or
numbers of a whole layer, of shape ():

    counts    int64    tokens routed to the expert (top-k, as the model itself routes; padding never counts)
    w1, w2    float64  [E, 3] sum of |w| and of w^2 over the weights of the gate, up and down projections
    w_n       float64  [E, 3] how many weights those are
    router_w2 float64  sum of w^2 over the expert's row in the router
    taylor    float64  sum over the expert's weights w of |w dL/dw|, gradients averaged over the calibration batches
    fisher    float64  sum over the expert's weights of (dL/dw)^2, averaged over the calibration batches
    ablation  float64  () growth of the calibration loss, nats per token, when the layer loses the less frequent half of
                       its experts, all other layers whole

and what registered statistics (kind `statistic`) measure on the tokens routed to an expert: `g1f1`, `max_f`, ... (`moeprune
plugins statistic` lists them). When a pruner asks for `weights`, the live tensors `gate`, `up` [E, F, D], `down` [E, D, F]
and `router` [E, D] come along; when it asks for `acceptance`, so does a function of a whole choice of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError

Acceptance = Callable[[Sequence[Sequence[int]]], float]


@dataclass(frozen=True)
class LayerEvidence:
    """Evidence of one layer: its experts' original `ids`, statistics by name, live weights where asked for."""

    ids: tuple[int, ...]
    n_original: int
    stats: Mapping[str, NDArray[Any]]
    weights: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        frozen = {}
        for name, values in self.stats.items():
            array = np.array(values)  # a copy: evidence does not change under a pruner's hands
            if array.shape and array.shape[0] != len(self.ids):
                raise ValueError(
                    f"statistic {name!r} has shape {array.shape}, its first dimension is not {len(self.ids)}"
                )
            array.setflags(write=False)
            frozen[name] = array
        object.__setattr__(self, "stats", frozen)

    @property
    def counts(self) -> NDArray[np.int64]:
        """[E] tokens routed to each expert."""
        return self.stats["counts"]


@dataclass(frozen=True)
class Evidence:
    """What pruners read: one LayerEvidence per MoE layer.

    Args:
        layers: in the model's order.
        top_k: experts the router picks per token.
        provenance: where it comes from (step, tokens, data); written into plans.
        acceptance: per layer the original ids to keep -> how much of the model's next-token distribution the pruned model
            shares, mean over held-out tokens of sum over the vocabulary of min(p, q), in [0, 1]; where asked for.
    """

    layers: tuple[LayerEvidence, ...]
    top_k: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    acceptance: Acceptance | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_counts(
        cls,
        counts: Sequence[Sequence[int]],
        top_k: int = 2,
        expert_ids: Sequence[Sequence[int]] | None = None,
        n_original: Sequence[int] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Evidence:
        """Evidence from token counts alone.

        Args:
            counts: per layer the tokens routed to each expert, whole numbers >= 0.
            top_k: experts the router picks per token.
            expert_ids: per layer the original ids, ascending, for a model that was pruned before; only then may layers
                differ in length.
            n_original: per layer the number of experts before any pruning; default: the largest layer.
            provenance: anything JSON can hold; a `step` is named in error messages.

        Raises:
            UserError: no layers or experts, layers of unequal length, negative, NaN or fractional counts, a layer that
                received no tokens at all, top_k above the number of experts.
        """
        provenance = dict(provenance or {})
        at = f" at step {provenance['step']}" if "step" in provenance else ""
        if isinstance(counts, str | bytes) or not isinstance(counts, Iterable) or len(counts) == 0:
            raise UserError("counts hold no layer; give a list per layer of the tokens routed to each expert")
        if top_k < 1:
            raise UserError(f"top_k must be at least 1, got {top_k}")
        arrays = [_checked(layer, row, at) for layer, row in enumerate(counts)]
        lengths = [len(row) for row in arrays]
        if expert_ids is None and len(set(lengths)) > 1:
            odd = next(i for i, n in enumerate(lengths) if n != lengths[0])
            raise UserError(
                f"layers differ in length: layer 0 has {lengths[0]} experts, layer {odd} has {lengths[odd]}; for a "
                f"pruned model give expert_ids as well, otherwise complete the counts"
            )
        try:
            given = None if expert_ids is None else [tuple(map(int, row)) for row in expert_ids]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"expert_ids must be a list per layer of lists of ids, got {str(expert_ids)[:60]}"
            ) from error
        ids = [tuple(range(n)) for n in lengths] if given is None else given
        if len(ids) != len(arrays):
            raise UserError(f"expert_ids hold {len(ids)} layers, counts hold {len(arrays)}; give one list per layer")
        original = (
            list(n_original) if n_original is not None else [max(max(row, default=-1) for row in ids) + 1] * len(ids)
        )
        layers = []
        for layer, (array, row) in enumerate(zip(arrays, ids, strict=True)):
            if len(row) != len(array):
                raise UserError(
                    f"layer {layer} has {len(array)} counts but {len(row)} expert_ids; give one id per count"
                )
            if not row or list(row) != sorted(set(row)) or row[0] < 0 or row[-1] >= original[layer]:
                raise UserError(
                    f"expert_ids of layer {layer} must ascend, without repeats, from 0 to {original[layer] - 1}"
                )
            if top_k > len(array):
                raise UserError(f"top_k={top_k} is more than the {len(array)} experts of layer {layer}; lower top_k")
            layers.append(LayerEvidence(row, original[layer], {"counts": array}))
        return cls(tuple(layers), top_k, provenance)

    def require(self, needs: Iterable[str], who: str) -> None:
        """Check that everything `who` reads was recorded and is finite.

        Raises:
            UserError: a statistic is missing, or holds NaN or infinity; layer and step are named.
        """
        at = f" at step {self.provenance['step']}" if "step" in self.provenance else ""
        for need in sorted(needs):
            if need == "acceptance":
                if self.acceptance is None:
                    raise UserError(
                        f"{who} tries choices out on the model, which recorded evidence cannot answer: use `moeprune prune`"
                    )
                continue
            for index, layer in enumerate(self.layers):
                if need == "weights":
                    if not layer.weights:
                        raise UserError(
                            f"{who} reads the model's weights, which recorded evidence does not hold: use `moeprune prune`"
                        )
                elif need not in layer.stats:
                    raise UserError(
                        f"{who} needs the statistic {need!r}, recorded were: {', '.join(sorted(layer.stats)) or 'none'}; "
                        f"use `moeprune prune` or `moeprune calibrate`, which record what is asked for"
                    )
                elif not np.isfinite(layer.stats[need]).all():
                    raise UserError(
                        f"statistic {need!r} of layer {index}{at} holds NaN or infinity; the run has diverged"
                    )


def _checked(layer: int, row: Sequence[int], at: str) -> NDArray[np.int64]:
    """[E] int64 counts of one layer, or one sentence."""
    try:
        array = np.asarray(row, dtype=np.float64 if not _is_integer(row) else None)
    except (TypeError, ValueError) as error:
        raise UserError(f"counts of layer {layer}{at} are not a list of numbers: {str(row)[:60]}") from error
    if array.ndim != 1 or array.size == 0:
        raise UserError(f"layer {layer}{at} has no experts; give one count per expert")
    if array.dtype.kind == "f":
        if np.isnan(array).any():
            raise UserError(
                f"counts of layer {layer}{at} hold NaN (expert {int(np.isnan(array).argmax())}); record them anew"
            )
        if not np.isfinite(array).all() or (array != np.floor(array)).any():
            raise UserError(f"counts of layer {layer}{at} must be whole numbers; give tokens, not shares")
    if (array < 0).any():
        worst = int((array < 0).argmax())
        raise UserError(
            f"counts of layer {layer}{at} are negative (expert {worst}: {array[worst]}); counts are tokens, >= 0"
        )
    if array.max() > 2**62:
        raise UserError(f"counts of layer {layer}{at} are too large ({array.max()}); 64-bit token counts are the limit")
    if not array.any():
        raise UserError(
            f"layer {layer}{at} received no tokens: all its counts are 0; record loads over a longer window"
        )
    return array.astype(np.int64)


def _is_integer(row: Sequence[int]) -> bool:
    return np.asarray(row).dtype.kind in "iu"
