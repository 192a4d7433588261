"""moeprune: prune the experts of Mixture-of-Experts language models and score every variant the same way.

The names below are stable. They are imported on first use, so that `import moeprune` costs milliseconds
and planning from recorded loads never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprune.interop import load as load
    from moeprune.model.config import MoEConfig as MoEConfig
    from moeprune.model.transformer import MoETransformer as MoETransformer
    from moeprune.pruning.constraints import Constraints as Constraints
    from moeprune.pruning.evidence import Evidence as Evidence
    from moeprune.pruning.plan import PrunePlan as PrunePlan
    from moeprune.pruning.pruner import Allocation as Allocation
    from moeprune.pruning.pruner import Criterion as Criterion
    from moeprune.pruning.pruner import Pruner as Pruner
    from moeprune.registry import create as create

__version__ = "0.1.0"

_HOMES = {
    "Allocation": "moeprune.pruning.pruner",
    "Constraints": "moeprune.pruning.constraints",
    "Criterion": "moeprune.pruning.pruner",
    "Evidence": "moeprune.pruning.evidence",
    "MoEConfig": "moeprune.model.config",
    "MoETransformer": "moeprune.model.transformer",
    "PrunePlan": "moeprune.pruning.plan",
    "Pruner": "moeprune.pruning.pruner",
    "create": "moeprune.registry",
    "load": "moeprune.interop",
}
__all__ = [
    "Allocation",
    "Constraints",
    "Criterion",
    "Evidence",
    "MoEConfig",
    "MoETransformer",
    "PrunePlan",
    "Pruner",
    "create",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moeprune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
