"""A decoder-only transformer: RMSNorm, rotary attention, MoE layers, untied output head with bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moeprune.errors import UserError
from moeprune.model.config import MoEConfig
from moeprune.model.moe import MoELayer
from moeprune.model.router import Routing


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embedding (arXiv 2104.09864, halves rotated).

    Args:
        config: sizes.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.n_heads, self.kv_heads = config.n_heads, config.kv_heads
        head = config.d_model // config.n_heads
        self.qkv = nn.Linear(config.d_model, (config.n_heads + 2 * config.kv_heads) * head, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        nn.init.normal_(self.qkv.weight, std=0.03)
        nn.init.normal_(self.out.weight, std=0.02 / (2 * config.n_layers) ** 0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, D] from x [B, S, D] and the rotary tables [S, head / 2]."""
        q, k, v = rearrange(self.qkv(x), "b s (h c) -> b h s c", h=self.n_heads + 2 * self.kv_heads).split(
            [self.n_heads, self.kv_heads, self.kv_heads], dim=1
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=self.kv_heads != self.n_heads
        )
        out: Tensor = self.out(rearrange(y, "b h s c -> b s (h c)"))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, C] by tables [S, C / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)).

    Args:
        config: sizes.
        n_experts: experts of this block's MoE layer.
    """

    def __init__(self, config: MoEConfig, n_experts: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.moe = MoELayer(config, n_experts)
        object.__setattr__(self.moe, "residual_norm", self.moe_norm)  # not a submodule of the layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing]:
        """[B, S, D] and the routing of its T = B S tokens."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, routing = self.moe(rearrange(self.moe_norm(x), "b s d -> (b s) d"), mask)
        return x + y.view_as(x), replace(routing, n_sequences=x.shape[0])


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
        self.head = nn.Linear(config.d_model, config.vocab_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        head = config.d_model // config.n_heads
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
    def top_k(self) -> int:
        """K, experts per token."""
        return self.config.top_k

    @property
    def n_groups(self) -> int:
        """Groups of a group-limited router; 1 without."""
        return self.moe_layers[0].router.n_groups

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
