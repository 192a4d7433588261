"""The experts of a layer: y_t = sum_k w_tk * down_e (silu(gate_e x_t) * up_e x_t), e = indices[t, k].

    blocks      sorts the tokens by expert; one matrix product per expert and projection over blocks of rows that fit the
                cache; saves only the gate/up projections for the backward pass, and takes the gradient of the combine
                weights from products it has anyway. The default.
    recompute   the same, bit for bit, but saves its arguments alone and computes the projections again.
    grouped_mm  torch.nn.functional.grouped_mm over all rows at once, under plain autograd; the counts stay on the device.
    reference   three loops, the slow and obvious version that the others are tested against.

Floor: 6 T K D F FLOP forward, twice that backward; weights are read once forward and once backward, their
gradients written once.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.errors import UserError, suggest
from moeprune.parallel.dispatch import Dispatcher, Local

ROWS_PER_BLOCK = 1024  # rows x (2 D + 5 F) floats of scratch: a few MB, near the last-level cache

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # arguments and result of `grouped_swiglu`


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
    """Combined output of the chosen experts: the backend `blocks`.

    Args:
        x: [T, D] tokens.
        indices: [T, K] int64, the chosen experts; an expert may get no token.
        weights: [T, K] combine weights.
        gate_up: [E, 2 F, D], gate projections above up projections.
        down: [E, D, F].

    Returns:
        [T, D], in the dtype of `x`. Products are in that dtype, what lies between them and sums over a token's experts in
        at least float32.
    """
    return _swiglu(x, indices, weights, gate_up, down, recompute=False)


def recomputed_swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`grouped_swiglu` that keeps only its arguments for the backward pass: the backend `recompute`."""
    return _swiglu(x, indices, weights, gate_up, down, recompute=True)


def grouped_mm_swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` under plain autograd: the backend `grouped_mm`. Shapes as in `grouped_swiglu`.

    Nothing waits for the device: where an expert's rows end is found on it. Keeps 3.5 to 4 times as much for the
    backward pass as `grouped_swiglu`. float64 and rows that are no multiple of 16 bytes, which grouped_mm refuses, go to `blocks`.
    """
    D, width = down.shape[1:]
    if x.dtype == torch.float64 or (D * x.element_size()) % 16 or (width * x.element_size()) % 16 or not x.numel():
        return grouped_swiglu(x, indices, weights, gate_up, down)
    T, K = indices.shape
    ids, choice = indices.reshape(-1).to(torch.int32).sort(stable=True)
    w = weights.reshape(-1)
    multiple = _multiple(x)
    if multiple > 1:
        sizes, choice, padding = _padded(torch.bincount(ids, minlength=len(down)), choice, multiple)
        ends = sizes.cumsum(0)
        w = w.index_select(0, choice).masked_fill(padding, 0)
    else:
        ends = torch.searchsorted(ids, torch.arange(len(down), device=x.device, dtype=ids.dtype), right=True)
        w = w.index_select(0, choice)
    ends, token = ends.to(torch.int32), choice // K
    gate, up = F.grouped_mm(x.index_select(0, token), gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    h = (F.silu(gate) * up * w[:, None]).to(x.dtype)
    y = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    return x.new_zeros(T, D, dtype=wide).index_add(0, token, y.to(wide)).to(x.dtype)


@torch.no_grad()
def each_swiglu(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, K, D] output of each chosen expert before the combine weight: what calibration measures. Shapes as in `grouped_swiglu`."""
    (T, K), (E, F2, D) = indices.shape, gate_up.shape
    f = F2 // 2
    rows = _sorted(indices, E, _multiple(x))
    out = x.new_empty(T * K, D)
    gu_, h_, y_ = (x.new_empty(rows.longest, width) for width in (F2, f, D))
    gate_up_t, down_t = gate_up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
    for a, b, experts, sizes in rows.blocks:
        xs, gu, h, y = x.index_select(0, rows.choice[a:b] // K), gu_[: b - a], h_[: b - a], y_[: b - a]
        _products(xs, gate_up_t, gu, experts, sizes)
        gate, up = gu.to(torch.promote_types(gu.dtype, torch.float32)).chunk(2, 1)
        torch.mul(F.silu(gate), up, out=h)
        _products(h, down_t, y, experts, sizes)
        out.index_copy_(0, rows.choice[a:b], y)  # a row that pads repeats the one before it
    return out.view(T, K, D)


class _Rows(NamedTuple):
    """One row per token and choice, sorted by expert."""

    choice: Tensor  # [S] int64, t K + k
    padding: Tensor | None  # [S] bool: rows that only fill up an expert's; None where there are none
    blocks: list[tuple[int, int, list[int], list[int]]]  # see `_blocks`
    longest: int  # rows of the longest block


def _sorted(indices: Tensor, n_experts: int, multiple: int) -> _Rows:
    """The rows of `indices` [T, K], those of each expert padded to a multiple of `multiple`."""
    ids = indices.reshape(-1).to(torch.int32)  # sorting int32 is several times faster than int64
    choice = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=n_experts)
    padding = None
    if multiple > 1:
        counts, choice, padding = _padded(counts, choice, multiple)
    blocks = _blocks(counts.tolist(), ROWS_PER_BLOCK)
    return _Rows(choice, padding, blocks, max((b - a for a, b, *_ in blocks), default=0))


def _padded(counts: Tensor, choice: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [E] rounded up, the rows with each expert's last one repeated to fill up, and which rows those are."""
    rounded = (counts + (multiple - 1)) // multiple * multiple
    ends = counts.cumsum(0)
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(rounded)
    before = (rounded - counts).cumsum(0) - (rounded - counts)  # rows added ahead of each expert's
    row = torch.arange(len(expert), device=counts.device) - before.index_select(0, expert)
    last = ends.index_select(0, expert) - 1
    return rounded, choice.index_select(0, torch.minimum(row, last)), row > last


def _multiple(x: Tensor) -> int:
    """To how many rows an expert's are padded: oneDNN builds and caches a kernel per number of rows of half-precision
    products, and changing loads would go through more than its cache holds.
    """
    return 16 if x.device.type == "cpu" and x.element_size() == 2 else 1


def _blocks(counts: Sequence[int], rows: int) -> list[tuple[int, int, list[int], list[int]]]:
    """Cut the sorted rows into blocks of at most `rows`: (start, end, experts, rows of each) of every block.

    How an expert's rows are cut depends on their number alone, so its outputs are the same bits whatever other experts there
    are: products of other sizes round differently.
    """
    blocks: list[tuple[int, int, list[int], list[int]]] = []
    start = row = 0
    experts: list[int] = []
    sizes: list[int] = []
    for expert, count in enumerate(counts):
        while count:
            n = min(-(-count // -(-count // rows) // 16) * 16, rows, count)
            if row + n - start > rows:
                blocks.append((start, row, experts, sizes))
                start, experts, sizes = row, [], []
            experts.append(expert)
            sizes.append(n)
            row, count = row + n, count - n
    if experts:
        blocks.append((start, row, experts, sizes))
    return blocks


class _Kept(threading.local):
    """Scratch of this thread on the CPU, kept from call to call: fresh pages cost several times a copy."""

    memory = torch.empty(0, dtype=torch.uint8)


_KEPT = _Kept()


def _scratch(
    rows: int, narrow: Tensor, narrow_widths: Sequence[int], wide: Tensor, wide_widths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised [rows, width] for each width, in the dtypes of `narrow` and `wide`; the next call gives the same memory.

    Where the two are the same dtype there is nothing in the wide ones.
    """
    widths = [*wide_widths] if narrow.dtype != wide.dtype else [0] * len(wide_widths)
    wanted = [(narrow.dtype, n) for n in narrow_widths] + [(wide.dtype, n) for n in widths]
    if narrow.device.type != "cpu" or type(narrow) not in (Tensor, nn.Parameter):
        made = [narrow.new_empty(rows, n, dtype=dtype) for dtype, n in wanted]
    else:
        ends = list(itertools.accumulate(-(-rows * n * dtype.itemsize // 64) * 64 for dtype, n in wanted))
        if _KEPT.memory.numel() < ends[-1]:
            _KEPT.memory = _KEPT.memory[:0].clone()  # free it first
            with torch.inference_mode(False):
                _KEPT.memory = torch.empty(ends[-1], dtype=torch.uint8)
        made = [
            _KEPT.memory[start : start + rows * n * dtype.itemsize].view(dtype).view(rows, n)
            for start, (dtype, n) in zip([0, *ends], wanted, strict=False)
        ]
    return made[: len(narrow_widths)], made[len(narrow_widths) :]


def _weights(weights: Tensor, choice: Tensor, padding: Tensor | None) -> Tensor:
    """[S, 1] combine weight of each row; 0 for padding."""
    w = weights.reshape(-1).index_select(0, choice)
    return (w if padding is None else w.masked_fill_(padding, 0))[:, None]


def _copied(x: Tensor, into: Tensor) -> Tensor:
    """`x` [n, ...] in the dtype of `into`, in whose first n rows it lies if it has another."""
    return x if x.dtype == into.dtype else into[: len(x)].copy_(x)


def _swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, recompute: bool) -> Tensor:
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    out: Tensor = _GroupedSwiGLU.apply(x, indices, weights, gate_up, down, differentiated and not recompute)  # type: ignore[no-untyped-call]
    return out


class _GroupedSwiGLU(torch.autograd.Function):
    """Scratch is allocated once per pass and reused by all blocks; matrix products write into it and into the results."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, save: bool
    ) -> Tensor:
        (T, K), (E, F2, D) = indices.shape, gate_up.shape
        f = F2 // 2
        rows = _sorted(indices, E, _multiple(x))
        w = _weights(weights, rows.choice, rows.padding)
        (xs_, y_, h_, gu_), (wide_gu_, wide_h_, wide_y_) = _scratch(rows.longest, x, (D, D, f, F2), w, (F2, f, D))
        if x.dtype == w.dtype:
            wide_gu_, wide_h_, wide_y_ = gu_, h_, y_
        if save:
            gu_ = x.new_empty(len(w), F2)
        gate_up_t, down_t = gate_up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
        out, token_ = w.new_zeros(T, D), rows.choice // K
        for a, b, experts, sizes in rows.blocks:
            n, token = b - a, token_[a:b]
            xs, gu, h, y = xs_[:n], gu_[a:b] if save else gu_[:n], h_[:n], y_[:n]
            torch.index_select(x, 0, token, out=xs)
            _products(xs, gate_up_t, gu, experts, sizes)
            gate, up = _copied(gu, wide_gu_).chunk(2, 1)
            act = wide_h_[:n]
            torch.ops.aten.silu.out(gate, out=act)
            act.mul_(up).mul_(w[a:b])
            h = _copied(act, h_)
            _products(h, down_t, y, experts, sizes)
            out.index_add_(0, token, _copied(y, wide_y_))
        ctx.save_for_backward(
            x, weights, gate_up, down, rows.choice.to(torch.int32), rows.padding, gu_ if save else None
        )
        ctx.blocks, ctx.longest = rows.blocks, rows.longest
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, choice, padding, saved = ctx.saved_tensors
        (T, K), (E, F2, D) = weights.shape, gate_up.shape
        f = F2 // 2
        w = _weights(weights, choice, padding)
        for_x, _, for_w, for_gate_up, for_down, _ = ctx.needs_input_grad
        dout = grads[0].contiguous()
        dx = w.new_zeros(T, D) if for_x else None
        dw = torch.empty_like(w)
        d_gate_up = torch.empty_like(gate_up) if for_gate_up else None
        d_down = torch.empty_like(down) if for_down else None
        (
            (xs_, dy_, dh_, h_, d_gu_, act_, d_act_, gu_),
            (wide_act_, wide_d_act_, wide_h_, wide_dh_, wide_gu_, wide_dy_),
        ) = _scratch(ctx.longest, x, (D, D, f, f, F2, f, f, F2 if saved is None else 0), w, (f, f, f, f, F2, D))
        if x.dtype == w.dtype:
            wide_act_, wide_d_act_, wide_h_, wide_dh_, wide_gu_, wide_dy_ = act_, d_act_, h_, dh_, d_gu_, dy_
        token_ = choice // K
        gate_up_e, down_e, gate_up_t = gate_up.unbind(0), down.unbind(0), gate_up.transpose(1, 2).unbind(0)
        d_gate_up_e = [] if d_gate_up is None else d_gate_up.unbind(0)
        d_down_e = [] if d_down is None else d_down.unbind(0)
        written = [False] * E
        for a, b, experts, sizes in ctx.blocks:
            n, token, w_ = b - a, token_[a:b], w[a:b]
            xs, dy, dh, act, d_act, product = xs_[:n], dy_[:n], dh_[:n], wide_act_[:n], wide_d_act_[:n], wide_h_[:n]
            torch.index_select(x, 0, token, out=xs)
            torch.index_select(dout, 0, token, out=dy)
            if saved is not None:
                gu = saved[a:b]
            else:
                gu = gu_[:n]
                _products(xs, gate_up_t, gu, experts, sizes)
            _products(dy, down_e, dh, experts, sizes)
            gate, up = _copied(gu, wide_gu_).chunk(2, 1)
            d_h = _copied(dh, wide_dh_)  # of the output before its combine weight
            d_gu = wide_gu_[:n]  # below float32 gate and up lie there: each is overwritten when it has served
            torch.ops.aten.silu.out(gate, out=act)
            torch.mul(d_h, up, out=d_act)
            torch.mul(d_act, act, out=product)
            torch.sum(product, 1, keepdim=True, out=dw[a:b])
            act.mul_(w_)
            d_act.mul_(w_)
            torch.mul(act, up, out=product)
            h = _copied(product, h_)
            torch.ops.aten.silu_backward.grad_input(d_act, gate, grad_input=d_gu[:, :f])
            torch.mul(d_h, act, out=d_gu[:, f:])
            d_gu = _copied(d_gu, d_gu_)
            pieces = [rows_of.split_with_sizes(sizes) for rows_of in (dy, h, d_gu, xs)]
            for e, dy_e, h_e, d_gu_e, xs_e in zip(experts, *pieces, strict=True):
                if d_down is not None:
                    _product(dy_e.t(), h_e, d_down_e[e], written[e])
                if d_gate_up is not None:
                    _product(d_gu_e.t(), xs_e, d_gate_up_e[e], written[e])
                written[e] = True
                if dx is not None:
                    torch.mm(d_gu_e, gate_up_e[e], out=dy_e)  # dy has served
            if dx is not None:
                dx.index_add_(0, token, _copied(dy, wide_dy_))
        for e in range(E):
            if not written[e]:  # no token came
                for results in (d_gate_up_e, d_down_e):
                    if results:
                        results[e].zero_()
        d_weights = None
        if for_w:
            valid = slice(None) if padding is None else ~padding
            d_weights = dw.new_empty(T * K).index_copy_(0, choice[valid].long(), dw[valid, 0]).view(T, K)
        return None if dx is None else dx.to(x.dtype), None, d_weights, d_gate_up, d_down, None


def _products(
    rows_in: Tensor, matrices: Sequence[Tensor], rows_out: Tensor, experts: Sequence[int], sizes: Sequence[int]
) -> None:
    """Each expert's rows times its matrix."""
    pieces = zip(experts, rows_in.split_with_sizes(sizes), rows_out.split_with_sizes(sizes), strict=True)
    for expert, piece_in, piece_out in pieces:
        torch.mm(piece_in, matrices[expert], out=piece_out)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """The product a b, into `out` or on top of it."""
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


BACKENDS: dict[str, Backend] = {
    "blocks": grouped_swiglu,
    "recompute": recomputed_swiglu,
    "grouped_mm": grouped_mm_swiglu,
    "reference": reference_swiglu,
}
GROUP = (
    "moeprune.expert_backends"  # entry points of others: functions with the arguments and result of `grouped_swiglu`
)


def find_backend(name: str) -> Backend:
    """The backend called `name`: one of `BACKENDS`, or one that an installed distribution registers in the group `GROUP`.

    Raises:
        UserError: nobody has it, more than one has, or it does not load.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    registered = entry_points(group=GROUP)
    found = [point for point in registered if point.name == name]
    if not found:
        raise UserError(suggest("expert_backend", name, sorted({*BACKENDS, *registered.names})))
    if len({point.value for point in found}) > 1:
        raise UserError(
            f"expert_backend {name!r} is registered twice: {', '.join(p.value for p in found)}; uninstall one"
        )
    try:
        backend: Backend = found[0].load()
    except Exception as error:  # a third party's import: name it
        raise UserError(
            f"expert_backend {name!r} ({found[0].value}) could not be loaded: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; mend or uninstall it, or use expert_backend=blocks"
        ) from error
    return backend


class Experts(nn.Module):
    """E SwiGLU experts as two tensors, in the layout of transformers 5.

    `backend` computes them and may be replaced at any time. `dispatcher` brings tokens to them: under expert parallelism the
    tensors hold this process's experts only.

    Args:
        n_experts: E.
        d_model: D.
        d_expert: F.
        output_std: standard deviation of the output projections at initialisation.
        backend: its name.
    """

    expert_dims = {"gate_up": 0, "down": 0}  # noqa: RUF012 (a constant of the class)

    def __init__(self, n_experts: int, d_model: int, d_expert: int, output_std: float, backend: str = "blocks") -> None:
        super().__init__()
        self.backend = find_backend(backend)
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
