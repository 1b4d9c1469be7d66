"""Triton kernels that find where to look for the cutoff of top-k and top-p in a row.

The whole grid adds a row up in bins of equal width, by scaled logit from 0 down to LOWEST, where
weights end (radix select, with values for digits). Then one program sees in which bins the row is
cut, and the grid lists those bins' tokens for triton_cutoff.py. Tokens below LOWEST have no mass
and cannot win a row, so a top-k that reaches down to them cuts nothing. Rows that cut nothing leave
the kernels at once.

    bins  int64 [B, 2, BINS]: masses, counts
    plan  int64 [B, 8]: the first and the last bin where top-p may cut; the bin where top-k cuts;
          of what is above in bins that are not listed: tokens for top-k, mass for top-p, and mass
          of all that stays; the number of listed tokens; and one unused
    list  int32 [B, V]: ids, in the order of arrival; no result depends on that order
"""

import triton
import triton.language as tl

from tokenloop.sampler.kernels.triton_exact import LOWEST, log, mass, scaled
from tokenloop.sampler.kernels.triton_keys import NOTHING, value
from tokenloop.sampler.kernels.triton_tiles import numbers

PLAN = tl.constexpr(8)


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
def _bin(s, BINS: tl.constexpr):
    """The bin of scaled logits, int32: it grows as they fall, and is BINS below LOWEST."""
    bins = (tl.maximum(s, LOWEST) * (BINS / LOWEST)).to(tl.int32)
    return tl.where(s >= LOWEST, tl.minimum(bins, BINS - 1), BINS)


@triton.jit
def bins_kernel(
    logits_ptr, maxima_ptr, temperature_ptr, top_k_ptr, top_p_ptr, bins_ptr,
    vocab_size, row_stride, column_stride,
    TILE: tl.constexpr, SPLITS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Add a tile to its row's bins: counts for top-k, masses for top-p.

    Only tokens among which the cutoff must lie are added one by one: they are few. With a top-k of
    up to `splits` they start at the k-th largest of the tiles' maxima, which is at most the k-th
    largest logit. With top-p alone what lies ln(V / (1 - p)) below the top weighs less than 1 - p.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    splits = tl.cdiv(vocab_size, TILE)
    temperature = tl.load(temperature_ptr + row)
    k, p = _filters(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab_size)
    if (k == 0) & (p >= 1):
        return
    # Addresses of stores depend on what is loaded here. If a helper loaded it, torch would take all
    # that the helper reads for written.
    offsets = tl.arange(0, SPLITS)
    maxima_mask = offsets < splits
    maxima = tl.load(maxima_ptr + row * splits + offsets, mask=maxima_mask, other=NOTHING)
    own = tl.load(maxima_ptr + row * splits + split)
    few = (k > 0) & (k <= splits)
    if few & (tl.sum(((maxima >> 32) > (own >> 32)).to(tl.int32)) >= k):
        return
    largest = value(tl.max(maxima))
    if scaled(value(own), largest, temperature) < LOWEST:
        return
    floor = tl.full([], LOWEST, tl.float32)
    if few:
        kth = value(_kth_largest(maxima, k).to(tl.int64) << 32)
        floor = tl.maximum(floor, scaled(kth, largest, temperature))
    if k == 0:
        # 0.1 is far more than rounding can lose.
        depth = log(tl.full([], vocab_size, tl.float32)) - log(1 - p) + 0.1
        floor = tl.maximum(floor, -depth)
    ids = split * TILE + tl.arange(0, TILE)
    logit_ptrs = logits_ptr + row * row_stride + ids * column_stride
    x = numbers(tl.load(logit_ptrs, mask=ids < vocab_size, other=float("-inf")))
    s = scaled(x, largest, temperature)
    added = (s >= floor) & (ids < vocab_size)
    row_ptr = bins_ptr + row * 2 * BINS
    bin_ptrs = row_ptr + _bin(s, BINS)
    if k > 0:
        tl.atomic_add(bin_ptrs + BINS, added.to(tl.int64), mask=added, sem="relaxed")
    if p < 1:
        weights = mass(x, largest, temperature)
        tl.atomic_add(bin_ptrs, weights, mask=added, sem="relaxed")
        if k == 0:
            # The rest counts only towards the sum of all bins.
            rest = tl.sum(tl.where(added, 0, weights))
            tl.atomic_add(row_ptr + BINS - 1, rest, sem="relaxed")


@triton.jit
def plan_kernel(
    temperature_ptr, top_k_ptr, top_p_ptr, bins_ptr, plan_ptr, vocab_size, BINS: tl.constexpr
):  # fmt: skip
    """Find the bins that must be searched for each row's cutoff; -1 where there are none.

    The mass that top-k leaves is known except for the share of its own bin. So top-p may cut in any
    bin between those for the least and for the most that can be left: in one, or a few beside it.
    """
    row = tl.program_id(0).to(tl.int64)
    plan_ptr += row * PLAN
    temperature = tl.load(temperature_ptr + row)
    k, p = _filters(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab_size)
    none = tl.full([], -1, tl.int32)
    first, last, kth = none, none, none
    if (k > 0) | (p < 1):
        bins = tl.arange(0, BINS)
        masses = tl.load(bins_ptr + row * 2 * BINS + bins)
        counts = tl.load(bins_ptr + row * 2 * BINS + BINS + bins)
        limit = tl.sum((tl.cumsum(counts) < k).to(tl.int32))
        limit = tl.where(k > 0, limit, BINS)
        kth = tl.where(limit < BINS, limit, -1)
        first, last = kth, kth
        if p < 1:
            least = tl.sum(tl.where(bins < limit, masses, 0))
            most = tl.sum(tl.where(bins <= limit, masses, 0))
            reached = tl.cumsum(masses).to(tl.float64)
            share = p.to(tl.float64)
            first = tl.sum((reached < share * least.to(tl.float64)).to(tl.int32))
            last = tl.sum((reached < share * most.to(tl.float64)).to(tl.int32))
        # Where top-k cuts nothing, all the mass stays, listed or not.
        is_listed = (bins >= first) & (bins <= last)
        stays = (bins < limit) & ((is_listed == 0) | (kth < 0))
        tl.store(plan_ptr + 3, tl.sum(tl.where(stays, counts, 0)))
        tl.store(plan_ptr + 4, tl.sum(tl.where(bins < first, masses, 0)))
        tl.store(plan_ptr + 5, tl.sum(tl.where(stays, masses, 0)))
    tl.store(plan_ptr, first.to(tl.int64))
    tl.store(plan_ptr + 1, last.to(tl.int64))
    tl.store(plan_ptr + 2, kth.to(tl.int64))
    tl.store(plan_ptr + 6, tl.full([], 0, tl.int64))


@triton.jit
def list_kernel(
    logits_ptr, maxima_ptr, temperature_ptr, plan_ptr, list_ptr,
    vocab_size, row_stride, column_stride,
    TILE: tl.constexpr, SPLITS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """List a tile's tokens of the bins that plan_kernel found."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    plan_ptr += row * PLAN
    first, last = tl.load(plan_ptr), tl.load(plan_ptr + 1)
    kth = tl.load(plan_ptr + 2)
    lowest = tl.maximum(last, kth)
    if lowest < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    splits = tl.cdiv(vocab_size, TILE)
    offsets = tl.arange(0, SPLITS)
    maxima_mask = offsets < splits
    maxima = tl.load(maxima_ptr + row * splits + offsets, mask=maxima_mask, other=NOTHING)
    own = tl.load(maxima_ptr + row * splits + split)
    largest = value(tl.max(maxima))
    if _bin(scaled(value(own), largest, temperature), BINS) > lowest:
        return
    ids = split * TILE + tl.arange(0, TILE)
    logit_ptrs = logits_ptr + row * row_stride + ids * column_stride
    x = numbers(tl.load(logit_ptrs, mask=ids < vocab_size, other=float("-inf")))
    bins = _bin(scaled(x, largest, temperature), BINS)
    listed = ((bins >= first) & (bins <= last)) | (bins == kth)
    listed = listed & (ids < vocab_size)
    count = tl.sum(listed.to(tl.int32))
    if count > 0:
        start = tl.atomic_add(plan_ptr + 6, count.to(tl.int64), sem="relaxed")
        slots = start + tl.cumsum(listed.to(tl.int32)) - 1
        tl.store(list_ptr + row * vocab_size + slots, ids, mask=listed)
