"""Parts that networks are made of, and that do not depend on one another.

Shapes: B rows, T tokens, H heads, K key/value heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import FullCache, KVCache, SlidingCache


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
