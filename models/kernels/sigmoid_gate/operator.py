"""A product with the sigmoid of gates on CUDA, in one launch."""

import triton
from torch import Tensor, empty_like

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.sigmoid_gate.triton import gate_kernel

BLOCK_C = 2048


@operator("sigmoid_gate")
def sigmoid_gate(x: Tensor, gate: Tensor, count: Tensor | None = None) -> Tensor:
    """See reference.sigmoid_gate. The gate's rows may be any distance apart; ValueError tells of
    one whose elements do not lie side by side, or of another shape or dtype."""
    check_contiguous(x=x)
    if gate.shape != x.shape or gate.dtype != x.dtype or gate.stride(1) != 1:
        raise ValueError(
            f"a gate {tuple(gate.shape)} of {gate.dtype} and strides {gate.stride()} for "
            f"{tuple(x.shape)} of {x.dtype}"
        )
    rows, size = x.shape
    y = empty_like(x)
    grid = rows, triton.cdiv(size, BLOCK_C)
    launch(gate_kernel, grid)(
        x, gate, count, y, size, gate.stride(0), BLOCK_C=BLOCK_C, num_warps=4
    )  # fmt: skip
    return y
