"""Attention over a KV cache inside XNNPACK, reading only as many slots as the position asks for.

A layer's cache is cut into blocks of 512, 1536, 6144, ... slots, or of 256, 768, ... where there
are several rows. The position decides how many of the first blocks a method attends to. Each block
is a tensor of its own, because ExecuTorch cannot pass on a part of a tensor without a copy. Shapes:
B rows, K key-value heads, G query heads for each of them, T tokens of one row, D a head's size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Not torch.cond, which would trace every branch once more with Dynamo.
from torch._higher_order_ops.cond import cond_op

from tokenloop.export.pte.xnnpack_graph import GraphBuilder, GraphDelegate
from tokenloop.models.cache import KVCache

# The first block's slots with one row and with several. Each row reads some of them in vain.
FIRST_BLOCK, FIRST_BLOCK_OF_ROWS = 512, 256
# Masks are computed from positions in this unit. One position too far lowers a score by half a
# unit, which leaves nothing of the score's exponential. A power of two keeps positions exact.
UNIT = 2.0**20
# The position of a slot that nobody may see, below and above every query.
NOWHERE = UNIT * UNIT


def block_sizes(slots: int, first: int) -> list[int]:
    """The sizes of a cache's blocks. Each block quadruples the sum, until there are `slots`."""
    sizes = [min(first, slots)]
    while sum(sizes) < slots:
        sizes.append(min(3 * sum(sizes), slots - sum(sizes)))
    return sizes


def attention(
    kv_heads: int, group: int, head_dim: int, tokens: int, blocks: Sequence[int], windowed: bool,
    growing: bool, rows: int = 1, has_sinks: bool = False,
) -> GraphDelegate:  # fmt: skip
    """softmax(q k^T - mask) v as one delegate call.

    Arguments: q [K, T, G D], already scaled; newest [T G, 1] or [1, 1]; if `windowed` oldest, of
    the same shape; if `has_sinks` a score more of each query [K, T G, 1] and its value, which is
    zero, [K, 1, D]; then k [K, S, D], v [K, S, D] and positions [1, S] of each block. Positions are
    float32 in UNITs. `newest` is half a position after the last one that a query sees. `oldest` is
    half a position after the last one that it no longer sees, in all blocks but the last. Result:
    [K, T, G D]. `blocks` are the sizes S. The last one may vary if it is `growing`, as T may.

    Several `rows` have one token each: q [K, B, G D], newest [K B, 1, 1], k, v [K B, S, D], and
    sinks [K B, G, 1] with values [K B, 1, D].
    """
    graph = GraphBuilder()
    products = kv_heads * rows
    q = graph.input(kv_heads, tokens if rows == 1 else rows, group * head_dim)
    # The reshape is not around the call. ExecuTorch would take a view of a condition's result for
    # one of the memory that was planned for it, but the result lies elsewhere.
    q = graph.reshape(q, products, -1, head_dim)
    newest = graph.input(tokens * group, 1) if rows == 1 else graph.input(products, 1, 1)
    oldest = graph.input(tokens * group, 1) if windowed else None
    scores, values, begin = [], [], 0
    if has_sinks:
        scores.append(graph.input(products, tokens * group if rows == 1 else group, 1))
        values.append(graph.input(products, 1, head_dim))
        begin = 1
    for i, size in enumerate(blocks):
        k, v = (graph.input(products, size, head_dim) for _ in range(2))
        positions = graph.input(1, size)
        penalty = graph.relu(graph.subtract(positions, newest))
        if windowed and i < len(blocks) - 1:
            penalty = graph.add(penalty, graph.relu(graph.subtract(oldest, positions)))
        scores.append(graph.subtract(graph.matmul(q, k, transpose_b=True), penalty))
        values.append(v)
    weights = graph.softmax(graph.concatenate(scores, axis=2))
    if growing:
        out = graph.matmul(weights, graph.concatenate(values, axis=1))
    else:
        # Values are large and weights small. So weights are cut, and values are not joined.
        out = None
        for v, size in zip(values[begin:], blocks):
            part = weights if len(scores) == 1 else graph.slice(weights, begin, size)
            product = graph.matmul(part, v)
            out = product if out is None else graph.add(out, product)
            begin += size
    out = graph.reshape(out, kv_heads, -1, group * head_dim)
    return GraphDelegate(graph.serialize(out), lambda q, *_: [torch.empty_like(q)])


class SlotLayout(nn.Module):
    """Where one kind of layer keeps its positions: in a ring, or each in a slot of its own."""

    def __init__(self, cache: KVCache):
        super().__init__()
        self.ring = cache.is_ring
        self.count = cache.slots
        first = FIRST_BLOCK if cache.k.shape[0] == 1 else FIRST_BLOCK_OF_ROWS
        filled = block_sizes(self.count, first)
        # Each of several blocks has a spare slot for what belongs into another one.
        self.spare = int(len(filled) > 1)
        self.sizes = [size + self.spare for size in filled]
        starts = [sum(filled[:i]) for i in range(len(filled))]
        self.spans = list(zip(starts, filled))
        for i, (start, size) in enumerate(self.spans):
            positions = torch.arange(start, start + self.sizes[i], dtype=torch.float32) * UNIT
            positions[size:] = NOWHERE
            self.register_buffer(f"positions{i}", positions[None])

    @property
    def positions(self) -> list[Tensor]:
        """Each block's positions [1, S] of its slots. Decode sees those up to its own position."""
        return [getattr(self, f"positions{i}") for i in range(len(self.sizes))]

    def limits(self) -> list[int]:
        """How many positions the first 1, 2, ... blocks hold."""
        return [start + size for start, size in self.spans]

    def indices(self, positions: Tensor) -> list[Tensor]:
        """The slots int64 [N] at which each block stores `positions` int64 [N]."""
        if self.ring:
            positions = positions % self.count
        if not self.spare:
            return [positions]
        return [
            torch.where((positions >= start) & (positions < start + size), positions - start, size)
            for start, size in self.spans
        ]

    def held(self, positions: Tensor) -> list[Tensor]:
        """The positions [1, S] that each block holds before a chunk at `positions`."""
        begin = positions[:1]
        if not self.ring:
            bound = begin.float() * UNIT
            return [torch.where(block < bound, block, NOWHERE) for block in self.positions]
        # A slot has the newest congruent position before the chunk. Negative means unwritten.
        slots = torch.arange(self.count)
        newest = begin - 1 - (begin - 1 - slots + self.count) % self.count
        newest = torch.where(newest < 0, NOWHERE, newest.float() * UNIT)[None]
        if not self.spare:
            return [newest]
        nobody = torch.full((1, 1), NOWHERE)
        return [torch.cat([newest[:, a : a + size], nobody], 1) for a, size in self.spans]


class BlockCache(nn.Module):
    """The keys and values of one layer, float32 [K B S, D] for each block."""

    def __init__(self, cache: KVCache, slots: SlotLayout):
        super().__init__()
        self.rows, _, self.kv_heads, self.head_dim = cache.k.shape
        self.sizes, self.spare = slots.sizes, slots.spare
        self.slots = slots.count
        for i, size in enumerate(self.sizes):
            for name in (f"k{i}", f"v{i}"):
                shape = (self.kv_heads * self.rows * size, self.head_dim)
                self.register_buffer(name, torch.zeros(shape))

    def pieces(self, kind: str) -> list[tuple[str, list[int], list[int], int]]:
        """The buffers that hold `kind`, k or v, in the order of its slots: the name of each, its
        shape [B, S, K, D] and stride in elements, and how many elements it has besides."""
        pieces, slots = [], self.slots
        rows, heads, width = self.rows, self.kv_heads, self.head_dim
        for block, size in enumerate(self.sizes):
            # A block's memory is [heads, rows, size, width], and its last slot may be a spare.
            filled = min(slots, size - self.spare)
            stride = [size * width, width, rows * size * width, 1]
            spare = rows * (size - filled) * heads * width
            pieces.append((f"{kind}{block}", [rows, filled, heads, width], stride, spare))
            slots -= filled
        return pieces

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """k and v of each block."""
        return [(getattr(self, f"k{i}"), getattr(self, f"v{i}")) for i in range(len(self.sizes))]

    def blocks(self, positions: Sequence[Tensor]) -> list[Tensor]:
        """k and v [K B, S, D] of each block, and its `positions` [1, S]."""
        blocks = []
        for pair, size, where in zip(self.pairs(), self.sizes, positions):
            blocks += (*(x.view(-1, size, self.head_dim) for x in pair), where)
        return blocks

    def places(self, indices: Sequence[Tensor], row: Tensor | None = None) -> list[Tensor]:
        """Where `indices` (of SlotLayout.indices) lie in each block, int64 [K N]. Indices are slots
        int64 [T] of `row` int64 [1], or without `row` one slot of each row, int64 [B]."""
        rows = torch.arange(self.rows) if row is None else row
        heads = torch.arange(self.kv_heads)[:, None] * self.rows
        return [
            ((heads + rows) * size + index).flatten() for size, index in zip(self.sizes, indices)
        ]

    def store(self, k: Tensor, v: Tensor, places: Sequence[Tensor]) -> None:
        """Write k, v [K, N, D] to the `places` of each block."""
        for (keys, values), place in zip(self.pairs(), places):
            torch.ops.aten.index_put_(keys, [place], k.reshape(-1, self.head_dim))
            torch.ops.aten.index_put_(values, [place], v.reshape(-1, self.head_dim))


def choose(
    value: Tensor, limits: Sequence[int], branches: Sequence[Callable], operands: Sequence[Tensor]
) -> Tensor:
    """The result of the first branch whose limit is at least `value` int64 [], or of the last
    branch. Each branch is called with `operands`."""
    if len(branches) == 1:
        return branches[0](*operands)

    def this(_, *operands):
        return branches[0](*operands)

    def later(value, *operands):
        return choose(value, limits[1:], branches[1:], operands)

    return cond_op(value <= limits[0], this, later, (value, *operands))


@dataclass(frozen=True)
class Chunk:
    """What all layers of a kind share while a chunk is prefilled. Positions are float32 in UNITs.

    `begin` int64 [] is the first token's position, and `positions` [1, T] are all tokens'. `newest`
    and `oldest` [T G, 1] are as in `attention`. `held` is what SlotLayout.held gives. `row` int64
    [1] is the row of the chunk, None where a cache has one row.
    """

    begin: Tensor
    positions: Tensor
    newest: Tensor
    oldest: Tensor
    held: list[Tensor]
    row: Tensor | None


def sink_operands(
    sinks: Tensor | None, kv_heads: int, count: int, head_dim: int, rows: int
) -> tuple[Tensor, ...]:
    """What `attention` takes for `sinks` [H] of `count` tokens, or of one token of each row."""
    if sinks is None:
        return ()
    scores = sinks.view(kv_heads, 1, -1).expand(-1, count, -1)
    if rows == 1:
        return scores.reshape(kv_heads, -1, 1), torch.zeros(kv_heads, 1, head_dim)
    return scores.reshape(kv_heads * rows, -1, 1), torch.zeros(kv_heads * rows, 1, head_dim)


class PrefillAttention(nn.Module):
    """A chunk's queries attend to what its row of the layer's cache holds, and to the chunk."""

    def __init__(
        self, slots: SlotLayout, kv_heads: int, group: int, head_dim: int, traced: int,
        has_sinks: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.ring = slots.ring
        self.limits = [0, *slots.limits()]
        self.variants = [
            attention(
                *(kv_heads, group, head_dim, traced),
                [*slots.sizes[:count], traced],
                windowed=slots.ring and count > 0,
                growing=True,
                has_sinks=has_sinks,
            )
            for count in range(len(slots.sizes) + 1)
        ]

    def forward(self, q, k, v, cache: BlockCache, chunk: Chunk, sinks: Tensor | None = None):
        """q [K, T, G D], k, v [K, T, D] -> [K, T, G D]. `sinks` [H] are the layer's, if any."""
        sunk = sink_operands(sinks, cache.kv_heads, q.shape[1], cache.head_dim, 1)
        fixed = (q, chunk.newest, chunk.oldest, k, v, chunk.positions, *sunk)
        if chunk.row is not None:
            fixed = (*fixed, chunk.row + torch.arange(cache.kv_heads) * cache.rows)

        def branch(count: int) -> Callable:
            def run(q, newest, oldest, k, v, positions, *rest):
                own, rest = rest[: len(sunk)], rest[len(sunk) :]
                if chunk.row is not None:
                    row, *rest = rest
                blocks = list(rest[: 3 * count])
                if chunk.row is not None:
                    for i in range(3 * count):
                        if i % 3 < 2:
                            blocks[i] = blocks[i].index_select(0, row)
                window = (oldest,) if self.ring and count else ()
                given = *window, *own, *blocks
                return self.variants[count](q, newest, *given, k, v, positions)[0]

            return run

        branches = [branch(count) for count in range(len(self.variants))]
        return choose(chunk.begin, self.limits, branches, (*fixed, *cache.blocks(chunk.held)))


class DecodeAttention(nn.Module):
    """One query of each row and head attends to the cache, which has the query's key already."""

    def __init__(
        self, slots: SlotLayout, kv_heads: int, group: int, head_dim: int, rows: int = 1,
        has_sinks: bool = False,
    ):  # fmt: skip
        super().__init__()
        # A position p is among the first p + 1.
        self.limits = [limit - 1 for limit in slots.limits()]
        self.variants = [
            attention(
                *(kv_heads, group, head_dim, 1),
                slots.sizes[:count],
                windowed=False,
                growing=False,
                rows=rows,
                has_sinks=has_sinks,
            )
            for count in range(1, len(slots.sizes) + 1)
        ]

    def forward(
        self, q, cache: BlockCache, slots: SlotLayout, furthest: Tensor, newest: Tensor,
        sinks: Tensor | None = None,
    ):  # fmt: skip
        """q [K, B, G D], newest float32 [1, 1] or [K B, 1, 1] in UNITs -> [K, B, G D]. All rows
        read as many blocks as the `furthest` position int64 [] asks for. `sinks` are as in
        PrefillAttention."""
        sunk = sink_operands(sinks, cache.kv_heads, q.shape[1], cache.head_dim, cache.rows)

        def branch(count: int) -> Callable:
            def run(q, newest, *blocks):
                taken = blocks[: len(sunk) + 3 * count]
                return self.variants[count - 1](q, newest, *taken)[0]

            return run

        branches = [branch(count) for count in range(1, len(self.variants) + 1)]
        operands = q, newest, *sunk, *cache.blocks(slots.positions)
        return choose(furthest, self.limits, branches, operands)
