"""Attention of a packed chunk gives what caches give that are filled one chunk after the other,
and a token's bits do not depend on its chunk."""

import pytest
import torch

from tests.models.kernels.checking import (
    DEVICE,
    DTYPES,
    EPS,
    ON_GPU,
    TOLERANCE,
    assert_close,
    needs_gpu,
)
from tokenloop.models.cache import FullCache, SlidingCache
from tokenloop.models.kernels.attention_chunk import chunk_tiles, operator, reference
from tokenloop.models.kernels.attention_chunk.chunk_tiles import ChunkTiles, GluonTiles

# Key/value heads, query heads of each, head size, slots of a ring.
LAYOUTS = [(2, 3, 128, 512), (1, 4, 256, 1024), (2, 2, 512, 100)] if ON_GPU else [(2, 3, 16, 64)]
UNEVEN = (1, 2, 128, 100) if ON_GPU else (1, 2, 16, 50)
FULL_SLOTS = 2100 if ON_GPU else 330
# A prompt's tokens in its row.
LENGTHS = {2: 2000, 0: 1111, 1: 64} if ON_GPU else {2: 133, 0: 70, 1: 3}
SEQUENCES = 5


def small_tiles(tma: bool = False, block_m: int = 64) -> ChunkTiles | None:
    """What the interpreter is fast enough for; a GPU takes the operators' own."""
    return None if ON_GPU else ChunkTiles(block_m, 32, warps=4, stages=1, tma=tma)


class Prompts:
    """Projections of prompts, and caches that chunks of them are put into."""

    def __init__(self, normal, layout, dtype, is_ring, slots=None, has_sinks=False, **options):
        self.kv_heads, self.groups, self.head_dim, ring = layout
        self.slots = slots or (ring if is_ring else FULL_SLOTS)
        self.is_ring, self.dtype = is_ring, dtype
        # One that leaves nothing to the others, and one that takes nothing.
        ends = torch.tensor([200.0, -200.0], device=DEVICE)
        heads = self.kv_heads * self.groups
        self.sinks = torch.cat([ends, normal(heads - 2)]).to(dtype) if has_sinks else None
        others = 1 if options.get("values_are_keys") else 2
        self.width = self.kv_heads * (self.groups + others) * self.head_dim
        self.prompts = {
            row: normal(length, self.width, dtype=dtype) for row, length in LENGTHS.items()
        }
        shape = 3, self.slots, self.kv_heads, self.head_dim
        # Rows and slots that are not used yet hold anything finite.
        self.empty = [normal(*shape, dtype=dtype) for _ in range(2)]
        self.norms = [normal(self.head_dim, dtype=dtype, scale=0.2) for _ in range(2)]
        self.inv_freq = torch.rand(self.head_dim // 2, device=DEVICE)
        self.inv_freq[self.head_dim // 3 :] = 0
        # Flat softmaxes: steep ones turn a rounding of a key into another result.
        factor = {} if is_ring else {"attention_factor": 1.3}
        self.options = {"eps": EPS, "offset": 1.0, "is_ring": is_ring, **factor, **options}
        self.scale = 0.5 * self.head_dim**-0.5

    def chunk(self, pieces, spare=0):
        """qkv, starts, rows and first of pieces (row, begin, end); `spare` tokens are not there."""
        parts = [self.prompts[row][begin:end] for row, begin, end in pieces]
        # Gates lie behind the projections, and what is not there is garbage.
        tokens = sum(map(len, parts))
        qkv = torch.full((tokens + spare, self.width + 16), torch.nan, device=DEVICE)
        qkv = qkv.to(self.dtype)[:, : self.width]
        qkv[:tokens] = torch.cat(parts)
        bounds = torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()
        unused = SEQUENCES - len(pieces)
        numbers = (
            bounds + unused * bounds[-1:],
            [row for row, _, _ in pieces] + unused * [-1],
            [begin for _, begin, _ in pieces] + unused * [0],
        )
        return qkv, *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in numbers)

    def layer(self, module, caches, pieces, spare=0, tiles=None):
        """The layer's result for the tokens of the pieces; `caches` are written."""
        qkv, *where = self.chunk(pieces, spare)
        rest = *caches, *self.norms, self.inv_freq
        q, kv = module.rotate_chunk(qkv, *where, *rest, **self.options)
        options = {"scale": self.scale, "is_ring": self.is_ring, "sinks": self.sinks}
        if module is operator:
            tokens = int(where[0][-1])
            q[tokens:] = torch.nan
            kv[tokens:] = torch.nan
            out = operator.launch_attend_chunk(q, kv, *where, *caches, **options, tiles=tiles)
        else:
            out = module.attend_chunk(q, kv, *where, *caches, **options)
        if self.is_ring:
            module.store_ring(kv, *where, *caches)
        return out[: int(where[0][-1])]

    def run(self, module, schedule, spare=0, tiles=None):
        """{row: result of its whole prompt} and the caches after packed chunks of pieces."""
        caches = [x.clone() for x in self.empty]
        found = {row: [] for row in LENGTHS}
        for pieces in schedule:
            out = self.layer(module, caches, pieces, spare, tiles)
            sizes = [end - begin for _, begin, end in pieces]
            for (row, _, _), part in zip(pieces, out.split(sizes)):
                found[row].append(part)
        return {row: torch.cat(parts) for row, parts in found.items()}, caches


def schedule(size: int, together: bool = True) -> list[list[tuple[int, int, int]]]:
    """Packed chunks that have up to `size` tokens of each prompt; alone, of one prompt each."""
    chunks = []
    for begin in range(0, max(LENGTHS.values()), size):
        pieces = [
            (row, begin, min(begin + size, length))
            for row, length in LENGTHS.items()
            if begin < length
        ]
        chunks += [pieces] if together else [[piece] for piece in pieces]
    return chunks


WHOLE = 8192
ALL_ROWS_WHOLE = schedule(WHOLE)


def layers(layouts=LAYOUTS):
    return pytest.mark.parametrize("layout", layouts, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_ring", [False, True], ids=["full", "ring"])
@pytest.mark.parametrize("shared", [False, True], ids=["values", "values are keys"])
@layers()
def test_chunks_give_what_the_reference_gives(normal, layout, dtype, is_ring, shared):
    options = {"values_are_keys": shared, "value_norm": shared}
    prompts = Prompts(normal, layout, dtype, is_ring, **options)
    got, caches = prompts.run(operator, schedule(128), spare=70, tiles=small_tiles())
    expected, theirs = prompts.run(reference, schedule(128))
    for row in LENGTHS:
        assert_close(got[row], expected[row], dtype)
    for x, y in zip(caches, theirs):
        assert_close(x, y, dtype)


@pytest.mark.parametrize("is_ring", [False, True], ids=["full", "ring"])
@layers(LAYOUTS[:1])
def test_sinks_take_weight_in_any_chunk(normal, layout, is_ring):
    prompts = Prompts(normal, layout, torch.float32, is_ring, has_sinks=True)
    got, _ = prompts.run(operator, schedule(128), spare=70, tiles=small_tiles())
    again, _ = prompts.run(operator, schedule(64), tiles=small_tiles())
    expected, _ = prompts.run(reference, schedule(128))
    for row in LENGTHS:
        assert_close(got[row], expected[row], torch.float32)
        assert torch.equal(got[row], again[row])
        assert not got[row][:, : prompts.head_dim].any()


@pytest.mark.parametrize("is_ring", [False, True], ids=["full", "ring"])
@layers(LAYOUTS[:1])
def test_the_reference_is_the_caches_own_prefill(normal, layout, is_ring):
    prompts = Prompts(normal, layout, torch.float32, is_ring)
    got, caches = prompts.run(reference, schedule(64))
    kind = SlidingCache if is_ring else FullCache
    cache = kind(3, prompts.slots, prompts.kv_heads, prompts.head_dim).to(DEVICE)
    cache.k.copy_(prompts.empty[0])
    cache.v.copy_(prompts.empty[1])
    for pieces in schedule(64, together=False):
        ((row, begin, end),) = pieces
        qkv, *where = prompts.chunk(pieces)
        # A ring's keys and values come back, and rotation is the same for both.
        options = prompts.options | {"is_ring": True}
        rest = *caches, *prompts.norms, prompts.inv_freq
        q, kv = reference.rotate_chunk(qkv, *where, *rest, **options)
        out = cache.prefill(
            q.view(1, end - begin, -1, prompts.head_dim), kv[None, :, 0], kv[None, :, 1],
            torch.arange(begin, end, device=DEVICE), prompts.scale,
            torch.tensor([row], device=DEVICE),
        )  # fmt: skip
        assert_close(got[row][begin:end], out[0].flatten(1), torch.float32)
    assert torch.equal(cache.k, caches[0])
    assert torch.equal(cache.v, caches[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_ring", [False, True], ids=["full", "ring"])
@layers([*LAYOUTS, UNEVEN])
def test_a_token_s_bits_do_not_depend_on_its_chunk(normal, layout, dtype, is_ring):
    prompts = Prompts(normal, layout, dtype, is_ring)
    expected, theirs = prompts.run(operator, schedule(WHOLE), tiles=small_tiles())
    for size, together, spare in ((64, True, 64), (128, True, 0), (WHOLE, False, 130)):
        got, caches = prompts.run(operator, schedule(size, together), spare, small_tiles())
        for row in LENGTHS:
            assert torch.equal(got[row], expected[row]), (size, row)
        for x, y in zip(caches, theirs):
            assert torch.equal(x, y), size


@pytest.mark.skipif(ON_GPU, reason="a GPU takes descriptors anyway")
@pytest.mark.parametrize("is_ring", [False, True], ids=["full", "ring"])
def test_all_cuts_of_the_work_give_the_same(normal, is_ring, monkeypatch):
    prompts = Prompts(normal, LAYOUTS[0], torch.float32, is_ring)
    expected, _ = prompts.run(operator, schedule(128), tiles=small_tiles())
    # One key/value head after the other.
    monkeypatch.setattr(chunk_tiles, "TOGETHER", 1)
    cut = small_tiles(tma=True)
    for tiles in (cut, cut._replace(block_m=32, split=2), cut._replace(tma=False, split=2)):
        got, _ = prompts.run(operator, schedule(128), tiles=tiles)
        for row in LENGTHS:
            assert_close(got[row], expected[row], torch.float32)


def last_tokens(prompts, caches, tiles=None, count=256):
    """Attention of the last token of each sequence, of which many have the same row."""
    torch.manual_seed(0)
    rows = torch.tensor([*LENGTHS] * count)[:count]
    positions = torch.tensor([torch.randint(LENGTHS[int(row)], ()) for row in rows])
    rows[3] = rows[-1] = -1
    where = torch.arange(count + 1), rows, positions
    where = [x.to(DEVICE, torch.int32) for x in where]
    q = torch.randn(count, prompts.groups * prompts.kv_heads * prompts.head_dim)
    q = q.to(DEVICE, prompts.dtype)
    q[3] = torch.nan
    options = {"scale": prompts.scale, "is_ring": False}
    got = operator.launch_attend_chunk(q, q[:0], *where, *caches, **options, tiles=tiles)
    return got[rows >= 0], reference.attend_chunk(q, q[:0], *where, *caches, **options)[rows >= 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layers()
def test_one_token_of_a_sequence_may_be_anywhere(normal, layout, dtype):
    prompts = Prompts(normal, layout, dtype, False)
    _, caches = prompts.run(operator, ALL_ROWS_WHOLE, tiles=small_tiles())
    got, expected = last_tokens(prompts, caches, small_tiles(), count=256 if ON_GPU else 5)
    assert_close(got, expected, dtype)


def gluon_layers():
    """Layers that the Gluon kernels take, and cuts of them that must give the same."""
    cuts = [
        ((2, 3, 128, 0), [GluonTiles(1, 128), GluonTiles(2, 128)]),
        ((1, 4, 256, 0), [GluonTiles(1, 64), GluonTiles(2, 64)]),
        ((2, 2, 512, 0), [GluonTiles(1, 64), GluonTiles(2, 64, 1), GluonTiles(1, 64, 1)]),
    ]
    return pytest.mark.parametrize("layout, cuts", cuts, ids=["128", "256", "512"])


@needs_gpu
@pytest.mark.parametrize("slots", [2100, 2176])
@gluon_layers()
def test_gluon_s_cuts_give_the_same(normal, layout, cuts, slots):
    prompts = Prompts(normal, layout, torch.bfloat16, False, slots)
    expected, caches = prompts.run(operator, ALL_ROWS_WHOLE)
    for tiles in cuts:
        for size, together, spare in ((64, True, 64), (WHOLE, False, 130)):
            got, _ = prompts.run(operator, schedule(size, together), spare, tiles)
            for row in LENGTHS:
                assert torch.equal(got[row], expected[row]), (tiles, size, row)
    one, *others = (last_tokens(prompts, caches, tiles)[0] for tiles in cuts)
    assert all(torch.equal(x, one) for x in others)


@needs_gpu
@gluon_layers()
def test_another_row_s_faults_stay_there(normal, layout, cuts):
    prompts = Prompts(normal, layout, torch.bfloat16, False, 2100)
    caches, other = [[x.clone() for x in prompts.empty] for _ in range(2)]
    for x in other:
        x[1] = torch.nan
    # Its last block of keys ends beyond the row's slots.
    piece = [(0, 0, prompts.slots)]
    prompts.prompts[0] = prompts.prompts[2].repeat(2, 1)[: prompts.slots]
    for tiles in cuts:
        expected, got = (prompts.layer(operator, x, piece, 0, tiles) for x in (caches, other))
        assert torch.equal(got, expected)


@needs_gpu
@gluon_layers()
def test_only_a_sequence_s_tokens_are_written(normal, layout, cuts):
    prompts = Prompts(normal, layout, torch.bfloat16, False)
    # A sequence without a row is not there.
    pieces = [(0, 0, 100), (-1, 0, 64), (2, 0, 200), (1, 0, 64)]
    prompts.prompts[-1] = prompts.prompts[2]
    for tiles in cuts:
        caches = [x.clone() for x in prompts.empty]
        out = prompts.layer(operator, caches, pieces, 70, tiles)
        alone = [
            prompts.layer(operator, caches, [piece], 0, tiles) for piece in pieces if piece[0] >= 0
        ]
        assert torch.equal(torch.cat([out[:100], out[164:]]), torch.cat(alone))


RING_CUTS = [GluonTiles(2, 64), GluonTiles(1, 64), GluonTiles(1, 64, 3)]


@needs_gpu
@pytest.mark.parametrize("slots", [64, 512, 1024])
def test_gluon_s_cuts_of_a_ring_give_the_same(normal, slots):
    prompts = Prompts(normal, (2, 3, 256, slots), torch.bfloat16, True)
    expected, theirs = prompts.run(operator, ALL_ROWS_WHOLE)
    right, _ = prompts.run(reference, ALL_ROWS_WHOLE)
    for row in LENGTHS:
        assert_close(expected[row], right[row], torch.bfloat16)
    for tiles in RING_CUTS:
        # What is behind the last token is NaN.
        for size, together, spare in ((64, True, 64), (192, True, 1), (WHOLE, False, 130)):
            got, caches = prompts.run(operator, schedule(size, together), spare, tiles)
            for row in LENGTHS:
                assert torch.equal(got[row], expected[row]), (tiles, size, row)
            assert all(torch.equal(x, y) for x, y in zip(caches, theirs))


@needs_gpu
@pytest.mark.parametrize("slots", [64, 512, 1024])
def test_another_ring_s_faults_stay_there(normal, slots):
    prompts = Prompts(normal, (2, 3, 256, slots), torch.bfloat16, True)
    pieces = [(0, 0, 1111)]
    last = [(0, 1088, 1111)]
    for tiles in RING_CUTS:
        found = []
        for fault in (0.0, torch.nan):
            caches = [x.clone() for x in prompts.empty]
            prompts.layer(operator, caches, [(0, 0, 1088)], 0, tiles)
            for x in caches:
                x[1:] = fault
            found.append(prompts.layer(operator, caches, last, 7, tiles))
        assert torch.equal(*found)
        caches = [x.clone() for x in prompts.empty]
        assert torch.equal(prompts.layer(operator, caches, pieces, 0, tiles)[1088:], found[0])


@needs_gpu
@pytest.mark.parametrize("tiles", [*RING_CUTS, ChunkTiles(128, 64)], ids=str)
@pytest.mark.parametrize("slots", [64, 1024])
def test_a_ring_s_next_token_may_be_anywhere(normal, slots, tiles):
    prompts = Prompts(normal, (2, 3, 256, slots), torch.bfloat16, True)
    _, caches = prompts.run(operator, ALL_ROWS_WHOLE)
    rows, positions = [*LENGTHS, -1], [*LENGTHS.values(), 0]
    where = [0, 1, 2, 3, 3], rows, positions
    where = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in where]
    q = normal(4, 6 * 256, dtype=torch.bfloat16)
    kv = normal(4, 2, 2, 256, dtype=torch.bfloat16)
    q[3], kv[3] = torch.nan, torch.nan
    options = {"scale": prompts.scale, "is_ring": True}
    got = operator.launch_attend_chunk(q, kv, *where, *caches, **options, tiles=tiles)
    expected = reference.attend_chunk(q, kv, *where, *caches, **options)
    assert_close(got[:3], expected[:3], torch.bfloat16)


@pytest.mark.parametrize("is_ring", [False, True], ids=["full", "ring"])
def test_keys_and_queries_can_be_made_apart(normal, is_ring):
    prompts = Prompts(normal, LAYOUTS[0], torch.float32, is_ring)
    heads = prompts.kv_heads * prompts.groups * prompts.head_dim
    qkv, *where = prompts.chunk([(0, 0, LENGTHS[0]), (2, 64, 150)], spare=3)
    rest = *prompts.norms, prompts.inv_freq
    whole, parts, untouched = [[x.clone() for x in prompts.empty] for _ in range(3)]
    q, kv = operator.rotate_chunk(qkv, *where, *whole, *rest, **prompts.options)
    none, kv_alone = operator.rotate_chunk(
        qkv[:, heads:], *where, *parts, *rest, **prompts.options, queries=False
    )
    q_alone, nothing = operator.rotate_chunk(
        qkv[:, :heads], *where, *untouched, *rest, **prompts.options, keys=False
    )
    tokens = int(where[0][-1])
    assert none.numel() == nothing.numel() == 0
    assert torch.equal(q_alone[:tokens], q[:tokens])
    assert torch.equal(kv_alone[:tokens], kv[:tokens])
    for x, y, same, before in zip(whole, parts, untouched, prompts.empty):
        assert torch.equal(x, y)
        assert torch.equal(same, before)


def test_a_decode_step_s_key_is_a_chunk_s(normal):
    from tokenloop.models.kernels.attention.operator import attend_step

    prompts = Prompts(normal, LAYOUTS[0], torch.float32, False)
    pieces = [(0, 64, 65), (1, 0, 1), (2, 128, 129)]
    qkv, *where = prompts.chunk(pieces)
    mine, theirs = [[x.clone() for x in prompts.empty] for _ in range(2)]
    rest = *prompts.norms, prompts.inv_freq
    operator.rotate_chunk(qkv, *where, *mine, *rest, **prompts.options)
    position = torch.tensor([begin for _, begin, _ in pieces], device=DEVICE)
    semaphores = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    attend_step(
        qkv.contiguous(), position, *theirs, *rest, semaphores, scale=1.0, eps=EPS, offset=1.0,
        attention_factor=prompts.options["attention_factor"],
    )  # fmt: skip
    for x, y in zip(mine, theirs):
        assert (x - y).abs().max() <= TOLERANCE[torch.float32] * y.abs().max()


def test_what_does_not_fit_is_refused(normal):
    prompts = Prompts(normal, LAYOUTS[0], torch.float32, True)
    qkv, *where = prompts.chunk([(0, 0, 64)])
    rest = *prompts.norms, prompts.inv_freq
    with pytest.raises(ValueError, match="do not fit caches"):
        operator.rotate_chunk(qkv[:, 1:], *where, *prompts.empty, *rest, eps=EPS)
    q, kv = operator.rotate_chunk(qkv, *where, *prompts.empty, *rest, **prompts.options)
    arguments = q, kv, *where, *prompts.empty
    with pytest.raises(ValueError, match="do not fit a ring"):
        operator.launch_attend_chunk(
            *arguments, scale=1.0, is_ring=True, tiles=ChunkTiles(128, 128)
        )
    with pytest.raises(ValueError, match="do not fit a ring"):
        operator.launch_attend_chunk(*arguments, scale=1.0, is_ring=True, tiles=GluonTiles(2, 128))
    with pytest.raises(ValueError, match="do not fit caches"):
        operator.attend_chunk(q[:, 1:].contiguous(), *arguments[1:], scale=1.0, is_ring=True)
