"""The LightningModule: loss, balancing terms, optimizer, schedule, and a checkpoint that knows its experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.balancing.balancer import Balancer, sum_over_ranks
from moeprune.checkpoints import END_OF_TEXT, ENTRY, Checkpoint, differing_fields
from moeprune.errors import UserError
from moeprune.interop import native
from moeprune.model.config import MoEConfig
from moeprune.model.transformer import MoETransformer
from moeprune.parallel.fsdp import FullyShardedStrategy
from moeprune.parallel.hybrid import ExpertParallelFullyShardedStrategy, MixedAdamW
from moeprune.parallel.together import Together, local
from moeprune.pruning.plan import PrunePlan
from moeprune.training.data import check_equal_numbers


def sequence_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B] mean cross-entropy per sequence, nats per token, float32; logits [B, S, V], targets [B, S]."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return loss.view(targets.shape).mean(1)


@torch.no_grad()
def domain_losses(model: MoETransformer, batches: Iterable[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Per domain the loss of each of its sequences, in order: what paired comparisons need. The model's mode is kept."""
    trained, device = model.training, model.device
    model.eval()
    parts: dict[str, list[NDArray[np.float64]]] = {}
    for batch in batches:
        tokens = batch["tokens"].to(device)
        losses = sequence_losses(model.logits(tokens[:, :-1]), tokens[:, 1:])
        parts.setdefault(batch["domain"], []).append(losses.double().cpu().numpy())
    model.train(trained)
    return {domain: np.concatenate(losses) for domain, losses in parts.items()}


def initial_model(config: MoEConfig, seed: int, log_unigrams: Tensor | None) -> MoETransformer:
    """A fresh model: the same one for the same seed, whatever was drawn before; output bias at `log_unigrams` [V]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoETransformer(config)
    if log_unigrams is not None and model.head.bias is not None:
        with torch.no_grad():
            model.head.bias.copy_(log_unigrams)
    return model


class MoELanguageModel(pl.LightningModule):
    """Trains a Mixture-of-Experts language model.

    AdamW; the learning rate rises linearly over `warmup_steps`, stays, and falls linearly over the last part of the run
    (warm-up, stable, decay: arXiv 2404.06395).

    Args:
        config: sizes of the model.
        balancers: load-balancing terms; LAEP's own training uses none.
        learning_rate: of the stable part.
        weight_decay: on matrices; norms and biases have none.
        betas: of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        decay: share of the run over which the learning rate falls, in [0, 1]; needs a bounded run.
        final_learning_rate: share of `learning_rate` that is left at the end.
        unigram_bias: start the output bias, if there is one, at the log frequencies of the tokens (see docs/model.md).
        init_seed: of the initial weights.
        activation_checkpointing: keep only each block's input for the backward pass and compute the rest again.
        checkpoint: go on from the model in this checkpoint: of moeprune (file or folder), or of transformers (folder or hub
            name). It brings sizes, weights, the prunes so far and the tokenizer; `config`, `unigram_bias` and `init_seed` say
            nothing then.
    """

    def __init__(
        self,
        config: MoEConfig = MoEConfig(),  # noqa: B008 (immutable)
        balancers: list[Balancer] | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 60,
        decay: float = 0.3,
        final_learning_rate: float = 0.05,
        unigram_bias: bool = True,
        init_seed: int = 0,
        activation_checkpointing: bool = False,
        checkpoint: Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("decay", decay), ("final_learning_rate", final_learning_rate)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {value}")
        if not learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, got {learning_rate}")
        if warmup_steps < 0:
            raise UserError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.config = config if checkpoint is None else native.read(checkpoint, weights=False).config
        self.checkpoint = checkpoint
        self.balancers = balancers or []
        self._stepping = [b for b in self.balancers if type(b).after_step is not Balancer.after_step]
        self._counts: list[Tensor] = []  # of this rank and step so far, where a balancer asks for them
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.decay, self.final_learning_rate = warmup_steps, decay, final_learning_rate
        self.unigram_bias, self.init_seed = unigram_bias, init_seed
        self.activation_checkpointing = activation_checkpointing
        self.plans: list[PrunePlan] = []
        self.model: MoETransformer | None = None
        self._losses: dict[str, Tensor] = {}  # by domain: sum of this rank's sequence losses, and how many they are

    @property
    def transformer(self) -> MoETransformer:
        """The model; there once `configure_model` ran."""
        assert self.model is not None
        return self.model

    def configure_model(self) -> None:
        """Build the model, the same one for the same `init_seed`, whatever ran before; or read it from `checkpoint`."""
        if self.model is not None:
            return
        strategy: Any = self.trainer.strategy
        sharding = isinstance(strategy, FullyShardedStrategy)
        if self.checkpoint is not None:
            start = native.read(self.checkpoint)
            with torch.random.fork_rng(devices=[]):
                model = start.model().train()
            self.plans = start.plans
        else:
            data = getattr(self.trainer, "datamodule", None)
            store = getattr(data, "store", None) if self.unigram_bias else None
            with strategy.building() if sharding else nullcontext():
                model = initial_model(self.config, self.init_seed, None if store is None else store.log_unigrams())
        self.model = strategy.sharded(model) if sharding else model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of tokens [B, S]."""
        return self.transformer.logits(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """Cross-entropy plus balancing terms; also hands out the layers' counts, for the load windows."""
        self.transformer.activation_checkpointing = self.activation_checkpointing
        logits, routings = self.transformer.forward_with_routing(batch[:, :-1])
        layers = self.transformer.moe_layers
        loss = sequence_losses(logits, batch[:, 1:]).mean()
        total = loss
        for balancer in self.balancers:
            exact = torch.autocast(self.device.type, enabled=False)  # routing is float32, and so are its losses
            with exact, torch.set_grad_enabled(balancer.coefficient > 0 and torch.is_grad_enabled()):
                terms = [balancer.loss(r, layer.router) for r, layer in zip(routings, layers, strict=True)]
                term = torch.stack(terms).mean()
            if balancer.coefficient > 0:
                total = total + balancer.coefficient * term
            self.log(f"balance/{_snake(type(balancer).__name__)}", term.detach())
        self.log("train_loss", loss.detach(), prog_bar=True)
        counts = [routing.counts for routing in routings]
        if self._stepping:
            so_far = self._counts or [torch.zeros_like(count) for count in counts]
            self._counts = [a + b for a, b in zip(so_far, counts, strict=True)]
        return {"loss": total, "lm_loss": loss.detach(), "counts": counts}

    def on_train_start(self) -> None:
        """See `check_equal_numbers`."""
        check_equal_numbers(self.trainer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning does; then balancers that change the routers get the step's counts, over all ranks."""
        super().optimizer_step(*args, **kwargs)
        if not self._counts:
            return
        sizes = [len(count) for count in self._counts]
        counts = torch.split(sum_over_ranks(torch.cat(self._counts)), sizes)
        self._counts = []
        with torch.no_grad():
            for balancer in self._stepping:
                balancer.after_step([layer.router for layer in self.transformer.moe_layers], counts)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop a run that has diverged before it writes NaN into the weights.

        Raises:
            UserError: a router's gradient is not finite; layer and step are named. Not under float16, whose loss scaling
                skips such steps.
        """
        if "16-mixed" in self.trainer.precision and "bf16" not in self.trainer.precision:
            return
        nothing = torch.ones((), dtype=torch.bool, device=self.device)
        flags = [
            torch.stack([nothing, *(local(p.grad).isfinite().all() for p in parameters if p.grad is not None)]).all()
            for layer in self.transformer.moe_layers
            if (parameters := [p for p in layer.router.parameters() if p.requires_grad] or [layer.experts.down])
        ]
        everywhere = torch.stack(flags)
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            everywhere = sum_over_ranks((~everywhere).long()) == 0
        finite = everywhere.tolist()  # one transfer from the device for all layers
        if not all(finite):
            raise UserError(
                f"the gradient of layer {finite.index(False)} is not finite at step {self.global_step}; "
                f"lower the learning rate or clip gradients (--trainer.gradient_clip_val=1)"
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does, by the norm of the whole model also where this process holds a part of it."""
        strategy, plugin = self.trainer.strategy, self.trainer.precision_plugin
        by_norm = gradient_clip_algorithm != "value"
        if isinstance(strategy, Together) and gradient_clip_val:
            (strategy.clip_gradients_by_norm if by_norm else strategy.clip_gradients_by_value)(
                optimizer, gradient_clip_val
            )
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val:
            # nothing is scaled under bfloat16; Lightning refuses a fused optimizer nevertheless
            (plugin.clip_grad_by_norm if by_norm else plugin.clip_grad_by_value)(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def empty_batch(self) -> dict[str, Any]:
        """An evaluation batch of no sequence, for a process that has none left while others have."""
        domains = self.trainer.datamodule.corpus.domains  # type: ignore[attr-defined]
        return {"domain": domains[0], "tokens": torch.zeros(0, 2, dtype=torch.int64)}

    def _evaluate(self, batch: dict[str, Any]) -> None:
        tokens, domain = batch["tokens"], batch["domain"]
        losses = sequence_losses(self(tokens[:, :-1]), tokens[:, 1:])
        both = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        self._losses[domain] = self._losses[domain] + both if domain in self._losses else both

    def _domain_means(self) -> dict[str, Tensor]:
        """Mean loss of each domain since the last call, over all ranks, which may have seen different domains."""
        domains = self.trainer.datamodule.corpus.domains  # type: ignore[attr-defined]
        nothing = torch.zeros(2, device=self.device)
        sums = sum_over_ranks(torch.stack([self._losses.get(domain, nothing) for domain in domains]))
        self._losses = {}
        return {domain: total / n for domain, (total, n) in zip(domains, sums, strict=True) if n > 0}

    def _report(self, name: str) -> None:
        """Log the mean of the domains and each of them, over all ranks."""
        means = self._domain_means()
        if not means:
            return
        self.log(name, torch.stack([*means.values()]).mean(), prog_bar=True)
        self.log_dict({f"{name}/{domain}": loss for domain, loss in means.items()})

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """The `val_loss` that a validation would log now; nothing is logged. Collective; None without validation data."""
        trainer = self.trainer
        trained = self.training
        self.eval()
        batches = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        if isinstance(trainer.strategy, Together):
            batches = trainer.strategy.evened(batches)
        for index, batch in zip(range(int(trainer.num_val_batches[0])), batches, strict=False):
            trainer.strategy.validation_step(trainer.strategy.batch_to_device(batch), index)
        means = self._domain_means()
        self.train(trained)
        return float(torch.stack([*means.values()]).mean()) if means else None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss by domain."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` and `val_loss/<domain>`."""
        self._report("val_loss")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss by domain."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test_loss` and `test_loss/<domain>`."""
        self._report("test_loss")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """[B, S] log-probability of each token given those before it."""
        tokens = batch["tokens"]
        logits: Tensor = self(tokens[:, :-1]).float()
        return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    def schedule(self, step: int) -> float:
        """Share of `learning_rate` at optimizer step `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = self.trainer.max_steps
        falling = int(self.decay * total) if total > 0 else 0
        if falling == 0 or step < total - falling:
            return 1.0
        return self.final_learning_rate + (1 - self.final_learning_rate) * max(0, total - step) / falling

    def configure_optimizers(self) -> Any:
        """AdamW (fused) and the schedule."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in self.parameters():
            (matrices if parameter.ndim > 1 else others).append(parameter)
        mixed = isinstance(self.trainer.strategy, ExpertParallelFullyShardedStrategy)
        optimizer = (MixedAdamW if mixed else torch.optim.AdamW)(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.learning_rate,
            betas=self.betas,
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model: configuration, experts, plans, tokenizer."""
        data = getattr(self.trainer, "datamodule", None)
        checkpoint[ENTRY] = Checkpoint(
            self.config,
            [list(layer.ids) for layer in self.transformer.moe_layers],
            {},
            self.plans,
            data.store.tokenizer_json if data is not None else "",
            data.describe() if data is not None else {},
            self.global_step,
            data.store.end_of_text if data is not None else END_OF_TEXT,
        ).entry()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's shapes, before its weights and before the optimizer exists.

        Raises:
            UserError: a checkpoint of another configuration; the fields that differ are named.
        """
        saved = Checkpoint.from_entry(checkpoint.get(ENTRY, {}), {}, "the checkpoint")
        for name in differing_fields(saved.config, self.config):
            raise UserError(
                f"the checkpoint was trained with model.config.{name}={getattr(saved.config, name)}, this configuration "
                f"says {getattr(self.config, name)}; use the configuration it was trained with"
            )
        data = getattr(self.trainer, "datamodule", None)
        if saved.tokenizer and data is not None and saved.tokenizer != data.store.tokenizer_json:
            raise UserError(
                f"the checkpoint was trained with another tokenizer than data.source={data.corpus.source}, data.domains="
                f"{list(data.corpus.domains)} gives; use the data it was trained on ({saved.data})"
            )
        self.plans = saved.plans
        n_experts = [len(ids) for ids in saved.expert_ids]
        if n_experts != [layer.n_experts for layer in self.transformer.moe_layers]:
            strategy = getattr(self.trainer, "strategy", None)
            if isinstance(strategy, FullyShardedStrategy):
                self.model = strategy.resized(self.transformer, n_experts)
            else:
                self.model = MoETransformer(self.config, n_experts).to(self.device)


def _snake(name: str) -> str:
    """GlobalBatch -> global_batch."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
