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

from tokenloop.models.kernels.attention_chunk.gluon_attend_chunk import attend_tiles, weigh_causal
from tokenloop.models.kernels.attention_chunk.gluon_pipeline import (
    KEYS,
    QUERIES,
    Queries,
    ask_queries,
    await_stage,
    describe_keys,
    describe_queries,
    find_stage,
    make_pipeline,
    make_queries,
    make_room,
    open_stage,
)
from tokenloop.models.kernels.attention_chunk.gluon_sequences import (
    ROWS,
    find_tile,
    find_work,
    rounds,
)
from tokenloop.models.kernels.attention_chunk.gluon_softmax import (
    ask_scores,
    ask_values,
    end_values,
    matrix,
)
from tokenloop.models.kernels.launch.dependent_launch import waits

# Columns of queries and keys that one product takes, and columns of the results of a program.
CHUNK = gl.constexpr(128)
COLUMNS = gl.constexpr(256)


@gluon.jit
def load_wide_tiles(
    q_desc, k_desc, v_desc, queries, pipes, work, PARTS: gl.constexpr, GROUPS: gl.constexpr,
    SIZE: gl.constexpr, SEQUENCES: gl.constexpr,
):  # fmt: skip
    """The producer. Keys of a block come before the values of the block before it."""
    CHUNKS: gl.constexpr = SIZE // CHUNK
    SPLIT: gl.constexpr = SIZE // COLUMNS
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    BLOCK_M: gl.constexpr = queries.full.type.shape[0] * ROWS
    done = 0
    for i in range(rounds(work)):
        row, token, position, count, part, _ = find_tile(i, work, PARTS, BLOCK_M, SEQUENCES)
        head = part // SPLIT
        column = head // GROUPS * SIZE
        v_column = column + part % SPLIT * COLUMNS
        blocks = (position + gl.minimum(count, BLOCK_M) + BLOCK_N - 1) // BLOCK_N
        ask_queries(q_desc, i, token, head, queries)
        for j in range(blocks + 1):
            if j < blocks:
                for c in gl.static_range(CHUNKS):
                    at = (done + j) * CHUNKS + c
                    ready, stage = make_room(at, pipes.k, pipes.k_full, pipes.k_empty)
                    tma.async_copy_global_to_shared(
                        k_desc, [row, j * BLOCK_N, column + c * CHUNK], ready, pipes.k.index(stage)
                    )
            if j > 0:
                ready, stage = make_room(done + j - 1, pipes.v, pipes.v_full, pipes.v_empty)
                tma.async_copy_global_to_shared(
                    v_desc, [row, (j - 1) * BLOCK_N, v_column], ready, pipes.v.index(stage)
                )
        done += blocks


@gluon.jit
def ask_chunks(block, top, chunks, pipes, SCORES: gl.constexpr):
    """Scores of a block, of which the last chunk is still under way, `top` as it was, and the
    number of that chunk's stage."""
    CHUNKS: gl.constexpr = len(chunks)
    at = block * CHUNKS
    stage = await_stage(at, pipes.k_full)
    s = ask_scores(chunks[0], stage, pipes, SCORES)
    for c in gl.static_range(1, CHUNKS):
        last = stage
        at += 1
        stage = await_stage(at, pipes.k_full)
        s = warpgroup_mma(chunks[c], matrix(pipes.k, stage).permute((1, 0)), s, is_async=True)
        # What is waited for is the chunk before; it has no results of its own to name.
        top = warpgroup_mma_wait(num_outstanding=1, deps=(top,))
        mbarrier.arrive(pipes.k_empty.index(last), count=1)
    return s, top, stage


@gluon.jit
def begin_wide(block, top, chunks, pipes, SCORES: gl.constexpr):
    """Scores of a tile's first block, and `top` as it was."""
    s, top, stage = ask_chunks(block, top, chunks, pipes, SCORES)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    mbarrier.arrive(pipes.k_empty.index(stage), count=1)
    return s, top


@gluon.jit
def step_wide(
    j, before, weights, o, top, total, position, chunks, pipes, UNIT: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Scores of block j, and meanwhile the values of block j - 1, of given weights."""
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    SCORES: gl.constexpr = weights.type.layout
    s, top, stage = ask_chunks(before + j, top, chunks, pipes, SCORES)
    last, phase = find_stage(before + j - 1, pipes.v_full)
    s, o = ask_values(s, stage, weights, o, last, phase, pipes)
    weights, top, total, factor = weigh_causal(s, top, total, position, j * BLOCK_N, UNIT, MASK)
    weights, o = end_values(before + j - 1, weights, o, factor, pipes)
    return weights, o, top, total


@gluon.jit
def attend_wide_tiles(
    out_ptr, queries, pipes, work, PARTS: gl.constexpr, UNIT: gl.constexpr,
    CONSUMERS: gl.constexpr, SEQUENCES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """A consumer: it takes ROWS queries of every tile."""
    CHUNKS: gl.constexpr = queries.bufs.type.shape[0] // CONSUMERS
    gl.static_assert(CHUNKS == 4)
    first = CONSUMER * CHUNKS
    chunks = (
        queries.bufs.index(first), queries.bufs.index(first + 1),
        queries.bufs.index(first + 2), queries.bufs.index(first + 3),
    )  # fmt: skip
    own = Queries(chunks, queries.full.index(CONSUMER), queries.empty.index(CONSUMER))
    attend_tiles(
        None, out_ptr, None, own, pipes, work, PARTS, UNIT, CONSUMERS, SEQUENCES, CONSUMER,
        begin_wide, step_wide,
    )  # fmt: skip


@waits  # once it has made its descriptors and counted its tiles
@gluon.jit
def gluon_attend_wide_kernel(
    q_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, out_ptr, tokens, all_rows, slots,
    row_stride, UNIT: gl.constexpr, KV: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments are gluon_attend_chunk_kernel's. STAGES are those of values; all chunks of a block
    of keys have room."""
    HEADS: gl.constexpr = KV * GROUPS
    CHUNKS: gl.constexpr = SIZE // CHUNK
    PARTS: gl.constexpr = HEADS * SIZE // COLUMNS
    q_desc = describe_queries(q_ptr, tokens, HEADS * SIZE, CHUNK)
    k_desc = describe_keys(k_ptr, all_rows, slots, row_stride, KV * SIZE, BLOCK_N, CHUNK)
    v_desc = describe_keys(v_ptr, all_rows, slots, row_stride, KV * SIZE, BLOCK_N, COLUMNS)
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS * CHUNKS, ROWS, CHUNK], QUERIES)
    k_bufs = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, 1, BLOCK_N, CHUNK], KEYS)
    v_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, BLOCK_N, COLUMNS], KEYS)
    queries, pipes = make_queries(q_bufs, CONSUMERS), make_pipeline(k_bufs, v_bufs)
    for i in gl.static_range(CHUNKS):
        open_stage(pipes.k_full, pipes.k_empty, i, CONSUMERS)
    for i in gl.static_range(STAGES):
        open_stage(pipes.v_full, pipes.v_empty, i, CONSUMERS)
    fence_async_shared()

    work = find_work(starts_ptr, rows_ptr, first_ptr, PARTS, CONSUMERS * ROWS, SEQUENCES)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (attend_wide_tiles, (out_ptr, queries, pipes, work, PARTS, UNIT, 2, SEQUENCES, 0)),
            (attend_wide_tiles, (out_ptr, queries, pipes, work, PARTS, UNIT, 2, SEQUENCES, 1)),
            (load_wide_tiles, (
                q_desc, k_desc, v_desc, queries, pipes, work, PARTS, GROUPS, SIZE, SEQUENCES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_wide_tiles, (out_ptr, queries, pipes, work, PARTS, UNIT, 1, SEQUENCES, 0)),
            (load_wide_tiles, (
                q_desc, k_desc, v_desc, queries, pipes, work, PARTS, GROUPS, SIZE, SEQUENCES,
            )),
        ], [1], [40])  # fmt: skip
