"""What the kernels of linear layers over a chunk share.

Names: token t of T, output n of N, input k of K. A gated layer's weight has 2 N rows, of which one
tile takes n and N + n.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import prefetch_rows
from tokenloop.models.kernels.linear.triton_epilogue import finish


@triton.jit
def tile_place(tile, tiles_t, tiles_n, GROUP: tl.constexpr):
    """The place along t and n of a tile: those that run at one time are GROUP tiles of tokens, and
    so share what L2 holds."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    size = tl.minimum(tiles_t - first, GROUP)
    return first + tile % width % size, tile % width // size


# Rows that one request can name: every kernel here has as many threads or more.
ROWS_ASKED = tl.constexpr(128)


@triton.jit
def ask_for_rows(w_ptr, n, N, width, ahead, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """int32 0. Asks L2 for the first `ahead` of `width` elements of the weight's rows from n on, of
    which a tile has BLOCK_N; nothing where `ahead` is 0. Rows are a multiple of 16 bytes."""
    bytes_of: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    asked = 0
    for part in tl.static_range((BLOCK_N + ROWS_ASKED - 1) // ROWS_ASKED):
        first = n + part * ROWS_ASKED
        count = tl.minimum(tl.minimum(N - first, BLOCK_N - part * ROWS_ASKED), ROWS_ASKED)
        # Beyond the last row, and where nothing is to be asked for, it is for no rows.
        count = tl.where(ahead > 0, tl.maximum(count, 0), 0)
        given = width * bytes_of, count, tl.minimum(ahead, width) * bytes_of
        skipped = first.to(tl.int64) * width
        asked += prefetch_rows(w_ptr + skipped, *given)
        if GATED:
            asked += prefetch_rows(w_ptr + (skipped + tl.cast(N, tl.int64) * width), *given)
    return asked


@triton.jit
def finished(y, up, scale_ptr, bias_ptr, n, N, ACTIVATION: tl.constexpr):
    """float32 results of sums y and `up`, which are multiplied by their rows' scales if there are
    any; n broadcasts with them."""
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
        if ACTIVATION is not None:
            up *= tl.load(scale_ptr + N + n, mask=n < N, other=0.0)
    return finish(y, up, bias_ptr, n, N, 0.0, ACTIVATION, False)
