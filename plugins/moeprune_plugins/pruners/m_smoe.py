"""M-SMoE: merges seldom used experts into the frequent ones that the router treats alike."""

from __future__ import annotations

import numpy as np

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.plan import Merge, PrunePlan
from moeprune.pruning.pruner import Allocation, Pruner, Uniform


class MSMoE(Pruner):
    """Keeps the most frequent experts and merges each of the others into the one with the most similar router logits.

    Similarity is the cosine of two experts' router logits over the calibration tokens. The merged weights are the mean,
    weighted by the number of tokens routed to each; an expert without tokens weighs nothing and just goes. Of equally similar
    ones the more frequent takes it, then the higher id. With a group-limited router experts merge within their group only.
    Protected experts stay as they are: nothing is merged into them, and in a group where only they stay the others just go.

    The router keeps the row of the expert that stays and loses the others': tokens of a removed expert go wherever the rest
    of the router sends them. The paper keeps all rows and maps several onto one merged expert.

    Source: M-SMoE, arXiv 2310.01334. It takes the most frequent experts of all layers together: allocation `global` with
    `normalize: max`; the default here is the same share of every layer. Hidden neurons are matched by weights to the expert
    that stays; which expert the paper matches to was not verified.

    Args:
        ratio: share of the experts to remove, in [0, 1).
        allocation: how many each layer keeps, told the frequencies; default: the same share of every layer.
        align: match hidden neurons before averaging.

    Raises:
        UserError: ratio out of range.
    """

    def __init__(self, ratio: float = 0.25, allocation: Allocation | None = None, align: bool = True) -> None:
        if not 0 <= ratio < 1:
            raise UserError(f"ratio must lie in [0, 1), got {ratio}; it is the share of experts to remove")
        self.ratio, self.allocation, self.align = ratio, allocation or Uniform(), align
        self.needs = frozenset({"counts", "logit_gram"}) | self.allocation.needs

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        """See `Pruner.plan`."""
        evidence.require(self.needs, f"pruner {self!r}")
        loads = [layer.counts.astype(np.float64) for layer in evidence.layers]
        n_kept = self.allocation.allocate(loads, evidence, constraints, self.ratio)
        kept, merges = [], []
        for index, (layer, load, n) in enumerate(zip(evidence.layers, loads, n_kept, strict=True)):
            kept.append(constraints.keep_highest(load, n, layer, index))
            merges.append(_merges(layer, set(kept[-1]), set(constraints.protected_in(index)), constraints.n_groups))
        how = {"pruner": self.describe()}
        if not any(merges):
            return PrunePlan.from_kept(kept, evidence, constraints, how)
        return PrunePlan.from_kept(kept, evidence, constraints, how, merges, self.align)


def _merges(layer: LayerEvidence, stays: set[int], safe: set[int], n_groups: int) -> list[Merge]:
    """Who is merged with whom in one layer."""
    ids, counts, gram = layer.ids, layer.counts, layer.stats["logit_gram"]
    norm = np.sqrt(np.maximum(np.diag(gram), 0))
    scale = np.outer(norm, norm)
    cosine = np.divide(gram, scale, out=np.zeros_like(scale), where=scale > 0)
    size = layer.n_original // n_groups
    targeted = stays - safe
    members: dict[int, list[int]] = {}  # all in positions, not ids
    for group in range(n_groups):
        inside = [p for p, expert in enumerate(ids) if expert // size == group]
        targets = sorted(
            (p for p in inside if ids[p] in targeted), key=lambda p: (counts[p], ids[p]), reverse=True
        )  # of equally similar ones argmax takes the first
        others = [p for p in inside if ids[p] not in stays and counts[p]]
        if targets and others:
            for p, nearest in zip(others, cosine[np.ix_(others, targets)].argmax(1), strict=True):
                members.setdefault(targets[nearest], [targets[nearest]]).append(p)
    merged = []
    for into, together in sorted(members.items()):
        tokens = [int(counts[p]) for p in together]
        shares = tuple(n / sum(tokens) for n in tokens)
        merged.append(Merge(ids[into], tuple(ids[p] for p in together), shares))
    return merged
