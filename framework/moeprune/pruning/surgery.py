"""Carries a plan out on a live model: expert tensors, router rows, biases, gradients, and the optimizers' state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeprune.errors import UserError
from moeprune.model.prunable import PrunableModel
from moeprune.parallel.dispatch import Dispatcher, Local
from moeprune.pruning.merging import merge_experts
from moeprune.pruning.plan import PrunePlan

_LOCAL = Local()


@torch.no_grad()
def apply_plan(model: PrunableModel, plan: PrunePlan, optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove from `model` the experts that `plan` does not keep, in place.

    Parameters that shrink become new Parameters, which take the old ones' places in the optimizers' parameter groups
    (schedules go on) with the survivors' moments. Layers that lose nothing are not touched. Call it for an EMA copy of
    the model as well. Where the plan merges experts, their weights are averaged first; the moments are the survivor's.

    Args:
        model: its layers' expert_ids are `plan.before`.
        plan: original ids to keep.
        optimizers: those that train the model.

    Raises:
        UserError: the plan was made for another model, or an optimizer's state cannot be cut.
    """
    optimizers = list(optimizers)
    layers = model.moe_layers
    if len(layers) != len(plan.kept):
        raise UserError(f"the plan has {len(plan.kept)} layers, the model has {len(layers)}")
    for index, (layer, before) in enumerate(zip(layers, plan.before, strict=True)):
        if tuple(sorted(layer.ids)) != before:
            raise UserError(f"the plan was made for other experts than layer {index} of this model has")
    for index, (layer, kept) in enumerate(zip(layers, plan.kept, strict=True)):
        if plan.merges and plan.merges[index]:
            with _dispatcher(layer.experts).everywhere(layer.experts):
                merge_experts(layer, plan.merges[index], plan.align)
        stay = set(kept)
        positions = [position for position, expert in enumerate(layer.ids) if expert in stay]
        if len(positions) == layer.n_experts:
            continue
        for owner, name, dim in list(layer.expert_tensors()):
            _cut(owner, name, dim, _dispatcher(owner).rows(positions), optimizers)
        _cut_dispatcher(layer.experts, positions)
        layer.resized(len(positions))


@contextmanager
def only(model: PrunableModel, kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """The model with only the experts of these original ids per layer, for as long as the context lasts.

    Afterwards its tensors are the very same objects as before.
    """
    saved: list[tuple[Any, str, Any]] = []
    sizes = [layer.n_experts for layer in model.moe_layers]
    try:
        for layer, ids in zip(model.moe_layers, kept, strict=True):
            stay = set(ids)
            positions = [position for position, expert in enumerate(layer.ids) if expert in stay]
            if len(positions) == layer.n_experts:
                continue
            for owner, name, dim in list(layer.expert_tensors()):
                saved.append((owner, name, getattr(owner, name)))
                _cut(owner, name, dim, _dispatcher(owner).rows(positions), [])
            if hasattr(layer.experts, "dispatcher"):
                saved.append((layer.experts, "dispatcher", layer.experts.dispatcher))
            _cut_dispatcher(layer.experts, positions)
            layer.resized(len(positions))
        yield
    finally:
        for owner, name, tensor in saved:
            setattr(owner, name, tensor)
        for layer, n_experts in zip(model.moe_layers, sizes, strict=True):
            layer.resized(n_experts)


def _dispatcher(owner: Any) -> Dispatcher:
    """Where the rows of an owner's tensors live: all of them here, unless it says otherwise."""
    found: Dispatcher = getattr(owner, "dispatcher", _LOCAL)
    return found


def _cut_dispatcher(experts: Any, positions: list[int]) -> None:
    if hasattr(experts, "dispatcher"):
        experts.dispatcher = experts.dispatcher.cut(positions)


def _cut(owner: Any, name: str, dim: int, positions: list[int], optimizers: list[Optimizer]) -> None:
    old = getattr(owner, name)
    if old is None:
        return
    select = torch.tensor(positions, dtype=torch.int64, device=old.device)
    replace_tensor(owner, name, lambda tensor: tensor.index_select(dim, select), optimizers)


def replace_tensor(owner: Any, name: str, change: Callable[[Tensor], Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Put `change` of a tensor in its place. A parameter becomes a new one, which takes the old one's place in the optimizers'
    parameter groups; its gradient and the optimizers' state are changed alike, always in the same order.

    Raises:
        UserError: an optimizer's state has another shape than its parameter.
    """
    old = getattr(owner, name)
    if not isinstance(old, nn.Parameter):
        setattr(owner, name, change(old))
        return
    new = nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = change(old.grad)
    setattr(owner, name, new)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = {
                key: change(value)
                if of_parameters_shape(value, old, f"{type(optimizer).__name__} state {key!r}")
                else value
                for key, value in optimizer.state.pop(old).items()
            }


def of_parameters_shape(value: object, parameter: Tensor, what: str) -> TypeGuard[Tensor]:
    """Whether a value of an optimizer's state has one entry per weight; numbers have not.

    Raises:
        UserError: a tensor of another shape, which nobody can cut; `what` names it.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    if value.shape != parameter.shape:
        raise UserError(
            f"{what} has shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)} and cannot be cut; "
            f"use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )
    return True
