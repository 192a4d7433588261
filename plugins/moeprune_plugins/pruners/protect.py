"""Any pruner, with experts that it may not remove."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner

PERCENTILE, SHARE_OF_LARGEST, DEPTH = 99.5, 0.1, 0.75


class Protect(Pruner):
    """Lets another pruner plan, with super experts and named experts kept whatever it thinks of them.

    A super expert is one whose largest |f| over tokens and channels, f its output before the gate weight is applied, is above
    both the 99.5th percentile over all experts of the model (linear interpolation) and a tenth of the largest of all, and
    that sits in the first three quarters of the MoE layers, int(0.75 L) of them. The numbers kept per layer are the other
    pruner's affair: a protected expert takes the place of one it would have kept. A pruner that merges leaves it as it is.

    Source: the rule is that of REAP's code (arXiv 2510.13999); super experts are of arXiv 2507.23279.

    Args:
        pruner: plans around the protected experts.
        super_experts: whether to protect them.
        experts: per layer the original ids of further experts to protect; an empty list for none.
    """

    def __init__(self, pruner: Pruner, super_experts: bool = True, experts: list[list[int]] | None = None) -> None:
        self.pruner, self.super_experts, self.experts = pruner, super_experts, experts
        self.needs = pruner.needs | ({"max_f"} if super_experts else frozenset())

    def plan(self, evidence: Evidence, constraints: Constraints = Constraints()) -> PrunePlan:  # noqa: B008
        """See `Pruner.plan`.

        Raises:
            UserError: `experts` is not one list per layer, or names experts that a layer does not have.
        """
        L = len(evidence.layers)
        if self.experts is not None and len(self.experts) != L:
            raise UserError(f"experts holds {len(self.experts)} lists for {L} MoE layers; give one per layer")
        evidence.require(self.needs, f"pruner {self!r}")
        found = super_experts(evidence) if self.super_experts else [[] for _ in range(L)]
        protected = [
            sorted({*constraints.protected_in(index), *found[index], *(self.experts[index] if self.experts else ())})
            for index in range(L)
        ]
        plan = self.pruner.plan(evidence, replace(constraints, protected=protected))
        recorded = {"pruner": self.describe(), "protected": protected, "super_experts": found}
        return replace(plan, provenance={**plan.provenance, **recorded})


def super_experts(evidence: Evidence) -> list[list[int]]:
    """Per layer the original ids of the super experts, see `Protect`."""
    peaks = [layer.stats["max_f"] for layer in evidence.layers]
    together = np.concatenate(peaks)
    threshold = max(np.percentile(together, PERCENTILE), SHARE_OF_LARGEST * together.max())
    return [
        [i for i, peak in zip(layer.ids, own, strict=True) if peak > threshold and index < int(DEPTH * len(peaks))]
        for index, (layer, own) in enumerate(zip(evidence.layers, peaks, strict=True))
    ]
