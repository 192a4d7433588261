"""Expert parallelism under Lightning: `--trainer.strategy=ep`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moeprune.errors import UserError
from moeprune.model.experts import Experts
from moeprune.parallel.dispatch import AllToAll, Local, Sharded
from moeprune.parallel.layout import Layout
from moeprune.parallel.pieces import Rows
from moeprune.parallel.together import Together, check_names
from moeprune.pruning.surgery import of_parameters_shape, replace_tensor

LAYOUT = "expert_layout"  # key in a checkpoint: per layer the layout, when it was written under expert parallelism


class ExpertParallel(Together):
    """What strategies share under which every process holds its own experts.

    The world is cut into groups of `ep_size` neighbouring processes; a group holds all experts, and the gradients of an expert are
    averaged over the groups.

    Args:
        ep_size: processes that share the experts; divides the number of processes; null for all of them.
        dispatcher: makes the dispatcher of a layer from its layout and the process group.
        kwargs: as for the base that it is mixed into.

    Raises:
        UserError: ep_size < 1.
    """

    _timeout: timedelta | None

    def __init__(
        self,
        ep_size: int | None = None,
        dispatcher: Callable[[Layout, dist.ProcessGroup], Sharded] = AllToAll,
        **kwargs: Any,
    ) -> None:
        if ep_size is not None and ep_size < 1:
            raise UserError(f"ep_size must be at least 1, got {ep_size}")
        super().__init__(**kwargs)
        self._wanted, self._dispatcher = ep_size, dispatcher
        self._saved_layouts: list[list[list[int]]] = []
        # of this process: those that share the experts, those with the same ones
        self._groups: list[dist.ProcessGroup] = []

    # -- processes -----------------------------------------------------------------------------------------------------

    @property
    def ep_size(self) -> int:
        """Processes that share the experts."""
        return self.world_size if self._wanted is None else self._wanted

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """This process and those it shares the experts with."""
        return self._groups[0]

    def setup_environment(self) -> None:
        """Form the groups.

        Raises:
            UserError: ep_size does not divide the number of processes.
        """
        if self.world_size % self.ep_size:
            raise UserError(
                f"ep_size={self.ep_size} does not divide the {self.world_size} processes (--trainer.devices, "
                f"--trainer.num_nodes); choose a divisor"
            )
        super().setup_environment()
        if self._groups or self.ep_size == 1:
            return
        ranks = torch.arange(self.world_size).view(-1, self.ep_size)
        for rows in (ranks, ranks.T):  # every process makes all groups, in the same order
            for row in rows.tolist():
                group = dist.new_group(row, timeout=self._timeout)
                if self.global_rank in row:
                    self._groups.append(group)

    @property
    def passes_need_all(self) -> bool:
        """Not where every process has all experts."""
        return bool(self._groups)

    # -- sharding ------------------------------------------------------------------------------------------------------

    def experts(self) -> dict[str, Experts]:
        """The experts of every MoE layer, by their names in the LightningModule."""
        return {name: m for name, m in self._module.named_modules() if isinstance(m, Experts)}

    def _sharded(self) -> dict[str, Sharded]:
        """Of every parameter that holds this process's experts only, who knows where the others are."""
        return {
            f"{prefix}.{name}": experts.dispatcher
            for prefix, experts in self.experts().items()
            if isinstance(experts.dispatcher, Sharded)
            for name in experts.expert_dims
        }

    def _layout(self, index: int, n_experts: int) -> Layout:
        if index < len(self._saved_layouts):
            saved = Layout.of(self._saved_layouts[index])
            if (saved.n_experts, len(saved.ranks)) == (n_experts, self.ep_size):
                return saved
        return Layout.contiguous(n_experts, self.ep_size)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def average_expert_gradients(self) -> None:
        """Over all processes, as those of the other parameters; once per optimizer step. Collective."""
        if not self._groups:
            return
        replicas = self._groups[1]
        for experts in self.experts().values():
            for parameter in experts.parameters():
                if parameter.requires_grad and parameter.numel():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    if self.world_size > self.ep_size:
                        dist.all_reduce(parameter.grad, group=replicas)
                    parameter.grad.div_(self.world_size)  # it came from the tokens of all processes of the group

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _numbered(self, optimizer: Any) -> dict[int, tuple[nn.Parameter, Sharded]]:
        """The sharded parameters by their numbers in the optimizer's state."""
        sharded = self._sharded()
        of = {p: sharded[name] for name, p in self._module.named_parameters() if name in sharded}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {number: (p, of[p]) for number, p in enumerate(parameters) if p in of}

    @staticmethod
    def _of_shape(value: Any, number: int, key: str, where: Mapping[int, tuple[nn.Parameter, Sharded]]) -> bool:
        return number in where and of_parameters_shape(value, where[number][0], f"optimizer state {key!r}")

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the layout."""
        dispatchers = [experts.dispatcher for experts in self.experts().values()]
        checkpoint[LAYOUT] = [[list(row) for row in d.layout.ranks] for d in dispatchers if isinstance(d, Sharded)]
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Keep the layout for when the experts are dealt out."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._saved_layouts = checkpoint.get(LAYOUT, [])
        return checkpoint

    def _restored(self, value: Any, where: str, dispatcher: Sharded | None) -> Any:
        """A value of a checkpoint: of a parameter that is dealt out this process's rows."""
        if value is None and self._folder is not None:
            return self._folder.tensor(where, None if dispatcher is None else dispatcher.held)
        return dispatcher.scatter(value) if dispatcher is not None and value.ndim else value


class ExpertParallelStrategy(ExpertParallel, DDPStrategy):
    """Every process trains on its own share of the batch and holds its own share of the experts.

    Routers and all other parameters are replicated and averaged as under DDP. The world is cut into groups of `ep_size`
    neighbouring processes; a group holds all experts, and the gradients of an expert are averaged over the groups. A run
    equals that of a single process with the same global batch, up to the order of sums.

    Checkpoints hold all experts in order of their ids, as those of a single process do, or in pieces every expert by its id, and
    the layout beside them: with the same `ep_size` a run goes on with the layout it had, otherwise from the contiguous one.

    Args:
        ep_size: processes that share the experts; divides the number of processes; null for all of them.
        dispatcher: makes the dispatcher of a layer from its layout and the process group.
        kwargs: as for Lightning's DDPStrategy.
    """

    strategy_name = "ep"

    # -- sharding ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Keep this process's experts only, then go on as DDP, which leaves them alone.

        Raises:
            UserError: float16 with loss scaling, in which every process would skip other steps.
        """
        if isinstance(self.precision_plugin, MixedPrecision) and self.precision_plugin.scaler is not None:
            raise UserError("the strategy `ep` does not work with --trainer.precision=16-mixed; use bf16-mixed or 32")
        if self.ep_size > 1:
            for index, experts in enumerate(self.experts().values()):
                if isinstance(experts.dispatcher, Local):
                    shard(experts, self._dispatcher(self._layout(index, len(experts.down)), self.expert_group))
            assert self.model is not None
            ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.model, [*self._sharded()])
        super().setup(trainer)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Together`."""
        own = []
        for experts in self.experts().values() if self.global_rank < self.ep_size else ():
            dispatcher = experts.dispatcher
            if isinstance(dispatcher, Sharded):
                full = {name: dispatcher.gather(getattr(experts, name)) for name in experts.expert_dims}
                if self.is_global_zero:
                    own.append((experts, dispatcher, {name: getattr(experts, name) for name in full}))
                    for name, tensor in full.items():
                        assert tensor is not None
                        setattr(experts, name, nn.Parameter(tensor))
                    experts.dispatcher = Local()
        try:
            yield
        finally:
            for experts, dispatcher, parameters in own:
                for name, parameter in parameters.items():
                    setattr(experts, name, parameter)
                experts.dispatcher = dispatcher

    # -- gradients -----------------------------------------------------------------------------------------------------

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the experts' gradients when DDP does so with the others."""
        super().post_backward(closure_loss)
        if getattr(self.model, "require_backward_grad_sync", True):  # otherwise they accumulate
            self.average_expert_gradients()

    def clip_gradients_by_norm(self, optimizer: Optimizer, max_norm: float) -> None:
        """See `Together`."""
        mine = {parameter for experts in self.experts().values() for parameter in experts.parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = [
            sum(
                (p.grad.float().square().sum() for p in parameters if (p in mine) == sharded),
                torch.zeros((), device=self.root_device),
            )
            for sharded in (False, True)
        ]
        if self._groups:
            dist.all_reduce(squares[1])  # over the replicas too, so that every process gets the same bits
            squares[1] /= self.world_size // self.ep_size
        norm = (squares[0] + squares[1]).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """On process 0 as of a single process: all experts, in order of their ids. In pieces: this process's. Collective."""
        state = super().lightning_module_state_dict()
        for name, dispatcher in self._sharded().items():
            state[name] = self._saved(state[name], dispatcher)
        return state

    def _saved(self, tensor: Tensor, dispatcher: Sharded) -> Tensor | Rows:
        if self.sharded_checkpoints:
            return Rows(tensor.detach(), dispatcher.held)
        full = (
            dispatcher.gather(tensor) if self.global_rank < self.ep_size else None
        )  # the other replicas hold the same
        return tensor if full is None else full.cpu()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """See `lightning_module_state_dict`."""
        state: dict[str, Any] = dict(super().optimizer_state(optimizer))
        where = self._numbered(optimizer)
        state["state"] = {
            number: {
                key: self._saved(value, where[number][1]) if self._of_shape(value, number, key, where) else value
                for key, value in values.items()
            }
            for number, values in state["state"].items()
        }
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's rows, if the experts are dealt out already."""
        sharded, saved = self._sharded(), checkpoint["state_dict"]
        if self._folder is not None:
            check_names(self._module.state_dict(), saved)
        rows = {name: self._restored(saved[name], f"state_dict/{name}", sharded.get(name)) for name in saved}
        super().load_model_state_dict({**checkpoint, "state_dict": rows}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's rows."""
        states = []
        for index, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            where = self._numbered(optimizer)
            rows = {
                number: {
                    key: self._restored(
                        value,
                        f"optimizer_states/{index}/{number}/{key}",
                        where[number][1] if number in where else None,
                    )
                    for key, value in values.items()
                }
                for number, values in state["state"].items()
            }
            states.append({**state, "state": rows})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def shard(experts: Experts, dispatcher: Sharded) -> None:
    """Keep only the experts of this process."""
    for name in experts.expert_dims:
        replace_tensor(experts, name, dispatcher.scatter, ())
    experts.dispatcher = dispatcher


StrategyRegistry.register("ep", ExpertParallelStrategy, description="expert parallelism on a DDP base")
