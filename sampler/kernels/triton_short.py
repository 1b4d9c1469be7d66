"""A row with a short top-k, by one program: its token among the few that can have it.

The largest logits of parts of 128 tokens say where to look. With top-k there are k parts whose
largest is not below the k-th of them, and every token that stays is in such a part. A row of which
too many tokens tie there is left to the general way.

Everything is once over by one program, so what counts is how many instructions it has. What is
found is put in the order of its arrival, by a counter, and only what is left is sorted.
"""

import triton
import triton.language as tl

from tokenloop.sampler.kernels.triton_bins import end_of_mass, load_parts, narrowed
from tokenloop.sampler.kernels.triton_exact import mass, scaled
from tokenloop.sampler.kernels.triton_keys import ID_MASK, NOTHING, pack, value
from tokenloop.sampler.kernels.triton_noise import gumbel
from tokenloop.sampler.kernels.triton_token import four


@triton.jit
def _choice(
    packed, left, largest, temperature, k, p, seed, position, TOKENS: tl.constexpr
):  # fmt: skip
    """The largest score with its id, packed, of `left` tokens packed [TOKENS], among which are all
    that stay."""
    packed = tl.sort(packed, descending=True)
    x, places = value(packed), tl.arange(0, TOKENS)
    # All that tie with the k-th largest stay, then those before which top_p is not reached.
    kth = tl.max(tl.where(places == k - 1, x, float("-inf")))
    stays = (x >= kth) & (places < left)
    weights = tl.where(stays, mass(x, largest, temperature), 0)
    before = tl.cumsum(weights) - weights
    # With a top_p of 0 the first token stays.
    target = tl.maximum(p.to(tl.float64) * tl.sum(weights).to(tl.float64), 1.0)
    target = tl.where(p < 1, target, float("inf"))
    stays = stays & (before.to(tl.float64) < target)
    ids = (packed & ID_MASK).to(tl.int32)
    counters = ids // 4
    noise = tl.reshape(gumbel(counters, seed, position), [TOKENS, 4])
    score = scaled(x, largest, temperature)[:, None] + noise
    is_one = (four(counters) == ids[:, None]) & stays[:, None]
    score = tl.where(is_one, pack(score, ID_MASK - ids.to(tl.int64)[:, None]), NOTHING)
    return tl.max(tl.reshape(score, [TOKENS * 4]))


@triton.jit
def _slots(counter_ptr, is_listed):
    """A place of its own for each that is listed."""
    ptrs = counter_ptr + tl.zeros(is_listed.shape, tl.int32)
    one = is_listed.to(tl.int64)
    return tl.atomic_add(ptrs, one, mask=is_listed, sem="relaxed")


@triton.jit
def short_token(
    row_ptr, tops, count, parts_ptr, short_ptr, counters_ptr, temperature, k, p, seed, position,
    vocab_size, column_stride,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
    TOPS: tl.constexpr, LISTED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(the largest score of a row with its id, packed; whether it was found). k is at most LISTED.

    tops float32 [TOPS] are -inf past the row's `count` parts; parts, and short int64 [TOKENS], are
    written, and two counters, which are 0 before.
    """
    largest = tl.max(tops)
    low, parts_left = narrowed(tops, end_of_mass(largest, temperature), largest, k, LISTED)
    best = tl.full([], NOTHING | ID_MASK, tl.int64)
    is_found = parts_left <= LISTED
    if is_found:
        # In a row without numbers what is past its end is not below the rest.
        is_part = (tops >= low) & (tl.arange(0, TOPS) < count)
        parts_left = tl.sum(is_part.to(tl.int32))
        part_slots = _slots(counters_ptr, is_part)
        tl.store(parts_ptr + part_slots, tl.arange(0, TOPS), mask=is_part)
        tl.debug_barrier()
        x, ids, _, _, _ = load_parts(
            row_ptr, parts_ptr, 0, parts_left, vocab_size, column_stride, LISTED,
            TILE, PARTS, STRIDE, WHOLE,
        )  # fmt: skip
        low, tokens_left = narrowed(x, low, largest, k, TOKENS)
        is_found = tokens_left <= TOKENS
        if is_found:
            is_token = x >= low
            tl.store(short_ptr + _slots(counters_ptr + 1, is_token), pack(x, ids), mask=is_token)
            tl.debug_barrier()
            listed = tl.arange(0, TOKENS)
            listed = tl.load(short_ptr + listed, mask=listed < tokens_left, other=NOTHING)
            found = _choice(listed, tokens_left, largest, temperature, k, p, seed, position, TOKENS)
            best = tl.maximum(best, found)
    return best, is_found
