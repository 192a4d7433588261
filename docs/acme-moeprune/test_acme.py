"""Two strategies, tested: the conformance suite, one line each, and a case by hand."""

import numpy as np

from moeprune import Evidence, create
from moeprune.pruning.evidence import LayerEvidence
from moeprune.testing import conformance

test_quota_conforms = conformance("pruner", "acme_quota", share=0.8)
test_careful_conforms = conformance("criterion", "acme_careful")


def test_quota_by_hand() -> None:
    """80 % of the tokens go to two experts of the first layer, to one of the second."""
    evidence = Evidence.from_counts([[30, 50, 10, 10], [1, 97, 1, 1]], top_k=1)
    assert create("pruner", "acme_quota", share=0.8).plan(evidence).kept == ((0, 1), (1,))


def test_careful_by_hand() -> None:
    """Four tokens of weighted norm 1 beat a single one of 1, which proves as little as none."""
    stats = {"g0f0": [4.0, 1.0, 0.0], "g1f1": [4.0, 1.0, 0.0], "g2f2": [4.0, 1.0, 0.0]}
    layer = LayerEvidence((0, 1, 2), 3, {name: np.array(values) for name, values in stats.items()})
    assert create("criterion", "acme_careful").score(layer, 0).tolist() == [0.5, 0.0, 0.0]
