"""Attention over blocks of a cache, and where the cache keeps what: against plain loops."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim

import export.attention
from export.attention import (
    NOWHERE,
    UNIT,
    BlockCache,
    Chunk,
    DecodeAttention,
    PrefillAttention,
    Slots,
    attention,
    block_sizes,
    choose,
)
from models.cache import FullCache, SlidingCache

SIZE, TRACED, MOST_TOKENS = 8, 3, 11
FAR = 130_000  # Almost the last of Gemma 3's positions.


# The attention


@dataclass(frozen=True)
class Case:
    """The arguments of `attention`; `cached` blocks come before the chunk of a growing one."""

    kv_heads: int
    group: int
    cached: tuple[int, ...]
    windowed: bool = False
    growing: bool = True

    def __str__(self) -> str:
        kind = "ring and chunk" if self.windowed else "chunk" if self.growing else "decode"
        return f"{kind} {self.kv_heads}x{self.group} {self.cached}"


DECODING = [
    Case(kv_heads, group, cached, growing=False)
    for kv_heads, group, cached in [
        (1, 1, (5,)), (1, 4, (16,)), (2, 1, (9, 9)), (1, 2, (9, 9, 17)), (2, 2, (9, 9, 17, 33)),
        (2, 4, (5, 13, 1)), (1, 4, (2, 3, 4, 5, 6, 7)),
    ]
]  # fmt: skip
CHUNKS = [
    Case(kv_heads, group, cached)
    for kv_heads, group, cached in [
        (1, 1, ()), (1, 4, ()), (2, 2, ()), (1, 1, (5,)), (2, 4, (9, 9)), (1, 2, (9, 9, 17)),
        (2, 1, (5, 5, 9, 17)), (1, 4, (2, 3, 4, 5, 6, 7)),
    ]
]  # fmt: skip
RINGS = [
    Case(kv_heads, group, (slots,), windowed=True)
    for kv_heads, group, slots in [(1, 1, 11), (1, 4, 16), (2, 1, 12), (2, 2, 11), (2, 4, 16)]
]
CASES = DECODING + CHUNKS + RINGS


@dataclass
class Scene:
    """What an attention is given: q [K, T, G D], the queries' positions int64 [T], and for each
    block k, v [K, S, D] and the positions of its slots, None for what nobody may see."""

    q: torch.Tensor
    queries: torch.Tensor
    blocks: list[tuple[torch.Tensor, torch.Tensor, list[int | None]]]

    def arguments(self, case: Case) -> list[torch.Tensor]:
        rows = (self.queries.repeat_interleave(case.group).float()[:, None] + 0.5) * UNIT
        if not case.growing:
            rows = rows[:1]
        arguments = [self.q, rows]
        if case.windowed:
            arguments.append(rows - case.cached[0] * UNIT)
        for k, v, positions in self.blocks:
            places = [NOWHERE if p is None else p * UNIT for p in positions]
            arguments += k, v, torch.tensor([places])
        return arguments

    def expected(self, case: Case) -> torch.Tensor:
        """One head and one query at a time, over what it sees, in float64."""
        k, v = (torch.cat([block[i] for block in self.blocks], 1).double() for i in range(2))
        positions = [p for block in self.blocks for p in block[2]]
        window = case.cached[0] if case.windowed else float("inf")
        out = torch.empty(*self.q.shape[:2], case.group, SIZE, dtype=torch.float64)
        for t, query in enumerate(self.queries.tolist()):
            seen = [
                i for i, p in enumerate(positions) if p is not None and query - window < p <= query
            ]
            for head in range(case.kv_heads):
                for g, q in enumerate(self.q[head, t].double().view(case.group, SIZE)):
                    weights = torch.softmax(k[head, seen] @ q, 0)
                    out[head, t, g] = weights @ v[head, seen]
        return out.flatten(2)


def scene(case: Case, begin: int, tokens: int, seed: int = 0) -> Scene:
    """A chunk of so many tokens from `begin` on, or one token decoded there. The cache holds the
    newest positions in any order; of every four slots one is nobody's and one is too new."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 1.5 * torch.randn(*shape, generator=generator)

    newest, slots = begin - 1 if case.growing else begin, sum(case.cached)
    positions: list[int | None] = [newest - i if i <= newest else None for i in range(slots)]
    positions[2::4] = [None] * len(positions[2::4])
    positions[3::4] = [begin + tokens + i for i in range(len(positions[3::4]))]
    blocks, order = [], torch.randperm(slots, generator=generator).tolist()
    for size in case.cached:
        k, v = (random(case.kv_heads, size, SIZE) for _ in range(2))
        blocks.append((k, v, [positions[i] for i in order[:size]]))
        order = order[size:]
    queries = torch.arange(begin, begin + tokens)
    if case.growing:
        k, v = (random(case.kv_heads, tokens, SIZE) for _ in range(2))
        blocks.append((k, v, queries.tolist()))
    return Scene(random(case.kv_heads, tokens, case.group * SIZE), queries, blocks)


@pytest.fixture(scope="module")
def attention_of(as_method):
    """A function: a case -> its attention as a function of tensors, traced with TRACED tokens."""

    @functools.cache
    def load(case: Case):
        tokens = TRACED if case.growing else 1
        sizes = [*case.cached, *[tokens] * case.growing]
        call = attention(
            *(case.kv_heads, case.group, SIZE, tokens, sizes),
            windowed=case.windowed,
            growing=case.growing,
        )
        examples = scene(case, 40, tokens).arguments(case)
        shapes: list[dict] = [{} for _ in examples]
        if case.growing:
            length = Dim("T", min=1, max=MOST_TOKENS)
            rows = length if case.group == 1 else case.group * length
            for i in range(1, 2 + case.windowed):
                shapes[i] = {0: rows}
            for i in (0, -3, -2, -1):
                shapes[i] = {1: length}
        return as_method(lambda *inputs: call(*inputs)[0], examples, shapes)

    return load


def lengths(case: Case) -> tuple[int, ...]:
    return (1, 2, TRACED, 7, MOST_TOKENS) if case.growing else (1,)


def assert_right(attend, case: Case, given: Scene) -> None:
    (actual,) = attend(*given.arguments(case))
    torch.testing.assert_close(actual.double(), given.expected(case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("begin", [0, 1, 6, 50, FAR])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_a_softmax_over_what_each_query_sees(attention_of, case, begin):
    for tokens in lengths(case):
        assert_right(attention_of(case), case, scene(case, begin, tokens, seed=tokens))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_nobody_may_see_changes_nothing(attention_of, case):
    given = scene(case, 50, lengths(case)[-1])
    before = attention_of(case)(*given.arguments(case))[0]
    for k, v, positions in given.blocks:
        hidden = torch.tensor([p is None or p > given.queries[-1] for p in positions])
        k[:, hidden], v[:, hidden] = 1e3, 1e30
    assert torch.equal(attention_of(case)(*given.arguments(case))[0], before)


@pytest.mark.parametrize("hidden", [0, 1])
@pytest.mark.parametrize("case", [c for c in CASES if len(c.cached) > 1], ids=str)
def test_a_block_may_be_hidden_as_a_whole(attention_of, case, hidden):
    given = scene(case, 50, lengths(case)[-1])
    k, v, positions = given.blocks[hidden]
    given.blocks[hidden] = (k, v, [None] * len(positions))
    # In decode somebody must be left to be seen.
    given.blocks[-1][2][0] = 50
    assert_right(attention_of(case), case, given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_score_that_is_not_to_be_seen_may_be_larger_by_hundreds_of_thousands(attention_of, case):
    given = scene(case, 50, lengths(case)[-1])
    # Scores are i + 200,000 of what no query sees, i - 200,000 of the rest: exact in float32.
    given.q.view(-1, SIZE)[:] = torch.tensor([1.0, 400.0] + [0.0] * (SIZE - 2))
    for k, _, positions in given.blocks:
        k.zero_()
        for i, position in enumerate(positions):
            seen = position is not None and position <= given.queries[0]
            k[:, i, 0], k[:, i, 1] = i % 3, -500 if seen else 500
    assert_right(attention_of(case), case, given)


# The slots


def slots_of(kind: type, count: int, first_block: int) -> Slots:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.attention, "FIRST_BLOCK", first_block)
        return Slots(kind(1, count, 1, 1))


def place(slots: Slots, position: int) -> tuple[int, int]:
    """The block that keeps a position, and the slot in it."""
    if slots.ring:
        return 0, position % slots.count
    block = 0
    while position >= slots.sizes[block]:
        position -= slots.sizes[block]
        block += 1
    return block, position


all_slots = st.builds(
    slots_of, st.sampled_from([SlidingCache, FullCache]), st.integers(1, 70), st.integers(1, 9)
)


@pytest.mark.parametrize(
    "slots, sizes",
    [
        (4096, [512, 1536, 2048]), (32768, [512, 1536, 6144, 24576]), (200, [200]), (512, [512]),
        (513, [512, 1]), (2049, [512, 1536, 1]),
    ],
)  # fmt: skip
def test_every_block_quadruples_the_cache(slots, sizes):
    assert block_sizes(slots) == sizes


@settings(deadline=None)
@given(all_slots)
def test_blocks_have_as_many_slots_as_the_cache_and_a_spare_one_if_there_are_several(slots):
    assert sum(slots.sizes) == slots.count
    assert min(slots.sizes) > 0
    assert slots.spare == (len(slots.sizes) > 1)
    assert [p.shape for p in slots.positions] == [(1, s + slots.spare) for s in slots.sizes]


@settings(deadline=None)
@given(all_slots, st.data())
def test_each_position_is_stored_at_its_own_place_and_otherwise_in_spare_slots(slots, data):
    length = data.draw(st.integers(1, slots.count))
    start = data.draw(st.integers(0, 300 if slots.ring else slots.count - length))
    indices = slots.indices(torch.arange(start, start + length))
    assert {index.dtype for index in indices} == {torch.int64}
    for i, position in enumerate(range(start, start + length)):
        block, slot = place(slots, position)
        expected = list(slots.sizes)
        expected[block] = slot
        assert [index[i].item() for index in indices] == expected


@settings(deadline=None)
@given(all_slots)
def test_decode_sees_of_each_slot_its_own_position_and_never_a_spare_one(slots):
    expected = [[NOWHERE] * (size + slots.spare) for size in slots.sizes]
    for position in range(slots.count):
        block, slot = place(slots, position)
        expected[block][slot] = position * UNIT
    assert [positions.tolist() for positions in slots.positions] == [[row] for row in expected]


@settings(deadline=None)
@given(all_slots, st.data())
def test_a_chunk_sees_the_positions_that_were_stored_before_it(slots, data):
    start = data.draw(st.integers(0, 300 if slots.ring else slots.count - 1))
    expected = [[NOWHERE] * (size + slots.spare) for size in slots.sizes]
    for position in range(start):
        block, slot = place(slots, position)
        expected[block][slot] = position * UNIT
    length = data.draw(st.integers(1, 5))
    held = slots.held(torch.arange(start, start + length))
    assert {block.dtype for block in held} == {torch.float32}
    assert [block.tolist() for block in held] == [[row] for row in expected]


@settings(deadline=None)
@given(all_slots, st.lists(st.integers(1, 9), max_size=9))
def test_a_cache_holds_the_newest_of_what_was_stored(slots, chunks):
    kind = SlidingCache if slots.ring else FullCache
    cache = BlockCache(kind(1, slots.count, 2, 3), slots)
    expected = [torch.zeros(2, 2, size, 3) for size in slots.sizes]
    start = 0
    for length in chunks:
        length = min(length, slots.count if slots.ring else slots.count - start)
        k, v = torch.randn(2, 2, length, 3)
        cache.store(k, v, slots.indices(torch.arange(start, start + length)))
        for i in range(length):
            block, slot = place(slots, start + i)
            expected[block][0, :, slot], expected[block][1, :, slot] = k[:, i], v[:, i]
        start += length
    for (k, v), (old_k, old_v), size in zip(cache.pairs(), expected, slots.sizes, strict=True):
        assert torch.equal(k[:, :size], old_k) and torch.equal(v[:, :size], old_v)


# The choice


BRANCHES = [functools.partial(lambda i, x, y: x * y + i, float(i)) for i in range(4)]


def test_the_first_branch_is_chosen_whose_limit_is_not_passed(as_method):
    def function(value, x, y):
        return choose(value[0], [0, 5, 6], BRANCHES, (x, y)).clone()

    run = as_method(function, (torch.zeros(1, dtype=torch.int64), torch.ones(2), torch.ones(2)))
    x, y = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 100.0])
    # To and fro, so that nothing of an earlier call stays.
    for value, branch in [(0, 0), (7, 3), (1, 1), (5, 1), (6, 2), (-3, 0), (999, 3), (4, 1)]:
        assert torch.equal(run(torch.tensor([value]), x, y)[0], x * y + branch)


def test_a_single_branch_is_no_choice():
    x, y = torch.tensor([2.0]), torch.tensor([3.0])
    assert choose(torch.tensor(9), [], BRANCHES[1:2], (x, y)) == 7.0


@pytest.fixture
def plain_attention(monkeypatch):
    """Replaces `attention` by plain torch of the same contract, and lists the blocks of each call:
    branches run in eager mode, which runs no delegates."""
    called = []

    def plain(kv_heads, group, head_dim, tokens, blocks, windowed, growing):
        def call(q, newest, *rest):
            oldest, rest = (rest[0], rest[1:]) if windowed else (None, rest)
            k, v, positions = rest[::3], rest[1::3], rest[2::3]
            sizes = [block.shape[1] for block in k]
            assert sizes[: len(sizes) - growing] == blocks[: len(blocks) - growing]
            called.append(sizes)
            seen = torch.cat(positions, 1) <= newest
            if windowed:
                seen[:, : sizes[0]] &= positions[0] > oldest
            scores = q.view(kv_heads, -1, head_dim) @ torch.cat(k, 1).transpose(1, 2)
            weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
            return [(weights @ torch.cat(v, 1)).view(kv_heads, -1, group * head_dim)]

        return call

    monkeypatch.setattr(export.attention, "attention", plain)
    return called


def attend(slots: Slots, cache: BlockCache, q, k, v, start: int, decode: bool) -> torch.Tensor:
    """What export/pte.py's methods do for one layer with q [K, T, G D] and k, v [K, T, D]."""
    kv_heads, length, head_dim = k.shape
    shape = kv_heads, q.shape[2] // head_dim, head_dim
    positions = torch.arange(start, start + length)
    rows = (positions.float() * UNIT)[:, None]
    newest = (rows + UNIT / 2).repeat_interleave(shape[1], 0)
    if decode:
        cache.store(k, v, slots.indices(positions))
        return DecodeAttention(slots, *shape)(q, cache, slots, positions[0], newest[:1])
    chunk = Chunk(
        begin=positions[0],
        positions=rows.view(1, -1),
        newest=newest,
        oldest=newest - slots.count * UNIT,
        held=slots.held(positions),
    )
    out = PrefillAttention(slots, *shape, length)(q, k, v, cache, chunk)
    cache.store(k, v, slots.indices(positions))
    return out


@pytest.mark.parametrize("kind", [SlidingCache, FullCache])
@pytest.mark.parametrize("first_block, count", [(1, 7), (2, 11), (3, 30), (4, 16), (9, 9)])
@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_chunks_and_decode_steps_see_what_the_networks_own_cache_shows(
    plain_attention, one_thread, kind, first_block, count, length
):
    kv_heads, group = 2, 2
    slots, own = slots_of(kind, count, first_block), kind(1, count, kv_heads, SIZE)
    cache = BlockCache(own, slots)
    torch.manual_seed(0)
    # Twice from position 0 on, so that there are stale slots.
    for steps in ([(0, False)] * 3 + [(1, True)] * 30, [(0, False), (1, True)] * 15):
        start = 0
        for one, decode in steps:
            tokens = min(one or length, 60 - start if slots.ring else count - start)
            if tokens == 0:
                break
            q = torch.randn(kv_heads, tokens, group * SIZE)
            k, v = torch.randn(2, kv_heads, tokens, SIZE)
            heads = (
                q.view(kv_heads, tokens, group, SIZE).transpose(0, 1).reshape(1, tokens, -1, SIZE)
            )
            expected = (own.decode if decode else own.prefill)(
                heads,
                *(x.transpose(0, 1)[None] for x in (k, v)),
                torch.arange(start, start + tokens),
                1.0,
            )
            actual = attend(slots, cache, q, k, v, start, decode)
            actual = actual.view(kv_heads, tokens, group, SIZE).transpose(0, 1).flatten(1, 2)
            torch.testing.assert_close(actual, expected[0], rtol=1e-5, atol=1e-5)
            start += tokens


def test_only_the_blocks_that_the_position_asks_for_are_attended_to(plain_attention):
    slots = slots_of(FullCache, 20, 2)  # blocks of 2, 6 and 12
    cache = BlockCache(FullCache(1, 20, 1, SIZE), slots)
    blocks = [3, 7, 13]
    for start in range(20):
        q, k, v = torch.zeros(3, 1, 1, SIZE)
        before = sum(start > limit for limit in (0, 2, 8))
        attend(slots, cache, q, k, v, start, decode=False)
        assert plain_attention.pop() == [*blocks[:before], 1]
        upto = sum(start >= limit for limit in (0, 2, 8))
        attend(slots, cache, q, k, v, start, decode=True)
        assert plain_attention.pop() == blocks[:upto]
