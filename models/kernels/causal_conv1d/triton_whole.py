"""The Triton kernel of the causal convolution for inputs of any strides: a program takes one block
of tokens and channels, at once.

Programs share out tokens and channels, not sequences. So their number depends on sizes alone, and a
batch of one long and many short sequences costs what an even one does. A program finds the sequence
of its first token, and so knows where that ends. Where a sequence begins, its first tokens are
computed with the state, and the last inputs replace the state. One program does both, also where
these tokens reach into the next program's: of two programs one could write the slot before the
other has read it.

Loops are `while`: Triton's interpreter cannot make a range of tensors.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.causal_conv1d.triton_sequences import find, load_stops
from tokenloop.models.kernels.causal_conv1d.triton_state import inputs_before, store_state
from tokenloop.models.kernels.causal_conv1d.triton_taps import (
    activated,
    convolved,
    load_bias,
    load_weights,
)
from tokenloop.models.kernels.launch.state_slot import load_slot

# Tokens that are computed together where several sequences share a block.
STEP = tl.constexpr(2)


@triton.jit
def whole(
    x_ptrs, out_ptrs, weights, bias, in_dim, begin, end, first, first_start, sequences, skip,
    query_start_loc_ptr, x_stride_token, out_stride_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A block at once. Each tap loads its own inputs, which caches serve."""
    token = begin + tl.arange(0, BLOCK_TOKENS)
    start = tl.zeros_like(token) + first_start
    number = first + 1
    while number <= sequences:
        next_start = tl.load(query_start_loc_ptr + number)
        start = tl.where(token >= next_start, next_start, start)
        number = tl.where(next_start < end, number + 1, sequences + 1)
    mask = in_dim[:, None] & (token < end)[None, :]
    sums = tl.zeros(mask.shape, tl.float32) + bias[:, None]
    for tap in tl.static_range(WIDTH):
        source = token - (WIDTH - 1 - tap)
        x = tl.load(
            x_ptrs[:, None] + source.to(tl.int64)[None, :] * x_stride_token,
            mask=mask & (source >= start)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        sums = tl.fma(weights[tap][:, None], x, sums)
    out = activated(sums, SILU).to(out_ptrs.dtype.element_ty)
    stored = mask & (token >= begin + skip)[None, :]
    tl.store(out_ptrs[:, None] + token.to(tl.int64)[None, :] * out_stride_token, out, mask=stored)


# One kernel for all lengths: none is compiled anew for a number of tokens or sequences.
@triton.jit(do_not_specialize=["tokens", "bounds", "pad_slot_id"])
def causal_conv1d_whole_kernel(
    x_ptr, weight_ptr, bias_ptr, query_start_loc_ptr, state_ptr, cache_indices_ptr,
    has_initial_ptr, out_ptr,
    dim, tokens, bounds, pad_slot_id,
    x_stride_dim, x_stride_token, out_stride_dim, out_stride_token,
    weight_stride_dim, weight_stride_tap, state_stride_slot, state_stride_dim, state_stride_tap,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS tokens of BLOCK_DIM channels, of any strides."""
    sequences = bounds - 1
    blocks = tl.cdiv(dim, BLOCK_DIM)
    begin = (tl.program_id(0) // blocks) * BLOCK_TOKENS
    end = tl.minimum(begin + BLOCK_TOKENS, tokens)
    channels = (tl.program_id(0) % blocks) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    x_ptrs = x_ptr + channels.to(tl.int64) * x_stride_dim
    out_ptrs = out_ptr + channels.to(tl.int64) * out_stride_dim
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    stops = load_stops(query_start_loc_ptr, 0, sequences, tokens)
    bias = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)

    # 1. The sequence of the first token, and how many of its tokens the block before computes.
    sequence, start, stop = find(stops, query_start_loc_ptr, sequences, tokens, begin)
    skip = 0
    if (start < begin) & (begin < start + WIDTH - 1) & (sequence < sequences):
        is_pad = load_slot(cache_indices_ptr, sequence, HAS_INDICES) == pad_slot_id
        if (tl.load(has_initial_ptr + sequence) != 0) & (is_pad == 0):
            skip = tl.minimum(start + WIDTH - 1, stop) - begin

    # 2. All tokens, as if sequences began with zeros.
    whole(
        x_ptrs, out_ptrs, weights, bias, in_dim, begin, end, sequence, start, sequences, skip,
        query_start_loc_ptr, x_stride_token, out_stride_token, WIDTH, SILU, BLOCK_TOKENS,
    )  # fmt: skip
    # Below, threads may store what others have stored.
    tl.debug_barrier()

    # 3. Sequence by sequence: the outputs that a state reaches, and the new state where a sequence
    # begins here.
    while start < end:
        exists = sequence < sequences
        stop = tl.load(query_start_loc_ptr + sequence + 1, mask=exists, other=tokens)
        slot = load_slot(cache_indices_ptr, sequence, HAS_INDICES, exists)
        begins = exists & (start >= begin) & (start < stop) & (slot != pad_slot_id)
        started = begins & (tl.load(has_initial_ptr + sequence, mask=exists, other=0) != 0)
        token = tl.maximum(start, begin + skip)
        last = token
        if started:
            last = tl.maximum(token, tl.minimum(start + WIDTH - 1, stop))
        state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
        held = start, started, x_ptrs, state_ptrs, x_stride_token, state_stride_tap
        past = inputs_before(token, *held, in_dim, WIDTH)
        left = inputs_before(stop, *held, in_dim & begins, WIDTH)
        while token < last:
            few = ()
            for i in tl.static_range(STEP):
                mask = in_dim & (token + i < last)
                x = tl.load(x_ptrs + (token + i).to(tl.int64) * x_stride_token, mask, other=0.0)
                few = few + (x.to(tl.float32),)
            for i in tl.static_range(STEP):
                past = past + (few[i],)
                out = convolved(past, weights, bias, WIDTH, SILU).to(out_ptr.dtype.element_ty)
                out_row = out_ptrs + (token + i).to(tl.int64) * out_stride_token
                tl.store(out_row, out, mask=in_dim & (token + i < last))
                past = past[1:]
            token += STEP
        if begins:
            store_state(left, state_ptrs, state_stride_tap, in_dim, WIDTH)
        sequence += 1
        start = stop
