"""Triton kernels of the causal convolution; cuda.py launches them, conv1d.py says what they do.

Programs share out tokens and channels, not sequences: their number depends on sizes alone, and a
batch of one long and many short sequences costs what an even one does. Each finds the sequences of
its tokens in query_start_loc, and computes all its tokens as if sequences began with zeros, but the
first one that begins in its block with that one's state. Then it goes through all that begin there:
first tokens that are still to come are computed with the state, and the last inputs replace it. One
program does both, also where the tokens reach into the next block; were they two, one could write
the slot before the other has read it.

Loops are `while`: Triton's interpreter cannot make a range of tensors.
"""

import triton
import triton.language as tl

# Sequences that are looked at together.
SEARCH = tl.constexpr(128)


@triton.jit
def activated(x, SILU: tl.constexpr):
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    return x


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
def find(query_start_loc_ptr, sequences, tokens, begin, end):
    """(the sequence of token `begin`, a bit for each token from there to `end` that is the first
    of a sequence). What follows the last sequence counts as one more."""
    first = 0
    firsts = tl.zeros([], tl.int64)
    base = 0
    while base <= sequences:
        numbers = base + tl.arange(0, SEARCH)
        loc_ptrs = query_start_loc_ptr + numbers
        starts = tl.load(loc_ptrs, mask=numbers <= sequences, other=tokens)
        stops = tl.load(loc_ptrs + 1, mask=numbers < sequences, other=tokens)
        first += tl.sum((stops <= begin).to(tl.int32) * (numbers < sequences))
        is_in = (starts >= begin) & (starts < end) & (stops > starts)
        firsts += tl.sum(tl.where(is_in, 1, 0).to(tl.int64) << tl.where(is_in, starts - begin, 0))
        base += SEARCH
    return first, firsts


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
def leading(
    query_start_loc_ptr, cache_indices_ptr, has_initial_ptr, state_ptr, channels, in_dim,
    sequence, sequences, begin, end, pad_slot_id,
    state_stride_slot, state_stride_dim, state_stride_tap,
    HAS_INDICES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(`sequence`, its first token's number in the block, its state float32 or zeros), or -1 twice
    where it does not begin in the block, is empty or has no slot."""
    exists = sequence < sequences
    start = tl.load(query_start_loc_ptr + sequence, mask=exists, other=0)
    stop = tl.load(query_start_loc_ptr + sequence + 1, mask=exists, other=0)
    if HAS_INDICES:
        slot = tl.load(cache_indices_ptr + sequence, mask=exists, other=0).to(tl.int64)
    else:
        slot = sequence.to(tl.int64)
    started = tl.load(has_initial_ptr + sequence, mask=exists, other=0) != 0
    is_here = exists & (start >= begin) & (start < end) & (stop > start) & (slot != pad_slot_id)
    state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
    before = ()
    for tap in tl.static_range(WIDTH - 1):
        x = tl.load(state_ptrs + tap * state_stride_tap, in_dim & is_here & started, other=0.0)
        before = before + (x.to(tl.float32),)
    return tl.where(is_here, sequence, -1), tl.where(is_here, start - begin, -1), before


@triton.jit
def roll(
    rows, before, lead, out_ptrs, weights, bias, in_dim, begin, tokens, first_start, firsts, skip,
    out_stride_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, INNER: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A block token by token, of what load_rows gave. The sequence that begins at token number
    `lead` of it (-1: none) begins with `before`, others with zeros. INNER: all of it is within one
    sequence, and all of it is to be stored."""
    past = ()
    for i in tl.static_range(WIDTH - 1):
        known = begin - (WIDTH - 1) + i >= first_start
        past = past + (tl.where(known, rows[i].to(tl.float32), 0.0),)
    out_row = out_ptrs + begin.to(tl.int64) * out_stride_token
    for i in tl.static_range(BLOCK_TOKENS):
        stored = in_dim
        if not INNER:
            stored = in_dim & (begin + i < tokens) & (i >= skip)
            is_first = ((firsts >> i) & 1) != 0
            held = past
            past = ()
            for tap in tl.static_range(WIDTH - 1):
                initial = tl.where(lead == i, before[tap], 0.0)
                past = past + (tl.where(is_first, initial, held[tap]),)
        past = past + (rows[WIDTH - 1 + i].to(tl.float32),)
        sums = bias
        for tap in tl.static_range(WIDTH):
            sums = tl.fma(weights[tap], past[tap], sums)
        out = activated(sums, SILU).to(out_row.dtype.element_ty)
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
def last_input(
    x_ptrs, state_ptrs, in_dim, start, stop, started, x_stride_token, state_stride_tap,
    COLUMN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Column COLUMN of what a sequence leaves: an input, or in a short sequence what was before."""
    source = stop - (WIDTH - 1) + COLUMN
    x = tl.load(
        x_ptrs + source.to(tl.int64) * x_stride_token, mask=in_dim & (source >= start), other=0.0
    )
    before = tl.load(
        state_ptrs + (COLUMN + stop - start) * state_stride_tap,
        mask=in_dim & (source < start) & started, other=0.0,
    )  # fmt: skip
    return tl.where(source >= start, x, before).to(state_ptrs.dtype.element_ty)


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
    """BLOCK_TOKENS tokens (64 at most) of BLOCK_DIM channels."""
    blocks = tl.cdiv(dim, BLOCK_DIM)
    begin = (tl.program_id(0) // blocks) * BLOCK_TOKENS
    end = tl.minimum(begin + BLOCK_TOKENS, tokens)
    channels = (tl.program_id(0) % blocks) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    x_ptrs = x_ptr + channels.to(tl.int64) * x_stride_dim
    out_ptrs = out_ptr + channels.to(tl.int64) * out_stride_dim
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    # All loads before all else: nothing waits for the search, and no store is between them.
    bias = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    if ROLLING:
        rows = load_rows(x_ptrs, in_dim, begin, tokens, x_stride_token, WIDTH, BLOCK_TOKENS)

    # 1. Where sequences begin, and how many of the first tokens the block before computes.
    first, firsts = find(query_start_loc_ptr, sequences, tokens, begin, end)
    first_start = tl.load(query_start_loc_ptr + first)
    skip = 0
    if (first_start < begin) & (begin < first_start + WIDTH - 1) & (first < sequences):
        is_pad = load_slot(cache_indices_ptr, first, HAS_INDICES) == pad_slot_id
        if (tl.load(has_initial_ptr + first) != 0) & (is_pad == 0):
            first_stop = tl.load(query_start_loc_ptr + first + 1)
            skip = tl.minimum(first_start + WIDTH - 1, first_stop) - begin

    # 2. All tokens, as if sequences began with zeros, but one.
    lead = -1
    if ROLLING:
        if (firsts == 0) & (skip == 0) & (begin + BLOCK_TOKENS <= tokens):
            roll(
                rows, rows, -1, out_ptrs, weights, bias, in_dim, begin, tokens, first_start,
                firsts, skip, out_stride_token, WIDTH, SILU, True, BLOCK_TOKENS,
            )  # fmt: skip
            return
        following = first + tl.where(first_start < begin, 1, 0)
        lead, at, before = leading(
            query_start_loc_ptr, cache_indices_ptr, has_initial_ptr, state_ptr, channels, in_dim,
            following, sequences, begin, end, pad_slot_id,
            state_stride_slot, state_stride_dim, state_stride_tap, HAS_INDICES, WIDTH,
        )  # fmt: skip
        roll(
            rows, before, at, out_ptrs, weights, bias, in_dim, begin, tokens, first_start, firsts,
            skip, out_stride_token, WIDTH, SILU, False, BLOCK_TOKENS,
        )  # fmt: skip
    else:
        whole(
            x_ptrs, out_ptrs, weights, bias, in_dim, begin, end, first, first_start, sequences,
            skip, query_start_loc_ptr, x_stride_token, out_stride_token, WIDTH, SILU, BLOCK_TOKENS,
        )  # fmt: skip

    # 3. The sequences that begin here: their first tokens with the state, and their state anew.
    sequence = first
    start = first_start
    while (sequence < sequences) & (start < end):
        stop = tl.load(query_start_loc_ptr + sequence + 1)
        slot = load_slot(cache_indices_ptr, sequence, HAS_INDICES)
        if (start >= begin) & (stop > start) & (slot != pad_slot_id):
            started = tl.load(has_initial_ptr + sequence) != 0
            state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
            # Threads may store here what others have stored or read above.
            tl.debug_barrier()
            if started & ((sequence != lead) | (start + WIDTH - 1 > end)):
                for i in tl.static_range(WIDTH - 1):
                    mask = in_dim & (start + i < stop)
                    sums = bias
                    for tap in tl.static_range(WIDTH):
                        if i + tap < WIDTH - 1:
                            x = tl.load(state_ptrs + (i + tap) * state_stride_tap, mask, other=0.0)
                        else:
                            source = (start + (i + tap - (WIDTH - 1))).to(tl.int64)
                            x = tl.load(x_ptrs + source * x_stride_token, mask, other=0.0)
                        sums = tl.fma(weights[tap], x.to(tl.float32), sums)
                    out = activated(sums, SILU).to(out_ptr.dtype.element_ty)
                    tl.store(out_ptrs + (start + i).to(tl.int64) * out_stride_token, out, mask=mask)
            bounds = start, stop, started, x_stride_token, state_stride_tap
            left = ()
            for column in tl.static_range(WIDTH - 1):
                left = left + (last_input(x_ptrs, state_ptrs, in_dim, *bounds, column, WIDTH),)
            tl.debug_barrier()
            for column in tl.static_range(WIDTH - 1):
                tl.store(state_ptrs + column * state_stride_tap, left[column], mask=in_dim)
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
    started = kept & (tl.load(has_initial_ptr + row) != 0)
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
    x_ptrs = x_ptr + row.to(tl.int64) * x_stride_row + channels * x_stride_dim
    weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    sums = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
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
