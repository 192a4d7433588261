"""Every benchmark at its small setting, as one table: what stands, and how far it is from its target.

    python benchmarks/bench.py [--only NAME ...] [--full] [--results benchmarks/results]        (make bench)

Runs each script of this folder that writes rows (`SCRIPTS`) with `--quick --json FILE`, one after the other, and writes
`results.md` and `results.json`: machine, versions, date, and per row its median, quartiles, target and command. A script that
fails, hangs or is not there is a line of the table. Under ten minutes on two cores; `--full` leaves `--quick` out, `--only`
runs some of them and keeps the other rows of `results.json`.

A row is {"row", "case", "ratio" or "seconds", "q1", "q3", "target", "met", "command"}; `target` is the most it may be, or, where
`at_least` is true, the least; null if there is none. The functions below are what the scripts share.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import logging
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = (
    "experts", "training_step", "watching", "calibration", "prune_event", "planning", "streaming", "evaluation", "data",
)  # fmt: skip
PACKAGES = ("moeprune", "torch", "pytorch-lightning", "lm-eval", "transformers", "numpy", "safetensors", "tokenizers")
LIMIT = 300  # seconds that a script may take with --quick
COLUMNS = ("what", "case", "median", "quartiles", "target", "met")
Row = dict[str, Any]


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small setting, seconds to a minute and a half")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    return parser


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    warm: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, in random order within a round; `warm` rounds before that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warm):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            began = clock()
            calls[name]()
            if turn >= warm:
                seconds[name].append(clock() - began)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """q1, median, q3."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return at(0.25), at(0.5), at(0.75)


def row(
    what: str,
    case: str,
    values: Sequence[float],
    target: float | None = None,
    unit: str = "ratio",
    at_least: bool = False,
) -> Row:
    """One row: median and quartiles of `values`, and whether the median keeps to the target."""
    q1, median, q3 = quartiles(values)
    met = None if target is None else median >= target if at_least else median <= target
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(_without_json(sys.argv[1:]))}".strip()
    found = {"row": what, "case": case, unit: median, "q1": q1, "q3": q3, "target": target, "met": met}
    return {**found, **({"at_least": True} if at_least else {}), "command": command}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


class Spent:
    """CPU seconds that functions of a process take: `Spent().on(owner, "name")` counts the calls of `owner.name` from then on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._within = False

    def on(self, owner: Any, name: str) -> Spent:
        """Count this function as well; calls within counted calls count once."""
        found = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
        inner = found.fget if isinstance(found, property) else found

        @functools.wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return inner(*args, **kwargs)
            self._within, began = True, time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began
                self._within = False

        setattr(owner, name, property(counted) if isinstance(found, property) else counted)
        return self

    def take(self) -> float:
        """Seconds since the last call of this."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def training(steps: int, each: Callable[[int, float], None], pruning: Any = None) -> None:
    """A run of the quick start's model on the embedded corpus, 8 x 128 tokens per step, with Lightning, on one thread.

    Args:
        steps: optimizer steps.
        each: called after each step with its number, from 1, and its CPU seconds, data and callbacks included.
        pruning: the `ExpertPruning` callback, if any.
    """
    import pytorch_lightning as pl
    import torch

    from moeprune.training.data import TextData
    from moeprune.training.module import MoELanguageModel

    class Clock(pl.Callback):
        began = 0.0

        def on_train_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            now = time.process_time()
            each(trainer.global_step, now - self.began)
            self.began = time.process_time()

    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            callbacks=[*([] if pruning is None else [pruning]), Clock()],
        )
        trainer.fit(MoELanguageModel(), datamodule=TextData())


def report(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the rows, and write them where --json says."""
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], command: bool = False) -> str:
    """Rows as a Markdown table."""
    columns = (*COLUMNS, "command") if command else COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for each in rows:
        if "error" in each:
            cells = [each["row"], each["error"], "-", "-", "-", "**failed**"]
        else:
            sign = "≥" if each.get("at_least") else "≤"
            unit = "ratio" if "ratio" in each else "seconds"
            show = _ratio if unit == "ratio" else _seconds
            target = "-" if each["target"] is None else f"{sign} {show(each['target'])}"
            met = {True: "yes", False: "**no**", None: "-"}[each["met"]]
            cells = [
                each["row"],
                each["case"],
                show(each[unit]),
                f"{show(each['q1'])} to {show(each['q3'])}",
                target,
                met,
            ]
        if command:
            cells.append(f"`{each['command']}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"


def _without_json(args: Sequence[str]) -> list[str]:
    kept = []
    skip = False
    for arg in args:
        if not skip and arg != "--json" and not arg.startswith("--json="):
            kept.append(arg)
        skip = arg == "--json"
    return kept


def run(name: str, full: bool, limit: float = LIMIT) -> list[Row]:
    """The rows of one script, or one row that says why there are none."""
    script = HERE / f"{name}.py"
    options = [] if full else ["--quick"]
    failed = {"row": name, "command": shlex.join(["python", f"benchmarks/{name}.py", *options])}
    if not script.exists():
        return [{**failed, "error": "there is no such script"}]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "rows.json"
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        call = [sys.executable, str(script), *options, "--json", str(written)]
        try:
            done = subprocess.run(
                call, cwd=HERE.parent, env=environment, timeout=None if full else limit, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return [{**failed, "error": f"took more than {limit:.0f} s"}]
        if done.returncode or not written.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            return [{**failed, "error": f"exit code {done.returncode}: {last[:160]}".replace("|", "/")}]
        try:
            rows: list[Row] = json.loads(written.read_text(encoding="utf-8"))
            table(rows, command=True)
        except (ValueError, KeyError, TypeError) as error:
            return [{**failed, "error": f"rows of another form ({type(error).__name__}: {error})"}]
        return rows


def machine() -> dict[str, Any]:
    """Processor and cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return {"processor": model, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.release()}"}


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def page(results: Mapping[str, Any]) -> str:
    """results.md."""
    about, rows = results["machine"], [each for part in results["scripts"].values() for each in part["rows"]]
    met = [each["met"] for each in rows if each.get("met") is not None]
    failed = sum("error" in each for each in rows)
    lines = [
        "# Benchmarks: what was measured",
        "",
        "Made by `make bench` (`benchmarks/bench.py`); do not edit. What the rows mean, their floors, and what was tried:",
        "[docs/performance.md](../docs/performance.md).",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['system']}; {results['date']}; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + f". {sum(met)} of {len(met)} targets met{f', {failed} scripts failed' if failed else ''}; "
        f"{sum(part['seconds'] for part in results['scripts'].values()):.0f} s in all.",
        "",
        table(rows, command=True),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run them, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="path without .md and .json")
    options = parser.parse_args()
    kept: dict[str, Any] = {}
    stored = options.results.with_suffix(".json")
    if options.only and stored.exists():
        kept = json.loads(stored.read_text(encoding="utf-8"))["scripts"]
    for name in options.only or SCRIPTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        kept[name] = {"rows": run(name, options.full), "seconds": time.perf_counter() - began}
        print(table(kept[name]["rows"]), file=sys.stderr, flush=True)
    results = {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "scripts": {name: kept[name] for name in SCRIPTS if name in kept},
    }
    stored.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    stored.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(f"written to {stored.with_suffix('.md')} and {stored}", file=sys.stderr)
    return 1 if any("error" in each for part in results["scripts"].values() for each in part["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
