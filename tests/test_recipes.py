"""Every recipe runs, every strategy has one, and the tables name them all."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from moeprune import registry
from moeprune.cli import main
from moeprune.compare.spec import Sweep
from moeprune.files import read_rows
from moeprune.model.config import AttentionName

ROOT = Path(__file__).parent.parent


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_benchmark", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
RECIPES, COMPARISONS = benchmark.recipes(), benchmark.comparisons()
EVERYWHERE = {  # strategies that need no recipe of their own
    ("pruner", "score"): "any criterion under this name; each criterion has a recipe under its own",
    ("allocation", "uniform"): "the default of every recipe in criteria/",
}
SOON = {  # a recipe's trigger, early enough for six steps
    "at_step": ["--pruning.trigger.step=4"],
    "at_tokens": ["--pruning.trigger.tokens=300"],
    "gradual": ["--pruning.trigger.start=3", "--pruning.trigger.end=5", "--pruning.trigger.prunes=2"],
    "metric": ["--pruning.trigger.deadline=0.6"],
    "stable": [],
}


@pytest.mark.parametrize("recipe", RECIPES, ids=benchmark.name_of)
def test_recipe_trains_and_prunes(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """Six steps of the real numbers of layers and experts on the tiny corpus; where it prunes, it does."""
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=6", "--trainer.enable_progress_bar=false"]
    options += [f"--data.source={corpus}", "--data.vocab_size=300", "--pruning.window=2", "--data.seq_len=32"]
    options += ["--model.config.d_model=32", "--model.config.d_expert=16", "--model.warmup_steps=2"]
    options += ["--data.eval_sequences=2", "--pruning.calibration_batches=2"]
    config = benchmark.whole(recipe)
    pruning = config.get("pruning", {})
    if "pruner" in pruning:
        options += SOON[pruning["trigger"]["class_path"]]
    assert main(["fit", f"--config={recipe}", *options]) == 0
    assert len(read_rows(tmp_path / "history.jsonl")) == 6
    events = read_rows(tmp_path / "events.jsonl")
    prunes = 0 if "pruner" not in pruning else 2 if pruning["trigger"]["class_path"] == "gradual" else 1
    assert len(events) == prunes
    for event in events:
        assert len(event["plan"]["kept"]) == 4
    named = {name for kind, name in benchmark.strategies(config) if kind in ("pruner", "allocation", "trigger")}
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert named <= {name.rpartition(".")[2] for _, name in benchmark.strategies(saved)}  # the file says what runs


@pytest.mark.parametrize("recipe", [*RECIPES, *COMPARISONS], ids=benchmark.name_of)
def test_recipe_explains_itself(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert benchmark.what(recipe).endswith((".", "?"))
    if recipe in RECIPES and benchmark.folder_of(recipe):
        config = benchmark.own(recipe)
        expected = f"runs/{benchmark.name_of(recipe).removesuffix('.yaml')}"
        assert config["trainer"] == {"default_root_dir": expected}  # two recipes never meet in a folder
        assert len(lines) <= 8  # two or three lines of a base


def test_folders_of_runs_differ() -> None:
    folders = [benchmark.own(recipe)["trainer"]["default_root_dir"] for recipe in RECIPES]
    assert len(set(folders)) == len(folders)


def named_by_recipes() -> set[tuple[str, str]]:
    named = {each for recipe in RECIPES for each in benchmark.strategies(benchmark.own(recipe))}
    criteria = {entry.name for entry in registry.entries("criterion")}
    return named | {("criterion", name) for kind, name in named if kind == "pruner" and name in criteria}


@pytest.mark.parametrize("kind", ["criterion", "pruner", "allocation", "trigger", "balancer", "router"])
def test_every_strategy_has_a_recipe(kind: str) -> None:
    """Those of this distribution; a third party's are its own affair."""
    registered = {(kind, entry.name) for entry in registry.entries(kind) if entry.distribution == "moeprune"}
    assert registered - named_by_recipes() - EVERYWHERE.keys() == set()


def test_exceptions_are_registered() -> None:
    for kind, name in EVERYWHERE:
        assert registry.lookup(kind, name)


def test_every_attention_has_a_recipe() -> None:
    named = {name for kind, name in named_by_recipes() if kind == "attention"}
    assert set(AttentionName.__args__) - {"standard"} <= named  # type: ignore[attr-defined]


def test_comparisons_name_an_existing_recipe() -> None:
    for path in COMPARISONS:
        config = yaml.safe_load(path.read_text())
        if path.stem == "checkpoint":  # which the command line gives
            assert "recipe" not in config
        else:
            assert (path.parent / config["recipe"]).exists()


def test_comparison_of_strategies_has_every_criterion_and_pruner_that_takes_a_ratio() -> None:
    config = yaml.safe_load((ROOT / "recipes" / "compare" / "strategies.yaml").read_text())
    sweep = Sweep(**config["sweep"])
    named = {made["class_path"] for _, _, made in sweep.pruners()}
    wanted = {entry.name for entry in registry.entries("criterion") if entry.distribution == "moeprune"}
    assert wanted | {"m_smoe", "hc_smoe"} <= named
    laep = [v for v in config["variants"].values() if v.get("strategy") == "laep"]
    assert [v["budget"] for v in laep] == ["25 %", "50 %"]


def test_comparison_of_strategies_starts_from_the_quick_starts_trunk() -> None:
    quick, strategies = (
        yaml.safe_load((ROOT / "recipes" / "compare" / f"{name}.yaml").read_text())
        for name in ("quickstart", "strategies")
    )
    assert strategies["recipe"] == quick["recipe"]
    assert strategies["trunk"] == quick["trunk"]


# --- the tables


def results() -> dict[str, Any]:
    path = benchmark.RESULTS
    return json.loads(path.read_text())["recipes"] if path.exists() else {}  # type: ignore[no-any-return]


def test_table_is_what_the_generator_makes() -> None:
    """A new recipe, another docstring or a new result: `python benchmarks/recipes.py --table`."""
    assert benchmark.TABLE.read_text(encoding="utf-8") == benchmark.table(results())


def test_table_names_every_recipe_with_its_result() -> None:
    text = benchmark.table({})
    for recipe in RECIPES:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| [`{benchmark.name_of(recipe)}`]")]
        assert row.endswith("| - | not run |")
    row = {"digest": benchmark.digest(RECIPES[0]), "status": "failed", "error": "out of luck | again"}
    assert "| - | failed: out of luck \\| again |" in benchmark.table({benchmark.name_of(RECIPES[0]): row})
    row = {**row, "digest": "of another version"}
    assert "out of luck" not in benchmark.table({benchmark.name_of(RECIPES[0]): row})


def test_every_recipe_but_new_ones_has_a_source() -> None:
    for recipe in RECIPES:
        named = list(benchmark.strategies(benchmark.own(recipe)))
        assert (benchmark.source(recipe) == "-") == (not named and benchmark.folder_of(recipe) == ""), recipe


def test_changes_make_the_recipe_of_its_base() -> None:
    base = benchmark.whole(benchmark.BASE)
    for recipe in RECIPES:
        config = benchmark.whole(recipe)
        assert benchmark.merged(base, benchmark.changed(config, base)) == config


def test_recipes_that_share_a_trunk_differ_in_the_pruner_alone() -> None:
    laep = benchmark.whole(benchmark.LAEP)
    for recipe in RECIPES:
        made = benchmark.variant(recipe)
        config = benchmark.whole(recipe)
        if made.get("start") == "scratch" or recipe in (benchmark.BASE, benchmark.QUICK):
            continue
        assert set(made["config"]["pruning"]) <= {"pruner", "constraints"}
        rest = {key: value for key, value in config["pruning"].items() if key not in ("pruner", "constraints")}
        assert rest == {key: value for key, value in laep["pruning"].items() if key != "pruner"}
        assert (config["model"], config["data"]) == (laep["model"], laep["data"])
    assert benchmark.variant(ROOT / "recipes" / "routers" / "groups.yaml") == {
        "start": "scratch",
        "config": {
            "model": {"config": {"router": "sigmoid", "router_options": {"n_groups": 4, "top_groups": 2}}},
            "pruning": {key: laep["pruning"][key] for key in ("pruner", "trigger")},
        },
    }
    assert benchmark.variant(ROOT / "recipes" / "triggers" / "at_step.yaml")["start"] == "scratch"


def test_readme_names_existing_recipes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"recipes/([\w/]+\.yaml)", text):
        assert (ROOT / "recipes" / name).exists(), name
    assert "](recipes/README.md)" in text
