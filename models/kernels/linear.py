"""Triton kernels of the linear layers, and of the norms before them; cuda.py launches them.

`rows_kernel` multiplies and adds for one row a program, and can norm the row first. `dot_kernel`
takes all rows at once through the tensor cores, with the weight as the left, large operand, and
reads integer weights too (packing.py says how they lie). In neither does a row's result depend on
the number of rows: each output is summed over the inputs in one order.

Numbers such as `eps` are constants: as arguments the compiler of torch would pass them as float64.

Names: row b of `rows`, output n of N, input k of K. A gated layer's weight has 2 N rows, of which
one program takes n and N + n.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.dependent_launch import prefetch_rows, release, wait, wait_alone
from tokenloop.models.kernels.packing import SPAN_WORDS, WORD_BITS

WORDS = tl.constexpr(SPAN_WORDS)
BITS_OF_WORD = tl.constexpr(WORD_BITS)

# What `field` gives is so much more than a weight of 4 bits: 8 that it is stored with, and 128.
OFFSET = tl.constexpr(136.0)

# The interpreter holds bfloat16 as integers, and computes with them as such.
if triton.knobs.runtime.interpret:

    @triton.jit
    def dot(a, b, acc):
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)

    @triton.jit
    def field(words, INDEX: tl.constexpr, BITS: tl.constexpr):
        values = (words.to(tl.int32) >> (BITS * INDEX)) & (2**BITS - 1)
        values = values + 128 if BITS == 4 else values - ((values & 128) << 1)
        return values.to(tl.float32).to(tl.bfloat16)

else:

    @triton.jit
    def dot(a, b, acc):
        return tl.dot(a, b, acc, input_precision="ieee")

    # With 7 bits of mantissa 0x4300 | u is 128 + u for u < 128: conversions are slow.
    _NIBBLES = """{{
        .reg .b32 t;
        shr.b32 t, $1, {shift};
        lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA;
    }}"""
    # 128, or 256 where the sign bit is set, is taken off.
    _BYTES = """{{
        .reg .b32 s, t;
        shr.b32 t, $1, {shift};
        lop3.b32 s, t, 0x00800080, 0x43004300, 0xEA;
        lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, t, s;
    }}"""
    # On one line: torch's compiler copies them into a string with their escapes processed.
    _NIBBLES, _BYTES = " ".join(_NIBBLES.split()), " ".join(_BYTES.split())
    NIBBLES = tl.constexpr(tuple(_NIBBLES.format(shift=4 * i) for i in range(4)))
    BYTES = tl.constexpr(tuple(_BYTES.format(shift=8 * i) for i in range(2)))

    @triton.jit
    def field(words, INDEX: tl.constexpr, BITS: tl.constexpr):
        """Field INDEX of int16 words in exact bfloat16, of 4 bits with OFFSET; two at once."""
        return tl.inline_asm_elementwise(
            NIBBLES[INDEX] if BITS == 4 else BYTES[INDEX], "=r,r", [words],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def tanh(x):
    """By the exponential function, which does not overflow here."""
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    # GELU by tanh (arXiv:1606.08415): sqrt(2 / pi) is 0.7978845608.
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def rms_norm(x, weight, size, eps):
    """float32 x / rms(x) * weight of one row, which is zero beyond `size`.

    The squares are summed in float64: rounded, their sum is the same in whatever order a program
    adds them, so that rows normed in different kernels are equal.
    """
    x64 = x.to(tl.float64)
    mean = tl.sum(x64 * x64, 0).to(tl.float32) / size
    return x * (1 / tl.sqrt_rn(mean + eps)) * weight


@triton.jit
def norm_row(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, b, k, K, eps, offset,
    ADD: tl.constexpr,
):  # fmt: skip
    """Row b of the residual and of its norm, both as they are rounded: [len(k)]."""
    mask = k < K
    weight = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if ADD and post_ptr is not None:
        post = tl.load(post_ptr + k, mask=mask, other=0.0).to(tl.float32)
    start = b * K + wait(0)
    x = tl.load(x_ptr + start + k, mask=mask, other=0.0)
    if ADD:
        branch = tl.load(branch_ptr + start + k, mask=mask, other=0.0).to(tl.float32)
        if post_ptr is not None:
            branch = rms_norm(branch, offset + post, K, eps)
        total = x.to(tl.float32) + branch
        if scalar_ptr is not None:
            total = total * tl.load(scalar_ptr).to(tl.float32)
        x = total.to(x.dtype)
    return x, rms_norm(x.to(tl.float32), offset + weight, K, eps).to(x.dtype)


@triton.jit
def norm_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, total_ptr, h_ptr, K,
    eps: tl.constexpr, offset: tl.constexpr,
    ADD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Norm a row, after adding a branch to it if ADD."""
    b = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    total, h = norm_row(
        x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, b, k, K, eps, offset, ADD
    )
    if ADD:
        tl.store(total_ptr + b * K + k, total, mask=k < K)
    tl.store(h_ptr + b * K + k, h, mask=k < K)


@triton.jit
def finish(y, up, bias_ptr, n, N, soft_cap, ACTIVATION: tl.constexpr, SOFT_CAP: tl.constexpr):
    """All that is done to float32 outputs n, [len(n), ...]; n broadcasts with them."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = activate(y, ACTIVATION) * up
    if SOFT_CAP:
        y = soft_cap * tanh(y / soft_cap)
    return y


@triton.jit
def load_weights(w_ptr, n, k, N, K):
    """Weights [n, k]."""
    # Rows beyond the last are the last: a load without mask, whose results are not stored.
    offsets = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(w_ptr + offsets, mask=(k < K)[None, :], other=0.0)


# One program for any number of rows: none is a special case with other arithmetic.
@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, w_ptr, bias_ptr, total_ptr, y_ptr,
    rows, N, K, eps: tl.constexpr, offset: tl.constexpr, soft_cap: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr, SOFT_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a row. A norm before them takes K <= BLOCK_K. AHEAD is whether the weights
    are asked for before the activations."""
    # Programs of the same weights run side by side, so that all but one find them in L2.
    b = tl.program_id(0) % rows
    tile = tl.program_id(0) // rows
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    second_ptr = w_ptr + tl.cast(N, tl.int64) * K
    if NORM:
        k = tl.arange(0, BLOCK_K)
        # The weights do not wait for the norm.
        w = load_weights(w_ptr, n, k, N, K)
        if ACTIVATION is not None:
            second = load_weights(second_ptr, n, k, N, K)
        total, h = norm_row(
            x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, b, k, K, eps, offset, ADD
        )
        if ADD and tile == 0:
            tl.store(total_ptr + b * K + k, total, mask=k < K)
        gate += w.to(tl.float32) * h.to(tl.float32)[None, :]
        if ACTIVATION is not None:
            up += second.to(tl.float32) * h.to(tl.float32)[None, :]
    else:
        # Nor do they here: they lie one row after the other.
        asked = 0
        if AHEAD:
            bytes_of: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
            skipped = (tile * BLOCK_N).to(tl.int64) * K
            size = tl.minimum(N - tile * BLOCK_N, BLOCK_N) * K * bytes_of
            asked = prefetch_rows(w_ptr + skipped, 0, 1, size)
            if ACTIVATION is not None:
                asked += prefetch_rows(second_ptr + skipped, 0, 1, size)
        x_ptr += wait(asked)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            h = tl.load(x_ptr + b * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            gate += load_weights(w_ptr, n, k, N, K).to(tl.float32) * h
            if ACTIVATION is not None:
                up += load_weights(second_ptr, n, k, N, K).to(tl.float32) * h
    y = finish(tl.sum(gate, 1), tl.sum(up, 1), bias_ptr, n, N, soft_cap, ACTIVATION, SOFT_CAP)
    y_offsets = b.to(tl.int64) * N + n
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def load_rows(x_ptr, b, k, rows, K):
    """Activations [k, b], zero beyond either."""
    mask = (k < K)[:, None] & (b < rows)[None, :]
    return tl.load(x_ptr + b[None, :] * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def load_scales(scale_ptr, n, span, K, count, GROUP: tl.constexpr):
    """Scales [n] of each group of a span of 4 bits, of a weight of `count` rows."""
    scales = ()
    for i in tl.static_range(WORDS * (BITS_OF_WORD // 4) // GROUP):
        # What is padded has no scale of its own, and needs none.
        group = tl.minimum(span * (WORDS * (BITS_OF_WORD // 4) // GROUP) + i, K // GROUP - 1)
        scales = scales + (tl.load(scale_ptr + group * count + n),)
    return scales


@triton.jit
def span_products(
    gate, up, w_ptr, gates, ups, x_ptr, first, second, b, span, rows, K, width,
    BITS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """gate and, where GATED, up [n, b] plus one span of their weights [n, k] times activations
    [k, b].

    Scales of 8 bits are left to the end; of 4 bits each of `gates` and `ups` is of as many fields.
    The offset of their weights is taken off as what it amounts to with these activations: one more
    product of matrices instead of a subtraction for every pair of weights.
    """
    FIELDS: tl.constexpr = BITS_OF_WORD // BITS
    SHARED: tl.constexpr = FIELDS if BITS == 8 else FIELDS // len(gates)
    columns = span * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(w_ptr + first[:, None] * width + columns)
    if GATED:
        others = tl.load(w_ptr + second[:, None] * width + columns)
    for group in tl.static_range(FIELDS // SHARED):
        these = tl.zeros(gate.shape, tl.float32)
        those = tl.zeros(gate.shape, tl.float32)
        excess = tl.zeros(gate.shape, tl.float32)
        for i in tl.static_range(group * SHARED, (group + 1) * SHARED):
            k = (span * FIELDS + i) * WORDS + tl.arange(0, WORDS)
            x = load_rows(x_ptr, b, k, rows, K)
            these = dot(field(words, i, BITS), x, these)
            if GATED:
                those = dot(field(others, i, BITS), x, those)
            if BITS == 4:
                offsets = tl.full(words.shape, OFFSET, tl.float32).to(tl.bfloat16)
                excess = dot(offsets, x, excess)
        if BITS == 8:
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
def arrive(counter_ptr, count):
    """Whether this is the last of `count` programs to come here; it leaves the counter at 0."""
    tl.debug_barrier()  # the stores of all threads come before it
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def combined(partial_ptr, offsets, mask, stride, SPLITS: tl.constexpr):
    """The sum of SPLITS partial results, in order."""
    # Written by other programs: not to be read from this processor's own cache.
    total = tl.load(partial_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(
            partial_ptr + split * stride + offsets, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return total


@triton.jit(do_not_specialize=["rows", "steps"])
def dot_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, partial_ptr, counter_ptr, y_ptr,
    rows, N, K, width, steps, soft_cap: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SOFT_CAP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_B rows, over one of SPLITS parts of the inputs.

    A part is `steps` blocks of BLOCK_K inputs, or spans of integer weights of `width` words a row.
    The last program to come adds the parts up. The first AHEAD programs ask for weights before the
    activations.
    """
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b = group * BLOCK_B + tl.arange(0, BLOCK_B)
    # Rows beyond the last are the last: loads without masks, whose results are not stored.
    first = tl.minimum(n, N - 1).to(tl.int64)
    second = first + N
    gate = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    step: tl.constexpr = BLOCK_K if BITS == 0 else WORDS * (BITS_OF_WORD // BITS)
    begin = split * steps
    end = tl.minimum(begin + steps, tl.cdiv(K, step))
    # What the pipeline begins with does not wait for the activations.
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
    if BITS == 4:
        gates = load_scales(scale_ptr, first, begin, K, count, GROUP)
        if ACTIVATION is not None:
            ups = load_scales(scale_ptr, second, begin, K, count, GROUP)
    x_ptr += wait_alone(asked)
    if BITS == 0:
        for i in tl.range(begin, end, num_stages=STAGES):
            gate = block_products(gate, w_ptr, x_ptr, first, b, i * step, rows, K, step, EVEN)
            if ACTIVATION is not None:
                up = block_products(up, w_ptr, x_ptr, second, b, i * step, rows, K, step, EVEN)
    else:
        # Scales are asked for a span ahead: the pipeline has only what is multiplied as matrices.
        for i in tl.range(begin, end, num_stages=STAGES):
            these, those = gates, ups
            if BITS == 4:
                gates = load_scales(scale_ptr, first, i + 1, K, count, GROUP)
                if ACTIVATION is not None:
                    ups = load_scales(scale_ptr, second, i + 1, K, count, GROUP)
            gate, up = span_products(
                gate, up, w_ptr, these, those, x_ptr, first, second, b, i, rows, K, width,
                BITS, ACTIVATION is not None,
            )  # fmt: skip
    if BITS == 8:
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
        if not arrive(counter_ptr + group * tl.num_programs(0) + tile, SPLITS):
            return
        gate = combined(partial_ptr, y_offsets, mask, stride, SPLITS)
        if ACTIVATION is not None:
            up = combined(partial_ptr + size, y_offsets, mask, stride, SPLITS)
    y = finish(gate, up, bias_ptr, n[:, None], N, soft_cap, ACTIVATION, SOFT_CAP)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
