"""Carries a plan out on a live model: expert tensors, router rows, biases, gradients, and the optimizers' state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeprune.errors import UserError
from moeprune.model.prunable import PrunableModel
from moeprune.pruning.merging import merge_experts
from moeprune.pruning.plan import PrunePlan


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
        if plan.merges:
            merge_experts(layer, plan.merges[index], plan.align)
        stay = set(kept)
        positions = [position for position, expert in enumerate(layer.ids) if expert in stay]
        if len(positions) == layer.n_experts:
            continue
        for owner, name, dim in list(layer.expert_tensors()):
            _cut(owner, name, dim, positions, optimizers)
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
                _cut(owner, name, dim, positions, [])
            layer.resized(len(positions))
        yield
    finally:
        for owner, name, tensor in saved:
            setattr(owner, name, tensor)
        for layer, n_experts in zip(model.moe_layers, sizes, strict=True):
            layer.resized(n_experts)


def _cut(owner: Any, name: str, dim: int, positions: list[int], optimizers: list[Optimizer]) -> None:
    old = getattr(owner, name)
    if old is None:
        return
    select = torch.tensor(positions, device=old.device)
    if not isinstance(old, nn.Parameter):
        setattr(owner, name, old.index_select(dim, select))
        return
    new = nn.Parameter(old.detach().index_select(dim, select), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad.index_select(dim, select)
    setattr(owner, name, new)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = {
                key: _cut_state(value, old, dim, select, f"{type(optimizer).__name__} state {key!r}")
                for key, value in optimizer.state.pop(old).items()
            }


def _cut_state(value: object, old: Tensor, dim: int, select: Tensor, what: str) -> object:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != old.shape:
        raise UserError(
            f"{what} has shape {tuple(value.shape)} for a parameter of shape {tuple(old.shape)} and cannot be cut; "
            f"use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )
    return value.index_select(dim, select)
