"""`moeprune plan`: from recorded loads alone, without a model and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeprune.errors import UserError
from moeprune.files import read_json
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Pruner

KINDS = ("pruner", "criterion", "allocation")


def command(
    counts: Path,
    pruner: Pruner,
    top_k: int = 2,
    multiple_of: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    n_groups: int = 1,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Plan from recorded loads and print the plan as a table.

    Args:
        counts: JSON: a list per layer of lists of token counts; or {"counts": ..., "expert_ids": ...} for a pruned model.
        pruner: by short name or class path, with its options: --pruner=laep --pruner.beta=0.1.
        top_k: experts the router picks per token.
        multiple_of: experts kept per layer are a multiple of this (the expert-parallel size).
        min_keep: fewest experts a layer keeps.
        max_keep: most experts a layer keeps.
        n_groups: groups of a group-limited router.
        output: where to write the plan as JSON.
        overwrite: replace an existing output.
    """
    if output is not None and output.exists() and not (overwrite and output.is_file()):
        ways = ", or pass --overwrite=true" if output.is_file() else ""  # a folder or a device is never replaced
        raise UserError(f"{output} exists; choose another --output{ways}")
    constraints = Constraints(multiple_of, min_keep, max_keep, n_groups)
    data = read_json(counts, "counts file")
    ids = None
    if isinstance(data, dict):
        if "counts" not in data:
            raise UserError(f'{counts} has no "counts"; give a list per layer of lists of token counts')
        data, ids = data["counts"], data.get("expert_ids")
    _check_rows(data, "counts", counts)
    if ids is not None:
        _check_rows(ids, "expert_ids", counts)
    evidence = Evidence.from_counts(data, top_k, ids, provenance={"source": str(counts)})
    plan = pruner.plan(evidence, constraints)
    if output is not None:
        plan.save(output)
    print(plan)


def _check_rows(data: Any, name: str, path: Path) -> None:
    """JSON can hold anything; Evidence checks the numbers, this the shape.

    Raises:
        UserError: not a list of lists of numbers.
    """
    if not isinstance(data, list):
        raise UserError(f"{name} in {path} are no list but {str(data)[:60]}; give a list per layer")
    for layer, row in enumerate(data):
        if not isinstance(row, list) or not row or any(type(value) not in (int, float) for value in row):
            raise UserError(
                f"{name} of layer {layer} in {path} are not a list of numbers: {str(row)[:60]}; give one per expert"
            )
