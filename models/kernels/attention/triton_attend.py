"""The Triton kernel of one token's attention.

The filled slots of a row and key/value head are cut into at most SPLITS parts, one a program
(flash decoding, https://pytorch.org/blog/flash-decoding/). How they are cut depends on the row's
position alone, not on the other rows, and no launch depends on a position. Programs without a part
leave at once. triton_merge.py adds the parts up.

Names: query head g of the HEADS that share a key/value head; slot s; head elements i, or the
first and second half of them, which rotation pairs (x1, x2).
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.attention.triton_merge import combine
from tokenloop.models.kernels.launch.dependent_launch import prefetch, wait, waits
from tokenloop.models.kernels.launch.dot import dot

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
def turned(angle, inv_freq, attention_factor: tl.constexpr):
    """cos and sin of rotary angles, times attention_factor where a pair is rotated."""
    cos, sin = tl.cos(angle), tl.sin(angle)
    if attention_factor != 1.0:
        # The others have the angle 0, and keep their length.
        cos = tl.where(inv_freq != 0, cos * attention_factor, cos)
        sin *= attention_factor
    return cos, sin


@triton.jit
def rotated(x1, x2, cos, sin, dtype: tl.constexpr):
    return (x1 * cos - x2 * sin).to(dtype), (x2 * cos + x1 * sin).to(dtype)


@triton.jit
def attend_part(
    split, size, filled, active, slot, pair, q1, q2, new_k1, new_k2, new_v, cos, sin,
    k_weight1, k_weight2, sink, k_ptr, v_ptr, draft_k_ptr, draft_v_ptr, row, slots,
    out_ptr, acc_ptr, max_ptr, sum_ptr, semaphore_ptr,
    scale: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr,
    K_NORM: tl.constexpr, SINKS: tl.constexpr, VALUE_NORM: tl.constexpr, STORES: tl.constexpr,
    KV: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, FAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, STAGES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of a row and key/value head to part `split` of its slots; the last part to arrive
    does what is left to do."""
    SIZE: tl.constexpr = 2 * HALF
    stride: tl.constexpr = KV * SIZE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    i = tl.arange(0, HALF)
    whole = tl.arange(0, SIZE)
    g = tl.arange(0, BLOCK_G)
    # Scores are exponents of 2.
    unit = scale * LOG2_E
    begin = split * size
    end = tl.minimum(begin + size, filled)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, SIZE], tl.float32)
    # Without KEYS the token's own are in the caches, and are read with the others.
    if KEYS and ((slot >= begin) & (slot < end)):
        # The new token is this program's, and is not read back from the caches.
        k1, k2 = new_k1, new_k2
        if K_NORM:
            k1, k2 = normed(k1, k2, offset + k_weight1, offset + k_weight2, eps)
        k1, k2 = rotated(k1, k2, cos, sin, dtype)
        v = new_v
        if VALUE_NORM:
            v32 = v.to(tl.float32)
            mean = tl.sum(v32 * v32, 0) / SIZE
            v = (v32 * (1 / tl.sqrt_rn(mean + eps))).to(dtype)
        if STORES:
            new = slot.to(tl.int64) * stride
            tl.store(k_ptr + new + i, k1)
            tl.store(k_ptr + new + HALF + i, k2)
            tl.store(v_ptr + new + whole, v)
        products = q1.to(tl.float32) * k1.to(tl.float32)
        products += q2.to(tl.float32) * k2.to(tl.float32)
        largest = tl.sum(products, 1) * unit
        if SINKS:
            # The sink is among this part's scores, too. No value is its.
            score = largest
            largest = tl.maximum(score, sink * LOG2_E)
            weight = tl.exp2(score - largest)
            total += weight + tl.exp2(sink * LOG2_E - largest)
            acc += weight[:, None] * v.to(tl.float32)[None, :]
        else:
            total += 1.0
            acc += v.to(tl.float32)[None, :]

    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        s = start + tl.arange(0, BLOCK_S)
        seen = s < end
        if KEYS:
            seen = seen & (s != slot)
        rows = s.to(tl.int64) * stride
        k_offsets = rows[None, :] + i[:, None]
        if draft_k_ptr is None:
            keys1 = tl.load(k_ptr + k_offsets, mask=seen[None, :], other=0.0)
            keys2 = tl.load(k_ptr + HALF + k_offsets, mask=seen[None, :], other=0.0)
        else:
            # Row n of the drafts has what the slot of the n-th row will have.
            n = s - (slot - row)
            n = tl.where(n < 0, n + slots, n)
            n = tl.where(n >= slots, n - slots, n)
            is_draft = n < row
            drafts = n.to(tl.int64) * stride
            draft_offsets = drafts[None, :] + i[:, None]
            k_ptrs = tl.where(is_draft[None, :], draft_k_ptr + draft_offsets, k_ptr + k_offsets)
            keys1 = tl.load(k_ptrs, mask=seen[None, :], other=0.0)
            keys2 = tl.load(k_ptrs + HALF, mask=seen[None, :], other=0.0)
        scores = dot(q1, keys1, tl.zeros([BLOCK_G, BLOCK_S], tl.float32))
        scores = dot(q2, keys2, scores)
        scores = tl.where(seen[None, :], scores * unit, float("-inf"))
        # A block has a slot that is seen, or the new token came before it: `greater` is not -inf.
        greater = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - greater[:, None])
        shrink = tl.exp2(largest - greater)
        total = total * shrink + tl.sum(weights, 1)
        if draft_k_ptr is None:
            values = tl.load(v_ptr + rows[:, None] + whole[None, :], mask=seen[:, None], other=0.0)
        else:
            v_drafts = draft_v_ptr + drafts[:, None] + whole[None, :]
            v_ptrs = v_ptr + rows[:, None] + whole[None, :]
            v_ptrs = tl.where(is_draft[:, None], v_drafts, v_ptrs)
            values = tl.load(v_ptrs, mask=seen[:, None], other=0.0)
        acc = dot(weights.to(dtype), values, acc * shrink[:, None])
        largest = greater

    if active == 1:
        out_offsets = g[:, None] * SIZE + whole[None, :]
        tl.store(out_ptr + out_offsets, (acc / total[:, None]).to(dtype), mask=(g < HEADS)[:, None])
    else:
        combine(
            out_ptr, acc_ptr, max_ptr, sum_ptr, semaphore_ptr, acc, largest, total, split,
            active, pair, g, whole, HEADS, SIZE, SPLITS, FAN, PARTS, STORED,
        )  # fmt: skip


@triton.jit
def parts_of(position, slots, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, LEAST: tl.constexpr):
    """How many slots are filled at a position, and how many a part has."""
    # Remainders of 64 bits are slow.
    filled = tl.minimum(position.to(tl.int32) + 1, slots)
    return filled, tl.maximum(tl.cdiv(tl.cdiv(filled, BLOCK_S), SPLITS), LEAST) * BLOCK_S


@waits  # once it has asked for its first slots
@triton.jit
def attend_kernel(
    qkv_ptr, position_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, inv_freq_ptr, sinks_ptr,
    draft_k_ptr, draft_v_ptr, out_ptr, acc_ptr, max_ptr, sum_ptr, semaphore_ptr,
    slots, scale: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr,
    attention_factor: tl.constexpr,
    KV: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    VALUE_NORM: tl.constexpr, STORES: tl.constexpr, VALUES_ARE_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, FAN: tl.constexpr, BLOCK_S: tl.constexpr, LEAST: tl.constexpr,
    ONE_PART: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr,
    STAGES: tl.constexpr, KEYS: tl.constexpr = True,
):  # fmt: skip
    """One part of the slots of a row and key/value head; unless ONE_PART, a program takes as many
    as there are for each. Rows of projections are WIDTH apart. Without KEYS an earlier kernel has
    written the token's own key and value.

    A part has at least LEAST blocks of slots. BLOCK_G is HEADS padded for a matrix product, STORED
    is HEADS padded to a power of two. PARTS are added up at once.

    With drafts [B, KV, SIZE] all rows are of one sequence, at consecutive positions: what a row
    sees of the rows before it is there, and not in the cache, which is stored to if it STORES.
    """
    SIZE: tl.constexpr = 2 * HALF
    LINES: tl.constexpr = SIZE // 64 if SIZE > 64 else 1
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    # Programs that have nothing to do come last.
    kv, row, first = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, HALF)
    whole = tl.arange(0, SIZE)
    g = tl.arange(0, BLOCK_G)
    stride: tl.constexpr = KV * SIZE
    if draft_k_ptr is None:
        head = (row.to(tl.int64) * slots * KV + kv) * SIZE
    else:
        head = kv.to(tl.int64) * SIZE
    k_ptr += head
    v_ptr += head

    # 1. What no kernel that overlaps writes. The position is there before the first of them begins,
    # and a step writes no slot but the new one, which is written here. Without KEYS slots are only
    # asked for: L2 has what an earlier kernel writes.
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
    sink = inv_freq  # not used
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + kv * HEADS + g, mask=g < HEADS, other=0.0).to(tl.float32)
    slot = position % slots
    cos, sin = turned(position.to(tl.float32) * inv_freq, inv_freq, attention_factor)

    # 2. The projections.
    zero = wait(asked)
    qkv_ptr += row * WIDTH + zero
    if draft_k_ptr is not None:
        draft_k_ptr += head + zero
        draft_v_ptr += head + zero
    if not KEYS:
        k_ptr += zero
        v_ptr += zero
    q_offsets = (kv * HEADS + g)[:, None] * SIZE + i[None, :]
    present = (g < HEADS)[:, None]
    q1 = tl.load(qkv_ptr + q_offsets, mask=present, other=0.0)
    q2 = tl.load(qkv_ptr + HALF + q_offsets, mask=present, other=0.0)
    new_k1, new_k2, new_v = inv_freq, inv_freq, inv_freq  # not used
    if KEYS:
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
            k_weight1, k_weight2, sink, k_ptr, v_ptr, draft_k_ptr, draft_v_ptr, row, slots,
            out_ptr, acc_ptr, max_ptr, sum_ptr, semaphore_ptr, scale, eps, offset,
            k_norm_ptr is not None, sinks_ptr is not None, VALUE_NORM, STORES, KV, HEADS, HALF,
            SPLITS, FAN, BLOCK_S, BLOCK_G, PARTS, STORED, STAGES, KEYS,
        )  # fmt: skip
    else:
        for split in range(first, active, tl.num_programs(2)):
            attend_part(
                split, size, filled, active, slot, pair, q1, q2, new_k1, new_k2, new_v, cos,
                sin, k_weight1, k_weight2, sink, k_ptr, v_ptr, draft_k_ptr, draft_v_ptr, row,
                slots, out_ptr, acc_ptr, max_ptr, sum_ptr, semaphore_ptr, scale, eps, offset,
                k_norm_ptr is not None, sinks_ptr is not None, VALUE_NORM, STORES, KV, HEADS, HALF,
                SPLITS, FAN, BLOCK_S, BLOCK_G, PARTS, STORED, STAGES, KEYS,
            )  # fmt: skip
