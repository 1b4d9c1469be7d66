"""The Triton kernel of what a step's rows have ahead of their experts: the norm, the scores of all
experts, and gate and up of the expert that every row has.

A row's result does not depend on the number of rows. Names: row b of `rows`, output n, input k of
K.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.linear.triton_epilogue import activate
from tokenloop.models.kernels.rms_norm.triton import norm_row, norm_weights


@triton.jit
def load_weights(w_ptr, n, k, N, K, exists):
    """Weights [n, k], or zeros if they do not exist."""
    # Rows beyond the last are the last: the results are not stored.
    offsets = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(w_ptr + offsets, mask=(k < K)[None, :] & exists, other=0.0)


@waits  # once it has the weights
@triton.jit(do_not_specialize=["rows"])
def scores_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, w_ptr, shared_w_ptr, total_ptr, h_ptr,
    scores_ptr, gated_ptr, rows, N, inner, K, eps: tl.constexpr, offset: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of a row's N scores, or behind those programs as many of its `inner` numbers
    activation(gate) * up. K <= BLOCK_K. With NORM a branch is added to the row, which is normed, by
    each program; the first stores what the row and its norm are then."""
    # Programs of the same weights run side by side, so that all but one find them in L2.
    b = tl.program_id(0) % rows
    tile = tl.program_id(0) // rows
    tiles = tl.cdiv(N, BLOCK_N)
    is_score = tile < tiles
    n = tl.where(is_score, tile, tile - tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # The weights do not wait for the norm.
    first = load_weights(w_ptr, n, k, N, K, is_score)
    if shared_w_ptr is not None:
        gates = load_weights(shared_w_ptr, n, k, inner, K, tile >= tiles)
        second_ptr = shared_w_ptr + tl.cast(inner, tl.int64) * K
        ups = load_weights(second_ptr, n, k, inner, K, tile >= tiles)
        first = tl.where(is_score, first, gates)
    if NORM:
        weight, post = norm_weights(norm_ptr, post_ptr, k, K, True)
        start = b * K + wait(0)
        total, h = norm_row(
            x_ptr, branch_ptr, post_ptr, scalar_ptr, weight, post, start, k, K, eps, offset, True
        )
        if tile == 0:
            tl.store(total_ptr + b * K + k, total, mask=k < K)
            tl.store(h_ptr + b * K + k, h, mask=k < K)
    else:
        h = tl.load(x_ptr + wait(0) + b * K + k, mask=k < K, other=0.0)
    h = h.to(tl.float32)[None, :]
    y = tl.sum(first.to(tl.float32) * h, 1)
    offsets = b.to(tl.int64) * N + n
    tl.store(scores_ptr + offsets, y.to(scores_ptr.dtype.element_ty), mask=is_score & (n < N))
    if shared_w_ptr is not None:
        y = activate(y, ACTIVATION) * tl.sum(ups.to(tl.float32) * h, 1)
        offsets = b.to(tl.int64) * inner + n
        mask = (tile >= tiles) & (n < inner)
        tl.store(gated_ptr + offsets, y.to(gated_ptr.dtype.element_ty), mask=mask)
