"""A transformers model as pruning sees it: its MoE layers are found by structure, not by a list of names.

Every MoE family of transformers 5 stores its experts as fused parameters in a module that is called as
`experts(hidden, indices, weights)`. Which other tensors and numbers depend on the number of experts is found by building the
configuration twice without memory (torch's meta device), with E and with 2 E experts: a dimension that doubles counts experts,
an attribute that doubles is set when experts go. Routing is whatever the model's own router returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import UserError

COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "moe_num_routed_experts",
    "num_moe_experts",
)
GROUPS = ("num_group", "n_group", "n_groups")
_FIELDS: dict[Any, str] = {}  # what `count_field` found


@dataclass
class Tensors:
    """Where one MoE layer is, and what in it depends on the number of experts; paths are relative to the model.

    Args:
        block: path of the smallest module that holds the experts and their router.
        experts: path of the experts.
        router: path of the router.
        tensors: path -> dimension that counts experts.
        attributes: (path of the module, name) of every number that is the number of experts.
    """

    block: str
    experts: str
    router: str
    tensors: dict[str, int]
    attributes: list[tuple[str, str]]


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def count_field(config: Any) -> str:
    """The name under which `config` keeps its number of experts: the one that changes the model's shapes.

    Raises:
        UserError: it has none.
    """
    text = text_config(config)
    present = [name for name in COUNTS if isinstance(getattr(text, name, None), int) and getattr(text, name) > 0]
    key = (type(text), tuple((name, getattr(text, name)) for name in present))
    if key not in _FIELDS:
        shapes = {name: tensor.shape for name, tensor in _tensors(on_meta(config))} if len(present) > 1 else {}
        for name in present:
            changed = copy.deepcopy(config)
            setattr(text_config(changed), name, 2 * getattr(text, name))
            if len(present) == 1 or any(shapes[n] != t.shape for n, t in _tensors(on_meta(changed))):
                _FIELDS[key] = name
                break
        else:
            raise UserError(
                f"the configuration of model type {config.model_type!r} has no number of experts that shapes the model (looked "
                f"for {', '.join(COUNTS)}); it is no Mixture-of-Experts model, or not of a family that moeprune can prune"
            )
    return _FIELDS[key]


def with_experts(config: Any, n_experts: int) -> Any:
    """A copy of `config` for another number of experts."""
    changed = copy.deepcopy(config)
    setattr(text_config(changed), count_field(config), n_experts)
    return changed


def on_meta(config: Any) -> nn.Module:
    """The model of `config` without memory."""
    import transformers

    library: Any = transformers
    with torch.device("meta"):
        model: nn.Module = library.AutoModelForCausalLM.from_config(config)
    return model


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts behind the seam of transformers 5."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "down_proj"))


def locate(config: Any) -> list[Tensors]:
    """Every MoE layer of the model that `config` describes, in order.

    Raises:
        UserError: a family that is not supported; the module at which the search stopped is named.
    """
    n_experts = getattr(text_config(config), count_field(config))
    if not isinstance(n_experts, int):
        raise UserError(
            f"{count_field(config)} of {config.model_type!r} is {n_experts!r}, not one number; not supported"
        )
    here, twice = on_meta(config), on_meta(with_experts(config, 2 * n_experts))
    family = f"model type {config.model_type!r}"
    dims: dict[str, int] = {}
    others = dict(_tensors(twice))
    for name, tensor in _tensors(here):
        shape, doubled = tuple(tensor.shape), tuple(others[name].shape)
        if shape == doubled:
            continue
        changed = [d for d, (a, b) in enumerate(zip(shape, doubled, strict=True)) if a != b]
        if len(changed) != 1 or (shape[changed[0]], doubled[changed[0]]) != (n_experts, 2 * n_experts):
            raise UserError(
                f"{family} is not supported: at {name} the shape goes from {shape} to {doubled} when the number of experts "
                f"doubles, so it does not hold one entry per expert"
            )
        dims[name] = changed[0]
    modules, doubles = dict(here.named_modules()), dict(twice.named_modules())
    found = [name for name, module in modules.items() if is_experts(module)]
    if not found:
        raise UserError(
            f"{family} is not supported: no module holds fused experts called as experts(hidden, indices, weights); "
            f"the search ended at {here.__class__.__name__}"
        )
    layers = []
    claimed: set[str] = set()
    for path in found:
        block = path.rpartition(".")[0]
        own = {name: dim for name, dim in dims.items() if name.startswith(f"{block}.")}
        claimed |= own.keys()
        outside = [name for name in own if not name.startswith(f"{path}.")]
        rows = [name for name in outside if modules_tensor(here, name).ndim == 2]
        routers = {f"{block}.{name.removeprefix(f'{block}.').partition('.')[0]}" for name in rows}
        if len(routers) != 1:
            raise UserError(
                f"{family} is not supported: {block} ({type(modules[block]).__name__}) holds {len(routers)} modules with a row "
                f"per expert beside its experts, expected one router"
            )
        attributes = [
            (name, attribute)
            for name, module in modules.items()
            if name == block or name.startswith(f"{block}.")
            for attribute, value in vars(module).items()
            if type(value) is int and value == n_experts and vars(doubles[name]).get(attribute) == 2 * n_experts
        ]
        layers.append(Tensors(block, path, routers.pop(), own, attributes))
    if stray := sorted(dims.keys() - claimed):
        raise UserError(f"{family} is not supported: {stray[0]} depends on the number of experts outside any MoE layer")
    return layers


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def modules_tensor(model: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), name)
    return tensor


class TransformersLayer:
    """One MoE layer of a transformers model; see `PrunableLayer`.

    Args:
        model: the whole one.
        where: from `locate`.
        n_original: experts before any pruning.
        expert_ids: original ids of the experts it has now; all of them by default.
    """

    def __init__(
        self, model: TransformersModel, where: Tensors, n_original: int, expert_ids: list[int] | None = None
    ) -> None:
        self._model, self.where, self.n_original = model, where, n_original
        self.expert_ids = torch.arange(n_original) if expert_ids is None else torch.tensor(expert_ids)
        self.block = model.model.get_submodule(where.block)
        self.experts = model.model.get_submodule(where.experts)
        self.router = model.model.get_submodule(where.router)

    @property
    def ids(self) -> tuple[int, ...]:
        """See `PrunableLayer`."""
        return tuple(self.expert_ids.tolist())

    @property
    def n_experts(self) -> int:
        """See `PrunableLayer`."""
        return len(self.expert_ids)

    @property
    def residual_norm(self) -> nn.Module:
        """See `PrunableLayer`; found by running two tokens through the model.

        Raises:
            UserError: no module's output is this layer's input.
        """
        return self._model.norms()[self.where.block]

    def logits_of(self, routed: Any) -> tuple[Tensor, Tensor]:
        """See `PrunableLayer`. The probabilities are the function of the logits (softmax, sigmoid, or themselves) whose ratios
        between the chosen experts are those of the weights that the router returned.

        Raises:
            UserError: none of them is; only the weight really used is known then.
        """
        logits, weights, indices = (tensor.reshape(-1, tensor.shape[-1]) for tensor in routed[:3])
        logits = logits.float()
        share = weights.float() / weights.float().sum(1, keepdim=True)
        for probs in (logits.softmax(-1), logits.sigmoid(), logits):
            chosen = probs.gather(1, indices)
            if torch.allclose(
                chosen / chosen.sum(1, keepdim=True), share, atol=2e-2 if weights.dtype != torch.float32 else 1e-4
            ):
                return logits, probs
        if self._model.needs_probabilities:
            raise UserError(
                f"the router {self.where.router} ({type(self.router).__name__}) weights experts by neither softmax nor sigmoid "
                f"of its logits; use --gate=weight"
            )
        return logits, logits

    def weights(self) -> Mapping[str, Tensor]:
        """See `PrunableLayer`; biases come along as `gate_bias`, `up_bias` [E, F], `down_bias` [E, D]."""
        experts: Any = self.experts
        found: dict[str, Tensor] = {}

        def stands(w: Tensor) -> Tensor:  # [E, out, in]
            return w.transpose(1, 2) if experts.is_transposed else w

        if experts.has_gate:
            both = stands(experts.gate_up_proj)
            split = both.chunk(2, 1) if experts.is_concatenated else (both[:, ::2], both[:, 1::2])
            found |= {"gate": split[0], "up": split[1]}
            bias = getattr(experts, "gate_up_proj_bias", None)
            if bias is not None:
                halves = bias.chunk(2, 1) if experts.is_concatenated else (bias[:, ::2], bias[:, 1::2])
                found |= {"gate_bias": halves[0], "up_bias": halves[1]}
        else:
            found["up"] = stands(experts.up_proj)
            if getattr(experts, "up_proj_bias", None) is not None:
                found["up_bias"] = experts.up_proj_bias
        found["down"] = stands(experts.down_proj)
        if getattr(experts, "down_proj_bias", None) is not None:
            found["down_bias"] = experts.down_proj_bias
        rows = [
            modules_tensor(self._model.model, name)
            for name, dim in self.where.tensors.items()
            if name.startswith(f"{self.where.router}.") and dim == 0
        ]
        matrices = [row for row in rows if row.ndim == 2]
        if len(matrices) == 1:
            found["router"] = matrices[0]
        return found

    def expert_tensors(self) -> Iterator[tuple[Any, str, int]]:
        """See `PrunableLayer`."""
        yield self, "expert_ids", 0
        for path, dim in self.where.tensors.items():
            owner, _, name = path.rpartition(".")
            yield self._model.model.get_submodule(owner), name, dim

    def expert_parameters(self) -> Mapping[str, tuple[Tensor, int]]:
        """See `PrunableLayer`."""
        prefix = f"{self.where.experts}."
        return {
            path.removeprefix(prefix): (modules_tensor(self._model.model, path), dim)
            for path, dim in self.where.tensors.items()
            if path.startswith(prefix)
        }

    def resized(self, n_experts: int) -> None:
        """See `PrunableLayer`."""
        for path, attribute in self.where.attributes:
            setattr(self._model.model.get_submodule(path), attribute, n_experts)


class TransformersModel:
    """A transformers causal language model as a `PrunableModel`.

    Args:
        model: loaded by transformers, of the configuration's full number of experts unless `expert_ids` is given.
        expert_ids: per MoE layer the original ids of its experts, for a model that was pruned before.
        n_original: experts per layer before any pruning; default: what the configuration says.

    Raises:
        UserError: a family that is not supported.
    """

    def __init__(self, model: Any, expert_ids: list[list[int]] | None = None, n_original: int | None = None) -> None:
        self.model = model
        self.config = model.config
        self.n_original: int = n_original or getattr(text_config(self.config), count_field(self.config))
        self.where = locate(with_experts(self.config, self.n_original))
        if expert_ids is not None and len(expert_ids) != len(self.where):
            raise UserError(f"expert_ids hold {len(expert_ids)} layers, the model has {len(self.where)} MoE layers")
        self.moe_layers = [
            TransformersLayer(self, where, self.n_original, None if expert_ids is None else expert_ids[index])
            for index, where in enumerate(self.where)
        ]
        self.needs_probabilities = False
        self._norms: dict[str, nn.Module] = {}
        if hasattr(text_config(self.config), "output_router_logits"):
            text_config(self.config).output_router_logits = False  # its loss cannot take layers of unequal size

    @property
    def training(self) -> bool:
        """As nn.Module."""
        mode: bool = self.model.training
        return mode

    def train(self, mode: bool = True) -> Any:
        """As nn.Module."""
        return self.model.train(mode)

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def top_k(self) -> int:
        """See `PrunableModel`."""
        first: Any = self.moe_layers[0].router
        if type(first).__name__ == "PhimoeTopKRouter":
            return 2  # it picks two, whatever the configuration says
        for holder in (first, self.moe_layers[0].block, text_config(self.config)):
            for name in ("top_k", "num_experts_per_tok", "moe_topk", "top_k_experts"):
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    return value
        raise UserError(f"cannot find the number of experts per token of model type {self.config.model_type!r}")

    @property
    def _groups(self) -> int | None:
        """Groups of the router, of which there may be one; None if it looks at none."""
        router = self.moe_layers[0].router
        if getattr(router, "topk_method", "group") == "greedy":
            return None
        return next((v for name in GROUPS if isinstance(v := getattr(router, name, None), int)), None)

    @property
    def n_groups(self) -> int:
        """See `PrunableModel`."""
        return self._groups or 1

    @property
    def min_experts(self) -> int:
        """See `PrunableModel`: group-limited routers look at the two best experts of each group, also where there is one."""
        groups = self._groups
        if groups is None:
            return self.top_k
        chosen = min(groups, getattr(self.moe_layers[0].router, "topk_group", groups))
        return groups * max(2, -(-self.top_k // chosen))

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `PrunableModel`."""
        real = None if mask is None else mask.long()
        out: Tensor = self.model(input_ids=tokens, attention_mask=real, use_cache=False).logits
        return out

    @torch.no_grad()
    def norms(self, run: Callable[[], object] | None = None) -> dict[str, nn.Module]:
        """Per MoE block the module whose output is the block's input.

        Args:
            run: runs the model, or those of its layers that are looked for; default: two tokens through the whole model.

        Raises:
            UserError: no such module.
        """
        if run is None and self._norms:
            return self._norms
        last: dict[int, tuple[nn.Module, Tensor]] = {}  # by address, which stays taken as long as the tensor is held

        def made(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                last[out.data_ptr()] = (module, out)

        found: dict[str, nn.Module] = {}

        def enters(layer: TransformersLayer) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                norm = last.get(x.data_ptr(), (None,))[0]
                if norm is None and layer.block is not self.model:
                    norm = layer.block  # norms come after the block: its input is the residual stream
                if norm is None or isinstance(norm, nn.Linear):  # a projection into a latent space
                    raise UserError(
                        f"cannot find the residual stream before {layer.where.block} ({type(layer.block).__name__}); "
                        f"leave out the statistics that read it"
                    )
                found[layer.where.block] = norm

            return hook

        hooks = [layer.experts.register_forward_pre_hook(enters(layer), with_kwargs=True) for layer in self.moe_layers]
        leaves = [module for module in self.model.modules() if not list(module.children())]
        hooks += [module.register_forward_hook(made) for module in leaves]
        try:
            if run is None:
                self.logits(torch.zeros(1, 2, dtype=torch.int64, device=self.device))
            else:
                run()
        finally:
            for hook in hooks:
                hook.remove()
        self._norms |= found
        return self._norms
