"""The Triton kernel of the causal convolution, whose channels are adjacent in memory.

A program takes block after block of the same channels. It holds the last WIDTH - 1 inputs in
registers, and half a block is on its way from memory while the other half is computed.

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
from tokenloop.models.kernels.causal_conv1d.triton_state import (
    inputs_before,
    load_state,
    store_state,
)
from tokenloop.models.kernels.causal_conv1d.triton_taps import (
    convolved,
    halves,
    load_bias,
    load_packed_taps,
    load_weights,
)
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.state_slot import load_slot

# Tokens that are computed together where several sequences share a block.
STEP = tl.constexpr(2)

# Compilers compute what a loop does not change before the loop, and keep it in registers, also
# where it is seldom needed.
if triton.knobs.runtime.interpret:

    @triton.jit
    def recomputed(x, number):
        return x

else:

    @triton.jit
    def recomputed(x, number):
        """x, int32, as if it depended on a number that the loop changes."""
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, number], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def next_rows(x_row, stride, mask, COUNT: tl.constexpr):
    """Adjacent tokens as they are in memory. Compilers take apart what a loop carries as numbers of
    16 bits, at the loop's end: the loads would have to be awaited there."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x_row + i * stride, mask=mask, other=0),)
    return rows


@triton.jit
def below(numbers, stop, ALL: tl.constexpr):
    """numbers < stop. With ALL that is known of every number, and there are no masks."""
    return tl.full(numbers.shape, True, tl.int1) if ALL else numbers < stop


@triton.jit
def channels_of(row, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """A row as float32 [BLOCK_DIM]."""
    if PAIRS:
        low, high = halves(row, dtype)
        values = tl.reshape(tl.join(low, high), (2 * row.shape[0],))
    else:
        values = row.to(tl.float32)
    return values


@triton.jit
def roll_on(
    past, rows, out_row, stride, weights, bias, in_dim, dtype: tl.constexpr,
    WIDTH: tl.constexpr, SILU: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Store the outputs of some tokens; gives the last WIDTH - 1 inputs after them."""
    for i in tl.static_range(len(rows)):
        past = past + (channels_of(rows[i], dtype, PAIRS),)
        out = convolved(past, weights, bias, WIDTH, SILU).to(out_row.dtype.element_ty)
        tl.store(out_row + i * stride, out, mask=in_dim)
        past = past[1:]
    return past


@waits  # once it has the weights, and where sequences end, which the host wrote
@triton.jit(do_not_specialize=["tokens", "bounds", "pad_slot_id", "span"])
def causal_conv1d_rolling_kernel(
    x_ptr, weight_ptr, bias_ptr, query_start_loc_ptr, state_ptr, cache_indices_ptr,
    has_initial_ptr, out_ptr,
    dim, tokens, bounds, pad_slot_id, span,
    weight_stride_dim, weight_stride_tap, state_stride_slot, state_stride_dim, state_stride_tap,
    X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr,
    PACKED_TAPS: tl.constexpr, EVEN: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    TOKEN_AXIS: tl.constexpr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """`span` tokens, a multiple of 2 * HALF, of BLOCK_DIM channels that are adjacent in memory.

    With PAIRS two channels are read as one int32, with PACKED_TAPS a channel's taps as one int64.
    EVEN: BLOCK_DIM divides `dim`. The strides of x and out are those of tokens; they are constants,
    so that a row's address within a block costs nothing.
    """
    sequences = bounds - 1
    BLOCK: tl.constexpr = 2 * HALF
    tl.static_assert(BLOCK >= WIDTH)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Short sequences are often packed at the ends, and take longest: the ends are not begun last.
    at = tl.program_id(TOKEN_AXIS) + tl.num_programs(TOKEN_AXIS) // 2
    begin = tl.where(at < tl.num_programs(TOKEN_AXIS), at, at - tl.num_programs(TOKEN_AXIS)) * span
    first = tl.program_id(1 - TOKEN_AXIS) * BLOCK_DIM
    channels = first + tl.arange(0, BLOCK_DIM)
    in_dim = below(channels, dim, EVEN)
    # All programs read this number, so it is near. A chunk may have room for many more tokens.
    count = tl.load(query_start_loc_ptr + sequences)
    # All loads come first, and first of them what the search needs: it is done when tokens arrive.
    stops = load_stops(query_start_loc_ptr, 0, sequences, tokens)
    if PACKED_TAPS:
        weights = load_packed_taps(weight_ptr, channels, in_dim)
    else:
        weight_ptrs = weight_ptr + channels * weight_stride_dim
        weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    bias = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    zero = wait(0)
    if begin + zero >= count:
        return
    x_ptr += zero
    state_ptr += zero
    end = tl.minimum(begin + span, tokens)
    out_ptrs = out_ptr + channels
    if PAIRS:
        STRIDE: tl.constexpr = X_STRIDE // 2
        pairs = first // 2 + tl.arange(0, BLOCK_DIM // 2)
        x_ptrs = x_ptr.to(tl.pointer_type(tl.int32)) + pairs
        in_row = below(pairs, dim // 2, EVEN)
    else:
        STRIDE: tl.constexpr = X_STRIDE
        x_ptrs = x_ptr + channels
        in_row = in_dim
    x_row = x_ptrs + begin.to(tl.int64) * STRIDE
    before = next_rows(x_row - (WIDTH - 1) * STRIDE, STRIDE, in_row & (begin > 0), WIDTH - 1)
    rows = next_rows(x_row, STRIDE, in_row & (begin + BLOCK <= end), HALF)

    # 1. The sequence of the first token, and the inputs before that token.
    sequence, start, stop = find(stops, query_start_loc_ptr, sequences, tokens, begin)
    # The program before this one computes the tokens that a state reaches.
    token = begin
    if (start < begin) & (begin < start + WIDTH - 1) & (sequence < sequences):
        is_pad = load_slot(cache_indices_ptr, sequence, HAS_INDICES) == pad_slot_id
        if (tl.load(has_initial_ptr + sequence) != 0) & (is_pad == 0):
            token = tl.minimum(start + WIDTH - 1, stop)
            x_row = x_ptrs + (token - (WIDTH - 1)).to(tl.int64) * STRIDE
            before = next_rows(x_row, STRIDE, in_row, WIDTH - 1)
    past = ()
    for i in tl.static_range(WIDTH - 1):
        known = token - (WIDTH - 1) + i >= start
        past = past + (tl.where(known, channels_of(before[i], dtype, PAIRS), 0.0),)

    # 2. Stretches of sequences, none longer than a block. Most often they are whole blocks.
    limit = end
    block_end = tl.minimum(begin + BLOCK, end)
    while token < limit:
        while token >= stop:
            sequence += 1
            start = stop
            stop = tl.load(
                query_start_loc_ptr + sequence + 1, mask=sequence < sequences, other=tokens
            )
        if token == start:
            # The state, and what replaces it. Where this program begins a sequence, it computes
            # all tokens that the state reaches.
            exists = sequence < sequences
            slot = load_slot(cache_indices_ptr, sequence, HAS_INDICES, exists)
            begins = exists & (slot != pad_slot_id)
            started = begins & (tl.load(has_initial_ptr + sequence, mask=exists, other=0) != 0)
            again = recomputed(channels, sequence)
            state_ptrs = state_ptr + slot * state_stride_slot + again * state_stride_dim
            held = start, started, x_ptr + again, state_ptrs, X_STRIDE, state_stride_tap
            past = load_state(state_ptrs, state_stride_tap, started, in_dim, WIDTH)
            if started:
                limit = tl.maximum(end, tl.minimum(start + WIDTH - 1, stop))
            if begins:
                left = inputs_before(stop, *held, in_dim, WIDTH)
                store_state(left, state_ptrs, state_stride_tap, in_dim, WIDTH)
        if (token + BLOCK == block_end) & (stop >= block_end):
            # Whole blocks. What follows is loaded before the arithmetic; where no whole block
            # follows, this one is loaded again.
            blocks_end = token + (tl.minimum(stop, end) - token) // BLOCK * BLOCK
            while token < blocks_end:
                x_row = x_ptrs + token.to(tl.int64) * STRIDE
                out_row = out_ptrs + token.to(tl.int64) * OUT_STRIDE
                later = next_rows(x_row + HALF * STRIDE, STRIDE, in_row, HALF)
                past = roll_on(
                    past, rows, out_row, OUT_STRIDE, weights, bias, in_dim, dtype,
                    WIDTH, SILU, PAIRS,
                )  # fmt: skip
                x_row += tl.where(token + 2 * BLOCK <= end, BLOCK * STRIDE, 0)
                rows = next_rows(x_row, STRIDE, in_row, HALF)
                past = roll_on(
                    past, later, out_row + HALF * OUT_STRIDE, OUT_STRIDE, weights, bias, in_dim,
                    dtype, WIDTH, SILU, PAIRS,
                )  # fmt: skip
                token += BLOCK
            block_end = token
        else:
            last = tl.minimum(stop, block_end)
            if last == block_end:
                x_row = x_ptrs + last.to(tl.int64) * STRIDE
                ready = block_end + BLOCK <= end
                rows = next_rows(x_row, STRIDE, in_row & ready, HALF)
            while token < last:
                few = ()
                for i in tl.static_range(STEP):
                    mask = in_row & (token + i < last)
                    few = few + (
                        tl.load(x_ptrs + (token + i).to(tl.int64) * STRIDE, mask, other=0),
                    )
                for i in tl.static_range(STEP):
                    exists = token + i < last
                    inputs = past + (channels_of(few[i], dtype, PAIRS),)
                    out = convolved(inputs, weights, bias, WIDTH, SILU)
                    out_row = out_ptrs + (token + i).to(tl.int64) * OUT_STRIDE
                    tl.store(out_row, out.to(out_ptr.dtype.element_ty), mask=in_dim & exists)
                    past = ()
                    for j in tl.static_range(WIDTH - 1):
                        past = past + (tl.where(exists, inputs[j + 1], inputs[j]),)
                token += STEP
            token = last
        if token == block_end:
            block_end = tl.minimum(block_end + BLOCK, limit)
