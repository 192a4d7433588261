"""Plug-ins as anybody would install them: a module and a dist-info folder on sys.path."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeprune import registry
from moeprune.cli import main
from moeprune.errors import UserError

ROOT = Path(__file__).parents[1]
ACME = '''
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner


class Acme(Pruner):
    """Keeps the first experts.

    Args:
        keep: how many.
    """

    def __init__(self, keep: int = 4) -> None:
        self.keep = keep

    def plan(self, evidence, constraints=Constraints()):
        return PrunePlan.from_kept([layer.ids[: self.keep] for layer in evidence.layers], evidence, constraints)


class NoPlan(Pruner):
    """Lacks plan."""


class NotAPruner:
    """Derives from nothing."""


value = 3
'''
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(distribution, module text, entry points): name = module:attribute lines, all pruners."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(distribution: str, text: str, points: str, metadata: bool = True) -> None:
        (tmp_path / f"{distribution}_module.py").write_text(text)
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[moeprune.pruners]\n{points}\n")
        registry.refresh()

    registry.refresh()
    yield make
    registry.refresh()
    for name in set(sys.modules) - before:
        if name.endswith("_module"):
            del sys.modules[name]


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([[9, 8, 7, 6, 5, 4, 3, 2]] * 2))
    return path


def kept(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines() if re.match(r"\s+\d", line)]


def test_listed_with_its_description_but_not_imported(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(
        "lister",
        'raise RuntimeError("imported")\nclass L:\n    """Says what it does.\n\n    More."""\n',
        "listed = lister_module:L",
    )
    assert main(["plugins", "pruner"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["listed"])
    assert "lister 1.0" in line
    assert line.endswith("Says what it does.")
    assert "lister_module" not in sys.modules


def test_used_by_short_name_from_python_command_line_and_yaml(
    install: Install, counts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", ACME, "acme = acme_module:Acme")
    made = registry.create("pruner", "acme", keep=3)
    assert (type(made).__name__, made.keep) == ("Acme", 3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pruner:\n  class_path: acme\n  init_args: {keep: 6}\n")
    for arguments, n in [
        (["--pruner=acme"], "4"),
        (["--pruner=acme", "--pruner.keep=5"], "5"),
        (["--config", str(recipe)], "6"),
        (["--pruner=acme_module.Acme", "--pruner.keep=7"], "7"),
    ]:
        assert main(["plan", f"--counts={counts}", *arguments]) == 0
        assert kept(capsys.readouterr().out) == [n, n]


def test_a_name_taken_twice_is_refused_and_no_other(
    install: Install, counts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("one", ACME, "twice = one_module:Acme\nonly_one = one_module:Acme")
    install("two", ACME, "twice = two_module:Acme")
    with pytest.raises(UserError, match=r"twice: one_module:Acme of one 1\.0 and two_module:Acme of two 1\.0"):
        registry.create("pruner", "twice")
    assert main(["plan", f"--counts={counts}", "--pruner=twice"]) == 2
    assert "pruner 'twice' is registered twice" in capsys.readouterr().err.splitlines()[-1]
    for name in ("only_one", "laep"):
        assert main(["plan", f"--counts={counts}", f"--pruner={name}"]) == 0
    assert main(["plugins"]) == 0
    assert capsys.readouterr().out.count("registered twice") == 1


def test_of_two_copies_of_a_distribution_the_first_counts(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("copied", ACME, "copied = copied_module:Acme")
    other = tmp_path / "later" / "copied-0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: copied\nVersion: 0.9\n")
    (other / "entry_points.txt").write_text("[moeprune.pruners]\ncopied = old_module:Acme\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(other.parent)])
    registry.refresh()
    assert registry.lookup("pruner", "copied").version == "1.0"


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("NotAPruner", ["registered as a pruner", "moeprune.pruning.pruner.Pruner", "another group"]),
        ("value", ["registered as a pruner", "does not derive from"]),
        ("NoPlan", ["does not define plan", "moeprune.pruning.pruner.Pruner"]),
        ("Absent", ["could not be loaded", "AttributeError", "uninstall misfit"]),
    ],
)
def test_misfits_are_refused_by_name(install: Install, attribute: str, words: list[str]) -> None:
    install("misfit", ACME, f"misfit = misfit_module:{attribute}\nfits = misfit_module:Acme")
    with pytest.raises(UserError) as raised:
        registry.create("pruner", "misfit")
    for word in [f"misfit_module:{attribute} of misfit 1.0", *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    registry.create("pruner", "fits")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("def f(:\n  pass", "SyntaxError"),
        ('raise RuntimeError("two\\nlines")', "RuntimeError: two lines"),
    ],
)
def test_a_broken_one_is_reported_and_disables_nothing(
    install: Install, counts: Path, capsys: pytest.CaptureFixture[str], text: str, word: str
) -> None:
    install("broken", text, "broken = broken_module:X")
    assert main(["plan", f"--counts={counts}", "--pruner=laep"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for part in ("left out", "'broken'", "broken 1.0", word, "mend or uninstall broken"):
        assert part in lines[0]
    assert main(["plugins", "--check"]) == 2
    assert word in capsys.readouterr().err
    assert main(["plan", f"--counts={counts}", "--pruner=broken"]) == 2
    assert "could not be loaded" in capsys.readouterr().err.splitlines()[-1]


def test_missing_metadata_breaks_nothing(install: Install) -> None:
    install("nameless", ACME, "nameless = nameless_module:Acme", metadata=False)
    assert registry.create("pruner", "nameless").keep == 4
    assert registry.create("pruner", "laep").beta == 0.1


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UserError, match=r"no pruner 'laap'; did you mean 'laep'"):
        registry.lookup("pruner", "laap")
    with pytest.raises(UserError, match="no kind 'prunr'; did you mean 'pruner'"):
        registry.entries("prunr")
    with pytest.raises(UserError, match=r"'bta'; it takes: alpha, beta"):
        registry.create("pruner", "laep", bta=1)


@pytest.mark.parametrize("arguments", [[], ["pruner"], ["--kind=pruner"], ["--check=true"]])
def test_plugins_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    registry.refresh()
    assert main(["plugins", *arguments]) == 0
    out = capsys.readouterr().out
    assert "pruner (moeprune.pruners)" in out
    assert re.search(r"laep +moeprune \S+ +Layer-adaptive expert pruning", out)
    assert ("suite (moeprune.suites)" in out) == (arguments in ([], ["--check=true"]))


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_built_in_loads_and_says_what_it_is(kind: str) -> None:
    registry.refresh()
    built_in = [entry for entry in registry.entries(kind) if entry.distribution == "moeprune"]
    assert built_in
    for entry in built_in:
        documentation = entry.load().__doc__ or ""
        assert entry.description() == documentation.splitlines()[0]
        assert re.fullmatch(r"[A-Z].{10,115}\.", entry.description())
        assert re.search(r"^ +Source: \S", documentation, re.MULTILINE), entry


def test_the_core_imports_nothing_from_the_plug_ins() -> None:
    files = sorted((ROOT / "framework" / "moeprune").rglob("*.py"))
    assert len(files) > 30
    guilty = [f for f in files if re.search(r"^\s*(from|import) moeprune_plugins", f.read_text(), re.MULTILINE)]
    assert not guilty


@pytest.mark.parametrize("command", ["--help", "--version", "plugins", "plan", "plan --help"])
def test_help_listing_and_planning_import_no_torch(command: str, counts: Path) -> None:
    arguments = command.split() + ([f"--counts={counts}", "--pruner=laep"] if command == "plan" else [])
    code = (
        "import sys; from moeprune.cli import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'pytorch_lightning', 'lm_eval'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
