"""Runs the jobs of a comparison, several at a time, each in a process or cluster job of its own, and continues an interrupted one.

A job that fails, is killed or runs out of memory leaves the others alone; it is tried again at the next call.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moeprune.compare import job, speed
from moeprune.compare.executor import Executor, Processes, Running
from moeprune.compare.spec import Comparison, job_folder
from moeprune.errors import UserError
from moeprune.files import locked, read_json, write_text

NO_TRUNK = "the trunk failed"
BUSY = "a comparison is running in {}; wait for it, or choose another --output"


@dataclass
class _Running:
    job: Running
    name: str
    row: TaskID


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(comparison: Comparison, folder: Path, overwrite: bool) -> None:
    """Make the comparison's folder, or check that it belongs to this comparison.

    Raises:
        UserError: it holds something else.
    """
    wanted = json.loads(json.dumps(comparison.identity()))
    if overwrite and (folder / "comparison.json").exists():
        with locked(folder, BUSY.format(folder)):
            shutil.rmtree(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "comparison.json").exists():
            raise UserError(f"{folder} exists and holds no comparison; choose another --output")
        found = read_json(folder / "comparison.json", "comparison")
        changed = sorted(key for key in wanted if found.get(key) != wanted[key])
        if changed:
            raise UserError(
                f"{folder} holds a comparison with other {', '.join(changed)}; choose another --output, or pass "
                f"--overwrite=true to start anew"
            )
    write_text(folder / "comparison.json", json.dumps(wanted, indent=1) + "\n")
    for number, text in enumerate(comparison.texts):  # the runs read these copies, not files that may change meanwhile
        recipe = yaml.safe_load(text) or {}
        recipe.pop("base", None)
        write_text(folder / "recipes" / f"{number:02}.yaml", yaml.safe_dump(recipe, sort_keys=False))


def run(
    comparison: Comparison,
    folder: Path,
    workers: int,
    console: Console,
    executor: Executor | None = None,
    threads: int | None = None,
) -> dict[str, str]:
    """Run every job that has no result yet.

    Args:
        comparison: what is compared.
        folder: where it is kept.
        workers: jobs at a time.
        console: for progress.
        executor: where jobs run; default: in processes of this machine.
        threads: of a job; default: this machine's cores, shared out.

    Returns:
        The error of each variant that failed, by name.
    """
    executor = Processes(comparison.suite is not None) if executor is None else executor
    threads = max(1, cores() // workers) if threads is None else threads
    waiting = [name for name in _order(comparison) if not (job_folder(folder, name) / "result.json").exists()]
    earlier = {name: found for name in waiting if (found := executor.find(job_folder(folder, name))) is not None}
    for name in waiting:
        if name not in earlier:
            (job_folder(folder, name) / "error.txt").unlink(missing_ok=True)
    failed: dict[str, str] = {}
    running: list[_Running] = []
    with Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(24),
        TextColumn("{task.fields[state]:<28}"),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,
    ) as progress:
        rows = {name: progress.add_task(name, total=1, start=False, state="waiting") for name in waiting}
        for name, found in earlier.items():
            waiting.remove(name)
            progress.start_task(rows[name])
            running.append(_Running(found, name, rows[name]))
            _say(progress, f"{name}: goes on from an earlier call")
        try:
            while waiting or running:
                for each in list(running):
                    _show(progress, each, folder)
                    if not each.job.alive():
                        running.remove(each)
                        _finish(each, folder, failed, progress)
                if job.TRUNK in failed:
                    for name in [n for n in waiting if comparison.variants[n].start == "trunk"]:
                        waiting.remove(name)
                        failed[name] = f"{NO_TRUNK}: {failed[job.TRUNK]}"
                        progress.update(rows[name], state="failed: no trunk")
                while len(running) < workers and (ready := _next(comparison, folder, waiting)) is not None:
                    waiting.remove(ready)
                    place = job_folder(folder, ready)
                    place.mkdir(parents=True, exist_ok=True)
                    started = executor.start(place, job.main, comparison, folder, ready, threads)
                    progress.start_task(rows[ready])
                    running.append(_Running(started, ready, rows[ready]))
                time.sleep(0.2)
        finally:
            if running and executor.outlives:
                console.print(f"{len(running)} jobs go on; the same call gathers them", style="yellow")
            for each in running if not executor.outlives else ():
                each.job.stop()
    return failed


def measure_speed(
    comparison: Comparison, folder: Path, names: list[str], executor: Executor | None = None
) -> dict[str, Any]:
    """Step times of the finished variants, measured in turns in one process; kept in speed.json."""
    path = folder / "speed.json"
    if comparison.reference not in names:
        return {}
    if path.exists():
        found = read_json(path, "speed measurement")
        if sorted(found) == sorted(names):
            return dict(found)
        path.unlink()
    executor = Processes(comparison.suite is not None) if executor is None else executor
    running = executor.start(folder, speed.main, comparison, folder, names, path)
    while running.alive():
        time.sleep(0.2)
    return dict(read_json(path, "speed measurement")) if path.exists() else {}


def _order(comparison: Comparison) -> list[str]:
    """The trunk first, since most wait for it, then full runs, which take longest."""
    trunk = [job.TRUNK] if comparison.needs_trunk else []
    by_length: Callable[[str], bool] = lambda name: comparison.variants[name].start != "scratch"  # noqa: E731
    return [*trunk, *sorted(comparison.variants, key=by_length)]


def _next(comparison: Comparison, folder: Path, waiting: list[str]) -> str | None:
    trunk_done = (job_folder(folder, job.TRUNK) / "result.json").exists()
    for name in waiting:
        if name == job.TRUNK or trunk_done or comparison.variants[name].start != "trunk":
            return name
    return None


def _finish(each: _Running, folder: Path, failed: dict[str, str], progress: Progress) -> None:
    place = job_folder(folder, each.name)
    if not each.job.failed() and (place / "result.json").exists():
        progress.update(each.row, total=1, completed=1, state="done")
        progress.stop_task(each.row)
        _say(progress, f"{each.name}: done after {progress.tasks[each.row].elapsed or 0:.0f} s")
        return
    message = each.job.ending()
    if (place / "error.txt").exists():
        message = (place / "error.txt").read_text(encoding="utf-8")
    failed[each.name] = message
    progress.update(each.row, state=f"failed: {message[:60]}")
    progress.stop_task(each.row)
    _say(progress, f"{each.name}: failed: {message}")


def _say(progress: Progress, line: str) -> None:
    """Progress for a file or pipe, where bars are drawn at the end only."""
    if not progress.console.is_terminal:
        progress.console.print(line, markup=False, soft_wrap=True)


def _show(progress: Progress, each: _Running, folder: Path) -> None:
    """Steps done, from the tail of the run's history."""
    place = job_folder(folder, each.name)
    history = place / "history.jsonl"
    total = _total_steps(place)
    if not history.exists() or not total:
        progress.update(each.row, total=None, state="starting")
        return
    with history.open("rb") as file:
        file.seek(max(0, history.stat().st_size - 400))
        lines = file.read().splitlines()
    try:
        last = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return
    if last is not None:
        state = "scoring" if last["step"] >= total else f"step {last['step']}/{total}  loss {last['loss']:.3f}"
        progress.update(each.row, total=total, completed=last["step"], state=state)


def _total_steps(place: Path) -> int:
    try:
        text = (place / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.strip().startswith("max_steps:")), "max_steps: 0")
    return int(line.partition(":")[2])
