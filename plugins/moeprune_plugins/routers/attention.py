"""Yuan 2.0-M32's router."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.model.router import Router

TOKENS_PER_CALL = 32768  # tokens are the batch of the attention; CUDA limits a batch to 65535


def mix_experts(qkv: Tensor, width: int = 1) -> Tensor:
    """[T, E]: sum_j softmax_j(q_i k_j) v_j for each token and expert i; [T, E, E] is never held.

    Args:
        qkv: [T, 3 E], q before k before v.
        width: zeros are appended to the heads, which are numbers, up to this width. They change nothing; fused kernels
            for CUDA ask for a multiple of 4 in float32.
    """
    q, k, v = (F.pad(t[:, None, :, None], (0, width - 1)) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, 0]


class AttentionRouter(Router):
    """Attention across experts: logit_i = sum_j softmax_j(q_i k_j) v_j; then softmax over the K highest logits.

    q, k and v are three linear maps of the token, one number per expert each. Every logit depends on all experts
    (`experts_interact`): a pruned layer routes anew among the remaining ones.

    Source: Yuan 2.0-M32, arXiv 2405.17976: P = softmax(Q K^T) V, of which the K highest are chosen. Not scaled, as in
    the released model's code, whose heads have width 1 (a factor 1 / sqrt(width) would be 1) and compute in float32.
    Initialisation is not given there; here the maps have a standard deviation of D^-1/2, so that q, k and v of a
    normalised token have variance 1.

    Args:
        d_model: D.
        n_experts: E.
        top_k: K.
    """

    expert_dims = {"query": 0, "key": 0, "value": 0}  # noqa: RUF012 (a constant of the class)
    experts_interact = True

    def __init__(self, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__(d_model, n_experts, top_k)
        self.query, self.key, self.value = (nn.Parameter(torch.empty(n_experts, d_model)) for _ in range(3))
        for weight in (self.query, self.key, self.value):
            nn.init.normal_(weight, std=d_model**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        """See `Router.logits`."""
        qkv = F.linear(x, torch.cat([self.query, self.key, self.value]).to(x.dtype))
        width = 1 if x.device.type == "cpu" else 4
        return torch.cat([mix_experts(block, width) for block in torch.split(qkv, TOKENS_PER_CALL)])

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Router.choose`."""
        top, indices = logits.topk(self.top_k, -1)
        return logits.softmax(-1), top.softmax(-1), indices
