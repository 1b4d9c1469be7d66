"""Attention of a packed chunk to rings of heads of 256 on a Hopper GPU, in Gluon.

It is the kernel of gluon_attend_chunk.py, but for where keys and values come from and which of them
a query sees: its last `slots`, its own included. Blocks of positions before the chunk are in the
ring, which has a whole number of blocks, and those from the chunk's first position on are in `kv`.
Blocks start at positions that BLOCK_N divides. Only a sequence whose first position BLOCK_N does
not divide has blocks from there on; its tokens' last bits depend on that.

A block that all queries of a warpgroup see takes the arithmetic of the others, without the mask. A
block that a query does not see leaves its row as it was, also before the first that it sees. So a
token's result depends neither on its chunk nor on how many warpgroups there are.

What kv has beyond the last token may be anything: a descriptor gives zeros for it. Tokens of the
sequences before that must be finite, as must a row's slots: their weights may be zero.
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
)
from tokenloop.models.kernels.launch.dependent_launch import waits
from tokenloop.models.kernels.launch.gluon_launch import after_wait


@gluon.jit
def find_blocks(position, count, first, slots, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys of a tile: (position of the first, how many are in the ring, position of the
    first in the chunk, how many there are)."""
    begin = gl.maximum(position + 1 - slots, 0) // BLOCK_N * BLOCK_N
    old = (gl.maximum(first - begin, 0) + BLOCK_N - 1) // BLOCK_N
    fresh = gl.maximum(begin, first)
    new = (position + gl.minimum(count, BLOCK_M) - fresh + BLOCK_N - 1) // BLOCK_N
    return begin, old, fresh, old + new


@gluon.jit
def load_block(
    j, at, values, row, token, begin, old, fresh, column, slots, ring_desc, kv_desc, bufs, full,
    empty,
):  # fmt: skip
    """Ask for block j of keys, or of values: `token` is the number in kv of position 0, `column`
    the head's in the ring, and `values` what is between that and its own in kv."""
    STAGES: gl.constexpr = bufs.type.shape[0]
    BLOCK_N: gl.constexpr = bufs.type.shape[2]
    SIZE: gl.constexpr = bufs.type.shape[3]
    mbarrier.wait(empty.index(at % STAGES), ((at // STAGES) & 1) ^ 1)
    ready = full.index(at % STAGES)
    mbarrier.expect(ready, BLOCK_N * SIZE * 2)
    if j < old:
        slot = (begin + j * BLOCK_N) % slots
        tma.async_copy_global_to_shared(
            ring_desc, [row, slot, column], ready, bufs.index(at % STAGES)
        )
    else:
        there = token + fresh + (j - old) * BLOCK_N
        tma.async_copy_global_to_shared(
            kv_desc, [0, there, column + values], ready, bufs.index(at % STAGES)
        )


@gluon.jit
def load_ring_tiles(
    q_desc, k_desc, v_desc, kv_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, slots, HEADS: gl.constexpr,
    GROUPS: gl.constexpr, SEQUENCES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """The producer. Keys of a block come before the values of the block before it."""
    CONSUMERS: gl.constexpr = q_bufs.type.shape[0]
    SIZE: gl.constexpr = q_bufs.type.shape[2]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    KV_WIDTH: gl.constexpr = HEADS // GROUPS * SIZE
    done = 0
    for i in range(rounds(tiles)):
        row, token, position, count, head, first = find_tile(
            i, starts_ptr, rows_ptr, first_ptr, HEADS, BLOCK_M, SEQUENCES, PADDED
        )
        column = head // GROUPS * SIZE
        begin, old, fresh, blocks = find_blocks(position, count, first, slots, BLOCK_M, BLOCK_N)
        for part in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(part), (i & 1) ^ 1)
            ready = q_full.index(part)
            mbarrier.expect(ready, ROWS * SIZE * 2)
            tma.async_copy_global_to_shared(
                q_desc, [token + part * ROWS, head * SIZE], ready, q_bufs.index(part)
            )
        for j in range(blocks + 1):
            if j < blocks:
                load_block(
                    j, done + j, 0, row, token - position, begin, old, fresh, column, slots,
                    k_desc, kv_desc, k_bufs, k_full, k_empty,
                )  # fmt: skip
            if j > 0:
                load_block(
                    j - 1, done + j - 1, KV_WIDTH, row, token - position, begin, old, fresh,
                    column, slots, v_desc, kv_desc, v_bufs, v_full, v_empty,
                )  # fmt: skip
        done += blocks


@gluon.jit
def weigh_window(s, top, total, low, high, key, masked, UNIT: gl.constexpr):
    """Exponents of a block's scores, the new maximum and sum, and the factor of what was before.
    Queries see the keys from `low` to `high`."""
    BLOCK_N: gl.constexpr = s.type.shape[1]
    if masked:
        keys = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] <= high[:, None])
        s = gl.where(seen, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    # A query that has seen nothing yet has -inf, from which nothing can be subtracted.
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    less = shift * UNIT
    p = gl.exp2(gl.fma(s, UNIT, -less[:, None]))
    # Exactly 1 where the maximum stays.
    factor = gl.exp2((top - shift) * UNIT)
    total = gl.fma(total, factor, gl.sum(p, 1))
    return p, new_top, total, factor


@gluon.jit
def pass_over(begin, end, full, empty):
    """Give back the stages of blocks that this consumer has no use for."""
    STAGES: gl.constexpr = full.type.shape[0]
    for at in range(begin, end):
        mbarrier.wait(full.index(at % STAGES), (at // STAGES) & 1)
        mbarrier.arrive(empty.index(at % STAGES), count=1)


@gluon.jit
def attend_ring_tiles(
    out_ptr, q_buf, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full, v_empty, starts_ptr,
    rows_ptr, first_ptr, tiles, slots, HEADS: gl.constexpr, UNIT: gl.constexpr,
    PART: gl.constexpr, CONSUMERS: gl.constexpr, SEQUENCES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """A consumer: one part of the queries of every tile."""
    SIZE: gl.constexpr = q_buf.type.shape[1]
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    SCORES: gl.constexpr = product_layout(BLOCK_N)
    LAYOUT: gl.constexpr = product_layout(SIZE)
    DOT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    gl.static_assert(SIZE <= 256)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    done = 0
    for i in range(rounds(tiles)):
        _, token, position, count, head, first = find_tile(
            i, starts_ptr, rows_ptr, first_ptr, HEADS, BLOCK_M, SEQUENCES, PADDED
        )
        begin, old, fresh, blocks = find_blocks(position, count, first, slots, BLOCK_M, BLOCK_N)
        token += PART * ROWS
        count -= PART * ROWS
        start = position + PART * ROWS
        query = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        # Blocks that some of the queries see, and those that all see. Without positions that
        # BLOCK_N divides all blocks are masked: such a sequence has one token.
        some = 0
        past = blocks
        inner = blocks
        diagonal = blocks
        if first % BLOCK_N == 0:
            some = (gl.maximum(start + 1 - slots, begin) - begin) // BLOCK_N
            some = gl.minimum(some, blocks - 1)
            past = gl.minimum((start + ROWS - begin + BLOCK_N - 1) // BLOCK_N, blocks)
            inner = (gl.maximum(start + ROWS - slots, begin) - begin + BLOCK_N - 1) // BLOCK_N
            diagonal = (start + 1 - begin) // BLOCK_N
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
        low = query + (1 - slots)

        mbarrier.wait(q_full, i & 1)
        pass_over(done, done + some, k_full, k_empty)
        at = done + some
        stage = at % STAGES
        mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
        s = warpgroup_mma(
            q_buf, matrix(k_bufs, stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        key = fresh + (some - old) * BLOCK_N
        high = query
        if some < old:
            key = begin + some * BLOCK_N
            high = gl.minimum(query, first - 1)
        weights, top, total, _ = weigh_window(s, top, total, low, high, key, True, UNIT)
        pass_over(done, done + some, v_full, v_empty)
        o = gl.zeros([ROWS, SIZE], gl.float32, layout=LAYOUT)
        for j in range(some + 1, past):
            at = done + j
            stage, phase = at % STAGES, (at // STAGES) & 1
            last, last_phase = (at - 1) % STAGES, ((at - 1) // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s = warpgroup_mma(
                q_buf, matrix(k_bufs, stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            # As float32 they came here: bfloat16 would be packed in pairs anew.
            p = gl.convert_layout(weights.to(gl.bfloat16), DOT)
            mbarrier.wait(v_full.index(last), last_phase)
            o = warpgroup_mma(p, matrix(v_bufs, last), o, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            key = fresh + (j - old) * BLOCK_N
            limit = start + ROWS
            if j < old:
                key = begin + j * BLOCK_N
                limit = first - 1
            high = gl.minimum(query, limit)
            masked = (j < inner) | (j >= diagonal)
            weights, top, total, factor = weigh_window(s, top, total, low, high, key, masked, UNIT)
            # See step() of gluon_attend_chunk.py.
            mbarrier.wait(v_full.index(last), last_phase)
            o, weights = warpgroup_mma_wait(num_outstanding=0, deps=(o, weights))
            mbarrier.arrive(v_empty.index(last), count=1)
            o = o * gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None]
        # All scores are there: the next queries may come.
        mbarrier.arrive(q_empty, count=1)
        pass_over(done + past, done + blocks, k_full, k_empty)
        at = done + past - 1
        stage = at % STAGES
        mbarrier.wait(v_full.index(stage), (at // STAGES) & 1)
        p = gl.convert_layout(weights.to(gl.bfloat16), DOT)
        o = warpgroup_mma(p, matrix(v_bufs, stage), o, is_async=True)
        o = warpgroup_mma_wait(num_outstanding=0, deps=(o,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        pass_over(done + past, done + blocks, v_full, v_empty)
        done += blocks

        shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, LAYOUT))
        o = (o * shrink[:, None]).to(gl.bfloat16)
        if count > 0:
            t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            column = head * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, LAYOUT))
            to = (token + t).to(gl.int64)[:, None] * (HEADS * SIZE) + column[None, :]
            gl.store(out_ptr + to, o, mask=(t < count)[:, None])


@waits  # once it has made its descriptors and counted its tiles
@gluon.jit
def gluon_attend_ring_kernel(
    q_ptr, kv_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, out_ptr, tokens, all_rows, slots,
    row_stride, UNIT: gl.constexpr, KV: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr, PADDED: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments are gluon_attend_chunk_kernel's, and the chunk's keys and values kv [tokens, 2, KV,
    SIZE]. BLOCK_N divides slots."""
    HEADS: gl.constexpr = KV * GROUPS
    WIDTH: gl.constexpr = HEADS * SIZE
    KV_WIDTH: gl.constexpr = KV * SIZE
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    # As a row of a cache is an axis of its own.
    ROW_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=3
    )
    q_desc = tma.make_tensor_descriptor(q_ptr, [tokens, WIDTH], [WIDTH, 1], [ROWS, SIZE], LAYOUT)
    k_desc = tma.make_tensor_descriptor(
        k_ptr, [all_rows, slots, KV_WIDTH], [row_stride, KV_WIDTH, 1], [1, BLOCK_N, SIZE],
        ROW_LAYOUT,
    )  # fmt: skip
    v_desc = tma.make_tensor_descriptor(
        v_ptr, [all_rows, slots, KV_WIDTH], [row_stride, KV_WIDTH, 1], [1, BLOCK_N, SIZE],
        ROW_LAYOUT,
    )  # fmt: skip
    # Zeros behind the last token.
    there = gl.maximum(gl.load(starts_ptr + SEQUENCES), 1)
    kv_desc = tma.make_tensor_descriptor(
        kv_ptr, [1, there, 2 * KV_WIDTH], [2 * KV_WIDTH, 2 * KV_WIDTH, 1], [1, BLOCK_N, SIZE],
        ROW_LAYOUT,
    )  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, SIZE], LAYOUT)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, SIZE], ROW_LAYOUT)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, SIZE], ROW_LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    blocks = blocks_of_sequences(starts_ptr, rows_ptr, BLOCK_M, SEQUENCES, PADDED)
    tiles = after_wait(gl.sum(blocks, 0) * HEADS)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_ring_tiles, (
                out_ptr, q_bufs.index(0), k_bufs, v_bufs, q_full.index(0), q_empty.index(0),
                k_full, k_empty, v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, slots,
                HEADS, UNIT, 0, CONSUMERS, SEQUENCES, PADDED,
            )),
            (attend_ring_tiles, (
                out_ptr, q_bufs.index(1), k_bufs, v_bufs, q_full.index(1), q_empty.index(1),
                k_full, k_empty, v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, slots,
                HEADS, UNIT, 1, CONSUMERS, SEQUENCES, PADDED,
            )),
            (load_ring_tiles, (
                q_desc, k_desc, v_desc, kv_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, slots, HEADS,
                GROUPS, SEQUENCES, PADDED,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_ring_tiles, (
                out_ptr, q_bufs.index(0), k_bufs, v_bufs, q_full.index(0), q_empty.index(0),
                k_full, k_empty, v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, slots,
                HEADS, UNIT, 0, CONSUMERS, SEQUENCES, PADDED,
            )),
            (load_ring_tiles, (
                q_desc, k_desc, v_desc, kv_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, slots, HEADS,
                GROUPS, SEQUENCES, PADDED,
            )),
        ], [1], [40])  # fmt: skip
