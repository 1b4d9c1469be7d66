"""The Triton kernels that make bfloat16 of packed weights: in device memory, and within a linear
layer of few tokens.

Both round a value times its scale once to float32 and then to bfloat16, so their products have the
same bits. Where products get the scale (packing.leaves_scale), weights are only converted.
packing.py says how words lie. Names: token t of T, output n of N, input k of K.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import (
    release,
    wait,
    wait_alone,
    waits,
)
from tokenloop.models.kernels.launch.dot import dot
from tokenloop.models.kernels.linear.triton_packing import BITS_OF_WORD, OFFSET, WORDS, field
from tokenloop.models.kernels.linear_chunk.triton_tiles import ask_for_rows, finished

if triton.knobs.runtime.interpret:

    @triton.jit
    def scaled(values, scale, BITS: tl.constexpr):
        values = values.to(tl.float32)
        values = values - OFFSET if BITS == 4 else values
        bits = (values * scale.to(tl.float32)).to(tl.uint32, bitcast=True)
        # The interpreter cuts bits off where a GPU rounds.
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)

else:
    # A product of two bfloat16 is exact in float32, so it is rounded once either way. 0x4308 is
    # OFFSET.
    SCALE_NIBBLES = tl.constexpr(
        "{ .reg .b32 t, u; mov.b32 u, 0x43084308; sub.rn.bf16x2 t, $1, u; "
        "mul.rn.bf16x2 $0, t, $2; }"
    )

    @triton.jit
    def scaled(values, scale, BITS: tl.constexpr):
        """bfloat16 weights [n, k] of what `field` gave and scales [n, k] or [n, 1]: float32 for 8
        bits, and for 4 bits bfloat16, or what a checkpoint has."""
        if BITS == 8:
            return (values.to(tl.float32) * scale.to(tl.float32)).to(tl.bfloat16)
        if scale.dtype != tl.bfloat16:
            # The difference has 5 bits, and the product with float16 is exact in float32.
            centred = values.to(tl.float32) - OFFSET
            return (centred * scale.to(tl.float32)).to(tl.bfloat16)
        scales = tl.broadcast_to(scale, values.shape)
        return tl.inline_asm_elementwise(
            SCALE_NIBBLES, "=r,r,r", [values, scales], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def load_scale(scale_ptr, n, k, K, rows, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Scales [n, 1], or [n, k] where a field has several, of the WORDS inputs from k on; the weight
    has so many rows."""
    # Padding has no scale of its own, and needs none.
    if GROUP == 0:
        scale = tl.load(scale_ptr + n)[:, None]
    elif GROUP < WORDS:
        group = tl.minimum((k + tl.arange(0, WORDS)) // GROUP, K // GROUP - 1)
        scale = tl.load(scale_ptr + group.to(tl.int64)[None, :] * rows + n[:, None])
    else:
        group = tl.minimum(k // GROUP, K // GROUP - 1)
        scale = tl.load(scale_ptr + group.to(tl.int64) * rows + n)[:, None]
    return scale


@waits  # once it has the words: kernels ahead may read what was where it writes
@triton.jit
def dequantize_kernel(
    w_ptr, scale_ptr, out_ptr, N, K, width, GROUP: tl.constexpr, BITS: tl.constexpr,
    FLOAT8: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One span of BLOCK_N rows of `width` words; without scales the values themselves."""
    FIELDS: tl.constexpr = BITS_OF_WORD // BITS
    span = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    i = tl.arange(0, WORDS)
    words = tl.load(w_ptr + row[:, None] * width + i[None, :] + span * WORDS)
    out_ptr += wait(0)
    for j in tl.static_range(FIELDS):
        start = (span * FIELDS + j) * WORDS
        if scale_ptr is None:
            values = field(words, j, BITS, FLOAT8)
        else:
            scale = load_scale(scale_ptr, row, start, K, N, GROUP, BITS)
            values = scaled(field(words, j, BITS, FLOAT8), scale, BITS)
        k = i + start
        mask = (n < N)[:, None] & (k < K)[None, :]
        tl.store(out_ptr + row[:, None] * K + k[None, :], values, mask=mask)


# As pointers_kernel does, and why.
@waits
@triton.jit
def words_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, count_ptr, y_ptr, T, N, K, width,
    GROUP: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, LAST: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, AHEAD: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_T tokens; programs of one tile of outputs run side by side.

    Weights are the left operand, which the tensor cores take from registers. EVEN: K is a whole
    number of spans. The FIRST programs ask for AHEAD words of their weights before the activations
    are there. LAST: products get the scales.
    """
    FIELDS: tl.constexpr = BITS_OF_WORD // BITS
    count = tl.minimum(tl.load(count_ptr), T)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    asked = 0
    if AHEAD > 0:
        number = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        ahead = tl.where((number < FIRST) & (tl.program_id(0) == 0), AHEAD, 0)
        start = tl.program_id(1) * BLOCK_N
        asked = ask_for_rows(w_ptr, start, N, width, ahead, ACTIVATION is not None, BLOCK_N)
    zero = wait_alone(asked)
    if tl.program_id(0) * BLOCK_T + zero >= count:
        return
    x_ptr += zero
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last are the last: loads need no masks, and the results are not stored.
    token = tl.minimum(t, count - 1).to(tl.int64)
    first = tl.minimum(n, N - 1).to(tl.int64)
    second = first + N
    rows = N if ACTIVATION is None else 2 * N
    y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    i = tl.arange(0, WORDS)
    spans = tl.cdiv(K, WORDS * FIELDS)
    for span in tl.range(0, spans, num_stages=STAGES):
        columns = i[None, :] + span * WORDS
        words = tl.load(w_ptr + first[:, None] * width + columns)
        if ACTIVATION is not None:
            others = tl.load(w_ptr + second[:, None] * width + columns)
        for j in tl.static_range(FIELDS):
            start = (span * FIELDS + j) * WORDS
            k = i + start
            offsets = token[None, :] * K + k[:, None]
            if EVEN:
                x = tl.load(x_ptr + offsets)
            else:
                x = tl.load(x_ptr + offsets, mask=(k < K)[:, None], other=0.0)
            if LAST:
                y = dot(field(words, j, BITS, FLOAT8), x, y)
            else:
                scale = load_scale(scale_ptr, first, start, K, rows, GROUP, BITS)
                y = dot(scaled(field(words, j, BITS, FLOAT8), scale, BITS), x, y)
            if ACTIVATION is not None:
                if LAST:
                    up = dot(field(others, j, BITS, FLOAT8), x, up)
                else:
                    scale = load_scale(scale_ptr, second, start, K, rows, GROUP, BITS)
                    up = dot(scaled(field(others, j, BITS, FLOAT8), scale, BITS), x, up)
    y_ptr += release(0)
    y = finished(y, up, scale_ptr if LAST else None, bias_ptr, n[:, None], N, ACTIVATION)
    mask = (n < N)[:, None] & (t < count)[None, :]
    offsets = token[None, :] * N + n[:, None]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
