"""Expert parallelism for the experts, FSDP2 for everything else: `--trainer.strategy=ep_fsdp2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeprune.model.experts import Experts
from moeprune.parallel.dispatch import Sharded
from moeprune.parallel.fsdp import FullyShardedStrategy
from moeprune.parallel.strategy import ExpertParallel, shard


class ExpertParallelFullyShardedStrategy(ExpertParallel, FullyShardedStrategy):
    """Every process trains on its own share of the batch and holds its own experts, and its share of every other parameter.

    The experts are dealt out as by the strategy `ep` and stay where they are; all other parameters are sharded as by `fsdp2`.

    Args:
        ep_size: processes that share the experts; divides the number of processes; null for all of them.
        dispatcher: makes the dispatcher of a layer from its layout and the process group.
        kwargs: as for `FullyShardedStrategy`.
    """

    strategy_name = "ep_fsdp2"
    _accumulating = False

    @property
    def passes_need_all(self) -> bool:
        """Always."""
        return True

    # -- sharding ------------------------------------------------------------------------------------------------------

    def _left_out(self, block: Any, index: int) -> set[nn.Parameter]:
        """The experts of a block, once dealt out."""
        experts: Experts = block.moe.experts
        if self.ep_size > 1:
            layout = self._layout(index, block.moe.n_experts)
            shard(experts, self._dispatcher(layout, self.expert_group))
        return set(experts.parameters()) if isinstance(experts.dispatcher, Sharded) else set()

    def _dealt(self) -> Mapping[str, Sharded]:
        return self._sharded()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share, in the layout of the checkpoint if it fits."""
        for index, experts in enumerate(self.experts().values()):
            now = experts.dispatcher
            if isinstance(now, Sharded) and now.layout != (layout := self._layout(index, now.layout.n_experts)):
                experts.dispatcher = now.placed(layout)
                for name in experts.expert_dims:
                    old = getattr(experts, name)
                    setattr(experts, name, nn.Parameter(old.new_empty(len(layout.ranks[now.rank]), *old.shape[1:])))
        super().load_model_state_dict(checkpoint, strict)

    # -- gradients -----------------------------------------------------------------------------------------------------

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Entered for batches whose gradients accumulate."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the experts' gradients once they are complete."""
        super().post_backward(closure_loss)
        if not self._accumulating:
            self.average_expert_gradients()

    def _copies(self, parameter: Tensor) -> int:
        return 1 if isinstance(parameter, DTensor) else self.world_size // self.ep_size


class MixedAdamW(torch.optim.AdamW):
    """AdamW for groups that hold sharded and plain parameters, of which its fused step takes one kind at a time."""

    def step(self, closure: Any = None) -> Any:
        """See torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [
            {**group, "params": of_kind}
            for group in groups
            for sharded in (False, True)
            if (of_kind := [p for p in group["params"] if isinstance(p, DTensor) == sharded])
        ]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss


StrategyRegistry.register(
    "ep_fsdp2", ExpertParallelFullyShardedStrategy, description="expert parallelism on an FSDP2 base"
)
