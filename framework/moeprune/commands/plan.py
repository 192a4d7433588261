"""`moeprune plan`: from recorded loads or saved evidence, without a model and without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moeprune.errors import UserError
from moeprune.files import new_folder, read_json
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence
from moeprune.pruning.pruner import Pruner

KINDS = ("pruner", "criterion", "allocation")
TOP_K = 2  # of recorded loads, which do not say


def command(
    pruner: Pruner | None = None,
    counts: Path | None = None,
    evidence: Path | None = None,
    sweep: bool = False,
    pruners: list[str] | None = None,
    ratios: list[float] | None = None,
    top_k: int | None = None,
    multiple_of: int = 1,
    min_keep: int = 1,
    max_keep: int | None = None,
    n_groups: int = 1,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Plan from recorded loads or saved evidence and print the plan as a table; or compare many plans.

    Args:
        pruner: by short name or class path, with its options: --pruner=laep --pruner.beta=0.1.
        counts: JSON: a list per layer of lists of token counts; or {"counts": ..., "expert_ids": ...} for a pruned model.
        evidence: folder that `moeprune calibrate` wrote, instead of counts.
        sweep: plan with many pruners at several budgets, and say how much of what they remove they share.
        pruners: of a sweep, by short name; default: every criterion that the evidence suffices for, and laep.
        ratios: of a sweep: shares of the experts to remove; default: 0.1, 0.25, 0.375, 0.5 and 0.75.
        top_k: experts the router picks per token; evidence says it, with counts it is 2 unless given.
        multiple_of: experts kept per layer are a multiple of this (the expert-parallel size).
        min_keep: fewest experts a layer keeps.
        max_keep: most experts a layer keeps.
        n_groups: groups of a group-limited router; what evidence says of the router holds as well.
        output: where to write: the plan as JSON, or the folder of a sweep.
        overwrite: replace an existing output.
    """
    if sweep and pruner is not None:
        raise UserError(
            "a sweep plans with many pruners; give --pruner or --sweep, not both (--pruners=[a,b] says which)"
        )
    if not sweep:
        for name, value in (("pruners", pruners), ("ratios", ratios)):
            if value is not None:
                raise UserError(f"{name} are those of a sweep; add --sweep, or give --pruner")
        if pruner is None:
            raise UserError("missing: pruner; give --pruner=NAME, or --sweep to compare many")
    if counts is None and evidence is None:
        raise UserError("missing: counts or evidence; give --counts=FILE or --evidence=FOLDER")
    if counts is not None and evidence is not None:
        raise UserError("give --counts or --evidence, not both: evidence holds the counts")
    if output is not None and sweep:
        new_folder(output, overwrite)
    elif output is not None and output.exists() and not (overwrite and output.is_file()):
        ways = ", or pass --overwrite=true" if output.is_file() else ""  # a folder or a device is never replaced
        raise UserError(f"{output} exists; choose another --output{ways}")
    constraints = Constraints(multiple_of, min_keep, max_keep, n_groups)
    if counts is not None:
        found = _from_counts(counts, TOP_K if top_k is None else top_k)
    else:
        from moeprune.pruning import store

        assert evidence is not None
        found = store.load(evidence, None if pruner is None else pruner.needs)
        if top_k is not None and top_k != found.top_k:
            raise UserError(
                f"top_k={top_k} differs from top_k={found.top_k} of the evidence in {evidence}; leave it out"
            )
        found = replace(found, provenance={**found.provenance, "evidence": str(evidence)})
        constraints = store.respecting(constraints, found)
    if pruner is None:
        from moeprune.commands.sweep import compare

        compare(found, pruners, ratios, constraints, output)
        return
    plan = pruner.plan(found, constraints).made_by(pruner)
    if output is not None:
        plan.save(output)
    print(plan)


def _from_counts(path: Path, top_k: int) -> Evidence:
    data = read_json(path, "counts file")
    ids = None
    if isinstance(data, dict):
        if "counts" not in data:
            raise UserError(f'{path} has no "counts"; give a list per layer of lists of token counts')
        data, ids = data["counts"], data.get("expert_ids")
    _check_rows(data, "counts", path)
    if ids is not None:
        _check_rows(ids, "expert_ids", path)
    return Evidence.from_counts(data, top_k, ids, provenance={"source": str(path)})


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
