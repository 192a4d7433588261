"""HC-SMoE: clusters experts by their mean outputs and merges each cluster into one."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import Merge, PrunePlan
from moeprune.pruning.pruner import Allocation, Pruner, Uniform

Linkage = Literal["average", "complete", "single", "ward"]


class HCSMoE(Pruner):
    """Clusters a layer's experts by their mean outputs and merges each cluster into its most frequent one.

    Agglomerative clustering, Euclidean, down to as many clusters as the layer keeps experts; the merged weights are the mean,
    weighted by the number of tokens routed to each. Of two equal numbers of tokens the higher id stays. With a group-limited
    router, experts cluster within their group, into equal numbers per group. Protected experts stay as they are, each a cluster
    of its own; in a group where only they stay the others just go. An expert without tokens has no output to compare: it
    joins no cluster and goes, unless fewer experts than must stay have tokens; of those without, the higher ids stay then.

    The router keeps the row of the expert that stays and loses the others': tokens of a removed expert go wherever the rest
    of the router sends them. The paper keeps all rows and maps several onto one merged expert.

    Source: HC-SMoE, arXiv 2410.08589. The paper averages each expert's output over every calibration token; here over the
    tokens routed to it, which costs a K/E-th of that.

    Args:
        ratio: share of the experts to remove, in [0, 1).
        allocation: how many each layer keeps, told the frequencies; default: the same share of every layer.
        linkage: distance of two clusters: `average`, the paper's best, `complete`, `single` or `ward`.
        align: match hidden neurons before averaging; the paper does not.

    Raises:
        UserError: ratio out of range, an unknown linkage.
    """

    def __init__(
        self,
        ratio: float = 0.25,
        allocation: Allocation | None = None,
        linkage: Linkage = "average",
        align: bool = False,
    ) -> None:
        if not 0 <= ratio < 1:
            raise UserError(f"ratio must lie in [0, 1), got {ratio}; it is the share of experts to remove")
        if linkage not in get_args(Linkage):
            raise UserError(f"linkage must be one of {', '.join(get_args(Linkage))}, got {linkage!r}")
        self.ratio, self.allocation, self.linkage, self.align = ratio, allocation or Uniform(), linkage, align
        self.needs = frozenset({"counts", "mean_f"}) | self.allocation.needs

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        """See `Pruner.plan`."""
        evidence.require(self.needs, f"pruner {self!r}")
        loads = [layer.counts.astype(np.float64) for layer in evidence.layers]
        n_kept = self.allocation.allocate(loads, evidence, constraints, self.ratio)
        kept, merges = [], []
        for index, (layer, load, n) in enumerate(zip(evidence.layers, loads, n_kept, strict=True)):
            safe = set(constraints.protected_in(index))
            frequent = constraints.keep_highest(load, n, layer, index)  # what stays where nothing needs to merge
            tokens = dict(zip(layer.ids, layer.counts.tolist(), strict=True))
            outputs = dict(zip(layer.ids, layer.stats["mean_f"], strict=True))
            size = layer.n_original // constraints.n_groups
            stays: set[int] = set()
            merged = []
            for group in range(constraints.n_groups):
                live = [i for i in layer.ids if i // size == group and i not in safe and tokens[i]]
                stay = {i for i in frequent if i // size == group}
                n_clusters = len(stay - safe)
                if len(live) > n_clusters > 0:
                    clusters = clustered(np.stack([outputs[i] for i in live]), n_clusters, self.linkage)
                    groups = [[live[p] for p in cluster] for cluster in clusters]
                    stay = (stay & safe) | {max(members, key=lambda i: (tokens[i], i)) for members in groups}
                    merged += [_merge(members, tokens) for members in groups if len(members) > 1]
                stays |= stay
            kept.append(sorted(stays))
            merges.append(sorted(merged, key=lambda merge: merge.into))
        how = {"pruner": self.describe()}
        if not any(merges):
            return PrunePlan.from_kept(kept, evidence, constraints, how)
        return PrunePlan.from_kept(kept, evidence, constraints, how, merges, self.align)


def _merge(members: list[int], tokens: dict[int, int]) -> Merge:
    ordered = sorted(members, key=lambda i: (tokens[i], i), reverse=True)
    total = sum(tokens[i] for i in members)
    return Merge(ordered[0], tuple(ordered), tuple(tokens[i] / total for i in ordered))


def clustered(points: NDArray[np.float64], n_clusters: int, linkage: Linkage) -> list[list[int]]:
    """Agglomerative clustering of points [N, D], Euclidean: exactly `n_clusters` lists of positions, N > n_clusters.

    Cutting the tree at a height could give fewer where distances are equal; here the N - n_clusters nearest merges are done.
    """
    from scipy.cluster import hierarchy

    clusters = {position: [position] for position in range(len(points))}
    tree = hierarchy.linkage(points, linkage)
    for step, (one, other) in enumerate(tree[: len(points) - n_clusters, :2].astype(int).tolist()):
        clusters[len(points) + step] = clusters.pop(one) + clusters.pop(other)
    return list(clusters.values())
