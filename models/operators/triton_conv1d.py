"""Triton kernels of the causal convolution; cuda.py launches them, conv1d.py says what they do.

Programs share out tokens and channels, not sequences: their number depends on sizes alone, and a
batch of one long and many short sequences costs what an even one does. Each finds the sequence of
its first token in query_start_loc. Most often all of its tokens are within that one; else it goes
through the sequences that it has tokens of. Where one begins, its first tokens are computed with
the state, and the last inputs replace it. One program does both, also where the tokens reach into
the next block; were they two, one could write the slot before the other has read it.

Loops are `while`: Triton's interpreter cannot make a range of tensors.
"""

import triton
import triton.language as tl

from models.kernels.dependent_launch import wait

# Sequences that are looked at together, and tokens of one of several sequences of a block.
SEARCH = tl.constexpr(128)
STEP = tl.constexpr(4)


# Written with tl.exp and a division, SiLU would be half of all instructions, most of them for
# numbers that the hardware's two take as well: exp2 of a large one is inf, and 1 / inf is 0.
if triton.knobs.runtime.interpret:

    @triton.jit
    def sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

else:

    @triton.jit
    def sigmoid(x):
        """float32, to 2 units in the last place."""
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def activated(x, SILU: tl.constexpr):
    if SILU:
        x = x * sigmoid(x)
    return x


@triton.jit
def convolved(inputs, weights, bias, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """float32 outputs of WIDTH inputs each."""
    sums = bias
    for tap in tl.static_range(WIDTH):
        sums = tl.fma(weights[tap], inputs[tap], sums)
    return activated(sums, SILU)


@triton.jit
def load_slot(cache_indices_ptr, sequence, HAS_INDICES: tl.constexpr):
    if HAS_INDICES:
        slot = tl.load(cache_indices_ptr + sequence).to(tl.int64)
    else:
        slot = sequence.to(tl.int64)
    return slot


@triton.jit
def load_bias(bias_ptr, channels, in_dim, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=in_dim, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(channels.shape, tl.float32)
    return bias


@triton.jit
def load_weights(weight_ptrs, stride, in_dim, WIDTH: tl.constexpr):
    """The taps, float32 [BLOCK_DIM] each, the oldest input's first."""
    weights = ()
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptrs + tap * stride, mask=in_dim, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    return weights


@triton.jit
def load_stops(query_start_loc_ptr, base, sequences):
    """int32 [SEARCH] ends of sequences from number `base` on; -1 where there is no such."""
    numbers = base + tl.arange(0, SEARCH)
    return tl.load(query_start_loc_ptr + numbers + 1, mask=numbers < sequences, other=-1)


@triton.jit
def both(count0, start0, stop0, count1, start1, stop1):
    return count0 + count1, tl.maximum(start0, start1), tl.minimum(stop0, stop1)


@triton.jit
def find(stops, query_start_loc_ptr, sequences, tokens, begin):
    """The sequence of token `begin`, its start and its stop, of the first `stops`; what follows the
    last sequence counts as one more."""
    first, start, stop = 0, 0, tokens
    base = 0
    while base < sequences:
        if base > 0:
            stops = load_stops(query_start_loc_ptr, base, sequences)
        is_before = (stops >= 0) & (stops <= begin)
        starts, nexts = tl.where(is_before, stops, 0), tl.where(stops > begin, stops, tokens)
        found = tl.reduce((is_before.to(tl.int32), starts, nexts), 0, both)
        first, start, stop = both(first, start, stop, found[0], found[1], found[2])
        base += SEARCH
    return first, start, stop


@triton.jit
def load_rows(x_ptrs, in_dim, begin, tokens, stride, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """The tokens of a block, each [BLOCK_DIM], after the last WIDTH - 1 before it."""
    rows = ()
    for i in tl.static_range(1 - WIDTH, COUNT):
        token = begin + i
        mask = in_dim & (token >= 0) & (token < tokens)
        rows = rows + (tl.load(x_ptrs + token.to(tl.int64) * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def roll(
    rows, out_ptrs, weights, bias, in_dim, begin, end, start, out_stride_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, INNER: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A block of one sequence token by token, of what load_rows gave. What is before `start` counts
    as zeros, what is from `end` on is not stored; INNER: there is none of that."""
    past = ()
    for i in tl.static_range(WIDTH - 1):
        known = begin - (WIDTH - 1) + i >= start
        past = past + (tl.where(known, rows[i].to(tl.float32), 0.0),)
    out_row = out_ptrs + begin.to(tl.int64) * out_stride_token
    for i in tl.static_range(BLOCK_TOKENS):
        past = past + (rows[WIDTH - 1 + i].to(tl.float32),)
        out = convolved(past, weights, bias, WIDTH, SILU).to(out_row.dtype.element_ty)
        stored = in_dim
        if not INNER:
            stored = in_dim & (begin + i < end)
        tl.store(out_row + i * out_stride_token, out, mask=stored)
        past = past[1:]


@triton.jit
def whole(
    x_ptrs, out_ptrs, weights, bias, in_dim, begin, end, first, first_start, sequences, skip,
    query_start_loc_ptr, x_stride_token, out_stride_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A block at once, each tap loading its own inputs, which caches serve."""
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


@triton.jit
def inputs_before(
    token, start, started, x_ptrs, state_ptrs, x_stride_token, state_stride_tap, in_dim,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 inputs before a token of a sequence, float32: before its start they are its
    state, or zeros where it is not `started`."""
    inputs = ()
    for i in tl.static_range(1 - WIDTH, 0):
        source = token + i
        x = tl.load(
            x_ptrs + source.to(tl.int64) * x_stride_token, in_dim & (source >= start), other=0.0
        )
        before = tl.load(
            state_ptrs + (source - start + (WIDTH - 1)) * state_stride_tap,
            mask=in_dim & (source < start) & started, other=0.0,
        )  # fmt: skip
        inputs = inputs + (tl.where(source >= start, x.to(tl.float32), before.to(tl.float32)),)
    return inputs


# A kernel for all lengths: none is compiled anew for a number of tokens or sequences.
@triton.jit(do_not_specialize=["tokens", "sequences", "pad_slot_id"])
def causal_conv1d_kernel(
    x_ptr, weight_ptr, bias_ptr, query_start_loc_ptr, state_ptr, cache_indices_ptr,
    has_initial_ptr, out_ptr,
    dim, tokens, sequences, pad_slot_id,
    x_stride_dim, x_stride_token, out_stride_dim, out_stride_token,
    weight_stride_dim, weight_stride_tap, state_stride_slot, state_stride_dim, state_stride_tap,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    ROLLING: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK_TOKENS tokens of BLOCK_DIM channels."""
    blocks = tl.cdiv(dim, BLOCK_DIM)
    begin = (tl.program_id(0) // blocks) * BLOCK_TOKENS
    end = tl.minimum(begin + BLOCK_TOKENS, tokens)
    channels = (tl.program_id(0) % blocks) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    x_ptrs = x_ptr + channels.to(tl.int64) * x_stride_dim
    out_ptrs = out_ptr + channels.to(tl.int64) * out_stride_dim
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    # All loads before all else, what the search needs first: it is done when the tokens come.
    stops = load_stops(query_start_loc_ptr, 0, sequences)
    bias = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    if ROLLING:
        rows = load_rows(x_ptrs, in_dim, begin, tokens, x_stride_token, WIDTH, BLOCK_TOKENS)

    # 1. The sequence of the first token, and how many of its tokens the block before computes.
    sequence, start, stop = find(stops, query_start_loc_ptr, sequences, tokens, begin)
    skip = 0
    if (start < begin) & (begin < start + WIDTH - 1) & (sequence < sequences):
        is_pad = load_slot(cache_indices_ptr, sequence, HAS_INDICES) == pad_slot_id
        if (tl.load(has_initial_ptr + sequence) != 0) & (is_pad == 0):
            skip = tl.minimum(start + WIDTH - 1, stop) - begin

    # 2. A whole block of one sequence; or all tokens, as if sequences began with zeros.
    if ROLLING:
        if (start < begin) & (stop >= begin + BLOCK_TOKENS) & (skip == 0):
            roll(
                rows, out_ptrs, weights, bias, in_dim, begin, end, start, out_stride_token,
                WIDTH, SILU, True, BLOCK_TOKENS,
            )  # fmt: skip
            return
    else:
        whole(
            x_ptrs, out_ptrs, weights, bias, in_dim, begin, end, sequence, start, sequences, skip,
            query_start_loc_ptr, x_stride_token, out_stride_token, WIDTH, SILU, BLOCK_TOKENS,
        )  # fmt: skip
        # Below, threads may store what others have stored.
        tl.debug_barrier()

    # 3. Sequence by sequence: what is left of the outputs, and the states of those that begin here.
    while start < end:
        exists = sequence < sequences
        stop = tl.load(query_start_loc_ptr + sequence + 1, mask=exists, other=tokens)
        slot = sequence.to(tl.int64)
        if HAS_INDICES:
            slot = tl.load(cache_indices_ptr + sequence, mask=exists, other=0).to(tl.int64)
        begins = exists & (start >= begin) & (start < stop) & (slot != pad_slot_id)
        started = begins & (tl.load(has_initial_ptr + sequence, mask=exists, other=0) != 0)
        token = tl.maximum(start, begin + skip)
        last = token
        if ROLLING:
            last = tl.minimum(stop, end)
        if started:
            last = tl.maximum(last, tl.minimum(start + WIDTH - 1, stop))
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
            # Threads may store here what others read above.
            tl.debug_barrier()
            for i in tl.static_range(WIDTH - 1):
                state = left[i].to(state_ptr.dtype.element_ty)
                tl.store(state_ptrs + i * state_stride_tap, state, mask=in_dim)
        sequence += 1
        start = stop


@triton.jit(do_not_specialize=["pad_slot_id"])
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
    slot = load_slot(cache_indices_ptr, row, HAS_INDICES)
    kept = in_dim & (slot != pad_slot_id)
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
    weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    sums = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    zero = wait(0)
    started = kept & (tl.load(has_initial_ptr + zero + row) != 0)
    x_ptrs = x_ptr + zero + row.to(tl.int64) * x_stride_row + channels * x_stride_dim
    for tap in tl.static_range(WIDTH):
        if tap < WIDTH - 1:
            x = tl.load(state_ptrs + tap * state_stride_tap, mask=started, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=in_dim, other=0.0)
        sums = tl.fma(weights[tap], x.to(tl.float32), sums)
        # Each column moves on by one, into that which has been read.
        if tap > 0:
            column = x.to(state_ptr.dtype.element_ty)
            tl.store(state_ptrs + (tap - 1) * state_stride_tap, column, mask=kept)
    out = activated(sums, SILU).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * dim + channels, out, mask=in_dim)
