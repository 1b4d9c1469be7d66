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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokenloop.models.kernels.launch.dependent_launch import waits
from tokenloop.models.kernels.launch.gluon_launch import after_wait

# Triton 3.8 calls it otherwise.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

# Queries of a warpgroup: the rows of its instruction.
ROWS = gl.constexpr(64)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def blocks_of_sequences(
    starts_ptr, rows_ptr, BLOCK_M: gl.constexpr, SEQUENCES: gl.constexpr, PADDED: gl.constexpr
):
    """int32 [PADDED]: blocks of BLOCK_M queries that each sequence has."""
    # Every warp has them all, so that none waits for another.
    LAYOUT: gl.constexpr = gl.BlockedLayout([PADDED // 32], [32], [gl.num_warps()], [0])
    i = gl.arange(0, PADDED, layout=LAYOUT)
    there = i < SEQUENCES
    starts = gl.load(starts_ptr + i, mask=there, other=0)
    ends = gl.load(starts_ptr + 1 + i, mask=there, other=0)
    rows = gl.load(rows_ptr + i, mask=there, other=-1)
    return gl.where(rows >= 0, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)


@gluon.jit
def rounds(tiles):
    """How many tiles this program takes: all programs' rounds go back and forth, so that each gets
    long and short ones."""
    programs = gl.num_programs(0)
    whole = tiles // programs
    place = gl.program_id(0)
    if whole % 2 == 1:
        place = programs - 1 - place
    return whole + (place < tiles - whole * programs).to(gl.int32)


@gluon.jit
def find_tile(
    round, starts_ptr, rows_ptr, first_ptr, HEADS: gl.constexpr, BLOCK_M: gl.constexpr,
    SEQUENCES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """This program's tile of a round: (the sequence's cache row, the first query's number in the
    chunk, its position, how many queries the sequence has from it on, head, the position of the
    sequence's first query)."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if round % 2 == 1:
        place = programs - 1 - place
    tile = round * programs + place
    block = tile // HEADS
    sequence = block * 0
    if SEQUENCES > 1:
        ends = gl.associative_scan(
            blocks_of_sequences(starts_ptr, rows_ptr, BLOCK_M, SEQUENCES, PADDED), 0, add
        )
        passed = ends <= block
        sequence = gl.sum(passed.to(gl.int32), 0)
        block -= gl.max(gl.where(passed, ends, 0), 0)
    start = gl.load(starts_ptr + sequence)
    count = gl.load(starts_ptr + sequence + 1) - start
    # The last queries of a sequence see the most keys: they come first.
    skipped = ((count + BLOCK_M - 1) // BLOCK_M - 1 - block) * BLOCK_M
    first = gl.load(first_ptr + sequence)
    row = gl.load(rows_ptr + sequence)
    return row, start + skipped, first + skipped, count - skipped, tile % HEADS, first


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS: gl.constexpr, GROUPS: gl.constexpr,
    SEQUENCES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """The producer. Keys of a block come before the values of the block before it."""
    CONSUMERS: gl.constexpr = q_bufs.type.shape[0]
    SIZE: gl.constexpr = q_bufs.type.shape[2]
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    done = 0
    for i in range(rounds(tiles)):
        row, token, position, count, head, _ = find_tile(
            i, starts_ptr, rows_ptr, first_ptr, HEADS, BLOCK_M, SEQUENCES, PADDED
        )
        column = head // GROUPS * SIZE
        blocks = (position + gl.minimum(count, BLOCK_M) + BLOCK_N - 1) // BLOCK_N
        for part in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(part), (i & 1) ^ 1)
            ready = q_full.index(part)
            mbarrier.expect(ready, ROWS * SIZE * 2)
            tma.async_copy_global_to_shared(
                q_desc, [token + part * ROWS, head * SIZE], ready, q_bufs.index(part)
            )
        for j in range(blocks + 1):
            at = done + j
            if j < blocks:
                mbarrier.wait(k_empty.index(at % STAGES), ((at // STAGES) & 1) ^ 1)
                ready = k_full.index(at % STAGES)
                mbarrier.expect(ready, BLOCK_N * SIZE * 2)
                tma.async_copy_global_to_shared(
                    k_desc, [row, j * BLOCK_N, column], ready, k_bufs.index(at % STAGES)
                )
            if j > 0:
                at -= 1
                mbarrier.wait(v_empty.index(at % STAGES), ((at // STAGES) & 1) ^ 1)
                ready = v_full.index(at % STAGES)
                mbarrier.expect(ready, BLOCK_N * SIZE * 2)
                tma.async_copy_global_to_shared(
                    v_desc, [row, (j - 1) * BLOCK_N, column], ready, v_bufs.index(at % STAGES)
                )
        done += blocks


@gluon.jit
def matrix(bufs, stage):
    """Keys or values [BLOCK_N, SIZE] of a stage."""
    BLOCK_N: gl.constexpr = bufs.type.shape[2]
    SIZE: gl.constexpr = bufs.type.shape[3]
    return bufs.index(stage).reshape([BLOCK_N, SIZE])


@gluon.constexpr_function
def product_layout(columns):
    """Of a product of 64 rows: an instruction takes all its columns."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def weigh(s, top, total, position, key, UNIT: gl.constexpr, MASK: gl.constexpr):
    """Exponents of a block's scores, the new maximum and sum, and the factor of what was before."""
    BLOCK_N: gl.constexpr = s.type.shape[1]
    if MASK:
        keys = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(keys[None, :] <= position[:, None], s, float("-inf"))
    # Finite, as every query sees a key of the first block.
    new_top = gl.maximum(top, gl.max(s, 1))
    shift = new_top * UNIT
    p = gl.exp2(gl.fma(s, UNIT, -shift[:, None]))
    # Exactly 1 where the maximum stays.
    factor = gl.exp2((top - new_top) * UNIT)
    total = gl.fma(total, factor, gl.sum(p, 1))
    return p, new_top, total, factor


@gluon.jit
def step(
    j, before, weights, o, top, total, position, q_buf, k_bufs, v_bufs, k_full, k_empty, v_full,
    v_empty, UNIT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of block j, and meanwhile the values of block j - 1, of given weights."""
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.type.shape[2]
    LAYOUT: gl.constexpr = o.type.layout
    SCORES: gl.constexpr = weights.type.layout
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    at = before + j
    stage, phase = at % STAGES, (at // STAGES) & 1
    last, last_phase = (at - 1) % STAGES, ((at - 1) // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    s = warpgroup_mma(
        q_buf, matrix(k_bufs, stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    # As float32 they came here: bfloat16 would be packed in pairs anew.
    DOT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    p = gl.convert_layout(weights.to(gl.bfloat16), DOT)
    mbarrier.wait(v_full.index(last), last_phase)
    o = warpgroup_mma(p, matrix(v_bufs, last), o, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, top, total, factor = weigh(s, top, total, position, j * BLOCK_N, UNIT, MASK)
    # That the wait takes the weights keeps LLVM from computing them after it, and a barrier that
    # has long been passed, which is a loop, keeps ptxas.
    mbarrier.wait(v_full.index(last), last_phase)
    o, weights = warpgroup_mma_wait(num_outstanding=0, deps=(o, weights))
    mbarrier.arrive(v_empty.index(last), count=1)
    o = o * gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None]
    return weights, o, top, total


@gluon.jit
def attend_tiles(
    o_desc, out_ptr, q_buf, o_buf, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS: gl.constexpr, UNIT: gl.constexpr,
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
    # A wide head's queries, keys and values leave no room for its results.
    STAGED: gl.constexpr = SIZE <= 128
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    done = 0
    for i in range(rounds(tiles)):
        _, token, position, count, head, _ = find_tile(
            i, starts_ptr, rows_ptr, first_ptr, HEADS, BLOCK_M, SEQUENCES, PADDED
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

        mbarrier.wait(q_full, i & 1)
        stage = done % STAGES
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        s = warpgroup_mma(
            q_buf, matrix(k_bufs, stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, top, total, _ = weigh(s, top, total, query, 0, UNIT, True)
        o = gl.zeros([ROWS, SIZE], gl.float32, layout=LAYOUT)
        for j in range(1, unmasked):
            weights, o, top, total = step(
                j, done, weights, o, top, total, query, q_buf, k_bufs, v_bufs, k_full, k_empty,
                v_full, v_empty, UNIT, False,
            )  # fmt: skip
        for j in range(gl.maximum(unmasked, 1), blocks):
            weights, o, top, total = step(
                j, done, weights, o, top, total, query, q_buf, k_bufs, v_bufs, k_full, k_empty,
                v_full, v_empty, UNIT, True,
            )  # fmt: skip
        # All scores are there: the next queries may come.
        mbarrier.arrive(q_empty, count=1)
        done += blocks
        stage = (done - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((done - 1) // STAGES) & 1)
        p = gl.convert_layout(weights.to(gl.bfloat16), DOT)
        o = warpgroup_mma(p, matrix(v_bufs, stage), o, is_async=True)
        o = warpgroup_mma_wait(num_outstanding=0, deps=(o,))
        mbarrier.arrive(v_empty.index(stage), count=1)

        shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, LAYOUT))
        o = (o * shrink[:, None]).to(gl.bfloat16)
        if STAGED and count >= ROWS:
            tma.store_wait(0)
            thread_barrier()
            o_buf.store(o)
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(o_desc, [token, head * SIZE], o_buf)
        elif count > 0:
            # The next sequence's tokens may lie behind these.
            t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            column = head * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(0, LAYOUT))
            to = (token + t).to(gl.int64)[:, None] * (HEADS * SIZE) + column[None, :]
            gl.store(out_ptr + to, o, mask=(t < count)[:, None])
    if STAGED:
        tma.store_wait(0)


@waits  # once it has made its descriptors and counted its tiles
@gluon.jit
def gluon_attend_chunk_kernel(
    q_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, out_ptr, tokens, all_rows, slots,
    row_stride, UNIT: gl.constexpr, KV: gl.constexpr, GROUPS: gl.constexpr, SIZE: gl.constexpr,
    SEQUENCES: gl.constexpr, PADDED: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """out [tokens, KV * GROUPS * SIZE] of queries q of that shape, bfloat16, and caches [all_rows,
    slots, KV, SIZE] whose rows are row_stride elements apart.

    UNIT is the scale of the scores times log2(e). PADDED is a power of two from 32 and SEQUENCES
    on. Tokens of a sequence without a row are not written.
    """
    HEADS: gl.constexpr = KV * GROUPS
    WIDTH: gl.constexpr = HEADS * SIZE
    KV_WIDTH: gl.constexpr = KV * SIZE
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    # A row is an axis of its own, so that a block of keys does not reach into the next.
    ROW_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=3
    )
    q_desc = tma.make_tensor_descriptor(q_ptr, [tokens, WIDTH], [WIDTH, 1], [ROWS, SIZE], LAYOUT)
    o_desc = tma.make_tensor_descriptor(out_ptr, [tokens, WIDTH], [WIDTH, 1], [ROWS, SIZE], LAYOUT)
    k_desc = tma.make_tensor_descriptor(
        k_ptr, [all_rows, slots, KV_WIDTH], [row_stride, KV_WIDTH, 1], [1, BLOCK_N, SIZE],
        ROW_LAYOUT,
    )  # fmt: skip
    v_desc = tma.make_tensor_descriptor(
        v_ptr, [all_rows, slots, KV_WIDTH], [row_stride, KV_WIDTH, 1], [1, BLOCK_N, SIZE],
        ROW_LAYOUT,
    )  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, SIZE], LAYOUT)
    if SIZE <= 128:
        o_bufs = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, ROWS, SIZE], LAYOUT)
    else:
        o_bufs = q_bufs
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
            (attend_tiles, (
                o_desc, out_ptr, q_bufs.index(0), o_bufs.index(0), k_bufs, v_bufs, q_full.index(0),
                q_empty.index(0), k_full, k_empty, v_full, v_empty, starts_ptr, rows_ptr,
                first_ptr, tiles, HEADS, UNIT, 0, CONSUMERS, SEQUENCES, PADDED,
            )),
            (attend_tiles, (
                o_desc, out_ptr, q_bufs.index(1), o_bufs.index(1), k_bufs, v_bufs, q_full.index(1),
                q_empty.index(1), k_full, k_empty, v_full, v_empty, starts_ptr, rows_ptr,
                first_ptr, tiles, HEADS, UNIT, 1, CONSUMERS, SEQUENCES, PADDED,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS, GROUPS, SEQUENCES,
                PADDED,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend_tiles, (
                o_desc, out_ptr, q_bufs.index(0), o_bufs.index(0), k_bufs, v_bufs, q_full.index(0),
                q_empty.index(0), k_full, k_empty, v_full, v_empty, starts_ptr, rows_ptr,
                first_ptr, tiles, HEADS, UNIT, 0, CONSUMERS, SEQUENCES, PADDED,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, starts_ptr, rows_ptr, first_ptr, tiles, HEADS, GROUPS, SEQUENCES,
                PADDED,
            )),
        ], [1], [40])  # fmt: skip
