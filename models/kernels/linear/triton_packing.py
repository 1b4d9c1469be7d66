"""How kernels take weights out of the words of packing.py."""

import triton
import triton.language as tl

from tokenloop.models.kernels.linear.packing import SPAN_WORDS, WORD_BITS

WORDS = tl.constexpr(SPAN_WORDS)
BITS_OF_WORD = tl.constexpr(WORD_BITS)

# `field` gives a weight of 4 bits plus this: 8 that it is stored with, and 128.
OFFSET = tl.constexpr(136.0)

# Exponents of e4m3 in the place of bfloat16's or float32's are so many times too small.
TO_FLOAT8 = tl.constexpr(2.0**120)

# The interpreter holds bfloat16 as integers, and computes with them as such.
if triton.knobs.runtime.interpret:

    @triton.jit
    def field(words, INDEX: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr):
        values = (words.to(tl.int32) >> (BITS * INDEX)) & (2**BITS - 1)
        if FLOAT8:
            values = ((values & 0x80) << 24) | ((values & 0x7F) << 20)
            return (values.to(tl.float32, bitcast=True) * TO_FLOAT8).to(tl.bfloat16)
        values = values + 128 if BITS == 4 else values - ((values & 128) << 1)
        return values.to(tl.float32).to(tl.bfloat16)

else:
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
    # Of float8: sign, exponent and mantissa come to their places, and 0x7B80 is 2^120. Subnormal
    # ones are so in bfloat16, and the product is exact.
    _FLOAT8 = """{{
        .reg .b32 s, t;
        {shift_sign}
        {shift_rest}
        and.b32 t, t, 0x07F007F0;
        lop3.b32 t, s, 0x80008000, t, 0xEA;
        mov.b32 s, 0x7B807B80;
        mul.rn.bf16x2 $0, t, s;
    }}"""
    # On one line: torch's compiler copies them into a string with their escapes processed.
    _NIBBLES, _BYTES, _FLOAT8 = (" ".join(x.split()) for x in (_NIBBLES, _BYTES, _FLOAT8))
    NIBBLES = tl.constexpr(tuple(_NIBBLES.format(shift=4 * i) for i in range(4)))
    BYTES = tl.constexpr(tuple(_BYTES.format(shift=8 * i) for i in range(2)))
    FLOAT8S = tl.constexpr(
        (
            _FLOAT8.format(shift_sign="shl.b32 s, $1, 8;", shift_rest="shl.b32 t, $1, 4;"),
            _FLOAT8.format(shift_sign="mov.b32 s, $1;", shift_rest="shr.b32 t, $1, 4;"),
        )
    )

    @triton.jit
    def field(words, INDEX: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr):
        """Field INDEX of int16 words as exact bfloat16, plus OFFSET where it has 4 bits; two words
        at once."""
        return tl.inline_asm_elementwise(
            FLOAT8S[INDEX] if FLOAT8 else NIBBLES[INDEX] if BITS == 4 else BYTES[INDEX],
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
