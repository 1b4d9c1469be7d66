"""The Triton kernel of linear layers that takes all rows at once, by the tensor cores.

The weight is the left, large operand; it may be packed (packing.py says how). A row's
result does not depend on the number of rows: each output is summed over the inputs in one order.

Names: row b of `rows`, output n of N, input k of K. A gated layer's weight has 2 N rows, of which
one program takes n and N + n.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import (
    prefetch_rows,
    release,
    wait_alone,
    waits,
)
from tokenloop.models.kernels.launch.dot import dot
from tokenloop.models.kernels.launch.semaphores import arrive
from tokenloop.models.kernels.linear.triton_epilogue import finish
from tokenloop.models.kernels.linear.triton_packing import BITS_OF_WORD, OFFSET, WORDS, field


@triton.jit
def load_rows(x_ptr, b, k, rows, K):
    """Activations [k, b], zero beyond either."""
    mask = (k < K)[:, None] & (b < rows)[None, :]
    return tl.load(x_ptr + b[None, :] * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def load_scales(scale_ptr, n, span, K, count, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Scales [n] of each group of a span; the weight has `count` rows."""
    scales = ()
    for i in tl.static_range(WORDS * (BITS_OF_WORD // BITS) // GROUP):
        # Padding has no scale of its own, and needs none.
        group = tl.minimum(span * (WORDS * (BITS_OF_WORD // BITS) // GROUP) + i, K // GROUP - 1)
        scales = scales + (tl.load(scale_ptr + group * count + n),)
    return scales


@triton.jit
def part_products(w, x, scale, BITS: tl.constexpr):
    """[n, b] of a field of weights [n, k] and activations [k, b], with that scale [n]."""
    products = dot(w, x, tl.zeros([w.shape[0], x.shape[1]], tl.float32))
    if BITS == 4:
        offsets = tl.full(w.shape, OFFSET, tl.float32).to(tl.bfloat16)
        products -= dot(offsets, x, tl.zeros(products.shape, tl.float32))
    return products * scale.to(tl.float32)[:, None]


@triton.jit
def span_products(
    gate, up, w_ptr, gates, ups, x_ptr, first, second, b, span, rows, K, width,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """gate and, where GATED, up [n, b] plus one span of their weights [n, k] times activations
    [k, b].

    Each of `gates` and `ups` is the scale of equally many fields, or of half a field. Where a row
    has one scale there are none: that is left to the end. What the offset of weights of 4 bits adds
    to the products is subtracted from them: that takes one more product of matrices instead of a
    subtraction for every pair of weights.
    """
    FIELDS: tl.constexpr = BITS_OF_WORD // BITS
    PARTS: tl.constexpr = len(gates) // FIELDS
    SHARED: tl.constexpr = FIELDS if len(gates) == 0 or PARTS > 1 else FIELDS // len(gates)
    columns = span * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(w_ptr + first[:, None] * width + columns)
    if GATED:
        others = tl.load(w_ptr + second[:, None] * width + columns)
    if PARTS > 1:
        part_of = tl.arange(0, WORDS)[:, None] // (WORDS // PARTS)
        for i in tl.static_range(FIELDS):
            k = (span * FIELDS + i) * WORDS + tl.arange(0, WORDS)
            x = load_rows(x_ptr, b, k, rows, K)
            for part in tl.static_range(PARTS):
                own = tl.where(part_of == part, x, tl.zeros(x.shape, x.dtype))
                scale = gates[i * PARTS + part]
                gate += part_products(field(words, i, BITS, FLOAT8), own, scale, BITS)
                if GATED:
                    scale = ups[i * PARTS + part]
                    up += part_products(field(others, i, BITS, FLOAT8), own, scale, BITS)
        return gate, up
    for group in tl.static_range(FIELDS // SHARED):
        these = tl.zeros(gate.shape, tl.float32)
        those = tl.zeros(gate.shape, tl.float32)
        excess = tl.zeros(gate.shape, tl.float32)
        for i in tl.static_range(group * SHARED, (group + 1) * SHARED):
            k = (span * FIELDS + i) * WORDS + tl.arange(0, WORDS)
            x = load_rows(x_ptr, b, k, rows, K)
            these = dot(field(words, i, BITS, FLOAT8), x, these)
            if GATED:
                those = dot(field(others, i, BITS, FLOAT8), x, those)
            if BITS == 4:
                offsets = tl.full(words.shape, OFFSET, tl.float32).to(tl.bfloat16)
                excess = dot(offsets, x, excess)
        if len(gates) == 0:
            gate += these
            up += those
        else:
            gate += (these - excess) * gates[group].to(tl.float32)[:, None]
            if GATED:
                up += (those - excess) * ups[group].to(tl.float32)[:, None]
    return gate, up


@triton.jit
def block_products(
    acc, w_ptr, x_ptr, n, b, start, rows, K, BLOCK_K: tl.constexpr, EVEN: tl.constexpr
):
    """acc [n, b] plus BLOCK_K weights [n, k] times activations [k, b]."""
    k = start + tl.arange(0, BLOCK_K)
    offsets = n[:, None] * K + k[None, :]
    if EVEN:
        w = tl.load(w_ptr + offsets)
    else:
        w = tl.load(w_ptr + offsets, mask=(k < K)[None, :], other=0.0)
    return dot(w, load_rows(x_ptr, b, k, rows, K), acc)


@triton.jit
def combined(partial_ptr, offsets, mask, stride, SPLITS: tl.constexpr):
    """The sum of SPLITS partial results, in order."""
    # Other programs wrote it: it must not come from this processor's own cache.
    total = tl.load(partial_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(
            partial_ptr + split * stride + offsets, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return total


# Alone, once it has asked for weights; it releases the next kernel when it has read them all.
@waits
@triton.jit(do_not_specialize=["rows", "steps"])
def dot_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, partial_ptr, semaphore_ptr, y_ptr,
    rows, N, K, width, steps, soft_cap: tl.constexpr,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    SOFT_CAP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_B rows, over one of SPLITS parts of the inputs.

    A part is `steps` blocks of BLOCK_K inputs, or `steps` spans of packed weights, which have
    `width` words a row. The last program to arrive adds the parts up. The first AHEAD programs ask
    for weights before the activations.
    """
    tile, split, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b = row_block * BLOCK_B + tl.arange(0, BLOCK_B)
    # Rows beyond the last are the last: loads need no masks, and the results are not stored.
    first = tl.minimum(n, N - 1).to(tl.int64)
    second = first + N
    gate = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    step: tl.constexpr = BLOCK_K if BITS == 0 else WORDS * (BITS_OF_WORD // BITS)
    begin = split * steps
    end = tl.minimum(begin + steps, tl.cdiv(K, step))
    # The pipeline's first weights do not wait for the activations.
    asked = 0
    if (tile + split * tl.num_programs(0) < AHEAD) & (begin < end):
        bytes_of: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
        line: tl.constexpr = BLOCK_K if BITS == 0 else WORDS
        size = tl.minimum(tl.minimum(end * line, width) - begin * line, STAGES * line)
        count_n = tl.minimum(N - tile * BLOCK_N, BLOCK_N)
        skipped = (tile * BLOCK_N).to(tl.int64) * width + begin * line
        given = width * bytes_of, count_n, size * bytes_of
        asked = prefetch_rows(w_ptr + skipped, *given)
        if ACTIVATION is not None:
            skipped += tl.cast(N, tl.int64) * width
            asked += prefetch_rows(w_ptr + skipped, *given)
    gates, ups = (), ()
    count = N if ACTIVATION is None else 2 * N
    if GROUP > 0:
        gates = load_scales(scale_ptr, first, begin, K, count, GROUP, BITS)
        if ACTIVATION is not None:
            ups = load_scales(scale_ptr, second, begin, K, count, GROUP, BITS)
    x_ptr += wait_alone(asked)
    if BITS == 0:
        for i in tl.range(begin, end, num_stages=STAGES):
            gate = block_products(gate, w_ptr, x_ptr, first, b, i * step, rows, K, step, EVEN)
            if ACTIVATION is not None:
                up = block_products(up, w_ptr, x_ptr, second, b, i * step, rows, K, step, EVEN)
    else:
        # Scales are loaded a span ahead: the pipeline only has the operands of matrix products.
        for i in tl.range(begin, end, num_stages=STAGES):
            these, those = gates, ups
            if GROUP > 0:
                gates = load_scales(scale_ptr, first, i + 1, K, count, GROUP, BITS)
                if ACTIVATION is not None:
                    ups = load_scales(scale_ptr, second, i + 1, K, count, GROUP, BITS)
            gate, up = span_products(
                gate, up, w_ptr, these, those, x_ptr, first, second, b, i, rows, K, width,
                BITS, FLOAT8, ACTIVATION is not None,
            )  # fmt: skip
    if BITS == 8 and GROUP == 0:
        gate *= tl.load(scale_ptr + first)[:, None]
        if ACTIVATION is not None:
            up *= tl.load(scale_ptr + second)[:, None]

    mask = (n < N)[:, None] & (b < rows)[None, :]
    y_offsets = b.to(tl.int64)[None, :] * N + n[:, None] + release(0)
    if SPLITS > 1:
        size = tl.cast(rows, tl.int64) * N
        stride = size if ACTIVATION is None else 2 * size
        tl.store(partial_ptr + split * stride + y_offsets, gate, mask=mask)
        if ACTIVATION is not None:
            tl.store(partial_ptr + split * stride + size + y_offsets, up, mask=mask)
        if not arrive(semaphore_ptr + row_block * tl.num_programs(0) + tile, SPLITS):
            return
        gate = combined(partial_ptr, y_offsets, mask, stride, SPLITS)
        if ACTIVATION is not None:
            up = combined(partial_ptr + size, y_offsets, mask, stride, SPLITS)
    y = finish(gate, up, bias_ptr, n[:, None], N, soft_cap, ACTIVATION, SOFT_CAP)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
