"""The Triton kernel of the tiles' maxima, and bounds of the scores of their parts.

A score is a scaled logit plus noise. Each STRIDE tokens of a tile are cut into PARTS runs, and part
p of the tile is run p of each of them. Neighbouring threads hold a run where each thread holds 4 of
every STRIDE tokens, so most of a maximum is taken in registers, and the rest by few shuffles in one
warp.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.sampler.kernels.triton_keys import ID_MASK, key, pack
from tokenloop.sampler.kernels.triton_noise import log2_double_rate, philox_words
from tokenloop.sampler.kernels.triton_tiles import (
    first_of_largest,
    fold,
    largest_of,
    load_tile,
    numbers,
    tile_start,
)


@triton.jit
def score_bounds(x, rates, temperature, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """(the largest logit, keys of bounds int32 [STRIDE / 4]), at a fifth of the cost of exact
    scores: no score log2(e) * (x / temperature + noise) of a part is above its bound by more than
    triton_token's `tolerance`. Each thread has its part's bound: once for every 4 tokens of a run.
    """
    factor = 1.4426950408889634 / temperature
    # Products could overflow, or be inf * 0. A factor of NaN makes all of them NaN.
    factor = tl.where(factor > 1e-30, factor, float("nan"))
    factor = tl.where(factor < 1e8, factor, float("nan"))
    # 1 less than the maximum of x * factor - rate; negating a rate would be an instruction more.
    negated = fold(x * -factor + rates, STRIDE)
    negated = tl.min(tl.min(negated, axis=0), axis=1)
    run: tl.constexpr = STRIDE // (4 * PARTS)
    bounds = 1.0 - tl.min(tl.reshape(negated, [PARTS, run]), axis=1)
    largest = largest_of(x, STRIDE)
    # Where products may overflow, or a part is all NaN, the exact scores decide.
    bounds = tl.where(bounds == bounds, bounds, float("inf"))
    bounds = tl.where(tl.abs(largest) < 1e30, bounds, float("inf"))
    bounds = key(tl.where(largest == float("-inf"), largest, bounds))
    return largest, tl.reshape(tl.broadcast_to(bounds[:, None], [PARTS, run]), [PARTS * run])


@triton.jit
def store_bounds(bounds_ptr, bounds, PARTS: tl.constexpr):
    """Store each part's bound, by the first thread that has it."""
    offsets = tl.arange(0, bounds.shape[0])
    run: tl.constexpr = bounds.shape[0] // PARTS
    tl.store(bounds_ptr + offsets // run, bounds, mask=offsets % run == 0)


@waits  # at once
@triton.jit
def tile_maxima_kernel(
    logits_ptr, maxima_ptr, tops_ptr, sums_ptr,
    temperature_ptr, seed_ptr, position_ptr, bounds_ptr,
    vocab_size, row_stride, column_stride, splits,
    SAMPLED: tl.constexpr, TOPS: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
    WORDS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The maximum of a tile of a row.

    Where SAMPLED, and the row's temperature is above 0, the bounds of its parts' scores as well.
    With TOPS the largest logit of each part, float32 [B, splits * PARTS], as well; no token is in
    two tiles then. The row's programs share out the zeroing of its sums, int64 [B, WORDS]: ZEROS to
    each.
    """
    split, row = tl.program_id(0), tl.program_id(1)
    row64 = row.to(tl.int64)
    zero = wait(0)
    logits_ptr += zero
    out = row * splits + split
    start = tile_start(split, vocab_size, TILE, WHOLE)
    ids = start + tl.arange(0, TILE)
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + zero + row)
        # Without it the compiler delays two of these loads until the temperature is there.
        tl.debug_barrier()
    row_ptr = logits_ptr + row64 * row_stride
    x = load_tile(row_ptr, start, vocab_size, column_stride, TILE, WHOLE)
    if TOPS:
        if start < split * TILE:
            x = tl.where(ids >= split * TILE, x, float("-inf"))
        tops = tl.max(tl.max(fold(x, STRIDE), axis=0), axis=1)
        run: tl.constexpr = STRIDE // (4 * PARTS)
        tops = numbers(tl.max(tl.reshape(tops, [PARTS, run]), axis=1))
        tl.store(tops_ptr + zero + out * PARTS + tl.arange(0, PARTS), tops)
    if SAMPLED:
        # Seed and position add nothing, but they make the branch wait for them, and for them alone.
        # What is used only behind a branch, such as the logits, is waited for all together.
        nothing = (seed ^ position).to(tl.int32).to(tl.float32) * 0.0
        if temperature + nothing > 0:
            # Noise does not wait for logits. Nobody asks which token of these rows is the first of
            # the largest.
            counters = start // 4 + tl.arange(0, TILE // 4)
            rates = log2_double_rate(philox_words(counters, seed, position))
            largest, bounds = score_bounds(x, rates, temperature, PARTS, STRIDE)
            first = start
            store_bounds(bounds_ptr + out * PARTS, bounds, PARTS)
        else:
            largest, first = first_of_largest(x, ids, start, STRIDE)
    else:
        largest, first = first_of_largest(x, ids, start, STRIDE)
    tl.store(maxima_ptr + out, pack(largest, ID_MASK - first.to(tl.int64)))
    if TOPS:
        # triton_filter's kernels, the next launches, add to them.
        zeros = split * ZEROS + tl.arange(0, ZEROS)
        tl.store(
            sums_ptr + zero + row64 * WORDS + zeros, tl.zeros([ZEROS], tl.int64), zeros < WORDS
        )
