"""Linear layers over a packed chunk in plain torch: the operators' signatures, for any device.

Shapes: T tokens, K inputs, O outputs.
"""

import torch
from torch import Tensor

from tokenloop.models.kernels.linear import reference
from tokenloop.models.kernels.linear.packing import leaves_scale, unpack_float8


def linear_chunk(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, count: Tensor, *,
    activation: str | None = None, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """x [T, K] times the weight's transpose -> [T, O], of x's dtype or, if `out_float32`, float32.

    Rows from `count` int32 [1] on are anything. weight: [O, K] of x's dtype, or one packed by
    linear/packing.py with its `scale`; weights times scales are rounded to bfloat16 first, but
    float8 with a scale for each row is not rounded. With an `activation` the weight has 2 O rows,
    and the result is activation(first half) * second half.
    """
    if leaves_scale(weight, scale):
        weight = reference.dequantize(weight, scale, x.shape[1])
    elif scale is not None:
        weight = dequantize(weight, scale, x.shape[1])
    options = {"activation": activation, "out_float32": out_float32}
    return reference.linear(x, weight, None, bias, count, **options)


def dequantize(weight: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """bfloat16 [O, inputs] of a weight packed by linear/packing.py: times its scale, but for
    float8 with a scale for each row, which are `linear_chunk`'s to multiply by."""
    if leaves_scale(weight, scale):
        return unpack_float8(weight, inputs).to(torch.bfloat16)
    return reference.dequantize(weight, scale, inputs).to(torch.bfloat16)
