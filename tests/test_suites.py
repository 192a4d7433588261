"""The suites: names, metrics and filters against the installed lm-eval, and a run of each on documents of its data sets' form."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from moeprune import create, registry
from moeprune.checkpoints import Checkpoint
from moeprune.checkpoints import export as export_checkpoint
from moeprune.cli import main
from moeprune.errors import UserError
from moeprune.evaluation.catalogue import GENERATED, Catalogue
from moeprune.evaluation.paired import paired
from moeprune.evaluation.score import averaged, per_document, save, score
from moeprune.evaluation.suite import Joined, Named, Suite, Task
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.training.data import Corpus, TokenStore

SUITES = sorted({entry.name for entry in registry.entries("suite")})
EIGHT = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande"]


class Rows(Suite):
    def __init__(self, *rows: Task, folder: Path | None = None) -> None:
        self.rows, self.folder = rows, folder

    def tasks(self) -> list[Task]:
        return list(self.rows)

    def task_folder(self) -> Path | None:
        return self.folder


@pytest.fixture(scope="module")
def checkpoint(corpus: Path) -> Checkpoint:
    return made(corpus, 1)


@pytest.fixture(scope="module")
def other(corpus: Path) -> Checkpoint:
    return made(corpus, 2)


def made(corpus: Path, seed: int) -> Checkpoint:
    store = TokenStore(Corpus(str(corpus)), 300)
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8, "max_seq_len": 128}
    config = MoEConfig(vocab_size=300, **shape)
    torch.manual_seed(seed)
    model = MoETransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Checkpoint(config, [list(range(4))], model.state_dict(), [], store.tokenizer_json)


# --- against the installed lm-eval, without data


def test_the_suites_are_there() -> None:
    wanted = {"core", "core_fast", "lm", "generative", "long", "offline"}
    assert set(SUITES) >= wanted | {f"enterprise_{name}" for name in ("rag", "extract", "summ", "table")}
    assert list(create("suite", "core").metrics()) == EIGHT


@pytest.mark.parametrize("name", SUITES)
def test_every_task_and_metric_exists(name: str) -> None:
    """Metric and filter are in the task's file; what only its code says is tried out below."""
    suite = create("suite", name)
    catalogue = Catalogue([task.name for task in suite.tasks()], suite.folders())
    names = [leaf for task in suite.tasks() for leaf in catalogue.leaves(task.name)]
    assert len(names) == len(set(names))
    for task in suite.tasks():
        metric, _, filtered = task.metric.partition(",")
        assert catalogue.data(task.name) or task.data
        for config in map(catalogue.config, catalogue.leaves(task.name)):
            if "metric_list" in config:
                known = [str(entry["metric"]).rpartition(".")[2] for entry in config["metric_list"]]
                assert metric.replace("pass@1", "pass_at_k") in known
                assert (filtered or "none") in [
                    entry["name"] for entry in config.get("filter_list", [])
                ] or not filtered
            else:
                assert config["class"]
            if config.get("output_type") != "generate_until":
                assert task.max_gen_toks is None


def test_groups_are_expanded() -> None:
    catalogue = Catalogue(["mmlu", "longbench2", "babilong_longctx", "jfinqa", "arc_easy"])
    numbers = [len(catalogue.leaves(name)) for name in ("mmlu", "longbench2", "babilong_longctx", "jfinqa", "arc_easy")]
    assert numbers == [57, 20, 5, 3, 1]


@pytest.mark.parametrize("name", ["blimp", "longbench2_single_tasks", "ai2_arc", "mmlu_stem", "glue"])
def test_looking_up_names_finds_what_reading_all_files_below_finds(name: str) -> None:
    """Against lm-eval's own index of every folder that could matter."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / part for part in ("blimp", "longbench2", "arc", "mmlu", "glue")]
    whole = Catalogue([])
    whole._manager = TaskManager(include_path=folders, include_defaults=False)
    assert sorted(Catalogue([name]).leaves(name)) == sorted(whole.leaves(name))


def test_unknown_tasks() -> None:
    with pytest.raises(UserError, match="lm-eval has no task 'helaswag'; did you mean hellaswag"):
        Catalogue(["arc_easy", "helaswag"])
    with pytest.raises(UserError, match="`lm-eval ls tasks` lists all of them"):
        Catalogue(["qqqqqqqqqq"])


@pytest.mark.parametrize("name", ["core", "generative", "long"])
def test_list(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["evaluate", f"--suite={name}", "--list"]) == 0
    shown = capsys.readouterr().out
    for task, metric in create("suite", name).metrics().items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {task} ")]
        assert metric in line
    if name == "core":
        assert "mmlu (57 tasks)" in shown
        assert "cais/mmlu" in shown
    if name == "generative":
        assert shown.count(" 2048 ") == 4
        assert [line.split("│")[3].strip() for line in shown.splitlines() if line.startswith("│")] == [
            "5",
            "0",
            "3",
            "0",
        ]
    if name == "long":
        assert GENERATED in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite=core"], "cannot load the data set allenai/ai2_arc of the task 'arc_challenge'"),
        (["--suite=core_fast,offline"], "run once with network"),
        (["--tasks=mmlu"], "cannot load the data set cais/mmlu of the task 'mmlu'"),
        (["--suite=enterprise_extract"], "the data set hazyresearch/based-fda of the task 'fda'"),
        (["--suite=generative"], "humaneval and mbpp run code that the model writes; pass --run_unsafe_code=true"),
        (["--suite=generative"], "leave them out: --tasks=gsm8k,ifeval"),
        (["--suite=core,cor"], "no suite 'cor'; did you mean 'core'"),
        (["--tasks=gsm9k"], "lm-eval has no task 'gsm9k'; did you mean gsm8k"),
        (["--suite=,"], "nothing to score; give --suite=NAME"),
    ],
)
def test_what_is_missing_is_one_sentence(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    export_checkpoint(checkpoint, tmp_path / "model")
    assert main(["evaluate", f"--model={tmp_path / 'model'}", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("moeprune: error: ")
    assert words in said


def test_a_package_that_is_missing_is_one_sentence(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "needy.yaml").write_text("task: needy\ncustom_dataset: !function code.documents\n")
    (tmp_path / "code.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(
        UserError, match="'needy' cannot be loaded: No module named 'a_package_that_nobody_has'; install"
    ):
        score(checkpoint, Rows(Task("needy"), folder=tmp_path))


# --- on documents of the data sets' form

CHOICES = {"label": ["A", "B", "C", "D"], "text": ["sun", "moon night", "star", "sky light dark"]}
ARC = {"question": "sun moon?", "choices": CHOICES, "answerKey": "B"}
DATE = {"day": "", "month": "", "year": ""}
ANSWER = {"number": "", "date": DATE, "spans": ["moon"]}
LONG = {"context": "sun moon " * 90, "question": "star?", "choices": ["sun", "moon", "star", "sky"], "answer": "C"}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "allenai/ai2_arc": ARC,
    "aps/super_glue": {"passage": "sun moon", "question": "is it night", "label": 1},
    "Rowan/hellaswag": {
        "ctx_a": "sun",
        "ctx_b": "moon",
        "activity_label": "night",
        "endings": ["star", "sky", "light", "dark"],
        "label": "2",
    },
    "cais/mmlu": {"question": "sun?", "choices": ["sun", "moon", "star", "sky"], "answer": 1},
    "allenai/openbookqa": {"question_stem": "the sun is", "choices": CHOICES, "answerKey": "A"},
    "nyu-mll/glue": {"sentence1": "sun moon", "sentence2": "star sky", "label": 0},
    "allenai/winogrande": {"sentence": "the _ is dark", "option1": "sun", "option2": "moon", "answer": "2"},
    "baber/piqa": {"goal": "sun", "sol1": "moon", "sol2": "star", "label": 1},
    "allenai/sciq": {
        "support": "sun moon",
        "question": "star?",
        "distractor1": "sky",
        "distractor2": "light",
        "distractor3": "dark",
        "correct_answer": "dawn",
    },
    "EleutherAI/wikitext_document_level": {"page": "the sun and the moon"},
    "allenai/paloma": {"text": "the sun and the moon"},
    "EleutherAI/lambada_openai": {"text": "the sun and the moon"},
    "openai/gsm8k": {"question": "how many moons?", "answer": "one and two\n#### 3"},
    "hazyresearch/based-squad": {"text": "sun moon", "value": "star"},
    "hazyresearch/based-fda": {"text": "sun moon", "value": "star"},
    "hazyresearch/based-swde-v2": {"text": "sun moon", "value": "star"},
    "EleutherAI/drop": {
        "query_id": "1",
        "passage": "sun moon",
        "question": "star?",
        "answer": ANSWER,
        "validated_answers": {"number": [""], "date": [DATE], "spans": [["moon"]]},
    },
    "abisee/cnn_dailymail": {"article": "sun moon", "highlights": "star"},
    "recursal/longbench-v2": LONG,
    "SaylorTwift/bbh": {"input": "which penguin?", "target": "(B)"},
    "ajtgjmdjp/jfinqa": {"question": "how much?", "table_headers": ["a"], "table_rows": [["1"]], "answer": "1"},
    "RMT-team/babilong-1k-samples": {"input": "sun moon", "question": "where?", "target": "sky"},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Stands for the hub: eight documents per split, told apart by words in every text, with answers that differ; returns what
    was asked for.
    """
    asked: list[tuple[str, Any]] = []

    def document(form: Any, number: int, name: str) -> Any:
        if isinstance(form, dict):
            return {key: document(value, number, name) for key, value in form.items()}
        if isinstance(form, int):
            return (form + number) % 2
        return f"{form} {name} {number}" if isinstance(form, str) and len(form) > 2 and "#" not in form else form

    def load(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        made = datasets.Dataset.from_list([document(DOCUMENTS[path], n, str(name)) for n in range(8)])
        return made if split else dict.fromkeys(("train", "validation", "val", "test", "dev"), made)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


OFFLINE_PARTS = {  # what cannot be loaded here for another reason than data: a package, or a metric from the hub
    "generative": {"humaneval", "mbpp", "ifeval"},
    "enterprise_rag": {name for name in create("suite", "enterprise_rag").metrics() if "longbench" in name}
    | {"squadv2"},
    "enterprise_summ": {name for name in create("suite", "enterprise_summ").metrics() if "longbench" in name},
    "long": {"niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "ruler_cwe"},
}


@pytest.mark.parametrize("name", [name for name in SUITES if name != "offline"])
@pytest.mark.usefixtures("hub")
def test_suite_runs(name: str, checkpoint: Checkpoint, other: Checkpoint, tmp_path: Path) -> None:
    """Every metric is reported, averages are those of the rows, and two models are paired."""
    suite = create("suite", name)
    here = Rows(*(task for task in suite.tasks() if task.name not in OFFLINE_PARTS.get(name, ())))
    limit = 1 if name in ("core", "long") else 3
    results = score(checkpoint, here, limit=limit, max_gen_toks=3)
    rows = results["scores"]["rows"]
    assert list(rows) == [task.name for task in here.tasks()]
    leaves = {"mmlu": 57, "longbench2": 20, "babilong_longctx": 5, "jfinqa": 3}
    for task in here.tasks():
        row = rows[task.name]
        assert row["metric"] == task.metric
        assert row["n"] == len(row["documents"]) == limit * leaves.get(task.name, 1)
        assert math.isclose(np.mean(row["documents"]), row["value"], rel_tol=1e-9, abs_tol=1e-12)
        assert row["higher_is_better"] == (task.metric != "bits_per_byte")
        assert task.num_fewshot in (None, row["num_fewshot"])
    for found in results["scores"]["families"].values():
        assert math.isclose(found["value"], np.mean([rows[task]["value"] for task in found["tasks"]]))
    differences = paired(results["scores"], score(other, here, limit=limit, max_gen_toks=3)["scores"])
    assert all(row["difference"]["half_width"] is not None for row in differences["rows"].values())
    save(results, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == json.loads(json.dumps(results["scores"]))


def test_mmlu_is_one_number(hub: list[tuple[str, Any]], checkpoint: Checkpoint) -> None:
    """All its documents pooled, as lm-eval's own group gives it."""
    results = score(checkpoint, Named(["mmlu"]), limit=2)
    from lm_eval import evaluate

    from moeprune.evaluation.lm import MoEPruneLM

    root = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    manager = TaskManager(include_path=root, include_defaults=False)
    theirs = evaluate(MoEPruneLM(checkpoint), manager.load(["mmlu"]), limit=2, bootstrap_iters=0)
    row = results["scores"]["rows"]["mmlu"]
    assert row["metric"] == "acc"
    assert math.isclose(row["value"], theirs["groups"]["mmlu"]["acc,none"])
    assert 0 < row["value"] < 1
    assert len({name for path, name in hub if path == "cais/mmlu"}) == 57


def test_examples_are_the_same_for_every_model(
    hub: list[tuple[str, Any]], checkpoint: Checkpoint, other: Checkpoint
) -> None:
    """Few-shot examples are drawn with lm-eval's own seed; another number of them gives other prompts."""
    suite = Rows(Task("arc_easy", "acc", num_fewshot=2))
    one, two = (score(model, suite, limit=3)["scores"] for model in (checkpoint, other))
    assert one["rows"]["arc_easy"]["prompts_sha256"] == two["rows"]["arc_easy"]["prompts_sha256"]
    more = score(checkpoint, Rows(Task("arc_easy", "acc", num_fewshot=1)), limit=3)["scores"]
    with pytest.raises(UserError, match="different numbers of examples in the prompt: 2 and 1"):
        paired(one, more)


@pytest.mark.usefixtures("hub")
def test_length_of_answers(checkpoint: Checkpoint) -> None:
    """The command line's, else the suite's (at most half of what the model takes), else the task's; also where code states it."""

    def lengths(number: int | None, **asked: int) -> set[Any]:
        results = score(
            checkpoint, Rows(Task("gsm8k", max_gen_toks=number), Task("fda", max_gen_toks=number)), limit=1, **asked
        )
        samples = [sample for task in ("gsm8k", "fda") for sample in results["samples"][task]]
        return {sample["arguments"][0][1].get("max_gen_toks") for sample in samples}

    assert lengths(None) == {None, 48}  # what gsm8k leaves open, and fda has in its code
    assert lengths(2048) == {64}
    assert lengths(5) == {5}
    assert lengths(5, max_gen_toks=7) == {7}


@pytest.mark.usefixtures("hub")
def test_joined_suites_run_a_task_once(checkpoint: Checkpoint) -> None:
    core, fast = create("suite", "core"), create("suite", "core_fast")
    joined = Joined({"core": core, "core_fast": fast, "offline": create("suite", "offline")})
    names = [task.name for task in joined.tasks()]
    assert len(names) == len(set(names)) == len({*core.metrics(), *fast.metrics()}) + 15
    assert joined.families()["core"] == EIGHT
    assert list(joined.families()["core_fast"]) == list(fast.metrics())
    assert "word order" in joined.families()
    small = Joined({"a": Rows(Task("arc_easy", "acc", "x")), "offline": create("suite", "offline")})
    rows = score(checkpoint, small, limit=1)["scores"]["rows"]
    assert rows["arc_easy"]["n"] == rows["offline_code_indent"]["n"] == 1
    with pytest.raises(UserError, match="suites 'a' and 'b' score the task 'arc_easy' differently"):
        Joined({"a": Rows(Task("arc_easy", "acc")), "b": Rows(Task("arc_easy", "acc_norm"))})
    two = Joined({"a": Rows(Task("arc_easy", "acc", "x")), "b": Rows(Task("arc_challenge", "acc", "x"))})
    assert two.families() == {"x": ["arc_easy"], "b: x": ["arc_challenge"]}


@pytest.mark.usefixtures("hub")
def test_tasks_by_name(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a suite, from the command line, with the metric that comes first."""
    export_checkpoint(checkpoint, tmp_path / "model")
    asked = ["--suite=enterprise_extract", "--tasks=arc_easy,fda,gsm8k", "--limit=2", "--max_gen_toks=2"]
    assert main(["evaluate", f"--model={tmp_path / 'model'}", *asked, f"--output={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    metrics = {task: row["metric"] for task, row in rows.items()}
    assert metrics == {"fda": "contains", "swde": "contains", "arc_easy": "acc", "gsm8k": "exact_match,strict-match"}
    assert "mean: extraction" in capsys.readouterr().out


@pytest.mark.usefixtures("hub")
def test_metrics_that_do_not_fit(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="'arc_easy' has no metric 'f1'; it has: acc, acc_norm"):
        score(checkpoint, Rows(Task("arc_easy", "f1")), limit=1)
    mixed = Rows(Task("wikitext", "bits_per_byte", "x"), Task("arc_easy", "acc", "x"))
    with pytest.raises(UserError, match="wikitext, arc_easy cannot be averaged: for some of them higher is better"):
        score(checkpoint, mixed, limit=1)


GENERATING = """
task: made_here
custom_dataset: !function code.documents
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
process_results: !function code.results
metric_list:
  - {{metric: length, aggregation: {aggregation}, higher_is_better: true}}
"""
CODE = """
import datasets
from transformers import AutoTokenizer

def documents(tokenizer=None, max_seq_lengths=None, **kwargs):
    encode = AutoTokenizer.from_pretrained(tokenizer).encode
    text = "sun"
    while len(encode(text + " moon")) <= max_seq_lengths[0]:
        text += " moon"
    return {"test": datasets.Dataset.from_list([{"text": text}, {"text": "sun"}])}

def results(doc, answers):
    return {"length": float(len(doc["text"]))}

def total(values):
    return sum(values)
"""


def own(tmp_path: Path, aggregation: str, kind: str = "loglikelihood_rolling") -> Suite:
    (tmp_path / "made_here.yaml").write_text(GENERATING.format(aggregation=aggregation, kind=kind))
    (tmp_path / "code.py").write_text(CODE)
    return Rows(Task("made_here", "length", "own", metadata={"max_seq_lengths": [20]}), folder=tmp_path)


def test_tasks_that_make_their_documents_get_the_tokenizer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    row = score(checkpoint, own(tmp_path, "mean"))["scores"]["rows"]["made_here"]
    from moeprune.evaluation.lm import MoEPruneLM

    longest = "sun" + " moon" * (int(max(row["documents"]) - 3) // 5)
    assert (
        len(MoEPruneLM(checkpoint).tok_encode(longest))
        <= 20
        < len(MoEPruneLM(checkpoint).tok_encode(longest + " moon"))
    )


def test_a_metric_of_the_corpus_has_no_interval(checkpoint: Checkpoint, other: Checkpoint, tmp_path: Path) -> None:
    suite = own(tmp_path, "!function code.total")
    one, two = (score(model, suite)["scores"] for model in (checkpoint, other))
    assert one["rows"]["made_here"]["documents"] == []
    assert one["families"]["own"]["stderr"] is None
    found = paired(one, two)["rows"]["made_here"]["difference"]
    assert found == {"value": 0.0, "stderr": None, "half_width": None, "verdict": "no interval"}


def test_somebody_elses_suite(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One class, one entry point, task files of its own: scored by name."""
    own(tmp_path, "mean")
    package, info = tmp_path / "acme_suite.py", tmp_path / "acme-1.0.dist-info"
    package.write_text(
        "from pathlib import Path\nfrom moeprune.evaluation.suite import Suite, Task\n\n\nclass Acme(Suite):\n"
        '    """Acme\'s own questions."""\n\n    def tasks(self):\n'
        '        return [Task("made_here", "length", metadata={"max_seq_lengths": [9]})]\n\n'
        "    def task_folder(self):\n        return Path(__file__).parent\n"
    )
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moeprune.suites]\nacme = acme_suite:Acme\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    export_checkpoint(checkpoint, tmp_path / "model")
    registry.refresh()
    try:
        assert main(["evaluate", f"--model={tmp_path / 'model'}", "--suite=acme"]) == 0
        assert "made_here" in capsys.readouterr().out
        assert main(["plugins", "suite"]) == 0
        assert "Acme's own questions." in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        registry.refresh()


# --- numbers per document


@given(
    st.lists(st.tuples(st.floats(-900, -1), st.integers(1, 400)), min_size=2, max_size=30),
    st.sampled_from(["bits_per_byte", "byte_perplexity", "word_perplexity"]),
)
def test_rates_per_document(pairs: list[tuple[float, int]], metric: str) -> None:
    """Mean as lm-eval's number for the corpus; deviations as the slopes of it, by taking a little of a document's weight away."""
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    pairs = [(-min(-ll, 3.0 * w), w) for ll, w in pairs]  # perplexities that floats can hold
    whole: Callable[[Any], float] = bits_per_byte if metric == "bits_per_byte" else weighted_perplexity
    values = per_document(metric, pairs, whole(pairs))
    assert math.isclose(np.mean(values), whole(pairs), rel_tol=1e-9)
    step = 1e-6
    for index in (0, len(pairs) - 1):
        less = [(ll * (1 - step), w * (1 - step)) if i == index else (ll, w) for i, (ll, w) in enumerate(pairs)]
        slope = (whole(pairs) - whole(less)) / step * len(pairs)
        assert math.isclose(values[index] - whole(pairs), slope, rel_tol=1e-3, abs_tol=1e-3 * whole(pairs))


def test_intervals_of_a_rate_hold() -> None:
    """95 % of the intervals of paired differences in bits per byte hold the true one, documents being of unequal length."""
    from moeprune.compare.results import difference

    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        n = rng.integers(20, 600, 60)
        rates = rng.normal(1.5, 0.3, 60)
        gains = rng.normal(0.05, 0.1, 60)
        a, b = (-(rates + gains) * n * math.log(2), -rates * n * math.log(2))
        sides = [list(zip(side, n, strict=True)) for side in (a, b)]
        totals = [-side.sum() / n.sum() / math.log(2) for side in (a, b)]
        found = difference(*(per_document("bits_per_byte", s, t) for s, t in zip(sides, totals, strict=True)))
        assert math.isclose(found["value"], totals[0] - totals[1], rel_tol=1e-9, abs_tol=1e-12)
        held += abs(found["value"] - 0.05) <= found["half_width"]
    assert 270 <= held <= 298


def test_perplexity_per_document() -> None:
    from lm_eval.api.metrics import perplexity

    values = [-random.Random(i).uniform(1, 6) for i in range(12)]
    found = per_document("perplexity", values, perplexity(values))
    assert math.isclose(np.mean(found), perplexity(values), rel_tol=1e-9)
    assert np.argmax(found) == np.argmin(values)


@pytest.mark.parametrize("values", [[], ["a", "b"], [{"x": 1}], [(1.0, 2.0, 3.0)], [[1, 0], [1]], [1.0, 0.0]], ids=repr)
def test_no_numbers_per_document(values: list[Any]) -> None:
    """Also where the corpus's number is not their mean."""
    assert per_document("inst_level_strict_acc", values, 0.75) == []


def test_means_weigh_tasks_equally() -> None:
    row = {"metric": "acc", "higher_is_better": True, "stderr": 0.1}
    rows = {
        "a": {**row, "value": 0.5, "n": 2, "documents": [0.0, 1.0]},
        "b": {**row, "value": 1.0, "n": 1, "documents": [1.0]},
    }
    found = averaged(rows, ["a", "b"])
    assert found["value"] == 0.75
    assert found["n"] == 3
    assert math.isclose(found["stderr"], math.sqrt(0.5 / 2) / 2)
    assert averaged({**rows, "b": {**rows["b"], "documents": []}}, ["a", "b"])["stderr"] is None
    assert averaged({**rows, "b": {**rows["b"], "metric": "f1"}}, ["a", "b"])["metric"] == "acc and f1"


def test_out_of_memory_is_one_sentence(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("moeprune.model.transformer.Block.forward", full)
    with pytest.raises(UserError, match="out of memory with 4 requests at a time; give a smaller --batch_size"):
        score(checkpoint, create("suite", "offline"), limit=1, batch_size=4)


def described(task: Task) -> str:
    """A task as the documentation lists it."""
    shots = f", {task.num_fewshot}-shot" if task.num_fewshot else ""
    return f"`{task.name}` {task.metric}{shots}"


def table() -> list[str]:
    """The table of docs/evaluation.md."""
    rows = []
    for name in SUITES:
        suite = create("suite", name)
        families = {task: family for family, tasks in suite.families().items() for task in tasks}
        parts: dict[str, list[str]] = {}
        for task in suite.tasks():
            parts.setdefault(families.get(task.name, "in no average"), []).append(described(task))
        rows += [f"| `{name}` | {family} | {', '.join(tasks)} |" for family, tasks in parts.items()]
    return rows


def test_documentation_lists_the_suites() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| `")] == table()
