"""The grouped expert computation against three loops anyone can believe: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeprune.model import experts
from moeprune.model.experts import grouped_swiglu, reference_swiglu


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


def outputs_and_gradients(function, args: list[Tensor]) -> list[Tensor]:
    leaves = [a for a in args if a.requires_grad]
    out = function(*args)
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 23),
    st.integers(1, 13),
    st.integers(1, 11),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 2**20),
    st.integers(1, 9),
)
def test_equals_reference_float64(T: int, D: int, F: int, E: int, K: int, seed: int, rows: int) -> None:
    """Any sizes, blocks that cut experts in the middle, experts without a token."""
    K = min(K, E)
    args = problem(T, D, F, E, K, seed, torch.float64, used=max(K, E // 2))
    before = experts.ROWS_PER_BLOCK
    experts.ROWS_PER_BLOCK = rows
    try:
        fast = outputs_and_gradients(grouped_swiglu, args)
    finally:
        experts.ROWS_PER_BLOCK = before
    for a, b in zip(fast, outputs_and_gradients(reference_swiglu, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K"), [(63, 60, 37, 5, 2), (130, 32, 16, 8, 4), (7, 9, 5, 1, 1), (40, 16, 24, 16, 1)]
)
def test_equals_reference_float32(T: int, D: int, F: int, E: int, K: int) -> None:
    args = problem(T, D, F, E, K, 1, torch.float32)
    for a, b in zip(
        outputs_and_gradients(grouped_swiglu, args), outputs_and_gradients(reference_swiglu, args), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("T", "D", "F", "E", "K"), [(63, 60, 37, 5, 2), (7, 9, 5, 1, 1), (96, 32, 16, 8, 4)])
def test_bfloat16_keeps_the_signal(T: int, D: int, F: int, E: int, K: int) -> None:
    """Against the float64 reference on the same (rounded) numbers: at least 35 dB of signal over noise everywhere."""
    args = problem(T, D, F, E, K, 2, torch.bfloat16)
    exact = [a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]
    for a, b in zip(
        outputs_and_gradients(grouped_swiglu, args), outputs_and_gradients(reference_swiglu, exact), strict=True
    ):
        noise = (a.double() - b).square().sum()
        assert a.dtype == torch.bfloat16
        assert 10 * torch.log10(b.square().sum() / noise) > 35


def test_gradcheck() -> None:
    x, pick, weights, gate_up, down = problem(6, 5, 4, 4, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b, c, d: grouped_swiglu(a, pick, b, c, d), (x, weights, gate_up, down))


def test_no_tokens() -> None:
    args = problem(0, 8, 4, 3, 2, 0, torch.float32)
    out, *gradients = outputs_and_gradients(grouped_swiglu, args)
    assert out.shape == (0, 8)
    assert all(not gradient.any() for gradient in gradients)


def test_idle_expert_has_zero_gradient() -> None:
    args = problem(9, 8, 4, 6, 2, 0, torch.float32, used=3)
    *_, gate_up, down = outputs_and_gradients(grouped_swiglu, args)
    assert gate_up[:3].abs().sum() > 0
    assert not gate_up[3:].any()
    assert not down[3:].any()


def test_saves_little_for_backward() -> None:
    """Besides its inputs, only the gate/up projections [T K, 2 F] and the order of the tokens."""
    x, pick, weights, gate_up, down = problem(64, 32, 16, 4, 2, 0, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_swiglu(x, pick, weights, gate_up, down)
    own = {x.data_ptr(), gate_up.data_ptr(), down.data_ptr()}
    extra = sum(t.numel() for t in saved if t.data_ptr() not in own)
    assert extra <= 64 * 2 * (2 * 16) + 2 * 64 * 2
