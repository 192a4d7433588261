"""Every benchmark runs at its smallest setting and writes rows of one form; the script that runs them all survives any of them."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
FIELDS = {"row", "case", "q1", "q3", "target", "met", "command"}
SMALLEST = {
    "calibration": ["--rounds=1", "--batches=1"],
    "watching": ["--steps=20"],
    "prune_event": ["--rounds=1"],
    "data": ["--steps=20"],
    "evaluation": ["--rounds=1", "--limit=1"],
    "streaming": ["--rounds=1", "--gigabytes=0.2", "--shard-mb=100"],
    "planning": ["--rounds=1", "--layers=3"],
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench")


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks put clocks around functions of the package and silence logs, for the rest of their process."""
    import torch

    from moeprune.model.router import Routing
    from moeprune.training import data, expert_pruning

    threads = torch.get_num_threads()
    for owner, name in [
        (Routing, "counts"),
        (expert_pruning.ExpertPruning, "on_train_batch_end"),
        (expert_pruning.ExpertPruning, "_prune"),
        (expert_pruning, "domain_losses"),
        (data.TrainBatches, "batch"),
    ]:
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        (unit,) = {"ratio", "seconds"} & row.keys()
        assert row.keys() - {"at_least"} == FIELDS | {unit}
        assert row["q1"] <= row["q3"]
        if row["target"] is None:
            assert row["met"] is None
        else:
            kept = row[unit] >= row["target"] if row.get("at_least") else row[unit] <= row["target"]
            assert row["met"] == kept


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("streaming", "prune_event") else ())
        for name in SMALLEST
        if name != "planning"
    ],
)
def test_rows(name: str, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if name == "streaming" and not Path("/proc/self/status").exists():
        pytest.skip("reads the resident memory from /proc")
    written = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), "--quick", *SMALLEST[name], "--json", str(written)])
    importlib.import_module(name).main()
    rows = json.loads(written.read_text())
    check(rows)
    assert all(row["command"] == f"python benchmarks/{name}.py --quick {' '.join(SMALLEST[name])}" for row in rows)
    assert capsys.readouterr().out.strip() == bench.table(rows)


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    """In a process of its own, where torch would be noticed."""
    call = [sys.executable, str(FOLDER / "planning.py"), *SMALLEST["planning"], "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    check(rows)
    assert sum(row["row"].startswith("start-up") for row in rows) == 6


GOOD = '{"row": "r", "case": "c", "ratio": 1.5, "q1": 1.4, "q3": 1.6, "target": 1.2, "met": false, "command": "x"}'
SCRIPTS = {
    "good": f"import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('[{GOOD}]')",
    "raises": "raise ValueError('a | b')",
    "silent": "",
    "garbled": "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('[{\"row\": 1}]')",
    "hangs": "import time; time.sleep(60)",
}


def test_a_script_that_fails_is_a_line_of_the_table(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "SCRIPTS", (*SCRIPTS, "missing"))
    monkeypatch.setattr(bench, "LIMIT", 3)
    monkeypatch.setattr(bench.run, "__defaults__", (3,))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--results", str(tmp_path / "results")])
    assert bench.main() == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"machine", "versions", "date", "scripts"} == results.keys()
    assert list(results["scripts"]) == [*SCRIPTS, "missing"]
    errors = {name: part["rows"][0].get("error", "") for name, part in results["scripts"].items()}
    assert errors["good"] == ""
    assert errors["raises"] == "exit code 1: ValueError: a / b"
    assert errors["silent"].startswith("exit code 0")
    assert "another form" in errors["garbled"]
    assert errors["hangs"] == "took more than 3 s"
    assert errors["missing"] == "there is no such script"
    page = (tmp_path / "results.md").read_text()
    assert "| r | c | 1.500 | 1.400 to 1.600 | ≤ 1.200 | **no** | `x` |" in page
    assert page.count("**failed**") == 5
    assert "0 of 1 targets met, 5 scripts failed" in page
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "good", "--results", str(tmp_path / "results")])
    bench.main()
    assert list(json.loads((tmp_path / "results.json").read_text())["scripts"]) == [*SCRIPTS, "missing"]  # kept


def test_quartiles_and_targets(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--json", "rows.json", "--quick"])
    row = bench.row("what", "case", [4, 1, 3, 2], 2.4)
    assert (row["q1"], row["ratio"], row["q3"], row["met"]) == (1.75, 2.5, 3.25, False)
    assert row["command"] == "python benchmarks/x.py --quick"
    assert bench.row("what", "case", [4, 1, 3, 2], 2.4, at_least=True)["met"]
    assert bench.row("what", "case", [1], None)["met"] is None
