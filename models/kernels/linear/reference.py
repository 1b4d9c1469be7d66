"""Linear layers, and the norm before them, in plain torch: the operators' signatures, for any
device.

Shapes: B rows, K inputs, N outputs. `semaphores` are the kernels' own; they stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.kernels.linear.packing import FLOAT8, unpack, unpack_float8, weight_bits
from tokenloop.models.kernels.rms_norm.reference import add_norm, rms_norm

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def dequantize(weight: Tensor, scale: Tensor | None, inputs: int) -> Tensor:
    """float32 [N, K] of a weight, be it float, words of 4 or 8 bits, or float8."""
    bits = weight_bits(weight, inputs)
    if not bits:
        return weight.float()
    is_float = weight.dtype == FLOAT8
    values = (unpack_float8(weight, inputs) if is_float else unpack(weight, bits, inputs)).float()
    return values * scale.T.repeat_interleave(inputs // scale.shape[0], 1)


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, semaphores: Tensor, *,
    activation: str | None = None, soft_cap: float = 0.0, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """x [B, K] times the weight's transpose -> [B, N], of x's dtype or, if `out_float32`, float32.

    weight: float [N, K], or packed by packing.py with its `scale` [K / group, N]. With an
    `activation` the weight has 2 N rows, and the result is activation(first half) * second half.
    With a soft_cap c above 0 a result y becomes c * tanh(y / c).
    """
    y = x.float() @ dequantize(weight, scale, x.shape[1]).T
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    if soft_cap > 0:
        y = soft_cap * torch.tanh(y / soft_cap)
    return y if out_float32 else y.to(x.dtype)


def norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    semaphores: Tensor, *, eps: float, offset: float = 0.0, activation: str | None = None,
    soft_cap: float = 0.0, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """`linear` of the RMSNorm of x, rounded once."""
    h = rms_norm(x, norm_weight, eps, offset).to(x.dtype)
    options = {"activation": activation, "soft_cap": soft_cap, "out_float32": out_float32}
    return linear(h, weight, scale, bias, semaphores, **options)


def add_norm_linear(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    semaphores: Tensor, *, eps: float, offset: float = 0.0, activation: str | None = None,
    soft_cap: float = 0.0, out_float32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The new residual of `add_norm`, and `linear` of its norm."""
    residual = (x, branch, post_weight, layer_scalar, norm_weight)
    total, h = add_norm(*residual, eps=eps, offset=offset)
    options = {"activation": activation, "soft_cap": soft_cap, "out_float32": out_float32}
    return total, linear(h, weight, scale, bias, semaphores, **options)
