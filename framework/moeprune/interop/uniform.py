"""The uniform view: layers of unequal size padded to the largest with experts that can never be chosen, so that stock code loads
them.

A linear router without bias cannot bury a padding row: its logit changes sign with the token. A router that adds a bias before
it chooses can (DeepSeek-V3, GLM-4.5, ERNIE-4.5, gpt-oss, ...), and is exact where the weights of the chosen experts do not depend on the
others: sigmoid scores, or softmax renormalised over the chosen. (Not where softmax probabilities compete with unequal biases, as in
ERNIE-4.5: padding shrinks the probabilities and not the biases.) Whether that holds is not assumed but tried out on the routers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from moeprune.errors import UserError
from moeprune.interop.transformers import TransformersLayer, TransformersModel

BURIED = -1e4  # added to a padding expert's score; scores are probabilities, or logits far smaller than this
TOKENS = 512


@torch.no_grad()
def pad(model: TransformersModel) -> list[list[int]]:
    """Pad every MoE layer of `model`, in place, to the size of the largest.

    Returns:
        Per layer the original id at every position, -1 for padding.

    Raises:
        UserError: the family's router cannot bury a padding expert exactly; why is said.
    """
    groups = model.n_groups
    size = max(layer.n_experts for layer in model.moe_layers) // groups
    positions = []
    for layer in model.moe_layers:
        each = layer.n_experts // groups
        order = [
            group * each + i if i < each else -1 for group in range(groups) for i in range(size)
        ]  # position before padding
        before = copy.deepcopy(layer.block)
        if -1 in order:
            _pad_layer(model, layer, order)
            _try_out(layer, before, order)
        positions.append([-1 if p < 0 else layer.ids[p] for p in order])
    return positions


def _pad_layer(model: TransformersModel, layer: TransformersLayer, order: list[int]) -> None:
    bury = [
        path
        for path, dim in layer.where.tensors.items()
        if not path.startswith(f"{layer.where.experts}.") and "bias" in path.rpartition(".")[2]
    ]
    if len(bury) != 1:
        raise UserError(
            f"a uniform view of {layer.where.block} would not be exact: its router ({type(layer.router).__name__}) adds no bias per "
            f"expert before it chooses, so a padding expert could be chosen; keep the unequal layers (leave out --uniform-view), or "
            f"prune every layer to the same number"
        )
    select = torch.tensor([max(p, 0) for p in order])
    padding = torch.tensor([p < 0 for p in order])
    for path, dim in layer.where.tensors.items():
        owner_path, _, name = path.rpartition(".")
        owner = model.model.get_submodule(owner_path)
        old: Tensor = getattr(owner, name)
        new = old.index_select(dim, select.to(old.device))
        shape = [1] * new.ndim
        shape[dim] = -1
        at = padding.view(shape).to(old.device)
        if path == bury[0]:
            new = new.masked_fill(at, BURIED)
        elif path.startswith(f"{layer.where.experts}."):
            new = new.masked_fill(at, 0.0)
        # other rows stay those of a real expert: a softmax over all of them cannot underflow on the real ones alone
        setattr(
            owner, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    layer.resized(len(order))


def _try_out(layer: TransformersLayer, before: nn.Module, order: list[int]) -> None:
    """Route random tokens as before and after padding: the same experts, with the same weights.

    Raises:
        UserError: they differ.
    """
    parameter = next(layer.experts.parameters())
    width = layer.weights()["up"].shape[2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, width, generator=generator).to(parameter.device, parameter.dtype)
    for scale in (0.1, 1.0, 30.0):
        after = _routed(layer.block, layer, x * scale, len(order))
        was = _routed(before, layer, x * scale, len(order), order)
        if not torch.allclose(after, was, rtol=1e-5, atol=1e-6):
            raise UserError(
                f"a uniform view of {layer.where.block} would not be exact: the weights that its router "
                f"({type(layer.router).__name__}) gives to the chosen experts change when others are added; keep the unequal layers "
                f"(leave out --uniform-view)"
            )


def _routed(block: nn.Module, layer: TransformersLayer, x: Tensor, n: int, order: list[int] | None = None) -> Tensor:
    """[TOKENS, n] weight per expert, as the block hands it to its experts; positions as after padding."""
    experts = block.get_submodule(layer.where.experts.removeprefix(f"{layer.where.block}."))
    calls: list[tuple[Tensor, Tensor]] = []

    def spy(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((args[1], args[2]))

    hook = experts.register_forward_pre_hook(spy)
    try:
        block(x)
    finally:
        hook.remove()
    ((indices, weights),) = calls
    if order is not None:
        new = torch.tensor([order.index(p) for p in range(max(order) + 1)], device=indices.device)
        indices = new[indices]
    return torch.zeros(len(indices), n, device=weights.device, dtype=torch.float32).scatter_add_(
        1, indices, weights.float()
    )
