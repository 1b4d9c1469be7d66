"""The Triton kernel of one token's attention; cuda.py launches it.

The filled slots of a row and key/value head are cut into at most SPLITS parts, one a program
(flash decoding, https://pytorch.org/blog/flash-decoding/). How they are cut depends on the row's
position alone: not on its company, and no launch on what a position is. Programs without a part
leave at once. The last to come of FAN programs adds their parts up, and the last of those who did
so adds up what they have.

Names: query head g of the HEADS that share a key/value head; slot s; head elements i, or the
first and second half of them, which rotation pairs (x1, x2).
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.dependent_launch import prefetch, wait
from tokenloop.models.kernels.linear import arrive, dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_halves(ptr, i, HALF: tl.constexpr):
    return tl.load(ptr + i).to(tl.float32), tl.load(ptr + HALF + i).to(tl.float32)


@triton.jit
def normed(x1, x2, w1, w2, eps):
    """RMSNorm of rows in halves [..., HALF]."""
    axis: tl.constexpr = len(x1.shape) - 1
    mean = tl.sum(x1 * x1 + x2 * x2, axis, keep_dims=True) / (2 * x1.shape[axis])
    scale = 1 / tl.sqrt_rn(mean + eps)
    return x1 * scale * w1, x2 * scale * w2


@triton.jit
def rotated(x1, x2, cos, sin, dtype: tl.constexpr):
    return (x1 * cos - x2 * sin).to(dtype), (x2 * cos + x1 * sin).to(dtype)


@triton.jit
def merged(
    acc_ptr, max_ptr, sum_ptr, first, step, count, h, whole,
    MOST: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """acc [h, whole], max [h] and sum [h] of parts first, first + step, ...: `count` of them, at
    most MOST."""
    # Written by other programs: not to be read from this processor's own cache.
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
    out_ptr, acc_ptr, max_ptr, sum_ptr, counter_ptr, acc, largest, total, split, active, pair, g,
    whole, HEADS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, FAN: tl.constexpr,
    PARTS: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Store a part. The last of FAN parts to come adds them up, the last of those their sums."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = pair * SPLITS
    entry = (first + split) * STORED + g
    store_part(acc_ptr, max_ptr, sum_ptr, entry, g < STORED, whole, acc, largest, total, SIZE)
    group = split // FAN
    groups = tl.cdiv(active, FAN)
    members = tl.minimum(FAN, active - group * FAN)
    counter_ptr += pair * (SPLITS // FAN + 1)
    if arrive(counter_ptr + 1 + group, members):
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
            # In place of the group's first part, which has been read.
            place = (first + group * FAN) * STORED + h
            tl.debug_barrier()
            store_part(
                acc_ptr, max_ptr, sum_ptr, place, h < STORED, whole, sums, peaks, totals, SIZE
            )
            if arrive(counter_ptr, groups):
                sums, peaks, totals = merged(
                    acc_ptr, max_ptr, sum_ptr, first, FAN, groups, h, whole,
                    SPLITS // FAN, PARTS, STORED, SIZE,
                )  # fmt: skip
                tl.store(out_ptrs, (sums / totals[:, None]).to(dtype), mask=present)


@triton.jit
def attend_part(
    split, size, filled, active, slot, pair, q1, q2, new_k1, new_k2, new_v, cos, sin,
    k_weight1, k_weight2, k_ptr, v_ptr, out_ptr, acc_ptr, max_ptr, sum_ptr, counter_ptr,
    scale: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr,
    K_NORM: tl.constexpr, VALUE_NORM: tl.constexpr, KV: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, SPLITS: tl.constexpr, FAN: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a row and key/value head to part `split` of its slots, and, if it is the last
    part to come, what is left to do."""
    SIZE: tl.constexpr = 2 * HALF
    stride: tl.constexpr = KV * SIZE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    i = tl.arange(0, HALF)
    whole = tl.arange(0, SIZE)
    g = tl.arange(0, BLOCK_G)
    # Of exp2.
    unit = scale * LOG2_E
    begin = split * size
    end = tl.minimum(begin + size, filled)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, SIZE], tl.float32)
    if (slot >= begin) & (slot < end):
        # The new token is this program's, and is not read back from the caches.
        k1, k2 = new_k1, new_k2
        if K_NORM:
            k1, k2 = normed(k1, k2, offset + k_weight1, offset + k_weight2, eps)
        k1, k2 = rotated(k1, k2, cos, sin, dtype)
        v = new_v
        if VALUE_NORM:
            wide = v.to(tl.float32)
            mean = tl.sum(wide * wide, 0) / SIZE
            v = (wide * (1 / tl.sqrt_rn(mean + eps))).to(dtype)
        new = slot.to(tl.int64) * stride
        tl.store(k_ptr + new + i, k1)
        tl.store(k_ptr + new + HALF + i, k2)
        tl.store(v_ptr + new + whole, v)
        products = q1.to(tl.float32) * k1.to(tl.float32)
        products += q2.to(tl.float32) * k2.to(tl.float32)
        largest = tl.sum(products, 1) * unit
        total += 1.0
        acc += v.to(tl.float32)[None, :]

    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        s = start + tl.arange(0, BLOCK_S)
        seen = (s < end) & (s != slot)
        rows = s.to(tl.int64) * stride
        k_offsets = rows[None, :] + i[:, None]
        keys1 = tl.load(k_ptr + k_offsets, mask=seen[None, :], other=0.0)
        keys2 = tl.load(k_ptr + HALF + k_offsets, mask=seen[None, :], other=0.0)
        scores = dot(q1, keys1, tl.zeros([BLOCK_G, BLOCK_S], tl.float32))
        scores = dot(q2, keys2, scores)
        scores = tl.where(seen[None, :], scores * unit, float("-inf"))
        # Each block has a slot that is seen, or comes after the new token: none is -inf alone.
        greater = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - greater[:, None])
        shrink = tl.exp2(largest - greater)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v_ptr + rows[:, None] + whole[None, :], mask=seen[:, None], other=0.0)
        acc = dot(weights.to(dtype), values, acc * shrink[:, None])
        largest = greater

    if active == 1:
        out_offsets = g[:, None] * SIZE + whole[None, :]
        tl.store(out_ptr + out_offsets, (acc / total[:, None]).to(dtype), mask=(g < HEADS)[:, None])
    else:
        combine(
            out_ptr, acc_ptr, max_ptr, sum_ptr, counter_ptr, acc, largest, total, split,
            active, pair, g, whole, HEADS, SIZE, SPLITS, FAN, PARTS, STORED,
        )  # fmt: skip


@triton.jit
def parts_of(position, slots, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, LEAST: tl.constexpr):
    """How many slots are filled at a position, and how many a part has."""
    # Remainders of 64 bits are slow.
    filled = tl.minimum(position.to(tl.int32) + 1, slots)
    return filled, tl.maximum(tl.cdiv(tl.cdiv(filled, BLOCK_S), SPLITS), LEAST) * BLOCK_S


@triton.jit
def attend_kernel(
    qkv_ptr, position_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, inv_freq_ptr,
    out_ptr, acc_ptr, max_ptr, sum_ptr, counter_ptr,
    slots, scale: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr,
    KV: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    VALUE_NORM: tl.constexpr, VALUES_ARE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr, FAN: tl.constexpr, BLOCK_S: tl.constexpr, LEAST: tl.constexpr,
    ONE_PART: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the slots of a row and key/value head, or not ONE_PART but as many as there are
    for each of the programs.

    A part has at least LEAST blocks of slots. BLOCK_G is HEADS padded for a matrix product, STORED
    to a power of two; PARTS are added up at once. Partial results: acc [B, KV, SPLITS, STORED, Dh],
    max and sum [B, KV, SPLITS, STORED]; counters [B, KV, 1 + SPLITS / FAN].
    """
    SIZE: tl.constexpr = 2 * HALF
    LINES: tl.constexpr = SIZE // 64 if SIZE > 64 else 1
    WIDTH: tl.constexpr = (HEADS + (1 if VALUES_ARE_KEYS else 2)) * KV * SIZE
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    # The programs that have nothing to do come last.
    kv, row, first = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, HALF)
    whole = tl.arange(0, SIZE)
    g = tl.arange(0, BLOCK_G)
    stride: tl.constexpr = KV * SIZE
    head = (row.to(tl.int64) * slots * KV + kv) * SIZE
    k_ptr += head
    v_ptr += head

    # 1. What no kernel that overlaps writes: the position is there before the first of them begins,
    # and of the slots a step writes but the new one, here.
    position = tl.load(position_ptr + row).to(tl.int32)
    filled, size = parts_of(position, slots, SPLITS, BLOCK_S, LEAST)
    active = tl.cdiv(filled, size)
    if first >= active:
        return
    ahead = first * size + tl.arange(0, 2 * BLOCK_S)
    ahead = tl.minimum(ahead, tl.minimum(first * size + size, filled) - 1).to(tl.int64) * stride
    # A line of 128 bytes is 64 elements.
    lines = ahead[:, None] + 64 * tl.arange(0, LINES)[None, :]
    asked = tl.max(prefetch(k_ptr + lines) + prefetch(v_ptr + lines))
    inv_freq = tl.load(inv_freq_ptr + i)
    if q_norm_ptr is not None:
        q_weight1, q_weight2 = load_halves(q_norm_ptr, i, HALF)
    k_weight1, k_weight2 = inv_freq, inv_freq  # not used
    if k_norm_ptr is not None:
        k_weight1, k_weight2 = load_halves(k_norm_ptr, i, HALF)
    slot = position % slots
    angle = position.to(tl.float32) * inv_freq
    cos, sin = tl.cos(angle), tl.sin(angle)

    # 2. The projections.
    qkv_ptr += row * WIDTH + wait(asked)
    q_offsets = (kv * HEADS + g)[:, None] * SIZE + i[None, :]
    present = (g < HEADS)[:, None]
    q1 = tl.load(qkv_ptr + q_offsets, mask=present, other=0.0)
    q2 = tl.load(qkv_ptr + HALF + q_offsets, mask=present, other=0.0)
    key_ptr = qkv_ptr + (HEADS * KV + kv) * SIZE
    value_ptr = key_ptr
    if not VALUES_ARE_KEYS:
        value_ptr = key_ptr + KV * SIZE
    new_k1, new_k2 = load_halves(key_ptr, i, HALF)
    new_v = tl.load(value_ptr + whole)
    q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
    if q_norm_ptr is not None:
        q1, q2 = normed(q1, q2, offset + q_weight1, offset + q_weight2, eps)
    q1, q2 = rotated(q1, q2, cos[None, :], sin[None, :], dtype)

    pair = row * KV + kv
    out_ptr += pair * HEADS * SIZE
    if ONE_PART:
        attend_part(
            first, size, filled, active, slot, pair, q1, q2, new_k1, new_k2, new_v, cos, sin,
            k_weight1, k_weight2, k_ptr, v_ptr, out_ptr, acc_ptr, max_ptr, sum_ptr, counter_ptr,
            scale, eps, offset, k_norm_ptr is not None, VALUE_NORM, KV, HEADS, HALF, SPLITS, FAN,
            BLOCK_S, BLOCK_G, PARTS, STORED, STAGES,
        )  # fmt: skip
    else:
        for split in range(first, active, tl.num_programs(2)):
            attend_part(
                split, size, filled, active, slot, pair, q1, q2, new_k1, new_k2, new_v, cos,
                sin, k_weight1, k_weight2, k_ptr, v_ptr, out_ptr, acc_ptr, max_ptr, sum_ptr,
                counter_ptr, scale, eps, offset, k_norm_ptr is not None, VALUE_NORM, KV, HEADS,
                HALF, SPLITS, FAN, BLOCK_S, BLOCK_G, PARTS, STORED, STAGES,
            )  # fmt: skip
