"""The Triton kernel that chooses each row's token, where no row has a top-k or top-p."""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.sampler.kernels.triton_exact import scaled
from tokenloop.sampler.kernels.triton_keys import (
    ID_MASK,
    LOWEST_KEY,
    NOTHING,
    key,
    of_key,
    pack,
    value,
)
from tokenloop.sampler.kernels.triton_noise import gumbel
from tokenloop.sampler.kernels.triton_tiles import load_any, load_maxima, numbers, tile_start


@triton.jit
def tolerance(score):
    """More than a bound may be too low, by logarithms and by rounded products."""
    return 2e-4 + (tl.abs(score) + 32) * 1e-6


@triton.jit
def _by_group(x, GROUPS: tl.constexpr):
    """[N] -> [K, GROUPS, lanes, 4], in the order in which threads hold what they load: with four
    groups and four warps a group's values are in one warp."""
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
def part_counters(
    parts, vocab_size, TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """int32 [N]: Philox counters of some parts' tokens, each a fourth of an id that 4 divides."""
    RUN: tl.constexpr = STRIDE // PARTS // 4
    SIZE: tl.constexpr = TILE // PARTS // 4
    start = tile_start(parts // PARTS, vocab_size, TILE, WHOLE) // 4 + parts % PARTS * RUN
    i = tl.arange(0, SIZE)
    counters = start[:, None] + (i // RUN * (STRIDE // 4) + i % RUN)[None, :]
    return tl.reshape(counters, [parts.shape[0] * SIZE])


@triton.jit
def four(counters):
    """int32 [N, 4]: the ids for which counters [N] make noise."""
    return counters[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _best_pair(packed_0, other_0, packed_1, other_1):
    return tl.maximum(packed_0, packed_1), tl.maximum(other_0, other_1)


@triton.jit
def by_group(bounds_ptr, count, SPLITS: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr):
    """A row's bounds and their offsets, as `noisiest` takes them."""
    offsets = tl.arange(0, SPLITS * PARTS)
    bounds = tl.load(bounds_ptr + offsets, mask=offsets < count, other=LOWEST_KEY)
    return _by_group(bounds, GROUPS), _by_group(offsets, GROUPS)


@triton.jit
def noisiest(
    row_ptr, maxima, bounds, offsets, cutoff, temperature, seed, position,
    vocab_size, column_stride,
    RESTRICTED: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    WHOLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The largest score of a row with its id, packed; where RESTRICTED, from the cutoff upwards.

    Parts of tiles are scored exactly, until the bounds of all the others are below the best score.
    Bounds are in GROUPS; a round scores the part with the highest bound of each group. Most rows
    take one round, a few take two.
    """
    highest, parts = _highest(bounds, offsets)
    counters = part_counters(parts, vocab_size, TILE, PARTS, STRIDE, WHOLE)
    x = numbers(load_any(row_ptr, four(counters), vocab_size, column_stride, WHOLE))
    # While these loads are on their way:
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
        ids = four(counters)
        noise = tl.reshape(gumbel(counters, seed, position), ids.shape)
        score = scaled(x, largest, temperature) + noise
        if RESTRICTED:
            is_kept = pack(x, ids) >= cutoff
            score = tl.where(is_kept, score, float("-inf"))
        # Loads for the next round, if there is one. Parts without a bound do no harm.
        counters = part_counters(parts, vocab_size, TILE, PARTS, STRIDE, WHOLE)
        x = numbers(load_any(row_ptr, four(counters), vocab_size, column_stride, WHOLE))
        # 32 bits at a time, twice: the hardware reduces those in one instruction.
        score = key(score)
        shape: tl.constexpr = [GROUPS, TILE // PARTS // 4]
        group_best = tl.max(tl.reshape(tl.max(score, axis=1), shape), axis=1)
        row_best = tl.reshape(tl.broadcast_to(group_best[:, None], shape), counters.shape)
        first = tl.where(score == row_best[:, None], ids, ID_MASK)
        first = tl.min(tl.reshape(tl.min(first, axis=1), shape), axis=1)
        packed = (group_best.to(tl.int64) << 32) | (ID_MASK - first)
        packed, bound = tl.reduce((packed, highest), 0, _best_pair)
        best = tl.maximum(best, packed)
        # The best score so far, as bounds count scores. NaN, of infinities, ends no search.
        reached = value(best) * 1.4426950408889634 + unit
        bound = of_key(bound)
        is_below = (bound < reached - tolerance(reached)) | (bound == float("-inf"))
        is_open = is_below == 0
    return best


@triton.jit
def store_token(
    best, row, token_ptr, table_ptr, hidden_ptr, width, embed_scale: tl.constexpr,
    EMBED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the id that `best` packs; with EMBED its row of the table, scaled, as well."""
    token = ID_MASK - (best & ID_MASK)
    tl.store(token_ptr + row, token)
    if EMBED:
        d = tl.arange(0, BLOCK_D)
        x = tl.load(table_ptr + token * width + d, mask=d < width, other=0.0)
        x = (x.to(tl.float32) * embed_scale).to(x.dtype)
        tl.store(hidden_ptr + row * width + d, x, mask=d < width)


@waits  # at once
@triton.jit
def token_kernel(
    logits_ptr, maxima_ptr, temperature_ptr, seed_ptr, position_ptr, bounds_ptr,
    token_ptr, table_ptr, hidden_ptr, vocab_size, row_stride, column_stride, splits, width,
    embed_scale: tl.constexpr,
    SAMPLED: tl.constexpr, EMBED: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The token of each row: that of the largest logit, or of the largest scaled logit + noise.

    With EMBED the token's row of the table [V, width], scaled, goes to hidden [B, width].
    """
    row = tl.program_id(0).to(tl.int64)
    zero = wait(0)
    # All loads that depend on nothing come before anything that waits for one.
    maxima = load_maxima(maxima_ptr + zero, row, splits, SPLITS)
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + zero + row)
        count = splits * PARTS
        # No bounds were written where the temperature is 0.
        bounds_ptr += zero + row * count
        bounds, offsets = by_group(bounds_ptr, count, SPLITS, PARTS, GROUPS)
        # Without it the compiler delays these loads until the first one is there.
        tl.debug_barrier()
        if temperature > 0:
            row_ptr = logits_ptr + zero + row * row_stride
            best = noisiest(
                row_ptr, maxima, bounds, offsets, 0, temperature,
                seed, position, vocab_size, column_stride,
                False, TILE, PARTS, STRIDE, WHOLE, GROUPS,
            )  # fmt: skip
        else:
            best = tl.max(maxima)
    else:
        best = tl.max(maxima)
    store_token(best, row, token_ptr, table_ptr, hidden_ptr, width, embed_scale, EMBED, BLOCK_D)
