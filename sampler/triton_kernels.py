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

from tokenloop.models.kernels.dependent_launch import wait
from tokenloop.sampler import philox
from tokenloop.sampler import sample as reference

# A product that no compiler fuses with a sum: engines must agree in every bit. The interpreter has
# no libdevice and fuses nothing.
if triton.knobs.runtime.interpret:

    @triton.jit
    def mul(x, y):
        return x * y

    @triton.jit
    def quick_log2(x):
        return tl.log2(x)

    @triton.jit
    def square_less_1(x):
        # Its fma rounds twice.
        return (x - 1.0) * (x + 1.0)

else:
    mul = libdevice.mul_rn

    @triton.jit
    def quick_log2(x):
        # One instruction where tl.log2 is 25.
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def square_less_1(x):
        return tl.fma(x, x, -1.0)


# What is packed where there is no token: -inf, and the id that loses every tie.
NOTHING = tl.constexpr(-2139095041 << 32)
ID_MASK = tl.constexpr(0x7FFFFFFF)
# The key of -inf.
LOWEST_KEY = tl.constexpr(-2139095041)
# Gumbel noise of 23 bits lies in [-2.82, 16.64]: what is scaled below this cannot win a row.
HOPELESS = tl.constexpr(-20.0)
ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(x) for x in philox.MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(x) for x in philox.WEYL)
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
def of_key(bits):
    """The float32 of a key."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def value(packed):
    """The float32 of a packed int64."""
    return of_key((packed >> 32).to(tl.int32))


@triton.jit
def pack(x, low):
    return (key(x).to(tl.int64) << 32) | low


@triton.jit
def numbers(x):
    """Logits as float32, with NaN as -inf."""
    x = x.to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def load_any(row_ptr, ids, vocab_size, column_stride, WHOLE: tl.constexpr):
    """float32 logits of the ids, with NaN; unless WHOLE, what lies beyond the row is -inf."""
    at = row_ptr + ids * column_stride
    x = tl.load(at) if WHOLE else tl.load(at, mask=ids < vocab_size, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def load_tile(row_ptr, start, vocab_size, column_stride, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The logits that load_any gives of a tile, by offsets that are constants."""
    ids = tl.arange(0, TILE)
    start_ptr = row_ptr + start * column_stride
    return load_any(start_ptr, ids, vocab_size - start, column_stride, WHOLE)


@triton.jit
def load_logits(row_ptr, ids, vocab_size, column_stride):
    """float32 logits of the ids; NaN and what lies beyond the row are -inf."""
    return numbers(load_any(row_ptr, ids, vocab_size, column_stride, False))


@triton.jit
def tile_start(tile, vocab_size, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """A tile's first id. Where WHOLE, the last tile begins early enough to end with the row: to
    hold a token twice does no harm, and no load needs a mask."""
    start = tile * TILE
    if WHOLE:
        start = tl.multiple_of(tl.minimum(start, vocab_size - TILE), 16)
    return start


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
def _product(x, multiplier: tl.constexpr):
    """(high, low) words of a product of uint32: one instruction, where tl.umulhi makes two."""
    wide = x.to(tl.uint64) * multiplier
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def _words(counters, seed, position):
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
def _unit(words):
    """float32 in (0, 1) of 23 of a word's bits."""
    return ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _gumbel(counters, seed, position):
    """float32 [..., 4 N] noise of the ids that `_words` tells."""
    return -log(-log(_unit(_words(counters, seed, position))))


@triton.jit
def log2_double_rate(words):
    """float32 1 + log2(-ln(u)) of the words' u, or less: by 0.05 at most where it is below -0.5,
    0.27 below 1, 3.5 anywhere; but for the rounding of the hardware's logarithm. Noise is
    -ln(-ln(u)).

    With u = 1 - r, -ln(u) is r + r^2 / 2 + ..., so no less than its first two terms, of what r is
    at least; twice them is (1 + r)^2 - 1. The bits of 1 + r are those of 1 + u turned over.
    """
    t = (((words ^ 0xFFFFFFFF) >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return quick_log2(square_less_1(t))


@triton.jit
def _fold(x, STRIDE: tl.constexpr):
    """[N] -> [N / STRIDE, STRIDE / 4, 4]: over the first and the last axis in a thread."""
    return tl.reshape(x, [x.shape[0] // STRIDE, STRIDE // 4, 4])


@triton.jit
def _largest(x, STRIDE: tl.constexpr):
    """The largest of float32 x [N], -inf where there is only NaN."""
    largest = tl.max(tl.max(_fold(x, STRIDE), axis=0), axis=1)
    # Of integers a warp finds the largest in one instruction.
    return of_key(tl.max(key(numbers(largest))))


@triton.jit
def first_of_largest(x, ids, nothing, STRIDE: tl.constexpr):
    """(the largest of x; its lowest id, or `nothing` where it is -inf)."""
    largest = _largest(x, STRIDE)
    first = nothing
    if largest > float("-inf"):
        first = tl.min(tl.where(x == largest, ids, ID_MASK))
    return largest, first


@triton.jit
def _score_bounds(x, rates, temperature, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """(the largest logit, keys of bounds int32 [STRIDE / 4]): no score log2(e) * (x / temperature
    + noise) of a part is above its bound by more than `_tolerance`. At a fifth of the cost of exact
    scores.

    Part p of a tile is run p of each STRIDE tokens of it, cut into PARTS runs: what neighbouring
    threads hold where each holds 4 of every STRIDE, so that most of a maximum is taken in
    registers and the rest by few shuffles in one warp. A bound is there once for every 4 tokens of
    a run: each thread has its own.
    """
    factor = 1.4426950408889634 / temperature
    # Else products may overflow, or be inf * 0. NaN makes all of them NaN.
    factor = tl.where(factor > 1e-30, factor, float("nan"))
    factor = tl.where(factor < 1e8, factor, float("nan"))
    # 1 less than the maximum of x * factor - rate; to negate a rate would be an instruction more.
    negated = _fold(x * -factor + rates, STRIDE)
    negated = tl.min(tl.min(negated, axis=0), axis=1)
    run: tl.constexpr = STRIDE // (4 * PARTS)
    bounds = 1.0 - tl.min(tl.reshape(negated, [PARTS, run]), axis=1)
    largest = _largest(x, STRIDE)
    # Products that may overflow, or parts that are all NaN: the exact scores decide.
    bounds = tl.where(bounds == bounds, bounds, float("inf"))
    bounds = tl.where(tl.abs(largest) < 1e30, bounds, float("inf"))
    bounds = key(tl.where(largest == float("-inf"), largest, bounds))
    return largest, tl.reshape(tl.broadcast_to(bounds[:, None], [PARTS, run]), [PARTS * run])


@triton.jit
def _store_bounds(bounds_ptr, bounds, PARTS: tl.constexpr):
    """Each part's bound, by the first thread that has it."""
    offsets = tl.arange(0, bounds.shape[0])
    run: tl.constexpr = bounds.shape[0] // PARTS
    tl.store(bounds_ptr + offsets // run, bounds, mask=offsets % run == 0)


@triton.jit
def _tolerance(score):
    """More than a bound may be off: by logarithms, and by rounded products."""
    return 2e-4 + (tl.abs(score) + 32) * 1e-6


@triton.jit
def tile_maxima_kernel(
    logits_ptr, rows_ptr, maxima_ptr, bins_ptr,
    temperature_ptr, seed_ptr, position_ptr, bounds_ptr,
    vocab_size, row_stride, column_stride, splits,
    HAS_ROWS: tl.constexpr, SAMPLED: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
    BINS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The maximum of a tile of a row; row n is rows[n] of the logits where HAS_ROWS.

    Where SAMPLED, its parts' bounds of scores as well, if the row's temperature is above 0. Where
    there are BINS, the tiles' programs share the zeroing of the row's, int64 [B, 2, BINS], ZEROS
    each.
    """
    split, row = tl.program_id(0), tl.program_id(1)
    source_row = row.to(tl.int64)
    zero = wait(0)
    logits_ptr += zero
    if HAS_ROWS:
        source_row = tl.load(rows_ptr + zero + row).to(tl.int64)
    out = row * splits + split
    start = tile_start(split, vocab_size, TILE, WHOLE)
    ids = start + tl.arange(0, TILE)
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + zero + row)
        # Else the compiler delays two of these loads until the temperature is there.
        tl.debug_barrier()
    row_ptr = logits_ptr + source_row * row_stride
    x = load_tile(row_ptr, start, vocab_size, column_stride, TILE, WHOLE)
    if SAMPLED:
        # Seed and position add nothing, but the branch waits for them, and for them alone: what is
        # used only behind a branch, like the logits, is waited for together.
        nothing = (seed ^ position).to(tl.int32).to(tl.float32) * 0.0
        if temperature + nothing > 0:
            # Noise does not wait for logits. Of these rows nobody asks which token is the first of
            # the largest.
            counters = start // 4 + tl.arange(0, TILE // 4)
            rates = log2_double_rate(_words(counters, seed, position))
            largest, bounds = _score_bounds(x, rates, temperature, PARTS, STRIDE)
            first = start
            _store_bounds(bounds_ptr + out * PARTS, bounds, PARTS)
        else:
            largest, first = first_of_largest(x, ids, start, STRIDE)
    else:
        largest, first = first_of_largest(x, ids, start, STRIDE)
    tl.store(maxima_ptr + out, pack(largest, ID_MASK - first.to(tl.int64)))
    if BINS:
        # triton_cutoff's bins_kernel, the next launch, adds to them.
        zeros = split * ZEROS + tl.arange(0, ZEROS)
        tl.store(
            bins_ptr + zero + row * 2 * BINS + zeros, tl.zeros([ZEROS], tl.int64), zeros < 2 * BINS
        )


@triton.jit
def bounds_kernel(
    logits_ptr, maxima_ptr, cutoff_ptr, temperature_ptr, seed_ptr, position_ptr, bounds_ptr,
    vocab_size, row_stride, column_stride,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """bounds int32 [B, splits * PARTS]: of each part the bound's key, of what the cutoff keeps.

    Tiles that cannot hold the row's token are not read. Rows of temperature 0 have no bounds.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0:
        return
    splits = tl.cdiv(vocab_size, TILE)
    largest = value(tl.max(load_maxima(maxima_ptr, row, splits, SPLITS)))
    own = tl.load(maxima_ptr + row * splits + split)
    cutoff = tl.load(cutoff_ptr + row)
    bounds = tl.full([STRIDE // 4], LOWEST_KEY, tl.int32)
    hopeless = scaled(value(own), largest, temperature) < HOPELESS
    if ((own >> 32) >= (cutoff >> 32)) & (hopeless == 0):
        start = tile_start(split, vocab_size, TILE, WHOLE)
        ids = start + tl.arange(0, TILE)
        row_ptr = logits_ptr + row * row_stride
        x = numbers(load_tile(row_ptr, start, vocab_size, column_stride, TILE, WHOLE))
        x = tl.where(pack(x, ids) >= cutoff, x, float("-inf"))
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        counters = start // 4 + tl.arange(0, TILE // 4)
        rates = log2_double_rate(_words(counters, seed, position))
        bounds = _score_bounds(x, rates, temperature, PARTS, STRIDE)[1]
    _store_bounds(bounds_ptr + (row * splits + split) * PARTS, bounds, PARTS)


@triton.jit
def _by_group(x, GROUPS: tl.constexpr):
    """[N] -> [K, GROUPS, lanes, 4]: in the order in which threads hold what they load, so that a
    group's values are in one warp where there are four groups and warps."""
    FOUR: tl.constexpr = min(4, x.shape[0] // GROUPS)
    LANES: tl.constexpr = min(32, x.shape[0] // (GROUPS * FOUR))
    return tl.reshape(x, [x.shape[0] // (GROUPS * LANES * FOUR), GROUPS, LANES, FOUR])


@triton.jit
def _highest(bounds, offsets):
    """(the highest of each group's bounds, its lowest offset), int32 [groups]."""
    highest = tl.max(tl.max(tl.max(bounds, axis=0), axis=2), axis=1)
    first = tl.where(bounds == highest[None, :, None, None], offsets, ID_MASK)
    return highest, tl.min(tl.min(tl.min(first, axis=0), axis=2), axis=1)


@triton.jit
def _counters(
    parts, vocab_size, TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """int32 [N]: a fourth of the ids of some parts' tokens, those that 4 divides."""
    RUN: tl.constexpr = STRIDE // PARTS // 4
    SIZE: tl.constexpr = TILE // PARTS // 4
    start = tile_start(parts // PARTS, vocab_size, TILE, WHOLE) // 4 + parts % PARTS * RUN
    i = tl.arange(0, SIZE)
    counters = start[:, None] + (i // RUN * (STRIDE // 4) + i % RUN)[None, :]
    return tl.reshape(counters, [parts.shape[0] * SIZE])


@triton.jit
def _four(counters):
    """int32 [N, 4]: the ids that counters [N] make noise for."""
    return counters[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _best_pair(packed_0, other_0, packed_1, other_1):
    return tl.maximum(packed_0, packed_1), tl.maximum(other_0, other_1)


@triton.jit
def token_kernel(
    logits_ptr, maxima_ptr, cutoff_ptr, temperature_ptr, seed_ptr, position_ptr, bounds_ptr,
    token_ptr, table_ptr, hidden_ptr, vocab_size, row_stride, column_stride, splits, width,
    embed_scale: tl.constexpr,
    SAMPLED: tl.constexpr, RESTRICTED: tl.constexpr, EMBED: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The token of each row: that of the largest logit, or of the largest scaled logit + noise.

    For the latter parts of tiles are scored exactly, until none is left whose bound is not below
    the best score. Bounds are in GROUPS, and the highest one's part of each is scored in the same
    round; one round in most rows, two in a few. With EMBED the token's row of the table [V, width],
    scaled, goes to hidden [B, width].
    """
    row = tl.program_id(0).to(tl.int64)
    zero = wait(0)
    # All loads that depend on nothing come before what waits for one.
    maxima = load_maxima(maxima_ptr + zero, row, splits, SPLITS)
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + zero + row)
        if RESTRICTED:
            cutoff = tl.load(cutoff_ptr + zero + row)
        offsets = tl.arange(0, SPLITS * PARTS)
        count = splits * PARTS
        # Not written where the temperature is 0.
        bounds_ptr += zero + row * count
        bounds = tl.load(bounds_ptr + offsets, mask=offsets < count, other=LOWEST_KEY)
        bounds, offsets = _by_group(bounds, GROUPS), _by_group(offsets, GROUPS)
        # Else the compiler delays these loads until the first one is there.
        tl.debug_barrier()
        if temperature > 0:
            row_ptr = logits_ptr + zero + row * row_stride
            highest, parts = _highest(bounds, offsets)
            counters = _counters(parts, vocab_size, TILE, PARTS, STRIDE, WHOLE)
            x = numbers(load_any(row_ptr, _four(counters), vocab_size, column_stride, WHOLE))
            # While these come:
            largest = of_key(tl.max((maxima >> 32).to(tl.int32)))
            # A row without numbers above -inf gives id 0 at any temperature, and has no bounds.
            is_open = largest > float("-inf")
            best = tl.full([], NOTHING | ID_MASK, tl.int64)
            if is_open:
                best = tl.full([], NOTHING, tl.int64)
            unit = largest * (1.4426950408889634 / temperature)
            while is_open:
                bounds = tl.where(offsets == parts[None, :, None, None], LOWEST_KEY, bounds)
                highest, parts = _highest(bounds, offsets)
                ids = _four(counters)
                noise = tl.reshape(_gumbel(counters, seed, position), ids.shape)
                score = scaled(x, largest, temperature) + noise
                if RESTRICTED:
                    is_kept = pack(x, ids) >= cutoff
                    score = tl.where(is_kept, score, float("-inf"))
                # The next round's, in case there is one. Parts without a bound do no harm.
                counters = _counters(parts, vocab_size, TILE, PARTS, STRIDE, WHOLE)
                x = numbers(load_any(row_ptr, _four(counters), vocab_size, column_stride, WHOLE))
                # By 32 bits twice, which the hardware reduces in one instruction.
                score = key(score)
                shape: tl.constexpr = [GROUPS, TILE // PARTS // 4]
                group_best = tl.max(tl.reshape(tl.max(score, axis=1), shape), axis=1)
                row_best = tl.reshape(tl.broadcast_to(group_best[:, None], shape), counters.shape)
                first = tl.where(score == row_best[:, None], ids, ID_MASK)
                first = tl.min(tl.reshape(tl.min(first, axis=1), shape), axis=1)
                packed = (group_best.to(tl.int64) << 32) | (ID_MASK - first)
                packed, bound = tl.reduce((packed, highest), 0, _best_pair)
                best = tl.maximum(best, packed)
                # The best score so far as bounds count them. NaN, of infinities, ends no search.
                reached = value(best) * 1.4426950408889634 + unit
                bound = of_key(bound)
                is_below = (bound < reached - _tolerance(reached)) | (bound == float("-inf"))
                is_open = is_below == 0
        else:
            best = tl.max(maxima)
    else:
        best = tl.max(maxima)
    token = ID_MASK - (best & ID_MASK)
    tl.store(token_ptr + row, token)
    if EMBED:
        d = tl.arange(0, BLOCK_D)
        x = tl.load(table_ptr + token * width + d, mask=d < width, other=0.0)
        x = (x.to(tl.float32) * embed_scale).to(x.dtype)
        tl.store(hidden_ptr + row * width + d, x, mask=d < width)
