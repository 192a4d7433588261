"""Names -> classes, through entry points.

    kind      entry-point group      contract (base class)
    --------  ---------------------  ---------------------------------------
    pruner    moeprune.pruners       moeprune.pruning.pruner.Pruner
    ...       moeprune.<kind>s       see KINDS

A plug-in is a class that derives from the contract and one line in its distribution's entry points; the built-ins in
plugins/ are registered in the same way. Installing a plug-in changes nothing until a configuration names it.

Listing reads metadata and source text and imports nothing. Using a name imports that one plug-in. A plug-in that does
not import, does not fit or takes a taken name is reported by name and disables nothing else.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from moeprune.errors import UserError, suggest

KINDS: Mapping[str, str] = {
    "pruner": "moeprune.pruning.pruner:Pruner",
    "criterion": "moeprune.pruning.pruner:Criterion",
    "allocation": "moeprune.pruning.pruner:Allocation",
    "trigger": "moeprune.pruning.trigger:Trigger",
    "balancer": "moeprune.balancing.balancer:Balancer",
    "placement": "moeprune.parallel.placement:Placement",
    "router": "moeprune.model.router:Router",
    "statistic": "moeprune.pruning.statistic:Statistic",
    "suite": "moeprune.evaluation.suite:Suite",
}


@dataclass(frozen=True, order=True)
class Entry:
    """One registered name: what `moeprune plugins` lists. Nothing has been imported to make it."""

    kind: str
    name: str
    value: str  # "module:attribute"
    distribution: str
    version: str
    criterion: bool = False  # the pruner that scores with the criterion of this name

    def __str__(self) -> str:
        return f"{self.value} of {self.distribution} {self.version}"

    def description(self) -> str:
        """First line of the class's docstring, read from the source text without importing it; '' if there is none."""
        module, _, attribute = self.value.partition(":")
        source = _source_of(module)
        if source is None:
            return ""
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            return ""
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").strip().partition("\n")[0]
        return ""

    def load(self) -> type[Any]:
        """Import the class and check that it fits its kind.

        Raises:
            UserError: the import fails, or the object is no (or an abstract) subclass of the kind's contract.
        """
        module, _, attribute = self.value.partition(":")
        if self.criterion:
            from moeprune.pruning.pruner import pruner_of

            scored: Any = replace(self, kind="criterion", criterion=False).load()
            made: type[Any] = pruner_of(scored, self.name)
            return made
        try:
            loaded = getattr(import_module(module), attribute)
        except Exception as error:  # whatever a third party's module does on import is theirs; name it and go on
            raise UserError(
                f"plug-in {self.name!r} ({self.kind}, {self}) could not be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())}; mend or uninstall {self.distribution}"
            ) from error
        base = contract(self.kind)
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise UserError(
                f"plug-in {self.name!r} ({self}) is registered as a {self.kind}, but {loaded!r} does not derive from "
                f"{base.__module__}.{base.__qualname__}; derive from it or register it in another group"
            )
        missing = sorted(getattr(loaded, "__abstractmethods__", ()))
        if missing:
            raise UserError(
                f"plug-in {self.name!r} ({self}) does not define {', '.join(missing)}, which "
                f"{base.__module__}.{base.__qualname__} asks of every {self.kind}"
            )
        return loaded


def contract(kind: str) -> type[Any]:
    """The base class that every entry of `kind` derives from."""
    module, _, attribute = KINDS[_known_kind(kind)].partition(":")
    base: type[Any] = getattr(import_module(module), attribute)
    return base


def group(kind: str) -> str:
    """The entry-point group of `kind`."""
    return f"moeprune.{_known_kind(kind)}s"


def entries(kind: str) -> list[Entry]:
    """Every registered entry of `kind`, sorted by name; the same name may appear twice (see `lookup`).

    Every criterion is a pruner as well, by its own name, unless a pruner of that name is registered.
    """
    found = [entry for entry in _scan() if entry.kind == _known_kind(kind)]
    if kind == "pruner":
        taken = {entry.name for entry in found}
        found += [
            replace(entry, kind="pruner", criterion=True)
            for entry in _scan()
            if entry.kind == "criterion" and entry.name not in taken
        ]
    return sorted(found)


def lookup(kind: str, name: str) -> Entry:
    """The one entry called `name`.

    Raises:
        UserError: nobody registered the name (near ones are suggested), or two distributions did (both are named).
    """
    found = [entry for entry in entries(kind) if entry.name == name]
    if not found:
        names = sorted({entry.name for entry in entries(kind)})
        raise UserError(suggest(kind, name, names))
    if len(found) > 1:
        raise UserError(
            f"{kind} {name!r} is registered twice: {found[0]} and {found[1]}; give the full class path of the one "
            f"you mean, or uninstall the other"
        )
    return found[0]


def create(kind: str, name: str, /, **options: Any) -> Any:
    """Make the strategy called `name`, as a recipe would.

    >>> create("pruner", "laep", beta=0.1)
    LAEP(alpha=inf, beta=0.1)

    Raises:
        UserError: unknown kind or name, a plug-in that does not load or fit, an option that the class does not take.
    """
    import inspect

    cls = lookup(kind, name).load()
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(cls).parameters) or "no options"
        raise UserError(f"{kind} {name!r}: {error}; it takes: {takes}") from error
    return cls(**options)


def usable(kind: str) -> tuple[dict[str, type[Any]], list[str]]:
    """Import every entry of `kind`: the classes that can be used by name, and a sentence for each that cannot."""
    classes: dict[str, type[Any]] = {}
    problems: list[str] = []
    for name in dict.fromkeys(entry.name for entry in entries(kind)):
        try:
            classes[name] = lookup(kind, name).load()
        except UserError as error:
            problems.append(str(error))
    return classes, problems


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        raise UserError(suggest("kind", kind, list(KINDS)))
    return kind


@cache
def _scan() -> tuple[Entry, ...]:
    groups = {f"moeprune.{kind}s": kind for kind in KINDS}
    found: list[Entry] = []
    seen: set[str] = set()  # of two copies of a distribution on the path the first counts, as it does for imports
    for distribution in distributions():
        points = [point for point in distribution.entry_points if point.group in groups]
        if points:
            # metadata can be missing where an uninstall was cut short
            name = str((distribution.metadata and distribution.metadata["Name"]) or "a distribution without a name")
            version = str((distribution.metadata and distribution.metadata["Version"]) or "of unknown version")
            if name not in seen:
                found += [Entry(groups[p.group], p.name, p.value.replace(" ", ""), name, version) for p in points]
            seen.add(name)
    return tuple(sorted(found))


def refresh() -> None:
    """Forget what was found, so that a plug-in installed since is seen."""
    _scan.cache_clear()


def _source_of(module: str) -> Path | None:
    """The file of `module`, found without importing it or its parents."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(len(parts)):
        try:
            spec = PathFinder.find_spec(".".join(parts[: depth + 1]), path)
        except KeyError:  # a namespace package, whose path asks for its parent to be imported
            return None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
