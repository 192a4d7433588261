"""Brings tokens to the experts they chose and the outputs back: one small interface, on one process or over several.

    Local       all experts are here: nothing moves
    Sharded     what every dispatcher over several processes shares: the layout, and how expert tensors are gathered
    AllToAll    torch.distributed.all_to_all_single, on any backend

A faster dispatcher (DeepEP, symmetric memory) derives from `Sharded` and writes `dispatch` and `combine`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeprune.parallel.layout import Layout


class Dispatcher(ABC):
    """Called by `Experts` around the computation of the experts that live here."""

    @abstractmethod
    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The work of this process's experts: arguments for the backend, and what `combine` needs.

        Args:
            x: [T, D] tokens of this process.
            indices: [T, K] positions (0 ... E-1, over all processes) of the chosen experts.
            weights: [T, K] combine weights.

        Returns:
            rows [R, D], the local expert of each [R, K'] (0 ... number of experts here - 1), weights [R, K'], and a handle.
        """

    @abstractmethod
    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """[T, D] for the tokens of this process from y [R, D]; does not depend on where the experts live."""

    def rows(self, positions: Sequence[int]) -> list[int]:
        """The rows of this process's expert tensors that hold any of these positions."""
        return list(positions)

    def cut(self, positions: Sequence[int]) -> Dispatcher:
        """The dispatcher once only the experts at these positions (ascending) are left."""
        return self

    @contextmanager
    def everywhere(self, experts: nn.Module) -> Iterator[None]:
        """While the context lasts, every process holds all experts; what it changed in them is kept afterwards."""
        yield


class Local(Dispatcher):
    """All experts are here."""

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The arguments themselves."""
        return x, indices, weights, None

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """`y` itself."""
        return y


class Sharded(Dispatcher):
    """Experts spread over the processes of a group.

    Args:
        layout: which process holds which.
        group: the processes.
    """

    def __init__(self, layout: Layout, group: dist.ProcessGroup) -> None:
        self.layout, self.group = layout, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.counts = list(layout.counts)
        self._slots: dict[torch.device, Tensor] = {}
        self._owners: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: object) -> Sharded:
        return self  # immutable, and a process group cannot be copied

    @property
    def held(self) -> tuple[int, ...]:
        """Positions of the experts of this process."""
        return self.layout.ranks[self.rank]

    def slots(self, device: torch.device) -> Tensor:
        """[E] int64: where the expert at each position stands in the layout's order."""
        if device not in self._slots:
            self._slots[device] = _index(self.layout.slots, device)
        return self._slots[device]

    def owners(self, device: torch.device) -> Tensor:
        """[E] int64: the process of each slot."""
        if device not in self._owners:
            owners = [rank for rank, count in enumerate(self.counts) for _ in range(count)]
            self._owners[device] = _index(owners, device)
        return self._owners[device]

    def rows(self, positions: Sequence[int]) -> list[int]:
        """See `Dispatcher.rows`."""
        return self.layout.rows(self.rank, positions)

    def cut(self, positions: Sequence[int]) -> Sharded:
        """See `Dispatcher.cut`."""
        return type(self)(self.layout.cut(positions), self.group)

    def placed(self, layout: Layout) -> Sharded:
        """The dispatcher for another layout of the same experts."""
        return type(self)(layout, self.group)

    def gather(self, tensor: Tensor) -> Tensor | None:
        """Rows of all processes in order of position, on the first process of the group; None on the others. Collective."""
        send = [len(tensor), *[0] * (self.size - 1)]
        receive = self.counts if self.rank == 0 else [0] * self.size
        rows = tensor.new_empty(sum(receive), *tensor.shape[1:])
        dist.all_to_all_single(rows, tensor.detach().contiguous(), receive, send, group=self.group)
        return None if self.rank else rows.index_select(0, self.slots(rows.device))

    def gather_everywhere(self, tensor: Tensor) -> Tensor:
        """Rows of all processes in order of position, on every process. Collective."""
        parts = []
        for rank, count in enumerate(self.counts):
            part = tensor.detach().contiguous() if rank == self.rank else tensor.new_empty(count, *tensor.shape[1:])
            if count:
                dist.broadcast(part, group=self.group, group_src=rank)
            parts.append(part)
        return torch.cat(parts).index_select(0, self.slots(tensor.device))

    def scatter(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor with all experts, which every process has."""
        return tensor.index_select(0, _index(self.held, tensor.device))

    def move(self, tensor: Tensor, to: Layout) -> Tensor:
        """This process's rows under the layout `to`, from its rows under this one: bits are copied. Collective."""
        holder = {position: rank for rank, row in enumerate(to.ranks) for position in row}
        leaving = sorted(range(len(self.held)), key=lambda row: holder[self.held[row]])  # a stable sort
        send = [sum(holder[position] == rank for position in self.held) for rank in range(self.size)]
        arriving = [p for row in self.layout.ranks for p in row if holder[p] == self.rank]
        receive = [sum(holder[p] == self.rank for p in row) for row in self.layout.ranks]
        rows = tensor.new_empty(sum(receive), *tensor.shape[1:])
        sent = tensor.detach().index_select(0, _index(leaving, tensor.device))
        dist.all_to_all_single(rows, sent, receive, send, group=self.group)
        row_of = {position: row for row, position in enumerate(arriving)}
        return rows.index_select(0, _index([row_of[p] for p in to.ranks[self.rank]], tensor.device))

    @contextmanager
    def everywhere(self, experts: nn.Module) -> Iterator[None]:
        """See `Dispatcher.everywhere`."""
        own = dict(experts.named_parameters(recurse=False))
        for name, parameter in own.items():
            setattr(experts, name, nn.Parameter(self.gather_everywhere(parameter)))
        experts.dispatcher = Local()  # type: ignore[assignment]
        try:
            yield
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(self.scatter(getattr(experts, name)))
        finally:
            for name, parameter in own.items():
                setattr(experts, name, parameter)
            experts.dispatcher = self  # type: ignore[assignment]


class AllToAll(Sharded):
    """One row per token and chosen expert, sorted by destination, through `all_to_all_single` with uneven splits.

    The combine weight travels with its row, so that the owner of the expert applies it and nothing of size [T K, D] is kept
    for the backward pass on the sender. A token's K outputs are added in the order of its choices. The backward pass sends
    gradients the opposite way; all processes must run the same number of passes.
    """

    def dispatch(self, x: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """See `Dispatcher.dispatch`; K' = 1."""
        slots = self.slots(x.device)[indices.reshape(-1)].to(torch.int32)
        order = slots.argsort(stable=True)
        sent = torch.bincount(slots, minlength=self.layout.n_experts)
        here = self.counts[self.rank]
        received = sent.new_empty(self.size * here)
        dist.all_to_all_single(received, sent, [here] * self.size, self.counts, group=self.group)
        to_rank = sent.new_zeros(self.size).index_add_(0, self.owners(x.device), sent)
        per_rank = torch.cat([to_rank, received.view(self.size, here).sum(1)])
        both = per_rank.tolist()  # one transfer from the device
        send, receive = both[: self.size], both[self.size :]
        rows = _Exchange.apply(_Spread.apply(x, order, indices.shape[1]), receive, send, self.group)  # type: ignore[no-untyped-call]
        moved = _Exchange.apply(weights.reshape(-1).index_select(0, order), receive, send, self.group)  # type: ignore[no-untyped-call]
        local = torch.arange(here, device=x.device).repeat(self.size).repeat_interleave(received)
        return rows, local[:, None], moved[:, None], (order, send, receive, indices.shape)

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """See `Dispatcher.combine`."""
        order, send, receive, (T, K) = handle
        back = _Exchange.apply(y, send, receive, self.group)  # type: ignore[no-untyped-call]
        chosen = back.new_zeros(T * K, y.shape[1]).index_copy(0, order, back)
        out: Tensor = chosen.view(T, K, y.shape[1]).sum(1)
        return out


class _Spread(torch.autograd.Function):
    """A row per token and choice, in `order`; the K gradients of a token are added in the order of its choices, wherever they
    come from, which index_select's own backward does not do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape = (len(x), K, x.shape[1])
        return x.index_select(0, order // K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        T, K, D = ctx.shape
        rows = grads[0].new_zeros(T * K, D).index_copy_(0, order, grads[0])
        return rows.view(T, K, D).sum(1), None, None


class _Exchange(torch.autograd.Function):
    """all_to_all_single of rows; its gradient is the exchange the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = grads[0].new_empty(sum(ctx.send), *grads[0].shape[1:])
        dist.all_to_all_single(out, grads[0].contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)
