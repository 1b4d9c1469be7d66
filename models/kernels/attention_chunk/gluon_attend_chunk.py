"""Attention of a packed chunk to full caches on a Hopper GPU, in Gluon: causal, online softmax.

One warp asks for queries, keys and values (TMA), one or two warpgroups take 64 queries of a head
each, as FlashAttention-3 does (https://arxiv.org/abs/2407.08608). A warpgroup computes the
exponents of a block of keys while its tensor cores sum the values of the block before. Programs
are persistent: while one tile's results are stored the next one's operands come.

Blocks of keys start at positions that BLOCK_N divides, and are taken in ascending order. Masked
blocks take the arithmetic of those that are not, and a block that a query does not see at all
leaves its row exactly as it was. So a token's result depends neither on its chunk nor on how many
warpgroups there are.

Keys and values after a sequence's last must be finite: their weights are zero. Those beyond a
row's slots are zeros here, whatever lies there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tokenloop.models.kernels.attention_chunk.gluon_pipeline import (
    KEYS,
    QUERIES,
    ask_queries,
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

# Triton 3.8 calls it otherwise.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, queries, pipes, work, HEADS: gl.constexpr, GROUPS: gl.constexpr,
    SEQUENCES: gl.constexpr,
):  # fmt: skip
    """The producer. Keys of a block come before the values of the block before it."""
    SIZE: gl.constexpr = pipes.k.type.shape[3]
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    BLOCK_M: gl.constexpr = queries.full.type.shape[0] * ROWS
    done = 0
    for i in range(rounds(work)):
        row, token, position, count, head, _ = find_tile(i, work, HEADS, BLOCK_M, SEQUENCES)
        column = head // GROUPS * SIZE
        blocks = (position + gl.minimum(count, BLOCK_M) + BLOCK_N - 1) // BLOCK_N
        ask_queries(q_desc, i, token, head, queries)
        for j in range(blocks + 1):
            at = done + j
            if j < blocks:
                ready, stage = make_room(at, pipes.k, pipes.k_full, pipes.k_empty)
                tma.async_copy_global_to_shared(
                    k_desc, [row, j * BLOCK_N, column], ready, pipes.k.index(stage)
                )
            if j > 0:
                ready, stage = make_room(at - 1, pipes.v, pipes.v_full, pipes.v_empty)
                tma.async_copy_global_to_shared(
                    v_desc, [row, (j - 1) * BLOCK_N, column], ready, pipes.v.index(stage)
                )
        done += blocks


@gluon.jit
def weigh_causal(s, top, total, position, key, UNIT: gl.constexpr, MASK: gl.constexpr):
    """Exponents of a block's scores, the new maximum and sum, and the factor of what was before."""
    BLOCK_N: gl.constexpr = s.type.shape[1]
    if MASK:
        keys = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(keys[None, :] <= position[:, None], s, float("-inf"))
    # Finite, as every query sees a key of the first block.
    new_top = gl.maximum(top, gl.max(s, 1))
    p, total, factor = weigh(s, top, total, new_top, UNIT)
    return p, new_top, total, factor


@gluon.jit
def begin_tile(at, top, q, pipes, SCORES: gl.constexpr):
    """Scores of a tile's first block, and `top` as it was."""
    return first_scores(at, q, pipes, SCORES), top


@gluon.jit
def step(
    j, before, weights, o, top, total, position, q, pipes, UNIT: gl.constexpr, MASK: gl.constexpr
):
    """Scores of block j, and meanwhile the values of block j - 1, of given weights."""
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    s, o = next_scores(before + j, weights, o, q, pipes)
    weights, top, total, factor = weigh_causal(s, top, total, position, j * BLOCK_N, UNIT, MASK)
    weights, o = end_values(before + j - 1, weights, o, factor, pipes)
    return weights, o, top, total


@gluon.jit
def attend_tiles(
    o_desc, out_ptr, o_buf, queries, pipes, work, PARTS: gl.constexpr, UNIT: gl.constexpr,
    CONSUMERS: gl.constexpr, SEQUENCES: gl.constexpr, CONSUMER: gl.constexpr,
    begin: gl.constexpr = begin_tile, step: gl.constexpr = step,
):  # fmt: skip
    """A consumer: it takes ROWS queries of every tile. `begin` makes a tile's first scores, and
    `step` takes a block after that."""
    BLOCK_N: gl.constexpr = pipes.v.type.shape[2]
    COLUMNS: gl.constexpr = pipes.v.type.shape[3]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    SCORES: gl.constexpr = product_layout(BLOCK_N)
    gl.static_assert(COLUMNS <= 256)
    # A wide head's queries, keys and values leave no room for its results.
    STAGED: gl.constexpr = COLUMNS <= 128
    q = queries.bufs
    done = 0
    for i in range(rounds(work)):
        _, token, position, count, part, _ = find_tile(i, work, PARTS, BLOCK_M, SEQUENCES)
        blocks = (position + gl.minimum(count, BLOCK_M) + BLOCK_N - 1) // BLOCK_N
        token += CONSUMER * ROWS
        count -= CONSUMER * ROWS
        start = position + CONSUMER * ROWS
        query = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        # Blocks that all queries see whole. Queries that are not there may lie past all blocks.
        unmasked = gl.minimum((start + 1) // BLOCK_N, blocks)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))

        mbarrier.wait(queries.full, i & 1)
        s, top = begin(done, top, q, pipes, SCORES)
        weights, top, total, _ = weigh_causal(s, top, total, query, 0, UNIT, True)
        o = gl.zeros([ROWS, COLUMNS], gl.float32, layout=product_layout(COLUMNS))
        for j in range(1, unmasked):
            weights, o, top, total = step(
                j, done, weights, o, top, total, query, q, pipes, UNIT, False
            )
        for j in range(gl.maximum(unmasked, 1), blocks):
            weights, o, top, total = step(
                j, done, weights, o, top, total, query, q, pipes, UNIT, True
            )
        # All scores are there: the next queries may come.
        mbarrier.arrive(queries.empty, count=1)
        done += blocks
        o = divide(last_values(done - 1, weights, o, pipes), total)
        if STAGED and count >= ROWS:
            tma.store_wait(0)
            thread_barrier()
            o_buf.store(o)
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(o_desc, [token, part * COLUMNS], o_buf)
        elif count > 0:
            store_rows(out_ptr, o, token, count, part, PARTS * COLUMNS)
    if STAGED:
        tma.store_wait(0)


@waits  # once it has made its descriptors and counted its tiles
@gluon.jit
def gluon_attend_chunk_kernel(
    q_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, out_ptr, tokens, all_rows, slots,
    row_stride, UNIT: gl.constexpr, KV: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [tokens, KV * GROUPS * SIZE] of queries q of that shape, bfloat16, and caches [all_rows,
    slots, KV, SIZE] whose rows are row_stride elements apart.

    UNIT is the scale of the scores times log2(e). Tokens of a sequence without a row are not
    written.
    """
    HEADS: gl.constexpr = KV * GROUPS
    q_desc = describe_queries(q_ptr, tokens, HEADS * SIZE, SIZE)
    o_desc = describe_queries(out_ptr, tokens, HEADS * SIZE, SIZE)
    k_desc = describe_keys(k_ptr, all_rows, slots, row_stride, KV * SIZE, BLOCK_N, SIZE)
    v_desc = describe_keys(v_ptr, all_rows, slots, row_stride, KV * SIZE, BLOCK_N, SIZE)
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, SIZE], QUERIES)
    o_bufs = q_bufs
    if SIZE <= 128:
        o_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, SIZE], QUERIES)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, SIZE], KEYS)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, SIZE], KEYS)
    queries, pipes = make_queries(q_bufs, CONSUMERS), make_pipeline(k_bufs, v_bufs)
    for i in gl.static_range(STAGES):
        open_stage(pipes.k_full, pipes.k_empty, i, CONSUMERS)
        open_stage(pipes.v_full, pipes.v_empty, i, CONSUMERS)
    fence_async_shared()

    work = find_work(starts_ptr, rows_ptr, first_ptr, HEADS, CONSUMERS * ROWS, SEQUENCES)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_tiles, (
                o_desc, out_ptr, o_bufs.index(0), of_consumer(queries, 0), pipes, work, HEADS,
                UNIT, 2, SEQUENCES, 0,
            )),
            (attend_tiles, (
                o_desc, out_ptr, o_bufs.index(1), of_consumer(queries, 1), pipes, work, HEADS,
                UNIT, 2, SEQUENCES, 1,
            )),
            (load_tiles, (q_desc, k_desc, v_desc, queries, pipes, work, HEADS, GROUPS, SEQUENCES)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_tiles, (
                o_desc, out_ptr, o_bufs.index(0), of_consumer(queries, 0), pipes, work, HEADS,
                UNIT, 1, SEQUENCES, 0,
            )),
            (load_tiles, (q_desc, k_desc, v_desc, queries, pipes, work, HEADS, GROUPS, SEQUENCES)),
        ], [1], [40])  # fmt: skip
