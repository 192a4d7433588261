"""All experts of all layers in one ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Allocation

Normalize = Literal["mean", "sum", "max", "zscore", "rank"]


class GlobalRanking(Allocation):
    """Ranks the experts of all layers together by normalised score; the lowest go, from whatever layer they are.

    As many go as uniform pruning cuts without constraints, the sum of int(E * ratio) over the layers. Scores compare within
    a layer only, so each layer is brought to a common scale first. Experts that must stay are left out of the ranking. Where
    the constraints do not allow a layer's number, the nearest allowed numbers (least squares over all layers) that keep no
    fewer experts in total are taken. Of equal scores (to 12 decimals) in different layers, those go first whose place in their
    own layer is lowest, so that layers that nothing distinguishes lose the same share; then those of the earlier layer.

    Source: the dominant experts of M-SMoE (arXiv 2310.01334), the most frequent ones of all layers by a frequency that its
    code normalises by the layer's largest (`max`); the other normalisations are ours.

    Args:
        normalize: what a score becomes. `mean`: in units of the layer's mean score, the default: an average expert is worth
            1 in every layer, however many experts the layer has. `sum`: share of the layer's sum; experts of layers with
            fewer experts rank higher. `max`: share of the layer's largest; one outlier makes all others of its layer look
            cheap. `zscore`: distance from the layer's mean in standard deviations; a layer of nearly equal experts is
            spread as wide as any. `rank`: place within the layer, in (0, 1]; all but uniform. Means, sums and largest
            are those of absolute values. A layer whose scores are all the same, or all 0, is one of average experts.

    Raises:
        UserError: an unknown normalisation.
    """

    def __init__(self, normalize: Normalize = "mean") -> None:
        if normalize not in get_args(Normalize):
            raise UserError(f"normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
        self.normalize = normalize

    def allocate(
        self,
        scores: Sequence[NDArray[np.float64]],
        evidence: Evidence,
        constraints: Constraints,
        ratio: float,
    ) -> list[int]:
        """See `Allocation.allocate`."""
        values, places, layers = [], [], []
        for index, (score, layer) in enumerate(zip(scores, evidence.layers, strict=True)):
            safe = set(constraints.protected_in(index))
            free = np.array([expert not in safe for expert in layer.ids])
            place = np.empty(free.sum())
            place[np.argsort(score[free], kind="stable")] = np.arange(1, len(place) + 1) / len(score)
            values.append(normalized(score, self.normalize)[free].round(12))  # what differs by rounding alone is equal
            places.append(place)
            layers.append(np.full(len(place), index))
        layer_of = np.concatenate(layers)
        ranking = np.lexsort((layer_of, np.concatenate(places), np.concatenate(values)))
        sizes = np.array([len(score) for score in scores])
        n_cut = sum(int(size * ratio) for size in sizes.tolist())
        wanted = sizes - np.bincount(layer_of[ranking[:n_cut]], minlength=len(sizes))
        return constraints.distribute(wanted.tolist(), int(sizes.sum()) - n_cut, evidence)


def normalized(score: NDArray[np.float64], how: Normalize) -> NDArray[np.float64]:
    """[E] the scores of a layer on a scale that compares with other layers', see `GlobalRanking`."""
    E = len(score)
    if how == "rank":  # equal scores share the mean of their places
        _, group, size = np.unique(score, return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(size) - (size - 1) / 2)[group] / E)
    if np.ptp(score) == 0:
        return np.full(E, {"sum": 1 / E, "zscore": 0.0}.get(how, 1.0))
    scaled = score / np.abs(score).max()  # no overflow, no underflow below
    if how == "zscore":
        return np.asarray((scaled - scaled.mean()) / scaled.std())
    total = np.abs(scaled).sum()
    return np.asarray(scaled / {"mean": total / E, "sum": total, "max": 1.0}[how])
