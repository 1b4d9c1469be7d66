"""The gated delta net (arXiv:2412.06464), named as in transformers' Qwen3.5 and Qwen3-Next.

The layer mixes tokens. It remembers a matrix for each head and the last inputs of a short
convolution, however many tokens there were. A prompt goes through the chunked form of the delta
rule, a step through its recurrence. Shapes: B rows, T tokens, D hidden size, G key heads and H
value heads of sizes K and V.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from tokenloop.models.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_update
from tokenloop.models.layers import normalize

PROJECTIONS = "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"
FUSED_PROJECTIONS = "in_proj_qkvz", "in_proj_ba"


@dataclass(frozen=True)
class DeltaNetConfig:
    """Sizes of a gated delta net, by a Hugging Face config's names.

    `fused_projections` is Qwen3-Next's layout: one projection to queries, keys, values and gates,
    grouped by key head, and one to b and a.
    """

    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    fused_projections: bool

    @property
    def parts(self) -> tuple[int, int, int]:
        """Channels of the convolution that are queries, keys and values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return keys, keys, self.linear_num_value_heads * self.linear_value_head_dim


class RMSNormGated(nn.Module):
    """weight * normalize(x) * silu(gate) over the last axis, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normal = self.weight * normalize(x, self.eps).to(x.dtype)
        return (normal * F.silu(gate.float())).to(x.dtype)


class DeltaNetCache(nn.Module):
    """What a gated delta net remembers of each row: the convolution's last inputs, `conv`
    [B, channels, width - 1], and `recurrent` float32 [B, H, K, V]."""

    def __init__(self, config: DeltaNetConfig, batch: int, dtype: torch.dtype):
        super().__init__()
        c = config
        shape = batch, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
        conv = torch.zeros(batch, sum(c.parts), c.linear_conv_kernel_dim - 1, dtype=dtype)
        self.register_buffer("conv", conv, persistent=False)
        self.register_buffer("recurrent", torch.zeros(shape), persistent=False)


class GatedDeltaNet(nn.Module):
    """A gated delta net, which is a Mixer. A row begins anew at position 0, whatever it remembered.

    It declares more than a Mixer: `key_heads`, `key_size`, `value_heads`, `value_size`, `parts`,
    `conv1d`, `A_log`, `dt_bias` and `norm`. `parts` are the convolution's channels that are
    queries, keys and values. `max_chunk` bounds the tokens of a prefill that is exported.
    """

    name, layer_type, output = "linear_attn", "linear_attention", "out_proj"
    shares = False

    def __init__(self, hidden_size: int, config: DeltaNetConfig, eps: float, cache: DeltaNetCache):
        super().__init__()
        self.parts, self.fused, self.max_chunk = config.parts, config.fused_projections, None
        self.key_heads, self.key_size = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads = config.linear_num_value_heads
        self.value_size = config.linear_value_head_dim
        channels, value_dim, size = sum(self.parts), self.parts[-1], hidden_size
        width = config.linear_conv_kernel_dim
        self.projections = FUSED_PROJECTIONS if self.fused else PROJECTIONS
        if self.fused:
            self.in_proj_qkvz = nn.Linear(size, channels + value_dim, bias=False)
            self.in_proj_ba = nn.Linear(size, 2 * self.value_heads, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(size, channels, bias=False)
            self.in_proj_z = nn.Linear(size, value_dim, bias=False)
            self.in_proj_b = nn.Linear(size, self.value_heads, bias=False)
            self.in_proj_a = nn.Linear(size, self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.norm = RMSNormGated(self.value_size, eps)
        self.out_proj = nn.Linear(value_dim, size, bias=False)
        self.cache = cache

    def project(self, x: Tensor, rope: dict) -> tuple[tuple[Tensor, ...], Tensor]:
        """(inputs of the convolution [B, T, channels], a and b [B, T, H]), and gates [B, T, H, V].
        Nothing is rotated."""
        heads = self.value_heads, self.value_size
        if not self.fused:
            z = self.in_proj_z(x).unflatten(-1, heads)
            return (self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x)), z
        shared = self.value_heads // self.key_heads  # value heads of a key head
        sizes = self.key_size, self.key_size, shared * self.value_size, shared * self.value_size
        grouped = self.in_proj_qkvz(x).unflatten(-1, (self.key_heads, sum(sizes)))
        q, k, v, z = (part.flatten(2) for part in grouped.split(sizes, -1))
        grouped = self.in_proj_ba(x).unflatten(-1, (self.key_heads, 2 * shared))
        b, a = (part.flatten(2) for part in grouped.split(shared, -1))
        return (torch.cat([q, k, v], -1), a, b), z.unflatten(-1, heads)

    def prefill(
        self, qkv: Tensor, a: Tensor, b: Tensor, positions: Tensor, row: Tensor | None
    ) -> Tensor:
        """The heads' results [1, T, H, V] for a chunk of one row."""
        cache, started = self.cache, positions[:1] > 0
        row = None if row is None else row.int()
        ends = torch.arange(2, dtype=torch.int32, device=qkv.device) * qkv.shape[1]
        weight = self.conv1d.weight[:, 0]
        mixed = causal_conv1d(qkv[0].T, weight, None, ends, cache.conv, row, started, "silu").T[
            None
        ]
        gates = a, b, self.A_log, self.dt_bias
        return gated_delta_rule(
            *self.split(mixed), *gates, cache.recurrent, row, started, self.max_chunk
        )

    def decode(self, qkv: Tensor, a: Tensor, b: Tensor, position: Tensor) -> Tensor:
        """The heads' results [B, 1, H, V] for a step of all rows."""
        cache, started = self.cache, position > 0
        mixed = causal_conv1d_update(
            qkv[:, 0], self.conv1d.weight[:, 0], None, cache.conv, None, started, "silu"
        )
        gates = a[:, 0], b[:, 0], self.A_log, self.dt_bias
        return gated_delta_rule_update(*self.split(mixed), *gates, cache.recurrent, None, started)[
            :, None
        ]

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [..., G, K] and values [..., H, V] of [..., channels]."""
        q, k, v = mixed.split(self.parts, -1)
        q, k = (x.unflatten(-1, (self.key_heads, self.key_size)) for x in (q, k))
        return q, k, v.unflatten(-1, (self.value_heads, self.value_size))

    def combine(self, out: Tensor, gate: Tensor) -> Tensor:
        """The heads' results [B, T, H, V], normalised, gated and brought back to [B, T, D]."""
        return self.out_proj(self.norm(out, gate).flatten(2))
