"""The report of a comparison: one HTML page that needs nothing else, the same in Markdown, and a table for the terminal.

Every word of judgement is the `verdict` of a difference; nothing here ranks variants whose difference is not detectable.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from moeprune.compare.plots import (
    METRICS,
    MOST_ROWS,
    alike,
    budgets,
    done,
    experts_in_all,
    figures,
    focus,
    half_width,
    is_pruned,
    ranking,
    reference,
    scored,
    trained_on,
)
from moeprune.compare.results import NO_DIFFERENCE
from moeprune.errors import UserError
from moeprune.files import atomic, write_text

MISSING = "-"
MOST_COLUMNS = 12  # layers that get a column each
TERMINAL: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), "show_edge": False}
Results = Mapping[str, Any]
Variant = Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """A cell that points to a file next to the report."""

    text: str
    path: str

    @property
    def href(self) -> str:
        """The path as a relative address."""
        return quote(self.path, safe="/.")


@dataclass(frozen=True)
class Table:
    """Header and rows of cells; the first column is the rows' name, the others are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    words: bool = False  # cells are text: aligned to the left


@dataclass(frozen=True)
class Section:
    """Heading, paragraphs, plots by name, tables, terms with explanations: in this order."""

    title: str
    text: Sequence[str] = ()
    plots: Sequence[str] = ()
    tables: Sequence[Table] = ()
    terms: Sequence[tuple[str, str]] = field(default=())


def write_report(results: Results, folder: Path) -> None:
    """Write report.html (self-contained), report.md and plots/*.png.

    Args:
        results: see `moeprune.compare.results`.
        folder: where to; made if it is not there.

    Raises:
        UserError: matplotlib or jinja2 is missing, or a file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError("the report needs jinja2: pip install 'moeprune[report]'") from error
    images = {name: _png(figure) for name, figure in figures(results).items()}
    for name, data in images.items():
        with atomic(Path(folder) / "plots" / f"{name}.png", "wb") as file:
            file.write(data)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moeprune.compare", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = sections(results)
    page = environment.get_template("report.html.j2").render(
        title=f"{results['name']}: pruning variants compared",
        created=results["created"],
        headline=headline(results),
        sections=parts,
        images={name: base64.b64encode(data).decode() for name, data in images.items()},
        captions=_captions(results),
        is_link=lambda cell: isinstance(cell, Link),
    )
    write_text(Path(folder) / "report.html", page)
    write_text(Path(folder) / "report.md", _markdown(results, parts, list(images)))


def _captions(results: Results) -> Mapping[str, str]:
    return CAPTIONS if _checkpoint(results) is None else CAPTIONS_CHECKPOINT


def terminal_table(results: Results) -> RichTable:
    """The main table for a terminal of 100 columns."""
    return _terminal_trained(results) if trained_on(results) else _terminal_pruned(results)


def _terminal_pruned(results: Results) -> RichTable:
    """By ascending jump: a row per strategy, or per variant where there are no budgets."""
    table = RichTable(**TERMINAL, caption_justify="left", width=100)
    note = "loss jump: validation loss just after the prune - just before, nats per token, ±: 95 % interval"
    if _checkpoint(results) is not None:
        note = note.replace("validation loss", "held-out loss")
    columns = budgets(results)
    place, names = scored(results)
    if names:
        shown = names[:4]
        note += "; standard errors and paired differences of scores are in the report"
        note += f", as are {len(names) - 4} more" if names[4:] else ""
        made = _pruned_and_scored(results, place, shown)
    elif columns:
        made = _without(_ranking_table(results), "family")
        note += "; (+…): above the lowest of its column, if detectably"
        others = [v for v in done(results) if v["jump"] and not v.get("budget")]
        for v in others[:4]:
            note += f"\n{_name(v)}: {sum(v['experts_kept']):,} experts kept, {_plus(v['jump'])}"
        note += f"\n{len(others) - 4} more are in the report" if others[4:] else ""
    else:
        made = _pruned(results)
    table.add_column(made.header[0], ratio=1, min_width=12)
    for title in made.header[1:]:
        table.add_column(Text(title.replace(" ", "\n", 1) if names else title), justify="right")
    for row in made.rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    for v in results["variants"]:
        if v["status"] != "done":
            note += f"\n{_name(v)} failed: {_short(v['error'], 70)}"
    table.caption = Text(note)
    return table


def _terminal_trained(results: Results) -> RichTable:
    place, names = scored(results)
    shown = names[:4]
    note = (
        "jump: validation loss just after the prune - just before; final - ref.: final validation loss - that of "
        f"{_reference(results)}; nats per token, ±: 95 % interval, n.d.: {NO_DIFFERENCE}; step time: / reference's; "
        "(…): standard error"
    )
    if len(names) > len(shown):
        note += f"; {len(names) - len(shown)} more scores are in the report"
    table = RichTable(**TERMINAL, caption_justify="left", width=100)
    table.add_column("variant", ratio=1, min_width=12)
    for title in ("params\nkept", "experts\nkept", "loss\njump", "final\n- ref.", "step\ntime"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in shown:
        table.add_column(Text(name.replace(" ", "\n", 1)), justify="right", max_width=11, overflow="fold")
    for v in results["variants"]:
        if v["status"] != "done":
            table.add_row(Text(v["label"], style="red"), Text("failed", style="red"))
            note += f"\n{_name(v)} failed: {_short(v['error'], 70)}"
            continue
        scores = [(v.get(place) or {}).get(name) for name in shown]
        cells = [
            _percent(v["parameters_kept"], 0),
            f"{sum(v['experts_kept'])}\n{_kept_in_short(v['experts_kept'])}",
            _stacked(v["jump"]) + _several(v, "\n{} prunes"),
            "reference" if v["name"] == results["reference"] else _stacked(v["vs_reference"]),
            f"{v['speed']['ratio']['median']:.2f}x" if v.get("speed") else MISSING,
            *(f"{_number(s['value'])}\n({_number(s['stderr'])})" if s else MISSING for s in scores),
        ]
        table.add_row(Text(v["label"]), *(Text(cell) for cell in cells))
    table.caption = Text(note)
    return table


# --- the headline


def headline(results: Results) -> list[str]:
    """Sentences made from the numbers; what is not detectable is called so."""
    if trained_on(results):
        sentences = [
            _setting(results),
            _trigger(results),
            _cut(results),
            _final(results),
            _tasks(results),
            _cost(results),
        ]
    else:
        sentences = [_setting(results), _trigger(results), *(_lowest(results, budget) for budget in budgets(results))]
        sentences += [] if budgets(results) else [_cut(results)]
        sentences += [_tasks(results)]
    return [sentence for sentence in sentences if sentence]


def _setting(results: Results) -> str:
    model, variants = results["model"], results["variants"]
    failed = len(variants) - len(done(results))
    control = " except for an untrained control" if any(v["start"] == "untrained" for v in variants) else ""
    trained = (
        f"trained for {model['steps']:,} steps{control}, were"
        if trained_on(results)
        else "pruned and not trained on, were"
    )
    given = _checkpoint(results)
    which = "one model" if given is None else f"the checkpoint {given['path']}"
    return (
        f"{_count(len(variants), 'variant')} of {which} ({_millions(model['parameters'])} parameters, {_count(model['layers'], 'layer')}, "
        f"{_experts(results)}, top-{model['top_k']}), {trained} compared in the same way"
        + (f"; {failed} of them failed." if failed else ".")
    )


def _experts(results: Results) -> str:
    """How many experts a layer of the whole model has."""
    counts = (_checkpoint(results) or {}).get("experts") or [results["model"]["experts"]]
    return f"{_count(counts[0], 'expert')} each" if len(set(counts)) == 1 else f"{_range(counts)} experts"


def _trigger(results: Results) -> str:
    trunk, given = results["trunk"], _checkpoint(results)
    if given is not None:
        return f"Plans were made from {_calibration(given)}; losses are those of {_held_out(given)}."
    if trunk is None:
        return "There is no trunk that variants share."
    if not any(is_pruned(v) for v in done(results)):
        return "No variant was pruned."
    several = [v for v in done(results) if v["start"] == "trunk" and len(v.get("prunes") or ()) > 1]
    if several:
        pruned = _and(
            f"{_name(v)} was pruned at steps {_and(str(prune['step']) for prune in v['prunes'])}" for v in several[:4]
        )
        more = f", and {len(several) - 4} more several times as well" if several[4:] else ""
        return (
            f"The trunk ended at step {trunk['step']:,} of {results['model']['steps']:,}, after {_millions(trunk['tokens'])} training "
            f"tokens; the trigger's reason: {trunk['reason']}. From there on {pruned}{more}."
        )
    return (
        f"Pruning took place at step {trunk['step']:,} of {results['model']['steps']:,}, after {_millions(trunk['tokens'])} "
        f"training tokens; the trigger's reason: {trunk['reason']}."
    )


def _calibration(given: Mapping[str, Any]) -> str:
    found = given["calibration"]
    return f"{found['calibration_tokens']:,} tokens of {_source(found['data']['source'], 'train')}"


def _held_out(given: Mapping[str, Any]) -> str:
    found = given["held_out"]
    return (
        f"{found['sequences']:,} sequences of {_source(found['source'], 'validation')}, {found['tokens']:,} tokens, which no plan saw"
        if not _seen(given)
        else f"{found['sequences']:,} sequences of {found['source']}, {found['tokens']:,} tokens, the text that plans were made from"
    )


def _seen(given: Mapping[str, Any]) -> bool:
    """Whether the loss is measured on the file that plans were made from."""
    source = given["held_out"]["source"]
    return bool(source == given["calibration"]["data"]["source"]) and Path(source).suffix != "" and source != "embedded"


def _source(source: str, split: str) -> str:
    return f"the embedded corpus ({split} split)" if source == "embedded" else source


def _lowest(results: Results, budget: str) -> str:
    """What the ranking at a budget says: who is lowest, who is not told from it, who is highest."""
    rows = sorted(
        (v["jump"]["value"], name, v)
        for name, variants in ranking(results)
        for v in [variants.get(budget)]
        if v is not None
    )
    (_, name, first), (_, other, last) = rows[0], rows[-1]
    text = f"{budget} removed: the loss jumps least for {name} ({_plus(first['jump'])})"
    same = [n for _, n, v in rows[1:] if v["vs_lowest"] and v["vs_lowest"]["verdict"] == NO_DIFFERENCE]
    if same:
        shown = _and(same) if len(same) <= 6 else f"{', '.join(same[:5])} and {len(same) - 5} others"
        text += f", with {NO_DIFFERENCE} to {shown}"
    return text + (f", and most for {other} ({_plus(last['jump'])})." if last is not first else ".")


def _plus(d: Mapping[str, Any]) -> str:
    return f"{d['value']:+.3f} ± {half_width(d):.3f}"


def _cut(results: Results) -> str:
    v = focus(results)
    if v is None or not is_pruned(v):
        return ""
    E, whole, kept = results["model"]["experts"], experts_in_all(results), v["experts_kept"]
    text = (
        f"{_name(v)} cut {whole - sum(kept):,} of {whole:,} experts ({_range(kept)} of {E} kept per layer) and "
        f"{_percent(1 - v['parameters_kept'])} of the parameters"
    )
    if v["removed_load"]:
        text += f"; the experts it cut had received {_percents(v['removed_load'])} of their layer's tokens{_bound(v)}"
    if v["jump"]:
        word = {"higher": "rose", "lower": "fell"}.get(v["jump"]["verdict"])
        by = f"{abs(v['jump']['value']):.3f} ± {half_width(v['jump']):.3f} nats per token"
        steps = [prune["step"] for prune in v.get("prunes") or ()]
        when = (
            "At the prune" if len(steps) < 2 else f"At its {len(steps)} prunes, steps {_and(map(str, steps))} together,"
        )
        loss = "validation loss" if _checkpoint(results) is None else "loss on held-out text"
        text += f". {when} its {loss} {word} by {by}" if word else f". {when.rstrip(',')}: {NO_DIFFERENCE} in {loss}"
    return text + "."


def _bound(v: Variant) -> str:
    """How the removed loads compare with LAEP's bound."""
    betas = _betas(v, len(v["removed_load"]))
    if not betas:
        return ""
    over = sum(load >= beta for load, beta in zip(v["removed_load"], betas, strict=True))
    bound = f"the bound beta = {_percents(betas)}"
    return f", in every layer below {bound}" if not over else f", in {over} of {len(betas)} layers not below {bound}"


def _final(results: Results) -> str:
    groups: dict[str, list[Variant]] = {}
    for v in _compared(results):
        if v["vs_reference"]:
            groups.setdefault(v["vs_reference"]["verdict"], []).append(v)
    if not groups:
        return ""
    parts = []
    for verdict in (NO_DIFFERENCE, "higher", "lower"):
        named = groups.get(verdict, [])
        if named:
            those = _and(_with_value(v, verdict) for v in named) if len(named) <= 6 else f"{len(named)} variants"
            parts.append(f"{'' if verdict == NO_DIFFERENCE else 'detectably '}{verdict} for {those}")
    known = any(v["vs_reference"]["noise"] for group in groups.values() for v in group)
    basis = "95 % intervals over documents" + (" and the drift between equal runs" if known else "; each trained once")
    return f"Final validation loss against {_reference(results)}: {'; '.join(parts)} ({basis})."


def _with_value(v: Variant, verdict: str) -> str:
    d = v["vs_reference"]
    return _name(v) if verdict == NO_DIFFERENCE else f"{_name(v)} ({d['value']:+.3f} ± {half_width(d):.3f})"


def _tasks(results: Results) -> str:
    place, names = scored(results)
    pairs = [
        (v, name, v[place][name]["vs_reference"])
        for v in _compared(results)
        for name in names
        if (v.get(place) or {}).get(name) and v[place][name]["vs_reference"]
    ]
    if not pairs:
        return ""
    found = [(v, name, d) for v, name, d in pairs if d["verdict"] != NO_DIFFERENCE]
    what = "task families" if place == "families" else "tasks"
    text = f"Of {_count(len(pairs), 'comparison')} with the reference on {what}, {len(pairs) - len(found)} show {NO_DIFFERENCE}"
    if found and len(found) <= 4:
        text += "; detectable: " + _and(
            f"{name} {d['verdict']} for {_name(v)} ({d['value']:+.3f})" for v, name, d in found
        )
    return text + f" (about {max(1, round(len(pairs) / 20))} in {len(pairs)} would stand out by chance)."


def _cost(results: Results) -> str:
    v, base = focus(results), reference(results)
    if v is None or base is None or v is base or not v.get("speed"):
        return ""
    ratio = v["speed"]["ratio"]
    unclear = ", no clear difference" if ratio["q1"] <= 1 <= ratio["q3"] else ""
    return (
        f"A training step of {_name(v)} took {ratio['median']:.2f} times as long as one of the reference "
        f"(quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}{unclear}), and its weights take "
        f"{_percent(v['memory']['weights_bytes'] / base['memory']['weights_bytes'], 0)} of the memory."
    )


# --- the sections


def sections(results: Results) -> list[Section]:
    """What the report says after the headline."""
    trained = trained_on(results)
    if trained:
        overview = Section("Overview", [OVERVIEW + _of_several(results)], ["loss_jump"], [_main(results)])
    else:
        plots = ["loss_jump", "jump_against_parameters"]
        text = (PRUNED if _checkpoint(results) is None else PRUNED_CHECKPOINT) + (ABOVE if budgets(results) else "")
        overview = Section("Overview", [text], plots, [_ranking_table(results), _pruned(results)])
    made = [
        overview,
        *(
            [Section("How the experts' loads developed", [LOADS], ["load_shares", "load_inequality"])]
            if _checkpoint(results) is None
            else []
        ),
        Section("Experts kept", [KEPT], ["experts_kept"], _kept(results)),
        Section("What strategies agree on", [OVERLAP], ["overlap"], [_overlap(results)]),
        Section(
            "Validation loss" if _checkpoint(results) is None else "Loss on held-out text",
            [LOSSES if _checkpoint(results) is None else LOSSES_HELD_OUT],
            ["loss_curves"],
            [_domains(results)],
        ),
        Section("Scores", [_suite(results)], ["score_against_parameters", "score_differences"], _scores(results)),
        Section("Speed and memory", [SPEED], (), [_speed(results)]),
        Section("Failed variants", ["They count in no number of this report."], (), [_failures(results)]),
        Section("How it was run", (), (), [_run(results)]),
        Section("What the statistics carry", _statistics(results) if trained else _statistics_of_prunes(results)),
        Section("Files", ["Plans and configurations, relative to this report."], (), [_files(results)]),
        Section("Terms", terms=TERMS if _checkpoint(results) is None else TERMS_CHECKPOINT),
    ]
    return [s for s in made if not s.tables or any(t.rows for t in s.tables)]


def _main(results: Results) -> Table:
    header = [
        "variant",
        "parameters",
        "kept",
        "experts kept",
        "loss jump at the prune",
        "final loss",
        "final loss - reference",
        "step time / reference",
    ]
    rows = []
    for v in results["variants"]:
        if v["status"] != "done":
            rows.append([v["label"], *[MISSING] * 5, "failed", MISSING])
            continue
        speed = v.get("speed")
        rows.append(
            [
                v["label"],
                _millions(v["parameters"]),
                _percent(v["parameters_kept"]),
                f"{sum(v['experts_kept']):,}\n({_kept_in_short(v['experts_kept'])})",
                _difference(v["jump"]) + _several(v, "\n(sum of {} prunes)"),
                _number(v["val_loss"]["end"]["mean"]),
                "reference" if v["name"] == results["reference"] else _difference(v["vs_reference"]),
                f"{speed['ratio']['median']:.2f}\n({speed['ratio']['q1']:.2f} to {speed['ratio']['q3']:.2f})"
                if speed
                else MISSING,
            ]
        )
    return Table(header, rows)


def _ranking_table(results: Results) -> Table:
    """A row per strategy, a jump per budget; for comparisons without training on."""
    columns = budgets(results)
    rows: list[list[str | Link]] = []
    for name, variants in ranking(results):
        kept = [v for budget in columns if (v := variants.get(budget))]
        experts = " / ".join(f"{sum(v['experts_kept']):,}" for v in kept)
        jumps = [_ranked(variants[budget]) if budget in variants else MISSING for budget in columns]
        rows.append([name, kept[0].get("family") or MISSING, experts, *jumps])
    return Table(["strategy", "family", "experts kept", *(f"loss jump, {budget} removed" for budget in columns)], rows)


def _without(table: Table, column: str) -> Table:
    i = list(table.header).index(column)
    return Table(
        [*table.header[:i], *table.header[i + 1 :]], [[*row[:i], *row[i + 1 :]] for row in table.rows], table.words
    )


def _ranked(v: Variant) -> str:
    above = v["vs_lowest"]
    text = _plus(v["jump"])
    if above is None:
        return f"{text} (lowest)"
    return text if above["verdict"] == NO_DIFFERENCE else f"{text} (+{abs(above['value']):.3f})"


def _pruned(results: Results) -> Table:
    """Every variant, by ascending jump; those that failed last."""
    ran = sorted(done(results), key=lambda v: v["jump"]["value"] if v["jump"] else float("-inf"))
    rows: list[list[str | Link]] = [
        [
            v["label"],
            _millions(v["parameters"]),
            _percent(v["parameters_kept"]),
            f"{sum(v['experts_kept']):,} ({_kept_in_short(v['experts_kept'])})",
            _plus(v["jump"]) + (f" ({NO_DIFFERENCE})" if v["jump"]["verdict"] == NO_DIFFERENCE else "")
            if v["jump"]
            else MISSING,
        ]
        for v in ran
    ]
    rows += [[v["label"], *[MISSING] * 3, "failed"] for v in results["variants"] if v["status"] != "done"]
    return Table(["variant", "parameters", "kept", "experts kept", "loss jump at the prune"], rows)


def _pruned_and_scored(results: Results, place: str, names: Sequence[str]) -> Table:
    """The same for a terminal, with some scores."""
    ran = sorted(done(results), key=lambda v: v["jump"]["value"] if v["jump"] else float("-inf"))
    rows: list[list[str | Link]] = []
    for v in ran:
        scores = [(v.get(place) or {}).get(name) for name in names]
        cells = [_number(s["value"]) if s else MISSING for s in scores]
        rows.append([v["label"], f"{sum(v['experts_kept']):,}", _plus(v["jump"]) if v["jump"] else MISSING, *cells])
    return Table(["variant", "experts kept", "loss jump", *names], rows)


def _kept(results: Results) -> list[Table]:
    L = results["model"]["layers"]
    few = L <= MOST_COLUMNS
    header = [
        "variant",
        "in all",
        *([f"layer {i}" for i in range(L)] if few else ["least", "most", "layer by layer"]),
    ]
    kept: list[list[str | Link]] = []
    removed: list[list[str | Link]] = []
    ran = done(results)
    for label, v in alike(ran) if len(ran) > MOST_ROWS else [(v["label"], v) for v in ran]:
        n = v["experts_kept"]
        kept.append(
            [
                label,
                f"{sum(n):,}",
                *(map(str, n) if few else (str(min(n)), str(max(n)), _run_lengths(n))),
            ]
        )
    for v in ran:
        prunes = v.get("prunes") or [v]
        for number, prune in enumerate(prunes, 1):
            load = prune["removed_load"]
            if load:
                betas = _betas(v, L) if len(prunes) == 1 else []
                bound = _percents(betas) if betas else MISSING
                which = f", step {prune['step']} ({number} of {len(prunes)})" if len(prunes) > 1 else ""
                cells = [_percent(x) for x in (load if few else (min(load), sorted(load)[len(load) // 2], max(load)))]
                removed.append([f"{v['label']}{which}", bound, *cells])
    layers = [f"layer {i}" for i in range(L)] if few else ["least", "median", "most"]
    return [Table(header, kept), Table(["load removed", "bound (beta)", *layers], removed)]


def _overlap(results: Results) -> Table:
    """Per strategy the nearest other and the mean over the others, at each budget."""
    found = results.get("overlap")
    if not found:
        return Table([""], [])
    names, rows = found["names"], []
    for i, name in enumerate(names):
        cells: list[str | Link] = [name]
        for budget in found["budgets"]:
            others = [(x, names[j]) for j, x in enumerate(budget["overlap"][i]) if j != i and x is not None]
            near = max(others, key=lambda pair: pair[0], default=None)
            cells.append(MISSING if near is None else f"{near[1]} {near[0]:.2f}")
            cells.append(MISSING if near is None else f"{sum(x for x, _ in others) / len(others):.2f}")
            drawn = [x for j, x in enumerate(budget["chance"][i]) if j != i and x is not None]
            cells.append(f"{sum(drawn) / len(drawn):.2f}" if drawn else MISSING)
        rows.append(cells)
    columns = [
        f"{budget['budget']} removed:\n{what}"
        for budget in found["budgets"]
        for what in ("nearest", "mean", "by chance")
    ]
    return Table(["strategy", *columns], rows)


def _domains(results: Results) -> Table:
    rows: list[list[str | Link]] = []
    trained = trained_on(results)
    for v in done(results):
        first, last = ("first ", "last ") if len(v.get("prunes") or ()) > 1 else ("", "")
        names = {"before": f"before the {first}prune", "after": f"after the {last}prune", "end": "end of training"}
        if not trained:  # all have the same loss before, which is the reference's
            whole = "before the prunes" if _checkpoint(results) is None else "the whole checkpoint"
            names = {"after": "after the prune"} if v["jump"] else {"end": whole}
        for when, name in names.items():
            loss = v["val_loss"][when]
            if loss:
                cells = [
                    _number(loss["mean"]),
                    *(_number(loss["domains"].get(d)) for d in results["domains"]),
                ]
                rows.append([v["label"], name, *cells])
    return Table(["variant", "when", "mean", *results["domains"]], rows)


def _scores(results: Results) -> list[Table]:
    place, names = scored(results)
    first: dict[str, Any] = {}
    for v in done(results):
        first = {**(v.get(place) or {}), **first}
    header = [
        "variant",
        *(f"{n}\n({METRICS.get(first[n]['metric'], first[n]['metric'])}, {_direction(first[n])})" for n in names),
    ]
    values: list[list[str | Link]] = []
    paired: list[list[str | Link]] = []
    for v in done(results):
        of = v.get(place) or {}
        if of:
            values.append(
                [
                    v["label"],
                    *(f"{_number(of[n]['value'])} ({_number(of[n]['stderr'])})" if n in of else MISSING for n in names),
                ]
            )
            if v["name"] != results["reference"]:
                paired.append(
                    [v["label"], *(_difference(of[n]["vs_reference"]) if n in of else MISSING for n in names)]
                )
    return (
        [Table(header, values), Table(["difference to the reference", *names], paired)]
        if names
        else [Table(header, [])]
    )


def _direction(score: Mapping[str, Any]) -> str:
    return "higher is better" if score["higher_is_better"] else "lower is better"


def _speed(results: Results) -> Table:
    header = [
        "variant",
        "step (ms)",
        "quartiles (ms)",
        "/ reference",
        "quartiles",
        "tokens/s",
        "weights",
        "optimizer",
        "peak memory",
    ]
    rows: list[list[str | Link]] = []
    for v in done(results) if trained_on(results) else []:
        s, m = v.get("speed"), v["memory"]
        ms = {k: f"{1000 * x:.1f}" for k, x in s["step_seconds"].items()} if s else {}
        speed = (
            [
                ms["median"],
                f"{ms['q1']} to {ms['q3']}",
                f"{s['ratio']['median']:.3f}",
                f"{s['ratio']['q1']:.3f} to {s['ratio']['q3']:.3f}",
                f"{s['tokens_per_second']:,.0f}",
            ]
            if s
            else [MISSING] * 5
        )
        rows.append([v["label"], *speed, *(_bytes(m[k]) for k in ("weights_bytes", "optimizer_bytes", "peak_bytes"))])
    return Table(header, rows)


def _failures(results: Results) -> Table:
    return Table(
        ["variant", "error"],
        [[v["label"], v["error"] or ""] for v in results["variants"] if v["status"] != "done"],
        words=True,
    )


def _run(results: Results) -> Table:
    model, machine = results["model"], results["machine"]
    tokens = model["steps"] * model["tokens_per_step"]
    trunk = results["trunk"]
    shared = (
        f"; the first {trunk['step']:,} steps are shared by the variants that start from the trunk" if trunk else ""
    )
    limit = "all documents" if results["limit"] is None else f"{results['limit']} documents per task"
    suite = "none" if results["suite"] is None else f"{results['suite']}, {limit}"
    training = f"{model['steps']:,} steps of {model['tokens_per_step']:,} tokens: {tokens:,} tokens for each trained variant{shared}"
    if trunk and not trained_on(results):
        training = (
            f"{trunk['step']:,} of {model['steps']:,} steps of {model['tokens_per_step']:,} tokens, once; every variant is "
            f"a prune of that model, and none trained on"
        )
    given = _checkpoint(results)
    suite += "".join(f", {option}={value}" for option, value in (given or {}).get("scoring", {}).items())
    steps: list[list[str | Link]] = [["training", training], ["data", "domains: " + ", ".join(results["domains"])]]
    if given is not None:
        found = given["calibration"]
        how = f"{found['calibration_batches']} batches of {found['batch_size']}, seed {found['seed']}, gate {found['gate']}"
        steps = [
            ["checkpoint", f"{given['path']} ({given['family']}), sha256 of the weights {given['weights'][:12]}"],
            ["calibration", f"{_calibration(given)}, {how}"],
            ["held-out text", f"{_held_out(given)}; at most {given['held_out']['seq_len']:,} tokens each"],
        ]
    rows: list[list[str | Link]] = [
        [
            "model",
            f"{model['parameters']:,} parameters, {_count(model['layers'], 'layer')}, {_experts(results).replace('each', 'per layer')}, top-{model['top_k']}",
        ],
        *steps,
        ["suite", suite],
        [
            "machine",
            f"{machine['processor']}, {_count(machine['cores'], 'core')}, {_count(machine['workers'], 'worker')} at a time",
        ],
        ["versions", ", ".join(f"{package} {version}" for package, version in results["versions"].items())],
        ["finished", f"{results['created']}, after {_duration(results['seconds'])}"],
    ]
    rows += [["seed", str(model["seed"])]] if "seed" in model and given is None else []
    starts = {"scratch": "trained from the start", "untrained": "never trained, a control"}
    rows += [["start", f"{v['label']}: {starts[v['start']]}"] for v in done(results) if v["start"] in starts]
    rows += [["pruner", f"{v['label']}: {v['pruner']}"] for v in done(results) if is_pruned(v)]
    rows += [["balancing", f"{v['label']}: {', '.join(v['balancers'])}"] for v in done(results) if v["balancers"]]
    return Table(["", ""], rows, words=True)


def _statistics(results: Results) -> list[str]:
    noise = any(d["noise"] is not None for v in done(results) for d in _all_differences(v))
    drift = (
        "How far two runs drift apart that differ in nothing that matters (noise) was measured with a control run, and the "
        "intervals at the end of training (Student's t) count it in. A single control says little about its size: those "
        "intervals are wide, and hold nine times in ten rather than nineteen in twenty."
        if noise
        else "How far two runs drift apart that differ in nothing that matters (noise) was not measured here. A difference "
        "that is detectable between these trained models may therefore vanish, or turn round, with another seed."
    )
    return [
        f"Differences are paired: the same documents under both models. ± is half a 95 % interval of "
        "the paired difference; numbers in parentheses are standard errors of a single score. A difference inside its "
        f"interval is called “{NO_DIFFERENCE}”: that is not a proof of equality.",
        "Every variant was trained once, with one seed: the documents are a sample, the training is a single draw.",
        drift,
        "About one in twenty comparisons stands out by chance alone; nothing here is corrected for their number.",
    ]


def _statistics_of_prunes(results: Results) -> list[str]:
    given = _checkpoint(results)
    drawn = (
        "the model was trained once, with one seed, and pruned at one moment. Another seed may well rank strategies"
        if given is None
        else "plans were made from one draw of calibration text. Another draw, or another kind of text, may well rank strategies"
    )
    seen = (
        ""
        if given is None or not _seen(given)
        else (" The loss is measured on the text that plans were made from, which favours those that read much of it.")
    )
    return [
        f"Jumps are paired: the same {'validation' if given is None else 'held-out'} sequences just before and just after the prune. "
        f"± is half a 95 % interval of the paired difference; one inside its interval is called “{NO_DIFFERENCE}”, which is no "
        "proof of equality.",
        f"The sequences are a sample, and that is all the intervals know of: {drawn} otherwise where their jumps lie close.{seen}",
        "Differences to the lowest of a budget are paired as well. The lowest of many is lower by luck in part, and about one "
        "in twenty comparisons stands out by chance alone; nothing here is corrected for their number.",
        "A jump is measured before any further training, which makes up for much of it, and not for the same part everywhere: a "
        "ranking of jumps is no ranking of final models.",
    ]


def _files(results: Results) -> Table:
    rows = [
        [v["label"], *(Link(Path(v[k]).name, v[k]) if v.get(k) else MISSING for k in ("plan", "config"))]
        for v in done(results)
    ]
    return Table(["variant", "plan", "configuration"], rows, words=True)


def _unpaired(results: Results) -> list[str]:
    """Tasks with a score and no value per document, so without a paired difference."""
    others = [v for v in done(results) if v["name"] != results["reference"]] if reference(results) else []
    found = [task for v in others for task, score in (v.get("scores") or {}).items() if score["vs_reference"] is None]
    return list(dict.fromkeys(found))


def _suite(results: Results) -> str:
    place, names = scored(results)
    tasks = [
        f"{family} ({_count(len(results['families'][family]), 'task')})"
        for family in names
        if family in results["families"]
    ]
    over = f" Means over the tasks of a family: {', '.join(tasks)}." if tasks else ""
    control = any(v["start"] == "untrained" and v.get(place) for v in done(results))
    seen = " The untrained control shows what a model scores that has learned nothing." if control else ""
    left = _unpaired(results)
    single = (
        f" No paired difference for {_and(left)} and means over {'it' if len(left) == 1 else 'them'}: the metric is one of all "
        f"documents together."
        if left
        else ""
    )
    return f"Suite {results['suite']}. In parentheses: standard error.{over}{single}{seen}"


OVERVIEW = (
    "Losses are in nats per token on the validation split. ± is half a 95 % interval of the paired difference. Step time below 1 "
    "is faster than the reference; quartiles in parentheses."
)
PRUNED = (
    "Loss jump: validation loss just after the prune minus just before, in nats per token, ± half of its 95 % interval."
)
PRUNED_CHECKPOINT = (
    "Loss jump: loss of the pruned checkpoint on held-out text minus that of the whole one, in nats per token, ± half of its 95 % "
    "interval."
)
ABOVE = (
    " In the first table (+…) is how far a jump lies above the lowest of its column, where that is detectable; what carries no "
    "such mark is not told from the lowest."
)
LOADS = (
    "A layer's load is how its tokens spread over its experts. Early on the shares move; later each expert's share settles, and "
    "the shares are unequal. Pruning takes out experts that receive few tokens."
)
KEPT = "The load removed is the share of the layer's tokens that went to the experts cut, in the loads that the plan was made from."
LOSSES = "Nats per token on the validation split, all domains weighted equally in the mean."
LOSSES_HELD_OUT = "Nats per token, mean over sequences; all domains weighted equally in the mean."
OVERLAP = (
    "Overlap of two strategies: Jaccard index of the sets of experts that they remove, mean over layers; by chance: its mean if "
    "both drew lots."
)
SPEED = (
    "After training, the training steps of all variants were timed in turns in one process, so that a busy machine slows all of "
    "them alike: medians and quartiles, and the ratio to the reference's step. Peak memory is the process's peak resident memory "
    "while training; weights and optimizer are the bytes of their tensors."
)
CAPTIONS = {
    "overlap": "Overlap of what strategies remove: the shared part of the experts that either removes, mean over layers.",
    "load_shares": "Share of the layer's tokens per expert over training. Experts that were cut end at the prune.",
    "load_inequality": "Gini coefficient of each layer's loads on the trunk and on in the reference, which keeps all experts.",
    "loss_jump": "Validation loss just after minus just before the prune, same weights but for the experts cut.",
    "jump_against_parameters": "The same jumps against the share of the model's parameters that is kept, a line per strategy.",
    "loss_curves": "Training loss, smoothed; below, the difference to the reference in the steps after the prune.",
    "experts_kept": "Experts kept in each layer.",
    "score_differences": "Score of every strategy minus that of the reference over the same documents, in the order of the loss jumps.",
    "score_against_parameters": "Score against parameters kept. Points of nearly equal share are set side by side. "
    "The bars belong to single scores; the paired differences in the table below are more precise.",
}
CAPTIONS_CHECKPOINT = CAPTIONS | {
    "loss_jump": "Loss of the pruned checkpoint on held-out text minus that of the whole one.",
}
TERMS = (
    ("expert", "one of the feed-forward networks of a layer; a router sends each token to the top-k of them"),
    ("load", "share of a layer's tokens that the router sends to an expert"),
    ("trunk", "the first part of training, done once and shared by all variants that start from it"),
    ("trigger", "the rule that decides at which step to prune"),
    ("reference", "the variant that every other is compared with"),
    ("loss jump", "validation loss right after the prune minus right before, before any further training"),
    (
        "LAEP",
        "layer-adaptive expert pruning: per layer, cut the least loaded experts while their summed load stays below beta and each one's below alpha times the mean",
    ),
    ("noise", "how far two runs drift apart that differ in nothing that matters"),
)
TERMS_CHECKPOINT = (
    *TERMS[:2],
    ("reference", "the checkpoint as it is, which every variant is pruned from and compared with"),
    ("loss jump", "loss of the pruned checkpoint on held-out text minus that of the whole one"),
    TERMS[6],
    ("merging", "the weights of removed experts are averaged into those of experts that stay"),
)


# --- words and numbers


def _checkpoint(results: Results) -> Mapping[str, Any] | None:
    """The existing model that was pruned; None where a recipe trained one."""
    found: Mapping[str, Any] | None = results.get("checkpoint")
    return found


def _compared(results: Results) -> list[Variant]:
    """The variants that a comparison with the reference says something about: no controls."""
    others = (v for v in done(results) if v["name"] != results["reference"])
    return [v for v in others if v["start"] != "untrained" and not v.get("drift")]


def _all_differences(v: Variant) -> list[Mapping[str, Any]]:
    of_scores = [s["vs_reference"] for place in ("families", "scores") for s in (v.get(place) or {}).values()]
    return [d for d in (v["jump"], v["vs_reference"], *of_scores) if d]


def _name(v: Variant) -> str:
    """The label within a sentence."""
    return f"“{v['label']}”" if "," in v["label"] else str(v["label"])


def _reference(results: Results) -> str:
    named = next((_name(v) for v in results["variants"] if v["name"] == results["reference"]), "")
    return f"the reference ({named})" if named else "the reference"


def _betas(v: Variant, layers: int) -> list[float]:
    """LAEP's bound per layer, from the pruner's description; [] if it says none."""
    found = re.match(r"LAEP\((?:.*, )?beta=(\[[^\]]*\]|[^,)\s]+)", v["pruner"] or "")
    try:
        values = [float(x) for x in found[1].strip("[]").split(",")] if found else []
    except ValueError:
        return []
    return values * layers if len(values) == 1 else values if len(values) == layers else []


def _several(v: Variant, text: str) -> str:
    """`text` with the number of prunes, if there were several."""
    n = len(v.get("prunes") or ())
    return text.format(n) if n > 1 else ""


def _of_several(results: Results) -> str:
    """What a jump is where a variant was pruned several times."""
    if not any(_several(v, "{}") for v in done(results)):
        return ""
    return " Of several prunes the jump is the sum, which leaves out what training between them gained."


def _difference(d: Mapping[str, Any] | None) -> str:
    if d is None:
        return MISSING
    return f"{d['value']:+.3f} ± {half_width(d):.3f}\n({d['verdict']})"


def _stacked(d: Mapping[str, Any] | None) -> str:
    """The same for a narrow column."""
    if d is None:
        return MISSING
    return f"{d['value']:+.3f}\n±{half_width(d):.3f}" + ("\nn.d." if d["verdict"] == NO_DIFFERENCE else "")


def _number(x: float | None) -> str:
    return MISSING if x is None else f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}"


def _percent(x: float, digits: int = 1) -> str:
    return f"{100 * x:.{digits}f} %"


def _range(values: Sequence[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _percents(values: Sequence[float]) -> str:
    return _range_of([f"{100 * x:.1f}".removesuffix(".0") for x in (min(values), max(values))]) + " %"


def _range_of(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _millions(x: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if x >= size:
            return f"{x / size:.2f} {unit}"
    return f"{x:,.0f}"


def _bytes(x: float | None) -> str:
    return MISSING if x is None else f"{x / 1e6:,.1f} MB" if x < 1e9 else f"{x / 1e9:,.2f} GB"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} seconds"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def _and(items: Iterable[str]) -> str:
    parts = list(items)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _kept_in_short(kept: Sequence[int]) -> str:
    """Per layer if that is short, else from least to most."""
    return " ".join(map(str, kept)) if len(kept) <= 4 else _range(kept)


def _run_lengths(values: Sequence[int]) -> str:
    """16 16 16 24 -> 3 of 16, 24."""
    runs: list[tuple[int, int]] = []
    for value in values:
        count = runs.pop()[1] if runs and runs[-1][0] == value else 0
        runs.append((value, count + 1))
    return ", ".join(f"{n} of {value}" if n > 1 else str(value) for value, n in runs)


def _short(text: str | None, longest: int) -> str:
    words = " ".join((text or "").split())
    return words if len(words) <= longest else words[: longest - 1].rstrip() + "…"


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


# --- Markdown


def _markdown(results: Results, parts: Sequence[Section], images: Sequence[str]) -> str:
    blocks = [
        f"# {_escape(results['name'])}: pruning variants compared",
        " ".join(_escape(s) for s in headline(results)),
    ]
    for part in parts:
        blocks += [f"## {part.title}", *(_escape(text) for text in part.text)]
        blocks += [f"![{_captions(results)[name]}](plots/{name}.png)" for name in part.plots if name in images]
        blocks += [_markdown_table(table) for table in part.tables if table.rows]
        blocks += [f"- **{term}**: {meaning}" for term, meaning in part.terms]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    align = ["---" if i == 0 or table.words else "---:" for i in range(len(table.header))]
    rows = [[_escape(h) for h in table.header], align]
    rows += [
        [f"[{_escape(c.text)}]({c.href})" if isinstance(c, Link) else _escape(c) for c in row] for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    plain = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
