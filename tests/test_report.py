"""The report of a comparison: complete, self-contained, escaped, and worded as the verdicts say."""

from __future__ import annotations

import copy
import json
import re
import sys
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from moeprune.compare import plots, report
from moeprune.compare.results import NO_DIFFERENCE, Z
from moeprune.errors import UserError

DOMAINS = ["lit", "kjv", "code", "tech", "api"]
FAMILIES = {
    "bits per byte": ("doc_bpb", False, 2.31, 0.012),
    "word order": ("acc", True, 0.712, 0.021),
    "last word": ("acc", True, 0.243, 0.019),
    "indentation": ("acc", True, 0.655, 0.034),
}
# label, pruner, share kept, jump, end - reference, step ratio
PRUNED = [
    ("LAEP β=0.1", "LAEP(alpha=inf, beta=0.1)", 0.75, 0.084, 0.003, 0.93),
    ("LAEP β=0.05", "LAEP(alpha=inf, beta=0.05)", 0.84, 0.044, -0.006, 0.95),
    ("LAEP β=0.2", "LAEP(alpha=inf, beta=0.2)", 0.64, 0.166, 0.019, 0.9),
    ("LAEP α=0.2 β=0.1", "LAEP(alpha=0.2, beta=0.1)", 0.92, 0.004, -0.002, 0.98),
    ("lowest load, uniform", "LowestLoadPruner(keep=0.75)", 0.75, 0.121, 0.012, 0.94),
    ("Taylor", "TaylorPruner(keep=0.75)", 0.75, 0.077, 0.001, 0.93),
    ("magnitude", "MagnitudePruner(keep=0.75)", 0.75, 0.107, 0.006, 0.94),
    ("random", "RandomPruner(keep=0.75)", 0.75, 0.163, 0.017, 0.93),
]


def diff(value, stderr, noise=None):
    detectable = abs(value) > Z * np.hypot(stderr, noise or 0)
    verdict = ("higher" if value > 0 else "lower") if detectable else NO_DIFFERENCE
    return {
        "value": float(value),
        "stderr": stderr,
        "noise": noise,
        "half_width": float(Z * np.hypot(stderr, noise or 0)),
        "verdict": verdict,
    }


def loss(mean):
    return {"mean": mean, "domains": {d: mean + 0.2 * (i - 2) for i, d in enumerate(DOMAINS)}}


def loads(rng, skill, steps, ids, end):
    """Shares that drift from even to `skill`."""
    shares = []
    for step in steps:
        window = []
        for s, kept in zip(skill, ids, strict=True):
            logits = (s * min(1, step / end) + rng.normal(0, 0.08, len(s)))[kept]
            window.append((np.exp(logits) / np.exp(logits).sum()).tolist())
        shares.append(window)
    return {
        "step": list(steps),
        "expert_ids": [[list(map(int, i)) for i in ids] for _ in steps],
        "shares": shares,
    }


def history(steps, offset, seed):
    steps = np.asarray(steps)
    noise = np.random.default_rng(seed).normal(0, 0.06, 10_000)[steps]
    own = np.random.default_rng(seed + 1 + int(offset * 1e6) % 1000).normal(0, 0.008, len(steps))
    values = 3.9 + 3.7 * np.exp(-steps / 70) + 0.35 * np.exp(-steps / 400) + noise + own + offset
    return {"step": steps.tolist(), "loss": values.tolist(), "seconds": [0.12] * len(steps)}


def scores(rng, untrained=False, base=False, noise=None):
    families = {}
    for name, (metric, higher, value, stderr) in FAMILIES.items():
        off = (-0.4 if higher else 6.0) * value / 2 if untrained else rng.normal(0, stderr)
        families[name] = {
            "metric": metric, "higher_is_better": higher, "value": value + off, "stderr": stderr, "n": 500,
            "vs_reference": None if base else diff(off, stderr * 0.7, noise),
        }  # fmt: skip
    return families


def build(layers=4, experts=32, steps=600, prune=320, windows=20, variants=None, noise=None):
    """A results dict that looks like a run of `make quickstart`, made from a fixed seed."""
    rng = np.random.default_rng(0)
    depth = np.linspace(0.5, 1.5, layers)
    skill = [rng.normal(0, d, experts) for d in depth]
    everyone = [np.arange(experts)] * layers
    trunk_steps, later = range(20, prune + 1, windows), range(prune + windows, steps + 1, windows)
    trunk_loads = loads(rng, skill, trunk_steps, everyone, prune)
    last = trunk_loads["shares"][-1]
    after = np.arange(prune + 1, steps + 1)

    def variant(name, label, start, pruner=None, kept=None, jump=None, end=0.0, ratio=1.0, **more):
        kept = kept or everyone
        params = 0.2 + 0.8 * sum(map(len, kept)) / (experts * layers)
        spike = history(after, 0, 7)
        decay = (jump or 0) * np.exp(-(after - prune) / 15)
        own = np.random.default_rng(len(label) * 31).normal(0, 0.01, len(after)) if name != "base" else 0
        spike["loss"] = (np.array(spike["loss"]) + decay + end + own).tolist()
        if start == "untrained":
            spike = {"step": [], "loss": [], "seconds": []}
        if start == "scratch":
            spike = history(np.arange(1, steps + 1), end, 7)
        v = {
            "name": name, "label": label, "status": "done", "error": None, "start": start, "pruner": pruner,
            "drift": False, "strategy": "", "family": "", "budget": "", "prunes": [], "vs_lowest": None,
            "balancers": [], "parameters": int(3.95e6 * params), "parameters_kept": params,
            "active_parameters": 910_000, "experts_kept": [len(k) for k in kept],
            "removed_load": [], "plan": None, "config": f"variants/{name}/config.yaml",
            "val_loss": {"before": None, "after": None, "end": loss(3.986 + end)},
            "jump": None, "vs_reference": None if name == "base" else diff(end, 0.004, noise),
            "history": spike, "loads": loads(rng, skill, later if start != "untrained" else [], kept, prune),
            "speed": {"step_seconds": {"median": 0.12 * ratio, "q1": 0.118 * ratio, "q3": 0.125 * ratio},
                      "ratio": {"median": ratio, "q1": ratio * 0.98, "q3": ratio * 1.02},
                      "tokens_per_second": 8400 / ratio},
            "memory": {"weights_bytes": int(15.8e6 * params), "optimizer_bytes": int(31.6e6 * params),
                       "peak_bytes": int(410e6 + 40e6 * params)},
            "scores": {}, "families": scores(rng, start == "untrained", name == "base", noise),
        }  # fmt: skip
        if pruner:
            v["plan"] = f"variants/{name}/plan.json"
            v["removed_load"] = [
                float(sum(s for i, s in enumerate(last[layer]) if i not in set(map(int, kept[layer]))))
                for layer in range(layers)
            ]
            v["val_loss"] |= {"before": loss(4.31), "after": loss(4.31 + jump)}
            v["jump"] = diff(jump, 0.0031)
            v["prunes"] = [{"step": prune, "reason": "stable", "experts_kept": v["experts_kept"],
                            "removed_load": v["removed_load"], "jump": v["jump"]}]  # fmt: skip
        return v | more

    made = [variant("base", "not pruned", "trunk")]
    for n, (label, pruner, share, jump, end, ratio) in enumerate(PRUNED):
        if variants is not None and f"pruned{n}" not in variants:
            continue
        beta = float(m[1]) if (m := re.search(r"beta=([\d.]+)", pruner)) else None
        kept = []
        for layer in range(layers):
            order = np.argsort(last[layer])
            total = np.cumsum(np.sort(last[layer]))
            alpha = 0.2 if "alpha=0.2" in pruner else np.inf
            light = np.sort(last[layer]) <= alpha / experts
            cut = int(((total < beta) & light).sum()) if beta else int(experts * (1 - share))
            kept.append(np.sort(rng.permutation(order)[cut:] if label == "random" else order[cut:]))
        made.append(variant(f"pruned{n}", label, "trunk", pruner, kept, jump, end, ratio))
    made.append(variant("switch", "Switch loss 1e-2", "scratch", end=-0.011, ratio=1.01, balancers=["Switch(0.01)"]))
    made.append(variant("untrained", "untrained", "untrained", end=3.64, speed=None))
    made.append({"name": "broken", "label": "Taylor, 10 %", "status": "failed", "start": "trunk",
                 "error": "layer 3 would keep 1 experts, fewer than top_k=2; prune less"})  # fmt: skip
    return {
        "format": "moeprune.results/1", "name": "quickstart", "created": "2025-01-31T12:00:00+00:00", "seconds": 412.0,
        "versions": {"moeprune": "0.1.0", "torch": "2.11.0", "lm-eval": "0.4.13"},
        "machine": {"processor": "x86_64, 2 cores", "cores": 2, "workers": 1},
        "model": {"parameters": 3_950_000, "layers": layers, "experts": experts, "top_k": 2, "steps": steps,
                  "tokens_per_step": 1024},
        "domains": DOMAINS, "reference": "base", "suite": "offline", "limit": 100, "train_on": True,
        "families": {name: [f"offline_{name}_{d}" for d in DOMAINS] for name in FAMILIES},
        "trunk": {"step": prune, "tokens": prune * 1024, "history": history(np.arange(1, prune + 1), 0, 7),
                  "reason": "stable: lowest rank correlation 0.912 >= 0.9 over 3 windows", "loads": trunk_loads},
        "variants": [v for v in made if variants is None or v["name"] in variants],
    }  # fmt: skip


# strategy, family, jump at 25 %, at 50 %
SWEPT = [
    ("laep", "per layer", 0.030, 0.200),
    ("frequency", "choices", 0.035, 0.260),
    ("taylor", "gradients", 0.062, 0.180),
    ("magnitude", "weights", 0.110, 0.300),
    ("random", "chance", 0.140, 0.350),
]


def sweep(strategies=SWEPT, failing=True):
    """A results dict that looks like a run of recipes/compare/strategies.yaml."""
    results = build(variants=["base", "pruned0"])
    whole, one = results["variants"]
    nothing = {"step": [], "loss": [], "seconds": []}
    alone = {
        "history": nothing,
        "loads": {"step": [], "expert_ids": [], "shares": []},
        "speed": None,
        "scores": {},
        "families": {},
        "vs_reference": None,
        "memory": {"weights_bytes": 1, "optimizer_bytes": None, "peak_bytes": None},
    }
    made = [whole | alone]
    for name, family, *jumps in strategies:
        for budget, n, jump in zip(("25 %", "50 %"), (24, 16), jumps, strict=True):
            best = min(row[2 if n == 24 else 3] for row in strategies)
            made.append(
                one
                | alone
                | {
                    "name": f"{name}-{budget[:2]}", "label": f"{name} {budget}", "strategy": name, "family": family,
                    "budget": budget, "pruner": f"{name}(ratio={1 - n / 32})", "experts_kept": [n] * 4,
                    "parameters_kept": 0.8 if n == 24 else 0.6, "jump": diff(jump, 0.003), "prunes": [],
                    "val_loss": {"before": loss(4.3), "after": loss(4.3 + jump), "end": loss(4.3 + jump)},
                    "vs_lowest": diff(jump - best, 0.003) if jump != best else None,
                }
            )  # fmt: skip
    if failing:
        made.append({"name": "odd", "label": "odd, 10 %", "status": "failed", "start": "trunk", "error": "no such thing",
                     "drift": False, "strategy": "odd", "family": "chance", "budget": "25 %"})  # fmt: skip
    return results | {"variants": made, "train_on": False, "suite": None, "families": {}, "name": "strategies"}


def of_checkpoint(seen=False):
    """A results dict that looks like a run of recipes/compare/checkpoint.yaml with a suite."""
    results = sweep()
    rng = np.random.default_rng(0)
    for v in results["variants"]:
        if v["status"] == "done":
            v |= {"families": scores(rng, base=v["name"] == "base")}
    alone = next(v for v in results["variants"] if v["name"] == "laep-25")
    results["variants"].append(
        alone
        | {"name": "own", "label": "own numbers", "strategy": "", "family": "", "budget": "", "parameters_kept": 0.7}
    )
    names = [row[0] for row in SWEPT]
    overlap = {
        "names": names, "families": [names[:2]],
        "budgets": [
            {"budget": budget, "ratio": ratio, "overlap": [[1.0 if a == b else 0.1 * (a + b) for b in range(5)] for a in range(5)],
             "chance": [[1.0 if a == b else 0.15 for b in range(5)] for a in range(5)]}
            for budget, ratio in (("25 %", 0.26), ("50 %", 0.5))
        ],
    }  # fmt: skip
    overlap["budgets"][0]["overlap"][0][0] = None
    source = "texts.jsonl" if seen else "embedded"
    return results | {
        "trunk": None, "suite": "offline", "families": {name: ["a", "b"] for name in FAMILIES}, "name": "checkpoint",
        "overlap": overlap, "model": results["model"] | {"steps": 0, "tokens_per_step": 0, "experts_in_all": 128, "seed": 0},
        "checkpoint": {
            "path": "models/moe", "weights": "0123456789abcdef", "family": "qwen3_moe", "experts": [32] * 4, "top_k": 2, "n_groups": 1,
            "calibration": {"data": {"source": source, "domains": None, "hash": "x"}, "calibration_tokens": 65_536,
                            "calibration_batches": 32, "batch_size": 8, "seq_len": None, "seed": 0, "gate": "weight"},
            "held_out": {"source": source, "hash": "y", "sequences": 80, "tokens": 163_840, "seq_len": 2048},
        },
    }  # fmt: skip


def gradual(results):
    """`results`, in which a variant of its own start is pruned three times."""
    changed = copy.deepcopy(results)
    v = next(v for v in changed["variants"] if v["name"] == "switch")
    kept = [[28] * 4, [26] * 4, [24, 24, 24, 23]]
    v |= {
        "label": "LAEP gradual", "pruner": "LAEP(alpha=inf, beta=0.1)", "experts_kept": kept[-1], "removed_load": [],
        "prunes": [{"step": step, "reason": f"prune {i + 1} of 3", "experts_kept": n, "removed_load": [0.01 * (i + 1)] * 4,
                    "jump": diff(0.02, 0.002)} for i, (step, n) in enumerate(zip((200, 300, 400), kept, strict=True))],
        "jump": diff(0.06, 0.004),
    }  # fmt: skip
    v["val_loss"] |= {"before": loss(4.5), "after": loss(4.3)}  # lower: training in between
    return changed


# --- reading what was written


class Page(HTMLParser):
    """Text, tables and addresses of a page; complains about tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.tables, self.text = [], [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def tables_of(markdown):
    """Blocks of table lines -> rows of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", markdown, flags=re.M)
    return [[[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in b.splitlines()] for b in blocks]


def written(results, folder):
    report.write_report(json.loads(json.dumps(results, allow_nan=False)), folder)
    return (folder / "report.html").read_text("utf-8"), (folder / "report.md").read_text("utf-8")


def terminal(results):
    out = StringIO()
    Console(file=out, width=100, color_system=None).print(report.terminal_table(results))
    return out.getvalue()


def rows_of(page, label):
    return [row for table in page.tables for row in table if row[0] == label]


@pytest.fixture(scope="module")
def results():
    return build()


@pytest.fixture(scope="module")
def made(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return (folder, *written(results, folder))


def without_figures(monkeypatch):
    """Words and tables only: figures have their own tests."""
    monkeypatch.setattr(report, "figures", lambda results: {})


# --- the page


def test_page_needs_nothing_else(made):
    folder, html, markdown = made
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(|javascript:|//cdn", html)
    images = [a for a in page.addresses if a.startswith("data:image/png;base64,")]
    names = sorted(p.stem for p in (folder / "plots").glob("*"))
    of_strategies = {"jump_against_parameters", "overlap", "score_differences"}  # at several budgets
    assert names == sorted(report.CAPTIONS.keys() - of_strategies)
    assert len(images) == page.tags.count("img") == len(names)
    links = [a for a in page.addresses if a not in images]
    assert "variants/pruned0/plan.json" in links
    assert all(re.fullmatch(r"variants/\w+/(plan\.json|config\.yaml)", a) for a in links)
    assert len(html) < 3_000_000
    for name in names:
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](plots/{name}.png)" in markdown


def test_every_variant_is_in_every_output(results, made):
    _, html, markdown = made
    page, screen = Page(html), terminal(results)
    first = [row[0] for row in page.tables[0]]
    assert first[1:] == [v["label"] for v in results["variants"]]
    for v in results["variants"]:
        assert f"| {v['label']} |" in markdown
        assert all(word in screen for word in v["label"].split())


def test_failed_variants_show_their_error(results, made):
    _, html, markdown = made
    for text in (Page(html).text, markdown.replace("\\", ""), terminal(results)):
        assert "layer 3 would keep 1 experts, fewer than top_k=2" in text
    assert rows_of(Page(html), "Taylor, 10 %")[0][-2] == "failed"


def test_numbers_arrive(made):
    page = Page(made[1])
    main = dict(zip(page.tables[0][0], rows_of(page, "LAEP β=0.2")[0], strict=True))
    assert main["loss jump at the prune"] == "+0.166 ± 0.006\n(higher)"
    assert main["final loss - reference"] == "+0.019 ± 0.008\n(higher)"
    assert main["final loss"] == "4.005"
    assert main["step time / reference"].startswith("0.90")


def test_markdown_tables_are_well_formed(made):
    tables = tables_of(made[2])
    assert len(tables) >= 8
    for table in tables:
        assert all(re.fullmatch(r"---:?", cell) for cell in table[1])
        assert {len(row) for row in table} == {len(table[0])}
        assert len(table) > 2


# --- words


def test_words_follow_the_verdicts(results, made):
    _, html, markdown = made
    page = Page(html)
    final = next(s for s in report.headline(results) if s.startswith("Final validation loss"))
    groups = dict(
        re.findall(r"(no detectable difference|detectably higher|detectably lower) for (.*?)(?=; | \(95)", final)
    )
    seen = set()
    for v in results["variants"]:
        if v["status"] != "done" or v["name"] in ("base", "untrained"):
            continue
        verdict = v["vs_reference"]["verdict"]
        seen.add(verdict)
        key = verdict if verdict == NO_DIFFERENCE else f"detectably {verdict}"
        for group, members in groups.items():
            names = re.split(
                r", (?=[A-ZLa-z])| and ",
                re.sub(r" \([^)]*\)", "", members).replace("“lowest load, uniform”", "lowest load"),
            )
            assert (v["label"].split(",")[0] in names) == (group == key)
        cell = rows_of(page, v["label"])[0][-2]
        assert re.search(r"\((.*)\)", cell)[1] == verdict
        assert f"| {cell.replace(chr(10), ' ')} |" in markdown
    assert seen == {NO_DIFFERENCE, "higher", "lower"}


def test_a_difference_inside_its_error_is_never_judged(monkeypatch, tmp_path):
    without_figures(monkeypatch)
    results = build(variants=["base", "pruned0"])
    v = results["variants"][1]
    v["vs_reference"] = diff(-0.004, 0.0022)  # |value| < 1.96 standard errors
    v["jump"] = diff(0.004, 0.003)
    for score in v["families"].values():
        score["vs_reference"] = diff(-0.01, 0.006)
    html, markdown = written(results, tmp_path)
    page = Page(html)
    compared = " ".join(cell for row in rows_of(page, v["label"]) for cell in row)
    lines = " ".join(line for line in markdown.splitlines() if line.startswith(f"| {v['label']} |"))
    sentences = " ".join(report.headline(results))
    for text in (compared, lines, sentences):
        assert NO_DIFFERENCE in text
        assert not re.search(r"better|worse|higher|lower|rose|fell|beats|best|detectably", text)
    assert compared.count(NO_DIFFERENCE) == 2 + len(FAMILIES)
    assert "Of 4 comparisons with the reference on task families, 4 show no detectable difference" in sentences
    assert terminal(results).count("n.d.") == 2 + 1  # both differences, and the legend


def test_noise_rules_over_a_small_error(monkeypatch, tmp_path):
    without_figures(monkeypatch)
    html, markdown = written(build(noise=0.02), tmp_path)  # ends of +.019 with a standard error of .004
    assert rows_of(Page(html), "LAEP β=0.2")[0][-2] == f"+0.019 ± 0.040\n({NO_DIFFERENCE})"
    assert "detectably higher for" not in html + markdown
    assert "was not measured here" not in html + markdown


def test_headline_is_short_and_names_the_trigger_and_the_bound(results):
    sentences = report.headline(results)
    assert 3 <= len(sentences) <= 6
    text = " ".join(sentences)
    assert "at step 320 of 600" in text
    assert "stable: lowest rank correlation 0.912 >= 0.9 over 3 windows" in text
    assert "in every layer below the bound beta = 10 %" in text
    assert "rose by 0.084 ± 0.006" in text
    over = copy.deepcopy(results)
    over["variants"][1]["removed_load"][2] = 0.12
    assert "in 1 of 4 layers not below the bound beta = 10 %" in " ".join(report.headline(over))


@pytest.mark.parametrize(
    ("pruner", "layers", "betas"),
    [
        ("LAEP(alpha=inf, beta=0.1)", 2, [0.1, 0.1]),
        ("LAEP(alpha=[0.2, 0.4], beta=[0.1, 0.2])", 2, [0.1, 0.2]),
        ("LAEP(alpha=inf, beta=[0.1, 0.2])", 3, []),
        ("LAEP()", 2, []),
        ("LowestLoadPruner(allocation=match(pruner=laep(beta=0.1)))", 2, []),
        (None, 2, []),
    ],
)
def test_the_bound_is_read_from_the_pruner(pruner, layers, betas):
    assert report._betas({"pruner": pruner}, layers) == betas


# --- without training on


def test_a_sweep_is_ranked_by_its_jumps(tmp_path):
    results = sweep()
    html, markdown = written(results, tmp_path)
    page = Page(html)
    ranks, variants = page.tables[:2]
    assert [row[0] for row in ranks[1:]] == ["laep", "frequency", "taylor", "magnitude", "random"]
    assert ranks[0][3:] == ["loss jump, 25 % removed", "loss jump, 50 % removed"]
    assert ranks[1][2:] == ["96 / 64", "+0.030 ± 0.006 (lowest)", "+0.200 ± 0.006 (+0.020)"]
    assert ranks[2][3:] == ["+0.035 ± 0.006", "+0.260 ± 0.006 (+0.080)"]  # 0.005 is not told from the lowest
    assert ranks[3][4] == "+0.180 ± 0.006 (lowest)"
    jumps = [float(row[-1].split(" ")[0]) for row in variants[2:-1]]
    assert jumps == sorted(jumps)
    assert len(jumps) == 10
    assert (variants[1][0], variants[-1][0], variants[-1][-1]) == ("not pruned", "odd, 10 %", "failed")
    names = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"loss_jump", "jump_against_parameters", "experts_kept"} <= names
    assert not names & {"loss_curves", "score_against_parameters"}
    assert not re.search(r"\b(None|nan|inf)\b", page.text)
    assert not re.search(r"Final validation loss|step time|Speed and memory|Scores|end of training", page.text)
    assert "no such thing" in page.text
    for table in tables_of(markdown):
        assert {len(row) for row in table} == {len(table[0])}


def test_the_headline_of_a_sweep_names_ties():
    text = " ".join(report.headline(sweep()))
    assert "pruned and not trained on" in text
    assert (
        "25 % removed: the loss jumps least for laep (+0.030 ± 0.006), with no detectable difference to frequency, and"
        in text
    )
    assert (
        "50 % removed: the loss jumps least for taylor (+0.180 ± 0.006), and most for random (+0.350 ± 0.006)." in text
    )


def test_the_terminal_shows_a_sweep():
    out = terminal(sweep())
    assert max(map(len, out.splitlines())) <= 100
    assert "+0.030 ± 0.006 (lowest)" in out
    assert "odd, 10 %" in out
    many = [(f"a_criterion_of_long_name_{i}", "family", 0.1 + 0.01 * i, 0.2) for i in range(30)]
    assert max(map(len, terminal(sweep(many)).splitlines())) <= 100


def test_prunes_without_budgets_are_sorted_too(tmp_path):
    results = sweep()
    for v in results["variants"]:
        v |= {"strategy": "", "family": "", "budget": ""}
    html, _ = written(results, tmp_path)
    labels = [row[0] for row in Page(html).tables[0]]
    assert labels[1:4] == ["not pruned", "laep 25 %", "frequency 25 %"]
    assert "laep 25 %" in terminal(results)
    assert not (tmp_path / "plots" / "jump_against_parameters.png").exists()


def test_a_panel_per_budget_ranks_the_strategies():
    figure = plots.loss_jump(sweep())
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["25 % removed", "50 % removed"]
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == ["random", "magnitude", "taylor", "frequency", "laep"]
    for axis, column in zip(figure.axes, (2, 3), strict=True):
        drawn = [container.lines[0].get_xdata()[0] for container in axis.containers]
        assert drawn == pytest.approx([next(row[column] for row in SWEPT if row[0] == name) for name in names])
    colours = {t: axis.containers[i].lines[0].get_color() for i, t in enumerate(names) for axis in figure.axes[:1]}
    assert len(set(colours.values())) == 5  # one per family


def test_lines_start_at_the_whole_model():
    axis = plots.jump_against_parameters(sweep()).axes[0]
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 3]
    assert len(lines) == 5
    for line, (*_, quarter, half) in zip(lines, SWEPT, strict=True):
        assert line.get_xdata() == pytest.approx([100, 80, 60])
        assert line.get_ydata() == pytest.approx([0, quarter, half])


def test_variants_that_keep_equal_numbers_share_a_row():
    many = [(f"c{i}", "family", 0.1 + 0.01 * i, 0.2) for i in range(30)]
    labels = [t.get_text() for t in plots.experts_kept(sweep(many)).axes[0].get_yticklabels()]
    assert labels == ["c0 25 % and 29 more", "c0 50 % and 29 more"]
    kept = report._kept(sweep(many))[0]
    assert [row[0] for row in kept.rows] == ["not pruned", *labels]


# --- an existing checkpoint


def test_the_page_of_a_checkpoint(tmp_path):
    html, markdown = written(of_checkpoint(), tmp_path)
    page = Page(html)
    assert "the checkpoint models/moe (3.95 million parameters, 4 layers, 32 experts each, top-2)" in page.text
    assert "Plans were made from 65,536 tokens of the embedded corpus (train split)" in page.text
    assert "80 sequences of the embedded corpus (validation split), 163,840 tokens, which no plan saw" in page.text
    assert "comparisons with the reference on task families" in page.text
    assert not re.search(r"\b(trunk|trigger|None|nan|step 0|validation loss|training step)\b", page.text)
    names = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert names == {"loss_jump", "jump_against_parameters", "experts_kept", "overlap", "score_differences"}
    assert len(page.tables) >= 7
    near = rows_of(page, "taylor")[-1] if len(rows_of(page, "taylor")) == 2 else rows_of(page, "taylor")[1]
    assert near[1:4] == ["random 0.60", "0.40", "0.15"]
    for table in tables_of(markdown):
        assert {len(row) for row in table} == {len(table[0])}
    assert "favours those that read much of it" not in page.text
    out = terminal(of_checkpoint())
    assert max(map(len, out.splitlines())) <= 100
    assert "own numbers" in out
    assert "indentation" in out


def test_a_loss_on_the_text_that_plans_saw_is_called_so(tmp_path):
    html, _ = written(of_checkpoint(seen=True), tmp_path)
    assert "80 sequences of texts.jsonl, 163,840 tokens, the text that plans were made from" in html
    assert "favours those that read much of it" in html


def test_score_differences_are_the_paired_ones():
    results = of_checkpoint()
    figure = plots.score_differences(results)
    assert [axis.get_title(loc="left").partition(" (")[0] for axis in figure.axes] == list(FAMILIES)
    by_name = {v["name"]: v for v in results["variants"]}
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]  # shared by all
    for axis, family in zip(figure.axes, FAMILIES, strict=True):
        wanted = [by_name[f"{n}-{b}"]["families"][family]["vs_reference"] for n in names for b in (25, 50)]
        drawn = [container.lines[0].get_xdata()[0] for container in axis.containers]
        assert drawn == pytest.approx([d["value"] for d in wanted])
        ends = [container.lines[2][0].get_segments()[0][:, 0] for container in axis.containers]
        assert [b - a for a, b in ends] == pytest.approx([2 * d["half_width"] for d in wanted])


def test_a_variant_without_a_budget_is_a_point_of_its_own_look():
    results = of_checkpoint()
    looks = plots._looks(results)
    assert looks["own"]["color"] not in {looks[f"{row[0]}-25"]["color"] for row in SWEPT}
    axis = plots.jump_against_parameters(results).axes[0]
    points = [c.lines[0].get_xydata().tolist() for c in axis.containers]
    assert [pytest.approx(70), pytest.approx(0.03)] in [point for each in points for point in each]


def test_the_map_of_overlaps_names_the_budgets():
    figure = plots.overlap(of_checkpoint())
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0].startswith("25 % removed: mean 0.40, chance 0.15")  # as the variants say, not the 26 % that it is
    assert titles[1].startswith("50 % removed")


# --- several prunes


def test_several_prunes_are_a_sum_and_are_marked(results, tmp_path):
    html, _ = written(gradual(results), tmp_path)
    page = Page(html)
    row = dict(zip(page.tables[0][0], rows_of(page, "LAEP gradual")[0], strict=True))
    assert row["loss jump at the prune"] == "+0.060 ± 0.008\n(higher)\n(sum of 3 prunes)"
    assert "the jump is the sum" in page.text
    removed = [row for table in page.tables for row in table if row[0].startswith("LAEP gradual, step")]
    assert [row[0] for row in removed] == [f"LAEP gradual, step {200 + 100 * i} ({i + 1} of 3)" for i in range(3)]
    assert [row[2] for row in removed] == ["1.0 %", "2.0 %", "3.0 %"]
    assert rows_of(page, "LAEP gradual")[2][1] == "before the first prune"
    assert "+0.060\n" in terminal(gradual(results)).replace(" ", "\n")
    labels = [t.get_text() for t in plots.loss_jump(gradual(results)).axes[0].get_yticklabels()]
    assert "LAEP gradual (3 prunes)" in labels


def test_curves_mark_the_prunes_of_a_run_of_its_own(results):
    figure = plots.loss_curves(gradual(results))
    (marks,) = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "None"]
    assert list(marks.get_xdata()) == [200, 300, 400]
    entry = "marks: where it was pruned"
    assert entry in [text.get_text() for text in figure.legends[0].get_texts()]
    assert entry not in [text.get_text() for text in plots.loss_curves(results).legends[0].get_texts()]


def test_shares_mark_every_prune_of_the_variant_shown(results):
    only = gradual(results)
    only["variants"] = [v for v in only["variants"] if v["name"] in ("base", "switch")]
    text = " ".join(report.headline(only))
    assert "At its 3 prunes, steps 200, 300 and 400 together, its validation loss rose by 0.060" in text
    axis = plots.load_shares(only).axes[0]
    marked = {line.get_xdata()[0] for line in axis.get_lines() if line.get_linestyle() == ":"}
    assert marked == {200, 300, 400}


# --- hostile and degenerate input


def test_labels_and_errors_are_escaped(tmp_path):
    results = build(variants=["base", "pruned0", "broken"])
    evil = "<b>x</b> & | `y` *z* $\\frac$ [i]"
    results["variants"][1]["label"] = evil
    results["variants"][1]["plan"] = 'javascript:alert("1")'
    results["variants"][2]["error"] = "<script>alert(1)</script>\n| end"
    results["trunk"]["reason"] = "<i>why</i>"
    html, markdown = written(results, tmp_path)  # plots, too: $ is no formula
    page = Page(html)
    assert not {"b", "script", "i"} & set(page.tags)
    assert evil in page.text
    assert "<script>alert(1)</script>" in page.text
    assert not any(a.startswith("javascript:") for a in page.addresses)
    assert "<" not in markdown.replace("&lt;", "")
    for table in tables_of(markdown):
        assert {len(row) for row in table} == {len(table[0])}
    assert "[i]" in terminal(results)


def test_no_word_of_a_comparison_is_a_formula(tmp_path):
    results, evil = of_checkpoint(), "$\\frac$"
    for v in results["variants"]:
        v |= {key: f"{v[key]} {evil}" for key in ("label", "strategy", "family", "budget") if v.get(key)}
    found = results["overlap"]
    found["names"] = [f"{name} {evil}" for name in found["names"]]
    found["families"] = [[f"{name} {evil}" for name in family] for family in found["families"]]
    for budget in found["budgets"]:
        budget["budget"] += f" {evil}"
    page, _ = written(results, tmp_path)
    assert Page(page).text.count(evil) > 10


def no_speed(results):
    for v in results["variants"]:
        if v["status"] == "done":
            v["speed"] = None
    return results


def no_scores(results):
    for v in results["variants"]:
        v |= {"scores": {}, "families": {}}
    return results | {"families": {}}


def failed_reference(results):
    for v in results["variants"]:
        if v["name"] == "base":
            error = {
                "name": "base",
                "label": v["label"],
                "status": "failed",
                "start": "trunk",
                "error": "disk full",
            }
            v.clear()
            v.update(error)
        elif v["status"] == "done":
            v["vs_reference"] = None
            for score in v["families"].values():
                score["vs_reference"] = None
    return results


def all_failed(results):
    for v in results["variants"]:
        v |= {"status": "failed", "error": None}
        for key in set(v) - {"name", "label", "status", "error", "start"}:
            del v[key]
    return results


def nothing_seen(results):
    results["trunk"] |= {"history": {"step": [], "loss": [], "seconds": []}}
    for part in (results["trunk"], *(v for v in results["variants"] if v["status"] == "done")):
        part["loads"] = {"step": [], "expert_ids": [], "shares": []}
    return results


SMALL = {"layers": 2, "experts": 8, "windows": 80}
CASES = {
    "no pruned variant": lambda: build(variants=["base", "untrained"]),
    "one layer": lambda: build(layers=1, experts=4, windows=80, variants=["base", "pruned0"]),
    "hundred layers": lambda: build(layers=100, experts=8, windows=80, variants=["base", "pruned0", "broken"]),
    "no speed": lambda: no_speed(build(variants=["base", "pruned0"])),
    "no scores": lambda: no_scores(build(variants=["base", "pruned0"])),
    "failed reference": lambda: failed_reference(build(variants=["base", "pruned0", "untrained"])),
    "all failed": lambda: all_failed(build(variants=["base", "pruned0"])),
    "no loads, no history": lambda: nothing_seen(build(variants=["base", "pruned0"])),
}


@pytest.mark.parametrize("case", CASES)
def test_degenerate_results_are_reported(case, tmp_path):
    results = CASES[case]()
    html, markdown = written(results, tmp_path)
    page = Page(html)
    assert [row[0] for row in page.tables[0]][1:] == [v["label"] for v in results["variants"]]
    assert not re.search(r"\b(None|nan|inf)\b(?!,)", page.text)
    assert report.headline(results)
    assert max(map(len, terminal(results).splitlines())) <= 100
    for table in tables_of(markdown):
        assert {len(row) for row in table} == {len(table[0])}
    if case == "no pruned variant":
        assert "No variant was pruned." in page.text


def test_twenty_variants_fit_the_terminal_and_keep_their_colours(results):
    many = copy.deepcopy(results)
    extra = next(v for v in many["variants"] if v["name"] == "pruned5")
    many["variants"] += [extra | {"name": f"more{i}", "label": f"a rather long label of variant {i}"} for i in range(9)]
    assert max(map(len, terminal(many).splitlines())) <= 100
    looks = plots._looks(many)
    assert all(looks[name] == look for name, look in plots._looks(results).items())
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks)


# --- figures


def test_cut_experts_end_at_the_prune(results):
    figure = plots.load_shares(results)
    panels = [axis for axis in figure.axes if axis.get_title(loc="left").startswith("layer")]
    kept = results["variants"][1]["experts_kept"]
    assert len(panels) == 4
    for axis, n in zip(panels, kept, strict=True):
        lines = [line for line in axis.get_lines() if line.get_color() == plots.ACCENT and line.get_marker() == "None"]
        assert len(lines) == 32 - n
        assert all(line.get_xdata()[-1] == 320 for line in lines)


def test_an_expert_without_tokens_is_drawn_at_the_floor(results):
    changed = copy.deepcopy(results)
    changed["trunk"]["loads"]["shares"][-1][0][0] = 0.0
    axis = plots.load_shares(changed).axes[0]
    low = axis.get_ylim()[0]
    assert low > 0
    assert all(min(line.get_ydata()) >= low for line in axis.get_lines()[:32])


def test_jumps_are_sorted_and_carry_their_interval(results):
    axis = plots.loss_jump(results).axes[0]
    labels = [t.get_text() for t in axis.get_yticklabels()]
    assert labels[0] == "LAEP β=0.2"
    assert labels[-1] == "LAEP α=0.2 β=0.1"
    (low, high) = axis.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert (low, high) == (pytest.approx(0.166 - Z * 0.0031), pytest.approx(0.166 + Z * 0.0031))


def test_the_curve_after_the_prune_is_the_paired_difference(results):
    bottom = plots.loss_curves(results).axes[1]
    base, laep = results["variants"][0]["history"], results["variants"][1]["history"]
    first = next(line for line in bottom.get_lines() if line.get_color() == plots.PALETTE[0])
    assert first.get_ydata()[0] == pytest.approx(laep["loss"][0] - base["loss"][0])


def test_labels_are_moved_apart_but_not_further_than_needed():
    assert plots.spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert plots.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    crowded = plots.spread([0.99] * 40, 0.1)
    assert crowded == pytest.approx(np.linspace(0, 1, 40).tolist())
    assert plots.spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])


def test_gini_is_half_the_relative_mean_difference():
    shares = np.array([1, 5, 0, 30, 12]) / 48
    expected = np.abs(shares[:, None] - shares).mean() / (2 * shares.mean())
    assert plots._gini(shares.tolist()) == pytest.approx(expected)
    assert plots._gini([0.0, 0.0]) == 0


def test_missing_packages_are_named(monkeypatch, results, tmp_path):
    for package, module in (("jinja2", "jinja2"), ("matplotlib", "matplotlib.figure")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=rf"{package}: pip install 'moeprune\[report\]'"):
                report.write_report(results, tmp_path)
            assert terminal(results)
