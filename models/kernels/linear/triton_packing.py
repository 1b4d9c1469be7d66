"""How kernels take integers out of the words of packing.py."""

import triton
import triton.language as tl

from tokenloop.models.kernels.linear.packing import SPAN_WORDS, WORD_BITS

WORDS = tl.constexpr(SPAN_WORDS)
BITS_OF_WORD = tl.constexpr(WORD_BITS)

# `field` gives a weight of 4 bits plus this: 8 that it is stored with, and 128.
OFFSET = tl.constexpr(136.0)

# The interpreter holds bfloat16 as integers, and computes with them as such.
if triton.knobs.runtime.interpret:

    @triton.jit
    def field(words, INDEX: tl.constexpr, BITS: tl.constexpr):
        values = (words.to(tl.int32) >> (BITS * INDEX)) & (2**BITS - 1)
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
    # On one line: torch's compiler copies them into a string with their escapes processed.
    _NIBBLES, _BYTES = " ".join(_NIBBLES.split()), " ".join(_BYTES.split())
    NIBBLES = tl.constexpr(tuple(_NIBBLES.format(shift=4 * i) for i in range(4)))
    BYTES = tl.constexpr(tuple(_BYTES.format(shift=8 * i) for i in range(2)))

    @triton.jit
    def field(words, INDEX: tl.constexpr, BITS: tl.constexpr):
        """Field INDEX of int16 words as exact bfloat16, plus OFFSET where it has 4 bits; two words
        at once."""
        return tl.inline_asm_elementwise(
            NIBBLES[INDEX] if BITS == 4 else BYTES[INDEX], "=r,r", [words],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
