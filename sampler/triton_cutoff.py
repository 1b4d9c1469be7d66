"""Triton kernels that find where top-k and top-p cut a row; triton_kernels.py has the others.

A row's cutoff is a packed int64 (logit, id): the last kept token in descending order, where of
equal logits the higher id comes first. Rows that cut nothing leave the kernels at once.
"""

import triton
import triton.language as tl

from sampler.triton_kernels import (
    NOTHING,
    key,
    load_logits,
    load_maxima,
    log,
    mass,
    numbers,
    pack,
    scaled,
    value,
)


@triton.jit
def _filters(temperature, k, p, vocab_size):
    """A row's (k, p): 0 and 1 where they remove nothing."""
    k = tl.where((temperature > 0) & (k < vocab_size), k, 0)
    return k, tl.where(temperature > 0, p, 1.0)


@triton.jit
def _kth_largest(packed, k):
    """The k-th largest int32 key of packed [N], found four bits at a time."""
    keys = (packed >> 32).to(tl.int32)
    floor = tl.full([], -0x80000000, tl.int32)
    for level in range(8):
        thresholds = floor + (tl.arange(0, 16) << (28 - 4 * level))
        count = tl.sum((keys[:, None] >= thresholds[None, :]).to(tl.int32), axis=0)
        digit = tl.sum((count >= k).to(tl.int32)) - 1
        floor += digit << (28 - 4 * level)
    return floor


@triton.jit
def candidates_kernel(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    candidates_ptr, found_ptr, total_ptr,
    vocab_size, row_stride, column_stride, capacity,
    TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """List the few tokens among which a row's cutoff must lie, and add up the row's mass.

    The list's order is that of arrival; nothing that reads it depends on it. It serves a top-k of
    up to `splits`, because the k-th largest of the tiles' maxima is at most the k-th largest logit,
    and top-p alone, because what lies ln(V / (1 - p)) below the top weighs less than 1 - p.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    splits = tl.cdiv(vocab_size, TILE)
    temperature = tl.load(temperature_ptr + row)
    k, p = _filters(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab_size)
    if (k > splits) | ((k == 0) & (p >= 1)):
        return
    # Addresses of stores come of what is loaded here: through a helper's pointer, torch would take
    # all that it reads for written.
    offsets = tl.arange(0, SPLITS)
    maxima_mask = offsets < splits
    maxima = tl.load(maxima_ptr + row * splits + offsets, mask=maxima_mask, other=NOTHING)
    own = tl.load(maxima_ptr + row * splits + split)
    if (k > 0) & (tl.sum(((maxima >> 32) > (own >> 32)).to(tl.int32)) >= k):
        return
    ids = split * TILE + tl.arange(0, TILE)
    logit_ptrs = logits_ptr + row * row_stride + ids * column_stride
    x = numbers(tl.load(logit_ptrs, mask=ids < vocab_size, other=float("-inf")))
    if k > 0:
        listed = key(x) >= _kth_largest(maxima, k)
    else:
        largest = value(tl.max(maxima))
        tile_mass = tl.sum(mass(x, largest, temperature))
        tl.atomic_add(total_ptr + row, tile_mass, sem="relaxed")
        # 0.1 is far more than rounding can lose.
        depth = log(tl.full([], vocab_size, tl.float32)) - log(1 - p) + 0.1
        listed = scaled(x, largest, temperature) >= -depth
    listed = listed & (ids < vocab_size)
    count = tl.sum(listed.to(tl.int32))
    if count > 0:
        start = tl.atomic_add(found_ptr + row, count, sem="relaxed")
        slots = start + tl.cumsum(listed.to(tl.int32)) - 1
        slot_ptrs = candidates_ptr + row * capacity + slots
        tl.store(slot_ptrs, pack(x, ids), mask=listed & (slots < capacity))


@triton.jit
def _load_tokens(
    row_ptr, list_ptr, listed, start, size, vocab_size, column_stride, CHUNK: tl.constexpr
):
    """Packed (logit, id) [CHUNK] of a row's list, or of the row itself where it has none."""
    offsets = start + tl.arange(0, CHUNK)
    if listed:
        packed = tl.load(list_ptr + offsets, mask=offsets < size, other=NOTHING)
    else:
        packed = pack(load_logits(row_ptr, offsets, vocab_size, column_stride), offsets)
    return packed


@triton.jit
def _weights(packed, cutoff, largest, temperature, BY_MASS: tl.constexpr):
    if BY_MASS:
        return tl.where(packed >= cutoff, mass(value(packed), largest, temperature), 0)
    else:
        return tl.full(packed.shape, 1, tl.int64)


@triton.jit
def _reached(packed, weights, thresholds):
    """What each token adds, int64 [CHUNK, 16], to the weight from each threshold upwards."""
    return tl.where(packed[:, None] >= thresholds[None, :], weights[:, None], 0)


@triton.jit
def _search(
    row_ptr, list_ptr, listed, size, vocab_size, column_stride,
    target, cutoff, largest, temperature,
    BY_MASS: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest packed value with at least `target` (float64) of tokens, or of mass, from it
    upwards, among the tokens from `cutoff` on; 4 bits a level: 8 of the logit, then the id's."""
    # Lists are seldom longer than a chunk, which stays in registers.
    packed = _load_tokens(row_ptr, list_ptr, listed, 0, size, vocab_size, column_stride, CHUNK)
    weights = _weights(packed, cutoff, largest, temperature, BY_MASS)
    floor = tl.full([], -0x8000000000000000, tl.int64)
    digits = tl.arange(0, 16).to(tl.int64)
    for level in range(LEVELS):
        # Digits of the id that no id of this vocabulary has are left out.
        shift = tl.where(level < 8, 60 - 4 * level, 4 * (LEVELS - 1 - level)).to(tl.int64)
        thresholds = floor + (digits << shift)
        reached = _reached(packed, weights, thresholds)
        start = tl.full([], CHUNK, tl.int32)
        while start < size:
            more = _load_tokens(
                row_ptr, list_ptr, listed, start, size, vocab_size, column_stride, CHUNK
            )
            more_weights = _weights(more, cutoff, largest, temperature, BY_MASS)
            reached += _reached(more, more_weights, thresholds)
            start += CHUNK
        enough = tl.sum(reached, axis=0).to(tl.float64) >= target
        digit = tl.sum(enough.to(tl.int32)) - 1
        floor += tl.maximum(digit, 0).to(tl.int64) << shift
    return floor


@triton.jit
def cutoff_kernel(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    candidates_ptr, found_ptr, total_ptr, cutoff_ptr,
    vocab_size, row_stride, column_stride, splits, capacity,
    CHUNK: tl.constexpr, SPLITS: tl.constexpr, ID_DIGITS: tl.constexpr,
):  # fmt: skip
    """The last kept token of each row, packed with its id: tokens from it upwards are kept.

    Both searches find, four bits at a time, the largest packed value that enough lies at or above:
    k tokens, of whatever id, for top-k; p of the mass for top-p, where of equal logits the higher
    id comes first.
    """
    row = tl.program_id(0).to(tl.int64)
    cutoff = tl.full([], NOTHING, tl.int64)
    temperature = tl.load(temperature_ptr + row)
    k, p = _filters(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab_size)
    if (k > 0) | (p < 1):
        largest = value(tl.max(load_maxima(maxima_ptr, row, splits, SPLITS)))
        row_ptr = logits_ptr + row * row_stride
        list_ptr = candidates_ptr + row * capacity
        found = tl.load(found_ptr + row)
        listed = (k <= splits) & (found <= capacity)
        size = tl.where(listed, found, vocab_size)
        if k > 0:
            cutoff = _search(
                row_ptr, list_ptr, listed, size, vocab_size, column_stride,
                k.to(tl.float64), cutoff, largest, temperature, False, 8, CHUNK,
            )  # fmt: skip
        if p < 1:
            total = tl.load(total_ptr + row)
            if k > 0:
                start = tl.full([], 0, tl.int32)
                while start < size:
                    packed = _load_tokens(
                        row_ptr, list_ptr, listed, start, size, vocab_size, column_stride, CHUNK
                    )
                    total += tl.sum(_weights(packed, cutoff, largest, temperature, True))
                    start += CHUNK
            target = p.to(tl.float64) * total.to(tl.float64)
            cutoff = _search(
                row_ptr, list_ptr, listed, size, vocab_size, column_stride,
                target, cutoff, largest, temperature, True, 8 + ID_DIGITS, CHUNK,
            )  # fmt: skip
    tl.store(cutoff_ptr + row, cutoff)
