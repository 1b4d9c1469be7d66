"""Attention over a KV cache inside XNNPACK, reading only as many slots as the position asks for.

A layer's cache is cut into blocks of 512, 1536, 6144, ... slots, each a tensor of its own: a
method attends to the first few of them, chosen by its position (ExecuTorch cannot pass a part of a
tensor on without copying it). Shapes: K key-value heads, G query heads for each of them, T tokens,
D the size of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Not torch.cond, which would trace every branch once more with Dynamo.
from torch._higher_order_ops.cond import cond_op

from export.xnnpack_graph import GraphBuilder, GraphDelegate
from models.cache import KVCache, SlidingCache

FIRST_BLOCK = 512
# Masks are computed from positions in this unit: one position too far lowers a score by half of
# it, which leaves nothing of the score's exponential. A power of two keeps positions exact.
UNIT = 2.0**20
# The position of a slot that nobody may see, below and above every query.
NOWHERE = UNIT * UNIT


def block_sizes(slots: int) -> list[int]:
    """The sizes of a cache's blocks: each quadruples what there is, until there are `slots`."""
    sizes = [min(FIRST_BLOCK, slots)]
    while sum(sizes) < slots:
        sizes.append(min(3 * sum(sizes), slots - sum(sizes)))
    return sizes


def attention(
    kv_heads: int,
    group: int,
    head_dim: int,
    tokens: int,
    blocks: Sequence[int],
    windowed: bool,
    growing: bool,
) -> GraphDelegate:
    """softmax(q k^T - mask) v as one delegate call.

    Arguments: q [K, T, G D], already scaled; newest [T G, 1] or [1, 1], half a position after the
    last one that a row sees; with `windowed` oldest, of the same shape, half a position after the
    last one that it no longer sees, in the first block; then k [K, S, D], v [K, S, D] and
    positions [1, S] of each block. Positions are float32 in UNITs. Result: [K, T, G D].
    `blocks` are the sizes S; the last one's may vary if it is `growing`, as T may.
    """
    graph = GraphBuilder()
    q = graph.input(kv_heads, tokens, group * head_dim)
    # Here and not around the call: ExecuTorch takes a view of a condition's result for one of the
    # memory that was planned for it, where that result is not.
    q = graph.reshape(q, kv_heads, -1, head_dim)
    newest = graph.input(tokens * group, 1)
    oldest = graph.input(tokens * group, 1) if windowed else None
    scores, values = [], []
    for i, size in enumerate(blocks):
        k, v = (graph.input(kv_heads, size, head_dim) for _ in range(2))
        positions = graph.input(1, size)
        penalty = graph.relu(graph.subtract(positions, newest))
        if windowed and i == 0:
            penalty = graph.add(penalty, graph.relu(graph.subtract(oldest, positions)))
        scores.append(graph.subtract(graph.matmul(q, k, transpose_b=True), penalty))
        values.append(v)
    weights = graph.softmax(graph.concatenate(scores, axis=2))
    if growing:
        out = graph.matmul(weights, graph.concatenate(values, axis=1))
    else:
        # Values are large and weights small: better to cut these than to join those.
        out, begin = None, 0
        for v, size in zip(values, blocks):
            part = weights if len(blocks) == 1 else graph.slice(weights, begin, size)
            product = graph.matmul(part, v)
            out = product if out is None else graph.add(out, product)
            begin += size
    out = graph.reshape(out, kv_heads, -1, group * head_dim)
    return GraphDelegate(graph.serialize(out), lambda q, *_: [torch.empty_like(q)])


class Slots(nn.Module):
    """Where one kind of layer keeps its positions: in a ring, or each in a slot of its own."""

    def __init__(self, cache: KVCache):
        super().__init__()
        self.ring = isinstance(cache, SlidingCache)
        self.count = cache.slots
        self.sizes = [self.count] if self.ring else block_sizes(self.count)
        # Of several blocks each has a spare slot, for what belongs into another one.
        self.spare = int(len(self.sizes) > 1)
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.starts = starts
        for i, (start, size) in enumerate(zip(starts, self.sizes)):
            positions = torch.arange(start, start + size + self.spare, dtype=torch.float32) * UNIT
            positions[size:] = NOWHERE
            self.register_buffer(f"positions{i}", positions[None])

    @property
    def positions(self) -> list[Tensor]:
        """For each block the slots' own positions [1, S], which decode may see up to its own."""
        return [getattr(self, f"positions{i}") for i in range(len(self.sizes))]

    def limits(self) -> list[int]:
        """How many positions the first 1, 2, ... blocks hold."""
        return [start + size for start, size in zip(self.starts, self.sizes)]

    def indices(self, positions: Tensor) -> list[Tensor]:
        """For each block the slots int64 [T] at which it stores `positions` int64 [T]."""
        if self.ring:
            return [positions % self.count]
        if not self.spare:
            return [positions]
        return [
            torch.where((positions >= start) & (positions < start + size), positions - start, size)
            for start, size in zip(self.starts, self.sizes)
        ]

    def held(self, positions: Tensor) -> list[Tensor]:
        """For each block the positions [1, S] that it holds before a chunk at `positions`."""
        begin = positions[:1]
        if not self.ring:
            bound = begin.float() * UNIT
            return [torch.where(block < bound, block, NOWHERE) for block in self.positions]
        slots = torch.arange(self.count)
        # The newest position before the chunk that is congruent to the slot; negative: unwritten.
        newest = begin - 1 - (begin - 1 - slots + self.count) % self.count
        return [torch.where(newest < 0, NOWHERE, newest.float() * UNIT)[None]]


class BlockCache(nn.Module):
    """The keys and values of one layer: for each block float32 [K, S, D]."""

    def __init__(self, cache: KVCache, slots: Slots):
        super().__init__()
        kv_heads, head_dim = cache.k.shape[2:]
        self.blocks = len(slots.sizes)
        for i, size in enumerate(slots.sizes):
            shape = (kv_heads, size + slots.spare, head_dim)
            self.register_buffer(f"k{i}", torch.zeros(shape))
            self.register_buffer(f"v{i}", torch.zeros(shape))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """k and v of each block."""
        return [(getattr(self, f"k{i}"), getattr(self, f"v{i}")) for i in range(self.blocks)]

    def store(self, k: Tensor, v: Tensor, indices: Sequence[Tensor]) -> None:
        """Write k, v [K, T, D] to the slots `indices`, of Slots.indices."""
        for (keys, values), index in zip(self.pairs(), indices):
            torch.ops.aten.index_put_(keys, [None, index], k)
            torch.ops.aten.index_put_(values, [None, index], v)


def choose(
    value: Tensor, limits: Sequence[int], branches: Sequence[Callable], operands: Sequence[Tensor]
) -> Tensor:
    """What the first branch returns whose limit is at least `value` int64 [], or the last branch:
    each is called with `operands`."""
    if len(branches) == 1:
        return branches[0](*operands)

    def this(_, *operands):
        return branches[0](*operands)

    def later(value, *operands):
        return choose(value, limits[1:], branches[1:], operands)

    return cond_op(value <= limits[0], this, later, (value, *operands))


@dataclass(frozen=True)
class Chunk:
    """What all layers of a kind share while a chunk is prefilled; positions float32 in UNITs.

    `begin` int64 [] is the first token's position, `positions` [1, T] are all of them, `newest` and
    `oldest` [T G, 1] as in `attention`, and `held` what Slots.held says.
    """

    begin: Tensor
    positions: Tensor
    newest: Tensor
    oldest: Tensor
    held: list[Tensor]


class PrefillAttention(nn.Module):
    """A chunk's queries attend to what its layer's cache holds, and to the chunk."""

    def __init__(self, slots: Slots, kv_heads: int, group: int, head_dim: int, traced: int):
        super().__init__()
        sizes = [size + slots.spare for size in slots.sizes]
        self.ring = slots.ring
        self.limits = [0, *slots.limits()]
        self.variants = [
            attention(
                *(kv_heads, group, head_dim, traced),
                [*sizes[:count], traced],
                windowed=slots.ring and count > 0,
                growing=True,
            )
            for count in range(len(sizes) + 1)
        ]

    def forward(self, q, k, v, cache: BlockCache, chunk: Chunk):
        """q [K, T, G D], k, v [K, T, D] -> [K, T, G D]."""
        pairs = cache.pairs()

        def branch(count: int) -> Callable:
            def run(q, newest, oldest, k, v, positions, *rest):
                blocks = []
                for i in range(count):
                    blocks += rest[i], rest[len(pairs) + i], rest[2 * len(pairs) + i]
                window = (oldest,) if self.ring and count else ()
                return self.variants[count](q, newest, *window, *blocks, k, v, positions)[0]

            return run

        operands = (q, chunk.newest, chunk.oldest, k, v, chunk.positions)
        operands += tuple(k for k, _ in pairs) + tuple(v for _, v in pairs)
        operands += tuple(chunk.held)
        branches = [branch(count) for count in range(len(pairs) + 1)]
        return choose(chunk.begin, self.limits, branches, operands)


class DecodeAttention(nn.Module):
    """One query for each head attends to its layer's cache, which has its own key already."""

    def __init__(self, slots: Slots, kv_heads: int, group: int, head_dim: int):
        super().__init__()
        sizes = [size + slots.spare for size in slots.sizes]
        # A position p is among the first p + 1.
        self.limits = [limit - 1 for limit in slots.limits()]
        self.variants = [
            attention(
                *(kv_heads, group, head_dim, 1),
                sizes[: count + 1],
                windowed=False,
                growing=False,
            )
            for count in range(len(sizes))
        ]

    def forward(self, q, cache: BlockCache, slots: Slots, position: Tensor, newest: Tensor):
        """q [K, 1, G D], position int64 [], newest float32 [1, 1] in UNITs -> [K, 1, G D]."""
        pairs = cache.pairs()

        def branch(count: int) -> Callable:
            def run(q, newest, *rest):
                blocks = []
                for i in range(count):
                    blocks += rest[i], rest[len(pairs) + i], rest[2 * len(pairs) + i]
                return self.variants[count - 1](q, newest, *blocks)[0]

            return run

        operands = (q, newest, *(k for k, _ in pairs), *(v for _, v in pairs), *slots.positions)
        branches = [branch(count) for count in range(1, len(pairs) + 1)]
        return choose(position, self.limits, branches, operands)
