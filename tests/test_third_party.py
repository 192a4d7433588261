"""A distribution of somebody else (docs/acme-moeprune), installed with pip into a fresh environment, used from there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest

from moeprune import registry
from moeprune.cli import main
from moeprune.commands import plugins
from moeprune.files import read_rows

ROOT = Path(__file__).parents[1]
ACME = ROOT / "docs" / "acme-moeprune"


class Environment:
    """A virtual environment that sees the packages of this one, so that nothing is downloaded again."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        venv.create(folder, with_pip=importlib.util.find_spec("pip") is None, symlinks=os.name != "nt")
        own = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        )
        self.packages = Path(own.stdout.strip())
        outer = [path for path in site.getsitepackages() if Path(path).is_dir()]
        # not plain paths: moeprune itself may be installed as editable, by a .pth file of its own
        calls = "; ".join(f"site.addsitedir({path!r})" for path in outer)
        (self.packages / "outer.pth").write_text(f"import site; {calls}\n")

    def run(self, *arguments: str | Path, folder: Path = ROOT, code: int = 0) -> str:
        """Output of `python -m <arguments>`; fails unless it exits with `code`."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        done = subprocess.run(
            [self.python, "-m", *map(str, arguments)],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution by itself, outside of the repository."""
    files = shutil.ignore_patterns("__pycache__", ".*", "dist", "build")
    return Path(shutil.copytree(ACME, tmp_path_factory.mktemp("acme") / "acme-moeprune", ignore=files))


@pytest.fixture(scope="module")
def environment(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment") / "venv")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    made.run("pip", "install", "--quiet", "--disable-pip-version-check", *offline, copied)
    return made


@pytest.fixture(scope="module")
def trained(environment: Environment, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of its recipe on the tiny corpus, pruned at step 4."""
    folder = tmp_path_factory.mktemp("runs") / "acme"
    options = [f"--trainer.default_root_dir={folder}", "--trainer.max_steps=6", "--trainer.enable_progress_bar=false"]
    options += [f"--data.source={corpus}", "--data.vocab_size=300", "--pruning.window=2"]
    options += ["--pruning.trigger=at_step", "--pruning.trigger.step=4"]
    environment.run("moeprune", "fit", f"--config={ACME / 'acme.yaml'}", *options)
    return folder


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([[50, 30, 10, 10], [1, 97, 1, 1], [25, 25, 25, 25]]))
    return path


def test_installed_as_anybody_would(environment: Environment) -> None:
    """A wheel in the new environment's own folder; no file of it is in the repository's environment."""
    assert (environment.packages / "acme_moeprune.py").read_text() == (ACME / "acme_moeprune.py").read_text()
    assert list(environment.packages.glob("acme_moeprune-*.dist-info"))
    where = environment.run("pip", "show", "acme-moeprune", "--disable-pip-version-check")
    assert f"Location: {environment.packages}" in where
    assert "Requires: moeprune, numpy" in where


def test_both_are_listed_with_their_distribution(environment: Environment) -> None:
    lines = [line.split() for line in environment.run("moeprune", "plugins", "pruner", "--check").splitlines()]
    assert ["acme_quota", "acme-moeprune", "1.0.0", "Keeps,"] in [line[:4] for line in lines]
    assert ["acme_careful", "*", "acme-moeprune", "1.0.0"] in [line[:4] for line in lines]
    assert "acme_careful" in environment.run("moeprune", "plugins", "criterion", "--check")


def test_plans_from_loads(environment: Environment, counts: Path) -> None:
    """80 % of the tokens: two experts, one (raised to top-2), all four."""
    table = environment.run(
        "moeprune", "plan", f"--counts={counts}", "--pruner=acme_quota", "--pruner.share=0.8", "--top_k=2"
    )
    rows = [line.split() for line in table.splitlines() if re.match(r"\s+\d", line)]
    assert [row[2] for row in rows] == ["2", "2", "4"]
    wrong = environment.run("moeprune", "plan", f"--counts={counts}", "--pruner=acme_quota", "--pruner.share=2", code=2)
    assert wrong.splitlines()[-1].startswith("moeprune: error: share must lie in (0, 1], got 2")


def test_its_recipe_trains_and_prunes(trained: Path) -> None:
    assert len(read_rows(trained / "history.jsonl")) == 6
    (event,) = read_rows(trained / "events.jsonl")
    assert event["step"] == 4
    pruner = event["plan"]["provenance"]["pruner"]
    assert pruner == {"class": "acme_moeprune.Quota", "share": 0.95}
    (loads,) = [row["loads"] for row in read_rows(trained / "loads.jsonl") if row["step"] == 4]
    for kept, load in zip(
        event["plan"]["kept"], loads, strict=True
    ):  # of the last window, which the evidence ends with
        assert 2 <= len(kept) < len(load)


def test_its_criterion_prunes_a_checkpoint_by_its_name(environment: Environment, trained: Path, tmp_path: Path) -> None:
    said = environment.run(
        "moeprune",
        "prune",
        f"--model={trained / 'last.ckpt'}",
        "--pruner=acme_careful",
        "--pruner.ratio=0.25",
        "--pruner.z=0.5",
        "--calibration_batches=2",
        f"--output={tmp_path / 'pruned'}",
    )
    before = [len(kept) for kept in read_rows(trained / "events.jsonl")[0]["plan"]["kept"]]
    rows = [line.split() for line in said.splitlines() if re.match(r"\s+\d", line)]
    assert [(int(row[1]), int(row[2])) for row in rows] == [(n, max(2, n - n // 4)) for n in before]
    assert (tmp_path / "pruned" / "model.safetensors").exists()


def test_its_own_tests_pass(environment: Environment, copied: Path) -> None:
    said = environment.run("pytest", "-q", "-p", "no:cacheprovider", folder=copied)
    passed = re.search(r"(\d+) passed", said)
    assert passed
    assert int(passed[1]) > 20, "a check each, for two strategies"
    assert "skipped" not in said


def test_elsewhere_the_name_is_unknown(counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if any(entry.distribution == "acme-moeprune" for entry in registry.entries("pruner")):
        pytest.skip("acme-moeprune is installed here")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("acme-moeprune")
    assert main(["plan", f"--counts={counts}", "--pruner=acme_quota"]) == 2
    assert "there is no pruner 'acme_quota'" in capsys.readouterr().err


def test_the_guide_shows_these_very_files() -> None:
    """Every block of docs/plugins.md that names a file of acme-moeprune above it is part of that file."""
    guide = (ROOT / "docs" / "plugins.md").read_text()
    shown = re.findall(r"^`acme-moeprune/(\S+)`[^\n]*\n\n```\w*\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in shown} == {"acme_moeprune.py", "pyproject.toml", "test_acme.py", "acme.yaml"}
    for name, block in shown:
        text = (ACME / name).read_text()
        for part in block.split("...\n"):  # what the guide leaves out
            assert part.strip("\n") in text, f"{name}: {part}"


def test_the_command_explains_every_kind() -> None:
    explained = (plugins.command.__doc__ or "").partition("kind:")[2].partition(";")[0]
    assert sorted(re.findall(r"\w+", explained.replace(" or ", " "))) == sorted(registry.KINDS)


def test_the_listing_marks_criteria_and_keeps_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    registry.refresh()
    assert main(["plugins", "pruner"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "* a criterion" in lines[0]
    marked = {line.split()[0]: line.split()[1] == "*" for line in lines[1:]}
    assert marked == {entry.name: entry.criterion for entry in registry.entries("pruner")}
    assert marked["reap"]
    assert not marked["laep"]
    assert len({re.search(r"\S+ \d+\.\d+\.\d+ ", line).start() for line in lines[1:]}) == 1  # type: ignore[union-attr]
    assert main(["plugins", "criterion"]) == 0
    assert "*" not in capsys.readouterr().out.splitlines()[0]
