"""Triton kernels of routed experts for many tokens: products by tiles, each of one expert.

Pairs, which are a token and one of its choices, are sorted by expert: a pair's place among them is
its slot. Weights are the left, large operand of every product. So all tiles, however few pairs they
have, take the same instruction, and each output is summed over the inputs in ascending order in one
float32 number: a pair's result depends neither on its slot nor on the tile.

Names: token t, choice j of C, pair p = t * C + j, expert e of E, output n of N, input k of K.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.experts.triton_groups import load_float4
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.dot import dot
from tokenloop.models.kernels.linear.triton_epilogue import gated


@waits  # once it has the count, which the host wrote
@triton.jit
def count_pairs_kernel(
    chosen_ptr, count_ptr, parts_ptr, E,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """How many of BLOCK_P pairs each expert has: parts int32 [.., E]."""
    part = tl.program_id(0)
    pairs = tl.load(count_ptr) * C
    zero = wait(0)
    if part * BLOCK_P + zero >= pairs:
        return
    chosen_ptr += zero
    p, e = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    exists = p < pairs
    chosen = tl.load(chosen_ptr + p, mask=exists, other=0).to(tl.int32)
    counts = tl.histogram(chosen, BLOCK_E, mask=exists)
    tl.store(parts_ptr + part * E + e, counts, mask=e < E)


@waits  # once it has the count, which the host wrote
@triton.jit
def cut_blocks_kernel(
    parts_ptr, count_ptr, next_ptr, blocks_ptr, used_ptr, E, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each expert's first slot, `next` [E]; and the `used` blocks of at most BLOCK_M slots of one
    expert, each with its expert, its first slot, and the slot after the expert's last, [.., 3]."""
    e = tl.arange(0, BLOCK_E)
    parts = tl.cdiv(tl.load(count_ptr) * C, BLOCK_P)
    zero = wait(0)
    parts_ptr += zero
    next_ptr += zero
    blocks_ptr += zero
    used_ptr += zero
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (e < E)[None, :]
        found = tl.load(parts_ptr + part[:, None] * E + e[None, :], mask=mask, other=0)
        counts += tl.sum(found, 0)
    ends, blocks = tl.cumsum(counts, 0), tl.cdiv(counts, BLOCK_M)
    begins, first = ends - counts, tl.cumsum(blocks, 0) - blocks
    tl.store(next_ptr + e, begins, mask=e < E)
    tl.store(used_ptr, tl.sum(blocks, 0))
    for i in range(0, tl.max(blocks, 0)):
        block_ptr, exists = blocks_ptr + (first + i) * 3, i < blocks
        tl.store(block_ptr, e, mask=exists)
        tl.store(block_ptr + 1, begins + i * BLOCK_M, mask=exists)
        tl.store(block_ptr + 2, ends, mask=exists)


@waits  # once it has the count, which the host wrote
@triton.jit
def place_pairs_kernel(
    chosen_ptr, count_ptr, next_ptr, slots_ptr, C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The pair of each slot, int32. In which order an expert's pairs take its slots is left to
    chance: no result depends on it, because each pair's products are its own."""
    start, pairs = tl.program_id(0) * BLOCK_P, tl.load(count_ptr) * C
    zero = wait(0)
    if start + zero >= pairs:
        return
    chosen_ptr += zero
    next_ptr += zero
    p = start + tl.arange(0, BLOCK_P)
    exists = p < pairs
    chosen = tl.load(chosen_ptr + p, mask=exists, other=0)
    slots = tl.atomic_add(next_ptr + chosen, 1, mask=exists, sem="relaxed")
    tl.store(slots_ptr + slots, p, mask=exists)


@waits  # once it has the weights: kernels ahead may read what was where it writes
@triton.jit
def dequantize_float4_kernel(
    w_ptr, scale_ptr, out_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """bfloat16 out [N, K] of BLOCK_N rows, which are all experts', and BLOCK_K inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    row = tl.minimum(n, N - 1).to(tl.int64)
    weights = load_float4(w_ptr, scale_ptr, row, start, K, BLOCK_K, EVEN)
    k = start + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + wait(0) + row[:, None] * K + k[None, :], weights, mask=mask)


@triton.jit
def find_tile(used_ptr, N, BLOCK_N: tl.constexpr):
    """A program's block of slots, its tile of BLOCK_N outputs, whether it has nothing to do, and
    the zero of `wait`."""
    tiles = tl.cdiv(N, BLOCK_N)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    zero = wait(0)
    return block, tile, block >= tl.load(used_ptr + zero), zero


@triton.jit
def load_tile(blocks_ptr, slots_ptr, block, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(expert, int64, slots [BLOCK_M], the slot after the expert's last, slots to read, their
    pairs, outputs [BLOCK_N]) of a tile of a block. What is beyond the last slot is read as the
    last: loads need no masks, and the results are not stored."""
    expert = tl.load(blocks_ptr + block * 3).to(tl.int64)
    slots = tl.load(blocks_ptr + block * 3 + 1) + tl.arange(0, BLOCK_M)
    end = tl.load(blocks_ptr + block * 3 + 2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    read = tl.minimum(slots, end - 1)
    return expert, slots, end, read, tl.load(slots_ptr + read), n


@triton.jit
def add_product(
    acc, w_ptr, scale_ptr, outputs, offsets, x, start, k, K,
    GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc [n, m] plus weights [n, k] times x [k, m], whose inputs begin at `start`. `outputs` [n]
    counts all experts' rows, which begin at `offsets` [n, 1]. Weights are of x's dtype, float8,
    whose products are multiplied by the scales of their GROUP if there is one, or float4."""
    IS_FLOAT4: tl.constexpr = w_ptr.dtype.element_ty == tl.int16
    if IS_FLOAT4:
        w = load_float4(w_ptr, scale_ptr, outputs, start, K, x.shape[0], EVEN)
    else:
        w = load_inputs(w_ptr, offsets + k[None, :], k[None, :], K, EVEN)
        if w.dtype != x.dtype:
            w = w.to(x.dtype)
    if GROUP and not IS_FLOAT4:
        scale = tl.load(scale_ptr + outputs * (K // GROUP) + start // GROUP)
        zeros = tl.zeros([w.shape[0], x.shape[1]], tl.float32)
        return acc + dot(w, x, zeros) * scale[:, None]
    else:
        return dot(w, x, acc)


@triton.jit
def load_inputs(ptr, offsets, k, K, EVEN: tl.constexpr):
    """Elements at `offsets`, whose inputs are k; zero beyond the last where K is not EVEN."""
    if EVEN:
        return tl.load(ptr + offsets)
    return tl.load(ptr + offsets, mask=k < K, other=0.0)


@waits  # at once: which weights it reads is what it waits for
@triton.jit
def gate_up_chunk_kernel(
    x_ptr, slots_ptr, blocks_ptr, used_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr, N, K,
    ACTIVATION: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs activation(gate) * up of a block's slots: h [slots, N]. GROUP inputs of
    a row have a scale, or none has with 0, or all of them."""
    block, tile, is_idle, zero = find_tile(used_ptr, N, BLOCK_N)
    if is_idle:
        return
    slots_ptr += zero
    blocks_ptr += zero
    x_ptr += zero
    expert, slots, end, _, pairs, n = load_tile(
        blocks_ptr, slots_ptr, block, tile, BLOCK_M, BLOCK_N
    )
    rows = (pairs // C).to(tl.int64)[None, :] * K
    gate_rows = expert * 2 * N + tl.minimum(n, N - 1)
    up_rows = gate_rows + tl.cast(N, tl.int64)
    gates = gate_rows[:, None] * K
    ups = gates + tl.cast(N, tl.int64) * K
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x = load_inputs(x_ptr, rows + k[:, None], k[:, None], K, EVEN)
        gate = add_product(gate, w_ptr, scale_ptr, gate_rows, gates, x, start, k, K, GROUP, EVEN)
        up = add_product(up, w_ptr, scale_ptr, up_rows, ups, x, start, k, K, GROUP, EVEN)
    if not GROUP and scale_ptr is not None:
        scale_ptr += expert * 2 * N
        gate *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        up *= tl.load(scale_ptr + N + n, mask=n < N, other=0.0)[:, None]
    if bias_ptr is not None:
        bias_ptr += expert * 2 * N
        gate += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    h = gated(gate, up, ACTIVATION)
    offsets = slots.to(tl.int64)[None, :] * N + n[:, None]
    mask = (slots < end)[None, :] & (n < N)[:, None]
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)


@waits  # at once: which weights it reads is what it waits for
@triton.jit
def down_chunk_kernel(
    h_ptr, slots_ptr, blocks_ptr, used_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of the pairs in a block's slots, of h [slots, K]: y [pairs, N]. GROUP is
    gate_up_chunk_kernel's."""
    block, tile, is_idle, zero = find_tile(used_ptr, N, BLOCK_N)
    if is_idle:
        return
    slots_ptr += zero
    blocks_ptr += zero
    h_ptr += zero
    expert, slots, end, read, pairs, n = load_tile(
        blocks_ptr, slots_ptr, block, tile, BLOCK_M, BLOCK_N
    )
    pairs = pairs.to(tl.int64)
    rows = read.to(tl.int64)[None, :] * K
    output_rows = expert * N + tl.minimum(n, N - 1)
    outputs = output_rows[:, None] * K
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        h = load_inputs(h_ptr, rows + k[:, None], k[:, None], K, EVEN)
        y = add_product(y, w_ptr, scale_ptr, output_rows, outputs, h, start, k, K, GROUP, EVEN)
    if not GROUP and scale_ptr is not None:
        y *= tl.load(scale_ptr + expert * N + n, mask=n < N, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (slots < end)[None, :] & (n < N)[:, None]
    tl.store(y_ptr + pairs[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@waits  # once it has the count, which the host wrote
@triton.jit
def weigh_kernel(
    pairs_ptr, weights_ptr, count_ptr, shared_ptr, scores_ptr, y_ptr, N, width,
    C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a token: the sum of what its pairs [.., N] give, in the order of its
    choices, each with its weight; plus the shared expert's, which the last of the scores weighs."""
    t = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr)
    zero = wait(0)
    if t + zero >= count:
        return
    pairs_ptr += zero
    weights_ptr += zero
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros([BLOCK_N], tl.float32)
    for j in tl.static_range(C):
        given = tl.load(pairs_ptr + (t * C + j) * N + n, mask=n < N, other=0.0)
        y += tl.load(weights_ptr + t * C + j).to(tl.float32) * given.to(tl.float32)
    if shared_ptr is not None:
        score = tl.load(scores_ptr + zero + t * width + width - 1).to(tl.float32)
        shared = tl.load(shared_ptr + zero + t * N + n, mask=n < N, other=0.0).to(tl.float32)
        y += shared / (1 + tl.exp(-score))
    tl.store(y_ptr + t * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
