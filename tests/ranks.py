"""What the scripts share that tests start once per process: jobs from a file, one after the other, and how each of them ends."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeprune.errors import UserError
from moeprune.parallel.dispatch import AllToAll

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def start(main: Callable[[list[dict[str, Any]]], None]) -> None:
    """`main` on the jobs of the file that the command line names; what goes wrong ends the process, whoever waits for it."""
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # whatever waits in a collective


@contextmanager
def ending(job: dict[str, Any]) -> Iterator[None]:
    """The sentence of a UserError that the job expects goes into its file "error"."""
    try:
        yield
    except UserError as error:
        if "error" not in job:
            raise
        Path(f"{job['error']}.{RANK}").write_text(str(error))


def note_metrics(job: dict[str, Any], trainer: Any) -> None:
    """The metrics at the end go into the job's file "metrics", if it asks for them."""
    if RANK == 0 and "metrics" in job:
        metrics = {name: float(x) for name, x in trainer.callback_metrics.items()}
        Path(job["metrics"]).write_text(json.dumps(metrics))


def signal_at_pass(number: int, signum: int) -> None:
    """From now on process 1 signals itself when it is about to send its tokens for the `number`-th time."""
    dispatch = AllToAll.dispatch
    passes = 0

    def hook(self: AllToAll, *args: Any) -> Any:
        nonlocal passes
        passes += 1
        if RANK == 1 and passes == number:
            os.kill(os.getpid(), signum)
        return dispatch(self, *args)

    AllToAll.dispatch = hook
