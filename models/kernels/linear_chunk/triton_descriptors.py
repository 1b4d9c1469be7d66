"""The Triton kernel of linear layers over a chunk that copies tiles by tensor descriptors.

A program stays and takes one tile after the other. Each output is summed over the inputs in order,
16 at a time, in one float32 accumulator, whatever the tile's shape.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.dot import dot
from tokenloop.models.kernels.linear_chunk.triton_tiles import ask_for_rows, finished, tile_place


# Once it has its descriptors, whose memory is this launch's own, and has asked for its first
# weights. It releases the next kernel at once: a processor has room for one such program, so those
# of another layer are placed evenly.
@waits
@triton.jit
def descriptors_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, count_ptr, y_ptr, T, N, K,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, AHEAD: tl.constexpr, EXTRA: tl.constexpr = 0,
):  # fmt: skip
    """Outputs are stored in PARTS parts, 1 or 2, so that less shared memory is kept for them. K and
    N are multiples of 16 bytes. Every program asks for AHEAD inputs of its first weights before the
    activations are there.

    A tile has BLOCK_N + EXTRA outputs, in two accumulators where EXTRA is not 0: blocks are powers
    of two, and tiles between them leave fewer processors without work. A gated layer has no EXTRA.
    """
    # Rows beyond `count` give rows that nobody reads. The copies fill with zeros beyond K.
    tiles_t = tl.cdiv(tl.minimum(tl.load(count_ptr), T), BLOCK_T)
    TILE_N: tl.constexpr = BLOCK_N + EXTRA
    tiles_n = tl.cdiv(N, TILE_N)
    step = tl.num_programs(0)
    GATED: tl.constexpr = ACTIVATION is not None
    x_desc = tl.make_tensor_descriptor(x_ptr, [T, K], [K, 1], [BLOCK_T, BLOCK_K])
    rows = N * 2 if GATED else N
    w_desc = tl.make_tensor_descriptor(w_ptr, [rows, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [T, N], [N, 1], [BLOCK_T, BLOCK_N // PARTS])
    tl.static_assert(EXTRA == 0 or (not GATED and PARTS == 1))
    if EXTRA:
        extra_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [EXTRA, BLOCK_K])
        z_desc = tl.make_tensor_descriptor(y_ptr, [T, N], [N, 1], [BLOCK_T, EXTRA])
    asked = 0
    if AHEAD > 0:
        some_t = tl.maximum(tiles_t, 1)
        last = tl.minimum(tl.program_id(0), some_t * tiles_n - 1)
        place_t, place_n = tile_place(last, some_t, tiles_n, GROUP)
        is_first = (tl.program_id(0) < tiles_t * tiles_n) & (place_t % GROUP == 0)
        ahead = tl.where(is_first, AHEAD, 0)
        asked = ask_for_rows(w_ptr, place_n * TILE_N, N, K, ahead, GATED, BLOCK_N)
    # Every place depends on the tile's number, and so all loads come after this. A program without
    # a tile waits, too.
    begin = tl.program_id(0) + wait(asked)
    # The tile that is stored is counted apart: loads of the next need not wait for it.
    stored = tl.program_id(0) - step
    for tile in tl.range(
        begin, tiles_t * tiles_n, step, flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        place_t, place_n = tile_place(tile, tiles_t, tiles_n, GROUP)
        t = place_t * BLOCK_T
        n = place_n * TILE_N
        y = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        if EXTRA:
            z = tl.zeros([BLOCK_T, EXTRA], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            x = x_desc.load([t, k])
            y = dot(x, w_desc.load([n, k]).T, y)
            if GATED:
                up = dot(x, w_desc.load([N + n, k]).T, up)
            if EXTRA:
                z = dot(x, extra_desc.load([n + BLOCK_N, k]).T, z)
        stored += step
        place_t, place_n = tile_place(stored, tiles_t, tiles_n, GROUP)
        t = place_t * BLOCK_T
        n = place_n * TILE_N
        if PARTS == 1:
            m = (n + tl.arange(0, BLOCK_N))[None, :]
            y = finished(y, up, scale_ptr, bias_ptr, m, N, ACTIVATION)
            y_desc.store([t, n], y.to(y_ptr.dtype.element_ty))
            if EXTRA:
                n += BLOCK_N
                m = (n + tl.arange(0, EXTRA))[None, :]
                z = finished(z, z, scale_ptr, bias_ptr, m, N, ACTIVATION)
                z_desc.store([t, n], z.to(y_ptr.dtype.element_ty))
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            halves = tl.permute(tl.reshape(y, [BLOCK_T, 2, HALF]), [0, 2, 1])
            left, right = tl.split(halves)
            left_up, right_up = up, up
            if GATED:
                halves = tl.permute(tl.reshape(up, [BLOCK_T, 2, HALF]), [0, 2, 1])
                left_up, right_up = tl.split(halves)
            m = (n + tl.arange(0, HALF))[None, :]
            left = finished(left, left_up, scale_ptr, bias_ptr, m, N, ACTIVATION)
            y_desc.store([t, n], left.to(y_ptr.dtype.element_ty))
            n += HALF
            m = (n + tl.arange(0, HALF))[None, :]
            right = finished(right, right_up, scale_ptr, bias_ptr, m, N, ACTIVATION)
            y_desc.store([t, n], right.to(y_ptr.dtype.element_ty))
