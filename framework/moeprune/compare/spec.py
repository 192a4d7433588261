"""What a comparison is: one recipe, one trunk, variants that each change a few lines of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moeprune.errors import UserError, suggest

RESERVED = (  # what the comparison's folder holds beside the folders of its variants
    *("trunk", "evidence", "plots", "recipes", "comparison.json", "results.json", "report.html", "report.md"),
    *("seconds.json", "speed.json", "speed.log", "job.json", "error.txt"),
)
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
        strategy: what this variant shares with others that remove more or less in the same way; plots join them.
        family: of strategies; its colour in the plots.
        budget: how much is removed, in a few words; variants of one budget are ranked together.
    """

    label: str = ""
    start: Literal["trunk", "scratch", "untrained"] = "trunk"
    config: dict[str, Any] = field(default_factory=dict)
    drift: bool = False
    strategy: str = ""
    family: str = ""
    budget: str = ""

    @classmethod
    def from_config(cls, name: str, config: Any) -> Variant:
        """From what a comparison's YAML says of the variant `name`.

        Raises:
            UserError: not a mapping, an unknown key, or a value of the wrong type.
        """
        config = {} if config is None else config
        if not isinstance(config, dict):
            raise UserError(f"variant {name!r} must be a mapping of options, got {config!r}")
        known = {
            "label": str,
            "start": str,
            "config": dict,
            "drift": bool,
            "strategy": str,
            "family": str,
            "budget": str,
        }
        for key, value in config.items():
            if key not in known:
                raise UserError(f"variant {name!r}: {suggest('option', key, list(known))}")
            if not isinstance(value, known[key]):
                raise UserError(f"variant {name!r}: {key} must be a {known[key].__name__}, got {value!r}")
        if config.get("start", "trunk") not in ("trunk", "scratch", "untrained"):
            raise UserError(f"variant {name!r}: start must be trunk, scratch or untrained, got {config['start']!r}")
        return cls(**config)


@dataclass(frozen=True)
class Sweep:
    """Pruners by family, each at several ratios: a variant per pruner and ratio, such as `reap-25`.

    Args:
        ratios: shares of the experts to remove, in (0, 1).
        families: pruners that take a ratio, by family: a short name, or `name: {class_path, init_args}` for one with options.

    Raises:
        UserError: a ratio out of range, no pruner, one twice, or something else than a pruner.
    """

    ratios: list[float]
    families: dict[str, list[Any]]

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UserError(f"sweep.ratios must lie in (0, 1), got {ratio}; they are shares of experts to remove")
        names = [name for _, name, _ in self.pruners()]
        if not names or not self.ratios:
            raise UserError("the sweep is empty; give sweep.ratios, and pruners under sweep.families")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the sweep names {name!r} twice; keep one, or give one of them another name")

    def pruners(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Family, name and configuration of each, in order."""
        found = []
        for family, entries in self.families.items():
            for entry in entries:
                if isinstance(entry, str):
                    name, config = entry, {"class_path": entry}
                elif isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict):
                    ((name, config),) = entry.items()
                else:
                    raise UserError(
                        f"sweep.families: {entry!r} is neither a short name nor `name: {{class_path, init_args}}`"
                    )
                found.append((family, name, config))
        return found

    def variants(self) -> dict[str, dict[str, Any]]:
        """What one would write under `variants:`, family by family."""
        return {
            f"{name}-{100 * ratio:g}": {
                "label": f"{name} {100 * ratio:g} %",
                "strategy": name,
                "family": family,
                "budget": f"{100 * ratio:g} %",
                "config": {
                    "pruning": {"pruner": {**config, "init_args": {**(config.get("init_args") or {}), "ratio": ratio}}}
                },
            }
            for family, name, config in self.pruners()
            for ratio in self.ratios
        }


@dataclass
class Comparison:
    """Everything that decides the results; kept in the folder, so that a folder is never continued with another one.

    Args:
        name: of the comparison.
        texts: of the recipe and all it builds on, oldest first.
        trunk: lines of the recipe that the trunk changes: its trigger.
        variants: by name, in the order of the table.
        reference: the variant that the others are compared with.
        suite: short name of the suite that scores every variant; None scores none.
        limit: documents per task; None for all.
        options: arguments of `moeprune fit` for every run.
        train_on: whether variants go on training; without, all that is measured is the loss just before and after the prune.
        checkpoint: which existing model is pruned instead of a trunk, and how it is read and measured; None with a recipe.
    """

    name: str
    texts: list[str]
    trunk: dict[str, Any]
    variants: dict[str, Variant]
    reference: str
    suite: str | None
    limit: int | None
    options: list[str]
    train_on: bool = True
    checkpoint: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError("the comparison has no variants; add some under `variants:`")
        if self.reference not in self.variants:
            raise UserError(suggest("variant (reference)", self.reference, list(self.variants)))
        if self.variants[self.reference].start == "untrained":
            raise UserError(f"the reference {self.reference!r} is untrained; compare with a trained variant")
        for name, variant in self.variants.items():
            if name in RESERVED:
                raise UserError(
                    f"a variant cannot be called {name!r}, which the comparison keeps in its folder for itself; choose another name"
                )
            if name.startswith(".") or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise UserError(
                    f"a variant cannot be called {name!r}; use letters, digits, '_', '-' and '.', which does not come first"
                )
            if self.checkpoint is not None:
                self._check_prune_of_checkpoint(name, variant)
                continue
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
            if not self.train_on:
                self._check_prunes_only(name, variant)

    def _check_prunes_only(self, name: str, variant: Variant) -> None:
        if variant.start != "trunk" or variant.drift:
            raise UserError(f"variant {name!r} needs training, which train_on: false leaves out; remove it")
        if "pruner" in (variant.config.get("pruning") or {}) and name == self.reference:
            raise UserError(f"the reference {name!r} prunes; without training it is what the others are pruned from")
        for key, value in variant.config.items():
            for option in sorted(value) if isinstance(value, dict) else [""]:
                if (key, option) not in (("pruning", "pruner"), ("pruning", "constraints")):
                    where = f"{key}.{option}" if option else key
                    raise UserError(
                        f"variant {name!r} changes {where}, which no prune depends on or all share (train_on: false); "
                        f"change the trunk"
                    )

    def _check_prune_of_checkpoint(self, name: str, variant: Variant) -> None:
        if variant.start != "trunk" or variant.drift:
            which = "drift" if variant.drift else f"start: {variant.start}"
            raise UserError(
                f"variant {name!r} sets {which}, but a checkpoint is pruned and not trained on; leave it out"
            )
        pruning = variant.config.get("pruning") or {}
        if not isinstance(pruning, dict):
            raise UserError(f"variant {name!r}: pruning must be a mapping of options, got {pruning!r}")
        if "trigger" in pruning:
            raise UserError(f"variant {name!r} sets a trigger, but a checkpoint is pruned at once; leave it out")
        for key, value in variant.config.items():
            for option in sorted(value) if isinstance(value, dict) else [""]:
                if (key, option) not in (("pruning", "pruner"), ("pruning", "constraints")):
                    raise UserError(
                        f"variant {name!r} sets {f'{key}.{option}' if option else key}, but a checkpoint is pruned and not "
                        f"trained on; variants differ in pruning.pruner and pruning.constraints alone"
                    )
        if name == self.reference and pruning:
            raise UserError(
                f"the reference {name!r} prunes; it is the checkpoint as it is, which the others are pruned from"
            )
        if name != self.reference and "pruner" not in pruning:
            raise UserError(
                f"variant {name!r} names no pruner, and {self.reference!r} is the checkpoint as it is already; give it "
                f"config: {{pruning: {{pruner: ...}}}}, or remove it"
            )

    @property
    def needs_trunk(self) -> bool:
        """Whether any variant starts from the trunk of a recipe."""
        return self.checkpoint is None and any(variant.start == "trunk" for variant in self.variants.values())

    def identity(self) -> dict[str, Any]:
        """Everything that decides the results, as plain data."""
        return asdict(self)


def job_folder(folder: Path, name: str) -> Path:
    """Where the run called `name` keeps its files."""
    return folder / name
