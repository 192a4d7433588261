"""The costs of a training step from measured runs: non-negative least squares, and an account of what the runs cannot tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprune.errors import UserError
from moeprune.files import read_rows
from moeprune.parallel.simulate import TERMS, Cost, Floats, Shape, amounts
from moeprune.parallel.traffic import config_of

# runs that differ in one of these, or in model.config, do not have the same costs
SAME = (
    "model.activation_checkpointing",
    "data.seq_len",
    "data.vocab_size",
    "trainer.accelerator",
    "trainer.precision",
    "trainer.accumulate_grad_batches",
)
MAY_DIFFER = ("n_experts", "top_k")  # of model.config
# which of two terms that cannot be told apart is fitted: the earlier one
ORDER = ("fixed", "per_token", "dense", "per_expert", "per_parameter", "link")
DISTURBED = 10.0  # percent of residual from which a fit is not to be trusted
ALIKE = 1e-6  # a column that others explain up to this share of its length is explained
UNITS = {
    "fixed": "s per step",
    "dense": "s per token of a device",
    "per_token": "s per assignment",
    "per_expert": "s per expert of a device",
    "per_parameter": "s per expert parameter of a device",
    "link": "s per assignment that changes devices",
}


@dataclass(frozen=True)
class Observation:
    """One measured stretch of a run.

    Args:
        run: its name.
        seconds: of a step.
        amounts: by term, how much of it a step has; see `simulate.amounts`.
        shape: of an expert, and the number of layers; None if unknown.
    """

    run: str
    seconds: float
    amounts: Mapping[str, float]
    shape: tuple[Shape, int] | None = None


@dataclass(frozen=True)
class Fit:
    """Costs, and how far they can be trusted.

    Args:
        cost: fitted, given, or 0.
        stderr: of the fitted terms above 0, from the scatter of the observations.
        left: term that was not fitted -> why.
        observations: what was fitted.
        predicted: seconds of each observation.
    """

    cost: Cost
    stderr: Mapping[str, float]
    left: Mapping[str, str]
    observations: tuple[Observation, ...]
    predicted: tuple[float, ...]

    @property
    def shape(self) -> tuple[Shape, int] | None:
        """Of the experts, and the number of layers; fitted costs are of this model."""
        return self.observations[0].shape

    @property
    def errors(self) -> NDArray[np.float64]:
        """Per observation (predicted - measured) / measured, in percent."""
        measured = np.array([o.seconds for o in self.observations])
        return np.asarray(100 * (np.array(self.predicted) / measured - 1))

    @property
    def rms(self) -> float:
        """Root mean square of `errors`."""
        return float(np.sqrt(np.mean(self.errors**2)))

    def by_run(self) -> dict[str, dict[str, float]]:
        """Run -> windows, median seconds measured and predicted, error in percent."""
        found = {}
        for run in dict.fromkeys(o.run for o in self.observations):
            mine = [i for i, o in enumerate(self.observations) if o.run == run]
            measured = float(np.median([self.observations[i].seconds for i in mine]))
            predicted = float(np.median([self.predicted[i] for i in mine]))
            found[run] = {
                "windows": len(mine),
                "measured": measured,
                "predicted": predicted,
                "error": 100 * (predicted / measured - 1),
            }
        return found

    def __str__(self) -> str:
        names = len({o.run for o in self.observations})
        lines = [
            f"costs from {len(self.observations)} windows of {names} {'run' if names == 1 else 'runs'}: residual {self.rms:.1f} % rms, "
            f"{np.abs(self.errors).max():.1f} % at worst"
        ]
        for term in TERMS:
            value = f"{getattr(self.cost, term):.4g} {UNITS[term]}"
            if term in self.left:
                lines.append(f"  {term:<14} {value}; not fitted: {self.left[term]}")
            elif term in self.stderr:
                lines.append(f"  {term:<14} {value} ± {self.stderr[term]:.2g}")
            else:
                lines.append(f"  {term:<14} {value}: the runs show none beyond their noise")
        if self.rms > DISTURBED:
            lines.append(
                f"  warning: {self.rms:.0f} % of residual; something else made these steps slow or fast (a busy machine?): "
                f"measure again, in turns"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "cost": asdict(self.cost),
            "stderr": dict(self.stderr),
            "left": dict(self.left),
            "rms_percent": self.rms,
            "worst_percent": float(np.abs(self.errors).max()),
            "runs": self.by_run(),
        }


def fit(observations: Sequence[Observation], given: Mapping[str, float] | None = None) -> Fit:
    """Costs that explain the seconds of the observations best, by relative error; none is below 0.

    A term is fitted only if the others do not explain its amounts: of terms that the observations cannot tell apart the
    first of ORDER takes all, the others keep what was given, or 0.

    Source: non-negative least squares, Lawson and Hanson (1974), as in scipy.

    Args:
        observations: from one kind of machine.
        given: terms that are known; they are not fitted.

    Raises:
        UserError: no observations, or a time that is not positive.
    """
    from scipy.optimize import nnls

    if not observations or any(not o.seconds > 0 for o in observations):
        raise UserError("a fit needs windows whose steps took more than 0 seconds; give runs of a few windows")
    given = dict(given or {})
    seconds = np.array([o.seconds for o in observations])
    columns = {term: np.array([o.amounts[term] for o in observations]) / seconds for term in TERMS}
    left = dict.fromkeys(given, "given")
    chosen: list[str] = []
    for term in ORDER:
        if term in given:
            continue
        if not columns[term].any():
            left[term] = _nothing(term)
        elif same := _explained(columns, term, chosen):
            left[term] = f"these runs cannot tell it from {' and '.join(same)}{_way_out(term, same)}"
        else:
            chosen.append(term)
    known = sum((value * columns[term] for term, value in given.items()), np.zeros(len(seconds)))
    found = dict.fromkeys(TERMS, 0.0) | given
    stderr: dict[str, float] = {}
    if chosen:
        scale = np.array([np.linalg.norm(columns[term]) for term in chosen])
        matrix = np.stack([columns[term] for term in chosen], axis=1) / scale
        solution, residual = nnls(matrix, 1 - known)
        found |= dict(zip(chosen, (solution / scale).tolist(), strict=True))
        free = len(seconds) - np.count_nonzero(solution)
        if free > 0:
            active = matrix[:, solution > 0]
            variance = np.linalg.inv(active.T @ active).diagonal() * residual**2 / free
            names = [term for term, value in zip(chosen, solution, strict=True) if value > 0]
            stderr = dict(zip(names, (np.sqrt(variance) / scale[solution > 0]).tolist(), strict=True))
    predicted = sum(found[term] * columns[term] for term in TERMS) * seconds
    return Fit(Cost(**found), stderr, left, tuple(observations), tuple(np.asarray(predicted).tolist()))


def _explained(columns: Mapping[str, NDArray[np.float64]], term: str, by: Sequence[str]) -> list[str]:
    """Those of `by` that together give the amounts of `term`; [] if they do not."""
    by = [name for name in by if columns[name].any()]
    if not by:
        return []
    scale = {name: float(np.linalg.norm(columns[name])) for name in [term, *by]}
    matrix = np.stack([columns[name] / scale[name] for name in by], axis=1)
    target = columns[term] / scale[term]
    weights = np.linalg.lstsq(matrix, target, rcond=None)[0]
    if np.linalg.norm(matrix @ weights - target) > ALIKE:
        return []
    return [name for name, weight in zip(by, weights, strict=True) if abs(weight) > 1e-3]


def _nothing(term: str) -> str:
    return "no run sent tokens between devices" if term == "link" else "no run has any of it"


def _way_out(term: str, same: Sequence[str]) -> str:
    if {term, *same} <= {"per_expert", "per_parameter"}:
        return ", all experts having the same number of parameters; per_expert holds both"
    if term == "per_token":
        return "; vary top_k, or give --cost.per_token: without it, loads change nothing"
    if term == "dense":
        return "; vary batch_size" + (" and top_k" if "per_token" in same else "")
    if term in ("per_expert", "per_parameter"):
        return "; vary n_experts, or prune"
    return ""


def observe(folders: Sequence[str | Path]) -> list[Observation]:
    """One observation per load window of each run: the median seconds of its steps, what its slowest process computed.

    Under expert parallelism the layout is the one that events.jsonl records; windows in which it changed are left out.

    Raises:
        UserError: a run without loads or history, trained under another strategy than one device, DDP or `ep`, or of another
            model or machine than the first one.
    """
    found: list[Observation] = []
    first: dict[str, Any] = {}
    for folder in map(Path, folders):
        folder = folder.parent if folder.is_file() else folder
        config, windows = config_of(folder), read_rows(folder / "loads.jsonl")
        history = {row["step"]: row for row in read_rows(folder / "history.jsonl")}
        if not (config and windows and history):
            raise UserError(
                f"{folder} is no finished run: it needs config.yaml, loads.jsonl and history.jsonl; give folders of `moeprune fit`"
            )
        model = _get(config, "model.config") or {}
        mine = {key: _get(config, key) for key in SAME}
        mine |= {f"model.config.{key}": value for key, value in model.items() if key not in MAY_DIFFER}
        first = first or mine
        for key, value in mine.items():
            if value != first.get(key, value):
                raise UserError(
                    f"{folder} has {key}={value}, {folders[0]} has {first[key]}; one fit takes runs of the same model and machine, "
                    f"which differ in n_experts, top_k, batch_size or prunes"
                )
        world, group = _processes(config, folder)
        moves = [row for row in read_rows(folder / "events.jsonl") if row.get("rearrangement")]
        shape = Shape(model["d_model"], model["d_expert"])
        for row in windows:
            start, end = int(row["first"]), int(row["step"])
            steps = [history[step] for step in range(start + 1, end + 1) if step in history]
            if not steps or any(start < move["step"] < end for move in moves):
                continue
            loads = [np.array(layer, dtype=np.float64) / (end - start) / (world // group) for layer in row["loads"]]
            devices = _layouts(loads, group, [move for move in moves if move["step"] <= start])
            _same_layout(loads, devices, row, folder)
            tokens = float(np.mean([step["tokens"] for step in steps])) / world
            seconds = float(np.median([step["seconds"] for step in steps]))
            of_step = amounts(loads, devices, tokens, shape.parameters)
            found.append(Observation(str(folder), seconds, of_step, (shape, len(loads))))
    if not found:
        raise UserError("no load window of these runs has a measured step; give longer runs, or a smaller window")
    return found


def _processes(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Processes of a run, and how many of them share the experts: 1 where every one holds all."""
    strategy, devices = _get(config, "trainer.strategy"), _get(config, "trainer.devices")
    name = str(_get(config, "trainer.strategy.class_path") or strategy).rpartition(".")[2]
    devices = len(devices) if isinstance(devices, list) else devices
    if not re.fullmatch(r"[1-9]\d*", str(devices)):  # the command line leaves a string
        raise UserError(f"{folder} ran with trainer.devices={devices}; a fit takes runs with a number of devices")
    world = int(devices) * int(_get(config, "trainer.num_nodes") or 1)
    if name in ("ep", "ExpertParallelStrategy"):
        return world, int(_get(config, "trainer.strategy.init_args.ep_size") or world)
    if world > 1 and not (name == "auto" or name.startswith("ddp")):
        raise UserError(
            f"{folder} ran with trainer.strategy={name}; a fit takes runs on one device, under ddp, or under ep"
        )
    return world, 1


def _layouts(loads: Sequence[Floats], group: int, moves: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
    """Per layer and process the positions of its experts: as last recorded, in their own order before that."""
    if moves and group > 1:
        return [[list(map(int, own)) for own in layer] for layer in moves[-1]["rearrangement"]["ranks"]]
    return [[own.tolist() for own in np.array_split(np.arange(len(layer)), group)] for layer in loads]


def _same_layout(
    loads: Sequence[Floats], devices: Sequence[Sequence[Sequence[int]]], row: Mapping[str, Any], folder: Path
) -> None:
    """Check the layout against the load factors that the run wrote down.

    Raises:
        UserError: they are of another layout.
    """
    for load, layer, noted in zip(loads, devices, row.get("max_load_factor", ()), strict=False):
        sums = [float(load[list(own)].sum()) for own in layer]
        if not np.isclose(max(sums) * len(sums) / sum(sums), noted, rtol=1e-6):
            raise UserError(
                f"{folder}: events.jsonl does not say how experts lay at step {row['step']} (was the run resumed from another "
                f"one's checkpoint?); leave the run out"
            )


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
