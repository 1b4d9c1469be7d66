"""Parts that networks are made of, and that do not depend on one another.

Shapes: B rows, T tokens, D hidden size, H query heads, K key/value heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.cache import FullCache, KVCache, SlidingCache, attend
from tokenloop.models.rope_scaling import Scaling


class Shard(NamedTuple):
    """A shard of the parameter `name`, for a tensor that is not the whole of the parameter.

    The parameter's `axis`, which is the last but one, has `parts` equal parts, and the shard is
    number `part`. It belongs to entry `entry` of the first axis, or to all entries where `entry` is
    None.
    """

    name: str
    part: int
    parts: int
    entry: int | None
    axis: int = -2

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` [..., N, K] that the tensor fills. Raises IndexError when the
        parameter has no such entry."""
        whole = parameter if self.entry is None else parameter[self.entry]
        size = whole.shape[self.axis] // self.parts
        return whole.narrow(self.axis, self.part * size, size)


class Rearranged(NamedTuple):
    """The parameter `name` of experts, [E, N] or [E, N, K], for a tensor that has its elements in
    another order.

    A tensor that is `transposed` is [E, K, N]. Of one that is `interleaved`, outputs 2 i and
    2 i + 1 are output i of the parameter's first half and output i of its second half.
    """

    name: str
    transposed: bool = False
    interleaved: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, for a parameter of that `shape`."""
        return (shape[0], *shape[:0:-1]) if self.transposed else shape

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter's values."""
        values = tensor.transpose(1, 2) if self.transposed else tensor
        if self.interleaved:
            values = values.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return values.contiguous()


class Stacked(NamedTuple):
    """The parameters `names`, for a tensor that has the rows of all of them, in that order."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one type of layer.

    `factor` divides positions (linear scaling). Only the share `partial` of the pairs rotates.
    `scaling` is for longer contexts. `factors` divide frequencies one by one.
    """

    theta: float
    factor: float = 1.0
    partial: float = 1.0
    scaling: Scaling | None = None
    factors: tuple[float, ...] | None = None


class RotaryEmbedding(nn.Module):
    """cos and sin of rotary angles (arXiv:2104.09864), each [T, 1, dim] for positions [T] below
    `max_seq_len`, times `attention_factor`."""

    def __init__(self, rope: RopeConfig, dim: int, max_seq_len: int):
        super().__init__()
        rotated = int(rope.partial * dim // 2)
        periods = rope.theta ** (torch.arange(0, 2 * rotated, 2, device="cpu") / dim)
        self.attention_factor = 1.0
        if rope.scaling is None:
            inv_freq = 1.0 / periods / rope.factor
        else:
            inv_freq = rope.scaling(periods, rope.theta, max_seq_len)
            self.attention_factor = rope.scaling.attention_factor
        if rope.factors is not None:
            inv_freq = inv_freq / torch.tensor(rope.factors, device="cpu")
        # The other pairs keep the angle 0.
        inv_freq = F.pad(inv_freq, (0, dim // 2 - rotated))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        # Of the pairs that rotate; exporters may add others.
        is_scaled = self.attention_factor != 1.0
        lengths = torch.full_like(inv_freq, self.attention_factor) if is_scaled else None
        self.register_buffer("lengths", lengths, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions.float()[:, None] * self.inv_freq)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.lengths is not None:
            cos, sin = cos * self.lengths, sin * self.lengths
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def apply_rotary(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R elements of each head of x [B, T, H, D] by the
    angles whose cos and sin [..., R] are given. The other elements stay (partial rotary)."""
    cos, sin = rope
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([apply_rotary(x[..., :size], rope), x[..., size:]], -1)
    half = size // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.to(x.dtype) + swapped * sin.to(x.dtype)


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis (arXiv:1910.07467), float32 whatever x is."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """normalize(x) * (offset + weight) * scale over the last axis, in float32."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.eps, self.offset, self.scale = eps, offset, scale
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        x_hat, weight = normalize(x, self.eps), self.offset + self.weight.float()
        return (x_hat * (weight if self.scale == 1.0 else weight * self.scale)).to(x.dtype)


class ValueNorm(nn.Module):
    """normalize(x) over the last axis, in float32: a norm without weights."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.eps).to(x.dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` (positive) as `dtype` holds it. Python's arithmetic rounds it, so that a traced graph
    gets a number."""
    mantissa, exponent = math.frexp(value)
    steps = 2.0 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * steps) / steps, exponent)


# How much the clamped SwiGLU of gpt-oss lets through, and the slope of its sigmoid.
SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of a key of ACTIVATIONS, or gpt-oss's "clamped_swiglu": its parts are
    clamped, and 1 is added to what the gate multiplies."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation != "clamped_swiglu":
        raise ValueError(f"activation = {activation!r}: silu, gelu_tanh or clamped_swiglu")
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_SLOPE))


def kv_cache(
    layer_type: str, window: int, batch: int, max_seq_len: int, kv_heads: int, head_dim: int,
    dtype: torch.dtype,
) -> KVCache:  # fmt: skip
    """The cache of a layer of that type: a ring of `window` slots for sliding_attention."""
    # A ring never needs more slots than there are positions.
    if layer_type == "sliding_attention":
        cache, slots = SlidingCache, min(window, max_seq_len)
    else:
        cache, slots = FullCache, max_seq_len
    # A cache holds activations, so it is real where parameters may still be on "meta".
    with torch.device("cpu"):
        return cache(batch, slots, kv_heads, head_dim, dtype)


class Attention(nn.Module):
    """A Mixer: grouped-query attention over a KV cache, whose shape tells K and head_dim.

    It declares more than a Mixer: `heads`, `kv_heads`, `head_dim`, `scale`, `rotation`,
    `values_are_keys`, `output_gate`, and `q_norm`, `k_norm` and `v_norm`, which are modules or
    None, with `whole_norms`. `rotation` is the name of the network's rotary embedding for this
    layer. `sinks` [H], or None, are a score more of each head, which takes weight from the others
    and gives nothing. With `values_are_keys` there is no v_proj, and a value is the key before norm
    and rotation. With `output_gate` q_proj gives each head's query, then its gate, whose sigmoid
    multiplies the result. With `whole_norms` q_norm is of all heads' queries at once, and k_norm of
    all keys.
    """

    name, output = "self_attn", "o_proj"

    def __init__(
        self, layer_type: str, hidden_size: int, heads: int, cache: KVCache, scale: float, *,
        norm: Callable[[int], nn.Module] | None = None, v_norm: nn.Module | None = None,
        values_are_keys: bool = False, output_gate: bool = False, bias: bool = False,
        output_bias: bool = False, whole_norms: bool = False, rotation: str | None = None,
        has_sinks: bool = False, has_keys: bool = True, shares: bool = False,
    ):  # fmt: skip
        """`norm` makes the norms of queries and keys, given their size. `bias` is for queries, keys
        and values, and `output_bias` for o_proj. The `rotation` is `layer_type` unless it is given.
        Without `has_keys` the layer sees the keys and values of the last layer before it of its
        type that `shares` them, and `cache` only tells their shape.
        """
        super().__init__()
        kv_heads, head_dim = cache.k.shape[2:]
        self.layer_type, self.scale = layer_type, scale
        self.rotation, self.whole_norms = rotation or layer_type, whole_norms
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.values_are_keys, self.output_gate = values_are_keys, output_gate
        size, kv_size = heads * head_dim, kv_heads * head_dim
        self.has_keys, self.shares = has_keys, shares or not has_keys
        self.projections = ("q_proj",)
        if has_keys:
            self.projections += ("k_proj",) + ("v_proj",) * (not values_are_keys)
        self.q_proj = nn.Linear(hidden_size, size * (2 if output_gate else 1), bias=bias)
        if has_keys:
            self.k_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        if has_keys and not values_are_keys:
            self.v_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(size, hidden_size, bias=output_bias)
        self.q_norm = None if norm is None else norm(size if whole_norms else head_dim)
        self.k_norm = None
        if norm is not None and has_keys:
            self.k_norm = norm(kv_size if whole_norms else head_dim)
        self.v_norm = v_norm if has_keys else None
        self.sinks = nn.Parameter(torch.empty(heads)) if has_sinks else None
        # torch.export takes no state that has two names.
        self.cache = cache if has_keys else None

    def project(self, x: Tensor, rope: dict) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """(queries [B, T, H, head_dim], keys and values [B, T, K, head_dim] or None), and gates
        like the queries or None, for x [B, T, D]."""
        gate = None
        if self.output_gate:
            q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        else:
            q = self._by_head(self.q_proj(x), self.q_norm if self.whole_norms else None)
        if self.has_keys:
            k = self._by_head(self.k_proj(x), self.k_norm if self.whole_norms else None)
            v = k if self.values_are_keys else self._by_head(self.v_proj(x))
        q = q if self.q_norm is None or self.whole_norms else self.q_norm(q)
        q = apply_rotary(q, rope[self.rotation])
        if not self.has_keys:
            return (q, None, None), gate
        k = k if self.k_norm is None or self.whole_norms else self.k_norm(k)
        k = apply_rotary(k, rope[self.rotation])
        return (q, k, v if self.v_norm is None else self.v_norm(v)), gate

    def prefill(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, positions: Tensor,
        row: Tensor | None, seen: dict[str, tuple[Tensor, ...]] | None = None,
    ) -> Tensor:  # fmt: skip
        """The heads' results [1, T, H, head_dim] for a chunk of one row. `seen` has, by type of
        layer, what the chunk's queries see of a cache that is shared, once its first layer is
        through."""
        if not self.has_keys:
            return attend(q, *seen[self.layer_type], self.scale, self.sinks)
        options = () if seen is None else (seen, self.layer_type)
        return self.cache.prefill(q, k, v, positions, self.scale, row, self.sinks, *options)

    def decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, position: Tensor,
        seen: dict[str, tuple[Tensor, ...]] | None = None,
    ) -> Tensor:  # fmt: skip
        """The heads' results [B, 1, H, head_dim] for a step of all rows. `seen` is as in
        `prefill`."""
        if not self.has_keys:
            return attend(q, *seen[self.layer_type], self.scale, self.sinks)
        options = () if seen is None else (seen, self.layer_type)
        return self.cache.decode(q, k, v, position, self.scale, self.sinks, *options)

    def combine(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """The heads' results [B, T, H, head_dim], gated, brought back to [B, T, D]."""
        if gate is not None:
            attended = attended * gate.sigmoid()
        return self.o_proj(attended.reshape(attended.shape[0], -1, self.o_proj.in_features))

    def _by_head(self, projected: Tensor, norm: nn.Module | None = None) -> Tensor:
        projected = projected if norm is None else norm(projected)
        count = projected.shape[2] // self.head_dim
        return projected.view(projected.shape[0], -1, count, self.head_dim)


# Activations by the names that kernels use for them.
ACTIVATIONS = {"gelu_tanh": partial(nn.GELU, approximate="tanh"), "silu": nn.SiLU}


class MLP(nn.Module):
    """Gated feed-forward (arXiv:2002.05202): down(act(gate(x)) * up(x)).

    As a block's feed-forward it declares `moe` and `dense`. `moe` is None, because it has no routed
    experts. `dense` is the feed-forward that every token has, which is itself.
    """

    moe, reads_residual = None, False

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False,
        sparsity: float = 0.0,
    ):  # fmt: skip
        """`activation` is a key of ACTIVATIONS. With `sparsity` so much of a normal distribution of
        a token's gates becomes 0, and the others are what they are above that."""
        super().__init__()
        self.activation = activation
        self.cutoff = NormalDist().inv_cdf(sparsity) if sparsity else None
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act = ACTIVATIONS[activation]()

    @property
    def dense(self) -> "MLP":
        return self

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate_proj(x)
        gates = gates if self.cutoff is None else self._sparse(gates)
        return self.down_proj(self.act(gates) * self.up_proj(x))

    def _sparse(self, gates: Tensor) -> Tensor:
        """The gates above `cutoff` standard deviations from their mean, less that."""
        x = gates.float()
        mean = x.mean(-1, keepdim=True)
        deviation = (x - mean).square().mean(-1, keepdim=True).sqrt()
        return F.relu(x - (mean + deviation * self.cutoff)).to(gates.dtype)
