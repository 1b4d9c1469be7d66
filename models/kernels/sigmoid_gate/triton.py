"""The Triton kernel of a product with the sigmoid of gates. Names: row b, element c of C."""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits


@waits  # once it has the count, which the host wrote
@triton.jit
def gate_kernel(x_ptr, gate_ptr, count_ptr, y_ptr, C, gate_stride, BLOCK_C: tl.constexpr):
    """BLOCK_C elements of a row; rows of gates are gate_stride apart."""
    b = tl.program_id(0).to(tl.int64)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    # One of the two conditions is of constants.
    if count_ptr is not None:  # noqa: SIM102
        if b + zero >= count:
            return
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + zero + b * C + c, mask=c < C, other=0.0)
    gate = tl.load(gate_ptr + zero + b * gate_stride + c, mask=c < C, other=0.0)
    # As torch does it: the sigmoid is rounded before the product.
    gate = tl.div_rn(1.0, 1.0 + tl.exp(-gate.to(tl.float32))).to(x.dtype)
    y = (x.to(tl.float32) * gate.to(tl.float32)).to(x.dtype)
    tl.store(y_ptr + b * C + c, y, mask=c < C)
