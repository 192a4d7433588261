"""`moeprune plugins [KIND]`."""

from __future__ import annotations

from moeprune import registry
from moeprune.errors import UserError


def command(kind: str | None = None, check: bool = False) -> int:
    """List registered strategies.

    Args:
        kind: pruner, criterion, allocation, trigger, balancer, placement, router or suite; all of them by default.
        check: import every plug-in and report those that cannot be used.
    """
    kinds = list(registry.KINDS) if kind is None else [kind]
    problems: list[str] = []
    for each in kinds:
        found = registry.entries(each)
        print(f"{each} ({registry.group(each)})")
        seen: set[str] = set()
        for entry in found:
            note = "  [name registered twice: use the class path]" if entry.name in seen else ""
            seen.add(entry.name)
            print(f"  {entry.name:<14} {entry.distribution + ' ' + entry.version:<18} {entry.description()}{note}")
        if not found:
            print("  none")
        if check:
            problems += registry.usable(each)[1]
    if problems:
        raise UserError("; ".join(problems))
    return 0


command.positional = "kind"  # type: ignore[attr-defined]
