"""Triton kernels of the causal convolution; cuda.py launches them, conv1d.py says what they do.

Programs share out tokens and channels, not sequences: their number depends on sizes alone, and a
batch of one long and many short sequences costs what an even one does. Each finds the sequences of
its tokens in query_start_loc.

A slot is read for a sequence's first tokens and replaced by its last ones. One program does both,
that of the first token: were they two, one could write before the other has read. So this program
computes all tokens that look at the slot, also those that lie in the next block.
"""

import triton
import triton.language as tl

# Starts of sequences that are compared at once.
SEARCH = tl.constexpr(128)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, SILU: tl.constexpr):
    if SILU:
        x = silu(x)
    return x


@triton.jit
def load_bias(bias_ptr, channels, in_dim, HAS_BIAS: tl.constexpr):
    """float32 of the shape of `channels`."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=in_dim, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(channels.shape, tl.float32)
    return bias


@triton.jit
def find(query_start_loc_ptr, sequences, first_token, last_token):
    """The sequences of two tokens: how many end at or before each. `sequences` where there is no
    sequence of it."""
    # Loops are `while` everywhere: Triton's interpreter cannot make a range of tensors.
    first = 0
    last = 0
    begin = 0
    while begin < sequences:
        numbers = begin + tl.arange(0, SEARCH)
        ends = tl.load(
            query_start_loc_ptr + 1 + numbers, mask=numbers < sequences, other=0x7FFFFFFF
        )
        first += tl.sum((ends <= first_token).to(tl.int32))
        last += tl.sum((ends <= last_token).to(tl.int32))
        begin += SEARCH
    return first, last


@triton.jit
def load_slot(cache_indices_ptr, sequence, mask, HAS_INDICES: tl.constexpr):
    if HAS_INDICES:
        slot = tl.load(cache_indices_ptr + sequence, mask=mask, other=0).to(tl.int64)
    else:
        slot = tl.where(mask, sequence, 0).to(tl.int64)
    return slot


@triton.jit
def causal_conv1d_kernel(
    x_ptr, weight_ptr, bias_ptr, query_start_loc_ptr, state_ptr, cache_indices_ptr,
    has_initial_ptr, out_ptr,
    dim, tokens, sequences, pad_slot_id,
    x_stride_dim, x_stride_token, out_stride_dim, out_stride_token,
    weight_stride_dim, weight_stride_tap,
    state_stride_slot, state_stride_dim, state_stride_tap,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    ROLLING: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS tokens of BLOCK_DIM channels.

    A block within one sequence, and not at its begin, is the common case of long ones. Where
    ROLLING (adjacent channels are adjacent in memory) it is computed a token at a time with the
    last WIDTH - 1 in registers, so that each input is loaded once. All other blocks go by tiles of
    TILE_TOKENS tokens, each tap loading its own.
    """
    blocks = tl.cdiv(dim, BLOCK_DIM)
    block = tl.program_id(0)
    begin = (block // blocks) * BLOCK_TOKENS
    channels = (block % blocks) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    end = tl.minimum(begin + BLOCK_TOKENS, tokens)
    first, last = find(query_start_loc_ptr, sequences, begin, end - 1)

    x_ptrs = x_ptr + channels.to(tl.int64) * x_stride_dim
    out_ptrs = out_ptr + channels.to(tl.int64) * out_stride_dim
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    bias = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)

    if ROLLING:
        inner = (first == last) & (first < sequences) & (end == begin + BLOCK_TOKENS)
        inner &= begin - tl.load(query_start_loc_ptr + first) >= WIDTH - 1
        inner &= load_slot(cache_indices_ptr, first, inner, HAS_INDICES) != pad_slot_id
        if inner:
            # The weights and the tokens before, the oldest of them first.
            w0 = tl.load(weight_ptrs, mask=in_dim, other=0.0).to(tl.float32)
            w1 = tl.load(weight_ptrs + weight_stride_tap, mask=in_dim, other=0.0).to(tl.float32)
            row = x_ptrs + begin.to(tl.int64) * x_stride_token
            a = tl.load(row - (WIDTH - 1) * x_stride_token, mask=in_dim, other=0.0).to(tl.float32)
            if WIDTH > 2:
                w2 = tl.load(weight_ptrs + 2 * weight_stride_tap, mask=in_dim, other=0.0)
                w2 = w2.to(tl.float32)
                b = tl.load(row - (WIDTH - 2) * x_stride_token, mask=in_dim, other=0.0)
                b = b.to(tl.float32)
            if WIDTH > 3:
                w3 = tl.load(weight_ptrs + 3 * weight_stride_tap, mask=in_dim, other=0.0)
                w3 = w3.to(tl.float32)
                c = tl.load(row - x_stride_token, mask=in_dim, other=0.0).to(tl.float32)
            out_row = out_ptrs + begin.to(tl.int64) * out_stride_token
            for i in tl.static_range(BLOCK_TOKENS):
                new = tl.load(row + i * x_stride_token, mask=in_dim, other=0.0).to(tl.float32)
                sums = tl.fma(w0, a, bias)
                if WIDTH == 2:
                    sums = tl.fma(w1, new, sums)
                    a = new
                elif WIDTH == 3:
                    sums = tl.fma(w2, new, tl.fma(w1, b, sums))
                    a = b
                    b = new
                else:
                    sums = tl.fma(w3, new, tl.fma(w2, c, tl.fma(w1, b, sums)))
                    a = b
                    b = c
                    c = new
                out = activated(sums, SILU).to(out_ptr.dtype.element_ty)
                tl.store(out_row + i * out_stride_token, out, mask=in_dim)
            return

    # The last sequence's tokens that look at its slot, where that is this program's to replace.
    limit = end
    last_start = tl.load(query_start_loc_ptr + last)
    if (last < sequences) & (last_start >= begin):
        last_stop = tl.load(query_start_loc_ptr + last + 1)
        limit = tl.maximum(end, tl.minimum(last_start + WIDTH - 1, last_stop))
    tile = begin
    while tile < limit:
        token = tile + tl.arange(0, TILE_TOKENS)
        sequence = tl.zeros_like(token) + first
        number = first + 1
        while number <= last:
            sequence += (token >= tl.load(query_start_loc_ptr + number)).to(tl.int32)
            number += 1
        known = (token < limit) & (sequence < sequences)
        start = tl.load(query_start_loc_ptr + sequence, mask=known, other=0)
        slot = load_slot(cache_indices_ptr, sequence, known, HAS_INDICES)
        is_first = known & (token - start < WIDTH - 1)
        own = tl.where(is_first, start >= begin, token < end)
        alive = known & (slot != pad_slot_id)
        started = tl.load(has_initial_ptr + sequence, mask=alive, other=0) != 0
        state_row = state_ptr + slot * state_stride_slot
        sums = tl.zeros([TILE_TOKENS, BLOCK_DIM], tl.float32) + bias[None, :]
        for tap in tl.static_range(WIDTH):
            source = token - (WIDTH - 1) + tap
            value = tl.load(
                x_ptrs[None, :] + source.to(tl.int64)[:, None] * x_stride_token,
                mask=(alive & own & (source >= start))[:, None] & in_dim[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            if tap < WIDTH - 1:
                column = source - start + WIDTH - 1
                value += tl.load(
                    state_row[:, None] + column[:, None] * state_stride_tap
                    + channels[None, :] * state_stride_dim,
                    mask=(alive & own & started & (source < start))[:, None] & in_dim[None, :],
                    other=0.0,
                ).to(tl.float32)  # fmt: skip
            weight = tl.load(weight_ptrs + tap * weight_stride_tap, mask=in_dim, other=0.0)
            sums = tl.fma(weight.to(tl.float32)[None, :], value, sums)
        out = tl.where(alive[:, None], activated(sums, SILU), 0.0)
        tl.store(
            out_ptrs[None, :] + token.to(tl.int64)[:, None] * out_stride_token,
            out.to(out_ptr.dtype.element_ty), mask=own[:, None] & in_dim[None, :],
        )  # fmt: skip
        tile += TILE_TOKENS

    # All threads have read the slots before any of them replaces one.
    tl.debug_barrier()
    sequence = first
    while sequence < tl.minimum(last + 1, sequences):
        start = tl.load(query_start_loc_ptr + sequence)
        stop = tl.load(query_start_loc_ptr + sequence + 1)
        slot = load_slot(cache_indices_ptr, sequence, True, HAS_INDICES)
        if (start >= begin) & (stop > start) & (slot != pad_slot_id):
            started = tl.load(has_initial_ptr + sequence) != 0
            state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
            for column in tl.static_range(WIDTH - 1):
                source = stop - (WIDTH - 1) + column
                value = tl.load(
                    x_ptrs + source.to(tl.int64) * x_stride_token,
                    mask=in_dim & (source >= start), other=0.0,
                ).to(tl.float32)  # fmt: skip
                # What a short sequence shifts comes from a later column, not yet replaced.
                value += tl.load(
                    state_ptrs + (column + stop - start) * state_stride_tap,
                    mask=in_dim & (source < start) & started, other=0.0,
                ).to(tl.float32)  # fmt: skip
                tl.store(
                    state_ptrs + column * state_stride_tap,
                    value.to(state_ptr.dtype.element_ty), mask=in_dim,
                )  # fmt: skip
        sequence += 1


@triton.jit
def causal_conv1d_update_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, cache_indices_ptr, has_initial_ptr, out_ptr,
    dim, pad_slot_id,
    x_stride_row, x_stride_dim, weight_stride_dim, weight_stride_tap,
    state_stride_slot, state_stride_dim, state_stride_tap,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One token of one row, BLOCK_DIM channels."""
    row = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    slot = load_slot(cache_indices_ptr, row, True, HAS_INDICES)
    is_there = slot != pad_slot_id
    started = tl.load(has_initial_ptr + row) != 0
    new = tl.load(
        x_ptr + row.to(tl.int64) * x_stride_row + channels * x_stride_dim, mask=in_dim, other=0.0
    ).to(tl.float32)
    sums = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
    for tap in tl.static_range(WIDTH):
        if tap < WIDTH - 1:
            value = tl.load(
                state_ptrs + tap * state_stride_tap, mask=in_dim & started & is_there, other=0.0
            ).to(tl.float32)
        else:
            value = new
        weight = tl.load(
            weight_ptr + channels * weight_stride_dim + tap * weight_stride_tap,
            mask=in_dim, other=0.0,
        )  # fmt: skip
        sums = tl.fma(weight.to(tl.float32), value, sums)
        # Each column moves one to the left, after it has been read.
        if tap > 0:
            tl.store(
                state_ptrs + (tap - 1) * state_stride_tap,
                value.to(state_ptr.dtype.element_ty), mask=in_dim & is_there,
            )  # fmt: skip
    out = tl.where(is_there, activated(sums, SILU), 0.0)
    tl.store(out_ptr + row.to(tl.int64) * dim + channels, out.to(out_ptr.dtype.element_ty), in_dim)
