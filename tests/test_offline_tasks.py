"""The offline lm-eval tasks: they load without a network, and no trivial rule beats chance."""

from __future__ import annotations

import collections
import json
import lzma
import math
import os
import re
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from moeprune.embedded import DOMAINS, documents
from moeprune.embedded.prepare import ngrams
from moeprune_plugins.suites.offline import prepare

FOLDER = Path(prepare.__file__).parent
CHOICE_TASKS = tuple(name for name in prepare.TASKS if not name.startswith("bpb_"))


def read(name):
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


ROWS = {name: read(name) for name in prepare.TASKS}
KNOWN = {domain: prepare.Known.of(domain) for domain in DOMAINS}


def domain_of(name):
    return "code" if name == "code_indent" else name.split("_")[1]


def tie_aware(rows, score):
    """Expected accuracy of picking the choice of highest score, ties broken at random."""
    total = 0.0
    for row in rows:
        scores = [score(row, choice) for choice in row["choices"]]
        best = [i for i, s in enumerate(scores) if s == max(scores)]
        total += (row["label"] in best) / len(best)
    return total / len(rows)


def test_the_tasks_are_the_documented_ones():
    expected = {f"{form}_{d}" for form in ("bpb", "wordorder") for d in DOMAINS}
    expected |= {f"lastword_{d}" for d in ("lit", "kjv", "tech", "api")} | {"code_indent"}
    assert set(prepare.TASKS) == expected


def test_the_vendored_files_are_what_prepare_builds(tmp_path):
    prepare.build(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        vendored = FOLDER / path.name
        if path.suffix == ".xz":
            assert lzma.decompress(path.read_bytes()) == lzma.decompress(vendored.read_bytes()), path.name
        else:
            assert path.read_text() == vendored.read_text(), path.name


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_gold_positions_are_balanced(name):
    counts = collections.Counter(row["label"] for row in ROWS[name])
    width = len(ROWS[name][0]["choices"])
    assert width == (2 if name.startswith("wordorder") else 4)
    assert len(counts) == width
    assert max(counts.values()) - min(counts.values()) <= 1
    assert 100 <= len(ROWS[name]) <= 200


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_trivial_rules_stay_at_chance(name):
    rows, known = ROWS[name], KNOWN[domain_of(name)]
    chance = 1 / len(rows[0]["choices"])
    limit = 3 * math.sqrt(chance * (1 - chance) / len(rows))
    gold = collections.Counter(row["choices"][row["label"]] for row in rows)
    rules = {
        "longest": lambda row, choice: len(choice),
        "shortest": lambda row, choice: -len(choice),
        "first in the alphabet": lambda row, choice: -sorted(row["choices"]).index(choice),
        "most frequent word": lambda row, choice: known.counts[choice.strip()],
        "rarest word": lambda row, choice: -known.counts[choice.strip()],
        "most frequent last word": lambda row, choice: known.final[choice.strip()],
        "most frequent answer": lambda row, choice: gold[choice] - (choice == row["choices"][row["label"]]),
        "copy from the context": lambda row, choice: choice.strip().lower() in row["context"].lower(),
    }
    for rule, score in rules.items():
        assert abs(tie_aware(rows, score) - chance) <= limit, rule


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_choices_after_a_context_start_at_white_space(name):
    for row in ROWS[name]:
        assert len(set(row["choices"])) == len(row["choices"])
        assert not row["context"] or row["context"][-1] not in " \n"
        assert all(choice[0] in " \n" for choice in row["choices"]) == bool(row["context"])


@pytest.mark.parametrize("name", prepare.TASKS)
def test_the_text_is_held_out(name):
    domain = domain_of(name)
    known = KNOWN[domain]
    test = {d.id: " ".join(d.text.split()) for d in documents(domain, "test")}
    for row in ROWS[name]:
        assert row["source"] in test
        text = row["text"] if "text" in row else row["context"] + row["choices"][row["label"]]
        assert not ngrams(text) & known.grams
        if name.startswith(("wordorder", "lastword")):
            assert not known.contains(text)
        if name.startswith(("bpb", "code")):
            assert " ".join(text.split()) in test[row["source"]]


def test_word_order_pairs_differ_by_one_adjacent_swap():
    for name in (n for n in CHOICE_TASKS if n.startswith("wordorder")):
        for row in ROWS[name]:
            a, b = (choice.split(" ") for choice in row["choices"])
            different = [i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
            assert len(different) == 2
            i, j = different
            assert j == i + 1
            assert (a[i], a[j]) == (b[j], b[i])
            assert i > 0
            assert j < len(a) - 1
            assert 30 <= len(row["choices"][0]) <= 160


def test_last_words_share_length_and_do_not_occur_in_the_context():
    for name in (n for n in CHOICE_TASKS if n.startswith("lastword")):
        for row in ROWS[name]:
            assert len(row["context"]) <= 200
            assert len({len(choice) for choice in row["choices"]}) == 1
            assert not [c for c in row["choices"] if c.strip() in row["context"].lower()]


def test_indentation_is_balanced_over_the_four_depths():
    offsets = collections.Counter()
    for row in ROWS["code_indent"]:
        assert len(row["context"]) <= 250
        depth = [len(c.lstrip("\n")) - len(c.strip()) for c in row["choices"]]
        last = row["context"].split("\n")[-1]
        above = len(last) - len(last.lstrip(" "))
        assert sorted(d - above for d in depth) == [-8, -4, 0, 4]
        assert len({c.strip() for c in row["choices"]}) == 1
        offsets[depth[row["label"]] - above] += 1
    assert len(set(offsets.values())) == 1


def test_bits_per_byte_texts():
    for name in (n for n in prepare.TASKS if n.startswith("bpb")):
        rows = ROWS[name]
        assert 20 <= len(rows) <= 30
        assert all(300 <= len(row["text"]) <= 1500 for row in rows)
        assert len({row["text"] for row in rows}) == len(rows)


def stub_lm(score):
    """An lm-eval model whose log-likelihood of a continuation is ``score(continuation)``."""
    from lm_eval.api.model import LM

    class Stub(LM):
        def loglikelihood(self, requests):
            return [(score(request.args[1]), False) for request in requests]

        def loglikelihood_rolling(self, requests):
            return [score(request.args[0]) for request in requests]

        def generate_until(self, requests):
            raise NotImplementedError

    return Stub()


@pytest.fixture(scope="module")
def evaluate():
    import socket

    from lm_eval.evaluator import evaluate as run
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)

    def call(score, limit):
        names = [f"offline_{name}" for name in prepare.TASKS]
        real = socket.socket.connect

        def refuse(*_):
            raise AssertionError("a task opened a network connection")

        socket.socket.connect = refuse
        try:
            return run(stub_lm(score), manager.load(names), limit=limit, bootstrap_iters=10)
        finally:
            socket.socket.connect = real

    return call


def test_all_tasks_run_through_lm_eval_offline(evaluate):
    results = evaluate(lambda text: -float(len(text.encode("utf-8"))), 5)["results"]
    assert set(results) == {f"offline_{name}" for name in prepare.TASKS}
    for name in prepare.TASKS:
        scores = results[f"offline_{name}"]
        if name.startswith("bpb"):
            # one nat a byte
            assert scores["bits_per_byte,none"] == pytest.approx(1 / math.log(2))
            assert scores["doc_bpb,none"] == pytest.approx(1 / math.log(2))
            assert scores["doc_bpb_stderr,none"] == pytest.approx(0, abs=1e-9)
        else:
            for metric in ("acc", "acc_chance_adj", "gold_prob"):
                assert math.isfinite(scores[f"{metric},none"])
                assert math.isfinite(scores[f"{metric}_stderr,none"])
            chance = 0.5 if name.startswith("wordorder") else 0.25
            acc = scores["acc,none"]
            assert scores["acc_chance_adj,none"] == pytest.approx((acc - chance) / (1 - chance))


def test_a_constant_model_scores_exactly_chance(evaluate):
    results = evaluate(lambda text: -1.0, None)["results"]
    for name in CHOICE_TASKS:
        chance = 0.5 if name.startswith("wordorder") else 0.25
        scores = results[f"offline_{name}"]
        assert scores["acc,none"] == pytest.approx(chance)
        assert scores["acc_chance_adj,none"] == pytest.approx(0)
        assert scores["gold_prob,none"] == pytest.approx(chance)


def test_an_informed_model_beats_chance(evaluate):
    """The right answers are in the held-out text: a model that has memorised it scores 1."""
    memory = {d: prepare._normal(" ".join(x.text for x in documents(d, "test"))) for d in ("kjv", "tech")}

    def score(text):
        words = prepare._normal(text)
        return 0.0 if any(words in held for held in memory.values()) else -1.0

    results = evaluate(score, None)["results"]
    assert results["offline_wordorder_kjv"]["acc,none"] > 0.95
    assert results["offline_wordorder_tech"]["acc,none"] > 0.95


def test_missing_data_is_one_clear_sentence():
    from moeprune_plugins.suites.offline import utils

    with pytest.raises(FileNotFoundError, match=re.escape("'nothing.jsonl.xz' is missing")):
        utils.load("nothing.jsonl.xz")
