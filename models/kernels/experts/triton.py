"""Triton kernels of routed experts.

A row's result does not depend on the other rows: experts are added up in the order in which they
were chosen. Names: row b, choice j of C, expert e of E, output n of N, input k of K.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.experts.triton_groups import group_sums
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.linear.triton_epilogue import activate, gated


@waits  # once it has the count, which the host wrote
@triton.jit
def route_kernel(
    scores_ptr, count_ptr, scale_ptr, chosen_ptr, weights_ptr, E, width,
    C: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest of a row's first E scores, one after the other, and their probabilities; for the
    first count rows."""
    b = tl.program_id(0)
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    if count_ptr is not None:  # noqa: SIM102 - Triton decides this one, the GPU the other
        if b + zero >= count:
            return
    scores_ptr += zero
    scores = tl.load(scores_ptr + b * width + e, mask=e < E, other=float("-inf")).to(tl.float32)
    left = tl.exp(scores - tl.max(scores, 0))
    left = tl.where(e < E, left / tl.sum(left, 0), -1.0)
    chosen, weights = tl.zeros([BLOCK_C], tl.int64), tl.zeros([BLOCK_C], tl.float32)
    for i in tl.static_range(C):
        largest = tl.max(left, 0)
        # In a row of NaN none is the largest, and any expert will do.
        index = tl.minimum(tl.min(tl.where(left == largest, e, BLOCK_E), 0), E - 1)
        chosen = tl.where(j == i, index.to(tl.int64), chosen)
        weights = tl.where(j == i, largest, weights)
        left = tl.where(e == index, -1.0, left)
    if NORMALIZED:
        weights = weights / tl.sum(weights, 0)
    if scale_ptr is not None:
        weights *= tl.load(scale_ptr + chosen, mask=j < C, other=0.0).to(tl.float32)
    tl.store(chosen_ptr + b * C + j, chosen, mask=j < C)
    tl.store(weights_ptr + b * C + j, weights.to(weights_ptr.dtype.element_ty), mask=j < C)


@triton.jit
def products(acc, x_ptr, w_ptr, n, N, K, BLOCK_K: tl.constexpr):
    """acc [n, BLOCK_K] plus weights [n, k] times x [k], to be summed over its columns."""
    # Rows beyond the last are the last: the load needs no mask, and the results are not stored.
    rows = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc += w.to(tl.float32) * x[None, :]
    return acc


@waits  # at once: which weights it reads is what it waits for
@triton.jit
def gate_up_kernel(
    x_ptr, chosen_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr, N, K, ACTIVATION: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs activation(gate) * up of one row's choice: h [B, C, N]. GROUP inputs of a row
    have a scale, or none has with 0, or all of them."""
    pair = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    zero = wait(0)
    index = tl.load(chosen_ptr + zero + pair)
    expert = index * 2 * N * K
    row_ptr = x_ptr + zero + pair // C * K
    if GROUP:
        first, last = index * 2 * N, index * 2 * N + N
        # Gates end where ups begin.
        gate = group_sums(row_ptr, w_ptr, scale_ptr, first + n, last, K, GROUP, BLOCK_K // GROUP)
        first, last = last, last + N
        up = group_sums(row_ptr, w_ptr, scale_ptr, first + n, last, K, GROUP, BLOCK_K // GROUP)
    else:
        zeros = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        gate = products(zeros, row_ptr, w_ptr + expert, n, N, K, BLOCK_K)
        up = products(zeros, row_ptr, w_ptr + expert + tl.cast(N, tl.int64) * K, n, N, K, BLOCK_K)
        if scale_ptr is not None:
            scale_ptr += index * 2 * N
            gate *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
            up *= tl.load(scale_ptr + N + n, mask=n < N, other=0.0)[:, None]
    if bias_ptr is not None:
        bias_ptr += index * 2 * N
        gate = tl.sum(gate, 1) + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        up = tl.sum(up, 1) + tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        h = gated(gate, up, ACTIVATION)
    else:
        tl.static_assert(ACTIVATION != "clamped_swiglu")
        h = activate(tl.sum(gate, 1), ACTIVATION) * tl.sum(up, 1)
    tl.store(h_ptr + pair * N + n, h.to(h_ptr.dtype.element_ty), mask=n < N)


@waits  # at once: which weights it reads is what it waits for
@triton.jit
def down_kernel(
    h_ptr, chosen_ptr, weights_ptr, w_ptr, scale_ptr, bias_ptr, shared_ptr, scores_ptr, y_ptr,
    N, K, width,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a row: the weighted sum of what its experts make of h [B, C, K], plus the
    shared expert's output, which the last of the row's scores weighs. GROUP is gate_up_kernel's."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros([BLOCK_N], tl.float32)
    zero = wait(0)
    for j in range(C):
        pair = b * C + j + zero
        index = tl.load(chosen_ptr + pair)
        expert = index * N * K
        if GROUP:
            row_ptr, first = h_ptr + pair * K, index * N
            acc = group_sums(
                row_ptr, w_ptr, scale_ptr, first + n, first + N, K, GROUP, BLOCK_K // GROUP
            )
        else:
            acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            acc = products(acc, h_ptr + pair * K, w_ptr + expert, n, N, K, BLOCK_K)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        given = tl.sum(acc, 1)
        if not GROUP and scale_ptr is not None:
            given *= tl.load(scale_ptr + index * N + n, mask=n < N, other=0.0)
        if bias_ptr is not None:
            given += tl.load(bias_ptr + index * N + n, mask=n < N, other=0.0).to(tl.float32)
        y += weight * given
    if shared_ptr is not None:
        score = tl.load(scores_ptr + zero + b * width + width - 1).to(tl.float32)
        shared = tl.load(shared_ptr + zero + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        y += shared / (1 + tl.exp(-score))
    tl.store(y_ptr + b * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
