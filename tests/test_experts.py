"""Every way of computing the experts against three loops anyone can believe: outputs and every gradient."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeprune.errors import UserError
from moeprune.model import rows as rows_of_experts
from moeprune.model.blocks import each_swiglu
from moeprune.model.config import MoEConfig
from moeprune.model.experts import BACKENDS, GROUP, Backend, Experts, find_backend, reference_swiglu
from moeprune.model.transformer import MoETransformer

HERE = [*BACKENDS, *(["compiled"] if shutil.which(os.environ.get("CC", "cc")) else [])]
FAST = [name for name in HERE if name != "reference"]
IN_BLOCKS = [name for name in FAST if name != "grouped_mm"]


def problem(
    T: int, D: int, F: int, E: int, K: int, seed: int, dtype: torch.dtype, used: int | None = None
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    pick = (
        torch.stack([torch.randperm(used or E, generator=g)[:K] for _ in range(T)])
        if T
        else torch.empty(0, K, dtype=torch.int64)
    )
    weights = torch.rand(T, K, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    gate_up = (torch.randn(E, 2 * F, D, generator=g, dtype=torch.float64) * D**-0.5).to(dtype).requires_grad_()
    down = (torch.randn(E, D, F, generator=g, dtype=torch.float64) * F**-0.5).to(dtype).requires_grad_()
    return [x, pick, weights, gate_up, down]


def outputs_and_gradients(function: Backend, args: list[Tensor]) -> list[Tensor]:
    leaves = [a for a in args if a.requires_grad]
    out = function(*args)
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 23),
    st.integers(1, 13),
    st.integers(1, 11),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 2**20),
    st.integers(1, 20),
)
def test_equals_reference_float64(name: str, T: int, D: int, F: int, E: int, K: int, seed: int, rows: int) -> None:
    """Any sizes, blocks that cut experts in the middle, experts without a token."""
    K = min(K, E)
    args = problem(T, D, F, E, K, seed, torch.float64, used=max(K, E // 2))
    before = rows_of_experts.ROWS
    rows_of_experts.ROWS = rows
    try:
        fast = outputs_and_gradients(find_backend(name), args)
    finally:
        rows_of_experts.ROWS = before
    for a, b in zip(fast, outputs_and_gradients(reference_swiglu, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# T, D, F, E, K; widths that grouped_mm takes and one it does not; one token, one expert, all experts, many of them idle
SIZES = [
    (63, 60, 36, 5, 2),
    (63, 61, 37, 5, 2),
    (130, 32, 16, 8, 4),
    (7, 8, 4, 1, 1),
    (40, 16, 24, 16, 1),
    (1, 16, 8, 9, 3),
]
SIZES += [(21, 12, 20, 4, 4), (200, 16, 8, 3, 1)]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("T", "D", "F", "E", "K"), SIZES)
def test_equals_reference_float32(name: str, T: int, D: int, F: int, E: int, K: int) -> None:
    args = problem(T, D, F, E, K, 1, torch.float32)
    fast = outputs_and_gradients(find_backend(name), args)
    for a, b in zip(fast, outputs_and_gradients(reference_swiglu, args), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K"), [(63, 64, 40, 5, 2), (63, 60, 37, 5, 2), (7, 8, 8, 1, 1), (96, 32, 16, 8, 4)]
)
def test_bfloat16_keeps_the_signal(name: str, T: int, D: int, F: int, E: int, K: int) -> None:
    """Against the float64 reference on the same (rounded) numbers: at least 35 dB of signal over noise everywhere."""
    args = problem(T, D, F, E, K, 2, torch.bfloat16)
    exact = [a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]
    fast = outputs_and_gradients(find_backend(name), args)
    for a, b in zip(fast, outputs_and_gradients(reference_swiglu, exact), strict=True):
        noise = (a.double() - b).square().sum()
        assert a.dtype == torch.bfloat16
        assert 10 * torch.log10(b.square().sum() / noise) > 35


@pytest.mark.parametrize("name", FAST)
def test_autocast(name: str) -> None:
    """Mixed precision through the module: float32 parameters get float32 gradients, near those of full precision."""
    x, pick, weights, *_ = problem(50, 32, 16, 6, 2, 5, torch.float32, used=5)
    layer = Experts(6, 32, 16, 0.2, name)
    x = x.detach().requires_grad_()
    found = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(x, pick, weights)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        gradients = torch.autograd.grad(out.float().square().sum(), [x, weights, *layer.parameters()])
        assert all(g.dtype == torch.float32 for g in gradients)
        found.append(gradients)
    for exact, mixed in zip(*found, strict=True):
        assert (mixed - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("name", FAST)
def test_gradcheck(name: str) -> None:
    x, pick, weights, gate_up, down = problem(6, 5, 4, 4, 2, 3, torch.float64)
    backend = find_backend(name)
    assert torch.autograd.gradcheck(lambda a, b, c, d: backend(a, pick, b, c, d), (x, weights, gate_up, down))


@pytest.mark.parametrize("name", FAST)
def test_no_tokens(name: str) -> None:
    args = problem(0, 8, 4, 3, 2, 0, torch.float32)
    out, *gradients = outputs_and_gradients(find_backend(name), args)
    assert out.shape == (0, 8)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idle_expert_has_zero_gradient(name: str, dtype: torch.dtype) -> None:
    args = problem(9, 8, 8, 6, 2, 0, dtype, used=3)
    *_, gate_up, down = outputs_and_gradients(find_backend(name), args)
    assert gate_up[:3].abs().sum() > 0
    assert not gate_up[3:].any()
    assert not down[3:].any()


@pytest.mark.parametrize("name", FAST)
def test_only_the_gradients_asked_for(name: str) -> None:
    """Frozen experts, frozen tokens: the others' gradients stay the same bits."""
    args = problem(30, 16, 8, 4, 2, 0, torch.float32)
    everything = outputs_and_gradients(find_backend(name), args)
    for frozen in ((0,), (3, 4), (0, 2, 4), (2,)):
        some = [a.detach() if i in frozen else a for i, a in enumerate(args)]
        expected = [g for i, g in zip((0, 2, 3, 4), everything[1:], strict=True) if i not in frozen]
        for a, b in zip(outputs_and_gradients(find_backend(name), some)[1:], expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_is_bit_identical(dtype: torch.dtype) -> None:
    args = problem(70, 32, 16, 5, 2, 4, dtype)
    plain, again = (outputs_and_gradients(find_backend(name), args) for name in ("blocks", "recompute"))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_is_the_same_bits_whatever_others_there_are(name: str, dtype: torch.dtype) -> None:
    """Experts alone, with all others, and in another order; more tokens than fit a block. Tokens choose one expert."""
    x, pick, weights, gate_up, down = problem(1500, 16, 8, 6, 1, 0, dtype)
    pick[:1200] = 2
    together = outputs_and_gradients(find_backend(name), [x, pick, weights, gate_up, down])
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    moved = [x, order.argsort()[pick], weights, gate_up[order].detach(), down[order].detach()]
    assert torch.equal(find_backend(name)(*moved), together[0])
    for e in range(6):
        own = (pick[:, 0] == e).nonzero()[:, 0]
        alone = [x[own], pick[own] * 0, weights[own], gate_up[e : e + 1], down[e : e + 1]]
        alone = [a.detach().requires_grad_(a.is_floating_point()) for a in alone]
        out = find_backend(name)(*alone)
        assert torch.equal(out, together[0][own])
        weight = torch.linspace(-1, 2, together[0].numel(), dtype=torch.float64).view_as(together[0]).to(dtype)[own]
        leaves = [a for a in alone if a.requires_grad]
        dx, dw, d_gate_up, d_down = torch.autograd.grad((out * weight).sum(), leaves)
        assert torch.equal(dx, together[1][own])
        assert torch.equal(dw, together[2][own])
        assert torch.equal(d_gate_up[0], together[3][e])
        assert torch.equal(d_down[0], together[4][e])


def test_blocks_cover_every_row_once() -> None:
    for counts in ([3, 0, 7], [1024, 1025, 1, 0, 5000], [], [0, 0], [16, 2048]):
        for rows in (1, 5, 1024):
            row, seen = 0, [0] * len(counts)
            for start, end, of, sizes in rows_of_experts.cut(counts, rows):
                assert start == row
                assert 0 < end - start == sum(sizes) <= rows
                row = end
                for e, n in zip(of, sizes, strict=True):
                    seen[e] += n
            assert seen == counts


def test_padding_repeats_the_experts_own_last_row() -> None:
    pick = torch.tensor([[0, 3], [3, 1], [3, 0]])
    rows = rows_of_experts.sorted_rows(pick, 5, 4)
    assert rows.choice.tolist() == [0, 5, 5, 5, 3, 3, 3, 3, 1, 2, 4, 4]
    assert rows.padding.tolist() == [False, False, True, True, False, True, True, True, False, False, False, True]


def test_a_token_that_is_not_finite_spoils_only_its_experts() -> None:
    """Padding must not carry it to others."""
    x, pick, weights, gate_up, down = problem(40, 16, 8, 4, 1, 0, torch.bfloat16)
    with torch.no_grad():
        x[7] = torch.inf
    out, dx, _, d_gate_up, _ = outputs_and_gradients(find_backend("blocks"), [x, pick, weights, gate_up, down])
    hit = int(pick[7, 0])
    finite = torch.tensor([e != hit for e in range(4)])
    assert torch.equal(d_gate_up.isfinite().all((1, 2)), finite)
    assert out[torch.arange(40) != 7].isfinite().all()
    assert dx[torch.arange(40) != 7].isfinite().all()


def test_grouped_mm_never_waits_for_the_device() -> None:
    """On the meta device no number can be read; shapes alone must do, forward and backward."""
    args = problem(40, 16, 8, 4, 2, 0, torch.bfloat16)
    meta = [a.detach().to("meta").requires_grad_(a.requires_grad) for a in args]
    out = find_backend("grouped_mm")(*meta)
    leaves = [a for a in meta if a.requires_grad]
    gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [g.shape for g in gradients] == [a.shape for a in leaves]


def saved_by(backend: Backend, args: list[Tensor]) -> int:
    """Bytes kept for the backward pass besides the arguments."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = backend(*args)
    own = {a.untyped_storage().data_ptr() for a in args}
    del out
    return sum(size for pointer, size in saved.items() if pointer not in own)


def test_saves_little_for_backward() -> None:
    """Gate/up projections [T K, 2 F] and the order of the rows, int32; with recompute only the order."""
    args = problem(64, 32, 16, 4, 2, 0, torch.float32)
    order = 64 * 2 * 4
    assert saved_by(find_backend("blocks"), args) == 64 * 2 * (2 * 16) * 4 + order
    assert saved_by(find_backend("recompute"), args) == order
    assert saved_by(find_backend("grouped_mm"), args) > 2 * saved_by(find_backend("blocks"), args)


def test_scratch_is_each_threads_own() -> None:
    """Two threads at once give what one gives alone."""
    problems = [problem(400, 32, 16, 4, 2, seed, torch.float32) for seed in range(2)]
    alone = [outputs_and_gradients(find_backend("recompute"), args) for args in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            found = outputs_and_gradients(find_backend("recompute"), problems[i])
            if not all(torch.equal(a, b) for a, b in zip(found, alone[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", FAST)
def test_inference_mode_leaves_training_alone(name: str) -> None:
    args = problem(30, 16, 8, 4, 2, 0, torch.float32)
    expected = outputs_and_gradients(find_backend(name), args)

    def fresh() -> None:  # a thread without scratch, whose first call is in inference mode
        with torch.inference_mode():
            assert torch.equal(find_backend(name)(*args), expected[0])
        found.extend(outputs_and_gradients(find_backend(name), args))

    found: list[Tensor] = []
    thread = threading.Thread(target=fresh)
    thread.start()
    thread.join()
    assert len(found) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FAST)
def test_two_backward_passes(name: str) -> None:
    """What was saved is left as it was."""
    x, *rest = problem(30, 16, 8, 4, 2, 0, torch.bfloat16)
    out = find_backend(name)(x, *rest)
    first, second = (torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_is_what_the_sum_is_made_of(dtype: torch.dtype) -> None:
    x, pick, _, gate_up, down = problem(50, 16, 8, 5, 3, 0, dtype, used=4)
    each = each_swiglu(x, pick, gate_up, down)
    assert each.shape == (50, 3, 16)
    for k in range(3):
        alone = reference_swiglu(*(a.detach().double() if a.is_floating_point() else a for a in (x, pick[:, k : k + 1], torch.ones(50, 1), gate_up, down)))  # fmt: skip
        error = (each[:, k].double() - alone).norm() / alone.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_computes_its_experts_as_configured(name: str) -> None:
    config = MoEConfig(vocab_size=31, d_model=16, n_layers=2, n_heads=2, n_experts=4, d_expert=8, max_seq_len=8)
    models = []
    for backend in ("blocks", name):
        torch.manual_seed(0)
        models.append(MoETransformer(MoEConfig(**{**config.to_dict(), "expert_backend": backend})))
    assert all(layer.experts.backend is BACKENDS[name] for layer in models[1].moe_layers)
    tokens = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in models:
        model(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_backend_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of entry points; what cannot be found or loaded is named."""
    (tmp_path / "acme_experts.py").write_text("def experts(x, indices, weights, gate_up, down):\n    return x\n")
    info = tmp_path / "acme_experts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-experts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nacme = acme_experts:experts\nbroken = acme_experts:nothing\n")
    with pytest.raises(UserError, match="acme"):
        find_backend("acme")
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.ones(3, 4)
    pick, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    assert torch.equal(Experts(2, 4, 4, 0.1, "acme")(x, pick, weights), x)
    with pytest.raises(UserError, match=r"broken.*could not be loaded"):
        find_backend("broken")
    with pytest.raises(UserError, match="did you mean 'blocks'"):
        find_backend("block")


@pytest.mark.skipif("compiled" not in HERE, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_are_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """Widths that vectors and threads do not divide."""
    args = problem(130, 300, 37, 5, 2, 0, dtype)
    between = find_backend("compiled").keywords["between"]  # type: ignore[attr-defined]
    if list((Path(torch.__file__).parent / "lib").glob("libgomp*")):  # else the kernels run on one thread
        assert b"GOMP_parallel" in Path(between.library._name).read_bytes()
    g = torch.Generator().manual_seed(0)
    n, width = 53, 37
    gate_up, dh = (torch.randn(n, k, generator=g).to(dtype) for k in (2 * width, width))
    w, at = torch.rand(n, 1, generator=g), torch.randint(7, (n,), generator=g)
    values = torch.randn(n, 300, generator=g).to(dtype)
    found: list[list[Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            h, again, d_gate_up, dw = (torch.empty_like(t) for t in (dh, dh, gate_up, w))
            total, taken = torch.zeros(7, 300), torch.empty_like(values)
            between.swiglu(gate_up, w, h)
            between.swiglu_backward(gate_up, dh, w, again, d_gate_up, dw)
            between.add(total, at, values)
            between.take(values, at, taken)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(taken, values[at])
        found.append([h, again, d_gate_up, dw, total])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(outputs_and_gradients(find_backend("compiled"), args)) == 5


@pytest.mark.skipif("compiled" not in HERE, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_on_extreme_numbers(dtype: torch.dtype) -> None:
    """Large gates saturate as silu does; what is not finite does not become finite."""
    between = find_backend("compiled").keywords["between"]  # type: ignore[attr-defined]
    gate = torch.tensor([0.0, -0.0, 1e-30, 30, -30, 100, -100, 1e30, -1e30, torch.inf, torch.nan, 88.8, -88.8])
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None].to(dtype)
    one, h = torch.ones(1, 1), torch.empty(1, len(gate), dtype=dtype)
    between.swiglu(gate_up, one, h)
    expected = torch.nn.functional.silu(gate_up[:, : len(gate)].double()).to(dtype)
    torch.testing.assert_close(h, expected, equal_nan=True, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-35)
    dh, d_gate_up, dw = torch.ones_like(h), torch.empty_like(gate_up), torch.empty(1, 1)
    between.swiglu_backward(gate_up, dh, one, h, d_gate_up, dw)
    assert dw.isnan().all()
    assert d_gate_up[0, : len(gate)].isfinite().sum() == len(gate) - 2


def test_compiled_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names the compiler and the way out; a compiler that fails is quoted."""
    compiled = pytest.importorskip("moeprune_plugins.expert_backends.compiled") if "compiled" in HERE else None
    monkeypatch.setenv("MOEPRUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "/no/such/cc -m64")
    with pytest.raises(UserError, match=r"/no/such/cc -m64.*CC, or use expert_backend=blocks"):
        compiled.built() if compiled else find_backend("compiled")
    failing = tmp_path / "cc"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no space left" >&2\nexit 1\n')
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    with pytest.raises(UserError, match=r"no space left"):
        compiled.built() if compiled else find_backend("compiled")
    assert not list(tmp_path.glob("kernels/*"))
