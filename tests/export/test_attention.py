"""Attention over blocks of a cache, and where the cache keeps what: against plain loops."""

import copy
import functools
from dataclasses import dataclass
from itertools import accumulate, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim

from tokenloop.export.pte import block_cache
from tokenloop.export.pte.block_cache import (
    NOWHERE,
    UNIT,
    BlockCache,
    Chunk,
    DecodeAttention,
    PrefillAttention,
    SlotLayout,
    attention,
    block_sizes,
    choose,
)
from tokenloop.models.cache import FullCache, SlidingCache

SIZE, TRACED, MOST_TOKENS = 8, 3, 11
FAR = 130_000  # Almost the last of Gemma 3's positions.
# Chunks of so many tokens in one of three rows, and steps of all of them.
CALLS = st.lists(
    st.one_of(st.tuples(st.integers(0, 2), st.integers(1, 9)), st.just((None, 1))), max_size=12
)


# The attention


@dataclass(frozen=True)
class Case:
    """The arguments of `attention`; `cached` blocks come before the chunk of a growing one."""

    kv_heads: int
    group: int
    cached: tuple[int, ...]
    windowed: bool = False
    growing: bool = True
    rows: int = 1

    def __str__(self) -> str:
        kind = "ring and chunk" if self.windowed else "chunk" if self.growing else "decode"
        kind += f" {self.rows} rows" * (self.rows > 1)
        return f"{kind} {self.kv_heads}x{self.group} {self.cached}"


DECODING = [
    Case(kv_heads, group, cached, growing=False)
    for kv_heads, group, cached in [
        (1, 1, (5,)), (1, 4, (16,)), (2, 1, (9, 9)), (1, 2, (9, 9, 17)), (2, 2, (9, 9, 17, 33)),
        (2, 4, (5, 13, 1)), (1, 4, (2, 3, 4, 5, 6, 7)),
    ]
]  # fmt: skip
ROWS = [
    Case(kv_heads, group, cached, growing=False, rows=rows)
    for rows, kv_heads, group, cached in [
        (2, 1, 1, (5,)), (3, 1, 4, (16,)), (3, 2, 1, (9, 9)), (2, 2, 2, (9, 9, 17, 33)),
        (8, 2, 4, (5, 13, 2)), (3, 1, 4, (2, 3, 4, 5, 6, 7)),
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
    Case(kv_heads, group, cached, windowed=True)
    for kv_heads, group, cached in [
        (1, 1, (11,)), (1, 4, (16,)), (2, 1, (12,)), (2, 2, (11,)), (2, 4, (16,)), (1, 1, (4, 8)),
        (2, 2, (5, 9, 6)), (1, 4, (2, 3, 4, 5, 6, 7)),
    ]
]  # fmt: skip
CASES = DECODING + ROWS + CHUNKS + RINGS


@dataclass
class Scene:
    """What an attention is given: q [K, T, G D], the queries' positions int64 [T], and for each
    block k, v [K, S, D] and the positions of its slots, None for what nobody may see. Of B rows T
    is B, and the keys and values are [K B, S, D]."""

    q: torch.Tensor
    queries: torch.Tensor
    blocks: list[tuple[torch.Tensor, torch.Tensor, list[int | None]]]

    def arguments(self, case: Case) -> list[torch.Tensor]:
        newest = (self.queries.repeat_interleave(case.group).float()[:, None] + 0.5) * UNIT
        if case.rows > 1:
            newest = newest[:: case.group].repeat(case.kv_heads, 1)[:, :, None]
        elif not case.growing:
            newest = newest[:1]
        arguments = [self.q, newest]
        if case.windowed:
            arguments.append(newest - sum(case.cached) * UNIT)
        for k, v, positions in self.blocks:
            places = [NOWHERE if p is None else p * UNIT for p in positions]
            arguments += k, v, torch.tensor([places])
        return arguments

    def expected(self, case: Case) -> torch.Tensor:
        """One head and one query at a time, over what it sees, in float64."""
        k, v = (torch.cat([block[i] for block in self.blocks], 1).double() for i in range(2))
        positions = [p for block in self.blocks for p in block[2]]
        window = sum(case.cached) if case.windowed else float("inf")
        out = torch.empty(*self.q.shape[:2], case.group, SIZE, dtype=torch.float64)
        for t, query in enumerate(self.queries.tolist()):
            seen = [
                i for i, p in enumerate(positions) if p is not None and query - window < p <= query
            ]
            for head in range(case.kv_heads):
                own = head * case.rows + t % case.rows
                for g, q in enumerate(self.q[head, t].double().view(case.group, SIZE)):
                    weights = torch.softmax(k[own, seen] @ q, 0)
                    out[head, t, g] = weights @ v[own, seen]
        return out.flatten(2)

    def last_of(self, row: int, case: Case) -> int:
        """The last position that any query of a row sees."""
        return self.queries[row if case.rows > 1 else -1].item()


def scene(case: Case, begin: int, tokens: int, seed: int = 0) -> Scene:
    """A chunk of so many tokens from `begin` on, or one token decoded there, or one of each row, in
    the first of them there. The cache holds the newest positions in any order; of every four slots
    one is nobody's and one is too new. All rows see a slot, the one of position 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 1.5 * torch.randn(*shape, generator=generator)

    newest, slots = begin - 1 if case.growing else begin, sum(case.cached)
    positions: list[int | None] = [newest - i if i <= newest else None for i in range(slots)]
    positions[2::4] = [None] * len(positions[2::4])
    positions[3::4] = [begin + tokens + i for i in range(len(positions[3::4]))]
    if case.rows > 1:
        positions[0] = 0
    blocks, order = [], torch.randperm(slots, generator=generator).tolist()
    for size in case.cached:
        k, v = (random(case.kv_heads * case.rows, size, SIZE) for _ in range(2))
        blocks.append((k, v, [positions[i] for i in order[:size]]))
        order = order[size:]
    queries = torch.arange(begin, begin + tokens)
    if case.rows > 1:
        queries = torch.tensor([begin, 0, begin // 2, begin - 1] * 2)[: case.rows].clamp(min=0)
    if case.growing:
        k, v = (random(case.kv_heads, tokens, SIZE) for _ in range(2))
        blocks.append((k, v, queries.tolist()))
    return Scene(random(case.kv_heads, len(queries), case.group * SIZE), queries, blocks)


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
            rows=case.rows,
        )
        examples = scene(case, 40, tokens).arguments(case)
        shapes: list[dict] = [{} for _ in examples]
        if case.growing:
            length = Dim("T", min=1, max=MOST_TOKENS)
            queries = length if case.group == 1 else case.group * length
            for i in range(1, 2 + case.windowed):
                shapes[i] = {0: queries}
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
    for row, (k, v, positions) in product(range(case.rows), given.blocks):
        last = given.last_of(row, case)
        hidden = torch.tensor([p is None or p > last for p in positions])
        k[row :: case.rows, hidden], v[row :: case.rows, hidden] = 1e3, 1e30
    assert torch.equal(attention_of(case)(*given.arguments(case))[0], before)


@pytest.mark.parametrize("hidden", [0, 1])
@pytest.mark.parametrize("case", [c for c in CASES if len(c.cached) > 1], ids=str)
def test_a_block_may_be_hidden_as_a_whole(attention_of, case, hidden):
    given = scene(case, 50, lengths(case)[-1])
    k, v, positions = given.blocks[hidden]
    given.blocks[hidden] = (k, v, [None] * len(positions))
    # In decode somebody must be left to be seen, by every row.
    given.blocks[-1][2][0] = 50 if case.rows == 1 else 0
    assert_right(attention_of(case), case, given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_score_that_is_not_to_be_seen_may_be_larger_by_hundreds_of_thousands(attention_of, case):
    given = scene(case, 50, lengths(case)[-1])
    # Scores are i + 200,000 of what no query sees, i - 200,000 of the rest: exact in float32.
    given.q.view(-1, SIZE)[:] = torch.tensor([1.0, 400.0] + [0.0] * (SIZE - 2))
    for row, (k, _, positions) in product(range(case.rows), given.blocks):
        k = k[row :: case.rows].zero_()
        for i, position in enumerate(positions):
            seen = position is not None and position <= given.queries[row]
            k[:, i, 0], k[:, i, 1] = i % 3, -500 if seen else 500
    assert_right(attention_of(case), case, given)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_a_row_gives_the_same_bits_whatever_the_others_ask_and_hold(attention_of, case):
    given = scene(case, 50, 1)
    expected = attention_of(case)(*given.arguments(case))[0]
    for row in range(case.rows):
        other = copy.deepcopy(given)
        others = [i for i in range(case.rows) if i != row]
        other.q[:, others] *= -3.0
        other.queries[others] = other.queries[others].flip(0) + 7
        for (k, v, _), i in product(other.blocks, others):
            k[i :: case.rows] += 1.0
            v[i :: case.rows] = 1e30
        actual = attention_of(case)(*other.arguments(case))[0]
        assert torch.equal(actual[:, row], expected[:, row])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cached, more", [((5,), (13, 49)), ((9, 25), (97,)), ((257,), (769,))])
def test_blocks_beyond_a_rows_position_change_no_bit(attention_of, rows, cached, more):
    few, many = (Case(2, 2, blocks, growing=False, rows=rows) for blocks in (cached, cached + more))
    given = scene(few, 3 * sum(cached), 1)
    expected = attention_of(few)(*given.arguments(few))[0]
    for size in more:
        k, v = torch.randn(2, 2 * rows, size, SIZE, generator=torch.Generator().manual_seed(size))
        given.blocks.append((k, v, list(range(FAR, FAR + size))))
    assert torch.equal(attention_of(many)(*given.arguments(many))[0], expected)


# The slots


def slots_of(kind: type, count: int, first_block: int, rows: int = 1) -> SlotLayout:
    with pytest.MonkeyPatch.context() as patch:
        name = "FIRST_BLOCK" if rows == 1 else "FIRST_BLOCK_OF_ROWS"
        patch.setattr(block_cache, name, first_block)
        return SlotLayout(kind(rows, count, 1, 1))


def filled(slots: SlotLayout) -> list[int]:
    """The sizes of the blocks without their spare slots."""
    return [size - slots.spare for size in slots.sizes]


def place(slots: SlotLayout, position: int) -> tuple[int, int]:
    """The block that keeps a position, and the slot in it."""
    if slots.ring:
        position %= slots.count
    block = 0
    while position >= filled(slots)[block]:
        position -= filled(slots)[block]
        block += 1
    return block, position


KINDS = [SlidingCache, FullCache]
all_slots = st.builds(
    slots_of,
    st.sampled_from(KINDS),
    st.integers(1, 70),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
)


@pytest.mark.parametrize(
    "slots, first, sizes",
    [
        (4096, 512, [512, 1536, 2048]), (32768, 512, [512, 1536, 6144, 24576]), (200, 512, [200]),
        (512, 512, [512]), (513, 512, [512, 1]), (2049, 512, [512, 1536, 1]),
        (4096, 256, [256, 768, 3072]), (512, 256, [256, 256]), (5, 1, [1, 3, 1]),
    ],
)  # fmt: skip
def test_every_block_quadruples_the_cache(slots, first, sizes):
    assert block_sizes(slots, first) == sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, limits", [(1, [512, 1000]), (2, [256, 1000]), (8, [256, 1000])])
def test_the_first_block_of_several_rows_is_smaller(kind, rows, limits):
    assert SlotLayout(kind(rows, 1000, 1, 1)).limits() == limits


@settings(deadline=None)
@given(all_slots)
def test_blocks_have_as_many_slots_as_the_cache_and_a_spare_one_if_there_are_several(slots):
    assert slots.spare == (len(slots.sizes) > 1)
    assert sum(filled(slots)) == slots.count
    assert min(filled(slots)) > 0
    assert [p.shape for p in slots.positions] == [(1, size) for size in slots.sizes]
    assert [size for _, size in slots.spans] == filled(slots)
    assert [start + size for start, size in slots.spans] == slots.limits()
    assert slots.limits() == list(accumulate(filled(slots)))


@settings(deadline=None)
@given(all_slots, st.data())
def test_each_position_is_stored_at_its_own_place_and_otherwise_in_spare_slots(slots, data):
    length = data.draw(st.integers(1, slots.count))
    start = data.draw(st.integers(0, 300 if slots.ring else slots.count - length))
    indices = slots.indices(torch.arange(start, start + length))
    assert {index.dtype for index in indices} == {torch.int64}
    for i, position in enumerate(range(start, start + length)):
        block, slot = place(slots, position)
        expected = filled(slots)
        expected[block] = slot
        assert [index[i].item() for index in indices] == expected


@settings(deadline=None)
@given(all_slots)
def test_decode_sees_of_each_slot_its_own_position_and_never_a_spare_one(slots):
    expected = [[NOWHERE] * size for size in slots.sizes]
    for position in range(slots.count):
        block, slot = place(slots, position)
        expected[block][slot] = position * UNIT
    assert [positions.tolist() for positions in slots.positions] == [[row] for row in expected]


@settings(deadline=None)
@given(all_slots, st.data())
def test_a_chunk_sees_the_positions_that_were_stored_before_it(slots, data):
    start = data.draw(st.integers(0, 300 if slots.ring else slots.count - 1))
    expected = [[NOWHERE] * size for size in slots.sizes]
    for position in range(start):
        block, slot = place(slots, position)
        expected[block][slot] = position * UNIT
    length = data.draw(st.integers(1, 5))
    held = slots.held(torch.arange(start, start + length))
    assert {block.dtype for block in held} == {torch.float32}
    assert [block.tolist() for block in held] == [[row] for row in expected]


@settings(deadline=None)
@given(all_slots, st.lists(st.integers(0, 300), min_size=3, max_size=3))
def test_rows_are_stored_each_at_its_own_position(slots, positions):
    if not slots.ring:
        positions = [position % slots.count for position in positions]
    indices = slots.indices(torch.tensor(positions))
    for i, position in enumerate(positions):
        alone = slots.indices(torch.tensor([position]))
        assert [index[i].item() for index in indices] == [index.item() for index in alone]


@settings(deadline=None)
@given(all_slots, st.sampled_from([1, 2, 5]), st.sampled_from([1, 2, 4]), st.data())
def test_no_two_slots_of_rows_and_heads_have_one_place(slots, rows, kv_heads, data):
    kind = SlidingCache if slots.ring else FullCache
    cache = BlockCache(kind(rows, slots.count, kv_heads, SIZE), slots)
    indices = [torch.arange(size) for size in slots.sizes]
    seen = [cache.places(indices, torch.tensor([row])) for row in range(rows)]
    for i, size in enumerate(slots.sizes):
        # [K, B, S] is how `blocks` are read.
        places = torch.stack([of_row[i].view(kv_heads, size) for of_row in seen], 1)
        assert torch.equal(places.flatten(), torch.arange(kv_heads * rows * size))
        assert places.dtype == torch.int64
    # One slot of each row, as a step has it.
    picked = [data.draw(st.integers(0, slots.count - 1)) for _ in range(rows)]
    together = cache.places(slots.indices(torch.tensor(picked)))
    for row, slot in enumerate(picked):
        alone = cache.places(slots.indices(torch.tensor([slot])), torch.tensor([row]))
        for all_rows, one_row in zip(together, alone, strict=True):
            assert torch.equal(all_rows.view(kv_heads, rows)[:, row], one_row)


@settings(deadline=None)
@given(all_slots, CALLS)
def test_a_cache_holds_the_newest_of_what_was_stored_in_each_row(slots, calls):
    kind, rows = SlidingCache if slots.ring else FullCache, 3
    cache = BlockCache(kind(rows, slots.count, 2, SIZE), slots)
    expected = [torch.zeros(2, 2, rows, size, SIZE) for size in slots.sizes]
    ends = [0] * rows
    for row, length in calls:
        if row is None:
            # A row at the cache's end begins anew.
            ends = [end if slots.ring or end < slots.count else 0 for end in ends]
            stored = list(enumerate(ends))
            places = cache.places(slots.indices(torch.tensor(ends)))
        else:
            length = min(length, slots.count if slots.ring else slots.count - ends[row])
            stored = [(row, position) for position in range(ends[row], ends[row] + length)]
            positions = torch.arange(ends[row], ends[row] + length)
            places = cache.places(slots.indices(positions), torch.tensor([row]))
        k, v = torch.randn(2, 2, len(stored), SIZE)
        cache.store(k, v, places)
        for i, (of, position) in enumerate(stored):
            block, slot = place(slots, position)
            expected[block][0, :, of, slot], expected[block][1, :, of, slot] = k[:, i], v[:, i]
            ends[of] = position + 1
    blocks = cache.blocks(slots.positions)
    for i, (kept, size) in enumerate(zip(expected, filled(slots), strict=True)):
        k, v, positions = blocks[3 * i : 3 * i + 3]
        assert positions is slots.positions[i]
        for actual, old in zip((k, v), kept, strict=True):
            actual = actual.view(2, rows, slots.sizes[i], SIZE)
            assert torch.equal(actual[:, :, :size], old[:, :, :size])


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

    def plain(
        kv_heads, group, head_dim, tokens, blocks, windowed, growing, rows=1, has_sinks=False
    ):
        # Those are in test_xnnpack_kinds.py.
        assert not has_sinks

        def call(q, newest, *rest):
            oldest, rest = (rest[0], rest[1:]) if windowed else (None, rest)
            k, v, positions = rest[::3], rest[1::3], rest[2::3]
            sizes = [block.shape[1] for block in k]
            assert sizes[: len(sizes) - growing] == blocks[: len(blocks) - growing]
            called.append(sizes)
            seen = torch.cat(positions, 1) <= newest
            if windowed:
                seen[:, : -sizes[-1]] &= torch.cat(positions[:-1], 1) > oldest
            scores = q.view(kv_heads * rows, -1, head_dim) @ torch.cat(k, 1).transpose(1, 2)
            weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
            return [(weights @ torch.cat(v, 1)).view(kv_heads, -1, group * head_dim)]

        return call

    monkeypatch.setattr(block_cache, "attention", plain)
    return called


def attend_to_chunk(
    slots: SlotLayout, cache: BlockCache, q, k, v, start: int, row: int
) -> torch.Tensor:
    """What pte_program.py's prefill does for one layer with q [K, T, G D] and k, v [K, T, D]."""
    kv_heads, length, head_dim = k.shape
    group = q.shape[2] // head_dim
    positions = torch.arange(start, start + length)
    column = (positions.float() * UNIT)[:, None]
    newest = (column + UNIT / 2).repeat_interleave(group, 0)
    chunk = Chunk(
        begin=positions[0],
        positions=column.view(1, -1),
        newest=newest,
        oldest=newest - slots.count * UNIT,
        held=slots.held(positions),
        row=torch.tensor([row]) if cache.rows > 1 else None,
    )
    out = PrefillAttention(slots, kv_heads, group, head_dim, length)(q, k, v, cache, chunk)
    cache.store(k, v, cache.places(slots.indices(positions), torch.tensor([row])))
    return out


def attend_in_steps(slots: SlotLayout, cache: BlockCache, q, k, v, ends: list[int]) -> torch.Tensor:
    """What its decode does, with q [K, B, G D] and k, v [K, B, D]."""
    kv_heads, rows, head_dim = k.shape
    positions = torch.tensor(ends)
    newest = ((positions.float() + 0.5) * UNIT)[:, None]
    if rows > 1:
        newest = newest.repeat(kv_heads, 1)[:, :, None]
    cache.store(k, v, cache.places(slots.indices(positions)))
    attention = DecodeAttention(slots, kv_heads, q.shape[2] // head_dim, head_dim, rows)
    return attention(q, cache, slots, positions.amax(), newest)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_block, count", [(1, 7), (2, 11), (3, 30), (4, 16), (9, 9)])
@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_chunks_and_decode_steps_see_what_the_networks_own_cache_shows(
    plain_attention, one_thread, rows, kind, first_block, count, length
):
    kv_heads, group = 2, 2
    slots = slots_of(kind, count, first_block, rows)
    own = kind(rows, count, kv_heads, SIZE)
    cache = BlockCache(own, slots)
    torch.manual_seed(0)
    ends, last = [0] * rows, 60 if slots.ring else count

    def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randn(kv_heads, tokens, group * SIZE), *torch.randn(2, kv_heads, tokens, SIZE)

    def check(actual, network, given, *where):
        # [K, N, G D] here is [N, K G, D] there; N are tokens of a row or rows with one each.
        heads = [x.view(kv_heads, -1, n, SIZE).transpose(0, 1).flatten(1, 2) for x, n in given]
        steps = network == own.decode
        expected = network(*(x[:, None] if steps else x[None] for x in heads), *where)
        actual = actual.view(kv_heads, -1, group, SIZE).transpose(0, 1).flatten(1, 2)
        expected = expected[:, 0] if steps else expected[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def prefill(row: int) -> None:
        tokens = min(length, count, last - ends[row])
        if tokens:
            q, k, v = inputs(tokens)
            actual = attend_to_chunk(slots, cache, q, k, v, ends[row], row)
            positions = torch.arange(ends[row], ends[row] + tokens)
            of = [torch.tensor([row])] if rows > 1 else []
            check(actual, own.prefill, [(q, group), (k, 1), (v, 1)], positions, 1.0, *of)
            ends[row] += tokens

    def decode() -> None:
        # An idle row computes along at position 0.
        at = [end if end < last else 0 for end in ends]
        q, k, v = inputs(rows)
        actual = attend_in_steps(slots, cache, q, k, v, at)
        check(actual, own.decode, [(q, group), (k, 1), (v, 1)], torch.tensor(at), 1.0)
        ends[:] = [end + 1 if end < last else end for end in ends]

    # Twice from position 0 on, so that there are stale slots; row 0 far ahead of the others.
    for chunks, steps in [(3, 30), (1, 4), (15, 15)]:
        ends[0] = 0
        for _ in range(chunks):
            prefill(0)
        for _ in range(steps):
            decode()
        for row in range(1, rows):
            ends[row] = 0
            for _ in range(row):
                prefill(row)
                decode()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_blocks_that_the_position_asks_for_are_attended_to(plain_attention, kind, rows):
    slots = slots_of(kind, 20, 2, rows)  # blocks of 2, 6 and 12
    cache = BlockCache(kind(rows, 20, 1, SIZE), slots)
    blocks = [3, 7, 13]
    for start in range(20 if kind is FullCache else 45):
        q, k, v = torch.zeros(3, 1, 1, SIZE)
        before = sum(start > limit for limit in (0, 2, 8))
        attend_to_chunk(slots, cache, q, k, v, start, rows - 1)
        assert plain_attention.pop() == [*blocks[:before], 1]
        upto = sum(start >= limit for limit in (0, 2, 8))
        # Of several rows it is the furthest's that counts.
        q, k, v = torch.zeros(3, 1, rows, SIZE)
        attend_in_steps(slots, cache, q, k, v, [start // 2, 0, start][-rows:])
        assert plain_attention.pop() == blocks[:upto]
