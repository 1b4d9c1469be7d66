"""How kernels multiply experts' matrices whose groups of inputs have scales: float4 and float8 of
packing.py.

A float4 times its power of 2 is exact in bfloat16, and so is a float8. The scales of float8
multiply the float32 sums of their groups.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.experts import packing

GROUP4 = tl.constexpr(packing.GROUP)
WORDS = tl.constexpr(packing.WORDS)
FIELDS = tl.constexpr(packing.FIELDS)

# Exponents of e2m1 in the place of bfloat16's or float32's are so many times too small.
TO_FLOAT4 = tl.constexpr(2.0**126)

# The interpreter holds bfloat16 as integers, and computes with them as such.
if triton.knobs.runtime.interpret:

    @triton.jit
    def float4(words, INDEX: tl.constexpr):
        values = words.to(tl.int32) >> (4 * INDEX)
        values = ((values & 8) << 28) | ((values & 7) << 22)
        return (values.to(tl.float32, bitcast=True) * TO_FLOAT4).to(tl.bfloat16)

    @triton.jit
    def scaled_float4(words, exponents, INDEX: tl.constexpr):
        return (float4(words, INDEX).to(tl.float32) * power(exponents)).to(tl.bfloat16)

else:
    # Sign, exponent and mantissa come to their places, and 0x7E80 is 2^126. 0.5 is subnormal before
    # the product, which is exact.
    _FLOAT4 = """{{
        .reg .b32 s, t;
        shl.b32 s, $1, {sign};
        {rest}
        and.b32 t, t, 0x01C001C0;
        lop3.b32 t, s, 0x80008000, t, 0xEA;
        mov.b32 s, 0x7E807E80;
        mul.rn.bf16x2 $0, t, s;{then}
    }}"""
    _SCALE = " mul.rn.bf16x2 $0, $0, $2;"
    _SHIFTS = "shl.b32 t, $1, 6;", "shl.b32 t, $1, 2;", "shr.b32 t, $1, 2;", "shr.b32 t, $1, 6;"

    def _floats(then: str) -> tl.constexpr:
        """The instructions of each field."""
        codes = (_FLOAT4.format(sign=12 - 4 * i, rest=_SHIFTS[i], then=then) for i in range(4))
        return tl.constexpr(tuple(" ".join(code.split()) for code in codes))

    FLOAT4S, SCALED_FLOAT4S = _floats(""), _floats(_SCALE)

    @triton.jit
    def float4(words, INDEX: tl.constexpr):
        """Field INDEX of int16 words as exact bfloat16; two words at once."""
        return tl.inline_asm_elementwise(
            FLOAT4S[INDEX], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )

    @triton.jit
    def scaled_float4(words, exponents, INDEX: tl.constexpr):
        """Field INDEX of int16 words times 2^(exponent - 127) of uint8 exponents, exact bfloat16.
        The exponents broadcast to the words."""
        exponents = exponents.to(tl.int32)
        # 2^-127 is subnormal.
        bits = tl.where(exponents == 0, 1 << 6, exponents << 7).to(tl.int16)
        powers = tl.broadcast_to(bits.to(tl.bfloat16, bitcast=True), words.shape)
        return tl.inline_asm_elementwise(
            SCALED_FLOAT4S[INDEX], "=r,r,r", [words, powers], dtype=tl.bfloat16, is_pure=True,
            pack=2,
        )  # fmt: skip


@triton.jit
def power(exponents):
    """float32 2^(exponent - 127) of uint8 exponents. 2^-127 is subnormal."""
    exponents = exponents.to(tl.int32)
    bits = tl.where(exponents == 0, 1 << 22, exponents << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def group_sums(
    x_ptr, w_ptr, scale_ptr, rows, end, K, GROUP: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """float32 [n, BLOCK_G] whose columns' sum is that over k of weights [n, k] times x [k]. `rows`
    [n] counts all experts' rows. Those from `end` on are read as the last before it: loads need no
    mask for them, and their results are not stored."""
    groups = K // GROUP
    rows = tl.minimum(rows, end - 1)[:, None] * groups
    IS_FLOAT4: tl.constexpr = w_ptr.dtype.element_ty == tl.int16
    SIZE: tl.constexpr = WORDS if IS_FLOAT4 else GROUP
    sums = tl.zeros([rows.shape[0], BLOCK_G], tl.float32)
    i = tl.arange(0, SIZE)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        exists = g < groups
        group = rows + g[None, :]
        offsets = group[:, :, None] * SIZE + i[None, None, :]
        if IS_FLOAT4:
            w = tl.load(w_ptr + offsets, mask=exists[None, :, None], other=0)
            exponents = tl.load(scale_ptr + group, mask=exists[None, :], other=0)
            part = tl.zeros([rows.shape[0], BLOCK_G, SIZE], tl.float32)
            for j in tl.static_range(FIELDS):
                inputs = g[:, None] * GROUP + j * WORDS + i[None, :]
                x = tl.load(x_ptr + inputs, mask=exists[:, None], other=0.0).to(tl.float32)
                part += float4(w, j).to(tl.float32) * x[None, :, :]
            # Powers of 2 multiply a sum as they would its terms.
            sums += tl.sum(part, 2) * power(exponents)
        else:
            w = tl.load(w_ptr + offsets, mask=exists[None, :, None], other=0.0)
            scales = tl.load(scale_ptr + group, mask=exists[None, :], other=0.0)
            inputs = g[:, None] * GROUP + i[None, :]
            x = tl.load(x_ptr + inputs, mask=exists[:, None], other=0.0).to(tl.float32)
            sums += tl.sum(w.to(tl.float32) * x[None, :, :], 2) * scales
    return sums


@triton.jit
def load_float4(w_ptr, scale_ptr, rows, start, K, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """bfloat16 weights [n, BLOCK_K] of the inputs from `start` on, in their order; zero beyond K.
    `rows` [n] counts all experts' rows."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP4
    tl.static_assert(FIELDS == 4)
    g, i = tl.arange(0, GROUPS), tl.arange(0, WORDS)
    group = rows[:, None] * (K // GROUP4) + start // GROUP4 + g[None, :]
    offsets = group[:, :, None] * WORDS + i[None, None, :]
    if EVEN:
        words, exponents = tl.load(w_ptr + offsets), tl.load(scale_ptr + group)
    else:
        exists = start + g * GROUP4 < K
        words = tl.load(w_ptr + offsets, mask=exists[None, :, None], other=0)
        exponents = tl.load(scale_ptr + group, mask=exists[None, :], other=0)
    exponents = exponents[:, :, None]
    first = tl.join(scaled_float4(words, exponents, 0), scaled_float4(words, exponents, 1))
    last = tl.join(scaled_float4(words, exponents, 2), scaled_float4(words, exponents, 3))
    # [n, group, word, field % 2, field // 2] to [n, group, field, word].
    fields = tl.permute(tl.join(first, last), [0, 1, 4, 3, 2])
    return tl.reshape(fields, [rows.shape[0], BLOCK_K])
