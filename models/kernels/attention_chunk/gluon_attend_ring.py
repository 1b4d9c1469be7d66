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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tokenloop.models.kernels.attention_chunk.gluon_pipeline import (
    KEYS,
    QUERIES,
    ask_queries,
    await_stage,
    describe_keys,
    describe_queries,
    make_pipeline,
    make_queries,
    make_room,
    of_consumer,
    open_stage,
)
from tokenloop.models.kernels.attention_chunk.gluon_sequences import (
    ROWS,
    find_tile,
    find_work,
    rounds,
)
from tokenloop.models.kernels.attention_chunk.gluon_softmax import (
    divide,
    end_values,
    first_scores,
    last_values,
    next_scores,
    product_layout,
    store_rows,
    weigh,
)
from tokenloop.models.kernels.launch.dependent_launch import waits


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
    BLOCK_N: gl.constexpr = bufs.type.shape[2]
    ready, stage = make_room(at, bufs, full, empty)
    if j < old:
        slot = (begin + j * BLOCK_N) % slots
        tma.async_copy_global_to_shared(ring_desc, [row, slot, column], ready, bufs.index(stage))
    else:
        there = token + fresh + (j - old) * BLOCK_N
        tma.async_copy_global_to_shared(
            kv_desc, [0, there, column + values], ready, bufs.index(stage)
        )


@gluon.jit
def load_ring_tiles(
    q_desc, k_desc, v_desc, kv_desc, queries, pipes, work, slots, HEADS: gl.constexpr,
    GROUPS: gl.constexpr, SEQUENCES: gl.constexpr,
):  # fmt: skip
    """The producer. Keys of a block come before the values of the block before it."""
    SIZE: gl.constexpr = pipes.k.type.shape[3]
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    BLOCK_M: gl.constexpr = queries.full.type.shape[0] * ROWS
    KV_WIDTH: gl.constexpr = HEADS // GROUPS * SIZE
    done = 0
    for i in range(rounds(work)):
        row, token, position, count, head, first = find_tile(i, work, HEADS, BLOCK_M, SEQUENCES)
        column = head // GROUPS * SIZE
        begin, old, fresh, blocks = find_blocks(position, count, first, slots, BLOCK_M, BLOCK_N)
        ask_queries(q_desc, i, token, head, queries)
        for j in range(blocks + 1):
            if j < blocks:
                load_block(
                    j, done + j, 0, row, token - position, begin, old, fresh, column, slots,
                    k_desc, kv_desc, pipes.k, pipes.k_full, pipes.k_empty,
                )  # fmt: skip
            if j > 0:
                load_block(
                    j - 1, done + j - 1, KV_WIDTH, row, token - position, begin, old, fresh,
                    column, slots, v_desc, kv_desc, pipes.v, pipes.v_full, pipes.v_empty,
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
    p, total, factor = weigh(s, top, total, shift, UNIT)
    return p, new_top, total, factor


@gluon.jit
def pass_over(begin, end, full, empty):
    """Give back the stages of blocks that this consumer has no use for."""
    for at in range(begin, end):
        stage = await_stage(at, full)
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def attend_ring_tiles(
    out_ptr, queries, pipes, work, slots, HEADS: gl.constexpr, UNIT: gl.constexpr,
    CONSUMERS: gl.constexpr, SEQUENCES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer: it takes ROWS queries of every tile."""
    SIZE: gl.constexpr = pipes.k.type.shape[3]
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    SCORES: gl.constexpr = product_layout(BLOCK_N)
    gl.static_assert(SIZE <= 256)
    done = 0
    for i in range(rounds(work)):
        _, token, position, count, head, first = find_tile(i, work, HEADS, BLOCK_M, SEQUENCES)
        begin, old, fresh, blocks = find_blocks(position, count, first, slots, BLOCK_M, BLOCK_N)
        token += CONSUMER * ROWS
        count -= CONSUMER * ROWS
        start = position + CONSUMER * ROWS
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

        mbarrier.wait(queries.full, i & 1)
        pass_over(done, done + some, pipes.k_full, pipes.k_empty)
        s = first_scores(done + some, queries.bufs, pipes, SCORES)
        key = fresh + (some - old) * BLOCK_N
        high = query
        if some < old:
            key = begin + some * BLOCK_N
            high = gl.minimum(query, first - 1)
        weights, top, total, _ = weigh_window(s, top, total, low, high, key, True, UNIT)
        pass_over(done, done + some, pipes.v_full, pipes.v_empty)
        o = gl.zeros([ROWS, SIZE], gl.float32, layout=product_layout(SIZE))
        for j in range(some + 1, past):
            s, o = next_scores(done + j, weights, o, queries.bufs, pipes)
            key = fresh + (j - old) * BLOCK_N
            limit = start + ROWS
            if j < old:
                key = begin + j * BLOCK_N
                limit = first - 1
            high = gl.minimum(query, limit)
            masked = (j < inner) | (j >= diagonal)
            weights, top, total, factor = weigh_window(s, top, total, low, high, key, masked, UNIT)
            weights, o = end_values(done + j - 1, weights, o, factor, pipes)
        # All scores are there: the next queries may come.
        mbarrier.arrive(queries.empty, count=1)
        pass_over(done + past, done + blocks, pipes.k_full, pipes.k_empty)
        o = last_values(done + past - 1, weights, o, pipes)
        pass_over(done + past, done + blocks, pipes.v_full, pipes.v_empty)
        done += blocks
        o = divide(o, total)
        if count > 0:
            store_rows(out_ptr, o, token, count, head, HEADS * SIZE)


@waits  # once it has made its descriptors and counted its tiles
@gluon.jit
def gluon_attend_ring_kernel(
    q_ptr, kv_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, out_ptr, tokens, all_rows, slots,
    row_stride, UNIT: gl.constexpr, KV: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments are gluon_attend_chunk_kernel's, and the chunk's keys and values kv [tokens, 2, KV,
    SIZE]. BLOCK_N divides slots."""
    HEADS: gl.constexpr = KV * GROUPS
    KV_WIDTH: gl.constexpr = KV * SIZE
    q_desc = describe_queries(q_ptr, tokens, HEADS * SIZE, SIZE)
    k_desc = describe_keys(k_ptr, all_rows, slots, row_stride, KV_WIDTH, BLOCK_N, SIZE)
    v_desc = describe_keys(v_ptr, all_rows, slots, row_stride, KV_WIDTH, BLOCK_N, SIZE)
    # Zeros behind the last token.
    there = gl.maximum(gl.load(starts_ptr + SEQUENCES), 1)
    kv_desc = describe_keys(kv_ptr, 1, there, 2 * KV_WIDTH, 2 * KV_WIDTH, BLOCK_N, SIZE)
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, SIZE], QUERIES)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, SIZE], KEYS)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, SIZE], KEYS)
    queries, pipes = make_queries(q_bufs, CONSUMERS), make_pipeline(k_bufs, v_bufs)
    for i in gl.static_range(STAGES):
        open_stage(pipes.k_full, pipes.k_empty, i, CONSUMERS)
        open_stage(pipes.v_full, pipes.v_empty, i, CONSUMERS)
    fence_async_shared()

    work = find_work(
        starts_ptr, rows_ptr, first_ptr, HEADS, CONSUMERS * ROWS, SEQUENCES
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_ring_tiles, (
                out_ptr, of_consumer(queries, 0), pipes, work, slots, HEADS, UNIT, 2, SEQUENCES, 0,
            )),
            (attend_ring_tiles, (
                out_ptr, of_consumer(queries, 1), pipes, work, slots, HEADS, UNIT, 2, SEQUENCES, 1,
            )),
            (load_ring_tiles, (
                q_desc, k_desc, v_desc, kv_desc, queries, pipes, work, slots, HEADS, GROUPS,
                SEQUENCES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_ring_tiles, (
                out_ptr, of_consumer(queries, 0), pipes, work, slots, HEADS, UNIT, 1, SEQUENCES, 0,
            )),
            (load_ring_tiles, (
                q_desc, k_desc, v_desc, kv_desc, queries, pipes, work, slots, HEADS, GROUPS,
                SEQUENCES,
            )),
        ], [1], [40])  # fmt: skip
