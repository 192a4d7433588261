"""A decoder-only transformer: RMSNorm, rotary attention, MoE layers, output head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moeprune.errors import UserError
from moeprune.model.attention import ATTENTIONS
from moeprune.model.config import MoEConfig
from moeprune.model.moe import MoELayer
from moeprune.model.router import Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)).

    Args:
        config: sizes.
        n_experts: experts of this block's MoE layer.
    """

    def __init__(self, config: MoEConfig, n_experts: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = ATTENTIONS[config.attention](config)
        self.moe_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.moe = MoELayer(config, n_experts)
        object.__setattr__(self.moe, "residual_norm", self.moe_norm)  # not a submodule of the layer

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """[B, S, D] and the routing of its T = B S tokens; `allowed` as for `Attention`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, allowed)
        y, routing = self.moe(rearrange(self.moe_norm(x), "b s d -> (b s) d"), mask)
        return x + y.view_as(x), replace(routing, n_sequences=x.shape[0])


class TiedHead(nn.Module):
    """An output head whose weight is the embedding's; the model has it once.

    Args:
        embedding: of the tokens.
        bias: whether there is one.
    """

    bias: nn.Parameter | None
    _embedding: nn.Embedding

    def __init__(self, embedding: nn.Embedding, bias: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_embedding", embedding)  # not a submodule
        self.register_parameter("bias", nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None)

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self._embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., V] from x [..., D]."""
        return F.linear(x, self.weight, self.bias)


class MoETransformer(nn.Module):
    """The language model: `model(tokens)` gives logits.

    Args:
        config: sizes.
        n_experts: experts per layer, for a pruned model; None for config.n_experts everywhere.
    """

    cos: Tensor
    sin: Tensor
    activation_checkpointing = False  # in training, keep only each block's input for the backward pass

    def __init__(self, config: MoEConfig, n_experts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = config
        per_layer = [config.n_experts] * config.n_layers if n_experts is None else list(n_experts)
        if len(per_layer) != config.n_layers:
            raise UserError(
                f"n_experts holds {len(per_layer)} numbers for n_layers={config.n_layers}; give one per layer"
            )
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, n) for n in per_layer)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head: nn.Linear | TiedHead
        if config.tied_embeddings:
            self.head = TiedHead(self.embedding, config.head_bias)
        else:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        head = config.head_width
        angles = torch.outer(
            torch.arange(config.max_seq_len).float(), config.rope_theta ** (-torch.arange(0, head, 2).float() / head)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in order."""
        return [block.moe for block in self.blocks]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return self.embedding.weight.device

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        return self.config.top_k

    @property
    def n_groups(self) -> int:
        """Groups of a group-limited router; 1 without."""
        return self.moe_layers[0].router.n_groups

    @property
    def min_experts(self) -> int:
        """See `PrunableModel`."""
        return self.moe_layers[0].router.min_experts

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `PrunableModel`."""
        return self.forward_with_routing(tokens, mask)[0]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V].

        Args:
            tokens: [B, S] int64, S <= max_seq_len.
            mask: [B, S] bool, False for padding, which stands on the right; padding counts for no expert's load.

        Raises:
            UserError: sequences longer than max_seq_len.
        """
        return self.forward_with_routing(tokens, mask)[0]

    def forward_with_routing(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """Logits [B, S, V] and the routing of each layer; arguments as for `forward`."""
        S = tokens.shape[1]
        if self.config.max_seq_len < S:
            raise UserError(f"sequences of {S} tokens exceed max_seq_len={self.config.max_seq_len}; cut them")
        flat = None if mask is None else mask.reshape(-1).bool()
        x = self.embedding(tokens)
        routings = []
        for block in self.blocks:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, self.cos[:S], self.sin[:S], flat, use_reentrant=False)
            else:
                x, routing = block(x, self.cos[:S], self.sin[:S], flat)
            routings.append(routing)
        logits: Tensor = self.head(self.norm(x))
        return logits, routings
