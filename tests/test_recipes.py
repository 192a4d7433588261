"""Every recipe runs, and the README's table names every one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moeprune.cli import main
from moeprune.files import read_rows

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
COMPARISONS = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_and_prunes(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """Six steps of the real sizes on the tiny corpus; where it prunes, at step 4."""
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=6", "--trainer.enable_progress_bar=false"]
    options += [f"--data.source={corpus}", "--data.vocab_size=300", "--pruning.window=2"]
    pruning = yaml.safe_load(recipe.read_text()).get("pruning") or {}
    if "pruner" in pruning:
        options += ["--pruning.trigger=at_step", "--pruning.trigger.step=4"]
    assert main(["fit", f"--config={recipe}", *options]) == 0
    assert len(read_rows(tmp_path / "history.jsonl")) == 6
    assert len(read_rows(tmp_path / "events.jsonl")) == ("pruner" in pruning)


@pytest.mark.parametrize("recipe", [*RECIPES, *COMPARISONS], ids=lambda path: path.stem)
def test_recipe_explains_itself_and_is_in_the_readme(recipe: Path) -> None:
    assert recipe.read_text().startswith("# ")
    assert f"`{recipe.relative_to(ROOT / 'recipes')}`" in (ROOT / "README.md").read_text()


def test_comparisons_name_an_existing_recipe() -> None:
    for path in COMPARISONS:
        assert (path.parent / yaml.safe_load(path.read_text())["recipe"]).exists()
