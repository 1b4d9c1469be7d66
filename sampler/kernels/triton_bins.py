"""What finds where to look for the cutoff of top-k and top-p in a row, in triton_filter.py.

The whole grid adds a row up in bins of equal width, by scaled logit from 0 down to LOWEST, where
weights end (radix select, with values for digits). Then one program sees in which bins the row is
cut, and the grid lists those bins' tokens for triton_cutoff.py. Tokens below LOWEST have no mass
and cannot win a row, so a top-k that reaches down to them cuts nothing.

    sums  int64 [B, 2 * BINS + 16]: masses, counts, the plan, two semaphores and two counters
    plan  the first and the last bin where top-p may cut; the bin where top-k cuts; of what is above
          in bins that are not listed: tokens for top-k, mass for top-p, and mass of all that stays;
          the number of listed tokens; and 1 where the row has its token already. The row's cutoff
          takes the place of the fourth of these.
    parts int32 [B, splits * PARTS]: those parts, by number, that a launch must look at
    list  int32 [B, V]: ids, in the order of arrival; no result depends on that order
"""

import triton
import triton.language as tl

from tokenloop.sampler.kernels.triton_exact import LEAST_TEMPERATURE, LOWEST, log, mass, scaled
from tokenloop.sampler.kernels.triton_tiles import numbers
from tokenloop.sampler.kernels.triton_token import four, part_counters

# Words of the plan, and where the semaphores come after it.
CUTOFF, DONE, SEMAPHORES = tl.constexpr(3), tl.constexpr(7), tl.constexpr(8)
# The least finite float32: nothing below it has any mass.
LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def filters(temperature, k, p, vocab_size):
    """A row's (k, p): 0 and 1 where they remove nothing."""
    k = tl.where((temperature > 0) & (k < vocab_size), k, 0)
    return k, tl.where(temperature > 0, p, 1.0)


@triton.jit
def end_of_mass(largest, temperature):
    """A finite float32, or `largest` where that is infinite, below which no token has any mass."""
    # Weights end 27 temperatures below. One more is more than rounding can lose.
    low = tl.maximum(largest - 28 * tl.maximum(temperature, LEAST_TEMPERATURE), LEAST)
    return tl.where(tl.abs(largest) < float("inf"), low, largest)


@triton.jit
def narrowed(x, low, high, k, most):
    """(a float32 of at least `low`, how many of x are not below it): at least k of them unless
    there are less from `low` on, and at most `most`, of k and more, unless they tie. `high` is the
    largest of x."""
    count = tl.sum(tl.reshape(x >= low, [x.numel]).to(tl.int32))
    middle = low * 0.5 + high * 0.5
    while (count > most) & (middle > low) & (middle < high):
        reached = tl.sum(tl.reshape(x >= middle, [x.numel]).to(tl.int32))
        if reached >= k:
            low, count = middle, reached
        else:
            high = middle
        middle = low * 0.5 + high * 0.5
    return low, count


@triton.jit
def bin_of(s, BINS: tl.constexpr):
    """The bin of scaled logits, int32: it grows as they fall, and is BINS below LOWEST."""
    bins = (tl.maximum(s, LOWEST) * (BINS / LOWEST)).to(tl.int32)
    return tl.where(s >= LOWEST, tl.minimum(bins, BINS - 1), BINS)


@triton.jit
def list_parts(parts_ptr, is_listed, count, TOPS: tl.constexpr):
    """Write the numbers of those of the row's `count` parts that are listed to parts int32, in
    their order, and give how many there are. Several programs may do so at once: they write the
    same."""
    # In a row without numbers what is past its end is not below the rest.
    is_listed = is_listed & (tl.arange(0, TOPS) < count)
    slots = tl.cumsum(is_listed.to(tl.int32)) - 1
    tl.store(parts_ptr + slots, tl.arange(0, TOPS), mask=is_listed)
    tl.debug_barrier()
    return tl.sum(is_listed.to(tl.int32))


@triton.jit
def load_parts(
    row_ptr, parts_ptr, start, count, vocab_size, column_stride, AT_ONCE: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(logits without NaN [N, 4], their ids, which of them count, Philox counters [N], the parts)
    of AT_ONCE listed parts, from the number `start` of `count` on; -1 is no part."""
    places = start + tl.arange(0, AT_ONCE)
    parts = tl.load(parts_ptr + places, mask=places < count, other=-1)
    SIZE: tl.constexpr = TILE // PARTS // 4
    counters = part_counters(tl.maximum(parts, 0), vocab_size, TILE, PARTS, STRIDE, WHOLE)
    # The last tile's tokens that are in the one before, too, do not count.
    begin = tl.where(parts < 0, vocab_size, parts // PARTS * TILE)
    begin = tl.reshape(tl.broadcast_to(begin[:, None], [AT_ONCE, SIZE]), [AT_ONCE * SIZE])
    ids = four(counters)
    is_own = (ids >= begin[:, None]) & (ids < vocab_size)
    x = tl.load(row_ptr + ids * column_stride, mask=is_own, other=float("-inf"))
    return numbers(x), ids, is_own, counters, parts


@triton.jit
def floor_of_bins(tops, largest, temperature, k, p, vocab_size):
    """The scaled logit from which on tokens are added to the bins one by one, all that the cutoff
    can be among: they are few.

    With a top-k that is at most about the k-th largest of the parts' largest logits. With top-p
    alone what lies ln(V / (1 - p)) below the top weighs less than 1 - p.
    """
    floor = tl.full([], LOWEST, tl.float32)
    if k > 0:
        low = narrowed(tops, end_of_mass(largest, temperature), largest, k, k + k // 4)[0]
        floor = tl.maximum(floor, scaled(low, largest, temperature))
    else:
        # 0.1 is far more than rounding can lose.
        depth = log(tl.full([], vocab_size, tl.float32)) - log(1 - p) + 0.1
        floor = tl.maximum(floor, -depth)
    return floor


@triton.jit
def add_to_bins(
    row_ptr, tops, parts_ptr, sums_ptr, program, programs, largest, temperature, k, p, count,
    vocab_size, column_stride, BINS: tl.constexpr, TOPS: tl.constexpr, AT_ONCE: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add a program's share of a row's parts to the row's bins: counts for top-k, masses for
    top-p."""
    floor = floor_of_bins(tops, largest, temperature, k, p, vocab_size)
    # Of top-p alone every mass counts towards the sum.
    least = floor if k > 0 else tl.full([], LOWEST, tl.float32)
    is_needed = scaled(tops, largest, temperature) >= least
    needed = list_parts(parts_ptr, is_needed, count, TOPS)
    rest = tl.zeros([AT_ONCE * (TILE // PARTS // 4), 4], tl.int64)
    for start in range(program * AT_ONCE, needed, programs * AT_ONCE):
        x, ids, is_own, _, _ = load_parts(
            row_ptr, parts_ptr, start, needed, vocab_size, column_stride, AT_ONCE,
            TILE, PARTS, STRIDE, WHOLE,
        )  # fmt: skip
        s = scaled(x, largest, temperature)
        added = (s >= floor) & is_own
        bin_ptrs = sums_ptr + bin_of(s, BINS)
        if k > 0:
            tl.atomic_add(bin_ptrs + BINS, added.to(tl.int64), mask=added, sem="relaxed")
        if p < 1:
            weights = tl.where(is_own, mass(x, largest, temperature), 0)
            tl.atomic_add(bin_ptrs, weights, mask=added, sem="relaxed")
            if k == 0:
                rest += tl.where(added, 0, weights)
    if k == 0:
        tl.atomic_add(sums_ptr + BINS - 1, tl.sum(tl.reshape(rest, [rest.numel])), sem="relaxed")


@triton.jit
def make_plan(sums_ptr, k, p, BINS: tl.constexpr):
    """Find the bins that must be searched for the row's cutoff; -1 where there are none.

    The mass that top-k leaves is known except for the share of its own bin. So top-p may cut in any
    bin between those for the least and for the most that can be left: in one, or a few beside it.
    """
    plan_ptr = sums_ptr + 2 * BINS
    bins = tl.arange(0, BINS)
    masses = tl.load(sums_ptr + bins)
    counts = tl.load(sums_ptr + BINS + bins)
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
    tl.store(plan_ptr, first.to(tl.int64))
    tl.store(plan_ptr + 1, last.to(tl.int64))
    tl.store(plan_ptr + 2, kth.to(tl.int64))
    tl.store(plan_ptr + 3, tl.sum(tl.where(stays, counts, 0)))
    tl.store(plan_ptr + 4, tl.sum(tl.where(bins < first, masses, 0)))
    tl.store(plan_ptr + 5, tl.sum(tl.where(stays, masses, 0)))


@triton.jit
def plan_everything(sums_ptr, BINS: tl.constexpr):
    """The plan of a row that has a top-k and is not in bins: all is listed."""
    plan_ptr = sums_ptr + 2 * BINS
    tl.store(plan_ptr + 1, tl.full([], BINS - 1, tl.int64))


@triton.jit
def add_to_list(list_ptr, plan_ptr, ids, listed):
    """Add the ids that are listed, in any shape, to the row's list."""
    listed = tl.reshape(listed, [listed.numel])
    count = tl.sum(listed.to(tl.int32))
    if count > 0:
        start = tl.atomic_add(plan_ptr + 6, count.to(tl.int64), sem="relaxed")
        slots = start + tl.cumsum(listed.to(tl.int32)) - 1
        tl.store(list_ptr + slots, tl.reshape(ids, [ids.numel]), mask=listed)
