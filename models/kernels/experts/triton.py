"""Triton kernels of routed experts.

A row's result does not depend on the other rows: experts are added up in the order in which they
were chosen. Names: row b, choice j of C, expert e of E, output n of N, input k of K.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.experts.triton_groups import group_sums
from tokenloop.models.kernels.launch.dependent_launch import prefetch_rows, wait, waits
from tokenloop.models.kernels.linear.triton_epilogue import activate, gated


@triton.jit
def routed(
    scores_ptr, scale_ptr, E,
    C: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The experts of a row's largest scores, int32 [BLOCK_C], one after the other, and their
    weights in float32. Every kernel gets the same bits: scores are compared as integers, whose
    largest a warp finds by one instruction, and sums are made in float64."""
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    scores = tl.load(scores_ptr + e, mask=e < E, other=float("-inf")).to(tl.float32)
    # Zeros of either sign are one number. Bits of negative numbers come in descending order.
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    left = tl.where(e < E, bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31))
    chosen, largest = tl.zeros([BLOCK_C], tl.int32), tl.zeros([BLOCK_C], tl.int32)
    for i in tl.static_range(C):
        first = tl.max(left, 0)
        # There may be nothing but NaN, and any expert will do.
        index = tl.minimum(tl.min(tl.where(left == first, e, BLOCK_E), 0), E - 1)
        chosen = tl.where(j == i, index, chosen)
        largest = tl.where(j == i, first, largest)
        left = tl.where(e == index, -(2**31), left)
    bits = largest ^ ((largest >> 31) & 0x7FFFFFFF)
    most = tl.max(scores, 0)
    weights = tl.where(j < C, tl.exp(bits.to(tl.float32, bitcast=True) - most), 0.0)
    if NORMALIZED:
        total = tl.sum(weights.to(tl.float64), 0)
    else:
        total = tl.sum(tl.where(e < E, tl.exp(scores - most), 0.0).to(tl.float64), 0)
    weights /= total.to(tl.float32)
    if scale_ptr is not None:
        weights *= tl.load(scale_ptr + chosen, mask=j < C, other=0.0).to(tl.float32)
    return chosen, weights


@triton.jit
def store_routed(chosen_ptr, weights_ptr, b, chosen, weights, C: tl.constexpr):
    """What `routed` gave for row b."""
    j = tl.arange(0, chosen.shape[0])
    tl.store(chosen_ptr + b * C + j, chosen.to(tl.int64), mask=j < C)
    tl.store(weights_ptr + b * C + j, weights.to(weights_ptr.dtype.element_ty), mask=j < C)


@waits  # once it has the count, which the host wrote
@triton.jit
def route_kernel(
    scores_ptr, count_ptr, scale_ptr, chosen_ptr, weights_ptr, E, width,
    C: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`routed` of each of the first count rows."""
    b = tl.program_id(0)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    if count_ptr is not None:  # noqa: SIM102 - Triton decides this one, the GPU the other
        if b + zero >= count:
            return
    row_ptr = scores_ptr + zero + b * width
    chosen, weights = routed(row_ptr, scale_ptr, E, C, NORMALIZED, BLOCK_E, BLOCK_C)
    store_routed(chosen_ptr, weights_ptr, b, chosen, weights, C)


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


@triton.jit
def gated_products(x_ptr, w_ptr, n, N, K, BLOCK_K: tl.constexpr):
    """Weights [n, k] of gates, which are N rows, and of as many ups behind them, times x [k]; each
    float32 [n, BLOCK_K], to be summed over its columns."""
    gate = tl.zeros([n.shape[0], BLOCK_K], tl.float32)
    up = tl.zeros([n.shape[0], BLOCK_K], tl.float32)
    rows = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    second_ptr = w_ptr + tl.cast(N, tl.int64) * K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < K)[None, :]
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(w_ptr + rows + k[None, :], mask=mask, other=0.0).to(tl.float32) * x
        up += tl.load(second_ptr + rows + k[None, :], mask=mask, other=0.0).to(tl.float32) * x
    return gate, up


@waits  # at once: which weights it reads is what it waits for
@triton.jit
def gate_up_kernel(
    x_ptr, scores_ptr, expert_scale_ptr, chosen_ptr, weights_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr,
    N, K, E, width,
    ACTIVATION: tl.constexpr, C: tl.constexpr, NORMALIZED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs activation(gate) * up of one row's choice: h [B, C, N]. GROUP inputs of a row
    have a scale, or none has with 0, or all of them.

    Where there are scores [B, width] each program finds out which expert its choice is, and a row's
    first program stores what the row chose.
    """
    pair = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    zero = wait(0)
    b = pair // C
    if scores_ptr is not None:
        row_ptr = scores_ptr + zero + b * width
        chosen, weights = routed(row_ptr, expert_scale_ptr, E, C, NORMALIZED, BLOCK_E, BLOCK_C)
        own = tl.arange(0, BLOCK_C) == pair % C
        index = tl.sum(tl.where(own, chosen, 0), 0).to(tl.int64)
        if (tile == 0) & (pair % C == 0):
            store_routed(chosen_ptr, weights_ptr, b, chosen, weights, C)
    else:
        index = tl.load(chosen_ptr + zero + pair)
    expert = index * 2 * N * K
    row_ptr = x_ptr + zero + b * K
    if GROUP:
        first, last = index * 2 * N, index * 2 * N + N
        # Gates end where ups begin.
        gate = group_sums(row_ptr, w_ptr, scale_ptr, first + n, last, K, GROUP, BLOCK_K // GROUP)
        first, last = last, last + N
        up = group_sums(row_ptr, w_ptr, scale_ptr, first + n, last, K, GROUP, BLOCK_K // GROUP)
    else:
        gate, up = gated_products(row_ptr, w_ptr + expert, n, N, K, BLOCK_K)
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


@triton.jit
def choices_products(
    h_ptr, w_ptr, index, pairs, exists, n, N, K, BLOCK_K: tl.constexpr
):  # fmt: skip
    """float32 [c, n]: of each choice that `exists`, weights [n, k] times h [k]. The experts lie
    side by side, so that the weights of all are on their way at once."""
    rows = tl.minimum(n, N - 1).to(tl.int64)[None, :] + index[:, None] * N
    acc = tl.zeros([index.shape[0], n.shape[0], BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = exists[:, None] & (k < K)[None, :]
        x = tl.load(h_ptr + pairs[:, None] * K + k[None, :], mask=mask, other=0.0)
        w = tl.load(
            w_ptr + rows[:, :, None] * K + k[None, None, :], mask=mask[:, None, :], other=0.0
        )
        acc += w.to(tl.float32) * x.to(tl.float32)[:, None, :]
    return tl.sum(acc, 2)


@waits  # once it has asked for what all rows have: which other weights it reads is yet to be known
@triton.jit
def down_kernel(
    h_ptr, chosen_ptr, weights_ptr, w_ptr, scale_ptr, bias_ptr, shared_ptr, hidden_ptr,
    shared_w_ptr, scores_ptr, y_ptr, N, K, width, shared_size,
    C: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a row: the weighted sum of what its experts make of h [B, C, K], plus the
    shared expert's output, which the last of the row's scores weighs: it is `shared` [B, N], or
    what shared_w [N, shared_size] makes of hidden [B, shared_size]. GROUP is gate_up_kernel's."""
    b = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    asked = 0
    if AHEAD:
        bytes_of: tl.constexpr = shared_w_ptr.dtype.element_ty.primitive_bitwidth // 8
        size = tl.minimum(N - tile * BLOCK_N, BLOCK_N) * shared_size * bytes_of
        skipped = (tile * BLOCK_N).to(tl.int64) * shared_size
        asked = prefetch_rows(shared_w_ptr + skipped, 0, 1, size)
    zero = wait(asked)
    y = tl.zeros([BLOCK_N], tl.float32)
    if GROUP:
        for j in range(C):
            pair = b * C + j + zero
            index = tl.load(chosen_ptr + pair)
            row_ptr, first = h_ptr + pair * K, index * N
            acc = group_sums(
                row_ptr, w_ptr, scale_ptr, first + n, first + N, K, GROUP, BLOCK_K // GROUP
            )
            weight = tl.load(weights_ptr + pair).to(tl.float32)
            given = tl.sum(acc, 1)
            if bias_ptr is not None:
                given += tl.load(bias_ptr + index * N + n, mask=n < N, other=0.0).to(tl.float32)
            y += weight * given
    else:
        c = tl.arange(0, BLOCK_C)
        pairs, exists = b * C + zero + c, c < C
        index = tl.load(chosen_ptr + pairs, mask=exists, other=0)
        weights = tl.load(weights_ptr + pairs, mask=exists, other=0.0).to(tl.float32)
        given = choices_products(h_ptr, w_ptr, index, pairs, exists, n, N, K, BLOCK_K)
        outputs, mask = index[:, None] * N + n[None, :], exists[:, None] & (n < N)[None, :]
        if scale_ptr is not None:
            given *= tl.load(scale_ptr + outputs, mask=mask, other=0.0)
        if bias_ptr is not None:
            given += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
        given *= weights[:, None]
        # In the order in which they were chosen.
        for j in tl.static_range(C):
            y += tl.sum(tl.where(c[:, None] == j, given, 0.0), 0)
    if scores_ptr is not None:
        score = tl.load(scores_ptr + zero + b * width + width - 1).to(tl.float32)
        if shared_ptr is not None:
            shared = tl.load(shared_ptr + zero + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        else:
            acc = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
            row_ptr = hidden_ptr + zero + b * shared_size
            acc = products(acc, row_ptr, shared_w_ptr, n, N, shared_size, BLOCK_S)
            shared = tl.sum(acc, 1)
        y += shared / (1 + tl.exp(-score))
    tl.store(y_ptr + b * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
