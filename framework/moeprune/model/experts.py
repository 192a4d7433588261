"""The experts of a layer: y_t = sum_k w_tk * down_e (silu(gate_e x_t) * up_e x_t), e = indices[t, k].

    blocks      sorts the tokens by expert; one matrix product per expert and projection over blocks of rows that fit the
                cache; saves only the gate/up projections for the backward pass, and takes the gradient of the combine
                weights from products it has anyway. The default.
    recompute   the same, bit for bit, but saves its arguments alone and computes the projections again.
    grouped_mm  torch.nn.functional.grouped_mm over all rows at once, under plain autograd; the counts stay on the device.
    reference   three loops, the slow and obvious version that the others are tested against.
    compiled    (a plug-in, moeprune_plugins/expert_backends) `blocks` with what lies between the products in C.

Floor: 6 T K D F FLOP forward, twice that backward; weights are read once forward and once backward, their
gradients written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.errors import UserError, suggest
from moeprune.model.blocks import each_swiglu, in_blocks
from moeprune.model.rows import multiple_of, padded
from moeprune.parallel.dispatch import Dispatcher, Local

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # arguments and result of `in_blocks`


def reference_swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Three loops anyone can believe: experts, tokens, choices. Shapes as in `in_blocks`."""
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


def grouped_mm_swiglu(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` under plain autograd: the backend `grouped_mm`. Shapes as in `in_blocks`.

    Nothing waits for the device: where an expert's rows end is found on it. Keeps 3.5 to 4 times as much for the
    backward pass as `blocks`. float64 and rows that are no multiple of 16 bytes, which grouped_mm refuses, go to `blocks`.
    """
    D, width = down.shape[1:]
    if x.dtype == torch.float64 or (D * x.element_size()) % 16 or (width * x.element_size()) % 16 or not x.numel():
        return in_blocks(x, indices, weights, gate_up, down)
    T, K = indices.shape
    ids, choice = indices.reshape(-1).to(torch.int32).sort(stable=True)
    w = weights.reshape(-1)
    multiple = multiple_of(x)
    if multiple > 1:
        sizes, choice, padding = padded(torch.bincount(ids, minlength=len(down)), choice, multiple)
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


BACKENDS: dict[str, Backend] = {
    "blocks": in_blocks,
    "recompute": partial(in_blocks, recompute=True),
    "grouped_mm": grouped_mm_swiglu,
    "reference": reference_swiglu,
}
GROUP = "moeprune.expert_backends"  # entry points of others: functions with the arguments and result of `in_blocks`


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
    except UserError:
        raise
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
