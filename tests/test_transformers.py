"""Pruning transformers models in place: every family, found by structure, routed by its own router."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from moeprune import Constraints, create
from moeprune.errors import UserError
from moeprune.interop.checkpoint import export, load, read_record
from moeprune.interop.layerwise import Skeleton, record_layerwise
from moeprune.interop.transformers import TransformersModel
from moeprune.pruning.calibration import record
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan, only
from moeprune.registry import entries

pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(rows: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def masked(model: TransformersModel, removed: list[list[int]]) -> Iterator[None]:
    """The slow reference: inside a router, every linear map onto experts gives minus infinity for those removed, and so do
    biases of the choice.
    """
    hooks, saved = [], []
    plain = F.linear
    for layer, gone in zip(model.moe_layers, removed, strict=True):
        E = layer.n_experts

        def enter(*_: Any, gone: list[int] = gone, E: int = E) -> None:
            def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
                out = plain(x, w, b)
                if out.shape[-1] == E:
                    out = out.clone()
                    out[..., gone] = -torch.inf
                return out

            F.linear = linear

        def leave(*_: Any) -> None:
            F.linear = plain

        hooks += [layer.router.register_forward_pre_hook(enter), layer.router.register_forward_hook(leave)]
        for owner, name, dim in layer.expert_tensors():
            if "bias" in name and "proj" not in name:
                tensor = getattr(owner, name)
                saved.append((tensor, tensor.detach().clone()))
                with torch.no_grad():
                    tensor.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), -1e9)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        F.linear = plain
        with torch.no_grad():
            for tensor, old in saved:
                tensor.copy_(old)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_masked(family: str) -> None:
    whole = TransformersModel(build(family))
    constraints = Constraints().for_router(whole.n_groups, whole.min_experts)
    evidence = record(whole, [tokens()], frozenset({"counts", "g1f1", "g0f0"}))
    plan = create("pruner", "reap", ratio=0.4).plan(evidence, constraints)
    assert sum(plan.n_kept) < 8 * len(plan.kept)
    with torch.no_grad():
        before = whole.logits(tokens())
        with masked(whole, [list(ids) for ids in plan.removed]):
            expected = whole.logits(tokens())
        assert torch.equal(whole.logits(tokens()), before)
        assert not torch.allclose(before, expected, atol=1e-3)
        cut = TransformersModel(copy.deepcopy(whole.model))
        apply_plan(cut, plan)
        assert (cut.logits(tokens()) - expected).abs().max() <= 1e-5
        with only(whole, plan.kept):
            assert torch.equal(whole.logits(tokens()), cut.logits(tokens()))
        assert torch.equal(whole.logits(tokens()), before)
        apply_plan(whole, PrunePlan(plan.before, plan.before, plan.n_original, plan.top_k))
        assert torch.equal(whole.logits(tokens()), before)


CRITERIA = sorted({entry.name for entry in entries("criterion")} - {"random"})


@torch.enable_grad()
def by_definition(model: TransformersModel, batch: Tensor) -> list[dict[str, np.ndarray]]:
    """Every criterion of every layer, written from its definition: spies on what the model hands to its experts, then computes
    each expert alone, token by token; gradients of the loss by autograd.
    """
    layers = model.moe_layers
    calls: list[list[Any]] = [[] for _ in layers]
    streams: list[list[Tensor]] = [[] for _ in layers]
    norms = [layer.residual_norm for layer in layers]
    hooks = []
    for layer, called in zip(layers, calls, strict=True):
        hooks.append(layer.experts.register_forward_pre_hook(lambda _, args, to=called: to.append(args)))
    for norm, stream in zip(norms, streams, strict=True):
        hooks.append(norm.register_forward_pre_hook(lambda _, args, to=stream: to.append(args[0].flatten(0, -2))))
    owned = [[(p, dim) for p, dim in layer.expert_parameters().values()] for layer in layers]
    logits = model.logits(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    flat = torch.autograd.grad(loss, [p for each in owned for p, _ in each])
    for hook in hooks:
        hook.remove()
    gradients = iter(flat)
    scores = []
    for layer, ((x, indices, weights),), (stream,), parameters in zip(layers, calls, streams, owned, strict=True):
        x, weights, stream = x.detach(), weights.detach().double(), stream.detach().double()
        E, (T, K) = layer.n_experts, indices.shape
        f: list[list[list[Tensor]]] = [[] for _ in range(E)]  # of each expert, its outputs
        g: list[list[float]] = [[] for _ in range(E)]
        lost, easy = np.zeros(E), np.zeros(E)
        for t in range(T):
            with torch.no_grad():
                out = [
                    layer.experts(x[t : t + 1], indices[t : t + 1, [k]], torch.ones(1, 1))[0].double() for k in range(K)
                ]
            y = sum(weights[t, k] * out[k] for k in range(K))
            turned = 1 - float(F.cosine_similarity(stream[t], stream[t] + y, 0))
            for k, e in enumerate(indices[t].tolist()):
                w = float(weights[t, k])
                f[e].append(out[k])
                g[e].append(w)
                rest = [j for j in range(K) if j != k]
                scale = float(weights[t].sum() / weights[t, rest].sum())
                without = sum(weights[t, j] * out[j] for j in rest) * scale
                lost[e] += float((y - without).square().sum()) / T
                easy[e] += w * float(out[k].norm()) * turned
        found: dict[str, Any] = {name: np.zeros(E) for name in CRITERIA}
        matrices = layer.weights()
        for e in range(E):
            n, gates, norms = len(f[e]), np.array(g[e]), np.array([float(v.norm()) for v in f[e]])
            found["frequency"][e] = n
            found["seer_soft"][e], found["ean"][e], found["weighted_ean"][e] = (
                gates.sum(),
                norms.sum(),
                (gates * norms).sum(),
            )
            if n:
                found["man"][e], found["msan"][e], found["mean_gate"][e] = norms.mean(), (norms**2).mean(), gates.mean()
                found["reap"][e], found["reap_squared"][e] = (gates * norms).mean(), ((gates * norms) ** 2).mean()
                outputs = torch.stack(f[e])
                found["max_activation"][e] = outputs.abs().max()
                found["characteristic"][e] = outputs.mean(0).norm()
                found["output_variance"][e] = (outputs - outputs.mean(0)).square().sum(1).mean()
            own = torch.cat(
                [matrices[m][e].detach().double().flatten() for m in ("gate", "up", "down") if m in matrices]
            )
            found["magnitude"][e] = own.square().sum().sqrt()
            found["aimer"][e] = own.square().mean().sqrt() / own.abs().mean()
            if "router" in matrices:
                found["router_norm"][e] = matrices["router"][e].detach().double().norm()
        found["calibrated"], found["leave_one_out"], found["easy_ep"] = found["reap"], lost, easy
        for p, dim in parameters:
            gradient = next(gradients).double().movedim(dim, 0).flatten(1)
            values = p.detach().double().movedim(dim, 0).flatten(1)
            found["taylor"] += (values * gradient).abs().sum(1).numpy()
            found["fisher"] += gradient.square().sum(1).numpy()
        scores.append(found)
    return scores


def criteria_error(model: TransformersModel) -> tuple[int, float]:
    """How many criteria the family has, and the largest relative difference of one, on any layer, from its definition."""
    expected = by_definition(model, tokens())
    made = {name: create("criterion", name) for name in CRITERIA}
    if "router" not in model.moe_layers[0].weights():
        del made["router_norm"]
    evidence = record(model, [tokens()], frozenset().union(*(each.needs for each in made.values())))
    return len(made), max(
        float(np.abs(criterion.score(layer, index) - scores[name]).max() / np.abs(scores[name]).max())
        for name, criterion in made.items()
        for index, (layer, scores) in enumerate(zip(evidence.layers, expected, strict=True))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_criteria_equal_their_definition(family: str) -> None:
    model = TransformersModel(build(family))
    with torch.no_grad():
        before = model.logits(tokens())
    n, error = criteria_error(model)
    assert n >= len(CRITERIA) - 1
    assert error <= 1e-5
    with torch.no_grad():
        assert torch.equal(model.logits(tokens()), before)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "flex_olmo"])
def test_padding_and_gradients(family: str) -> None:
    model = TransformersModel(build(family))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 7:] = False
    needs = frozenset({"counts", "g1f1", "taylor", "fisher"})
    found = [record(model, [(tokens().masked_fill(~mask, junk), mask)], needs) for junk in (5, 9)]
    for a, b in zip(found[0].layers, found[1].layers, strict=True):
        assert a.counts.sum() == 2 * 7 * model.top_k
        for name in needs:
            np.testing.assert_allclose(a.stats[name], b.stats[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "what"), [("llama4_text", "no module holds fused experts"), ("gpt2", "no number of experts")]
)
def test_what_is_not_supported_says_where(family: str, what: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "head_dim": 8}
    extra = {"intermediate_size": 16, "num_local_experts": 4} if family == "llama4_text" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**small, **extra))
    with pytest.raises(UserError, match=what):
        TransformersModel(model)


def exactly(model: TransformersModel, numbers: list[int]) -> Constraints:
    """Constraints under which layer i keeps numbers[i] experts."""
    mine = numbers[: len(model.moe_layers)]
    return Constraints(min_keep=mine, max_keep=mine).for_router(model.n_groups, model.min_experts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_saved_and_reloaded_is_the_same(family: str, equal: bool, tmp_path: Path) -> None:
    """Equal counts: stock transformers loads it. Unequal: with the modeling file saved beside it."""
    from transformers import AutoModelForCausalLM

    model = TransformersModel(build(family))
    numbers = [4] * 3 if equal else [6, 4, 8]
    evidence = record(model, [tokens()], frozenset({"counts"}))
    plan = create("pruner", "frequency").plan(evidence, exactly(model, numbers))
    apply_plan(model, plan)
    with torch.no_grad():
        expected = model.logits(tokens())
    export(model, tmp_path / "pruned", [plan])
    again = load(tmp_path / "pruned", torch.float32)
    assert [layer.ids for layer in again.moe_layers] == list(plan.kept)
    unequal = len(set(plan.n_kept)) > 1
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", dtype=torch.float32, trust_remote_code=unequal
    ).eval()
    with torch.no_grad():
        assert torch.equal(again.logits(tokens()), expected)
        assert torch.equal(stock(tokens(), use_cache=False).logits, expected)
        generated = stock.generate(tokens(1, 5), max_new_tokens=6, do_sample=False)
        slow = tokens(1, 5)
        for _ in range(generated.shape[1] - 5):
            slow = torch.cat([slow, stock(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(generated, slow)
    stock.save_pretrained(tmp_path / "saved again")
    names = [load_file(tmp_path / place / "model.safetensors").keys() for place in ("pruned", "saved again")]
    assert names[0] == names[1]
    # pruned once more, ids still are those of the first model
    later = create("pruner", "random").plan(record(again, [tokens()], frozenset({"counts"})), exactly(again, [4] * 3))
    apply_plan(again, later)
    export(again, tmp_path / "twice", [plan, later])
    assert [layer.ids for layer in load(tmp_path / "twice").moe_layers] == list(later.kept)
    assert len(read_record(tmp_path / "twice")["plans"]) == 2


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "nemotron_h"])
@pytest.mark.parametrize(("top_k", "n_group", "topk_group", "least"), [(1, 1, 1, 2), (2, 1, 1, 2), (1, 2, 2, 4)])
def test_fewest_experts_of_a_router_with_groups(
    family: str, top_k: int, n_group: int, topk_group: int, least: int
) -> None:
    """It looks at the two best of each group: with so many it works, with one less per group it does not."""
    model = TransformersModel(
        build(family, num_experts_per_tok=top_k, n_group=n_group, topk_group=topk_group), n_original=8
    )
    assert model.min_experts == least
    with torch.no_grad():
        for numbers, works in ((least, True), (least - n_group, False)):
            kept = tuple(
                tuple(i for i in range(8) if i % (8 // n_group) < numbers // n_group) for _ in model.moe_layers
            )
            with only(model, kept), nullcontext() if works else pytest.raises(RuntimeError, match="out of range"):
                model.logits(tokens())


def test_phimoe_takes_two_experts_whatever_its_configuration_says() -> None:
    """Of one it makes NaN; no prune leaves one."""
    model = TransformersModel(build("phimoe", num_experts_per_tok=1), n_original=8)
    assert (model.top_k, model.min_experts) == (2, 2)
    with torch.no_grad():
        for n in (1, 2):
            with only(model, tuple(tuple(range(n)) for _ in model.moe_layers)):
                assert bool(model.logits(tokens()).isfinite().all()) == (n == 2)
    with pytest.raises(UserError, match="max_keep=1 is below 2"):
        exactly(model, [1] * len(model.moe_layers))


BURIES = ["deepseek_v3", "glm4_moe", "dots1", "exaone_moe", "minimax_m2", "gpt_oss", "afmoe", "lfm2_moe", "nemotron_h"]


@pytest.mark.parametrize("family", [*FAMILIES, "ernie4_5_moe without bias"])
def test_uniform_view(family: str, tmp_path: Path) -> None:
    """Where the router can bury padding the view is exact and stock code loads it; elsewhere it is refused.

    ERNIE's router chooses by probability + bias: with padding all probabilities shrink, so the view is exact only where the
    experts' biases are equal.
    """
    from transformers import AutoModelForCausalLM

    model = TransformersModel(build(family.partition(" ")[0]))
    if "without bias" in family:
        for layer in model.moe_layers:
            layer.router.moe_statics.e_score_correction_bias.data.zero_()  # type: ignore[union-attr, operator]
    plan = create("pruner", "frequency").plan(
        record(model, [tokens()], frozenset({"counts"})), exactly(model, [6, 4, 8])
    )
    apply_plan(model, plan)
    with torch.no_grad():
        expected = model.logits(tokens(4))
    if family not in [*BURIES, "ernie4_5_moe without bias"]:
        with pytest.raises(UserError, match="would not be exact"):
            export(model, tmp_path / "view", [plan], uniform_view=True)
        assert not (tmp_path / "view").exists()
        return
    export(model, tmp_path / "view", [plan], uniform_view=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "view", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens(4), use_cache=False).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            load(tmp_path / "view", torch.float32).logits(tokens(4)), expected, rtol=0, atol=1e-5
        )
    assert read_record(tmp_path / "view")["num_experts_per_layer"] == list(plan.n_kept)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_layer_by_layer_equals_the_whole_model(family: str, equal: bool, tmp_path: Path) -> None:
    """The same statistics to 1e-6, and never more than one decoder layer's experts in memory; of a pruned checkpoint, too."""
    if equal:
        build(family).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    else:
        model = TransformersModel(build(family))
        plan = create("pruner", "frequency").plan(
            record(model, [tokens()], frozenset({"counts"})), exactly(model, [6, 4, 8])
        )
        apply_plan(model, plan)
        export(model, tmp_path / "model", [plan], max_shard_size="20KB")
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 6:] = False
    batches = [tokens(), (tokens(seed=2), mask), tokens(1, 7, seed=3)]
    needs = frozenset({"counts", "g0f0", "g1f1", "max_f", "var_f", "leave_one_out", "easy_ep", "w1", "w2"})
    plain = record(load(tmp_path / "model", torch.float32), batches, needs)
    resident = []
    load_layer = Skeleton.load

    def spy(self: Skeleton, prefix: str) -> None:
        load_layer(self, prefix)
        layers = TransformersModel(self.model).moe_layers
        resident.append(sum(p.device.type != "meta" for layer in layers for p, _ in layer.expert_parameters().values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Skeleton, "load", spy)
        slow = record_layerwise(tmp_path / "model", batches, needs, dtype=torch.float32)
    one = len(TransformersModel(build(family)).moe_layers[0].expert_parameters())
    assert set(resident) <= {0, one}
    for a, b in zip(plain.layers, slow.layers, strict=True):
        assert a.stats.keys() == b.stats.keys()
        for name in needs:
            np.testing.assert_allclose(a.stats[name], b.stats[name], rtol=1e-6, atol=1e-9, err_msg=name)
