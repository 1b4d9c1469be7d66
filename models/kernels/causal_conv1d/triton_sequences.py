"""How a program of the convolution finds the sequence of its first token in query_start_loc."""

import triton
import triton.language as tl

# PARTS times SEARCH sequences are looked at together: one to each thread of a warp, so that all
# warps look at the same ones and need not wait for each other.
SEARCH = tl.constexpr(32)
PARTS = tl.constexpr(4)


@triton.jit
def load_stops(query_start_loc_ptr, base, sequences, tokens):
    """Ends of the sequences from number `base` on, PARTS of int32 [SEARCH]; where there is no
    sequence, more than `tokens`."""
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
    """The sequence of token `begin`, its start and its stop, given the first `stops`; the tokens
    after the last sequence count as one more."""
    sequence, start, stop = located(stops, begin, tokens)
    base = PARTS * SEARCH
    while base < sequences:
        stops = load_stops(query_start_loc_ptr, base, sequences, tokens)
        count, last, first = located(stops, begin, tokens)
        sequence, start, stop = sequence + count, tl.maximum(start, last), tl.minimum(stop, first)
        base += PARTS * SEARCH
    return sequence, start, stop
