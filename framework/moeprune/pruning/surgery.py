"""Carries a plan out on a live model: expert tensors, router rows, biases, gradients, and the optimizers' state."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeprune.errors import UserError
from moeprune.model.transformer import MoETransformer
from moeprune.pruning.plan import PrunePlan


@torch.no_grad()
def apply_plan(model: MoETransformer, plan: PrunePlan, optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove from `model` the experts that `plan` does not keep, in place.

    Parameters that shrink become new Parameters, which take the old ones' places in the optimizers' parameter groups
    (schedules go on) with the survivors' moments. Layers that lose nothing are not touched. Call it for an EMA copy of
    the model as well.

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
    for layer, kept in zip(layers, plan.kept, strict=True):
        stay = set(kept)
        positions = [position for position, expert in enumerate(layer.ids) if expert in stay]
        if len(positions) == layer.n_experts:
            continue
        select = torch.tensor(positions, device=layer.expert_ids.device)
        for owner, name, dim in list(layer.expert_tensors()):
            _cut(owner, name, dim, select, optimizers)
        layer.router.n_experts = len(positions)


def _cut(owner: nn.Module, name: str, dim: int, select: Tensor, optimizers: list[Optimizer]) -> None:
    old = getattr(owner, name)
    if old is None:
        return
    if not isinstance(old, nn.Parameter):
        setattr(owner, name, old.index_select(dim, select))
        return
    new = nn.Parameter(old.index_select(dim, select), requires_grad=old.requires_grad)
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
