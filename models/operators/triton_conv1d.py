"""Triton kernels of the causal convolution; cuda.py launches them, conv1d.py says what they do.

Programs share out tokens and channels, not sequences: their number depends on sizes alone, and a
batch of one long and many short sequences costs what an even one does. Each finds the sequence of
its first token in query_start_loc, and knows by that where it ends. Where a sequence begins, its
first tokens are computed with the state, and the last inputs replace it. One program does both,
also where the tokens reach into the next program's; were they two, one could write the slot before
the other has read it.

Where channels are adjacent a program takes block after block of the same channels. It holds the
last WIDTH - 1 inputs in registers, and half a block is on its way from memory while the other half
is computed. Elsewhere a program takes one block, at once.

Loops are `while`: Triton's interpreter cannot make a range of tensors.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.dependent_launch import wait

# PARTS times SEARCH sequences are looked at together: one to each thread of a warp, so that warps
# look at the same ones and need not wait for each other. And tokens of one of several sequences of
# a block.
SEARCH = tl.constexpr(32)
PARTS = tl.constexpr(4)
STEP = tl.constexpr(2)


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
def load_slot(cache_indices_ptr, sequence, HAS_INDICES: tl.constexpr, exists=None):
    """The slot of a sequence; of one that may not exist, any."""
    slot = sequence.to(tl.int64)
    if HAS_INDICES:
        if exists is None:
            slot = tl.load(cache_indices_ptr + sequence).to(tl.int64)
        else:
            slot = tl.load(cache_indices_ptr + sequence, mask=exists, other=0).to(tl.int64)
    return slot


@triton.jit
def load_bias(bias_ptr, channels, in_dim, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=in_dim, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(channels.shape, tl.float32)
    return bias


@triton.jit
def halves(pair, dtype: tl.constexpr):
    """float32 of the lower and the upper half of an int32, numbers of 16 bits."""
    if dtype == tl.bfloat16:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_weights(weight_ptrs, stride, in_dim, WIDTH: tl.constexpr):
    """The taps, float32 [BLOCK_DIM] each, the oldest input's first."""
    weights = ()
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptrs + tap * stride, mask=in_dim, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    return weights


@triton.jit
def load_words(weight_ptr, channels, in_dim):
    """As load_weights, of 4 taps of 16 bits that are adjacent."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    words = tl.load(weight_ptr.to(tl.pointer_type(tl.int64)) + channels, mask=in_dim, other=0)
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    return halves(low, dtype) + halves(high, dtype)


@triton.jit
def load_stops(query_start_loc_ptr, base, sequences, tokens):
    """Ends of sequences from number `base` on, PARTS of int32 [SEARCH]; more than `tokens` where
    there is no such."""
    stops = ()
    for part in tl.static_range(PARTS):
        numbers = base + part * SEARCH + tl.arange(0, SEARCH)
        mask = numbers < sequences
        stops = stops + (tl.load(query_start_loc_ptr + numbers + 1, mask, other=tokens + 1),)
    return stops


@triton.jit
def located(stops, begin, tokens):
    """How many sequences end at token `begin` or before it, where the last of these ends, and where
    the first of the others does."""
    is_before = stops[0] <= begin
    count = is_before.to(tl.int32)
    start, stop = tl.where(is_before, stops[0], 0), tl.where(is_before, tokens, stops[0])
    for part in tl.static_range(1, PARTS):
        is_before = stops[part] <= begin
        count += is_before.to(tl.int32)
        start = tl.where(is_before, stops[part], start)
        stop = tl.minimum(stop, tl.where(is_before, tokens, stops[part]))
    return tl.sum(count, 0), tl.max(start, 0), tl.minimum(tl.min(stop, 0), tokens)


@triton.jit
def find(stops, query_start_loc_ptr, sequences, tokens, begin):
    """The sequence of token `begin`, its start and its stop, of the first `stops`; what follows the
    last sequence counts as one more."""
    sequence, start, stop = located(stops, begin, tokens)
    base = PARTS * SEARCH
    while base < sequences:
        stops = load_stops(query_start_loc_ptr, base, sequences, tokens)
        count, last, first = located(stops, begin, tokens)
        sequence, start, stop = sequence + count, tl.maximum(start, last), tl.minimum(stop, first)
        base += PARTS * SEARCH
    return sequence, start, stop


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


@triton.jit
def store_state(inputs, state_ptrs, stride, in_dim, WIDTH: tl.constexpr):
    """Replace a state by the WIDTH - 1 last inputs."""
    # Threads may store here what others have read.
    tl.debug_barrier()
    for i in tl.static_range(WIDTH - 1):
        state = inputs[i].to(state_ptrs.dtype.element_ty)
        tl.store(state_ptrs + i * stride, state, mask=in_dim)


# A kernel for all lengths: none is compiled anew for a number of tokens or sequences.
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

    # 3. Sequence by sequence: the outputs that a state reaches, and the states of those that begin
    # here.
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


@triton.jit
def load_state(state_ptrs, stride, started, in_dim, WIDTH: tl.constexpr):
    """What is before a sequence's first token, float32: its state, or zeros."""
    inputs = ()
    for i in tl.static_range(WIDTH - 1):
        x = tl.load(state_ptrs + i * stride, mask=in_dim & started, other=0.0)
        inputs = inputs + (x.to(tl.float32),)
    return inputs


# What a loop does not change, compilers compute before it and keep in registers, also where it is
# seldom needed.
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
    """Adjacent tokens as they are in memory: what a loop carries as numbers of 16 bits, compilers
    take apart at its end, so that the loads would have to be awaited there."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x_row + i * stride, mask=mask, other=0),)
    return rows


@triton.jit
def below(numbers, stop, ALL: tl.constexpr):
    """numbers < stop; ALL: as is known, so that there are no masks."""
    return tl.full(numbers.shape, True, tl.int1) if ALL else numbers < stop


@triton.jit
def channels_of(row, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """float32 [BLOCK_DIM] of a row."""
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
    """Outputs of some tokens, and the last WIDTH - 1 inputs after them."""
    for i in tl.static_range(len(rows)):
        past = past + (channels_of(rows[i], dtype, PAIRS),)
        out = convolved(past, weights, bias, WIDTH, SILU).to(out_row.dtype.element_ty)
        tl.store(out_row + i * stride, out, mask=in_dim)
        past = past[1:]
    return past


@triton.jit(do_not_specialize=["tokens", "bounds", "pad_slot_id", "span"])
def causal_conv1d_rolling_kernel(
    x_ptr, weight_ptr, bias_ptr, query_start_loc_ptr, state_ptr, cache_indices_ptr,
    has_initial_ptr, out_ptr,
    dim, tokens, bounds, pad_slot_id, span,
    weight_stride_dim, weight_stride_tap, state_stride_slot, state_stride_dim, state_stride_tap,
    X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, PAIRS: tl.constexpr, WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    TOKEN_AXIS: tl.constexpr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """`span` tokens, a multiple of 2 * HALF, of BLOCK_DIM channels that are adjacent in memory.
    PAIRS: two channels are read as one int32; WORDS: a channel's taps as one int64; EVEN: BLOCK_DIM
    divides `dim`. Strides of x and out are of tokens, and constants, so that a row's address within
    a block costs nothing."""
    sequences = bounds - 1
    BLOCK: tl.constexpr = 2 * HALF
    tl.static_assert(BLOCK >= WIDTH)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Short sequences are often packed at the ends, and take longest: these are not the last begun.
    at = tl.program_id(TOKEN_AXIS) + tl.num_programs(TOKEN_AXIS) // 2
    begin = tl.where(at < tl.num_programs(TOKEN_AXIS), at, at - tl.num_programs(TOKEN_AXIS)) * span
    end = tl.minimum(begin + span, tokens)
    first = tl.program_id(1 - TOKEN_AXIS) * BLOCK_DIM
    channels = first + tl.arange(0, BLOCK_DIM)
    in_dim = below(channels, dim, EVEN)
    out_ptrs = out_ptr + channels
    if PAIRS:
        STRIDE: tl.constexpr = X_STRIDE // 2
        words = first // 2 + tl.arange(0, BLOCK_DIM // 2)
        x_ptrs = x_ptr.to(tl.pointer_type(tl.int32)) + words
        in_row = below(words, dim // 2, EVEN)
    else:
        STRIDE: tl.constexpr = X_STRIDE
        x_ptrs = x_ptr + channels
        in_row = in_dim
    # All loads before all else, what the search needs first: it is done when the tokens come.
    stops = load_stops(query_start_loc_ptr, 0, sequences, tokens)
    x_row = x_ptrs + begin.to(tl.int64) * STRIDE
    before = next_rows(x_row - (WIDTH - 1) * STRIDE, STRIDE, in_row & (begin > 0), WIDTH - 1)
    rows = next_rows(x_row, STRIDE, in_row & (begin + BLOCK <= end), HALF)
    if WORDS:
        weights = load_words(weight_ptr, channels, in_dim)
    else:
        weight_ptrs = weight_ptr + channels * weight_stride_dim
        weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    bias = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)

    # 1. The sequence of the first token, and the inputs before that.
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

    # 2. Pieces of sequences, none longer than a block. Most often they are whole blocks.
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
            # Whole blocks, and the loads of what follows before the arithmetic. Where no whole
            # block does, they are of this one again.
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
