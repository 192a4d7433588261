"""Sizes of the model, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from moeprune.errors import UserError, suggest

AttentionName = Literal["standard", "lfa"]
QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True)
class MoEConfig:
    """A decoder-only transformer whose feed-forward layers are all Mixtures of Experts.

    Args:
        vocab_size: V.
        d_model: D, width of the residual stream.
        n_layers: L.
        n_heads: attention heads.
        n_kv_heads: key/value heads (grouped-query attention); None for n_heads.
        n_experts: E, experts per layer before any pruning.
        top_k: K, experts per token.
        d_expert: F, width of an expert's SwiGLU.
        max_seq_len: longest sequence.
        rope_theta: base of the rotary embedding.
        norm_eps: epsilon of RMSNorm.
        router: short name of a registered router.
        router_options: its options.
        embedding_std: standard deviation of the embedding at initialisation. Untied, large embeddings keep routers from
            collapsing in the first hundred steps (docs/model.md).
        attention: `standard`, or `lfa`, where queries and keys are made of positions that two short causal convolutions
            have filtered (Yuan 2.0).
        head_dim: width of an attention head, even (rotary embedding); None for d_model / n_heads.
        qk_norm: RMSNorm of queries and keys before the rotary embedding: `none`, per `head` (Qwen3), or over the `full`
            width of all heads (OLMoE).
        head_bias: whether the output head has a bias.
        tied_embeddings: whether the output head's weight is the embedding.
        expert_backend: how the experts are computed, see docs/model.md; says nothing about the weights.

    Raises:
        UserError: sizes that do not fit together.
    """

    vocab_size: int = 2048
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    n_experts: int = 32
    top_k: int = 2
    d_expert: int = 64
    max_seq_len: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    router: str = "softmax"
    router_options: dict[str, Any] = field(default_factory=dict)
    embedding_std: float = 0.5
    attention: AttentionName = "standard"
    head_dim: int | None = None
    qk_norm: QKNorm = "none"
    head_bias: bool = True
    tied_embeddings: bool = False
    expert_backend: str = "blocks"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_experts", "top_k", "d_expert", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.n_experts:
            raise UserError(f"top_k={self.top_k} is more than n_experts={self.n_experts}; lower top_k or add experts")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise UserError(f"head_dim must be even and at least 2, got {self.head_dim}")
        if self.head_dim is None and (self.d_model % self.n_heads or self.d_model // self.n_heads % 2):
            raise UserError(
                f"d_model={self.d_model} does not split into n_heads={self.n_heads} heads of even width; change one, or set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise UserError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}; change one")
        if self.attention not in get_args(AttentionName):
            raise UserError(suggest("attention", str(self.attention), list(get_args(AttentionName))))
        if self.qk_norm not in get_args(QKNorm):
            raise UserError(suggest("qk_norm", str(self.qk_norm), list(get_args(QKNorm))))

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoEConfig:
        """The inverse of `to_dict`.

        Raises:
            UserError: an unknown or missing field.
        """
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise UserError(suggest("model config field", name, known))
        return cls(**data)
