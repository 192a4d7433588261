"""What every recipe costs and reaches, at the quick start's length: recipes/results.json and the table in recipes/README.md.

    python benchmarks/recipes.py [RECIPE ...] [--workers 2] [--output runs/recipes]     # those that have no result yet
    python benchmarks/recipes.py --table                                                # the table alone

Recipes that differ from laep.yaml in the pruner or its constraints alone go on from one trunk, which ends where their trigger
fires; the others are trained from the start. A call that was stopped goes on; a recipe that was changed is run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import yaml

from moeprune import registry
from moeprune.files import read_json, read_rows, write_text

RECIPES = Path(__file__).parent.parent / "recipes"
RESULTS, TABLE = RECIPES / "results.json", RECIPES / "README.md"
BASE, QUICK, LAEP = RECIPES / "base.yaml", RECIPES / "quickstart.yaml", RECIPES / "laep.yaml"
FOLDERS = {  # heading of each folder, and the kind of strategy it is about
    "": ("", ""),
    "criteria": ("Criteria", "pruner"),
    "allocations": ("Numbers per layer", "allocation"),
    "pruners": ("Other pruners, and LAEP with other options", "pruner"),
    "triggers": ("When to prune", "trigger"),
    "balancers": ("Balancing", "balancer"),
    "routers": ("Routers", "router"),
    "attention": ("Attention", "attention"),
}
Config = dict[str, Any]


# --- recipes as data


def recipes() -> list[Path]:
    """Every recipe for `moeprune fit`, those of the top folder first."""
    found = [path for path in RECIPES.rglob("*.yaml") if path.parent.name != "compare"]
    order = list(FOLDERS)
    return sorted(found, key=lambda path: (order.index(folder_of(path)), path.stem != "base", path.name))


def comparisons() -> list[Path]:
    """Every recipe for `moeprune compare`."""
    return sorted((RECIPES / "compare").glob("*.yaml"))


def folder_of(recipe: Path) -> str:
    """`criteria` for recipes/criteria/reap.yaml; '' for those of the top folder."""
    return "" if recipe.parent == RECIPES else recipe.parent.name


def name_of(recipe: Path) -> str:
    """criteria/reap.yaml."""
    return recipe.relative_to(RECIPES).as_posix()


def own(recipe: Path) -> Config:
    """What the file itself says."""
    config: Config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return config


def whole(recipe: Path) -> Config:
    """What the file says with all it builds on, but for the folder that the run goes to."""
    config = own(recipe)
    base = config.pop("base", None)
    config.get("trainer", {}).pop("default_root_dir", None)
    return merged(whole(recipe.parent / base), config) if base else config


def merged(a: Config, b: Config) -> Config:
    """`a` with what `b` says on top; another class comes without the options of the one before."""
    if b.get("class_path", a.get("class_path")) != a.get("class_path"):
        return copy.deepcopy(b)
    out = dict(a)
    for key, value in b.items():
        out[key] = merged(a[key], value) if isinstance(value, dict) and isinstance(a.get(key), dict) else value
    return out


def what(recipe: Path) -> str:
    """The comment at the top, up to the end of its first sentence."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    return re.split(r"(?<=\.) (?=[A-Z0-9])", comment)[0]


def strategies(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every (kind, name) of a strategy that a configuration names, outermost first."""
    kind = {"balancers": "balancer"}.get(key, key)
    if kind in (*registry.KINDS, "attention"):
        for value in config if isinstance(config, list) else [config]:
            name = value.get("class_path") if isinstance(value, dict) else value
            if isinstance(name, str):
                yield kind, name
    for inner, value in config.items() if isinstance(config, dict) else ():
        yield from strategies(value, inner)
    for value in config if isinstance(config, list) else ():
        yield from strategies(value)


def source(recipe: Path) -> str:
    """The `Source:` of the strategy that a recipe is about, its first sentence."""
    kind = FOLDERS[folder_of(recipe)][1]
    named = [*strategies(own(recipe)), *strategies(whole(recipe))]
    about = next((each for each in named if each[0] == kind), named[0] if named else None)
    return source_of(*about) if about else "-"


def source_of(kind: str, name: str) -> str:
    """The first sentence of the `Source:` in the class's docstring."""
    if kind == "attention":
        from moeprune.model.attention import ATTENTIONS

        cls: type[Any] = ATTENTIONS[name]
    else:
        cls = registry.lookup(kind, name).load()
    paragraph = (inspect.getdoc(cls) or "").partition("Source: ")[2].partition("\n\n")[0]
    text = " ".join(paragraph.split())
    return re.split(r"(?<!e\.g\.)(?<=\.) (?=[A-Z])|; |(?<=\d): ", text)[0].rstrip(".") or "-"


def digest(recipe: Path) -> str:
    """Changes with what the recipe does, not with its comments."""
    return fingerprint([whole(QUICK), whole(recipe)])


def fingerprint(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


# --- runs


def run_name(recipe: Path) -> str:
    """criteria.reap."""
    return name_of(recipe).removesuffix(".yaml").replace("/", ".")


def variant(recipe: Path) -> Config:
    """The recipe as a variant of the quick start's base: from the trunk if it prunes where laep.yaml does."""
    config = changed(whole(recipe), whole(BASE))
    for key in ("max_steps", "limit_val_batches"):  # the quick start's
        config.get("trainer", {}).pop(key, None)
    if not config.get("trainer", True):
        del config["trainer"]
    pruning = dict(config.get("pruning", {}))
    made = {key: pruning.pop(key) for key in ("pruner", "constraints") if key in pruning}
    if made and set(config) == {"pruning"} and pruning == {"trigger": whole(LAEP)["pruning"]["trigger"]}:
        return {"config": {"pruning": made}}
    return {"config": config, **({"start": "scratch"} if config else {})}


def changed(config: Config, base: Config) -> Config:
    """What `merged(base, ...)` needs to become `config`."""
    return {
        key: changed(value, base[key])
        if isinstance(value, dict) and isinstance(base.get(key), dict) and "class_path" not in value
        else value
        for key, value in config.items()
        if key not in base or base[key] != value
    }


def run(wanted: list[Path], folder: Path, workers: int) -> dict[str, Any]:
    """Run recipes; name -> result."""
    from rich.console import Console

    from moeprune.compare import gather, job, runner
    from moeprune.compare.spec import Comparison, Variant

    variants = {run_name(recipe): Variant.from_config(run_name(recipe), variant(recipe)) for recipe in wanted}
    trunk = {"pruning": {"trigger": whole(LAEP)["pruning"]["trigger"]}}
    texts = [path.read_text(encoding="utf-8") for path in (BASE, QUICK)]
    comparison = Comparison("recipes", texts, trunk, variants, next(iter(variants)), None, None, [])
    stamps = {job.TRUNK: fingerprint([whole(QUICK), trunk]), **{run_name(recipe): digest(recipe) for recipe in wanted}}
    for name, stamp in stamps.items():
        if (folder / name).exists() and (folder / name / "digest").read_text() != stamp:
            shutil.rmtree(folder / name)
        write_text(folder / name / "digest", stamp)
    write_text(folder / "comparison.json", json.dumps(comparison.identity()))
    runner.prepare(comparison, folder, overwrite=False)
    began = time.time()
    failed = runner.run(comparison, folder, workers, Console())
    rows = gather.gather(comparison, folder, failed, {}, time.time() - began, workers)["variants"]
    return {
        name_of(recipe): {"digest": digest(recipe), **result(row, folder)}
        for recipe, row in zip(wanted, rows, strict=True)
    }


def result(row: Config, folder: Path) -> Config:
    """What results.json keeps of a run."""
    if row["status"] != "done":
        return {"status": "failed", "error": row["error"]}
    place = folder / row["name"]
    history = read_rows(place / "history.jsonl")
    history += read_rows(folder / "trunk" / "history.jsonl") if row["start"] == "trunk" else []
    events = [event for event in read_rows(place / "events.jsonl") if "plan" in event]
    seconds = statistics.median(step["seconds"] for step in history) * len(history)
    seconds += sum(sum(event["seconds"].values()) for event in events)
    jump = row["jump"]
    return {
        "status": "done",
        "seconds": round(seconds),
        "parameters": row["parameters"],
        "parameters_kept": round(row["parameters_kept"], 4),
        "experts_kept": row["experts_kept"],
        "prunes": [prune["step"] for prune in row["prunes"]],
        "jump": jump and {"value": round(jump["value"], 4), "half_width": round(jump["half_width"], 4)},
        "val_loss": round(row["val_loss"]["end"]["mean"], 4),
    }


# --- the table


def table(results: dict[str, Any]) -> str:
    """recipes/README.md: what every recipe is, where it comes from, what it costs and reaches."""
    steps = whole(QUICK)["trainer"]["max_steps"]
    lines = [
        "# Recipes",
        "",
        "<!-- Generated by `python benchmarks/recipes.py --table` from the recipes and results.json. -->",
        "",
        "`moeprune fit --config RECIPE`. Each names the recipe that it builds on in its line `base:` and changes two or three lines.",
        "",
        f"Measured by `python benchmarks/recipes.py` at the quick start's length, {steps} steps ({whole(BASE)['trainer']['max_steps']} "
        "are in base.yaml): *cost* is the seconds of its training steps (their number times the median) and of the prune, on one core of a busy machine; *loss* is the "
        "final validation loss in nats per token. One seed: the quick start's drift control, which differs in the order of the text alone, "
        "ends 0.016 apart, so losses that lie closer say nothing. *Jump* is the validation loss just after the prune minus just before, ± half of "
        "its 95 % interval.",
    ]
    for folder, (heading, _) in FOLDERS.items():
        lines += ["", f"## {heading}"] if heading else []
        lines += ["", "| recipe | what | source | cost | result |", "|---|---|---|---|---|"]
        for recipe in recipes():
            if folder_of(recipe) == folder:
                found = results.get(name_of(recipe))
                fresh = found if found and found["digest"] == digest(recipe) else None
                cost = f"{fresh['seconds']} s" if fresh and fresh["status"] == "done" else "-"
                cells = [
                    f"[`{name_of(recipe)}`]({name_of(recipe)})",
                    what(recipe),
                    source(recipe),
                    cost,
                    reached(fresh),
                ]
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += [
        "",
        "## Comparisons",
        "",
        "`moeprune compare --config RECIPE`: many variants, one table, plots, a report.",
        "",
    ]
    lines += ["| recipe | what |", "|---|---|"]
    lines += [f"| [`{name_of(recipe)}`]({name_of(recipe)}) | {what(recipe)} |" for recipe in comparisons()]
    return "\n".join(lines) + "\n"


def reached(found: Config | None) -> str:
    """A run's result in a few words."""
    if found is None:
        return "not run"
    if found["status"] != "done":
        return f"failed: {found['error']}"
    text = f"loss {found['val_loss']:.3f}"
    if not found["prunes"]:
        return text
    steps = ", ".join(map(str, found["prunes"]))
    kept, share = sum(found["experts_kept"]), 100 * found["parameters_kept"]
    jump = f"jump {found['jump']['value']:+.3f} ± {found['jump']['half_width']:.3f} at step {steps}"
    return (
        f"{text}; {kept} experts ({' '.join(map(str, found['experts_kept']))}), {share:.0f} % of the parameters; {jump}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path, help="default: all that have no result yet")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    args = parser.parse_args()
    results = read_json(RESULTS, "results")["recipes"] if RESULTS.exists() else {}
    results = {name_of(recipe): results[name_of(recipe)] for recipe in recipes() if name_of(recipe) in results}
    if not args.table:
        wanted = [path.resolve() for path in args.recipes] or [
            recipe
            for recipe in recipes()
            if (old := results.get(name_of(recipe))) is None
            or old["digest"] != digest(recipe)
            or old["status"] != "done"
        ]
        if wanted:
            results |= run(wanted, args.output, args.workers)
            ordered = {name_of(recipe): results[name_of(recipe)] for recipe in recipes() if name_of(recipe) in results}
            write_text(RESULTS, json.dumps({"recipes": ordered}, indent=1) + "\n")
    write_text(TABLE, table(results))
    print(f"{TABLE} has {len(results)} of {len(recipes())} recipes with a result")


if __name__ == "__main__":
    main()
