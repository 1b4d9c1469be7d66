"""Gumbel noise of token ids, with the bits of sampler/philox.py, and quick bounds of it."""

import triton
import triton.language as tl

from tokenloop.sampler import philox
from tokenloop.sampler.kernels.triton_exact import log

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(x) for x in philox.MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(x) for x in philox.WEYL)

if triton.knobs.runtime.interpret:

    @triton.jit
    def quick_log2(x):
        return tl.log2(x)

    @triton.jit
    def square_less_1(x):
        # Its fma rounds twice.
        return (x - 1.0) * (x + 1.0)

else:

    @triton.jit
    def quick_log2(x):
        # One instruction where tl.log2 is 25.
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def square_less_1(x):
        return tl.fma(x, x, -1.0)


@triton.jit
def _product(x, multiplier: tl.constexpr):
    """(high, low) words of a product of uint32: one instruction, where tl.umulhi makes two."""
    product = x.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox_words(counters, seed, position):
    """uint32 [..., 4 N] of noise for the ids 4 c to 4 c + 3 of the counters c, int32 [..., N].

    Philox4x32-7 (Salmon et al., SC11): one counter serves four ids.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = counters.to(tl.uint32)
    c1, c2 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    c3 = tl.full([], 0, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIER_0)
        high2, low2 = _product(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + WEYL_0, key1 + WEYL_1
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def uniform(words):
    """float32 in (0, 1), of 23 bits of a word."""
    return ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def gumbel(counters, seed, position):
    """float32 [..., 4 N] noise of the ids that `philox_words` tells."""
    return -log(-log(uniform(philox_words(counters, seed, position))))


@triton.jit
def log2_double_rate(words):
    """float32 1 + log2(-ln(u)) of the words' u, or less: by 0.05 at most where it is below -0.5,
    0.27 below 1, 3.5 anywhere; the rounding of the hardware's logarithm comes on top. Noise is
    -ln(-ln(u)).

    With u = 1 - r, -ln(u) is r + r^2 / 2 + ..., so no less than its first two terms at the least
    that r can be. Twice these terms is (1 + r)^2 - 1. The bits of 1 + r are those of 1 + u turned
    over.
    """
    t = (((words ^ 0xFFFFFFFF) >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return quick_log2(square_less_1(t))
