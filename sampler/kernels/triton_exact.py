"""Scaled logits, masses and logarithms with the bits of sampler/sample.py and sampler/philox.py.

Masses are integers, so their sums are exact: no result depends on how a row is cut or on which
program comes first.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from tokenloop.sampler import philox
from tokenloop.sampler import sample as reference

# A product that no compiler fuses with a sum: engines must agree in every bit. The interpreter has
# no libdevice and fuses nothing.
if triton.knobs.runtime.interpret:

    @triton.jit
    def mul(x, y):
        return x * y

else:
    mul = libdevice.mul_rn

LN2_HIGH, LN2_LOW = tl.constexpr(philox.LN2_HIGH), tl.constexpr(philox.LN2_LOW)
LOG_COEFFICIENTS = tl.constexpr(philox.LOG_COEFFICIENTS)
EXP_COEFFICIENTS = tl.constexpr(reference.EXP_COEFFICIENTS)
LOWEST = tl.constexpr(reference.LOWEST)
LEAST_TEMPERATURE = tl.constexpr(reference.LEAST_TEMPERATURE)
WEIGHT_BITS = tl.constexpr(reference.WEIGHT_BITS)


@triton.jit
def scaled(x, largest, temperature):
    """(x - largest) / temperature, of at least LEAST_TEMPERATURE."""
    divisor = tl.maximum(temperature, LEAST_TEMPERATURE)
    # x - largest is NaN where both are the same infinity.
    return tl.where(x == largest, 0.0, tl.div_rn(x - largest, divisor))


@triton.jit
def mass(x, largest, temperature):
    """floor(exp(scaled) * 2^38) as int64, the steps of sampler.sample.exp2_38."""
    s = tl.maximum(scaled(x, largest, temperature), LOWEST)
    exponent = tl.floor(mul(s, 1.4426950408889634) + 0.5)
    r = s - mul(exponent, LN2_HIGH) - mul(exponent, LN2_LOW)
    y = mul(r, EXP_COEFFICIENTS[0]) + EXP_COEFFICIENTS[1]
    for i in tl.static_range(2, 6):
        y = mul(y, r) + EXP_COEFFICIENTS[i]
    y = mul(y, mul(r, r)) + r + 1.0
    power = (exponent.to(tl.int32) + WEIGHT_BITS + 127) << 23
    return mul(y, power.to(tl.float32, bitcast=True)).to(tl.int64)


@triton.jit
def log(x):
    """The natural logarithm of normal float32 x > 0, the steps of sampler.philox.log."""
    near = mul(x, 1.0606601717798212)
    split = mul(near, 8388609.0)
    bits = (split - (split - near)).to(tl.int32, bitcast=True)  # a power of two
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = mul(x, (0x7F000000 - bits).to(tl.float32, bitcast=True)) - 1.0
    y = mul(f, LOG_COEFFICIENTS[0]) + LOG_COEFFICIENTS[1]
    for i in tl.static_range(2, 9):
        y = mul(y, f) + LOG_COEFFICIENTS[i]
    square = mul(f, f)
    y = mul(mul(y, f), square) + mul(exponent, LN2_LOW) - mul(square, 0.5)
    return f + y + mul(exponent, LN2_HIGH)
