"""Fully sharded data parallelism (torch's FSDP2) under Lightning: `--trainer.strategy=fsdp2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer

from moeprune.checkpoints import read_lightning
from moeprune.errors import UserError
from moeprune.model.transformer import Block, MoETransformer
from moeprune.parallel.dispatch import Sharded
from moeprune.parallel.pieces import Rows, spread
from moeprune.parallel.together import Together, check_names, local
from moeprune.pruning.plan import PrunePlan
from moeprune.pruning.surgery import apply_plan, replace_tensor

PRECISIONS = ("32-true", "bf16-mixed")


class FullyShardedStrategy(Together, ModelParallelStrategy):
    """Every process trains on its own share of the batch and holds its own share of every parameter.

    The parameters of a block are gathered when it runs and dropped after it, forward and backward; those of routers, embedding
    and head stay from the forward to the backward pass. A tensor is cut along its first dimension that the number of processes
    divides, so that shares stay equal whatever number of experts a prune leaves; where there is none, along its first. A run
    equals that of a single process with the same global batch, up to the order of sums.

    A prune takes one layer at a time: every process gathers its expert tensors and their optimizer state, cuts them, and keeps
    its share. The sharded parameters then move into a freshly built model, since a sharded module cannot change its shapes.

    Args:
        process_group_backend: nccl, gloo, ...; null for that of the device.
        timeout: of the process group.
    """

    strategy_name = "fsdp2"

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    # -- processes -----------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the process group and its mesh.

        Raises:
            UserError: a precision that was not tried.
        """
        if self.precision_plugin.precision not in PRECISIONS:
            raise UserError(
                f"the strategy `{self.strategy_name}` does not work with --trainer.precision={self.precision_plugin.precision}; use 32 or "
                f"bf16-mixed"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Evaluate without inference mode: the next training step could not use what it gathers."""
        validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    @property
    def mesh(self) -> Any:
        """All processes, in one row."""
        return self.device_mesh["data_parallel"]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """As under DDP: before, so that the model has the checkpoint's shapes when the optimizer is made."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As under DDP."""
        return True

    # -- sharding ------------------------------------------------------------------------------------------------------

    def _placement(self, parameter: Tensor) -> Shard:
        even = [dim for dim, size in enumerate(parameter.shape) if size % self.mesh.size() == 0]
        return Shard(even[0] if even else 0)

    def sharded(self, model: MoETransformer) -> MoETransformer:
        """The model itself, of whose parameters this process keeps its share."""
        for index, block in enumerate(model.blocks):
            self._shard_block(block, index)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False, shard_placement_fn=self._placement)
        register_fsdp_forward_method(model, "forward_with_routing")
        return model

    @contextmanager
    def building(self) -> Iterator[None]:
        """While the context lasts, a block is sharded as soon as it is built, before the next one is."""

        def built(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if isinstance(child, Block):
                self._shard_block(child, int(name))

        handle = register_module_module_registration_hook(built)
        try:
            yield
        finally:
            handle.remove()

    def _shard_block(self, block: Any, index: int) -> None:
        """Nothing, if it is sharded."""
        if isinstance(block, FSDPModule):
            return
        options: dict[str, Any] = {"mesh": self.mesh, "shard_placement_fn": self._placement}
        left_out = self._left_out(block, index)
        # balancing terms read a router's weights after the forward pass
        fully_shard(block.moe.router, reshard_after_forward=False, **options)
        fully_shard(block, reshard_after_forward=True, ignored_params=left_out, **options)

    def _left_out(self, block: Any, index: int) -> set[nn.Parameter]:
        """Parameters of a block that are not sharded."""
        return set()

    def _dealt(self) -> Mapping[str, Sharded]:
        """Of parameters, by name, that hold this process's experts only, who knows where the others are."""
        return {}

    def resized(self, model: MoETransformer, n_experts: Sequence[int]) -> MoETransformer:
        """A sharded model with other numbers of experts; its weights are still to be read."""
        new = self.sharded(skeleton(model, n_experts)).to_empty(device=self.root_device)
        keep_buffers(model, new, persistent=False)
        return new.train(model.training)

    def reshard(self) -> None:
        """Drop what an evaluation left gathered: routers, embedding, head."""
        for module in self._module.transformer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local_bytes(self) -> int:
        """What this process's share of the parameters takes."""
        self.reshard()
        return sum(local(p).untyped_storage().nbytes() for p in self._module.transformer.parameters())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Together`."""
        module, own = self._module, self._module.transformer
        self.reshard()
        state = self._gathered(own.state_dict(prefix="model."), self.root_device, self._dealt())
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if self.is_global_zero:
            model = skeleton(own, [layer.n_experts for layer in own.moe_layers])
            model.load_state_dict(state, assign=True)
            keep_buffers(own, model, persistent=False)
            for parameter in model.parameters():
                parameter.requires_grad_()
            module.model = model.train(own.training)
        del state
        try:
            yield
        finally:
            module.model = own

    def _gathered(
        self, tensors: Mapping[Any, Any], device: torch.device, dealt: Mapping[Any, Sharded]
    ) -> dict[Any, Any]:
        """On process 0 the whole tensors; on the others nothing. One at a time; collective.

        Args:
            tensors: DTensors, rows of experts, others that are the same on all processes; other values.
            device: where to.
            dealt: which of the tensors are rows of experts.
        """
        found = {}
        for name, value in tensors.items():
            full: Any = value
            if isinstance(value, DTensor):
                full = value.full_tensor()
            elif name in dealt and value.ndim and self.global_rank < dealt[name].size:
                full = dealt[name].gather(value)  # further processes hold the same experts once more
            if self.is_global_zero:
                found[name] = full.detach().to(device) if isinstance(full, Tensor) else full
        return found

    # -- gradients -----------------------------------------------------------------------------------------------------

    def clip_gradients_by_norm(self, optimizer: Optimizer, max_norm: float) -> None:
        """See `Together`."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        square = torch.zeros((), device=self.root_device)
        for parameter in parameters:
            square += local(parameter.grad).float().square().sum() / self._copies(parameter)
        dist.all_reduce(square)
        factor = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ has it
        for parameter in parameters:
            local(parameter.grad).mul_(factor)

    def _copies(self, parameter: Tensor) -> int:
        """How many processes have this process's share of a parameter."""
        return 1

    # -- the prune -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self, plan: PrunePlan, optimizers: Sequence[Optimizer]) -> None:
        """Carry a plan out, layer by layer. Collective; between optimizer steps, when gradients are used up: they are dropped."""
        old: MoETransformer = self._module.transformer
        self.reshard()
        for parameter in old.parameters():
            parameter.grad = None
        for index, layer in enumerate(old.moe_layers):
            one = of_layer(plan, [sorted(layer.ids) for layer in old.moe_layers], index)
            if one is None:
                continue
            cut = [(o, n) for o, n, _ in layer.expert_tensors() if isinstance(getattr(o, n), DTensor)]
            for owner, name in cut:
                replace_tensor(owner, name, lambda tensor: tensor.full_tensor(), optimizers)  # type: ignore[attr-defined]
            apply_plan(old, one, optimizers)
            for owner, name in cut:
                replace_tensor(owner, name, self._share, optimizers)
        new = self.sharded(skeleton(old, [layer.n_experts for layer in old.moe_layers]))
        for name, parameter in old.named_parameters():
            owner, leaf = owner_of(new, name)
            setattr(owner, leaf, parameter)
        for layer, renewed in zip(old.moe_layers, new.moe_layers, strict=True):
            renewed.experts.dispatcher = layer.experts.dispatcher
        keep_buffers(old, new, persistent=True)
        self._module.model = new.train(old.training)

    def _share(self, whole: Tensor) -> Tensor:
        """This process's share of a tensor that all have, in memory of its own."""
        placed = distribute_tensor(whole, self.mesh, [self._placement(whole)], src_data_rank=None)
        mine = placed.to_local().clone(memory_format=torch.contiguous_format)
        return DTensor.from_local(
            mine, self.mesh, placed.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """On process 0 as of a single process; in pieces: what this process holds. Collective."""
        self.reshard()
        return self._saved(self._module.state_dict(), self._dealt())

    def _saved(self, tensors: Mapping[Any, Any], dealt: Mapping[Any, Sharded]) -> dict[Any, Any]:
        if not self.sharded_checkpoints:
            return self._gathered(tensors, torch.device("cpu"), dealt)
        return {
            name: Rows(value.detach(), dealt[name].held) if name in dealt and value.ndim else value
            for name, value in tensors.items()
        }

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """See `lightning_module_state_dict`."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        state: dict[str, Any] = dict(optimizer.state_dict())
        dealt = dict(enumerate(self._dealers(optimizer)))
        state["state"] = {
            number: self._saved(values, {key: mine for key in values if (mine := dealt[number]) is not None})
            for number, values in state["state"].items()
        }
        return state

    def _dealers(self, optimizer: Optimizer) -> list[Sharded | None]:
        """Of every parameter of an optimizer, who knows where its rows are, if it holds those of this process's experts only."""
        self.reshard()
        dealt, names = self._dealt(), {p: name for name, p in self._module.named_parameters()}
        return [dealt.get(names[p]) for group in optimizer.param_groups for p in group["params"]]

    def _read(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        return read_lightning(path, weights=False)  # mapped into memory: a process reads no more than its share

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share."""
        own: dict[str, Tensor] = self._module.state_dict()
        check_names(own, checkpoint["state_dict"])
        self._fill(
            {name: (tensor, checkpoint["state_dict"][name], f"state_dict/{name}") for name, tensor in own.items()},
            self._dealt(),
        )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share."""
        for index, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            dealers = self._dealers(optimizer)
            mine: dict[Any, dict[str, Any]] = {}
            for number, values in state["state"].items():
                parameter, dealer = parameters[number], dealers[number]
                mine[number] = {}
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.ndim == 0:
                        mine[number][key] = value
                        continue
                    mine[number][key] = empty = torch.empty_like(parameter.detach())
                    where = f"optimizer_states/{index}/{number}/{key}"
                    self._fill({key: (empty, value, where)}, {} if dealer is None else {key: dealer})
            optimizer.load_state_dict({**state, "state": mine})

    def _fill(self, tensors: Mapping[str, tuple[Tensor, Tensor | None, str]], dealt: Mapping[str, Sharded]) -> None:
        """Read this process's share into tensors.

        Args:
            tensors: by name the tensor to fill; the whole one, None in pieces; its path in pieces.
            dealt: which of them take rows of experts.
        """
        direct: dict[str, Tensor] = {}
        for name, (target, whole, where) in tensors.items():
            if whole is not None:
                whole = dealt[name].scatter(whole) if name in dealt else spread(whole.to(target.device), target)
                target.copy_(whole)
            elif name in dealt:
                assert self._folder is not None
                target.copy_(self._folder.tensor(where, dealt[name].held))
            else:
                direct[where] = target
        if direct:
            assert self._folder is not None
            self._folder.fill(direct)


def skeleton(model: MoETransformer, n_experts: Sequence[int]) -> MoETransformer:
    """A model of the same configuration without memory."""
    with torch.device("meta"):
        return MoETransformer(model.config, n_experts)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter or buffer of this name, and the attribute."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def keep_buffers(old: nn.Module, new: nn.Module, persistent: bool) -> None:
    """Give `new` the buffers of `old`: all, or those that state_dict leaves out."""
    saved = new.state_dict().keys()
    for name, buffer in old.named_buffers():
        if persistent or name not in saved:
            owner, leaf = owner_of(new, name)
            setattr(owner, leaf, buffer)


def of_layer(plan: PrunePlan, now: Sequence[Sequence[int]], index: int) -> PrunePlan | None:
    """What a plan does in one layer, for a model with the experts `now`; None if that is nothing."""
    if tuple(now[index]) != plan.before[index]:
        raise UserError(f"the plan was made for other experts than layer {index} of this model has")
    merges = plan.merges[index] if plan.merges else ()
    if not merges and plan.kept[index] == plan.before[index]:
        return None
    here = tuple(map(tuple, now))
    return replace(
        plan,
        before=here,
        kept=tuple(plan.kept[index] if layer == index else ids for layer, ids in enumerate(here)),
        merges=tuple(merges if layer == index else () for layer in range(len(here))) if merges else (),
        removed_load=(),
    )


StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="parameters sharded over all processes (FSDP2)")
