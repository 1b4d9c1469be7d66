"""The Triton kernel that goes through the blocks of each sequence of a packed chunk.

A program has some columns of one head's state, which stay in registers: the columns of a state do
not know one another. Each block is five products, with what triton_blocks.py has made of it:

    r = beta * (v - k S);  w = inverse r;  o = q S + attention w;  S = kept S + k^T w

with factors on the tokens of each. Where the inputs have 16 bits, S, r and w are rounded to them in
the products. What is carried from block to block is float32.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.gated_delta_rule.triton_blocks import BLOCK, FACTORS, place_of
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.dot import dot


@waits  # once it has its sequence's place, which the host wrote
@triton.jit
def gated_delta_rule_states_kernel(
    q_ptr, k_ptr, v_ptr, state_ptr, starts_ptr, rows_ptr, first_ptr,
    inverse_ptr, attention_ptr, factors_ptr, kept_ptr, out_ptr,
    heads: tl.constexpr, heads_per_key: tl.constexpr, key_size: tl.constexpr,
    value_size: tl.constexpr,
    q_stride_row: tl.constexpr, q_stride_head: tl.constexpr,
    k_stride_row: tl.constexpr, k_stride_head: tl.constexpr,
    v_stride_row: tl.constexpr, v_stride_head: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_VALUES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_VALUES columns of one head, over one sequence.

    The state is held in parts of BLOCK_KEYS rows. Sizes and strides are constants, so that a row's
    address within a block costs nothing. float32 has products without tensor cores, whose operands
    are registers: keys are loaded twice there.
    """
    PARTS: tl.constexpr = key_size // BLOCK_KEYS
    column_head, sequence = tl.program_id(0), tl.program_id(1)
    COLUMNS: tl.constexpr = value_size // BLOCK_VALUES
    head = column_head // COLUMNS
    start, stop = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    started = tl.load(first_ptr + sequence) > 0
    key_head = head // heads_per_key
    zero = wait(0)
    if start + zero >= stop:
        return
    token, key = tl.arange(0, BLOCK), tl.arange(0, BLOCK_KEYS)
    column = column_head % COLUMNS * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)

    state_ptrs = state_ptr + zero + (row * heads + head) * key_size * value_size
    state_ptrs = state_ptrs + key[:, None] * value_size + column[None, :]
    states = ()
    for part in tl.static_range(PARTS):
        held = tl.load(
            state_ptrs + part * BLOCK_KEYS * value_size, mask=started & (row >= 0), other=0.0
        )
        states = states + (held,)

    begin = start.to(tl.int64) + zero
    q_ptrs = q_ptr + begin * q_stride_row + key_head * q_stride_head
    q_ptrs = q_ptrs + token[:, None] * q_stride_row + key[None, :]
    k_ptrs = k_ptr + begin * k_stride_row + key_head * k_stride_head
    k_ptrs = k_ptrs + token[:, None] * k_stride_row + key[None, :]
    v_ptrs = v_ptr + begin * v_stride_row + head * v_stride_head
    v_ptrs = v_ptrs + token[:, None] * v_stride_row + column[None, :]
    out_ptrs = out_ptr + (begin * heads + head) * value_size
    out_ptrs = out_ptrs + token[:, None] * (heads * value_size) + column[None, :]
    number = place_of(start, sequence).to(tl.int64) * heads + head + zero
    square = token[:, None] * BLOCK + token[None, :]
    inverse_ptrs = inverse_ptr + number * BLOCK * BLOCK + square
    attention_ptrs = attention_ptr + number * BLOCK * BLOCK + square
    factor_ptrs = factors_ptr + number * FACTORS * BLOCK + token
    kept_ptrs = kept_ptr + number
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    AGAIN: tl.constexpr = dtype == tl.float32

    for block in tl.range(0, tl.cdiv(stop - start, BLOCK), num_stages=STAGES):
        exists = (token < stop - start - block * BLOCK)[:, None]
        inverse, attention = tl.load(inverse_ptrs), tl.load(attention_ptrs)
        beta, k_begin = tl.load(factor_ptrs), tl.load(factor_ptrs + BLOCK)
        q_begin, k_end = tl.load(factor_ptrs + 2 * BLOCK), tl.load(factor_ptrs + 3 * BLOCK)
        kept = tl.load(kept_ptrs)
        v = tl.load(v_ptrs, mask=exists, other=0.0).to(tl.float32)

        seen_k = tl.zeros([BLOCK, BLOCK_VALUES], tl.float32)
        seen_q = tl.zeros([BLOCK, BLOCK_VALUES], tl.float32)
        keys = ()
        for part in tl.static_range(PARTS):
            k = tl.load(k_ptrs + part * BLOCK_KEYS, mask=exists, other=0.0)
            q = tl.load(q_ptrs + part * BLOCK_KEYS, mask=exists, other=0.0)
            rounded = states[part].to(dtype)
            seen_k = dot(k, rounded, seen_k)
            seen_q = dot(q, rounded, seen_q)
            keys = keys + (k,)
        delta = beta[:, None] * (v - k_begin[:, None] * seen_k)
        written = dot(inverse, delta.to(dtype), tl.zeros([BLOCK, BLOCK_VALUES], tl.float32))
        taken = (k_end[:, None] * written).to(dtype)
        new = ()
        for part in tl.static_range(PARTS):
            k = keys[part]
            if AGAIN:
                k = tl.load(k_ptrs + part * BLOCK_KEYS, mask=exists, other=0.0)
            new = new + (dot(tl.trans(k), taken, kept * states[part]),)
        states = new
        out = dot(attention, written.to(dtype), q_begin[:, None] * seen_q)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists)

        q_ptrs += BLOCK * q_stride_row
        k_ptrs += BLOCK * k_stride_row
        v_ptrs += BLOCK * v_stride_row
        out_ptrs += BLOCK * heads * value_size
        inverse_ptrs += heads * BLOCK * BLOCK
        attention_ptrs += heads * BLOCK * BLOCK
        factor_ptrs += heads * FACTORS * BLOCK
        kept_ptrs += heads

    for part in tl.static_range(PARTS):
        tl.store(state_ptrs + part * BLOCK_KEYS * value_size, states[part], mask=row >= 0)
