"""Packed int64 values, by which programs of the sampler talk to one another.

The high half is the order-preserving key of a float32, the low half is made of the token id. So the
largest value and its tie-break are one integer maximum, exact in any order of reduction.
"""

import triton
import triton.language as tl

# What is packed where there is no token: -inf, and the id that loses every tie.
NOTHING = tl.constexpr(-2139095041 << 32)
ID_MASK = tl.constexpr(0x7FFFFFFF)
# The key of -inf.
LOWEST_KEY = tl.constexpr(-2139095041)


@triton.jit
def key(x):
    """float32 -> int32 of the same order. -0.0 equals 0.0; not for NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def of_key(bits):
    """The float32 of a key."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def value(packed):
    """The float32 of a packed int64."""
    return of_key((packed >> 32).to(tl.int32))


@triton.jit
def pack(x, low):
    """int64 of a float32 and of what makes the low half."""
    return (key(x).to(tl.int64) << 32) | low
