"""Which experts stay, per layer, by their original ids. Immutable, checked when made, JSON, composable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeprune.errors import UserError
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence

FORMAT = "moeprune.plan/1"


@dataclass(frozen=True)
class Merge:
    """Experts of a layer that become one.

    Args:
        into: original id of the expert that stays and takes the weights.
        members: original ids of all whose weights are averaged, `into` among them.
        weights: their shares, positive, summing to 1.
    """

    into: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class PrunePlan:
    """Experts kept per layer.

    Args:
        kept: per layer the original ids that stay, ascending.
        before: per layer the original ids there before this plan, ascending.
        n_original: per layer the number of experts before any pruning.
        top_k: experts the router picks per token.
        provenance: how the plan came about: pruner with options, constraints, step, data.
        removed_load: per layer the share of tokens that went to the experts removed; empty if loads are unknown.
        merges: per layer the groups of experts whose weights are averaged before the others are removed; empty for a plan
            that only removes.
        align: match the hidden neurons of merged experts before averaging.

    Raises:
        UserError: a kept id that is not there, repeats, or fewer experts than top_k; a merge of experts that are not there
            or twice in a group, into one that does not stay.
    """

    kept: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    n_original: tuple[int, ...]
    top_k: int
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    removed_load: tuple[float, ...] = field(default=(), compare=False)
    merges: tuple[tuple[Merge, ...], ...] = ()
    align: bool = False

    def __post_init__(self) -> None:
        if not len(self.kept) == len(self.before) == len(self.n_original):
            raise UserError(f"a plan for {len(self.kept)} layers does not fit {len(self.before)} layers")
        if self.merges and len(self.merges) != len(self.kept):
            raise UserError(f"merges for {len(self.merges)} layers do not fit {len(self.kept)} layers")
        for layer, merges in enumerate(self.merges):
            members = [expert for merge in merges for expert in merge.members]
            if len(set(members)) < len(members) or not set(members) <= set(self.before[layer]):
                raise UserError(f"layer {layer}: an expert is merged twice, or is not among the layer's experts")
            for merge in merges:
                if merge.into not in self.kept[layer] or merge.into not in merge.members:
                    raise UserError(f"layer {layer}: experts are merged into {merge.into}, which does not stay")
                if len(merge.weights) != len(merge.members) or abs(sum(merge.weights) - 1) > 1e-6:
                    raise UserError(f"layer {layer}: the shares of a merge into {merge.into} do not sum to 1")
        for layer, (kept, before) in enumerate(zip(self.kept, self.before, strict=True)):
            if list(kept) != sorted(set(kept)):
                raise UserError(f"layer {layer}: kept ids must ascend without repeats, got {list(kept)[:8]}")
            if not set(kept) <= set(before):
                missing = sorted(set(kept) - set(before))
                raise UserError(f"layer {layer}: kept experts {missing[:8]} are not among the layer's experts")
            if len(kept) < self.top_k:
                raise UserError(
                    f"layer {layer} would keep {len(kept)} experts, fewer than top_k={self.top_k}; prune less"
                )

    @classmethod
    def from_kept(
        cls,
        kept: Sequence[Sequence[int]],
        evidence: Evidence,
        constraints: Constraints,
        provenance: Mapping[str, Any] | None = None,
        merges: Sequence[Sequence[Merge]] = (),
        align: bool = False,
    ) -> PrunePlan:
        """Plan of a pruner on `evidence`, checked against `constraints`.

        Raises:
            UserError: a layer breaks a constraint.
        """
        removed = []
        for index, (layer, ids) in enumerate(zip(evidence.layers, kept, strict=True)):
            allowed = constraints.feasible(len(layer.ids), evidence.top_k, layer.n_original, index)
            if len(ids) not in allowed:
                raise UserError(f"layer {index} would keep {len(ids)} experts, which {constraints} does not allow")
            size = layer.n_original // constraints.n_groups
            if len({sum(i // size == group for i in ids) for group in range(constraints.n_groups)}) > 1:
                raise UserError(f"layer {index} would keep unequal numbers in n_groups={constraints.n_groups}")
            if lost := sorted(set(constraints.protected_in(index)) - set(ids)):
                raise UserError(f"layer {index} would lose experts {lost[:8]}, which are protected")
            if "counts" in layer.stats and layer.counts.sum() > 0:
                stays = set(ids)
                gone = sum(int(n) for i, n in zip(layer.ids, layer.counts, strict=True) if i not in stays)
                removed.append(gone / int(layer.counts.sum()))
        return cls(
            tuple(tuple(int(i) for i in ids) for ids in kept),
            tuple(layer.ids for layer in evidence.layers),
            tuple(layer.n_original for layer in evidence.layers),
            evidence.top_k,
            {**evidence.provenance, **(provenance or {})},
            tuple(removed) if len(removed) == len(kept) else (),
            tuple(map(tuple, merges)),
            align,
        )

    def made_by(self, pruner: Any) -> PrunePlan:
        """This plan, its provenance naming the pruner also where the pruner's author did not."""
        return replace(self, provenance={"pruner": pruner.describe(), **self.provenance})

    @property
    def n_kept(self) -> tuple[int, ...]:
        """Experts kept per layer."""
        return tuple(map(len, self.kept))

    @property
    def removed(self) -> tuple[tuple[int, ...], ...]:
        """Per layer the original ids that this plan removes."""
        stay = map(set, self.kept)
        return tuple(tuple(i for i in before if i not in s) for before, s in zip(self.before, stay, strict=True))

    def then(self, later: PrunePlan) -> PrunePlan:
        """This plan and a later one as one plan.

        Raises:
            UserError: the later plan starts from other experts than this one leaves, or one of them merges experts.
        """
        if self.merges or later.merges:
            raise UserError("plans that merge experts do not combine into one plan; apply them one after the other")
        if later.before != self.kept:
            raise UserError("the later plan was made for other experts than this plan keeps")
        return PrunePlan(
            later.kept,
            self.before,
            self.n_original,
            later.top_k,
            {"plans": [dict(self.provenance), dict(later.provenance)]},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        merging = {
            "merges": [
                [{"into": m.into, "members": list(m.members), "weights": list(m.weights)} for m in layer]
                for layer in self.merges
            ],
            "align": self.align,
        }
        return {
            "format": FORMAT,
            "kept": [list(ids) for ids in self.kept],
            "before": [list(ids) for ids in self.before],
            "n_original": list(self.n_original),
            "num_experts_per_layer": list(self.n_kept),
            "top_k": self.top_k,
            "removed_load": list(self.removed_load),
            **(merging if self.merges else {}),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrunePlan:
        """The inverse of `to_dict`.

        Raises:
            UserError: another format, or fields that are missing or of the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise UserError(f"not a prune plan of format {FORMAT!r} (found {found!r})")
        try:
            return cls(
                tuple(tuple(map(int, ids)) for ids in data["kept"]),
                tuple(tuple(map(int, ids)) for ids in data["before"]),
                tuple(map(int, data["n_original"])),
                int(data["top_k"]),
                dict(data.get("provenance", {})),
                tuple(map(float, data.get("removed_load", ()))),
                tuple(
                    tuple(
                        Merge(int(m["into"]), tuple(map(int, m["members"])), tuple(map(float, m["weights"])))
                        for m in layer
                    )
                    for layer in data.get("merges", ())
                ),
                bool(data.get("align", False)),
            )
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the prune plan lacks or garbles a field: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON; the file is complete or not there."""
        from moeprune.files import write_text

        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read JSON.

        Raises:
            UserError: no such file, or no plan in it.
        """
        from moeprune.files import read_json

        return cls.from_dict(read_json(path, "prune plan"))

    def table(self) -> str:
        """One line per layer and a total, for a terminal."""
        load = bool(self.removed_load)
        lines = [
            f"{'layer':>5} {'experts':>8} {'kept':>5} {'removed load':>13}  removed experts"
            if load
            else f"{'layer':>5} {'experts':>8} {'kept':>5}  removed experts"
        ]
        for layer, (before, kept, gone) in enumerate(zip(self.before, self.kept, self.removed, strict=True)):
            share = f" {self.removed_load[layer]:13.2%}" if load else ""
            names = " ".join(map(str, gone[:16])) + (f" ... ({len(gone)})" if len(gone) > 16 else "")
            lines.append(f"{layer:>5} {len(before):>8} {len(kept):>5}{share}  {names}".rstrip())
        total, stay = sum(map(len, self.before)), sum(self.n_kept)
        lines.append(f"{'all':>5} {total:>8} {stay:>5}  ({stay / total:.1%} kept)")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()
