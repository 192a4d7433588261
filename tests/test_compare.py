"""Comparisons: results, statistics, a failing variant, an interruption, another comparison in the folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import RECIPE

from moeprune import registry
from moeprune.cli import main
from moeprune.compare.gather import gather
from moeprune.compare.report import terminal_table, write_report
from moeprune.compare.results import NO_DIFFERENCE, difference, mean_and_stderr
from moeprune.compare.spec import RESERVED, Comparison, Sweep, Variant
from moeprune.files import read_rows

LAEP = {"class_path": "laep", "init_args": {"beta": 0.3}}
GRADUAL = {"class_path": "gradual", "init_args": {"start": 5, "end": 15, "prunes": 3}}
COMPARISON: dict[str, Any] = {
    "name": "tiny",
    "recipe": "tiny.yaml",
    "reference": "base",
    "limit": 2,
    "workers": 2,
    "trunk": {"pruning": {"trigger": {"class_path": "at_step", "init_args": {"step": 8}}}},
    "variants": {
        "base": {"label": "no pruning"},
        "laep": {"config": {"pruning": {"pruner": {**LAEP, "class_path": "moeprune_plugins.pruners.laep.LAEP"}}}},
        "random": {
            "config": {
                "pruning": {
                    "pruner": {
                        "class_path": "random",
                        "init_args": {"allocation": {"class_path": "match", "init_args": {"pruner": LAEP}}},
                    }
                }
            }
        },
        "switch": {"start": "scratch", "config": {"model": {"balancers": ["switch"]}}},
        "drift": {"drift": True, "config": {"data": {"seed": 1}}},
        "gradual": {
            "start": "scratch",
            "config": {
                "pruning": {
                    "pruner": {**LAEP, "init_args": {"beta": 0.5}},
                    "trigger": GRADUAL,
                }
            },
        },
        "untrained": {"start": "untrained"},
    },
}
PRUNES: dict[str, Any] = {  # the same trunk, without training on
    **COMPARISON,
    "train_on": False,
    "suite": None,
    "limit": None,
    "sweep": {
        "ratios": [0.25, 0.5],
        "families": {"outputs": ["reap"], "gradients": ["taylor"], "chance": [{"luck": {"class_path": "random"}}]},
    },
    "variants": {
        "base": {"label": "no pruning"},
        "laep": COMPARISON["variants"]["laep"],
        "searched": {
            "config": {
                "pruning": {
                    "pruner": {
                        "class_path": "frequency",
                        "init_args": {
                            "allocation": {
                                "class_path": "evolutionary",
                                "init_args": {"population": 2, "generations": 1},
                            }
                        },
                    }
                }
            }
        },
        "broken": {"config": {"pruning": {"pruner": LAEP, "constraints": {"multiple_of": 3, "min_keep": 7}}}},
    },
}


def write(folder: Path, corpus: Path, comparison: dict[str, Any]) -> Path:
    recipe = {**RECIPE, "data": {**RECIPE["data"], "source": str(corpus), "seq_len": 160}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    return folder / "compare.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    assert main(["compare", f"--config={write(folder, corpus, COMPARISON)}", f"--output={folder / 'out'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("prunes")
    assert main(["compare", f"--config={write(folder, corpus, PRUNES)}", f"--output={folder / 'out'}"]) == 1
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())  # type: ignore[no-any-return]


def test_results_hold_every_variant(finished: Path) -> None:
    found = results(finished)
    assert found["trunk"]["step"] == 8
    rows = {row["name"]: row for row in found["variants"]}
    assert list(rows) == list(COMPARISON["variants"])
    assert all(row["status"] == "done" for row in rows.values())
    assert rows["laep"]["experts_kept"] == rows["random"]["experts_kept"] != [8, 8]
    assert rows["laep"]["pruner"] == "LAEP(alpha=inf, beta=0.3)"
    assert all(share < 0.3 for share in rows["laep"]["removed_load"])
    assert rows["laep"]["parameters_kept"] < 1 == rows["base"]["parameters_kept"]
    assert rows["laep"]["active_parameters"] < rows["laep"]["parameters"]
    assert rows["base"]["vs_reference"] is None
    assert rows["laep"]["jump"]["value"] == pytest.approx(
        rows["laep"]["val_loss"]["after"]["mean"] - rows["laep"]["val_loss"]["before"]["mean"]
    )
    assert rows["laep"]["val_loss"]["before"] == rows["random"]["val_loss"]["before"]  # one trunk
    assert rows["laep"]["history"]["step"] == list(range(9, 21))  # equal steps after the trunk
    assert rows["switch"]["history"]["step"] == list(range(1, 21))
    assert rows["laep"]["vs_reference"]["noise"] == pytest.approx(abs(rows["drift"]["vs_reference"]["value"]))
    assert rows["untrained"]["speed"] is None
    assert rows["laep"]["speed"]["ratio"]["median"] > 0
    assert rows["untrained"]["val_loss"]["end"]["mean"] > rows["base"]["val_loss"]["end"]["mean"]
    assert rows["laep"]["memory"]["optimizer_bytes"] >= 2 * 4 * rows["laep"]["parameters"]
    assert {len(row["scores"]) for row in rows.values()} == {15}


def test_several_prunes_add_up(finished: Path) -> None:
    row = next(row for row in results(finished)["variants"] if row["name"] == "gradual")
    assert [prune["step"] for prune in row["prunes"]] == [5, 10, 15]
    events = read_rows(finished / "out" / "gradual" / "events.jsonl")
    sequences = [
        sum(np.array(event["val_loss"]["after"][d]) - event["val_loss"]["before"][d] for event in events)
        for d in ("sky", "code")
    ]
    assert row["jump"]["value"] == pytest.approx(np.mean([part.mean() for part in sequences]))
    assert row["jump"]["stderr"] == pytest.approx(np.sqrt(sum(part.var(ddof=1) / len(part) for part in sequences)) / 2)
    assert row["jump"]["value"] == pytest.approx(sum(prune["jump"]["value"] for prune in row["prunes"]))
    kept = [prune["experts_kept"] for prune in row["prunes"]]
    assert kept[-1] == row["experts_kept"]
    assert sum(kept[0]) > sum(kept[-1])
    first, last = events[0]["val_loss"]["before"], events[-1]["val_loss"]["after"]
    assert row["val_loss"]["before"]["mean"] == pytest.approx(np.mean([np.mean(first[d]) for d in first]))
    assert row["val_loss"]["after"]["mean"] == pytest.approx(np.mean([np.mean(last[d]) for d in last]))
    plan = json.loads((finished / "out" / "gradual" / "plan.json").read_text())
    assert plan["before"] == [list(range(8))] * 2  # one plan for all three
    assert plan["kept"] == events[-1]["plan"]["kept"]
    assert row["removed_load"] == []
    assert "sum of 3 prunes" in (finished / "out" / "report.html").read_text()


def test_a_recipe_that_prunes_gradually_goes_on_doing_so(corpus: Path, tmp_path: Path) -> None:
    """The trunk ends at the first of the prunes; a variant that does not change them has them all, those of a run without a
    trunk, and one that names a pruner of its own is refused, since it would prune once."""
    config = write(tmp_path, corpus, {"name": "gradual", "recipe": "tiny.yaml", "reference": "base", "suite": None})
    recipe = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    recipe["pruning"] |= {"pruner": {**LAEP, "init_args": {"beta": 0.5}}, "trigger": GRADUAL}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    comparison = yaml.safe_load(config.read_text()) | {"variants": {"base": {}, "alone": {"start": "scratch"}}}
    config.write_text(yaml.safe_dump(comparison))
    assert main(["compare", f"--config={config}", f"--output={tmp_path / 'out'}"]) == 0
    rows = {row["name"]: row for row in results(tmp_path)["variants"]}
    assert [prune["step"] for prune in rows["base"]["prunes"]] == [5, 10, 15]
    for key in ("prunes", "jump", "experts_kept", "val_loss"):
        assert rows["base"][key] == rows["alone"][key], key
    page = (tmp_path / "out" / "report.md").read_text()
    assert "The trunk ended at step 5 of 20" in page
    assert "base was pruned at steps 5, 10 and 15." in page
    comparison["variants"]["random"] = {"config": {"pruning": {"pruner": "random"}}}
    config.write_text(yaml.safe_dump(comparison))
    assert main(["compare", f"--config={config}", f"--output={tmp_path / 'other'}"]) == 2


# --- scores without a value per document


def score_of(documents: list[float], value: float, metric: str = "f1") -> dict[str, Any]:
    return {
        "metric": metric, "higher_is_better": True, "value": value, "stderr": None, "n": 3, "documents": documents,
    }  # fmt: skip


def test_a_metric_of_the_corpus_is_left_out_of_paired_differences(tmp_path: Path) -> None:
    """squadv2 and its like give text per document, which makes no number: the score stands, a difference does not."""
    variants = {"base": Variant(), "other": Variant(), "drift": Variant(drift=True)}
    comparison = Comparison("squad", ["{}"], {}, variants, "base", "offline", None, [])
    tasks = {task: list(names) for task, names in registry.create("suite", "offline").families().items()}
    odd = next(iter(tasks.values()))[0]
    for name, shift in (("base", 0.0), ("other", 0.25), ("drift", 0.1)):
        scores = {task: score_of([shift, 1.0, 0.5], 0.5 + shift / 3) for names in tasks.values() for task in names}
        scores[odd] = score_of([], 40.0 + shift, "f1")
        result = {
            "step": 1, "parameters": 3, "unpruned_parameters": 3, "active_parameters": 2, "experts_kept": [2],
            "weights_bytes": 1, "optimizer_bytes": None, "peak_bytes": None, "plan": None,
            "val_loss": {"sky": [1.0, 2.0 + shift]}, "scores": scores,
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    found = gather(comparison, tmp_path, {}, {}, 1.0, 1)
    row = found["variants"][1]
    assert row["scores"][odd]["value"] == 40.25
    assert row["scores"][odd]["vs_reference"] is None
    first, *rest = tasks
    assert row["families"][first]["vs_reference"] is None
    assert row["families"][first]["stderr"] is None
    n = len(tasks[first])
    assert row["families"][first]["value"] == pytest.approx((40.25 + (n - 1) * (0.5 + 0.25 / 3)) / n)
    for family in rest:
        assert row["families"][family]["vs_reference"]["value"] == pytest.approx(0.25 / 3)
        assert row["families"][family]["vs_reference"]["noise"] == pytest.approx(0.1 / 3)
    write_report(json.loads(json.dumps(found, allow_nan=False)), tmp_path)
    assert f"No paired difference for {odd}" in (tmp_path / "report.html").read_text()
    assert len(terminal_table(found).columns) > 4


# --- without training on


def test_prunes_are_those_of_runs_that_train_on(finished: Path, pruned: Path, corpus: Path, tmp_path: Path) -> None:
    """Same experts, same losses: against a comparison that trains on, and against `moeprune fit` from the trunk's checkpoint."""
    (ours,) = read_rows(pruned / "out" / "laep" / "events.jsonl")
    (theirs,) = read_rows(finished / "out" / "laep" / "events.jsonl")
    assert ours["plan"]["kept"] == theirs["plan"]["kept"]
    known = theirs["plan"]["provenance"]
    assert {key: ours["plan"]["provenance"][key] for key in known} == known
    assert ours["val_loss"] == theirs["val_loss"]
    assert ours["parameters"] == theirs["parameters"]
    for name, pruner in (("reap-50", "reap"), ("taylor-25", "taylor")):
        ratio = int(name[-2:]) / 100
        arguments = [f"--pruning.pruner={pruner}", f"--pruning.pruner.ratio={ratio}", "--pruning.trigger=at_step"]
        arguments += ["--pruning.trigger.step=8", f"--ckpt_path={pruned / 'out' / 'trunk' / 'trunk.ckpt'}"]
        folder = tmp_path / name
        assert (
            main(["fit", f"--config={pruned / 'tiny.yaml'}", f"--trainer.default_root_dir={folder}", *arguments]) == 0
        )
        (ours,) = read_rows(pruned / "out" / name / "events.jsonl")
        (theirs,) = read_rows(folder / "events.jsonl")
        assert ours["plan"]["kept"] == theirs["plan"]["kept"]
        assert ours["val_loss"] == theirs["val_loss"]


def test_results_of_prunes(pruned: Path) -> None:
    found = results(pruned)
    rows = {row["name"]: row for row in found["variants"]}
    made = [f"{name}-{ratio}" for name in ("reap", "taylor", "luck") for ratio in (25, 50)]
    assert list(rows) == ["base", "laep", "searched", "broken", *made]
    assert not found["train_on"]
    assert found["suite"] is None
    assert rows["base"]["jump"] is None
    assert "multiple_of=3" in rows.pop("broken")["error"]
    for name, row in rows.items():
        assert row["vs_reference"] is None
        assert row["speed"] is None
        assert row["scores"] == row["families"] == {}
        assert row["history"]["step"] == row["loads"]["step"] == []
        if name != "base":
            assert row["val_loss"]["before"] == rows["base"]["val_loss"]["end"]
            assert row["val_loss"]["after"] == row["val_loss"]["end"]
    assert rows["reap-25"]["experts_kept"] == [6, 6]
    assert rows["luck-50"]["experts_kept"] == [4, 4]
    assert (rows["luck-50"]["strategy"], rows["luck-50"]["family"]) == ("luck", "chance")
    assert rows["luck-50"]["pruner"] == "random(seed=0, ratio=0.5, allocation=Uniform())"
    for budget in ("25 %", "50 %"):
        group = [row for row in rows.values() if row["budget"] == budget]
        lowest = min(group, key=lambda row: row["jump"]["value"])
        assert len(group) == 3
        assert lowest["vs_lowest"] is None
        for row in group:
            if row is not lowest:
                assert row["vs_lowest"]["value"] == pytest.approx(row["jump"]["value"] - lowest["jump"]["value"])
    files = {path.name for path in (pruned / "out" / "reap-25").iterdir()}
    assert files == {".lock", "log.txt", "variant.yaml", "plan.json", "events.jsonl", "result.json"}  # no checkpoint


def test_prunes_are_measured_once_and_kept(pruned: Path) -> None:
    """A second call runs what failed, from the same measurement, and nothing else."""
    kept = [*(pruned / "out").rglob("result.json"), *(pruned / "out" / "trunk").rglob("*.safetensors")]
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    assert len(stamps) == 11
    before = results(pruned)
    assert main(["compare", f"--config={pruned / 'compare.yaml'}", f"--output={pruned / 'out'}"]) == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in kept}
    assert results(pruned)["variants"] == before["variants"]


def test_sweep_is_what_one_would_write() -> None:
    sweep = Sweep([0.25], {"a": ["reap", {"mine": {"class_path": "magnitude", "init_args": {"norm": "l1"}}}]})
    made = sweep.variants()
    assert list(made) == ["reap-25", "mine-25"]
    assert made["mine-25"] == {
        "label": "mine 25 %",
        "strategy": "mine",
        "family": "a",
        "budget": "25 %",
        "config": {"pruning": {"pruner": {"class_path": "magnitude", "init_args": {"norm": "l1", "ratio": 0.25}}}},
    }


def test_files(finished: Path) -> None:
    for name in ("report.html", "report.md", "results.json", "laep/plan.json", "laep/config.yaml", "trunk/trunk.ckpt"):
        assert (finished / "out" / name).stat().st_size > 0, name
    plan = json.loads((finished / "out" / "laep" / "plan.json").read_text())
    assert plan["kept"]
    own = {path.name for path in (finished / "out").iterdir()} - set(COMPARISON["variants"])
    assert {name for name in own if not name.startswith(".")} <= set(RESERVED)


def test_second_call_reuses_everything(finished: Path, corpus: Path) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in (finished / "out").rglob("last.ckpt")}
    before = results(finished)
    assert main(["compare", f"--config={finished / 'compare.yaml'}", f"--output={finished / 'out'}"]) == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in (finished / "out").rglob("last.ckpt")}
    after = results(finished)
    assert after["variants"] == before["variants"]


def test_another_comparison_in_the_folder_is_refused(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, corpus, {**COMPARISON, "limit": 3})
    assert main(["compare", f"--config={config}", f"--output={finished / 'out'}"]) == 2
    assert "other limit" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    assert main(["compare", f"--config={config}", f"--output={tmp_path / 'mine'}"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"


def test_failing_variant_leaves_the_others_alone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks for constraints that no plan can meet; the report has it as failed, the others are done."""
    broken = {"config": {"pruning": {"pruner": LAEP, "constraints": {"multiple_of": 3, "min_keep": 7}}}}
    variants = {"base": {}, "broken": broken, "laep": COMPARISON["variants"]["laep"]}
    config = write(tmp_path, corpus, {**COMPARISON, "suite": None, "variants": variants})
    assert main(["compare", f"--config={config}", f"--output={tmp_path / 'out'}"]) == 1
    assert results(tmp_path)["families"] == {}
    rows = {row["name"]: row for row in results(tmp_path)["variants"]}
    assert [rows[name]["status"] for name in variants] == ["done", "failed", "done"]
    assert "multiple_of=3" in rows["broken"]["error"]
    assert "multiple_of=3" in (tmp_path / "out" / "report.html").read_text()
    assert "failed: broken" in capsys.readouterr().out


def test_killed_comparison_continues(finished: Path, corpus: Path, tmp_path: Path) -> None:
    """SIGKILL to the comparison and all its runs in the middle of the variants; called again, it ends with the same results."""
    config = write(tmp_path, corpus, COMPARISON)
    command = [sys.executable, "-m", "moeprune", "compare", f"--config={config}", f"--output={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 120
    while not (tmp_path / "out" / "trunk" / "result.json").exists() and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    trunk = (tmp_path / "out" / "trunk" / "trunk.ckpt").stat().st_mtime_ns
    assert main(["compare", f"--config={config}", f"--output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "trunk" / "trunk.ckpt").stat().st_mtime_ns == trunk
    ours, theirs = results(tmp_path), results(finished)
    for one, other in zip(ours["variants"], theirs["variants"], strict=True):
        assert one["val_loss"] == other["val_loss"]
        assert one["experts_kept"] == other["experts_kept"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": "bose"}, "base"),
        ({"variants": {"base": {}, "a": {"config": {"pruning": {"pruner": "lape"}}}}}, "laep"),
        ({"suite": "ofline"}, "offline"),
        ({"limit": 0}, "limit"),
        ({"workers": 0}, "workers"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml"),
        ({"variants": {"base": {"start": "untrained"}}}, "untrained"),
        ({"variants": {"trunk": {}, "base": {}}}, "trunk"),
        ({"variants": {"results.json": {}, "base": {}}}, "'results.json', which the comparison keeps"),
        ({"variants": {".lock": {}, "base": {}}}, "cannot be called '.lock'; use letters"),
        ({"variants": {"base": {}, "a": {"config": {"pruning": 3}}}}, "pruning"),
        ({"variants": {"base": {}, "a": {"confg": {}}}}, "config"),
        ({"variants": {"base": {}, "a": {"start": "trunc"}}}, "trunk"),
        ({"variants": {"base": {}, "a": {"config": {"data": {"domains": ["sky"]}}}}}, "data.domains"),
        ({"variants": {}}, "variants"),
        ({"train_on": False}, "suite: null"),
        ({"train_on": False, "suite": None}, "'switch' needs training"),
        ({**PRUNES, "variants": {"base": {"config": {"pruning": {"pruner": LAEP}}}}}, "the reference 'base' prunes"),
        ({**PRUNES, "variants": {"base": {}, "a": {"config": {"pruning": {"window": 3}}}}}, "pruning.window"),
        ({**PRUNES, "variants": {"base": {}, "a": {"config": {"seed_everything": 3}}}}, "seed_everything"),
        ({"sweep": {"ratios": [0.5], "families": {"a": ["raep"]}}}, "reap"),
        ({"sweep": {"ratios": [0.5], "families": {"a": ["laep"]}}}, "'laep' (laep) takes no ratio"),
        ({"sweep": {"ratios": [1.5], "families": {"a": ["reap"]}}}, "(0, 1), got 1.5"),
        ({"sweep": {"ratios": [0.5], "families": {"a": ["reap"], "b": ["reap"]}}}, "'reap' twice"),
        ({"sweep": {"ratios": [0.5], "families": {"a": [3]}}}, "neither a short name"),
        ({"sweep": {"ratios": [], "families": {"a": ["reap"]}}}, "sweep is empty"),
        (
            {"sweep": {"ratios": [0.5], "families": {"a": ["reap"]}}, "variants": {"base": {}, "reap-50": {}}},
            "one already",
        ),
        ({"variants": None}, "missing: variants"),
        ({"reference": None}, "missing: reference"),
        (
            {"options": ["--model.checkpoint=hf"]},
            "'untrained' is untrained, but the recipe goes on from model.checkpoint=hf",
        ),
        (
            {"variants": {"base": {}, "a": {"start": "untrained", "config": {"model": {"checkpoint": "hf"}}}}},
            "'a' is untrained, but the recipe goes on from model.checkpoint=hf",
        ),
        ({"trunk": {"pruning": {"trigger": GRADUAL}}}, "'laep' would prune once, where the trunk ends, but"),
        ({"trunk": {}, "options": ["--pruning.trigger=gradual"]}, "start: scratch"),
    ],
)
def test_bad_comparison(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    config = write(tmp_path, corpus, {**COMPARISON, **change})
    assert main(["compare", f"--config={config}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("moeprune: error: ")
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_difference_words() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(4, 1, 400)
    assert difference(base + rng.normal(0, 0.1, 400), base)["verdict"] == NO_DIFFERENCE
    assert difference(base + rng.normal(0.05, 0.1, 400), base)["verdict"] == "higher"
    assert difference(base - 0.05 + rng.normal(0, 0.1, 400), base)["verdict"] == "lower"
    assert difference(base + rng.normal(0.05, 0.1, 400), base, drifts=[0.04, 0.04])["verdict"] == NO_DIFFERENCE


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=40))
def test_difference_weighs_strata_equally(rows: list[tuple[int, float, float]]) -> None:
    strata, a, b = (list(column) for column in zip(*rows, strict=True))
    found = difference(a, b, strata)
    means = [np.mean([x - y for s, x, y in rows if s == stratum]) for stratum in set(strata)]
    assert found["value"] == pytest.approx(np.mean(means), abs=1e-9)
    groups = [[x - y for s, x, y in rows if s == stratum] for stratum in sorted(set(strata))]
    if min(map(len, groups)) > 1:
        assert (found["value"], found["stderr"]) == pytest.approx(mean_and_stderr(groups), abs=1e-9)


def test_difference_of_almost_equal_documents() -> None:
    """A variance whose square is no longer a floating-point number still has an interval."""
    found = difference([0.0, 0.0], [0.0, 3e-150])
    assert found["half_width"] == pytest.approx(12.7062 * 1.5e-150, rel=1e-4)


def test_interval_covers_the_truth() -> None:
    """Over 400 repetitions a 95 % interval around a true difference of 0 leaves it out about 5 % of the time."""
    rng = np.random.default_rng(1)
    wrong = sum(
        difference(rng.normal(0, 1, 60), np.zeros(60), [0] * 30 + [1] * 30)["verdict"] != NO_DIFFERENCE
        for _ in range(400)
    )
    assert 8 <= wrong <= 40


@pytest.mark.parametrize(("controls", "at_most"), [(1, 0.13), (3, 0.08)])
def test_interval_covers_the_truth_when_runs_drift(controls: int, at_most: float) -> None:
    """Equal runs that drift by more than documents tell are seldom called different; a single control promises less, since it
    is small by luck now and then and shares the reference with the difference that is judged."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(600):
        reference, variant, *drifted = rng.normal(0, 1, 2 + controls)
        documents = rng.normal(0, 2, 100)
        found = difference(documents + variant, np.full(100, reference), drifts=[d - reference for d in drifted])
        wrong += found["verdict"] != NO_DIFFERENCE
    assert wrong <= at_most * 600


def test_one_document_detects_nothing() -> None:
    assert difference([1.0], [0.0])["verdict"] == NO_DIFFERENCE
