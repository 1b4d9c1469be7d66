"""How programs that attend to parts of a row's slots add up what they have.

The last of FAN programs to arrive adds up their parts, and the last of those who did so adds up
their sums. A part is acc [g, Dh], the largest score [g] and the sum of weights [g], for query heads
g. Partial results: acc [B, KV, SPLITS, STORED, Dh], max and sum [B, KV, SPLITS, STORED]; semaphores
[B, KV, 1 + SPLITS / FAN].
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.semaphores import arrive


@triton.jit
def merged(
    acc_ptr, max_ptr, sum_ptr, first, step, count, h, whole,
    MOST: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """acc [h, whole], max [h] and sum [h] of `count` parts, at most MOST: first, first + step, and
    so on."""
    # Other programs wrote them: they must not come from this processor's own cache.
    p = tl.arange(0, MOST)
    entries = (first + p * step)[:, None] * STORED + h[None, :]
    known = (p < count)[:, None]
    maxima = tl.load(max_ptr + entries, mask=known, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(sum_ptr + entries, mask=known, other=0.0, cache_modifier=".cg")
    largest = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp2(maxima - largest[None, :]), 0)
    acc = tl.zeros([STORED, SIZE], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        places = (first + part * step)[:, None] * STORED + h[None, :]
        held = (part < count)[:, None]
        peaks = tl.load(max_ptr + places, mask=held, other=float("-inf"), cache_modifier=".cg")
        parts = tl.load(
            acc_ptr + places.to(tl.int64)[:, :, None] * SIZE + whole[None, None, :],
            mask=held[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += tl.sum(parts * tl.exp2(peaks - largest[None, :])[:, :, None], 0)
    return acc, largest, total


@triton.jit
def store_part(acc_ptr, max_ptr, sum_ptr, entry, mask, whole, acc, largest, total, SIZE):
    tl.store(max_ptr + entry, largest, mask=mask)
    tl.store(sum_ptr + entry, total, mask=mask)
    offsets = entry.to(tl.int64)[:, None] * SIZE + whole[None, :]
    tl.store(acc_ptr + offsets, acc, mask=mask[:, None])


@triton.jit
def combine(
    out_ptr, acc_ptr, max_ptr, sum_ptr, semaphore_ptr, acc, largest, total, split, active, pair, g,
    whole, HEADS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, FAN: tl.constexpr,
    PARTS: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Store a part, and add up what there is to add up."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = pair * SPLITS
    entry = (first + split) * STORED + g
    store_part(acc_ptr, max_ptr, sum_ptr, entry, g < STORED, whole, acc, largest, total, SIZE)
    group = split // FAN
    groups = tl.cdiv(active, FAN)
    members = tl.minimum(FAN, active - group * FAN)
    semaphore_ptr += pair * (SPLITS // FAN + 1)
    if arrive(semaphore_ptr + 1 + group, members):
        h = tl.arange(0, STORED)
        sums, peaks, totals = merged(
            acc_ptr, max_ptr, sum_ptr, first + group * FAN, 1, members, h, whole,
            FAN, PARTS, STORED, SIZE,
        )  # fmt: skip
        out_ptrs = out_ptr + h[:, None] * SIZE + whole[None, :]
        present = (h < HEADS)[:, None]
        if groups == 1:
            tl.store(out_ptrs, (sums / totals[:, None]).to(dtype), mask=present)
        else:
            # It replaces the group's first part, which has been read.
            place = (first + group * FAN) * STORED + h
            tl.debug_barrier()
            store_part(
                acc_ptr, max_ptr, sum_ptr, place, h < STORED, whole, sums, peaks, totals, SIZE
            )
            if arrive(semaphore_ptr, groups):
                sums, peaks, totals = merged(
                    acc_ptr, max_ptr, sum_ptr, first, FAN, groups, h, whole,
                    SPLITS // FAN, PARTS, STORED, SIZE,
                )  # fmt: skip
                tl.store(out_ptrs, (sums / totals[:, None]).to(dtype), mask=present)
