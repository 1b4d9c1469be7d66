"""KV caches against what they mean: the whole history, and a plain loop over it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloop.models.cache import FullCache, SlidingCache

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.3
KINDS = [SlidingCache, FullCache]
ROWS, WINDOW, POSITIONS = 3, 5, 30
# A chunk of one row (which one, whether from position 0 on, how many tokens), or None for a step of
# all rows.
CHUNKS = st.tuples(st.integers(0, ROWS - 1), st.booleans(), st.integers(1, WINDOW))
CALLS = st.lists(st.one_of(CHUNKS, st.none()), max_size=25)


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v [1, T, H or K, D], large enough for attention to be uneven."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        2 * torch.randn(1, count, heads, SIZE, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def attention_over_history(q, k, v, window: int) -> torch.Tensor:
    """Each query over the last `window` positions, one position and one head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for position in range(q.shape[1]):
        seen = slice(max(0, position - window + 1), position + 1)
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            keys, values = k[0, seen, shared].double(), v[0, seen, shared].double()
            weights = torch.softmax(keys @ q[0, position, head].double() * SCALE, 0)
            out[0, position, head] = weights @ values
    return out


def feed(cache, q, k, v, lengths) -> torch.Tensor:
    """Prefill in chunks of the given lengths, decode what is left; all results [1, T, H, D]."""
    parts, start = [], 0
    for length in [*lengths, *[None] * (q.shape[1] - sum(lengths))]:
        step = cache.decode if length is None else cache.prefill
        chunk = slice(start, start + (length or 1))
        positions = torch.arange(chunk.start, chunk.stop)
        parts.append(step(q[:, chunk], k[:, chunk], v[:, chunk], positions, SCALE))
        start = chunk.stop
    return torch.cat(parts, 1)


@st.composite
def chunkings(draw) -> tuple[int, int, list[int]]:
    """(slots, tokens in all, chunk lengths of the part that is prefilled)."""
    slots = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, slots), max_size=6))
    return slots, sum(lengths) + draw(st.integers(0 if lengths else 1, 2 * slots)), lengths


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.data())
def test_a_prefill_sees_exactly_the_last_positions_that_the_ring_and_the_chunk_hold(
    slots, start, data
):
    length = data.draw(st.integers(1, slots))
    held = dict.fromkeys(range(slots))
    for position in range(start):
        held[position % slots] = position
    keys = [*held.values(), *range(start, start + length)]
    expected = [
        [key is not None and query - slots < key <= query for key in keys]
        for query in range(start, start + length)
    ]
    cache = SlidingCache(1, slots, 1, 1)
    visible = cache.visible_in_prefill(torch.arange(start, start + length))
    assert visible.dtype == torch.bool
    assert visible.tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.data())
def test_every_query_of_a_prefill_sees_as_many_keys_as_the_window_has(slots, start, data):
    length = data.draw(st.integers(1, slots))
    positions = torch.arange(start, start + length)
    visible = SlidingCache(1, slots, 1, 1).visible_in_prefill(positions)
    assert visible.sum(1).tolist() == [min(p + 1, slots) for p in positions.tolist()]


@settings(deadline=None)
@given(chunkings())
def test_a_ring_attends_over_the_last_slots_whatever_the_chunks(chunking):
    slots, count, lengths = chunking
    q, k, v = tokens(count)
    out = feed(SlidingCache(1, slots, KV_HEADS, SIZE), q, k, v, lengths)
    expected = attention_over_history(q, k, v, slots)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(chunkings())
def test_a_ring_holds_each_of_the_last_positions_in_its_own_slot(chunking):
    slots, count, lengths = chunking
    q, k, v = tokens(count)
    cache = SlidingCache(1, slots, KV_HEADS, SIZE)
    feed(cache, q, k, v, lengths)
    for position in range(max(0, count - slots), count):
        assert torch.equal(cache.k[:, position % slots], k[:, position])
        assert torch.equal(cache.v[:, position % slots], v[:, position])
    assert not cache.k[:, count:].any()
    assert not cache.v[:, count:].any()


@settings(deadline=None)
@given(chunkings())
def test_a_full_cache_attends_over_the_whole_history_whatever_the_chunks(chunking):
    _, count, lengths = chunking
    q, k, v = tokens(count)
    cache = FullCache(1, count + 3, KV_HEADS, SIZE)
    out = feed(cache, q, k, v, lengths)
    expected = attention_over_history(q, k, v, count)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.k[:, :count], k)
    assert torch.equal(cache.v[:, :count], v)
    assert not cache.k[:, count:].any()
    assert not cache.v[:, count:].any()


@settings(deadline=None)
@given(st.sampled_from([SlidingCache, FullCache]), st.integers(0, 11), st.integers(1, 5))
def test_a_sequence_from_position_0_sees_nothing_of_the_one_before(kind, length, prefilled):
    before, now = tokens(11, seed=1), tokens(max(length, prefilled), seed=2)
    used, fresh = (kind(1, 11 if kind is FullCache else 5, KV_HEADS, SIZE) for _ in range(2))
    feed(used, *before, [5, 5])
    assert torch.equal(feed(used, *now, [prefilled]), feed(fresh, *now, [prefilled]))


@settings(deadline=None)
@given(st.sampled_from(KINDS), CALLS)
def test_a_row_of_a_batch_attends_to_and_holds_what_it_would_alone(kind, calls):
    # Rows are ahead of one another, and any of them may begin anew while others go on.
    slots = WINDOW if kind is SlidingCache else POSITIONS
    together = kind(ROWS, slots, KV_HEADS, SIZE)
    alone = [kind(1, slots, KV_HEADS, SIZE) for _ in range(ROWS)]
    ends = [0] * ROWS
    for seed, call in enumerate(calls):
        if call is None:
            ends = [end if end < POSITIONS else 0 for end in ends]
            given = [tokens(1, seed=ROWS * seed + row) for row in range(ROWS)]
            joined = (torch.cat(parts) for parts in zip(*given))
            actual = together.decode(*joined, torch.tensor(ends), SCALE)
            expected = torch.cat(
                [
                    cache.decode(*one, torch.tensor([end]), SCALE)
                    for cache, one, end in zip(alone, given, ends, strict=True)
                ]
            )
            ends = [end + 1 for end in ends]
        else:
            row, anew, length = call
            start = 0 if anew or ends[row] + length > POSITIONS else ends[row]
            ends[row] = start + length
            given, positions = tokens(length, seed=seed), torch.arange(start, ends[row])
            actual = together.prefill(*given, positions, SCALE, torch.tensor([row]))
            expected = alone[row].prefill(*given, positions, SCALE)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(together.k, torch.cat([cache.k for cache in alone]))
    assert torch.equal(together.v, torch.cat([cache.v for cache in alone]))


@pytest.mark.parametrize("row", range(ROWS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_of_a_row_leaves_the_others_as_they_were(kind, row):
    cache = kind(ROWS, 9, KV_HEADS, SIZE)
    for buffer in (cache.k, cache.v):
        torch.nn.init.normal_(buffer, generator=torch.Generator().manual_seed(row))
    before = copy.deepcopy(cache)
    cache.prefill(*tokens(9), torch.arange(9), SCALE, torch.tensor([row]))
    others = [other for other in range(ROWS) if other != row]
    assert torch.equal(cache.k[others], before.k[others])
    assert torch.equal(cache.v[others], before.v[others])
    assert torch.equal(cache.k[[row]], tokens(9)[1]) and torch.equal(cache.v[[row]], tokens(9)[2])


def test_a_cache_is_updated_in_place():
    for cache in (SlidingCache(1, 4, KV_HEADS, SIZE), FullCache(1, 9, KV_HEADS, SIZE)):
        before = cache.k.data_ptr(), cache.v.data_ptr()
        feed(cache, *tokens(9), [4, 2])
        assert (cache.k.data_ptr(), cache.v.data_ptr()) == before


def test_a_row_is_updated_in_place():
    for cache in (SlidingCache(2, 4, KV_HEADS, SIZE), FullCache(2, 9, KV_HEADS, SIZE)):
        before = cache.k.data_ptr(), cache.v.data_ptr()
        cache.prefill(*tokens(4), torch.arange(4), SCALE, torch.tensor([1]))
        step = (torch.cat([one, one]) for one in tokens(1))
        cache.decode(*step, torch.tensor([0, 4]), SCALE)
        assert (cache.k.data_ptr(), cache.v.data_ptr()) == before


def test_a_checkpoint_of_a_cache_is_empty():
    assert not SlidingCache(1, 4, KV_HEADS, SIZE).state_dict()
    assert not FullCache(1, 4, KV_HEADS, SIZE).state_dict()
