"""What a comparison is: one recipe, one trunk, variants that each change a few lines of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moeprune.errors import UserError, suggest

DATA_THAT_MUST_NOT_DIFFER = {"source", "domains", "vocab_size", "seq_len", "eval_sequences"}


@dataclass
class Variant:
    """One row of the table.

    Args:
        label: a few words for the report; the name if empty.
        start: `trunk` goes on from the trunk's end, where it prunes if its config names a pruner; `scratch` is a full run
            of its own; `untrained` is the fresh model, not trained at all, as a control.
        config: lines of the recipe that this variant changes.
        drift: this variant differs from the reference in nothing that matters (another order of the same text): how far it
            ends from the reference is the noise that any difference of final results has to be seen against.
    """

    label: str = ""
    start: Literal["trunk", "scratch", "untrained"] = "trunk"
    config: dict[str, Any] = field(default_factory=dict)
    drift: bool = False

    @classmethod
    def from_config(cls, name: str, config: Any) -> Variant:
        """From what a comparison's YAML says of the variant `name`.

        Raises:
            UserError: not a mapping, an unknown key, or a value of the wrong type.
        """
        config = {} if config is None else config
        if not isinstance(config, dict):
            raise UserError(f"variant {name!r} must be a mapping of options, got {config!r}")
        known = {"label": str, "start": str, "config": dict, "drift": bool}
        for key, value in config.items():
            if key not in known:
                raise UserError(f"variant {name!r}: {suggest('option', key, list(known))}")
            if not isinstance(value, known[key]):
                raise UserError(f"variant {name!r}: {key} must be a {known[key].__name__}, got {value!r}")
        if config.get("start", "trunk") not in ("trunk", "scratch", "untrained"):
            raise UserError(f"variant {name!r}: start must be trunk, scratch or untrained, got {config['start']!r}")
        return cls(**config)


@dataclass
class Comparison:
    """Everything that decides the results; kept in the folder, so that a folder is never continued with another one.

    Args:
        name: of the comparison.
        texts: of the recipe and all it builds on, oldest first.
        trunk: lines of the recipe that the trunk changes: its trigger.
        variants: by name, in the order of the table.
        reference: the variant that the others are compared with.
        suite: short name of the suite that scores every variant.
        limit: documents per task; None for all.
        options: arguments of `moeprune fit` for every run.
    """

    name: str
    texts: list[str]
    trunk: dict[str, Any]
    variants: dict[str, Variant]
    reference: str
    suite: str
    limit: int | None
    options: list[str]

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError("the comparison has no variants; add some under `variants:`")
        if self.reference not in self.variants:
            raise UserError(suggest("variant (reference)", self.reference, list(self.variants)))
        if self.variants[self.reference].start == "untrained":
            raise UserError(f"the reference {self.reference!r} is untrained; compare with a trained variant")
        for name, variant in self.variants.items():
            if name == "trunk" or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise UserError(
                    f"a variant cannot be called {name!r}; use letters, digits, '_', '-' and '.', and not 'trunk'"
                )
            for key, value in variant.config.items():
                if key in ("data", "model", "pruning", "trainer", "checkpoint") and not isinstance(value, dict):
                    raise UserError(f"variant {name!r}: {key} must be a mapping of options, got {value!r}")
            for key in sorted(DATA_THAT_MUST_NOT_DIFFER & variant.config.get("data", {}).keys()):
                raise UserError(
                    f"variant {name!r} changes data.{key}, so its losses would not compare; change the recipe"
                )
            if not isinstance(variant.config.get("model", {}).get("balancers", []), list):
                raise UserError(
                    f"variant {name!r}: model.balancers must be a list, got {variant.config['model']['balancers']!r}"
                )
            if variant.drift and (variant.start == "untrained" or name == self.reference):
                raise UserError(f"variant {name!r} cannot be a drift control: it is untrained, or the reference itself")
            if "pruning" in variant.config and "trigger" in variant.config["pruning"] and variant.start == "trunk":
                raise UserError(
                    f"variant {name!r} sets a trigger, but it prunes where the trunk ends; move it to start: scratch"
                )

    @property
    def needs_trunk(self) -> bool:
        """Whether any variant starts from the trunk."""
        return any(variant.start == "trunk" for variant in self.variants.values())

    def identity(self) -> dict[str, Any]:
        """Everything that decides the results, as plain data."""
        return asdict(self)


def job_folder(folder: Path, name: str) -> Path:
    """Where the run called `name` keeps its files."""
    return folder / name
