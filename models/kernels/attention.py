"""The Triton kernel of one token's attention; cuda.py launches it.

The filled slots of a row and key/value head are cut into at most SPLITS parts, one a program
(flash decoding, https://pytorch.org/blog/flash-decoding/). How they are cut depends on the row's
position alone: not on its company, and no launch on what a position is. Programs without a part
leave at once; the last to come adds up the parts.

Names: query head g of the HEADS that share a key/value head; slot s; head elements i, or the
first and second half of them, which rotation pairs (x1, x2).
"""

import triton
import triton.language as tl

from models.kernels.linear import arrive, dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def normed(x1, x2, weight_ptr, i, eps, offset, HALF: tl.constexpr):
    """RMSNorm of rows in halves [..., HALF]; unchanged without a weight."""
    if weight_ptr is None:
        return x1, x2
    w1 = offset + tl.load(weight_ptr + i).to(tl.float32)
    w2 = offset + tl.load(weight_ptr + HALF + i).to(tl.float32)
    axis: tl.constexpr = len(x1.shape) - 1
    mean = tl.sum(x1 * x1 + x2 * x2, axis, keep_dims=True) / (2 * HALF)
    scale = 1 / tl.sqrt_rn(mean + eps)
    return x1 * scale * w1, x2 * scale * w2


@triton.jit
def rotated(x1, x2, cos, sin, dtype: tl.constexpr):
    return (x1 * cos - x2 * sin).to(dtype), (x2 * cos + x1 * sin).to(dtype)


@triton.jit
def load_halves(ptr, i, HALF: tl.constexpr):
    return tl.load(ptr + i).to(tl.float32), tl.load(ptr + HALF + i).to(tl.float32)


@triton.jit
def attend_kernel(
    qkv_ptr, position_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, inv_freq_ptr,
    out_ptr, acc_ptr, max_ptr, sum_ptr, counter_ptr,
    slots, scale: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr,
    KV: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    VALUE_NORM: tl.constexpr, VALUES_ARE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr, STORED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the slots of a row and key/value head.

    BLOCK_G is HEADS padded for a matrix product, STORED to a power of two; PARTS are added up at
    once. Partial results: acc [B, KV, SPLITS, STORED, Dh], max and sum [B, KV, SPLITS, STORED].
    """
    SIZE: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = (HEADS + (1 if VALUES_ARE_KEYS else 2)) * KV * SIZE
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    split, kv, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(position_ptr + row)
    slot = (position % slots).to(tl.int32)
    filled = tl.minimum(position + 1, slots).to(tl.int32)
    size = tl.cdiv(tl.cdiv(filled, BLOCK_S), SPLITS) * BLOCK_S
    active = tl.cdiv(filled, size)
    if split >= active:
        return
    begin = split * size
    end = tl.minimum(begin + size, filled)

    qkv_ptr += row * WIDTH
    i = tl.arange(0, HALF)
    whole = tl.arange(0, SIZE)
    g = tl.arange(0, BLOCK_G)
    angle = position.to(tl.float32) * tl.load(inv_freq_ptr + i)
    cos, sin = tl.cos(angle), tl.sin(angle)
    q_offsets = (kv * HEADS + g)[:, None] * SIZE + i[None, :]
    present = (g < HEADS)[:, None]
    q1 = tl.load(qkv_ptr + q_offsets, mask=present, other=0.0).to(tl.float32)
    q2 = tl.load(qkv_ptr + HALF + q_offsets, mask=present, other=0.0).to(tl.float32)
    q1, q2 = normed(q1, q2, q_norm_ptr, i, eps, offset, HALF)
    q1, q2 = rotated(q1, q2, cos[None, :], sin[None, :], dtype)

    # In units of exp2.
    scale = scale * LOG2_E
    head = (row.to(tl.int64) * slots * KV + kv) * SIZE
    stride: tl.constexpr = KV * SIZE
    k_ptr += head
    v_ptr += head
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, SIZE], tl.float32)
    if (slot >= begin) & (slot < end):
        # The new token is this program's, and is not read back from the caches.
        key_ptr = qkv_ptr + (HEADS * KV + kv) * SIZE
        value_ptr = key_ptr
        if not VALUES_ARE_KEYS:
            value_ptr = key_ptr + KV * SIZE
        k1, k2 = load_halves(key_ptr, i, HALF)
        k1, k2 = normed(k1, k2, k_norm_ptr, i, eps, offset, HALF)
        k1, k2 = rotated(k1, k2, cos, sin, dtype)
        v = tl.load(value_ptr + whole)
        if VALUE_NORM:
            wide = v.to(tl.float32)
            mean = tl.sum(wide * wide, 0) / SIZE
            v = (wide * (1 / tl.sqrt_rn(mean + eps))).to(dtype)
        new = slot.to(tl.int64) * stride
        tl.store(k_ptr + new + i, k1)
        tl.store(k_ptr + new + HALF + i, k2)
        tl.store(v_ptr + new + whole, v)
        products = q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32)
        largest = tl.sum(products, 1) * scale
        total += 1.0
        acc += v.to(tl.float32)[None, :]

    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        s = start + tl.arange(0, BLOCK_S)
        seen = (s < end) & (s != slot)
        rows = s.to(tl.int64) * stride
        k_offsets = rows[None, :] + i[:, None]
        k1 = tl.load(k_ptr + k_offsets, mask=seen[None, :], other=0.0)
        k2 = tl.load(k_ptr + HALF + k_offsets, mask=seen[None, :], other=0.0)
        scores = dot(q1, k1, tl.zeros([BLOCK_G, BLOCK_S], tl.float32))
        scores = dot(q2, k2, scores)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        # Each block has a slot that is seen, or comes after the new token: none is -inf alone.
        greater = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - greater[:, None])
        shrink = tl.exp2(largest - greater)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + rows[:, None] + whole[None, :], mask=seen[:, None], other=0.0)
        acc = dot(weights.to(dtype), v, acc * shrink[:, None])
        largest = greater

    out_ptr += (row * KV + kv) * HEADS * SIZE
    if active == 1:
        out_offsets = g[:, None] * SIZE + whole[None, :]
        tl.store(out_ptr + out_offsets, (acc / total[:, None]).to(dtype), mask=present)
        return
    pair = row * KV + kv
    entry = (pair * SPLITS + split) * STORED + g
    stored = g < STORED
    tl.store(max_ptr + entry, largest, mask=stored)
    tl.store(sum_ptr + entry, total, mask=stored)
    tl.store(
        acc_ptr + entry.to(tl.int64)[:, None] * SIZE + whole[None, :], acc, mask=stored[:, None]
    )
    if not arrive(counter_ptr + pair, active):
        return

    # Written by other programs: not to be read from this processor's own cache.
    h = tl.arange(0, STORED)
    p = tl.arange(0, SPLITS)
    entries = (pair * SPLITS + p)[:, None] * STORED + h[None, :]
    known = (p < active)[:, None]
    maxima = tl.load(max_ptr + entries, mask=known, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(sum_ptr + entries, mask=known, other=0.0, cache_modifier=".cg")
    overall = tl.max(maxima, 0)
    denominator = tl.sum(sums * tl.exp2(maxima - overall[None, :]), 0)
    result = tl.zeros([STORED, SIZE], tl.float32)
    for start in range(0, active, PARTS):
        part = start + tl.arange(0, PARTS)
        places = (pair * SPLITS + part)[:, None] * STORED + h[None, :]
        held = (part < active)[:, None]
        peaks = tl.load(max_ptr + places, mask=held, other=float("-inf"), cache_modifier=".cg")
        share = tl.exp2(peaks - overall[None, :])
        parts = tl.load(
            acc_ptr + places.to(tl.int64)[:, :, None] * SIZE + whole[None, None, :],
            mask=held[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        result += tl.sum(parts * share[:, :, None], 0)
    out_offsets = h[:, None] * SIZE + whole[None, :]
    tl.store(
        out_ptr + out_offsets, (result / denominator[:, None]).to(dtype), mask=(h < HEADS)[:, None]
    )
