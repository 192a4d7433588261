"""Statistics and criteria against token-by-token references in float64, written from their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.pruning import calibration
from moeprune.pruning.calibration import record
from moeprune.pruning.statistic import Seen
from moeprune.registry import create, entries
from moeprune.testing import conformance

E, D, IDLE = 6, 16, 5  # the last expert never gets a token
NEW = frozenset({"leave_one_out", "easy_ep", "logit_gram"})
EVERY = frozenset(entry.name for entry in entries("statistic"))
Batch = tuple[torch.Tensor, torch.Tensor]


def make(top_k: int, renormalize: bool = True, dtype: torch.dtype = torch.float64) -> MoETransformer:
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=53,
        d_model=D,
        n_layers=2,
        n_heads=2,
        n_experts=E,
        top_k=top_k,
        d_expert=7,
        max_seq_len=12,
        router_options={"renormalize": renormalize},
    )
    model = MoETransformer(config).to(dtype)
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.5)
        torch.nn.init.normal_(layer.experts.down, std=0.4)
        own = layer.router.logits
        layer.router.logits = lambda x, own=own: own(x).index_fill(1, torch.tensor([IDLE]), -30.0)  # type: ignore[method-assign]
    return model


def padded() -> list[Batch]:
    """Three batches of two sequences; of the last one nothing is real."""
    g = torch.Generator().manual_seed(1)
    lengths = [(13, 9), (5, 13), (8, 0)]
    return [
        (torch.randint(53, (2, 13), generator=g), torch.arange(13) < torch.tensor(pair)[:, None]) for pair in lengths
    ]


def tokens_of(model: MoETransformer, batches: list[Batch]) -> list[list[dict[str, Any]]]:
    """Per layer one record per real token, all float64: residual h, chosen experts, their weights, gates and outputs, logits."""
    found: list[list[dict[str, Any]]] = [[] for _ in model.moe_layers]
    for batch, mask in batches:
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = []
        for i, block in enumerate(model.blocks):

            def keep(norm: Any, args: Any, out: torch.Tensor, i: int = i, seen: Any = seen) -> None:
                seen[i] = (args[0].detach().reshape(-1, D), out.detach().reshape(-1, D))

            hooks.append(block.moe_norm.register_forward_hook(keep))  # type: ignore[union-attr]
        with torch.no_grad():
            model(batch[:, :-1], mask[:, :-1])
        for hook in hooks:
            hook.remove()
        real = mask[:, :-1].reshape(-1).tolist()
        for i, layer in enumerate(model.moe_layers):
            with torch.no_grad():
                routing = layer.router(seen[i][1])
            for t in [t for t, is_real in enumerate(real) if is_real]:
                chosen = routing.indices[t].tolist()
                x = seen[i][1][t].double()
                outputs = []
                for e in chosen:
                    gate, up = (layer.experts.gate_up[e].detach().double() @ x).chunk(2)
                    outputs.append((layer.experts.down[e].detach().double() @ (F.silu(gate) * up)).numpy())
                probs = routing.probs[t, chosen].double().numpy()
                found[i].append(
                    {
                        "h": seen[i][0][t].double().numpy(),
                        "chosen": chosen,
                        "f": outputs,
                        "weight": routing.weights[t].double().numpy(),
                        "softmax": probs,
                        "topk": probs / probs.sum(),
                        "logits": routing.logits[t].double().numpy(),
                    }
                )
    return found


def slow(tokens: list[dict[str, Any]], gate: str = "weight") -> dict[str, np.ndarray]:
    """The new statistics of one layer."""
    error, easy, gram = np.zeros(E), np.zeros(E), np.zeros((E, E))
    for token in tokens:
        f, g = token["f"], token["weight"]
        y = sum(g[k] * f[k] for k in range(len(f)))
        h = token["h"]
        cosine = h @ (h + y) / (np.linalg.norm(h) * np.linalg.norm(h + y))
        for k, e in enumerate(token["chosen"]):
            others = [j for j in range(len(f)) if j != k]
            without = np.zeros(D)
            if others:
                without = sum(g[j] * f[j] for j in others) * sum(g) / sum(g[j] for j in others)
            error[e] += ((y - without) ** 2).sum()
            easy[e] += token[gate][k] * np.linalg.norm(f[k]) * (1 - cosine)
        gram += np.outer(token["logits"], token["logits"])
    return {"leave_one_out": error / len(tokens), "easy_ep": easy, "logit_gram": gram}


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_new_statistics_equal_their_definitions(top_k: int, renormalize: bool) -> None:
    model = make(top_k, renormalize)
    evidence = record(model, padded(), NEW | {"counts"})
    for layer, tokens in zip(evidence.layers, tokens_of(model, padded()), strict=True):
        assert len(tokens) == sum(int(mask[:, :-1].sum()) for _, mask in padded())
        assert layer.counts[IDLE] == 0
        assert layer.counts.sum() == top_k * len(tokens)
        for name, expected in slow(tokens).items():
            np.testing.assert_allclose(layer.stats[name], expected, rtol=1e-6, atol=1e-12, err_msg=name)
        assert layer.stats["leave_one_out"][IDLE] == layer.stats["easy_ep"][IDLE] == 0
        assert (layer.stats["leave_one_out"][layer.counts > 0] > 0).all()
        for name in ("leave_one_out", "easy_ep"):
            assert np.array_equal(create("criterion", name).score(layer, 0), layer.stats[name])


@pytest.mark.parametrize("gate", ["weight", "topk", "softmax"])
def test_gate_definitions(gate: str) -> None:
    """easy_ep takes the gate definition that was asked for; leave_one_out takes the weights really used, logit_gram none."""
    model = make(3, renormalize=gate == "softmax")  # so that the weights really used are not the gates asked for
    evidence = record(model, padded(), NEW, gate=gate)  # type: ignore[arg-type]
    for layer, tokens in zip(evidence.layers, tokens_of(model, padded()), strict=True):
        for name, expected in slow(tokens, gate).items():
            np.testing.assert_allclose(layer.stats[name], expected, rtol=1e-6, atol=1e-12, err_msg=name)


def test_single_precision_is_close() -> None:
    model = make(2, dtype=torch.float32)
    for layer, tokens in zip(record(model, padded(), NEW).layers, tokens_of(model, padded()), strict=True):
        for name, expected in slow(tokens).items():
            np.testing.assert_allclose(layer.stats[name], expected, rtol=2e-5, atol=1e-8, err_msg=name)


def test_half_precision_is_summed_in_float32() -> None:
    seen = []
    model = make(2, dtype=torch.bfloat16)
    recording = calibration.Recording(model, EVERY)
    recording.add = lambda index, what: seen.append(what)  # type: ignore[method-assign,misc]
    recording.update(padded()[0])
    for each in seen:
        assert each.outputs.dtype == each.combined.dtype == torch.float32
    evidence = record(model, padded(), EVERY)
    assert all(np.isfinite(values).all() for layer in evidence.layers for values in layer.stats.values())


@pytest.mark.parametrize("rows", [1, 7, 10])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """However many tokens are held at a time; blocks of padding alone are among them."""
    model = make(2)
    whole = record(model, padded(), EVERY | {"counts"})
    monkeypatch.setattr(calibration, "ROWS", rows)
    parts = record(model, padded(), EVERY | {"counts"})
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert np.array_equal(a.counts, b.counts)
        for name in EVERY:
            np.testing.assert_allclose(b.stats[name], a.stats[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_leave_one_out_is_what_the_layer_loses() -> None:
    """With every expert chosen nobody else can step in: the error is that of the layer with the expert's logit at minus infinity."""
    model = make(E)
    (batch, _), *_ = padded()
    layer = model.moe_layers[0]
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    measured = record(model, [batch], frozenset({"leave_one_out"})).layers[0].stats["leave_one_out"]
    hook.remove()
    (x,) = inputs
    with torch.no_grad():
        whole, routing = layer(x)
        for e in range(E):
            _, weights, indices = layer.router.choose(routing.logits.index_fill(1, torch.tensor([e]), -torch.inf))
            without = layer.experts(x, indices, weights)
            # the router's weights are float32
            expected = float((whole - without).square().sum(1).mean())
            assert measured[e] == pytest.approx(expected, rel=1e-3, abs=1e-12), e


def seen_of(seed: int, T: int, K: int, width: int) -> Seen:
    """Random tokens in float64; weights may be 0 or next to it."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    indices = torch.rand(T, E, generator=g).argsort(1)[:, :K]
    weights = normal(T, K).exp() * 10.0 ** torch.randint(-12, 1, (T, K), generator=g)
    weights = weights * (torch.rand(T, K, generator=g) > 0.1)
    f = normal(T, K, width)
    combined = torch.einsum("tk,tkd->td", weights, f)
    return Seen(E, normal(T, width), f, combined, indices, weights, weights, normal(T, E), normal(T, width))


def part(seen: Seen, rows: slice) -> Seen:
    tensors = (seen.x, seen.outputs, seen.combined, seen.indices, seen.weights, seen.gates, seen.logits, seen.residual)
    return Seen(E, *(tensor[rows] for tensor in tensors if tensor is not None))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 9), K=st.integers(1, E), width=st.integers(1, 5))
def test_leave_one_out_by_subtraction(seed: int, T: int, K: int, width: int) -> None:
    """y' = (y - g f) S / (S - g), in the cases where that can be computed by subtracting; y' = 0 where nothing else has weight."""
    seen = seen_of(seed, T, K, width)
    statistic = create("statistic", "leave_one_out")
    found = statistic.finish(statistic.measure(seen))
    expected = torch.zeros(E, dtype=torch.float64)
    skipped = set()
    for t in range(T):
        y, g, S = seen.combined[t], seen.weights[t], seen.weights[t].sum()  # type: ignore[index]
        for k, e in enumerate(seen.indices[t].tolist()):
            rest = sum(g[j] for j in range(K) if j != k)
            if rest == 0:
                without = torch.zeros(width, dtype=torch.float64)
            elif rest < 1e-6 * S:
                skipped.add(e)
                continue
            else:
                without = (y - g[k] * seen.outputs[t, k]) * S / rest  # type: ignore[index]
            expected[e] += (y - without).square().sum() / T
    for e in set(range(E)) - skipped:
        assert found[e].item() == pytest.approx(expected[e].item(), rel=1e-6, abs=1e-20 + 1e-9 * float(expected.max()))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 9), K=st.integers(2, E), width=st.integers(1, 5))
def test_an_expert_that_repeats_the_others_is_not_missed(seed: int, T: int, K: int, width: int) -> None:
    seen = seen_of(seed, T, K, width)
    assert seen.outputs is not None
    weights = seen.weights + 1e-3
    same = seen.outputs[:, :1].expand(T, K, width).contiguous()
    y = torch.einsum("tk,tkd->td", weights, same)
    seen = Seen(E, seen.x, same, y, seen.indices, weights, weights, seen.logits, seen.residual)
    statistic = create("statistic", "leave_one_out")
    assert (statistic.finish(statistic.measure(seen)) <= 1e-20 * weights.max() ** 2).all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 9), scale=st.floats(1e-7, 1e3))
def test_easy_ep_tells_small_angles(seed: int, T: int, scale: float) -> None:
    """Where the layer changes the stream by a ten-millionth, and where it turns it around."""
    seen = seen_of(seed, T, 2, 8)
    assert seen.combined is not None
    assert seen.residual is not None
    assert seen.outputs is not None
    y = seen.combined / seen.combined.norm(dim=1, keepdim=True).clamp(min=1e-300) * scale
    seen = Seen(E, seen.x, seen.outputs, y, seen.indices, seen.weights, seen.gates, None, seen.residual)
    expected = np.zeros(E)
    for t in range(T):
        h, out = (np.asarray(v, dtype=np.longdouble) for v in (seen.residual[t], seen.residual[t] + y[t]))
        unit = h / np.sqrt((h**2).sum()) - out / np.sqrt((out**2).sum())
        for k, e in enumerate(seen.indices[t].tolist()):
            norm = float(seen.outputs[t, k].norm())
            expected[e] += float(seen.gates[t, k]) * norm * float((unit**2).sum() / 2)  # 1 - cos of two unit vectors
    found = create("statistic", "easy_ep").measure(seen).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


def test_easy_ep_of_a_silent_stream() -> None:
    """Out of nothing, the layer turns the stream by a right angle."""
    seen = seen_of(0, 3, 1, 4)
    gates = torch.ones_like(seen.gates)
    case = Seen(E, seen.x, seen.outputs, seen.outputs[:, 0], seen.indices, gates, gates, None, 0 * seen.x)  # type: ignore[index]
    found = create("statistic", "easy_ep").measure(case)
    torch.testing.assert_close(found, case.per_expert(case.norms), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(EVERY))
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), T=st.integers(0, 9), cut=st.integers(0, 9), K=st.integers(1, E))
def test_statistics_of_two_halves_add_up(name: str, seed: int, T: int, cut: int, K: int) -> None:
    seen = seen_of(seed, T, K, 4)
    statistic = create("statistic", name)
    one, other = (statistic.measure(part(seen, rows)) for rows in (slice(cut), slice(cut, None)))
    both = one + other if statistic.reduce == "sum" else torch.maximum(one, other)
    whole = statistic.measure(seen)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(both, whole, rtol=1e-12, atol=1e-12)
    assert len(statistic.finish(whole)) == E


@pytest.mark.parametrize("T", [1, 250])
def test_sums_by_expert_of_wide_values(T: int) -> None:
    """More than the cache's worth of numbers, in pieces; float32 values keep every bit."""
    g = torch.Generator().manual_seed(3)
    values = torch.randn(T, 3, 2100, generator=g) * 1e4
    indices = torch.randint(E, (T, 3), generator=g)
    empty = torch.empty(0)
    seen = Seen(E, empty, values, None, indices, empty, empty, None, None)
    expected = torch.stack([values[indices == e].double().sum(0) for e in range(E)])
    torch.testing.assert_close(seen.per_expert(values), expected, rtol=1e-13, atol=1e-9)
    assert seen.sums is seen.sums
    assert seen.counts.tolist() == [int((indices == e).sum()) for e in range(E)]


def test_logit_gram_holds_the_cosines_of_the_logits() -> None:
    model = make(2)
    layer = record(model, padded(), frozenset({"logit_gram"})).layers[1]
    logits = np.array([token["logits"] for token in tokens_of(model, padded())[1]])
    gram = layer.stats["logit_gram"]
    roots = np.sqrt(np.diag(gram))
    for a in range(E):
        for b in range(E):
            cosine = logits[:, a] @ logits[:, b] / np.linalg.norm(logits[:, a]) / np.linalg.norm(logits[:, b])
            assert gram[a, b] / roots[a] / roots[b] == pytest.approx(cosine)


# -- criteria on the weights alone --------------------------------------------------------------------------------------


def weights_of(layer: Any, e: int) -> list[np.ndarray]:
    gate, up = layer.experts.gate_up[e].detach().double().chunk(2)
    return [w.numpy().ravel() for w in (gate, up, layer.experts.down[e].detach().double())]


def test_magnitude_norms() -> None:
    model = make(2, dtype=torch.float32)
    for norm in ("l2", "l1", "frobenius_per_matrix"):
        criterion = create("criterion", "magnitude", norm=norm)
        for index, layer in enumerate(record(model, [], criterion.needs).layers):
            score = criterion.score(layer, index)
            for e in range(E):
                matrices = weights_of(model.moe_layers[index], e)
                expected = {
                    "l2": np.linalg.norm(np.concatenate(matrices)),
                    "l1": np.abs(np.concatenate(matrices)).sum(),
                    "frobenius_per_matrix": sum(np.linalg.norm(w) for w in matrices),
                }[norm]
                assert score[e] == pytest.approx(expected, rel=1e-6)
    assert create("criterion", "magnitude").norm == "l2"
    with pytest.raises(UserError, match="'l0'"):
        create("criterion", "magnitude", norm="l0")


test_magnitude_l1 = conformance("criterion", lambda: create("criterion", "magnitude", norm="l1"))
test_magnitude_per_matrix = conformance("pruner", lambda: create("pruner", "magnitude", norm="frobenius_per_matrix"))
test_router_norm_low = conformance("criterion", lambda: create("criterion", "router_norm", keep="low"))


def test_aimer() -> None:
    model = make(2, dtype=torch.float32)
    experts = model.moe_layers[0].experts
    with torch.no_grad():
        experts.gate_up[1] *= 40  # larger is not more uneven
        experts.down[1] *= 40
        experts.gate_up[2] = torch.ones_like(experts.gate_up[2]) * 3
        experts.down[2] = -torch.ones_like(experts.down[2]) * 3
        experts.gate_up[3] = 0
        experts.down[3] = 0
        experts.gate_up[4] = 0
        experts.down[4] = 0
        experts.down[4, 2, 3] = 0.5
    before = make(2, dtype=torch.float32)
    criterion = create("criterion", "aimer")
    assert criterion.needs <= calibration.WEIGHTS  # no data
    score = criterion.score(record(model, [], criterion.needs).layers[0], 0)
    for e in (0, 1, 5):
        w = np.concatenate(weights_of(model.moe_layers[0], e))
        assert score[e] == pytest.approx(np.sqrt((w**2).mean()) / np.abs(w).mean(), rel=1e-6)
    assert score[1] == pytest.approx(criterion.score(record(before, [], criterion.needs).layers[0], 0)[1], rel=1e-6)
    assert score[2] == pytest.approx(1)  # as even as can be
    assert score[3] == 0  # says nothing at all
    assert score[4] == pytest.approx(np.sqrt(3 * 7 * D))  # one weight only
    plan = create("pruner", "aimer", ratio=0.5).plan(record(model, [], criterion.needs))
    assert {2, 3} <= set(plan.removed[0])
    assert 4 in plan.kept[0]


def test_router_norm_keeps_either_end() -> None:
    model = make(2, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.weight *= torch.arange(1.0, E + 1)[torch.tensor([3, 1, 5, 0, 2, 4])][:, None] * 10
    evidence = record(model, [], frozenset({"router_w2"}))
    norms = model.moe_layers[0].router.weight.detach().double().norm(dim=1).numpy()
    high, low = (create("criterion", "router_norm", keep=keep).score(evidence.layers[0], 0) for keep in ("high", "low"))
    np.testing.assert_allclose(high, norms, rtol=1e-6)
    assert np.array_equal(low, -high)
    assert set(create("pruner", "router_norm", keep="low", ratio=0.5).plan(evidence).kept[0]) == set(
        np.argsort(norms)[:3].tolist()
    )
    with pytest.raises(UserError, match="'both'"):
        create("criterion", "router_norm", keep="both")
