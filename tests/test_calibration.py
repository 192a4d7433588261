"""Every recorded statistic against a slow pass written from its definition, and the one pass leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.calibration import GRADIENTS, Recording, record
from moeprune.pruning.statistic import Seen, Statistic
from moeprune.registry import create, entries

CONFIG = MoEConfig(vocab_size=53, d_model=16, n_layers=2, n_heads=2, n_experts=6, top_k=2, d_expert=7, max_seq_len=12)
FAMILY = tuple(f"g{a}f{b}" for a in range(3) for b in range(3))
OUTPUTS = frozenset(FAMILY) | {"max_f", "norm_mean_f", "var_f", "mean_f"}
EVERY = frozenset(entry.name for entry in entries("statistic"))
GATES = ["weight", "topk", "softmax"]


@pytest.fixture
def model() -> MoETransformer:
    torch.manual_seed(0)
    made = MoETransformer(CONFIG)
    for layer in made.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.5)
        torch.nn.init.normal_(layer.experts.down, std=0.4)
        with torch.no_grad():
            layer.router.weight[5] = 0  # its logit is always 0
            layer.router.weight[5, 0] = 1e-3
    return made


def batches(n: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(53, (2, 13), generator=g) for _ in range(n)]


def slow(model: MoETransformer, gate: str) -> list[dict[str, np.ndarray]]:
    """Token by token, choice by choice, in float64."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.moe_layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        for layer, seen in zip(model.moe_layers, inputs, strict=True)
    ]
    with torch.no_grad():
        for batch in batches():
            model(batch[:, :-1])
    for hook in hooks:
        hook.remove()
    found = []
    for layer, seen in zip(model.moe_layers, inputs, strict=True):
        outputs: list[list[np.ndarray]] = [[] for _ in range(6)]
        gates: list[list[float]] = [[] for _ in range(6)]
        for x in torch.cat(seen):
            probs = (layer.router.weight.detach() @ x).double().softmax(0)
            chosen = probs.topk(2).indices.tolist()
            for e in chosen:
                share = float(probs[e] if gate == "softmax" else probs[e] / sum(probs[i] for i in chosen))
                up_gate, up = (layer.experts.gate_up[e].double() @ x.double()).chunk(2)
                outputs[e].append((layer.experts.down[e].double() @ (F.silu(up_gate) * up)).detach().numpy())
                gates[e].append(share)
        norms = [np.array([np.linalg.norm(f) for f in fs]) for fs in outputs]
        stats = {
            name: np.array([(np.array(gates[e]) ** int(name[1]) * norms[e] ** int(name[3])).sum() for e in range(6)])
            for name in FAMILY
        }
        stats["mean_f"] = np.array([np.mean(fs, 0) if fs else np.zeros(16) for fs in outputs])
        stats["max_f"] = np.array([np.abs(fs).max() if fs else 0.0 for fs in outputs])
        stats["norm_mean_f"] = np.array([np.linalg.norm(np.mean(fs, 0)) if fs else 0.0 for fs in outputs])
        stats["var_f"] = np.array(
            [np.mean([np.sum((f - np.mean(fs, 0)) ** 2) for f in fs]) if fs else 0.0 for fs in outputs]
        )
        found.append(stats)
    return found


@pytest.mark.parametrize("gate", GATES)
def test_statistics_equal_their_definitions(model: MoETransformer, gate: str) -> None:
    evidence = record(model, batches(), OUTPUTS | {"counts"}, gate=gate)  # type: ignore[arg-type]
    assert evidence.provenance["gate"] == gate
    for layer, expected in zip(evidence.layers, slow(model, gate), strict=True):
        assert set(layer.stats) == OUTPUTS | {"counts"}
        assert np.array_equal(layer.stats["g0f0"], layer.counts)
        for name, values in expected.items():
            np.testing.assert_allclose(layer.stats[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_gradient_statistics_equal_their_definitions(model: MoETransformer) -> None:
    evidence = record(model, batches(), GRADIENTS)
    mean = [torch.zeros_like(p) for layer in model.moe_layers for p in (layer.experts.gate_up, layer.experts.down)]
    squares = [torch.zeros_like(p) for p in mean]
    for batch in batches():
        model.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        for index, layer in enumerate(model.moe_layers):
            for j, p in enumerate((layer.experts.gate_up, layer.experts.down)):
                mean[2 * index + j] += p.grad / 3
                squares[2 * index + j] += p.grad**2 / 3
    for index, layer in enumerate(model.moe_layers):
        pair = (layer.experts.gate_up, layer.experts.down)
        taylor = sum((p * g).abs().sum((1, 2)) for p, g in zip(pair, mean[2 * index : 2 * index + 2], strict=True))
        fisher = sum(g.sum((1, 2)) for g in squares[2 * index : 2 * index + 2])
        np.testing.assert_allclose(evidence.layers[index].stats["taylor"], taylor.detach(), rtol=1e-4)
        np.testing.assert_allclose(evidence.layers[index].stats["fisher"], fisher, rtol=1e-4)


def test_only_what_is_asked_for_is_recorded(model: MoETransformer) -> None:
    assert set(record(model, batches(), frozenset({"g1f1"})).layers[0].stats) == {"g1f1"}
    known = {"counts": [np.arange(6), np.arange(6)]}
    evidence = record(model, [], frozenset({"counts"}), known)
    assert evidence.layers[0].counts.tolist() == list(range(6))
    with pytest.raises(UserError, match="at least one batch"):
        record(model, [], frozenset({"g1f1"}))
    with pytest.raises(UserError, match="'g3f1'"):
        record(model, batches(), frozenset({"g3f1"}))


def test_the_model_is_as_it_was(model: MoETransformer) -> None:
    model.train()
    x = batches()[0][:, :-1]
    model(x).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
    both = record(model, batches(), EVERY | GRADIENTS)
    alone = record(model, batches(), GRADIENTS)
    assert model.training
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(x), before)
    for one, other in zip(both.layers, alone.layers, strict=True):
        np.testing.assert_allclose(one.stats["taylor"], other.stats["taylor"], rtol=1e-6)


def test_recording_computes_the_same_output(model: MoETransformer) -> None:
    """The pass that measures is the model's own forward pass."""
    x = batches()[0][:, :-1]
    recording = Recording(model, EVERY)
    with torch.no_grad():
        plain = model(x)
        with recording._watching(None):
            torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-6)
        assert torch.equal(model(x), plain)


def test_padding_counts_for_nothing(model: MoETransformer) -> None:
    """Right padding, whatever tokens it holds, leaves every statistic as it is."""
    (batch,) = batches(1)
    mask = torch.ones_like(batch, dtype=torch.bool)
    mask[:, 9:] = False
    needs = EVERY | {"counts"}
    alone = record(model, [batch[:, :10]], needs)
    padded = [record(model, [(batch.masked_fill(~mask, junk), mask)], needs | GRADIENTS) for junk in (0, 17)]
    for a, b, c in zip(alone.layers, padded[0].layers, padded[1].layers, strict=True):
        assert a.counts.sum() == 2 * 9 * 2
        for name in needs:
            np.testing.assert_allclose(a.stats[name], b.stats[name], rtol=1e-5, atol=1e-9, err_msg=name)
        for name in needs | GRADIENTS:
            np.testing.assert_allclose(b.stats[name], c.stats[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_a_recording_goes_on_in_another_process(model: MoETransformer) -> None:
    needs = EVERY | {"counts"} | GRADIENTS
    straight = record(model, batches(), needs)
    first, second = Recording(model, needs), Recording(model, needs)
    first.update(batches()[0])
    second.load_state(first.state())
    for batch in batches()[1:]:
        second.update(batch)
    assert second.tokens == 3 * 2 * 12
    for a, b in zip(straight.layers, second.evidence().layers, strict=True):
        assert all(np.array_equal(a.stats[name], b.stats[name]) for name in needs)


def test_statistics_may_share_a_tensor(model: MoETransformer) -> None:
    """Two that return the same tensor of `Seen` do not add into each other."""

    class Shared(Statistic):
        def measure(self, seen: Seen) -> torch.Tensor:
            return seen.sums

    recording = Recording(model, frozenset({"mean_f", "g0f0"}))
    recording.measured |= {"one": Shared(), "other": Shared()}
    for batch in batches():
        recording.update(batch)
    for layer in recording.evidence().layers:
        expected = layer.stats["mean_f"] * layer.stats["g0f0"][:, None]
        np.testing.assert_allclose(layer.stats["one"], expected, rtol=1e-9, atol=1e-12)
        assert np.array_equal(layer.stats["other"], layer.stats["one"])


def test_reap_by_hand(model: MoETransformer) -> None:
    evidence = record(model, batches(), create("pruner", "reap").needs)
    layer = evidence.layers[0]
    score = create("criterion", "reap").score(layer, 0)
    expected = [s / n if n else 0.0 for s, n in zip(layer.stats["g1f1"], layer.stats["g0f0"], strict=True)]
    assert score.tolist() == expected
    plan = create("pruner", "reap", ratio=0.5).plan(evidence)
    assert plan.n_kept == (3, 3)
    assert set(plan.removed[0]) == set(np.argsort(score)[:3].tolist())


def test_family_members_agree_with_the_parametrised_criterion(model: MoETransformer) -> None:
    layer = record(model, batches(), OUTPUTS | {"counts"}).layers[1]
    members = {
        "frequency": (0, 0, 0),
        "seer_soft": (0, 1, 0),
        "ean": (0, 0, 1),
        "weighted_ean": (0, 1, 1),
        "man": (1, 0, 1),
        "msan": (1, 0, 2),
        "mean_gate": (1, 1, 0),
        "reap": (1, 1, 1),
        "reap_squared": (1, 2, 2),
    }
    for name, (b, alpha, beta) in members.items():
        general = create("criterion", "calibrated", b=b, alpha=alpha, beta=beta)
        assert np.array_equal(create("criterion", name).score(layer, 0), general.score(layer, 0)), name
    for bad in ({"b": -1}, {"alpha": 3}, {"beta": -1}):
        with pytest.raises(UserError, match=next(iter(bad))):
            create("criterion", "calibrated", **bad)


@pytest.mark.parametrize("name", [entry.name for entry in entries("criterion")])
def test_every_criterion_reads_only_what_it_declares(model: MoETransformer, name: str) -> None:
    """Recorded with exactly its needs it scores; permuting the experts permutes the scores."""
    criterion = create("criterion", name)
    layer = record(model, batches(), criterion.needs).layers[0]
    assert set(layer.stats) == criterion.needs - {"weights"}
    score = criterion.score(layer, 0)
    assert score.shape == (6,)
    assert np.isfinite(score).all()
    assert np.array_equal(score, criterion.score(layer, 0))
    if name == "random":
        return
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    with torch.no_grad():
        for each in model.moe_layers:
            for owner, tensor, dim in each.expert_tensors():
                if tensor != "expert_ids":
                    getattr(owner, tensor).copy_(getattr(owner, tensor).index_select(dim, order))
    permuted = criterion.score(record(model, batches(), criterion.needs).layers[0], 0)
    np.testing.assert_allclose(permuted, score[order.numpy()], rtol=1e-4)
