"""The Triton kernel of a packed chunk's attention: causal, with an online softmax.

A program has a block of BLOCK_M tokens of one sequence and one query head. It goes through blocks
of BLOCK_N keys, which start at positions that BLOCK_N divides, from the first that a query sees.
So a token's sums are the same wherever its chunk, or its block of queries, begins: a block of keys
that a query does not see at all leaves its row exactly as it was. Blocks with keys that only some
queries see are masked. Those that all see take the same arithmetic without the mask, where tl.fma
keeps the compiler from rounding differently.

FlashAttention-2: https://arxiv.org/abs/2307.08691.

Names: head elements i; query position m; key position n.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.attention.triton_attend import LOG2_E
from tokenloop.models.kernels.attention_chunk.triton_sequences import find_tokens
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.dot import dot


@triton.jit
def attend_blocks(
    acc, largest, total, q, m, k_ptr, v_ptr, begin, end, shift, known, slots,
    unit: tl.constexpr, MASKED: tl.constexpr, IS_RING: tl.constexpr, WRAPPED: tl.constexpr,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """acc, largest and total after the key blocks from `begin` to `end`, positions.

    Position n is in row n - shift of keys and values that are STRIDE apart, or where WRAPPED in row
    n % slots. No position from `known` on is there. With TMA the pointers are descriptors, which
    give zeros for what is not there.
    """
    i = tl.arange(0, SIZE)
    c = tl.arange(0, COLUMNS)
    j = tl.arange(0, BLOCK_N)
    for block in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = block + j
        # Values come first, though keys are needed first. The compiler puts a barrier before it
        # waits for what it asked for last. Before the second product a barrier would keep the
        # softmax of one warp group from running beside a product of the other.
        if TMA:
            at = block - shift
            if WRAPPED:
                at = block % slots
            v = v_ptr.load([at, 0])
            k = k_ptr.load([at, 0])
        else:
            there = n - shift
            if WRAPPED:
                there = n % slots
            there = there[:, None] * STRIDE
            if MASKED:
                v = tl.load(v_ptr + there + c[None, :], mask=(n < known)[:, None], other=0.0)
                k = tl.load(k_ptr + there + i[None, :], mask=(n < known)[:, None], other=0.0)
            else:
                v = tl.load(v_ptr + there + c[None, :])
                k = tl.load(k_ptr + there + i[None, :])
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if MASKED:
            seen = n[None, :] <= m[:, None]
            if IS_RING:
                seen = seen & (n[None, :] > m[:, None] - slots)
            scores = tl.where(seen, scores, float("-inf"))
        greater = tl.maximum(largest, tl.max(scores, 1) * unit)
        # A row that has seen nothing yet has -inf, from which nothing can be subtracted.
        shift_by = tl.where(greater == float("-inf"), 0.0, greater)
        weights = tl.exp2(tl.fma(scores, unit, -shift_by[:, None]))
        shrink = tl.exp2(largest - shift_by)
        total = tl.fma(total, shrink, tl.sum(weights, 1))
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
        largest = greater
    return acc, largest, total


@triton.jit
def source(
    k_ptr, v_ptr, count, STRIDE: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`count` keys and values of a head: pointers, or descriptors."""
    if TMA:
        k = tl.make_tensor_descriptor(k_ptr, [count, SIZE], [STRIDE, 1], [BLOCK_N, SIZE])
        v = tl.make_tensor_descriptor(v_ptr, [count, COLUMNS], [STRIDE, 1], [BLOCK_N, COLUMNS])
    else:
        k, v = k_ptr, v_ptr
    return k, v


@waits  # once it has found its tokens, by what the host wrote
@triton.jit
def attend_chunk_kernel(
    q_ptr, kv_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, slots,
    scale: tl.constexpr, KV: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
    SPLIT: tl.constexpr, IS_RING: tl.constexpr, SEQUENCES: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head; with SPLIT, one of so many parts of its results.

    Such parts make the same scores: the results of a wide head do not fit the registers.
    """
    COLUMNS: tl.constexpr = SIZE // SPLIT
    STRIDE: tl.constexpr = KV * SIZE
    WIDTH: tl.constexpr = HEADS * STRIDE
    # Scores are exponents of 2.
    unit: tl.constexpr = scale * LOG2_E
    sequence, start, count, block = find_tokens(
        starts_ptr, tl.program_id(1), SEQUENCES, PADDED, BLOCK_M
    )
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    first = tl.load(first_ptr + sequence)
    zero = wait(0)
    if (block + zero) * BLOCK_M >= count:
        return
    if row + zero < 0:
        return
    q_ptr += zero
    k_ptr += zero
    v_ptr += zero
    if IS_RING:
        kv_ptr += zero
    # The last queries of a sequence see the most: they come first.
    block = tl.cdiv(count, BLOCK_M) - 1 - block
    # Heads that share keys and values run beside one another, as do some key/value heads.
    part = tl.program_id(0) + tl.program_id(2) * tl.num_programs(0)
    head = part // SPLIT
    kv = head // HEADS
    column = part % SPLIT * COLUMNS
    past = first + count

    i = tl.arange(0, SIZE)
    t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m = first + t
    base = start.to(tl.int64) * WIDTH + head * SIZE
    queries = t[:, None] * WIDTH
    present = (t < count)[:, None]
    q = tl.load(q_ptr + base + queries + i[None, :], mask=present, other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if sinks_ptr is not None:
        # The first score is the sink's, and no value.
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        largest = tl.full([BLOCK_M], 0.0, tl.float32) + sink
        total += 1.0

    # Positions: all see those from `inner` to `diagonal`, and some from `begin` to `end`.
    low = first + block * BLOCK_M
    high = tl.minimum(low + BLOCK_M, past)
    end = tl.cdiv(high, BLOCK_N) * BLOCK_N
    diagonal = (low + 1) // BLOCK_N * BLOCK_N
    k_ptr += row * slots * STRIDE + kv * SIZE
    v_ptr += row * slots * STRIDE + kv * SIZE + column
    if IS_RING:
        begin = tl.maximum(low + 1 - slots, 0) // BLOCK_N * BLOCK_N
        if begin < first:
            k, v = source(k_ptr, v_ptr, slots, STRIDE, SIZE, COLUMNS, BLOCK_N, TMA)
            acc, largest, total = attend_blocks(
                acc, largest, total, q, m, k, v, begin, tl.minimum(first, end), 0, first, slots,
                unit, True, True, True, STRIDE, SIZE, COLUMNS, BLOCK_N, STAGES, TMA,
            )  # fmt: skip
            begin = first
        inner = tl.cdiv(tl.maximum(low + BLOCK_M - slots, 0), BLOCK_N) * BLOCK_N
        inner = tl.minimum(tl.maximum(inner, begin), end)
        chunk_ptr = kv_ptr + start.to(tl.int64) * (2 * STRIDE) + kv * SIZE
        k, v = source(
            chunk_ptr, chunk_ptr + STRIDE + column, count, 2 * STRIDE, SIZE, COLUMNS, BLOCK_N, TMA,
        )  # fmt: skip
        acc, largest, total = attend_blocks(
            acc, largest, total, q, m, k, v, begin, inner, first, past, slots,
            unit, True, True, False, 2 * STRIDE, SIZE, COLUMNS, BLOCK_N, STAGES, TMA,
        )  # fmt: skip
        diagonal = tl.maximum(diagonal, inner)
        acc, largest, total = attend_blocks(
            acc, largest, total, q, m, k, v, inner, diagonal, first, past, slots,
            unit, False, True, False, 2 * STRIDE, SIZE, COLUMNS, BLOCK_N, STAGES, TMA,
        )  # fmt: skip
        acc, largest, total = attend_blocks(
            acc, largest, total, q, m, k, v, diagonal, end, first, past, slots,
            unit, True, True, False, 2 * STRIDE, SIZE, COLUMNS, BLOCK_N, STAGES, TMA,
        )  # fmt: skip
    else:
        k, v = source(k_ptr, v_ptr, past, STRIDE, SIZE, COLUMNS, BLOCK_N, TMA)
        acc, largest, total = attend_blocks(
            acc, largest, total, q, m, k, v, 0, diagonal, 0, past, slots,
            unit, False, False, False, STRIDE, SIZE, COLUMNS, BLOCK_N, STAGES, TMA,
        )  # fmt: skip
        acc, largest, total = attend_blocks(
            acc, largest, total, q, m, k, v, diagonal, end, 0, past, slots,
            unit, True, False, False, STRIDE, SIZE, COLUMNS, BLOCK_N, STAGES, TMA,
        )  # fmt: skip
    out = (acc * (1 / total)[:, None]).to(out_ptr.dtype.element_ty)
    to = queries + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + base + column + to, out, mask=present)
