"""Attention of a block: the standard one, and one that filters what queries and keys are made of."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.model.config import MoEConfig


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embedding (arXiv 2104.09864, halves rotated) and, if asked for, RMSNorm of
    queries and keys before it.

    Args:
        config: sizes.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.n_heads, self.kv_heads = config.n_heads, config.kv_heads
        head, self.qk_norm = config.head_width, config.qk_norm
        self.qkv = nn.Linear(config.d_model, (config.n_heads + 2 * config.kv_heads) * head, bias=False)
        self.out = nn.Linear(config.n_heads * head, config.d_model, bias=False)
        if self.qk_norm != "none":
            widths = [head if self.qk_norm == "head" else n * head for n in (config.n_heads, config.kv_heads)]
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=config.norm_eps) for width in widths)
        nn.init.normal_(self.qkv.weight, std=0.03)
        nn.init.normal_(self.out.weight, std=0.02 / (2 * config.n_layers) ** 0.5)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads, one after the other, from x [B, S, D]."""
        projected: Tensor = self.qkv(x)
        return projected

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None = None) -> Tensor:
        """[B, S, D] from x [B, S, D] and the rotary tables [S, head / 2]; `allowed` [B, 1, S, S] bool, with tables [B, 1, S, head / 2],
        says which positions each one sees, instead of all before it.
        """
        heads = rearrange(self.project(x), "b s (h c) -> b h s c", h=self.n_heads + 2 * self.kv_heads)
        q, k, v = torch.split(heads, [self.n_heads, self.kv_heads, self.kv_heads], dim=1)
        if self.qk_norm != "none":
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            attn_mask=allowed,
            is_causal=allowed is None,
            enable_gqa=self.kv_heads != self.n_heads,
        )
        out: Tensor = self.out(rearrange(y, "b h s c -> b s (h c)"))
        return out

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """`norm` of x [B, H, S, C], of each head or of all heads of a position together."""
        if self.qk_norm == "full":
            together: Tensor = rearrange(
                norm(rearrange(x, "b h s c -> b s (h c)")), "b s (h c) -> b h s c", h=x.shape[1]
            )
            return together
        each: Tensor = norm(x)
        return each


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, C] by tables [S, C / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LocalFilter(nn.Module):
    """norm(x + f(g(x))): g and f are causal convolutions of kernel 2 over the sequence, D -> D/2 -> D, with biases and
    without an activation between them; norm is RMSNorm.

    A convolution of kernel 2 is a linear map of (x_{t-1}, x_t); before the first position stand zeros, for f as for g.

    Args:
        d_model: D, even.
        norm_eps: epsilon of RMSNorm.
    """

    def __init__(self, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.narrow = nn.Linear(2 * d_model, d_model // 2)
        self.widen = nn.Linear(d_model, d_model)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        for layer in (self.narrow, self.widen):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] from x [B, S, D]."""
        filtered: Tensor = self.norm(x + self.widen(_pairs(self.narrow(_pairs(x)))))
        return filtered


def _pairs(x: Tensor) -> Tensor:
    """(x_{t-1}, x_t) [B, S, 2 D] from x [B, S, D]."""
    return torch.cat([F.pad(x[:, :-1], (0, 0, 1, 0)), x], -1)


class LocalizedFilteringAttention(Attention):
    """Attention whose queries and keys are made of filtered positions, values of plain ones.

    Source: Yuan 2.0, arXiv 2311.15786, as the released model's code has it: two convolutions with biases, residual,
    RMSNorm, and values from the unfiltered input. The filter's initialisation (normal, standard deviation 0.02, zero
    biases) is ours, and so is that keys and values may be grouped.

    Args:
        config: sizes.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.filter = LocalFilter(config.d_model, config.norm_eps)

    def project(self, x: Tensor) -> Tensor:
        """See `Attention.project`."""
        n_values = self.qkv.out_features * self.kv_heads // (self.n_heads + 2 * self.kv_heads)
        for_qk, for_v = torch.split(self.qkv.weight, [self.qkv.out_features - n_values, n_values])
        return torch.cat([F.linear(self.filter(x), for_qk), F.linear(x, for_v)], -1)


ATTENTIONS: dict[str, type[Attention]] = {"standard": Attention, "lfa": LocalizedFilteringAttention}
