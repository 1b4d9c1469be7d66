"""Parts that networks are made of, and that do not depend on one another.

Shapes: B rows, T tokens, D hidden size, H query heads, K key/value heads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.cache import FullCache, KVCache, SlidingCache


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


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    `factor` divides positions (linear scaling); only the share `partial` of the pairs turns.
    """

    theta: float
    factor: float = 1.0
    partial: float = 1.0


class RotaryEmbedding(nn.Module):
    """cos and sin of rotary angles (arXiv:2104.09864), each [T, 1, head_dim] for positions [T]."""

    def __init__(self, rope: RopeConfig, head_dim: int):
        super().__init__()
        turning = int(rope.partial * head_dim // 2)
        frequency = rope.theta ** (torch.arange(0, 2 * turning, 2, device="cpu") / head_dim)
        # The other pairs keep the angle 0.
        inv_freq = F.pad(1.0 / frequency / rope.factor, (0, head_dim // 2 - turning))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

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


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis (arXiv:1910.07467), float32 whatever x is."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """normalize(x) * (offset + weight) over the last axis, in float32."""

    offset = 0.0

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return (normalize(x, self.eps) * (self.offset + self.weight.float())).to(x.dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` (positive) as `dtype` holds it: by Python's arithmetic, so that a traced graph gets
    a number."""
    mantissa, exponent = math.frexp(value)
    steps = 2.0 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * steps) / steps, exponent)


def kv_cache(
    kind: str,
    window: int,
    batch: int,
    max_seq_len: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> KVCache:
    """The cache of a layer of a kind: a ring of `window` slots for sliding_attention."""
    # A ring never needs more slots than there are positions.
    if kind == "sliding_attention":
        cache, slots = SlidingCache, min(window, max_seq_len)
    else:
        cache, slots = FullCache, max_seq_len
    # A cache holds activations, so it is real where parameters may still be on "meta".
    with torch.device("cpu"):
        return cache(batch, slots, kv_heads, head_dim, dtype)


class Attention(nn.Module):
    """Grouped-query attention's projections and its KV cache, whose shape tells K and head_dim.

    `own_values` false: there is no v_proj. `bias`: queries, keys and values have one. Norms of
    queries and keys are those of the network; without any they are identities.
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        heads: int,
        cache: KVCache,
        own_values: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        kv_heads, head_dim = cache.k.shape[2:]
        self.kind, self.head_dim = kind, head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        if own_values:
            self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.cache = cache

    def heads(self, projected: Tensor) -> Tensor:
        """[B, T, H or K, head_dim] of what a projection gave, [B, T, ...]."""
        return projected.view(
            projected.shape[0], -1, projected.shape[2] // self.head_dim, self.head_dim
        )

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, K, head_dim] of x [B, T, D]."""
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
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
