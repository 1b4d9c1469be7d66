"""Attention of a packed chunk to full caches of heads of 512 on a Hopper GPU, in Gluon.

It is the kernel of gluon_attend_chunk.py but for two things. Results of 64 queries x 512 do not fit
a warpgroup's registers: two programs take 256 columns of the values each, and make the same scores.
And 128 queries leave 96 KB of shared memory. So keys come in chunks of 128 columns, whose room is
free again before a block's scores are there.

Two warpgroups that share 64 queries would make the scores once. But they would ask L2 for 128 KB
where two programs of 128 queries ask for 96, and L2 gives about 5.4 TB/s: 340 TFLOP/s at the most
where this cut may have 460.

A score is the sum over the columns in their order. So bits are the same however many warpgroups
there are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokenloop.models.kernels.attention_chunk.gluon_attend_chunk import (
    ROWS,
    blocks_of_sequences,
    find_tile,
    matrix,
    product_layout,
    rounds,
    weigh,
)
from tokenloop.models.kernels.launch.dependent_launch import waits
from tokenloop.models.kernels.launch.gluon_launch import after_wait

# Columns of queries and keys that one product takes, and columns of the results of a program.
CHUNK = gl.constexpr(128)
COLUMNS = gl.constexpr(256)


@gluon.jit
def load_wide_tiles(
    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS: gl.constexpr, GROUPS: gl.constexpr,
    SIZE: gl.constexpr, CONSUMERS: gl.constexpr, SEQUENCES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """The producer. Keys of a block come before the values of the block before it."""
    CHUNKS: gl.constexpr = SIZE // CHUNK
    SPLIT: gl.constexpr = SIZE // COLUMNS
    K_STAGES: gl.constexpr = k_bufs.type.shape[0]
    V_STAGES: gl.constexpr = v_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    done = 0
    for i in range(rounds(tiles)):
        row, token, position, count, part, _ = find_tile(
            i, starts_ptr, rows_ptr, first_ptr, HEADS * SPLIT, BLOCK_M, SEQUENCES, PADDED
        )
        head = part // SPLIT
        column = head // GROUPS * SIZE
        v_column = column + part % SPLIT * COLUMNS
        blocks = (position + gl.minimum(count, BLOCK_M) + BLOCK_N - 1) // BLOCK_N
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), (i & 1) ^ 1)
            ready = q_full.index(consumer)
            mbarrier.expect(ready, ROWS * SIZE * 2)
            for c in gl.static_range(CHUNKS):
                tma.async_copy_global_to_shared(
                    q_desc, [token + consumer * ROWS, head * SIZE + c * CHUNK], ready,
                    q_bufs.index(consumer * CHUNKS + c),
                )  # fmt: skip
        for j in range(blocks + 1):
            if j < blocks:
                for c in gl.static_range(CHUNKS):
                    at = (done + j) * CHUNKS + c
                    mbarrier.wait(k_empty.index(at % K_STAGES), ((at // K_STAGES) & 1) ^ 1)
                    ready = k_full.index(at % K_STAGES)
                    mbarrier.expect(ready, BLOCK_N * CHUNK * 2)
                    tma.async_copy_global_to_shared(
                        k_desc, [row, j * BLOCK_N, column + c * CHUNK], ready,
                        k_bufs.index(at % K_STAGES),
                    )  # fmt: skip
            if j > 0:
                at = done + j - 1
                mbarrier.wait(v_empty.index(at % V_STAGES), ((at // V_STAGES) & 1) ^ 1)
                ready = v_full.index(at % V_STAGES)
                mbarrier.expect(ready, BLOCK_N * COLUMNS * 2)
                tma.async_copy_global_to_shared(
                    v_desc, [row, (j - 1) * BLOCK_N, v_column], ready, v_bufs.index(at % V_STAGES)
                )
        done += blocks


@gluon.jit
def ask_scores(
    block, top, q_bufs, k_bufs, k_full, k_empty, PART: gl.constexpr, CHUNKS: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Scores of a block, of which the last chunk is still under way, `top` as it was, and the
    number of that chunk's stage."""
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    at = block * CHUNKS
    mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1)
    s = warpgroup_mma(
        q_bufs.index(PART * CHUNKS), matrix(k_bufs, at % STAGES).permute((1, 0)), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    for c in gl.static_range(1, CHUNKS):
        at += 1
        mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1)
        s = warpgroup_mma(
            q_bufs.index(PART * CHUNKS + c), matrix(k_bufs, at % STAGES).permute((1, 0)), s,
            is_async=True,
        )  # fmt: skip
        # What is waited for is the chunk before; it has no results of its own to name.
        top = warpgroup_mma_wait(num_outstanding=1, deps=(top,))
        mbarrier.arrive(k_empty.index((at - 1) % STAGES), count=1)
    return s, top, at % STAGES


@gluon.jit
def wide_step(
    j, before, weights, o, top, total, position, q_bufs, k_bufs, v_bufs, k_full, k_empty, v_full,
    v_empty, PART: gl.constexpr, CHUNKS: gl.constexpr, UNIT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of block j, and meanwhile the values of block j - 1, of given weights."""
    STAGES: gl.constexpr = v_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    LAYOUT: gl.constexpr = o.type.layout
    SCORES: gl.constexpr = weights.type.layout
    DOT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    s, top, stage = ask_scores(
        before + j, top, q_bufs, k_bufs, k_full, k_empty, PART, CHUNKS, SCORES
    )
    at = before + j - 1
    last, phase = at % STAGES, (at // STAGES) & 1
    # As float32 they came here: bfloat16 would be packed in pairs anew.
    p = gl.convert_layout(weights.to(gl.bfloat16), DOT)
    mbarrier.wait(v_full.index(last), phase)
    o = warpgroup_mma(p, matrix(v_bufs, last), o, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, top, total, factor = weigh(s, top, total, position, j * BLOCK_N, UNIT, MASK)
    # See step() of gluon_attend_chunk.py.
    mbarrier.wait(v_full.index(last), phase)
    o, weights = warpgroup_mma_wait(num_outstanding=0, deps=(o, weights))
    mbarrier.arrive(v_empty.index(last), count=1)
    o = o * gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None]
    return weights, o, top, total


@gluon.jit
def attend_wide_tiles(
    out_ptr, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full, v_empty, starts_ptr,
    rows_ptr, first_ptr, tiles, HEADS: gl.constexpr, SIZE: gl.constexpr, UNIT: gl.constexpr,
    PART: gl.constexpr, CONSUMERS: gl.constexpr, SEQUENCES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """A consumer: one part of the queries of every tile."""
    CHUNKS: gl.constexpr = SIZE // CHUNK
    SPLIT: gl.constexpr = SIZE // COLUMNS
    V_STAGES: gl.constexpr = v_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    SCORES: gl.constexpr = product_layout(BLOCK_N)
    LAYOUT: gl.constexpr = product_layout(COLUMNS)
    DOT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    done = 0
    for i in range(rounds(tiles)):
        _, token, position, count, part, _ = find_tile(
            i, starts_ptr, rows_ptr, first_ptr, HEADS * SPLIT, BLOCK_M, SEQUENCES, PADDED
        )
        blocks = (position + gl.minimum(count, BLOCK_M) + BLOCK_N - 1) // BLOCK_N
        token += PART * ROWS
        count -= PART * ROWS
        start = position + PART * ROWS
        query = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        # Blocks that all queries see whole. Queries that are not there may lie past all blocks.
        unmasked = gl.minimum((start + 1) // BLOCK_N, blocks)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))

        mbarrier.wait(q_full.index(PART), i & 1)
        s, top, stage = ask_scores(done, top, q_bufs, k_bufs, k_full, k_empty, PART, CHUNKS, SCORES)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, top, total, _ = weigh(s, top, total, query, 0, UNIT, True)
        o = gl.zeros([ROWS, COLUMNS], gl.float32, layout=LAYOUT)
        for j in range(1, unmasked):
            weights, o, top, total = wide_step(
                j, done, weights, o, top, total, query, q_bufs, k_bufs, v_bufs, k_full, k_empty,
                v_full, v_empty, PART, CHUNKS, UNIT, False,
            )  # fmt: skip
        for j in range(gl.maximum(unmasked, 1), blocks):
            weights, o, top, total = wide_step(
                j, done, weights, o, top, total, query, q_bufs, k_bufs, v_bufs, k_full, k_empty,
                v_full, v_empty, PART, CHUNKS, UNIT, True,
            )  # fmt: skip
        # All scores are there: the next queries may come.
        mbarrier.arrive(q_empty.index(PART), count=1)
        done += blocks
        stage = (done - 1) % V_STAGES
        mbarrier.wait(v_full.index(stage), ((done - 1) // V_STAGES) & 1)
        p = gl.convert_layout(weights.to(gl.bfloat16), DOT)
        o = warpgroup_mma(p, matrix(v_bufs, stage), o, is_async=True)
        o = warpgroup_mma_wait(num_outstanding=0, deps=(o,))
        mbarrier.arrive(v_empty.index(stage), count=1)

        shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, LAYOUT))
        o = (o * shrink[:, None]).to(gl.bfloat16)
        if count > 0:
            t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            column = part * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
            to = (token + t).to(gl.int64)[:, None] * (HEADS * SIZE) + column[None, :]
            gl.store(out_ptr + to, o, mask=(t < count)[:, None])


@waits  # once it has made its descriptors and counted its tiles
@gluon.jit
def gluon_attend_wide_kernel(
    q_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, out_ptr, tokens, all_rows, slots,
    row_stride, UNIT: gl.constexpr, KV: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr, PADDED: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments are gluon_attend_chunk_kernel's. STAGES are those of values; all chunks of a block
    of keys have room."""
    HEADS: gl.constexpr = KV * GROUPS
    WIDTH: gl.constexpr = HEADS * SIZE
    KV_WIDTH: gl.constexpr = KV * SIZE
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    CHUNKS: gl.constexpr = SIZE // CHUNK
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    # A row is an axis of its own, so that a block of keys does not reach into the next.
    ROW_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=3
    )
    q_desc = tma.make_tensor_descriptor(q_ptr, [tokens, WIDTH], [WIDTH, 1], [ROWS, CHUNK], LAYOUT)
    k_desc = tma.make_tensor_descriptor(
        k_ptr, [all_rows, slots, KV_WIDTH], [row_stride, KV_WIDTH, 1], [1, BLOCK_N, CHUNK],
        ROW_LAYOUT,
    )  # fmt: skip
    v_desc = tma.make_tensor_descriptor(
        v_ptr, [all_rows, slots, KV_WIDTH], [row_stride, KV_WIDTH, 1], [1, BLOCK_N, COLUMNS],
        ROW_LAYOUT,
    )  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS * CHUNKS, ROWS, CHUNK], LAYOUT)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, 1, BLOCK_N, CHUNK], ROW_LAYOUT)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, COLUMNS], ROW_LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(CHUNKS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    blocks = blocks_of_sequences(starts_ptr, rows_ptr, BLOCK_M, SEQUENCES, PADDED)
    tiles = after_wait(gl.sum(blocks, 0) * (HEADS * SIZE // COLUMNS))
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_wide_tiles, (
                out_ptr, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                starts_ptr, rows_ptr, first_ptr, tiles, HEADS, SIZE, UNIT, 0, CONSUMERS, SEQUENCES,
                PADDED,
            )),
            (attend_wide_tiles, (
                out_ptr, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                starts_ptr, rows_ptr, first_ptr, tiles, HEADS, SIZE, UNIT, 1, CONSUMERS, SEQUENCES,
                PADDED,
            )),
            (load_wide_tiles, (
                q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS, GROUPS, SIZE,
                CONSUMERS, SEQUENCES, PADDED,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_wide_tiles, (
                out_ptr, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                starts_ptr, rows_ptr, first_ptr, tiles, HEADS, SIZE, UNIT, 0, CONSUMERS, SEQUENCES,
                PADDED,
            )),
            (load_wide_tiles, (
                q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS, GROUPS, SIZE,
                CONSUMERS, SEQUENCES, PADDED,
            )),
        ], [1], [40])  # fmt: skip
