"""The sampler's Triton kernels; cuda.py launches them.

A row is cut into tiles, and programs talk through packed int64 values: the high half is the
order-preserving key of a float32, the low half is made of the token id. So the largest value and
its tie-break are one integer maximum, exact in any order of reduction. Masses are integers for the
same reason: no result depends on how a row was cut or on which program came first.

`maxima` is int64 [B, splits]: of each tile the largest logit and its lowest id.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from sampler import philox
from sampler import sample as reference

# A product that no compiler fuses with a sum: engines must agree in every bit. The interpreter has
# no libdevice and fuses nothing.
if triton.knobs.runtime.interpret:

    @triton.jit
    def mul(x, y):
        return x * y

else:
    mul = libdevice.mul_rn

# What is packed where there is no token: -inf, and the id that loses every tie.
NOTHING = tl.constexpr(-2139095041 << 32)
ID_MASK = tl.constexpr(0x7FFFFFFF)
# Gumbel noise of 23 bits lies in [-2.82, 16.64]: what is scaled below this cannot win a row.
HOPELESS = tl.constexpr(-20.0)
ROUNDS = tl.constexpr(philox.ROUNDS)
LN2_HIGH, LN2_LOW = tl.constexpr(philox.LN2_HIGH), tl.constexpr(philox.LN2_LOW)
LOG_COEFFICIENTS = tl.constexpr(philox.LOG_COEFFICIENTS)
EXP_COEFFICIENTS = tl.constexpr(reference.EXP_COEFFICIENTS)
LOWEST = tl.constexpr(reference.LOWEST)
WEIGHT_BITS = tl.constexpr(reference.WEIGHT_BITS)


@triton.jit
def key(x):
    """float32 -> int32 of the same order. -0.0 equals 0.0; not for NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value(packed):
    """The float32 of a packed int64."""
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x, low):
    return (key(x).to(tl.int64) << 32) | low


@triton.jit
def numbers(x):
    """Logits as float32, with NaN as -inf."""
    x = x.to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def load_logits(row_ptr, ids, vocab_size, column_stride):
    """float32 logits of the ids; what lies beyond the row is -inf."""
    mask = ids < vocab_size
    return numbers(tl.load(row_ptr + ids * column_stride, mask=mask, other=float("-inf")))


@triton.jit
def load_maxima(maxima_ptr, row, splits, SPLITS: tl.constexpr):
    offsets = tl.arange(0, SPLITS)
    return tl.load(maxima_ptr + row * splits + offsets, mask=offsets < splits, other=NOTHING)


@triton.jit
def scaled(x, largest, temperature):
    # x - largest is NaN where both are the same infinity.
    return tl.where(x == largest, 0.0, tl.div_rn(x - largest, temperature))


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
    wide = mul(near, 8388609.0)
    bits = (wide - (wide - near)).to(tl.int32, bitcast=True)  # a power of two
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = mul(x, (0x7F000000 - bits).to(tl.float32, bitcast=True)) - 1.0
    y = mul(f, LOG_COEFFICIENTS[0]) + LOG_COEFFICIENTS[1]
    for i in tl.static_range(2, 9):
        y = mul(y, f) + LOG_COEFFICIENTS[i]
    square = mul(f, f)
    y = mul(mul(y, f), square) + mul(exponent, LN2_LOW) - mul(square, 0.5)
    return f + y + mul(exponent, LN2_HIGH)


@triton.jit
def _gumbel(first_id, seed, position, TILE: tl.constexpr):
    """float32 [TILE] noise of the ids from `first_id`, a multiple of 4, on.

    Philox4x32-7 (Salmon et al., SC11): one counter serves four ids.
    """
    groups = (first_id // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    position_low = (groups * 0) + (position & 0xFFFFFFFF).to(tl.uint32)
    position_high = (groups * 0) + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, groups, position_low, position_high, groups * 0, ROUNDS)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -log(-log(uniform))


@triton.jit
def tile_maxima_kernel(
    logits_ptr, rows_ptr, maxima_ptr, bins_ptr,
    vocab_size, row_stride, column_stride,
    HAS_ROWS: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The maximum of a tile of a row; row n is rows[n] of the logits where HAS_ROWS. The tiles'
    programs share the zeroing of the row's bins, int64 [B, 2, BINS], ZEROS each."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    source_row = row
    if HAS_ROWS:
        source_row = tl.load(rows_ptr + row).to(tl.int64)
    ids = split * TILE + tl.arange(0, TILE)
    x = load_logits(logits_ptr + source_row * row_stride, ids, vocab_size, column_stride)
    best = tl.max(pack(x, ID_MASK - ids))
    tl.store(maxima_ptr + row * tl.cdiv(vocab_size, TILE) + split, best)
    if BINS:
        # triton_cutoff's bins_kernel, the next launch, adds to them.
        zeros = split * ZEROS + tl.arange(0, ZEROS)
        tl.store(bins_ptr + row * 2 * BINS + zeros, tl.zeros([ZEROS], tl.int64), zeros < 2 * BINS)


@triton.jit
def perturbed_kernel(
    logits_ptr, maxima_ptr, cutoff_ptr, temperature_ptr, seed_ptr, position_ptr, scores_ptr,
    vocab_size, row_stride, column_stride,
    RESTRICTED: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """scores int64 [B, splits]: of each tile the largest scaled logit + noise and its lowest id.

    Tiles that cannot hold the row's token are not read. Rows of temperature 0 have no scores.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0:
        return
    splits = tl.cdiv(vocab_size, TILE)
    largest = value(tl.max(load_maxima(maxima_ptr, row, splits, SPLITS)))
    own = tl.load(maxima_ptr + row * splits + split)
    best = tl.full([], NOTHING, tl.int64)
    cutoff = best
    if RESTRICTED:
        cutoff = tl.load(cutoff_ptr + row)
    hopeless = scaled(value(own), largest, temperature) < HOPELESS
    if ((own >> 32) >= (cutoff >> 32)) & (hopeless == 0):
        ids = split * TILE + tl.arange(0, TILE)
        x = load_logits(logits_ptr + row * row_stride, ids, vocab_size, column_stride)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        score = scaled(x, largest, temperature) + _gumbel(split * TILE, seed, position, TILE)
        score = tl.where(pack(x, ids) >= cutoff, score, float("-inf"))
        best = tl.max(pack(score, ID_MASK - ids))
    tl.store(scores_ptr + row * splits + split, best)


@triton.jit
def token_kernel(
    maxima_ptr, scores_ptr, temperature_ptr, token_ptr, splits,
    SAMPLED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The token of each row, from its scores where it is sampled, else from its maxima."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.max(load_maxima(maxima_ptr, row, splits, SPLITS))
    if SAMPLED:
        # A row without numbers above -inf gives id 0 at any temperature.
        is_sampled = (tl.load(temperature_ptr + row) > 0) & (value(best) > float("-inf"))
        if is_sampled:
            best = tl.max(load_maxima(scores_ptr, row, splits, SPLITS))
    tl.store(token_ptr + row, ID_MASK - (best & ID_MASK))
