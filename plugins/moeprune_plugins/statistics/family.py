"""The nine sums of the calibrated family: g(t)^a |f(t)|^b over the tokens routed to an expert; g0f0 is their number."""

from __future__ import annotations

from functools import reduce
from operator import mul
from typing import ClassVar

from torch import Tensor

from moeprune.pruning.statistic import Seen, Statistic


class _Power(Statistic):
    a: ClassVar[int]
    b: ClassVar[int]

    def measure(self, seen: Seen) -> Tensor:
        """[E]."""
        factors = [seen.gates] * self.a + ([seen.norms] * self.b if self.b else [])
        return seen.per_expert(reduce(mul, factors)) if factors else seen.counts.double()


class G0F0(_Power):
    """Number of tokens.

    Source: the exponents (0, 0) of the family in arXiv 2606.15716.
    """

    reads = frozenset()
    a, b = 0, 0


class G0F1(_Power):
    """Sum of |f|, the norm of the expert's output.

    Source: the exponents (0, 1) of the family in arXiv 2606.15716.
    """

    a, b = 0, 1


class G0F2(_Power):
    """Sum of |f|^2, the squared norm of the expert's output.

    Source: the exponents (0, 2) of the family in arXiv 2606.15716.
    """

    a, b = 0, 2


class G1F0(_Power):
    """Sum of g, the gate weight.

    Source: the exponents (1, 0) of the family in arXiv 2606.15716.
    """

    reads = frozenset()
    a, b = 1, 0


class G1F1(_Power):
    """Sum of g |f|.

    Source: the exponents (1, 1) of the family in arXiv 2606.15716.
    """

    a, b = 1, 1


class G1F2(_Power):
    """Sum of g |f|^2.

    Source: the exponents (1, 2) of the family in arXiv 2606.15716.
    """

    a, b = 1, 2


class G2F0(_Power):
    """Sum of g^2, the gate weight squared.

    Source: the exponents (2, 0) of the family in arXiv 2606.15716.
    """

    reads = frozenset()
    a, b = 2, 0


class G2F1(_Power):
    """Sum of g^2 |f|.

    Source: the exponents (2, 1) of the family in arXiv 2606.15716.
    """

    a, b = 2, 1


class G2F2(_Power):
    """Sum of g^2 |f|^2.

    Source: the exponents (2, 2) of the family in arXiv 2606.15716.
    """

    a, b = 2, 2
