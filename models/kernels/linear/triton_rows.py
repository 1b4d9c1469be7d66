"""The Triton kernel of linear layers that multiplies and adds for one row a program.

It can norm the row first. A row's result does not depend on the number of rows: each output is
summed over the inputs in one order. Numbers such as `eps` are constants: as arguments torch's
compiler would pass them as float64.

Names: row b of `rows`, output n of N, input k of K. A gated layer's weight has 2 N rows, of which
one program takes n and N + n.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import prefetch_rows, wait, waits
from tokenloop.models.kernels.linear.triton_epilogue import finish
from tokenloop.models.kernels.rms_norm.triton import norm_row, norm_weights


@triton.jit
def load_weights(w_ptr, n, k, N, K):
    """Weights [n, k]."""
    # Rows beyond the last are the last: the load needs no mask, and the results are not stored.
    offsets = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(w_ptr + offsets, mask=(k < K)[None, :], other=0.0)


# One program for any number of rows: none is a special case with other arithmetic.
@waits  # once it has, or has asked for, the weights
@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, w_ptr, bias_ptr, total_ptr, y_ptr,
    rows, N, K, eps: tl.constexpr, offset: tl.constexpr, soft_cap: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr, SOFT_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a row. A norm before them needs K <= BLOCK_K. With AHEAD the weights are
    asked for before the activations."""
    # Programs of the same weights run side by side, so that all but one find them in L2.
    b = tl.program_id(0) % rows
    tile = tl.program_id(0) // rows
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    second_ptr = w_ptr + tl.cast(N, tl.int64) * K
    if NORM:
        k = tl.arange(0, BLOCK_K)
        # The weights do not wait for the norm.
        w = load_weights(w_ptr, n, k, N, K)
        if ACTIVATION is not None:
            second = load_weights(second_ptr, n, k, N, K)
        weight, post = norm_weights(norm_ptr, post_ptr, k, K, ADD)
        start = b * K + wait(0)
        total, h = norm_row(
            x_ptr, branch_ptr, post_ptr, scalar_ptr, weight, post, start, k, K, eps, offset, ADD
        )
        if ADD and tile == 0:
            tl.store(total_ptr + b * K + k, total, mask=k < K)
        gate += w.to(tl.float32) * h.to(tl.float32)[None, :]
        if ACTIVATION is not None:
            up += second.to(tl.float32) * h.to(tl.float32)[None, :]
    else:
        # Here they do not wait either. They lie one row after the other.
        asked = 0
        if AHEAD:
            bytes_of: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
            skipped = (tile * BLOCK_N).to(tl.int64) * K
            size = tl.minimum(N - tile * BLOCK_N, BLOCK_N) * K * bytes_of
            asked = prefetch_rows(w_ptr + skipped, 0, 1, size)
            if ACTIVATION is not None:
                asked += prefetch_rows(second_ptr + skipped, 0, 1, size)
        x_ptr += wait(asked)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            h = tl.load(x_ptr + b * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            gate += load_weights(w_ptr, n, k, N, K).to(tl.float32) * h
            if ACTIVATION is not None:
                up += load_weights(second_ptr, n, k, N, K).to(tl.float32) * h
    y = finish(tl.sum(gate, 1), tl.sum(up, 1), bias_ptr, n, N, soft_cap, ACTIVATION, SOFT_CAP)
    y_offsets = b.to(tl.int64) * N + n
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=n < N)
