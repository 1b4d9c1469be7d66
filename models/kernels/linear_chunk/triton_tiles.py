"""What the kernels of linear layers over a chunk share.

Names: token t of T, output n of N, input k of K. A gated layer's weight has 2 N rows, of which one
tile takes n and N + n.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.linear.triton_epilogue import finish


@triton.jit
def tile_place(tile, tiles_t, tiles_n, GROUP: tl.constexpr):
    """The place along t and n of a tile: those that run at one time are GROUP tiles of tokens, and
    so share what L2 holds."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    size = tl.minimum(tiles_t - first, GROUP)
    return first + tile % width % size, tile % width // size


@triton.jit
def finished(y, up, bias_ptr, n, N, ACTIVATION: tl.constexpr):
    """float32 results of sums y and `up`; n broadcasts with them."""
    return finish(y, up, bias_ptr, n, N, 0.0, ACTIVATION, False)
