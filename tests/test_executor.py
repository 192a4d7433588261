"""Comparisons as jobs of submitit: on this machine, and on a SLURM whose commands are played by shell scripts."""

from __future__ import annotations

import builtins
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_compare import COMPARISON, LAEP, results, write

from moeprune.cli import main
from moeprune.compare.executor import Processes, Submitit, Task, make
from moeprune.errors import UserError

TINY: dict[str, Any] = {  # prunes only: a job per variant, nothing scored, no step times
    **COMPARISON,
    "train_on": False,
    "suite": None,
    "limit": None,
    "variants": {"base": {}},
}
BROKEN = {"config": {"pruning": {"pruner": LAEP, "constraints": {"multiple_of": 3, "min_keep": 7}}}}
# What SLURM's commands do, as far as submitit asks: a job is a process group whose id is the job's; srun runs its command.
COMMANDS = {
    "sbatch": """
        cp "$1" "$SLURM_DOUBLE/$(basename "$1")"
        export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1
        setsid bash -c 'SLURM_JOB_ID=$$ exec bash "$0"' "$1" > "$SLURM_DOUBLE/out" 2>&1 < /dev/null &
        echo $! >> "$SLURM_DOUBLE/submitted"
        echo "Submitted batch job $!"
    """,
    "srun": """
        while [[ $1 == --* ]]; do
            case $1 in --output | --error) shift 2 ;; *) shift ;; esac
        done
        exec "$@"
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        while read -r id; do
            if kill -0 "$id" 2> /dev/null && [[ $(ps -o stat= -p "$id") != Z* ]]
            then echo "$id|RUNNING|here"
            else echo "$id|OUT_OF_MEMORY|here"
            fi
        done < "$SLURM_DOUBLE/submitted"
    """,
    "scancel": """
        for id in "$@"; do kill -TERM -- "-$id" 2> /dev/null; done
    """,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of shell scripts; returns the folder of what was submitted."""
    place = tmp_path / "slurm"
    place.mkdir()
    for name, text in COMMANDS.items():
        (place / name).write_text(f"#!/bin/bash\n{text}")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_DOUBLE", str(place))
    return place


def compare(folder: Path, config: Path, *options: str) -> list[str]:
    return ["compare", f"--config={config}", f"--output={folder / 'out'}", "--executor=submitit", *options]


def test_local_jobs(corpus: Path, tmp_path: Path) -> None:
    """Trunk first, then the variants, of which one fails and is reported, then the step times."""
    config = write(tmp_path, corpus, {**TINY, "train_on": True, "variants": {"base": {}, "broken": BROKEN}})
    options = ["--cluster=local", "--job.timeout_min=5", "--job.partition=none-here"]  # means nothing locally
    assert main(compare(tmp_path, config, *options)) == 1
    rows = results(tmp_path)["variants"]
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "multiple_of=3" in rows[1]["error"]
    assert rows[0]["speed"]["ratio"]["median"] == 1  # measured in a job as well
    out = tmp_path / "out"
    ids = {name: json.loads((out / name / "job.json").read_text())["id"] for name in ("trunk", "base", "broken")}
    assert len(set(ids.values())) == 3
    trunk = (out / "trunk" / "result.json").stat().st_mtime_ns
    for name in ("base", "broken"):
        assert trunk < (out / ".submitit" / f"{ids[name]}_submitted.pkl").stat().st_mtime_ns
    assert len([*(out / ".submitit").glob("*_submitted.pkl")]) == 4


def test_interrupted_call_finds_its_slurm_jobs(slurm: Path, corpus: Path, tmp_path: Path) -> None:
    """The call is killed while the trunk's job runs; called again, it waits for that job, and submits the others."""
    config = write(tmp_path, corpus, TINY)
    options = [
        "--job.partition=gpu",
        "--job.timeout_min=7",
        "--job.gpus_per_node=1",
        "--job.mem_gb=3",
        "--job.account=us",
    ]
    call = compare(tmp_path, config, *options, "--job={setup: [export GREETING=hello]}", *options)
    command = [sys.executable, "-m", "moeprune", *call]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "out" / "trunk" / "job.json").exists():
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = (slurm / "submitted").read_text().split()
    assert not (tmp_path / "out" / "trunk" / "result.json").exists()
    assert main(call) == 0
    assert json.loads((tmp_path / "out" / "trunk" / "job.json").read_text())["id"] == first
    assert len((slurm / "submitted").read_text().split()) == 2  # trunk, base
    assert [row["status"] for row in results(tmp_path)["variants"]] == ["done"]
    script = (tmp_path / "out" / ".submitit" / f"{first}_submission.sh").read_text()
    for line in (
        "#SBATCH --job-name=tiny-trunk",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=7",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --mem=3GB",
        "#SBATCH --account=us",
        "#SBATCH --nodes=1",
        "export GREETING=hello",
    ):
        assert line in script.splitlines(), (line, script)
    assert f"{shlex.quote(sys.executable)} -u -m submitit.core._submit" in script


def test_killed_slurm_job_is_reported(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeprune.compare import executor

    monkeypatch.setattr(executor, "PATIENCE", 0.5)
    place = tmp_path / "one"
    place.mkdir()
    jobs = Submitit("slurm", {}, tmp_path)
    running = jobs.start(place, os._exit, 1)  # no result, no message
    deadline = time.time() + 60
    while running.alive():
        assert time.time() < deadline
        time.sleep(0.2)
    assert "ended without a result (OUT_OF_MEMORY); see" in running.ending()
    assert jobs.find(place) is None  # so that it is started again
    assert Submitit("local", {}, tmp_path).find(place) is None  # another cluster's


def test_preempted_job_is_queued_again(tmp_path: Path) -> None:
    """submitit is told to stop a job: the same call is made anew, which is no failure of the run."""
    place = tmp_path / "one"
    place.mkdir()

    def work(place: Path) -> None:  # ends as `job.main` does
        try:
            first = not (place / "pid").exists()
            (place / "pid").write_text(str(os.getpid()))
            while first:
                time.sleep(0.05)
            (place / "result.json").write_text("{}")
        except BaseException as error:
            (place / "error.txt").write_text(str(error))
            raise SystemExit(1) from error

    running = Submitit("local", {}, tmp_path).start(place, work, place)
    deadline = time.time() + 60
    while not ((place / "pid").exists() and (place / "pid").read_text()):
        assert time.time() < deadline
        time.sleep(0.1)
    os.kill(int((place / "pid").read_text()), signal.SIGUSR2)
    while running.alive():
        assert time.time() < deadline
        time.sleep(0.1)
    assert (place / "result.json").exists()
    assert not (place / "error.txt").exists()


def test_exit_codes_of_a_task(tmp_path: Path) -> None:
    def fails() -> None:
        raise SystemExit(1) from ValueError("bad")

    def requeued() -> None:  # as `job.main` passes on whatever stops it
        (tmp_path / "error.txt").write_text("SystemExit: 144")
        raise SystemExit(1) from SystemExit(144)

    assert Task()(tmp_path, lambda: None) == 0
    assert Task()(tmp_path, fails) == 1
    with pytest.raises(SystemExit) as stopped:
        Task()(tmp_path, requeued)
    assert stopped.value.code == 144
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--job.partitoin=gpu", "--cluster=local"], "partitoin"),
        (["--job.nodes=2", "--cluster=local"], "job.nodes must be 1, got 2"),
        (["--job.tasks_per_node=4"], "every run of a comparison is one process"),
        (["--job.timeout_min=soon", "--cluster=local"], "timeout_min"),
        (["--cluster=slurm"], "there is no SLURM here"),
        (["--executor=processes", "--job.partition=gpu"], "add --executor=submitit"),
        (["--executor=dask"], "executor"),
    ],
)
def test_bad_options(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    config = write(tmp_path, corpus, TINY)
    assert main(compare(tmp_path, config, *options)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("moeprune: error: ")
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "submitit":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'moeprune\[slurm\]'"):
        make("submitit", "local", {}, tmp_path, "x", scores=False)
    assert isinstance(make("processes", "local", None, tmp_path, "x", scores=False), Processes)
