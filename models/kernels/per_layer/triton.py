"""The Triton kernels of per-layer embeddings. Names: row b, layer l of L, element p of P."""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.linear.triton_epilogue import activate
from tokenloop.models.kernels.rms_norm.triton import rms_norm


@waits  # once it has the weight and the count, which the host wrote
@triton.jit
def layer_inputs_kernel(
    projected_ptr, own_ptr, norm_ptr, count_ptr, y_ptr, P, eps: tl.constexpr,
    offset: tl.constexpr, share: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One layer's input of a row: `share` times the sum of a norm and the token's own vector."""
    b, layer = tl.program_id(0), tl.program_id(1)
    p = tl.arange(0, BLOCK_P)
    mask = p < P
    weight = offset + tl.load(norm_ptr + p, mask=mask, other=0.0).to(tl.float32)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    # One of the two conditions is of constants.
    if count_ptr is not None:  # noqa: SIM102
        if b + zero >= count:
            return
    start = (b.to(tl.int64) * tl.num_programs(1) + layer) * P
    x = tl.load(projected_ptr + zero + start + p, mask=mask, other=0.0)
    own = tl.load(own_ptr + zero + start + p, mask=mask, other=0.0).to(tl.float32)
    y = (rms_norm(x.to(tl.float32), weight, P, eps) + own) * share
    tl.store(y_ptr + start + p, y.to(x.dtype), mask=mask)


@waits  # once it has the count, which the host wrote
@triton.jit
def gate_input_kernel(
    gate_ptr, given_ptr, count_ptr, y_ptr, P, given_stride, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_P elements of a row; rows of `given` are given_stride apart."""
    b = tl.program_id(0).to(tl.int64)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    # One of the two conditions is of constants.
    if count_ptr is not None:  # noqa: SIM102
        if b + zero >= count:
            return
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    gate = tl.load(gate_ptr + zero + b * P + p, mask=p < P, other=0.0)
    given = tl.load(given_ptr + zero + b * given_stride + p, mask=p < P, other=0.0)
    y = activate(gate.to(tl.float32), ACTIVATION) * given.to(tl.float32)
    tl.store(y_ptr + b * P + p, y.to(gate.dtype), mask=p < P)
