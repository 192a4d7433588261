"""The experts of a layer: y_t = sum_k w_tk * down_e (silu(gate_e x_t) * up_e x_t), e = indices[t, k].

`grouped_swiglu` sorts the tokens by expert and runs one matrix product per expert and projection over blocks of rows
that fit the cache. It saves only the gate/up projections for the backward pass, and takes the gradient of the combine
weights from products it has anyway. `reference_swiglu` is the slow, obvious version it is tested against.

Floor: 6 T K D F multiply-adds forward, twice that backward; weights are read once forward and once backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.parallel.dispatch import Dispatcher, Local

ROWS_PER_BLOCK = 1024  # rows x (D + 3 F) floats of scratch: a few MB, near the last-level cache


def reference_swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Three loops anyone can believe: experts, tokens, choices. Shapes as in `grouped_swiglu`."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for k in range(indices.shape[1]):
            for e in range(gate_up.shape[0]):
                if indices[t, k] == e:
                    gate, up = (gate_up[e] @ x[t]).chunk(2)
                    y = y + weights[t, k].to(x.dtype) * (down[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows) if rows else x * 1.0


def grouped_swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Combined output of the chosen experts.

    Args:
        x: [T, D] tokens.
        indices: [T, K] int64, the chosen experts; an expert may get no token.
        weights: [T, K] combine weights.
        gate_up: [E, 2 F, D], gate projections above up projections.
        down: [E, D, F].

    Returns:
        [T, D], in the dtype of `x`.
    """
    out: Tensor = _GroupedSwiGLU.apply(x, indices, weights.to(x.dtype), gate_up, down)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def each_swiglu(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, K, D] output of each chosen expert before the combine weight: what calibration measures. Shapes as in `grouped_swiglu`."""
    (T, K), (E, F2, D) = indices.shape, gate_up.shape
    f = F2 // 2
    flat = indices.reshape(-1).to(torch.int32)
    order = flat.argsort(stable=True)
    token = order // K
    out = x.new_empty(T * K, D)
    rows = min(T * K, ROWS_PER_BLOCK)
    gu_, h_, y_ = x.new_empty(rows, F2), x.new_empty(rows, f), x.new_empty(rows, D)
    gate_up_t, down_t = gate_up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
    for a, b, pieces in _blocks(torch.bincount(flat, minlength=E).tolist(), ROWS_PER_BLOCK):
        xs, gu, h, y = x.index_select(0, token[a:b]), gu_[: b - a], h_[: b - a], y_[: b - a]
        for e, i, j in pieces:
            torch.mm(xs[i - a : j - a], gate_up_t[e], out=gu[i - a : j - a])
        torch.mul(F.silu(gu[:, :f]), gu[:, f:], out=h)
        for e, i, j in pieces:
            torch.mm(h[i - a : j - a], down_t[e], out=y[i - a : j - a])
        out.index_copy_(0, order[a:b], y)
    return out.view(T, K, D)


def _blocks(counts: Sequence[int], rows: int) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Cut the sorted rows into blocks of at most `rows`: (start, end, [(expert, start, end), ...]) each.

    How an expert's rows are cut depends on their number alone, so its outputs are the same bits whatever other experts there
    are: products of other sizes round differently.
    """
    blocks: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    start = row = 0
    pieces: list[tuple[int, int, int]] = []
    for expert, count in enumerate(counts):
        while count:
            n = min(count, rows)
            if row + n - start > rows:
                blocks.append((start, row, pieces))
                start, pieces = row, []
            pieces.append((expert, row, row + n))
            row, count = row + n, count - n
    if pieces:
        blocks.append((start, row, pieces))
    return blocks


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        (T, K), (E, F2, D) = indices.shape, gate_up.shape
        f = F2 // 2
        flat = indices.reshape(-1).to(torch.int32)  # argsort of int32 is several times faster than of int64
        order = flat.argsort(stable=True)
        token = order // K
        w = weights.reshape(-1).index_select(0, order)[:, None]
        blocks = _blocks(torch.bincount(flat, minlength=E).tolist(), ROWS_PER_BLOCK)
        rows = min(T * K, ROWS_PER_BLOCK)
        saved = x.new_empty(T * K, F2)
        h_, y_ = x.new_empty(rows, f), x.new_empty(rows, D)
        gate_up_t, down_t = gate_up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
        # Sums over a token's K experts in float32, whatever the dtype.
        out = torch.zeros(T, D, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for a, b, pieces in blocks:
            xs, gu, h, y = x.index_select(0, token[a:b]), saved[a:b], h_[: b - a], y_[: b - a]
            for e, i, j in pieces:
                torch.mm(xs[i - a : j - a], gate_up_t[e], out=gu[i - a : j - a])
            torch.mul(F.silu(gu[:, :f]), gu[:, f:], out=h)
            h.mul_(w[a:b])
            for e, i, j in pieces:
                torch.mm(h[i - a : j - a], down_t[e], out=y[i - a : j - a])
            out.index_add_(0, token[a:b], y.to(out.dtype))
        ctx.save_for_backward(x, order, w, gate_up, down, saved)
        ctx.blocks, ctx.K = blocks, K
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, order, w, gate_up, down, saved = ctx.saved_tensors
        K, blocks = ctx.K, ctx.blocks
        dout = grads[0].contiguous()
        f = gate_up.shape[1] // 2
        token = order // K
        dx = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        dw = torch.empty_like(w)
        gate_up_e, down_e, d_gate_up_e, d_down_e = (t.unbind(0) for t in (gate_up, down, d_gate_up, d_down))
        for a, b, pieces in blocks:
            xs, dy, gu = x.index_select(0, token[a:b]), dout.index_select(0, token[a:b]), saved[a:b]
            dh, dxs = x.new_empty(b - a, f), x.new_empty(b - a, x.shape[1])
            for e, i, j in pieces:
                torch.mm(dy[i - a : j - a], down_e[e], out=dh[i - a : j - a])
            gate, up = gu[:, :f], gu[:, f:]
            act = F.silu(gate)
            h = act * up  # output of the activation before the combine weight
            dw[a:b] = (dh * h).sum(1, keepdim=True)
            dh.mul_(w[a:b])
            d_gu = torch.empty_like(gu)
            torch.mul(dh, act, out=d_gu[:, f:])
            d_gu[:, :f] = torch.ops.aten.silu_backward(dh * up, gate)
            h.mul_(w[a:b])
            for e, i, j in pieces:
                i, j = i - a, j - a
                d_down_e[e].addmm_(dy[i:j].t(), h[i:j])
                d_gate_up_e[e].addmm_(d_gu[i:j].t(), xs[i:j])
                torch.mm(d_gu[i:j], gate_up_e[e], out=dxs[i:j])
            dx.index_add_(0, token[a:b], dxs.to(dx.dtype))
        dw_flat = torch.empty_like(dw[:, 0])
        dw_flat[order] = dw[:, 0]
        return dx.to(x.dtype), None, dw_flat.view(-1, K), d_gate_up, d_down


Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # arguments and result of `grouped_swiglu`


class Experts(nn.Module):
    """E SwiGLU experts as two tensors, in the layout of transformers 5.

    `backend` computes them; calibration replaces it for a while by one that measures as well. `dispatcher` brings tokens to
    them: under expert parallelism the tensors hold this process's experts only.

    Args:
        n_experts: E.
        d_model: D.
        d_expert: F.
        output_std: standard deviation of the output projections at initialisation.
    """

    expert_dims = {"gate_up": 0, "down": 0}  # noqa: RUF012 (a constant of the class)

    def __init__(self, n_experts: int, d_model: int, d_expert: int, output_std: float) -> None:
        super().__init__()
        self.backend: Backend = grouped_swiglu
        self.dispatcher: Dispatcher = Local()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        nn.init.normal_(self.gate_up, std=0.02 * math.sqrt(math.sqrt(768 / d_model)))
        nn.init.normal_(self.down, std=output_std)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """[T, D] from x [T, D], indices [T, K], weights [T, K]."""
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        x, indices, weights, handle = self.dispatcher.dispatch(x, indices, weights)
        return self.dispatcher.combine(self.backend(x, indices, weights, gate_up, down), handle)

    def each(self, x: Tensor, indices: Tensor) -> Tensor:
        """[T, K, D] output of each chosen expert before the combine weight, without gradients."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return each_swiglu(x.to(dtype), indices, self.gate_up.to(dtype), self.down.to(dtype))
