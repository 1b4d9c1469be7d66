"""The Triton kernel of linear layers over a chunk that loads by pointers: one tile a program.

It serves any shape, and float32. Each output is summed over the inputs in order, 16 at a time
(bfloat16) or one at a time (float32), in one float32 accumulator, whatever the tile's shape.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import release, wait_alone, waits
from tokenloop.models.kernels.launch.dot import dot
from tokenloop.models.kernels.linear_chunk.triton_tiles import ask_for_rows, finished, tile_place


@triton.jit
def load_tile(ptr, rows, k, K, EVEN: tl.constexpr):
    """[rows, k] of a matrix with K columns, zero beyond them."""
    offsets = rows[:, None] * K + k[None, :]
    if EVEN:
        return tl.load(ptr + offsets)
    return tl.load(ptr + offsets, mask=(k < K)[None, :], other=0.0)


@triton.jit
def store_outputs(y, up, scale_ptr, bias_ptr, y_ptr, t, n, count, N, ACTIVATION: tl.constexpr):
    """Finish sums of tokens t and outputs n, and store those that there are."""
    y = finished(y, up, scale_ptr, bias_ptr, n[None, :], N, ACTIVATION)
    offsets = t.to(tl.int64)[:, None] * N + n[None, :]
    mask = (t < count)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


# Alone, once it has asked for its first weights; it releases the next kernel when it has read what
# it reads. Where a layer has fewer tiles than there are processors, the programs of the next layer,
# which wait behind a norm, would otherwise all go to the processors that are left, and their
# weights come through those alone.
@waits
@triton.jit
def pointers_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, count_ptr, y_ptr, T, N, K,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr, FIRST: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """EVEN: K is a multiple of BLOCK_K. The FIRST programs ask for AHEAD inputs of their weights
    before the activations are there.

    A tile has EXTRA outputs beside its BLOCK_N, in an accumulator of their own: blocks are powers
    of two, and tiles between them may fill the processors.
    """
    count = tl.minimum(tl.load(count_ptr), T)
    # One at least: a program without a tile looks at the last one, and nothing is divided by 0.
    tiles_t = tl.cdiv(count, BLOCK_T)
    some_t = tl.maximum(tiles_t, 1)
    TILE_N: tl.constexpr = BLOCK_N + EXTRA
    GATED: tl.constexpr = ACTIVATION is not None
    tiles_n = tl.cdiv(N, TILE_N)
    tile = tl.program_id(0)
    place_t, place_n = tile_place(tl.minimum(tile, some_t * tiles_n - 1), some_t, tiles_n, GROUP)
    asked = 0
    if AHEAD > 0:
        # A program without a tile asks for nothing, and the first of several that share weights
        # asks for all of them.
        is_first = (tile < tl.minimum(tiles_t * tiles_n, FIRST)) & (place_t % GROUP == 0)
        ahead = tl.where(is_first, AHEAD, 0)
        asked = ask_for_rows(w_ptr, place_n * TILE_N, N, K, ahead, GATED, TILE_N)
    zero = wait_alone(asked)
    if tile + zero >= tiles_t * tiles_n:
        return
    x_ptr += zero
    t = place_t * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = place_n * TILE_N
    n = begin + tl.arange(0, BLOCK_N)
    # Rows beyond the last are the last: loads need no masks, and the results are not stored.
    row = tl.minimum(t, count - 1).to(tl.int64)
    first = tl.minimum(n, N - 1).to(tl.int64)
    second = first + N
    y = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if EXTRA > 0:
        m = begin + BLOCK_N + tl.arange(0, EXTRA)
        third = tl.minimum(m, N - 1).to(tl.int64)
        fourth = third + N
        z = tl.zeros([BLOCK_T, EXTRA], tl.float32)
        z_up = tl.zeros([BLOCK_T, EXTRA], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, row, k, K, EVEN)
        y = dot(x, load_tile(w_ptr, first, k, K, EVEN).T, y)
        if GATED:
            up = dot(x, load_tile(w_ptr, second, k, K, EVEN).T, up)
        if EXTRA > 0:
            z = dot(x, load_tile(w_ptr, third, k, K, EVEN).T, z)
            if GATED:
                z_up = dot(x, load_tile(w_ptr, fourth, k, K, EVEN).T, z_up)
    y_ptr += release(0)
    store_outputs(y, up, scale_ptr, bias_ptr, y_ptr, t, n, count, N, ACTIVATION)
    if EXTRA > 0:
        store_outputs(z, z_up, scale_ptr, bias_ptr, y_ptr, t, m, count, N, ACTIVATION)
