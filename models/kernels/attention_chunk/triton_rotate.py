"""Triton kernels that make queries, keys and values, and put those of a chunk into a ring, of which
the last one says how much is filled.

Names: query head g of the HEADS that share a key/value head; token t of a block of BLOCK_T; i, the
first or the second half of a head, which rotation pairs (x1, x2).
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.attention.triton_attend import load_halves, normed, rotated, turned
from tokenloop.models.kernels.attention_chunk.triton_sequences import find_tokens
from tokenloop.models.kernels.launch.dependent_launch import wait, waits


@triton.jit
def load_tokens(ptr, offsets, mask, HALF: tl.constexpr):
    x1 = tl.load(ptr + offsets, mask=mask, other=0.0)
    return x1.to(tl.float32), tl.load(ptr + HALF + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(ptr, offsets, x1, x2, mask, HALF: tl.constexpr):
    tl.store(ptr + offsets, x1, mask=mask)
    tl.store(ptr + HALF + offsets, x2, mask=mask)


@waits  # once it has the weights, its tokens' places, which the host wrote, and their angles
@triton.jit
def rotate_kernel(
    qkv_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, inv_freq_ptr,
    q_ptr, kv_ptr, width, slots, eps: tl.constexpr, offset: tl.constexpr,
    attention_factor: tl.constexpr,
    KV: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, VALUE_NORM: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr, KEYS: tl.constexpr, IS_RING: tl.constexpr,
    SEQUENCES: tl.constexpr, PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one key/value head and the query heads that share it.

    Rows of qkv are `width` elements apart. HEADS is 0 where queries are not wanted.
    """
    SIZE: tl.constexpr = 2 * HALF
    stride: tl.constexpr = KV * SIZE
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    kv = tl.program_id(0)
    sequence, start, count, block = find_tokens(
        starts_ptr, tl.program_id(1), SEQUENCES, PADDED, BLOCK_T
    )
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    i = tl.arange(0, HALF)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (t < count)[:, None]
    position = tl.load(first_ptr + sequence) + t
    inv_freq = tl.load(inv_freq_ptr + i)[None, :]
    cos, sin = turned(position.to(tl.float32)[:, None] * inv_freq, inv_freq, attention_factor)
    token = (start + t).to(tl.int64)[:, None]
    in_offsets = token * width + i[None, :]
    if HEADS > 0 and q_norm_ptr is not None:
        q_weight1, q_weight2 = load_halves(q_norm_ptr, i, HALF)
    if KEYS and k_norm_ptr is not None:
        k_weight1, k_weight2 = load_halves(k_norm_ptr, i, HALF)
    zero = wait(0)
    if block * BLOCK_T + zero >= count:
        return
    if row < 0:
        return
    qkv_ptr += zero

    if HEADS > 0:
        q_offsets = token * (HEADS * stride) + i[None, :]
        for g in range(HEADS):
            head = (kv * HEADS + g) * SIZE
            x1, x2 = load_tokens(qkv_ptr + head, in_offsets, mask, HALF)
            if q_norm_ptr is not None:
                x1, x2 = normed(x1, x2, offset + q_weight1, offset + q_weight2, eps)
            x1, x2 = rotated(x1, x2, cos, sin, dtype)
            store_tokens(q_ptr + head, q_offsets, x1, x2, mask, HALF)

    if KEYS:
        key_ptr = qkv_ptr + (HEADS * KV + kv) * SIZE
        x1, x2 = load_tokens(key_ptr, in_offsets, mask, HALF)
        if VALUES_ARE_KEYS:
            v1, v2 = x1, x2
        else:
            v1, v2 = load_tokens(key_ptr + stride, in_offsets, mask, HALF)
        if k_norm_ptr is not None:
            x1, x2 = normed(x1, x2, offset + k_weight1, offset + k_weight2, eps)
        x1, x2 = rotated(x1, x2, cos, sin, dtype)
        if VALUE_NORM:
            v1, v2 = normed(v1, v2, 1.0, 1.0, eps)
        if IS_RING:
            to = token * (2 * stride) + kv * SIZE + i[None, :]
            k_ptr = kv_ptr
            v_ptr = kv_ptr + stride
        else:
            to = (row * slots + position)[:, None] * stride + kv * SIZE + i[None, :]
        store_tokens(k_ptr, to, x1, x2, mask, HALF)
        store_tokens(v_ptr, to, v1.to(dtype), v2.to(dtype), mask, HALF)


@waits  # once it has its tokens' places, which the host wrote
@triton.jit
def store_ring_kernel(
    kv_ptr, starts_ptr, rows_ptr, first_ptr, k_ptr, v_ptr, slots,
    KV: tl.constexpr, SIZE: tl.constexpr, SEQUENCES: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one key/value head."""
    stride: tl.constexpr = KV * SIZE
    kv = tl.program_id(0)
    sequence, start, count, block = find_tokens(
        starts_ptr, tl.program_id(1), SEQUENCES, PADDED, BLOCK_T
    )
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    first = tl.load(first_ptr + sequence)
    zero = wait(0)
    if block * BLOCK_T + zero >= count:
        return
    # Two tokens of one slot must not race: only the last `slots` are stored.
    if (block + 1) * BLOCK_T <= count - slots:
        return
    if row < 0:
        return
    kv_ptr += zero
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = ((t < count) & (t >= count - slots))[:, None]
    i = kv * SIZE + tl.arange(0, SIZE)[None, :]
    slot = (first + t) % slots
    from_offsets = (start + t).to(tl.int64)[:, None] * (2 * stride) + i
    to = (row * slots + slot)[:, None] * stride + i
    tl.store(k_ptr + to, tl.load(kv_ptr + from_offsets, mask=mask), mask=mask)
    tl.store(v_ptr + to, tl.load(kv_ptr + stride + from_offsets, mask=mask), mask=mask)


@triton.jit
def filled_slots_kernel(
    first_ptr, filled_ptr, slots, SEQUENCES: tl.constexpr, PADDED: tl.constexpr
):
    """All positions, each at most that of the ring's last slot. No other kernel overlaps it, for
    those after it read where sequences begin before they wait."""
    i = tl.arange(0, PADDED)
    first = tl.load(first_ptr + i, mask=i < SEQUENCES, other=0)
    tl.store(filled_ptr + i, tl.minimum(first, slots - 1), mask=i < SEQUENCES)
