"""Experts block by block: one matrix product per expert and projection, into memory that is there.

Only the gate/up projections and the order of the rows are kept for the backward pass; the combine weights' gradient comes from
products that it needs anyway. An expert's outputs are the same bits whatever other experts there are (see `rows.cut`).

A product of few rows spends most of its time waiting for the expert's matrix, which it reads and writes in strides. So the matrix
is read in order just before (`Between.touch`), or its place written (`Between.claim`), which the memory does several times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.model.rows import multiple_of, sorted_rows

TOUCHED = 2 << 20  # bytes: larger matrices leave the cache before their product has read them
FEW = 128  # rows: above, writing a product's result is a small part of computing it


class _Scratch(threading.local):
    """Memory of this thread on the CPU, kept from call to call: fresh pages cost several times a copy."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised [rows, width]; the next call with this name gives the same memory. dtype: default that of `like`."""
        dtype = dtype or like.dtype
        if like.device.type != "cpu" or type(like) not in (Tensor, nn.Parameter):
            return like.new_empty(rows, width, dtype=dtype)
        size = rows * width * dtype.itemsize
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept.pop(name, None)  # free it first
            with torch.inference_mode(False):
                self.kept[name] = torch.empty(size, dtype=torch.uint8)
        return self.kept[name][:size].view(dtype).view(rows, width)


scratch = _Scratch()


class Between:
    """What is done between the products, row by row, in at least float32: n rows of a block, w [n, 1] their combine weights."""

    def take(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write x[rows] into out [n, D]."""
        torch.index_select(x, 0, rows, out=out)

    def add(self, total: Tensor, rows: Tensor, values: Tensor) -> None:
        """total[rows] += values [n, D], in the order of the rows."""
        total.index_add_(0, rows, _wide("wide_y", values, total.dtype))

    def swiglu(self, gate_up: Tensor, w: Tensor | None, h: Tensor) -> None:
        """Write h [n, F] = silu(gate) up w, from [n, 2 F]; without w where it is None."""
        wide = torch.promote_types(h.dtype, torch.float32)
        gate, up = _wide("wide_gate_up", gate_up, wide).chunk(2, 1)
        product = h if h.dtype == wide else scratch("wide_h", len(h), h.shape[1], h, wide)
        torch.ops.aten.silu.out(gate, out=product)
        product.mul_(up)
        if w is not None:
            product.mul_(w)
        if product is not h:
            h.copy_(product)

    def swiglu_backward(self, gate_up: Tensor, dh: Tensor, w: Tensor, h: Tensor, d_gate_up: Tensor, dw: Tensor) -> None:
        """Write h as above, and the gradients of gate/up [n, 2 F] and w [n, 1], from that of h / w."""
        n, width = h.shape
        same = h.dtype == w.dtype
        gate, up = _wide("wide_gate_up", gate_up, w.dtype).chunk(2, 1)
        d_h = _wide("wide_dh", dh, w.dtype)
        act, d_act = (scratch(name, n, width, h, w.dtype) for name in ("act", "d_act"))
        product = h if same else scratch("wide_h", n, width, h, w.dtype)
        # below float32 the wide gate and up lie where their gradients go: each is overwritten when it has served
        d_wide = d_gate_up if same else scratch("wide_gate_up", n, 2 * width, h, w.dtype)
        torch.ops.aten.silu.out(gate, out=act)
        torch.mul(d_h, up, out=d_act)
        torch.mul(d_act, act, out=product)
        torch.sum(product, 1, keepdim=True, out=dw)
        act.mul_(w)
        d_act.mul_(w)
        torch.mul(act, up, out=product)
        torch.ops.aten.silu_backward.grad_input(d_act, gate, grad_input=d_wide[:, :width])
        torch.mul(d_h, act, out=d_wide[:, width:])
        if not same:
            h.copy_(product)
            d_gate_up.copy_(d_wide)

    def touch(self, matrix: Tensor) -> None:
        """Read it in order."""
        torch.sum(matrix)

    def claim(self, matrix: Tensor) -> None:
        """Write it in order, anything."""
        matrix.zero_()


def _wide(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [n, width] in `dtype`, in the scratch `name` if it has another."""
    return x if x.dtype == dtype else scratch(name, len(x), x.shape[1], x, dtype).copy_(x)


def in_blocks(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    recompute: bool = False,
    between: Between = Between(),  # noqa: B008 (has no state)
) -> Tensor:
    """Combined output of the chosen experts.

    Args:
        x: [T, D] tokens.
        indices: [T, K] int64, the chosen experts; an expert may get no token.
        weights: [T, K] combine weights.
        gate_up: [E, 2 F, D], gate projections above up projections.
        down: [E, D, F].
        recompute: keep the arguments alone for the backward pass.
        between: what is done between products.

    Returns:
        [T, D], in the dtype of `x`. Products are in that dtype, what lies between them and sums over a token's experts in
        at least float32.
    """
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    out: Tensor = _GroupedSwiGLU.apply(  # type: ignore[no-untyped-call]
        x, indices, weights, gate_up, down, differentiated and not recompute, between
    )
    return out


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        save: bool,
        between: Between,
    ) -> Tensor:
        (T, K), (E, F2, D) = indices.shape, gate_up.shape
        rows = sorted_rows(indices, E, multiple_of(x))
        w = _weights(weights, rows.choice, rows.padding)
        n = rows.longest
        xs_, y_, h_ = (scratch(*wanted, x) for wanted in (("xs", n, D), ("dy", n, D), ("h", n, F2 // 2)))
        gu_ = x.new_empty(len(w), F2) if save else scratch("gate_up", n, F2, x)
        touch_gate_up, touch_down = (_touching(between, m) for m in (gate_up, down))
        gate_up_t, down_t = gate_up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
        out, token_ = w.new_zeros(T, D), rows.choice // K
        for a, b, experts, sizes in rows.blocks:
            n, token = b - a, token_[a:b]
            xs, gu, h, y = xs_[:n], gu_[a:b] if save else gu_[:n], h_[:n], y_[:n]
            between.take(x, token, xs)
            _products(xs, gate_up_t, gu, experts, sizes, touch_gate_up)
            between.swiglu(gu, w[a:b], h)
            _products(h, down_t, y, experts, sizes, touch_down)
            between.add(out, token, y)
        ctx.save_for_backward(
            x, weights, gate_up, down, rows.choice.to(torch.int32), rows.padding, gu_ if save else None
        )
        ctx.blocks, ctx.longest, ctx.between = rows.blocks, rows.longest, between
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, choice, padding, saved = ctx.saved_tensors
        between: Between = ctx.between
        (T, K), (E, F2, D) = weights.shape, gate_up.shape
        w = _weights(weights, choice, padding)
        for_x, _, for_w, for_gate_up, for_down, *_ = ctx.needs_input_grad
        dout = grads[0].contiguous()
        dx = w.new_zeros(T, D) if for_x else None
        dw = torch.empty_like(w)
        d_gate_up = torch.empty_like(gate_up) if for_gate_up else None
        d_down = torch.empty_like(down) if for_down else None
        widths = {"xs": D, "dy": D, "dh": F2 // 2, "h": F2 // 2, "d_gate_up": F2}
        xs_, dy_, dh_, h_, d_gu_ = (scratch(name, ctx.longest, width, x) for name, width in widths.items())
        gu_ = scratch("gate_up", ctx.longest, F2, x) if saved is None else None
        touch_gate_up, touch_down = (_touching(between, m) for m in (gate_up, down))
        claim = between.claim if touch_down or touch_gate_up else None
        token_ = (choice // K).long()
        gate_up_e, down_e, gate_up_t = gate_up.unbind(0), down.unbind(0), gate_up.transpose(1, 2).unbind(0)
        d_gate_up_e = [] if d_gate_up is None else d_gate_up.unbind(0)
        d_down_e = [] if d_down is None else d_down.unbind(0)
        written = [False] * E
        for a, b, experts, sizes in ctx.blocks:
            n, token = b - a, token_[a:b]
            xs, dy, dh, h, d_gu = xs_[:n], dy_[:n], dh_[:n], h_[:n], d_gu_[:n]
            between.take(x, token, xs)
            between.take(dout, token, dy)
            if gu_ is None:
                gu = saved[a:b]
            else:
                gu = gu_[:n]
                _products(xs, gate_up_t, gu, experts, sizes, touch_gate_up)
            _products(dy, down_e, dh, experts, sizes, touch_down)  # of the output before its combine weight
            between.swiglu_backward(gu, dh, w[a:b], h, d_gu, dw[a:b])
            pieces = [rows_of.split_with_sizes(sizes) for rows_of in (dy, h, d_gu, xs)]
            for e, dy_e, h_e, d_gu_e, xs_e in zip(experts, *pieces, strict=True):
                if d_down is not None:
                    _product(dy_e.t(), h_e, d_down_e[e], written[e], claim)
                if d_gate_up is not None:
                    _product(d_gu_e.t(), xs_e, d_gate_up_e[e], written[e], claim)
                written[e] = True
                if dx is not None:
                    if touch_gate_up:
                        touch_gate_up(gate_up_e[e])
                    torch.mm(d_gu_e, gate_up_e[e], out=dy_e)  # dy has served
            if dx is not None:
                between.add(dx, token, dy)
        for e in range(E):
            if not written[e]:  # no token came
                for results in (d_gate_up_e, d_down_e):
                    if results:
                        results[e].zero_()
        d_weights = None
        if for_w:
            valid = slice(None) if padding is None else ~padding
            d_weights = dw.new_empty(T * K).index_copy_(0, choice[valid].long(), dw[valid, 0]).view(T, K)
        return None if dx is None else dx.to(x.dtype), None, d_weights, d_gate_up, d_down, None, None


@torch.no_grad()
def each_swiglu(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, K, D] output of each chosen expert before the combine weight: what calibration measures. Shapes as in `in_blocks`."""
    (T, K), (E, F2, D) = indices.shape, gate_up.shape
    rows = sorted_rows(indices, E, multiple_of(x))
    out = x.new_empty(T * K, D)
    widths = {"gate_up": F2, "h": F2 // 2, "dy": D}
    gu_, h_, y_ = (scratch(name, rows.longest, width, x) for name, width in widths.items())
    gate_up_t, down_t = gate_up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
    between = Between()
    touch_gate_up, touch_down = (_touching(between, m) for m in (gate_up, down))
    for a, b, experts, sizes in rows.blocks:
        xs, gu, h, y = x.index_select(0, rows.choice[a:b] // K), gu_[: b - a], h_[: b - a], y_[: b - a]
        _products(xs, gate_up_t, gu, experts, sizes, touch_gate_up)
        between.swiglu(gu, None, h)
        _products(h, down_t, y, experts, sizes, touch_down)
        out.index_copy_(0, rows.choice[a:b], y)  # a row that pads repeats the one before it
    return out.view(T, K, D)


def _weights(weights: Tensor, choice: Tensor, padding: Tensor | None) -> Tensor:
    """[S, 1] combine weight of each row; 0 for padding."""
    w = weights.reshape(-1).index_select(0, choice)
    return (w if padding is None else w.masked_fill_(padding, 0))[:, None]


def _touching(between: Between, matrices: Tensor) -> Callable[[Tensor], None] | None:
    """How matrices of these [E, ...] are read before a product; None where that costs more than it saves: on the CPU half-precision
    products copy them in order anyway.
    """
    small = matrices.dtype == torch.float32 and matrices[:1].numel() * matrices.element_size() <= TOUCHED
    return between.touch if small and matrices.device.type == "cpu" else None


def _products(
    rows_in: Tensor,
    matrices: Sequence[Tensor],
    rows_out: Tensor,
    experts: Sequence[int],
    sizes: Sequence[int],
    touch: Callable[[Tensor], None] | None,
) -> None:
    """Each expert's rows times its matrix."""
    pieces = zip(experts, rows_in.split_with_sizes(sizes), rows_out.split_with_sizes(sizes), strict=True)
    for expert, piece_in, piece_out in pieces:
        if touch:
            touch(matrices[expert])
        torch.mm(piece_in, matrices[expert], out=piece_out)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool, claim: Callable[[Tensor], None] | None) -> None:
    """The product a b, into `out` or on top of it."""
    if add:
        out.addmm_(a, b)
    else:
        if claim and a.shape[1] <= FEW:
            claim(out)
        torch.mm(a, b, out=out)
