"""The norm and gate on CUDA, in one launch."""

import triton
from torch import Tensor, empty_like

from tokenloop.models.kernels.gated_rms_norm.triton import (
    gated_rms_norm_chunk_kernel,
    gated_rms_norm_kernel,
)
from tokenloop.models.kernels.launch.launches import launch, operator

# Numbers that a program of a packed chunk takes, and its warps.
NUMBERS = 2048, 4


@operator("gated_rms_norm")
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, count: Tensor | None = None
) -> Tensor:
    """See reference.gated_rms_norm. Raises ValueError where x or a head of the gate is not
    contiguous.

    With `count` a program takes several heads, however many rows there are: the order in which a
    head's squares are added, and so its result, depends on nothing but the head's size.
    """
    batch, heads, size = x.shape
    if not x.is_contiguous() or gate.stride(-1) != 1:
        raise ValueError(
            f"strides of x and gate are {x.stride()} and {gate.stride()}: x and each head of the "
            "gate must be contiguous"
        )
    out = empty_like(x)
    if count is not None:
        numbers, warps = NUMBERS
        block = triton.next_power_of_2(size)
        block_rows = max(1, numbers // block)
        launch(gated_rms_norm_chunk_kernel, (triton.cdiv(batch * heads, block_rows),))(
            x, gate, weight, count, out, heads, size, *gate.stride()[:2], eps,
            BLOCK_ROWS=block_rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return out
    launch(gated_rms_norm_kernel, (batch * heads,))(
        x, gate, weight, out, heads, size, *gate.stride()[:2], eps,
        BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return out
