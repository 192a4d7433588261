"""How alike the router treats two experts."""

from __future__ import annotations

from torch import Tensor

from moeprune.pruning.statistic import Seen, Statistic


class LogitGram(Statistic):
    """Sum over tokens of the products of the router's logits for two experts, [E, E].

    Every token counts for every expert, wherever it was routed. Divided by the roots of its diagonal it holds the cosines between experts' logits.

    Source: the similarity by which M-SMoE (arXiv 2310.01334) groups experts, before it is normalized.
    """

    reads = frozenset({"routing"})

    def measure(self, seen: Seen) -> Tensor:
        """[E, E]."""
        assert seen.logits is not None
        logits = seen.logits.double()
        return logits.T @ logits
