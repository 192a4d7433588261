"""The quick start's claims, on the quick start itself. Only what its statistics carry is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeprune.balancing.metrics import load_metrics
from moeprune.cli import main
from moeprune.files import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parent.parent
DRAWS = ("random", "random_1", "random_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    assert main(["compare", f"--config={ROOT / 'recipes' / 'compare' / 'quickstart.yaml'}", f"--output={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rows(results: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in results["variants"]}


def test_loads_drift_apart(folder: Path) -> None:
    """Inequality grows from the first window after warm-up to the last of the trunk, in every layer."""
    windows = [row for row in read_rows(folder / "trunk" / "loads.jsonl") if row["first"] >= 60]
    for layer in range(4):
        first, last = (load_metrics(np.array(windows[i]["loads"][layer]))["gini"] for i in (0, -1))
        assert last > first


def test_removed_load_is_below_beta_and_counts_differ(rows: dict[str, Any]) -> None:
    assert all(0 < share < 0.1 for share in rows["laep"]["removed_load"])
    assert len(set(rows["laep"]["experts_kept"])) > 1
    for name in ("taylor", "magnitude", *DRAWS):
        assert rows[name]["experts_kept"] == rows["laep"]["experts_kept"]
    assert sum(rows["uniform"]["experts_kept"]) == sum(rows["laep"]["experts_kept"])


def test_laep_hurts_less_than_random(rows: dict[str, Any]) -> None:
    """The jump of the loss at the prune, beside the mean of three random draws."""
    assert rows["laep"]["jump"]["value"] < np.mean([rows[name]["jump"]["value"] for name in DRAWS])


def test_training_beats_not_training(rows: dict[str, Any]) -> None:
    untrained = rows["untrained"]["families"]
    assert rows["base"]["families"]["bits per byte"]["value"] < untrained["bits per byte"]["value"] - 0.5
    assert rows["base"]["families"]["word order"]["value"] > untrained["word order"]["value"] + 0.2
    for family, chance in (("word order", 0.5), ("last word", 0.25), ("indentation", 0.25)):
        score = untrained[family]
        assert abs(score["value"] - chance) < 3 * score["stderr"], family


def test_words_follow_the_statistics(results: dict[str, Any], rows: dict[str, Any]) -> None:
    """Of the final losses only that of the untrained model is called different; drift controls are called equal."""
    assert rows["untrained"]["vs_reference"]["verdict"] == "higher"
    assert rows["drift"]["vs_reference"]["verdict"] == "no detectable difference"
    assert results["trunk"]["reason"].startswith(("stable:", "deadline:"))


def test_pruned_variants_have_the_parameters_they_claim(rows: dict[str, Any]) -> None:
    for row in rows.values():
        per_expert = 3 * 128 * 64 + 128
        gone = 4 * 32 - sum(row["experts_kept"])
        assert row["parameters"] == rows["base"]["parameters"] - gone * per_expert
