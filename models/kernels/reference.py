"""What the operators of cuda.py give, in plain torch: the same signatures, for any device.

Shapes: B rows, K inputs, N outputs, H query heads, G key/value heads, Dh head size, S slots.
`counters` are the kernels' own and stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.kernels.packing import unpack, weight_bits

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """float32 x / rms(x) * (offset + weight) over the last axis (arXiv:1910.07467)."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * (offset + weight.float())


def dequantize(weight: Tensor, scale: Tensor | None, inputs: int) -> Tensor:
    """float32 [N, K] of a weight in any of its forms."""
    bits = weight_bits(weight, inputs)
    if not bits:
        return weight.float()
    values = unpack(weight, bits, inputs).float()
    return values * scale.T.repeat_interleave(inputs // scale.shape[0], 1)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """x [B, K] times the weight's transpose -> [B, N], of x's dtype or, if `wide`, float32.

    weight: float [N, K], or words of packing.py with their `scale` [K / group, N]. With an
    `activation` the weight has 2 N rows, and activation(first half) * second half is given. A
    soft_cap c above 0 makes it c * tanh(y / c).
    """
    y = x.float() @ dequantize(weight, scale, x.shape[1]).T
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    if soft_cap > 0:
        y = soft_cap * torch.tanh(y / soft_cap)
    return y if wide else y.to(x.dtype)


def norm(x: Tensor, norm_weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm of x [B, K], rounded once."""
    return rms_norm(x, norm_weight, eps, offset).to(x.dtype)


def add_norm(
    x: Tensor,
    branch: Tensor,
    post_weight: Tensor | None,
    layer_scalar: Tensor | None,
    norm_weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The new residual (x + post norm(branch)) * layer_scalar [B, K], and its norm.

    Both are computed in float32 and rounded once; the norm is that of the rounded residual.
    layer_scalar is of one element.
    """
    branch = branch.float() if post_weight is None else rms_norm(branch, post_weight, eps, offset)
    total = x.float() + branch
    if layer_scalar is not None:
        total = total * layer_scalar.float()
    total = total.to(x.dtype)
    return total, norm(total, norm_weight, eps=eps, offset=offset)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """`linear` of `norm`."""
    h = norm(x, norm_weight, eps=eps, offset=offset)
    options = {"activation": activation, "soft_cap": soft_cap, "wide": wide}
    return linear(h, weight, scale, bias, counters, **options)


def add_norm_linear(
    x: Tensor,
    branch: Tensor,
    post_weight: Tensor | None,
    layer_scalar: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """The new residual of `add_norm`, and `linear` of its norm."""
    residual = (x, branch, post_weight, layer_scalar, norm_weight)
    total, h = add_norm(*residual, eps=eps, offset=offset)
    options = {"activation": activation, "soft_cap": soft_cap, "wide": wide}
    return total, linear(h, weight, scale, bias, counters, **options)


def attend_step(
    qkv: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    inv_freq: Tensor,
    counters: Tensor,
    *,
    scale: float,
    eps: float,
    offset: float = 0.0,
    value_norm: bool = False,
    values_are_keys: bool = False,
) -> Tensor:
    """One token's attention of each row, after its key and value are put into the caches.

    qkv [B, (H + 2 G) * Dh] -> [B, H * Dh]; position int64 [B]; caches [B, S, G, Dh], position p
    in slot p % S; inv_freq float32 [Dh / 2], 0 where a pair is not rotated. With values_are_keys
    qkv is [B, (H + G) * Dh] and a value is its key before norm and rotation; value_norm is a norm
    without weight.
    """
    rows, slots, kv_heads, head_dim = k_cache.shape
    heads = qkv.shape[1] // head_dim - kv_heads * (1 if values_are_keys else 2)
    q, k, *rest = qkv.view(rows, -1, head_dim).split(
        [heads, kv_heads] if values_are_keys else [heads, kv_heads, kv_heads], dim=1
    )
    v = k if values_are_keys else rest[0]
    angles = (position.float()[:, None] * inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()

    def prepare(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float() if weight is None else rms_norm(x, weight, eps, offset)
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated.to(qkv.dtype)

    q, k = prepare(q, q_norm), prepare(k, k_norm)
    if value_norm:
        v = rms_norm(v, None, eps, offset).to(qkv.dtype)
    row = torch.arange(rows, device=qkv.device)
    k_cache.index_put_((row, position % slots), k)
    v_cache.index_put_((row, position % slots), v)

    grouped = q.float().view(rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bghd,bsgd->bghs", grouped, k_cache.float()) * scale
    filled = torch.arange(slots, device=qkv.device) <= position[:, None]
    scores = scores.masked_fill(~filled[:, None, None], -torch.inf).softmax(-1)
    out = torch.einsum("bghs,bsgd->bghd", scores, v_cache.float())
    return out.reshape(rows, -1).to(qkv.dtype)


def route(scores: Tensor, experts: int, count: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The `count` experts with the largest of scores [B, E or more], whose first E are those of
    `experts`: int64 [B, count], the first of equal ones first; and their probabilities, of the
    scores' dtype, which add up to 1 if `normalized`."""
    probabilities = F.softmax(scores[:, :experts].float(), dim=-1)
    weights, chosen = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :count], chosen[:, :count]
    if normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights.to(scores.dtype)


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """SiLU-gated feed-forwards of x [B, K], by the experts chosen int64 [B, C], weighted with
    weights [B, C] and added up: [B, K].

    gate_up [E, 2 I, K], down [E, K, I]. What lies between the two is rounded to x's dtype. What an
    expert gives that all rows have, `shared` [B, K], is added as well, weighted with the sigmoid of
    the last of `scores` [B, S].
    """
    gate, up = torch.einsum("bk,bcik->bci", x.float(), gate_up[chosen].float()).chunk(2, dim=-1)
    hidden = (F.silu(gate) * up).to(x.dtype).float()
    out = torch.einsum("bci,bcki->bck", hidden, down[chosen].float())
    out = (out * weights.float()[..., None]).sum(1)
    if shared is not None:
        out = out + scores[:, -1:].float().sigmoid() * shared.float()
    return out.to(x.dtype)
