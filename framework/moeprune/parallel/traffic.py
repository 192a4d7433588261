"""Where the simulator's loads come from: a run's loads.jsonl, saved evidence, a synthetic law, a published model. numpy only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from moeprune.errors import UserError, suggest
from moeprune.files import read_rows
from moeprune.parallel.simulate import Floats, Shape, Traffic
from moeprune.pruning.evidence import Evidence

Rows = list[dict[str, Any]]

LAWS = {"zipf": {"exponent": 1.0}, "lognormal": {"sigma": 1.0}}
SIZES = {"layers": 103, "experts": 64, "top_k": 2, "tokens": 65536, "seed": 0}
PUBLISHED = "yuan3_ultra"


@dataclass(frozen=True)
class Source:
    """Loads, and what else is known of the model they come from.

    Args:
        traffic: of the whole model.
        note: one sentence: where it comes from, which steps were planned on and which are timed.
        shape: of an expert, if known.
        kept: per layer the original ids that a recorded or published prune kept.
        after: of the pruned model, where it was recorded.
        counts: per layer whole-numbered loads for a pruner, of the steps that are planned on.
    """

    traffic: Traffic
    note: str
    counts: tuple[tuple[int, ...], ...]
    shape: Shape | None = None
    kept: tuple[tuple[int, ...], ...] | None = None
    after: Traffic | None = None

    def evidence(self) -> Evidence:
        """For a pruner that reads loads."""
        return Evidence.from_counts(self.counts, self.traffic.top_k, self.traffic.ids, provenance={"source": self.note})


# --- a run


def recorded(
    path: str | Path, windows: int = 2, own: bool = False, top_k: int | None = None, events: str | Path | None = None
) -> Source:
    """Loads of a run. Plans and placements see some windows, steps are timed with the same number of later ones.

    The windows are the last ones before the first prune; where `events` is given and the run went on after its last prune,
    those of the pruned model are the last ones of the run.

    Args:
        path: loads.jsonl, or the run's folder.
        windows: to see, and to time with.
        own: time with the windows that plans and placements see.
        top_k: experts per token; default: what the run's config.yaml says.
        events: events.jsonl of the run: use its prunes as the plan, and the loads recorded after them.

    Raises:
        UserError: no loads there, a run without prunes where `events` asks for them, top_k unknown.
    """
    path = Path(path)
    path = path / "loads.jsonl" if path.is_dir() else path
    rows = read_rows(path)
    if not rows:
        raise UserError(f"there are no loads at {path}; give a run's loads.jsonl, or {PUBLISHED} or synthetic:zipf")
    config = config_of(path.parent)
    model = config.get("model", {}).get("config", {})
    k = top_k or model.get("top_k")
    if not k:
        raise UserError(f"{path.parent} has no config.yaml that says top_k; give --top_k")
    before, after = _ends(rows, path)
    traffic, counts, said = _traffic(before, int(k), windows, own, path)
    kept = pruned = None
    if events is not None:
        kept = _kept(events, traffic)
        if after:
            pruned, _, later = _traffic(after, int(k), windows, own, path)
            said += f"; pruned: {later}"
            if pruned.ids != kept:
                raise UserError(f"the experts in {path} after the last prune are not those that {events} keeps")
            pruned = pruned.scaled(traffic.tokens)
    shape = Shape(model["d_model"], model["d_expert"]) if {"d_model", "d_expert"} <= set(model) else None
    return Source(traffic, f"{path}, {said}", counts, shape, kept, pruned)


def config_of(folder: Path) -> Mapping[str, Any]:
    """A run's config.yaml; {} if there is none."""
    import yaml

    try:
        data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _ends(rows: Rows, path: Path) -> tuple[Rows, Rows]:
    """The rows before the first prune, and those after the last one, if there was one."""
    try:
        before = [row for row in rows if row["expert_ids"] == rows[0]["expert_ids"]]
        after = [row for row in rows if row["expert_ids"] == rows[-1]["expert_ids"]]
        return before, [] if after[0]["expert_ids"] == before[0]["expert_ids"] else after
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"a row of {path} lacks {error}; give the loads.jsonl of `moeprune fit`") from error


def _traffic(
    rows: Rows, top_k: int, windows: int, own: bool, path: Path
) -> tuple[Traffic, tuple[tuple[int, ...], ...], str]:
    """Traffic, counts of the windows seen, and which steps those are."""
    if windows < 1:
        raise UserError(f"windows must be at least 1, got {windows}")
    n = min(windows, len(rows) if own or len(rows) == 1 else len(rows) // 2)
    timed = rows[-n:]
    seen = timed if own or len(rows) == 1 else rows[-2 * n : -n]
    ids = tuple(tuple(map(int, layer)) for layer in rows[0]["expert_ids"])
    try:
        counts = tuple(tuple(int(x) for x in sum_) for sum_ in _sums(seen))
        traffic = Traffic(ids, _per_step(seen), _per_step(timed), top_k)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    steps = f"steps {seen[0]['first'] + 1} to {seen[-1]['step']}"
    if timed is seen:
        return traffic, counts, f"planned on and timed with {steps}"
    return traffic, counts, f"planned on {steps}, timed with {timed[0]['first'] + 1} to {timed[-1]['step']}"


def _sums(rows: Rows) -> list[Floats]:
    return [np.sum(layer, axis=0, dtype=np.float64) for layer in zip(*(row["loads"] for row in rows), strict=True)]


def _per_step(rows: Rows) -> tuple[Floats, ...]:
    steps = sum(int(row["step"]) - int(row["first"]) for row in rows)
    return tuple(np.asarray(total / steps, dtype=np.float64) for total in _sums(rows))


def _kept(path: str | Path, traffic: Traffic) -> tuple[tuple[int, ...], ...]:
    plans = [row["plan"] for row in read_rows(path) if "plan" in row]
    if not plans:
        raise UserError(f"{path} records no prune; leave --events out and give --pruner or --plan")
    if tuple(map(tuple, plans[0]["before"])) != traffic.ids:
        raise UserError(f"the first prune in {path} does not start from the experts of these loads")
    return tuple(tuple(map(int, ids)) for ids in plans[-1]["kept"])


# --- saved evidence


def of_evidence(evidence: Evidence, note: str) -> Source:
    """The counts of a calibration, as if they were one step.

    Raises:
        UserError: counts that were not recorded.
    """
    evidence.require({"counts"}, "a simulation")
    rows = tuple(layer.counts.astype(np.float64) for layer in evidence.layers)
    ids = tuple(layer.ids for layer in evidence.layers)
    counts = tuple(tuple(map(int, layer.counts)) for layer in evidence.layers)
    return Source(Traffic(ids, rows, rows, evidence.top_k), note, counts)


# --- laws


def named(spec: str) -> Source | None:
    """Loads of `synthetic:LAW,...` or `yuan3_ultra[:LAW,...]`; None if `spec` is neither.

        synthetic:zipf,exponent=1,layers=103,experts=64,top_k=2,tokens=65536,seed=0      load of rank r ~ r^-exponent
        synthetic:lognormal,sigma=1,...                                                  log load ~ normal, drawn
        yuan3_ultra                          published numbers kept; per layer the lognormal that LAEP cuts to them
        yuan3_ultra:zipf,exponent=1          published numbers kept; the same law in every layer
        yuan3_ultra:lognormal,sigma=1

    Raises:
        UserError: an unknown law or option.
    """
    name, _, rest = spec.partition(":")
    if name not in ("synthetic", PUBLISHED):
        return None
    law, *pairs = rest.split(",") if rest else [""]
    if law not in LAWS and (law or name == "synthetic"):
        raise UserError(suggest("law of loads", law, list(LAWS)))
    known: dict[str, float] = {**LAWS.get(law, {}), **(SIZES if name == "synthetic" else {"seed": 0})}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known:
            raise UserError(f"{spec}: " + suggest("option", key, list(known)))
        try:
            known[key] = type(known[key])(value)
        except ValueError as error:
            raise UserError(f"{spec}: {key} must be a number, got {value!r}") from error
        if not known[key] >= (0 if key in ("seed", "exponent", "sigma") else 1):
            raise UserError(f"{spec}: {key}={value} is too small")
    return _published(law, known) if name == PUBLISHED else _synthetic(law, known)


def _synthetic(law: str, options: Mapping[str, float]) -> Source:
    L, E, K = (int(options[name]) for name in ("layers", "experts", "top_k"))
    if K > E:
        raise UserError(f"top_k={K} is more than {E} experts; lower it")
    rng = np.random.default_rng(int(options["seed"]))
    rows = []
    for _ in range(L):
        if law == "zipf":
            shares = rng.permutation(np.arange(1, E + 1.0) ** -options["exponent"])
        else:
            shares = rng.lognormal(0.0, options["sigma"], E)
        rows.append(whole(bounded(shares, K), int(options["tokens"]) * K))
    said = ", ".join(f"{key} {value:g}" for key, value in options.items() if key != "seed")
    return _made(rows, K, f"synthetic {law} loads ({said})")


def _published(law: str, options: Mapping[str, float]) -> Source:
    model = published()
    E, K, beta = model["experts_before"], model["top_k"], model["beta"]
    rng = np.random.default_rng(int(options["seed"]))
    rows, kept = [], []
    for n in model["num_experts_per_layer"]:
        if law == "zipf":
            shares = np.arange(E, 0.0, -1) ** -options["exponent"]
        else:
            shares = lognormal(E, options["sigma"] if law else sigma_that_cuts(E, E - n, beta, K))
        order = rng.permutation(E)
        row = whole(bounded(shares, K)[order], model["seq_len"] * model["batch_size"] * K)
        rows.append(row)
        kept.append(tuple(sorted(np.argsort(-row, kind="stable")[:n].tolist())))
    laws = {
        "": f"in each layer the lognormal that LAEP with beta={beta} cuts to the published number",
        "zipf": f"Zipf, exponent {options.get('exponent')}",
        "lognormal": f"lognormal, sigma {options.get('sigma')}",
    }
    note = f"shape and numbers kept of Yuan3.0 Ultra (1515B to 1010B); loads are not published, assumed {laws[law]}"
    return _made(rows, K, note, Shape(model["d_model"], model["d_expert"]), tuple(kept))


def _made(
    rows: Sequence[Floats],
    top_k: int,
    note: str,
    shape: Shape | None = None,
    kept: tuple[tuple[int, ...], ...] | None = None,
) -> Source:
    loads = tuple(rows)
    traffic = Traffic(tuple(tuple(range(len(row))) for row in loads), loads, loads, top_k)
    return Source(traffic, note, tuple(tuple(map(int, row)) for row in loads), shape, kept)


@cache
def published() -> Mapping[str, Any]:
    """The 1010B model's numbers."""
    data: dict[str, Any] = json.loads((files("moeprune.parallel") / f"{PUBLISHED}.json").read_text(encoding="utf-8"))
    return data


def lognormal(n: int, sigma: float) -> Floats:
    """[n] quantiles of the middle of n equal parts, ascending, summing to 1: a sample without its noise."""
    normal = NormalDist()
    log = sigma * np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    shares = np.exp(log - log.max())
    return np.asarray(shares / shares.sum())


@cache
def sigma_that_cuts(n: int, n_cut: int, beta: float, top_k: int) -> float:
    """The sigma at which LAEP's cumulative rule cuts n_cut of n experts with `lognormal` loads: beta lies half-way between the
    share of the n_cut lightest and that of one more.

    Raises:
        UserError: equal loads would be cut already, or no sigma cuts so many.
    """

    def share(sigma: float) -> float:
        lightest = np.cumsum(bounded(lognormal(n, sigma), top_k))
        return float((lightest[n_cut - 1] if n_cut else 0.0) + lightest[n_cut]) / 2

    low, high = 0.0, 16.0
    if not (0 <= n_cut < n - top_k and share(low) > beta > share(high)):
        raise UserError(f"no lognormal load makes LAEP with beta={beta} cut {n_cut} of {n} experts")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > beta else (low, middle)
    return (low + high) / 2


def bounded(shares: Floats, top_k: int) -> Floats:
    """Shares that sum to 1, none above 1 / top_k (an expert gets a token once); what is above goes to the others in proportion."""
    found = np.asarray(shares / shares.sum(), dtype=np.float64)
    most = 1 / top_k
    for _ in range(len(found)):
        over = found >= most
        if not (found > most * (1 + 1e-12)).any():
            break
        rest = np.where(over, 0.0, found)
        if not rest.any():
            rest = (~over).astype(np.float64)
        found[:] = np.where(over, most, rest * ((1 - most * over.sum()) / max(rest.sum(), 1e-300)))
    return found


def whole(shares: Floats, total: int) -> Floats:
    """Whole numbers in these proportions that sum to `total`: the largest remainders are rounded up."""
    exact = shares * (total / shares.sum())
    found: Floats = np.floor(exact)
    for i in np.argsort(found - exact, kind="stable")[: total - int(found.sum())]:
        found[i] += 1
    return found
