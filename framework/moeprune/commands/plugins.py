"""`moeprune plugins [KIND]`."""

from __future__ import annotations

from moeprune import registry
from moeprune.errors import UserError

MARK = " *"  # behind the name of a pruner that is a criterion


def command(kind: str | None = None, check: bool = False) -> int:
    """List registered strategies: name, distribution, first line of the docstring.

    Args:
        kind: pruner, criterion, allocation, trigger, balancer, placement, router, statistic or suite; all of them by default.
        check: import every plug-in and report those that cannot be used.
    """
    kinds = list(registry.KINDS) if kind is None else [kind]
    problems: list[str] = []
    for each in kinds:
        found = registry.entries(each)
        legend = "   * a criterion, which prunes by its own name" if any(entry.criterion for entry in found) else ""
        print(f"{each} ({registry.group(each)}){legend}")
        names = [entry.name + MARK * entry.criterion for entry in found]
        origins = [f"{entry.distribution} {entry.version}" for entry in found]
        width, second = (max(map(len, column), default=0) for column in (names, origins))
        seen: set[str] = set()
        for entry, name, origin in zip(found, names, origins, strict=True):
            note = "  [name registered twice: use the class path]" if entry.name in seen else ""
            seen.add(entry.name)
            print(f"  {name:<{width}}  {origin:<{second}}  {entry.description()}{note}")
        if not found:
            print("  none")
        if check:
            problems += registry.usable(each)[1]
    if problems:
        raise UserError("; ".join(problems))
    return 0


command.positional = "kind"  # type: ignore[attr-defined]
