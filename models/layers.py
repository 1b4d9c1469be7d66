"""What networks have in common: norms, rotary embeddings, and the way of a token through blocks.

Names are transformers'. Shapes: B rows, T tokens, D hidden size, V vocabulary, H query heads,
K key-value heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.cache import KVCache


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer; `factor` divides positions (linear scaling)."""

    theta: float
    factor: float = 1.0


class Piece(NamedTuple):
    """Where a checkpoint's tensor goes that is only a piece of the parameter `name`: into the part
    number `part` of `parts` equal ones along the last axis but one, of all that is stacked in the
    parameter or of entry `entry` alone."""

    name: str
    part: int
    parts: int
    entry: int | None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` [..., N, K] that the tensor fills. Raises IndexError when the
        parameter has no such entry."""
        whole = parameter if self.entry is None else parameter[self.entry]
        size = whole.shape[-2] // self.parts
        return whole.narrow(-2, self.part * size, size)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis, in float32 (arXiv:1910.07467)."""

    offset = 0.0

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (self.offset + self.weight.float())).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """cos and sin of rotary angles (arXiv:2104.09864), each [T, 1, head_dim] for positions [T]."""

    def __init__(self, rope: RopeConfig, head_dim: int):
        super().__init__()
        frequency = rope.theta ** (torch.arange(0, head_dim, 2, device="cpu") / head_dim)
        self.register_buffer("inv_freq", 1.0 / frequency / rope.factor, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions.float()[:, None] * self.inv_freq)[:, None]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [B, T, H, D] by the angles whose cos and sin are given."""
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention around a KV cache, which does the attending itself.

    `kind` names the rotary embedding; scores are multiplied by `scale`. `bias` gives queries, keys
    and values one; `q_norm` and `k_norm` may be identities.
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        heads: int,
        cache: KVCache,
        q_norm: nn.Module,
        k_norm: nn.Module,
        scale: float,
        bias: bool = False,
    ):
        super().__init__()
        kv_heads, self.head_dim = cache.k.shape[2:]
        self.kind, self.scale = kind, scale
        self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=False)
        self.q_norm, self.k_norm, self.cache = q_norm, k_norm, cache

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, K, head_dim] of x [B, T, D]."""
        q, k, v = (
            proj(x).view(x.shape[0], -1, proj.out_features // self.head_dim, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(self.q_norm(q), rope[self.kind]), rotate(self.k_norm(k), rope[self.kind]), v

    def combine(self, attended: Tensor) -> Tensor:
        """The heads' results [B, T, H, head_dim] brought back to [B, T, D]."""
        return self.o_proj(attended.reshape(attended.shape[0], -1, self.o_proj.in_features))


class MLP(nn.Module):
    """Gated feed-forward (arXiv:2002.05202): down(act(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Backbone(nn.Module):
    """Embedding, blocks and final norm. `layers` have project, finish and self_attn; `rope` is by
    their kind; embeddings are multiplied by `embed_scale`."""

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        rope: Mapping[str, RotaryEmbedding],
        embed_scale: float = 1.0,
    ):
        super().__init__()
        self.embed_tokens, self.embed_scale = embed_tokens, embed_scale
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = nn.ModuleDict(rope)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [B, T, D] of tokens int64 [B, T]."""
        x = self.embed_tokens(tokens)
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def rotations(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each kind of layer cos and sin [T, 1, head_dim] at positions int64 [T]."""
        return {kind: rope(positions) for kind, rope in self.rope.items()}

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None) -> Tensor:
        """Hidden states [1, T, D] of a chunk: tokens int64 [1, T] at positions int64 [T]."""
        x, rope = self.embed(tokens), self.rotations(positions)
        for layer in self.layers:
            cache, scale = layer.self_attn.cache, layer.self_attn.scale
            attended = cache.prefill(*layer.project(x, rope), positions, scale, row)
            x = layer.finish(x, attended)
        return x

    def decode(self, x: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, 1, D] of a step: embeddings [B, 1, D] at position int64 [B]."""
        rope = self.rotations(position)
        # Rows, not tokens, are at positions of their own.
        rope = {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in rope.items()}
        for layer in self.layers:
            cache, scale = layer.self_attn.cache, layer.self_attn.scale
            x = layer.finish(x, cache.decode(*layer.project(x, rope), position, scale))
        return x


class CausalLM(nn.Module):
    """A network of `batch` rows whose caches reach max_seq_len positions: the methods that are
    exported.

    A prefill chunk holds at most `max_chunk` tokens. A head that is `tied` shares the embedding's
    weight.
    """

    def __init__(self, model: Backbone, batch: int, max_seq_len: int, max_chunk: int, tied: bool):
        super().__init__()
        self.batch, self.max_seq_len, self.max_chunk = batch, max_seq_len, max_chunk
        self.model = model
        vocab_size, hidden_size = model.embed_tokens.weight.shape
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = model.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [B, V] of hidden states [B, 1, D] before the final norm."""
        return self.lm_head(self.model.norm(hidden)).float()[:, 0]

    def embed(self, tokens: Tensor) -> Tensor:
        """What decode_embedded takes: hidden states [B, T, D] of tokens int64 [B, T]."""
        return self.model.embed(tokens)

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        """Logits [1, V] after the last of tokens int64 [1, T] at positions int64 [T] of one row,
        `row` int64 [1]; a model of one row takes none."""
        return self.logits(self.model.prefill(tokens, positions, row)[:, -1:])

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after token int64 [B, 1] at position int64 [B]."""
        return self.decode_embedded(self.embed(token), position)

    def decode_embedded(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after the token embedded as hidden [B, 1, D] at position int64 [B]."""
        return self.logits(self.model.decode(hidden, position))
