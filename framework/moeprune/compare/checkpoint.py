"""Prunes an existing checkpoint in every way that a comparison names (`checkpoint:` instead of `recipe:`), one after the other.

The checkpoint is loaded once. What all pruners together read is measured in one pass and kept; each variant plans from that, is
cut in memory, measured on held-out text, scored if there is a suite, and put back bit for bit. Plans, weights and losses are
those of `moeprune prune`. In the comparison's folder:

    evidence/       what was measured, as `moeprune calibrate` writes it
    <variant>/      plan.json, variant.yaml, events.jsonl and result.json; evaluation/ and log.txt with a suite;
                    checkpoint/ with `export`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from moeprune import checkpoints
from moeprune.commands import calibrate
from moeprune.commands.subject import Reading, Subject, subject
from moeprune.compare import held_out
from moeprune.compare.job import scored, sizes
from moeprune.compare.spec import Comparison, job_folder
from moeprune.errors import UserError
from moeprune.files import locked, read_json, write_text
from moeprune.interop import checkpoint as interop
from moeprune.interop.text import _ids
from moeprune.interop.transformers import TransformersModel, text_config
from moeprune.model.prunable import PrunableModel
from moeprune.pruning import store
from moeprune.pruning.calibration import HELD_OUT, Gate, Recording, record
from moeprune.pruning.constraints import Constraints
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.merging import merge_experts
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.pruner import Pruner
from moeprune.pruning.surgery import only

EVIDENCE = "evidence"
SCORING = ("apply_chat_template", "max_gen_toks", "think_end_token")  # options of `evaluation.score.score`
BUSY = "a comparison is running in {}; wait for it, or choose another --output"
AGAIN = "choose another --output, or pass --overwrite=true to start anew"


@dataclasses.dataclass(frozen=True)
class Setup:
    """Which checkpoint, and how it is read and measured.

    Args:
        path: a checkpoint file (.ckpt), an exported folder, or a transformers checkpoint (folder or name on the hub).
        how: reading and calibration, as for `moeprune calibrate`.
        gate: see `calibration.record`.
        held_out: text for the loss; None for the validation split of what the model was trained on, of the embedded corpus for
            a transformers checkpoint.
        eval_sequences: sequences of it, per domain.
        export: whether pruned checkpoints are written.
        scoring: those of `SCORING` that were asked for, for the suite.

    Raises:
        UserError: a number out of range.
    """

    path: Path
    how: Reading
    gate: Gate
    held_out: str | None
    eval_sequences: int
    export: bool
    scoring: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("calibration_batches", "batch_size"):
            if getattr(self.how, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self.how, name)}")
        if self.how.seq_len is not None and self.how.seq_len < 1:
            raise UserError(f"seq_len must be at least 1, got {self.how.seq_len}")
        if self.eval_sequences < 2:
            raise UserError(f"eval_sequences must be at least 2, got {self.eval_sequences}; intervals need two")
        if self.scoring.get("max_gen_toks", 1) < 1:
            raise UserError(f"max_gen_toks must be at least 1, got {self.scoring['max_gen_toks']}")

    def identity(self) -> dict[str, Any]:
        """What decides the results, as plain data; where things are does not."""
        how = dataclasses.asdict(self.how)
        del how["device"]
        scoring = {**dict.fromkeys(SCORING), **self.scoring}
        return {**how, "gate": self.gate, "held_out": self.held_out, "eval_sequences": self.eval_sequences, **scoring}


def _prunes(comparison: Comparison) -> dict[str, tuple[Pruner, Constraints]]:
    """The pruner and the constraints of each variant but the reference, by name.

    Raises:
        UserError: options that a pruner or the constraints do not take; the variant is named.
    """
    from jsonargparse import ArgumentParser

    from moeprune import names
    from moeprune.cli import Sentences

    class Parser(Sentences, ArgumentParser):
        pass

    names.install("pruner", "criterion", "allocation")
    parser = Parser()
    parser.add_argument("--pruner", type=Pruner)
    parser.add_class_arguments(Constraints, "constraints")
    made = {}
    for name, variant in comparison.variants.items():
        if name != comparison.reference:
            try:
                found = parser.instantiate_classes(parser.parse_object(variant.config["pruning"]))
            except UserError as error:
                raise UserError(f"variant {name!r}: {error}") from error
            made[name] = (found.pruner, found.constraints)
    return made


def _check_folder(comparison: Comparison, setup: Setup, folder: Path) -> None:
    """Check that `folder` is new, or holds a comparison of a checkpoint in which no variant means something else.

    Raises:
        UserError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "comparison.json").exists():
        raise UserError(f"{folder} exists and holds no comparison; choose another --output")
    found, wanted = read_json(folder / "comparison.json", "comparison"), _identity(comparison, setup)
    if not found.get("checkpoint"):
        raise UserError(f"{folder} holds a comparison of a recipe's variants; {AGAIN}")
    changed = sorted(key for key in wanted["checkpoint"] if found["checkpoint"].get(key) != wanted["checkpoint"][key])
    changed += [key for key in ("reference", "suite", "limit") if found.get(key) != wanted[key]]
    if changed:
        raise UserError(f"{folder} holds a comparison with other {', '.join(changed)}; {AGAIN}")
    for name, variant in comparison.variants.items():
        result = job_folder(folder, name) / "result.json"
        if result.exists() and read_json(result, "result")["config"] != variant.config:
            raise UserError(f"{folder} holds another variant {name!r}; give this one another name, or {AGAIN}")


def _identity(comparison: Comparison, setup: Setup) -> dict[str, Any]:
    shared = {"name": comparison.name, "reference": comparison.reference}
    return {**shared, "suite": comparison.suite, "limit": comparison.limit, "checkpoint": setup.identity()}


def _known(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """What the folder's results were made from; {} if there are none."""
    result = job_folder(folder, comparison.reference) / "result.json"
    return dict(read_json(result, "result")["checkpoint"]) if result.exists() else {}


def _same(folder: Path, what: str, known: str | None, now: str) -> None:
    if known not in (None, now):
        raise UserError(f"{folder} holds results of another {what} (sha256 {str(known)[:12]}, not {now[:12]}); {AGAIN}")


def _fingerprint(path: Path) -> str:
    if interop.is_transformers(path):
        return interop.fingerprint(interop.resolve(path))
    return checkpoints.fingerprint(checkpoints.read(path).state)


class _Text(NamedTuple):
    rows: held_out.Rows
    provenance: dict[str, Any]


class Work:
    """What is left to do of a comparison; loads the checkpoint if anything is, and makes the folder once that went well.

    Args:
        comparison: its reference is the checkpoint as it is.
        setup: which checkpoint.
        folder: of the comparison; it may be one begun before with fewer or other variants.
        anew: forget what is there.

    Raises:
        UserError: the checkpoint, the text or a variant cannot be used, or the folder holds something else.
    """

    def __init__(self, comparison: Comparison, setup: Setup, folder: Path, anew: bool) -> None:
        self.comparison, self.setup, self.folder, self.prunes = comparison, setup, folder, _prunes(comparison)
        self.impossible: dict[str, str] = {}  # statistics of this model that cannot be measured -> why
        anew = anew and (folder / "comparison.json").exists()
        if not anew:
            _check_folder(comparison, setup, folder)
        known = {} if anew else _known(comparison, folder)
        self.waiting = [name for name in comparison.variants if anew or self._waits(name)]
        described = folder / EVIDENCE / store.DESCRIPTION
        self.saved = store.load(folder / EVIDENCE) if described.exists() and not anew else None
        if not self.waiting:
            _same(folder, "checkpoint", known["weights"], _fingerprint(setup.path))
            return
        has = frozenset(self.saved.layers[0].stats) if self.saved else frozenset()
        wanted = frozenset[str]().union(*(self.prunes[name][0].needs for name in self.waiting if name in self.prunes))
        self.missing = (wanted - store.LIVE | {"counts"}) - has
        self.it: Subject = subject(setup.path, setup.how, bool(self.missing or "acceptance" in wanted))
        self.whole = sum(p.numel() for p in _module(self.it.model).parameters())
        measured = self.saved.provenance if self.saved else known
        _same(folder, "checkpoint", measured.get("weights"), self.it.provenance["weights"])
        if self.saved is not None and "data" in self.it.provenance:
            _same(folder, "calibration text", self.saved.provenance["data"]["hash"], self.it.provenance["data"]["hash"])
        _same(folder, "held-out text", known.get("held_out", {}).get("hash"), self.text.provenance["hash"])
        if setup.scoring.get("apply_chat_template") and (
            self.own is not None or not interop.tokenizer(interop.resolve(setup.path)).chat_template
        ):
            raise UserError(f"the tokenizer of {setup.path} has no chat template; leave out --apply_chat_template")
        if anew:
            with locked(folder, BUSY.format(folder)):
                shutil.rmtree(folder)
        write_text(folder / "comparison.json", json.dumps(_identity(comparison, setup), indent=1) + "\n")

    def _waits(self, name: str) -> bool:
        place = job_folder(self.folder, name)
        exported = self.setup.export and name in self.prunes
        return not (place / "result.json").exists() or (exported and not (place / "checkpoint").exists())

    def run(self, console: Console) -> dict[str, str]:
        """Measure every variant that has no result yet.

        Args:
            console: for progress.

        Returns:
            The error of each variant that failed, by name.

        Raises:
            UserError: nothing can be measured, or the suite cannot score the checkpoint itself.
        """
        base, how = self.comparison.reference, self.setup.how
        try:
            if self.waiting:
                self.measure()  # which has a bar of its own
            if base in self.waiting:
                self.reference()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with {how.batch_size} sequences at a time; give a smaller batch_size or seq_len, or another dtype"
            ) from error
        failed: dict[str, str] = {}
        others = [name for name in self.waiting if name != base]
        columns = (TextColumn("{task.description:<16}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(others))
            for name in others:
                progress.update(bar, description=name)
                try:
                    self.variant(name)
                except Exception as error:  # memory that gives out included: it leaves the others alone
                    own = isinstance(error, UserError)
                    failed[name] = str(error) if own else f"{type(error).__name__}: {error}"
                    with _log(job_folder(self.folder, name)) as log:
                        traceback.print_exc(file=log)
                if not console.is_terminal:
                    said = f"failed: {failed[name]}" if name in failed else "done"
                    console.print(f"{name}: {said}", markup=False, soft_wrap=True)
                progress.advance(bar)
        return failed

    @cached_property
    def own(self) -> checkpoints.Checkpoint | None:
        """All but the weights of a model of moeprune's; None for one of transformers."""
        transformers = isinstance(self.it.model, TransformersModel)
        return None if transformers else checkpoints.read(self.setup.path, weights=False)

    @cached_property
    def text(self) -> _Text:
        """The held-out text."""
        own, asked = self.own, self.setup.how.seq_len
        if own is not None:
            from tokenizers import Tokenizer

            if not own.tokenizer:
                raise UserError(f"{self.setup.path} holds no tokenizer, so its loss on text cannot be measured")
            tokenizer = Tokenizer.from_str(own.tokenizer)
            end = [i] if (i := tokenizer.token_to_id(own.end_of_text)) is not None else []
            longest = own.config.max_seq_len
            length = min(asked or longest, longest)

            def encode(document: Any) -> list[int]:
                if not isinstance(document, str):
                    raise UserError(
                        "the held-out text holds chats, and moeprune's own model has no chat template; give plain text"
                    )
                return list(tokenizer.encode(document).ids)
        else:
            model: Any = self.it.model
            theirs = interop.tokenizer(interop.resolve(self.setup.path))
            end = [] if theirs.eos_token_id is None else [theirs.eos_token_id]
            longest = getattr(text_config(model.config), "max_position_embeddings", None) or 2048
            length = min(asked or min(longest, 2048), longest)

            def encode(document: Any) -> list[int]:
                return _ids(theirs, document)

        trained = {} if own is None else own.data
        source = self.setup.held_out or trained.get("source", "embedded")
        domains = trained.get("domains") if self.setup.held_out is None else None
        rows = held_out.sequences(source, encode, end, length, self.setup.eval_sequences, domains)
        tokens = sum(len(row) - 1 for each in rows.values() for row in each)
        n = sum(map(len, rows.values()))
        return _Text(
            rows, {"source": source, "hash": held_out.digest(rows), "sequences": n, "tokens": tokens, "seq_len": length}
        )

    # -- the measurement -----------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Record what no earlier call has, in one pass over the text, and keep it."""
        if not self.missing:
            return
        if "router_w2" in self.missing and any("router" not in layer.weights() for layer in self.it.model.moe_layers):
            self.impossible["router_w2"] = "the model's router has no weight with one row per expert"
        try:
            found = self._recorded()
        except UserError:
            self.impossible |= self._refused(self.missing - self.impossible.keys() - {"counts"})
            if not self.impossible:
                raise
            found = self._recorded()
        place = self.folder / EVIDENCE
        if found is not None:
            if self.saved is not None:
                layers = [
                    LayerEvidence(a.ids, a.n_original, {**a.stats, **b.stats})
                    for a, b in zip(self.saved.layers, found.layers, strict=True)
                ]
                found = Evidence(tuple(layers), found.top_k, self.saved.provenance)
            store.save(found, place, overwrite=True)
        for part in place.glob("more-*"):
            shutil.rmtree(part)
        self.saved = store.load(place)

    def _recorded(self) -> Evidence | None:
        """What is missing, in a folder of its own, so that a call that is interrupted goes on if it is repeated as it was."""
        wanted = self.missing - self.impossible.keys()
        place = self.folder / EVIDENCE / f"more-{hashlib.sha256(' '.join(sorted(wanted)).encode()).hexdigest()[:8]}"
        return calibrate.measured(place, self.it, wanted, self.setup.gate) or store.load(place) if wanted else None

    def _refused(self, names: frozenset[str]) -> dict[str, str]:
        """Those that this model refuses, each tried on a few tokens, and why."""
        batch = self.it.batches[0]
        few = (batch[0][:1, :9], batch[1][:1, :9]) if isinstance(batch, tuple) else batch[:1, :9]
        refused = {}
        for name in sorted(names):
            try:
                trial = Recording(self.it.model, frozenset({name, "counts"}), self.setup.gate)
                trial.update(few)
                trial.evidence(held_out=[few])
            except UserError as error:
                refused[name] = str(error)
        return refused

    def evidence(self, pruner: Pruner) -> Evidence:
        """What was measured; what only a live model has is added.

        Raises:
            UserError: the pruner reads what cannot be measured.
        """
        for name in sorted(pruner.needs & self.impossible.keys()):
            raise UserError(self.impossible[name])
        assert self.saved is not None
        saved = store.load(self.folder / EVIDENCE, pruner.needs)
        live = pruner.needs & store.LIVE
        if not live:
            return saved
        known = {name: [layer.stats[name] for layer in saved.layers] for name in saved.layers[0].stats}
        return record(self.it.model, self.it.batches[:HELD_OUT], live, known, saved.provenance)

    # -- the variants --------------------------------------------------------------------------------------------------

    def reference(self) -> None:
        """Measure the checkpoint as it is."""
        model, saved = self.it.model, self.saved
        assert saved is not None
        counts = [layer.n_experts for layer in model.moe_layers]
        config = getattr(model, "config", None)
        known = {
            "path": str(self.setup.path),
            "weights": self.it.provenance["weights"],
            "family": config.model_type if isinstance(model, TransformersModel) and config else "moeprune",
            "experts": counts,
            "top_k": model.top_k,
            "n_groups": model.n_groups,
            "calibration": {
                key: saved.provenance.get(key)
                for key in (
                    "data",
                    "calibration_tokens",
                    "calibration_batches",
                    "batch_size",
                    "seq_len",
                    "seed",
                    "gate",
                )
            },
            "held_out": self.text.provenance,
            "scoring": self.setup.scoring,
        }
        self._finish(self.comparison.reference, self._measured(self.comparison.reference), {"checkpoint": known})

    def variant(self, name: str) -> None:
        """Plan, cut, measure, put back.

        Raises:
            UserError: see `Pruner.plan`.
        """
        place = job_folder(self.folder, name)
        model, (pruner, constraints) = self.it.model, self.prunes[name]
        if (place / "result.json").exists():  # only its weights are missing
            with applied(model, plan := PrunePlan.load(place / "plan.json")):
                self.it.write(plan, place / "checkpoint", True, False)
            return
        constraints = constraints.for_model(model)
        plan = pruner.plan(self.evidence(pruner), constraints).made_by(pruner)
        before = read_json(job_folder(self.folder, self.comparison.reference) / "result.json", "result")["val_loss"]
        with applied(model, plan):
            found = self._measured(name)
            if self.setup.export:
                self.it.write(plan, place / "checkpoint", True, False)
        plan.save(place / "plan.json")
        event = {
            "step": found["step"],
            "reason": "the checkpoint as it is",
            "plan": plan.to_dict(),
            "parameters": {"before": self.whole, "after": found["parameters"]},
            "val_loss": {"before": before, "after": found["val_loss"]},
        }
        write_text(place / "events.jsonl", json.dumps(event) + "\n")
        self._finish(name, found | {"plan": "plan.json"}, {})

    def _measured(self, name: str) -> dict[str, Any]:
        """The model as it is now."""
        model, own = self.it.model, self.own
        losses = held_out.losses(model, self.text.rows, self.setup.how.batch_size)
        scores: dict[str, Any] = {}
        if self.comparison.suite is not None:
            source: Any = model
            if own is not None:
                ids = [list(layer.ids) for layer in model.moe_layers]
                source = dataclasses.replace(own, expert_ids=ids, state=_module(model).state_dict())
            how = {"batch_size": self.setup.how.batch_size, "device": self.setup.how.device, **self.setup.scoring}
            with _log(job_folder(self.folder, name)) as log, redirect_stdout(log), redirect_stderr(log):
                scores = scored(source, self.comparison, job_folder(self.folder, name), **how)
        return {
            "step": 0 if own is None else own.step,
            **sizes(model, _module(model)),
            "unpruned_parameters": self.whole,
            "val_loss": losses,
            "scores": scores,
            "optimizer_bytes": None,
            "peak_bytes": None,
            "plan": None,
        }

    def _finish(self, name: str, found: dict[str, Any], more: dict[str, Any]) -> None:
        place = job_folder(self.folder, name)
        config = self.comparison.variants[name].config
        if config:
            write_text(place / "variant.yaml", yaml.safe_dump(config, sort_keys=False))
        write_text(place / "result.json", json.dumps({**found, "config": config, **more}))


def _log(place: Path) -> IO[str]:
    """What lm-eval prints, and why a variant failed."""
    place.mkdir(parents=True, exist_ok=True)
    return (place / "log.txt").open("a", encoding="utf-8")


def _module(model: PrunableModel) -> torch.nn.Module:
    module: Any = model.model if isinstance(model, TransformersModel) else model
    assert isinstance(module, torch.nn.Module)
    return module


@contextmanager
def applied(model: PrunableModel, plan: PrunePlan) -> Iterator[None]:
    """The model with `plan` carried out, for as long as the context lasts; afterwards every weight is as before, bit for bit."""
    held: list[
        tuple[Tensor, int, Tensor, Tensor]
    ] = []  # parameter, dimension that counts experts, rows, what they were
    try:
        with torch.no_grad():
            for layer, merges in zip(model.moe_layers, plan.merges, strict=False):
                rows = torch.tensor([layer.ids.index(merge.into) for merge in merges], device=model.device)
                if merges:
                    for parameter, dim in layer.expert_parameters().values():
                        held.append((parameter, dim, rows, parameter.index_select(dim, rows)))
                    merge_experts(layer, merges, plan.align)
        with only(model, plan.kept):
            yield
    finally:
        with torch.no_grad():
            for parameter, dim, rows, before in held:
                parameter.index_copy_(dim, rows, before)
