"""Short names on the command line and in YAML: `--pruning.pruner=laep`, `class_path: laep`.

jsonargparse resolves a name without a dot against the names of the imported subclasses of the expected type. For each
registered name this package makes an empty subclass that bears it, in a module of its own per kind
(`moeprune.names.pruner.laep`); calling that subclass makes the registered class itself, so `type(obj)` is `LAEP`.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

from moeprune import registry
from moeprune.errors import UserError


class _Kind(ModuleType):
    """`moeprune.names.<kind>`: its attributes are the registered names, made on first use."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{__name__}.{kind}", f"The short names of every {kind}.")
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return alias(self.__name__.rpartition(".")[2], name)


@cache
def alias(kind: str, name: str) -> type[Any]:
    """The subclass called `name` whose call makes the registered class."""
    try:
        cls = registry.lookup(kind, name).load()
    except UserError as error:
        raise AttributeError(str(error)) from error

    if cls.__name__ == name:  # a criterion's pruner bears its name already
        setattr(sys.modules[f"{__name__}.{kind}"], name, cls)
        return cls

    def call(_: type[Any], *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    meta = type("Alias", (type(cls),), {"__call__": call})
    made: type[Any] = meta(
        name, (cls,), {"__module__": f"{__name__}.{kind}", "__qualname__": name, "__doc__": cls.__doc__}
    )
    setattr(sys.modules[f"{__name__}.{kind}"], name, made)
    return made


def install(*kinds: str) -> list[str]:
    """Make every usable short name of these kinds known to jsonargparse; returns a sentence per plug-in left out."""
    problems = []
    for kind in kinds:
        classes, bad = registry.usable(kind)
        problems += bad
        for name, cls in classes.items():
            if cls.__name__ != name or cls.__module__.startswith(__name__):
                alias(kind, name)
    return problems


for _kind in registry.KINDS:
    sys.modules[f"{__name__}.{_kind}"] = _Kind(_kind)
    globals()[_kind] = sys.modules[f"{__name__}.{_kind}"]
