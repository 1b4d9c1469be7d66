"""State that goes on with every token, between XNNPACK's calls: what convolutions read last, and
the matrices of gated delta nets.

Plain operators move it, in whole rows, and XNNPACK computes with it. Shapes: B rows, T tokens of
one row or N rows of a step, C channels, W a convolution's width; of a delta net G key heads and
H = G S value heads of sizes K and V.
"""

import functools

import torch
from torch import Tensor, nn

# Not torch's scan, which would trace the body once more with Dynamo.
from torch._higher_order_ops.scan import scan_op

from tokenloop.export.pte.xnnpack_graph import GraphBuilder, GraphDelegate, Value
from tokenloop.models.kernels.gated_delta_rule.reference import gates

# Tokens of a prompt that the delta rule takes at once. Of fewer the state is read too often, and of
# more the inverse of a matrix of so many rows takes most of the time.
CHUNK = 32


class RunningState(nn.Module):
    """What a layer remembers of each row, float32 [B + 1, elements] for each tensor of `cache`. The
    last row is zeros, which a row begins with. Of `conv` channels are adjacent: [W - 1, C]."""

    def __init__(self, cache: nn.Module):
        super().__init__()
        self.shapes = {name: tuple(buffer.shape[1:]) for name, buffer in cache.named_buffers()}
        for name, buffer in cache.named_buffers():
            self.rows = buffer.shape[0]
            memory = torch.zeros(self.rows + 1, buffer[0].numel())
            self.register_buffer(name, memory)

    def load(self, name: str, rows: Tensor, started: Tensor) -> Tensor:
        """[N, elements] of `rows` int64 [N]: zeros of those that have not `started`, bool [N]."""
        places = torch.where(started, rows, self.rows)
        return getattr(self, name).index_select(0, places)

    def store(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Put `values` [N, ...] in place of what was remembered of `rows`."""
        torch.ops.aten.index_put_(getattr(self, name), [rows], values.reshape(len(rows), -1))

    def pieces(self, name: str) -> list[tuple[str, list[int], list[int], int]]:
        """As BlockCache.pieces."""
        shape = [self.rows, *self.shapes[name]]
        elements = getattr(self, name).shape[1]
        if name == "conv":
            stride = [elements, 1, shape[1]]
        else:
            stride = [elements, *torch.empty(shape[1:], device="meta").stride()]
        return [(name, shape, stride, elements)]


def chunk_taps(state: RunningState, x: Tensor, row: Tensor, started: Tensor) -> list[Tensor]:
    """What a convolution multiplies its weights with, the oldest first: W tensors [1, T, C] of x
    [1, T, C], the chunk of `row` int64 [1]. The row remembers its last inputs."""
    count, channels = x.shape[1:]
    before = state.load("conv", row, started).view(1, -1, channels)
    keep = before.shape[1]
    window = torch.cat([before, x], 1)
    state.store("conv", row, window[:, -keep:])
    return [*(window[:, i : i + count] for i in range(keep)), x]


def step_taps(state: RunningState, x: Tensor, started: Tensor) -> list[Tensor]:
    """`chunk_taps` of a token of each row: W tensors [1, B, C] of x [1, B, C]."""
    rows, channels = torch.arange(x.shape[1]), x.shape[2]
    before = state.load("conv", rows, started)
    newest = torch.cat([before[:, channels:], x[0]], 1)
    state.store("conv", rows, newest)
    return [*(part[None] for part in before.split(channels, 1)), x]


# The gated delta rule (models/kernels/gated_delta_rule/reference.py has the formulas)


@functools.cache
def step_call(rows: int, key_heads: int, shared: int, key_size: int, value_size: int):
    """The rule's step. Arguments: q, k [rows, G, K], of length 1 and q scaled; v [rows, H, V],
    decay = exp(g) and beta [rows, H], and the states [rows, H K V]. Results: o [rows, H, V], and
    the states after the token."""
    graph = GraphBuilder()
    pairs, heads = rows * key_heads, rows * key_heads * shared
    q, k = (graph.input(rows, key_heads, key_size) for _ in range(2))
    v = graph.input(rows, key_heads * shared, value_size)
    decay, beta = (graph.input(rows, key_heads * shared) for _ in range(2))
    state = graph.input(rows, key_heads * shared * key_size * value_size)

    def of_values(x: Value, factor: Value) -> Value:
        """Of each key head's vector one for each of its value heads, times its `factor`."""
        x = graph.reshape(x, pairs, 1, key_size)
        return graph.multiply(x, graph.reshape(factor, pairs, shared, 1))

    def outer(x: Value, *shape: int) -> Value:
        return graph.reshape(x, heads, *shape)

    matrix = outer(state, key_size, value_size)
    recalled = graph.matmul(outer(of_values(k, decay), 1, key_size), matrix)
    missing = graph.subtract(outer(v, 1, value_size), recalled)
    written = outer(of_values(k, beta), key_size, 1)
    kept = graph.multiply(matrix, outer(decay, 1, 1))
    after = graph.add(kept, graph.multiply(written, missing))
    one = graph.reshape(k, pairs, key_size, 1)
    attention = graph.matmul(graph.reshape(q, pairs, 1, key_size), one)
    attention = graph.multiply(attention, graph.reshape(beta, pairs, shared, 1))
    # S^T q by what S was: the products need not wait for one another.
    out = graph.matmul(outer(of_values(q, decay), 1, key_size), matrix)
    out = graph.add(out, graph.multiply(outer(attention, 1, 1), missing))
    out = graph.reshape(out, rows, key_heads * shared, value_size)
    binary = graph.serialize(out, graph.reshape(after, rows, -1))
    return GraphDelegate(
        binary, lambda q, k, v, decay, beta, state: [v.new_empty(v.shape), torch.empty_like(state)],
        outputs=2,
    )  # fmt: skip


@functools.cache
def block_call(key_heads: int, shared: int, key_size: int, value_size: int):
    """The rule over CHUNK tokens of one row. Arguments: q, k [CHUNK, G, K], of length 1 and q
    scaled; v [CHUNK, H, V]; the sums of g from the first token on, and beta, both [CHUNK, H]; the
    state [1, H K V]; and the tensors of `masks`. Results: o [CHUNK, H, V], and the state after the
    tokens."""
    graph, heads = GraphBuilder(), key_heads * shared
    q, k = (graph.input(CHUNK, key_heads, key_size) for _ in range(2))
    v = graph.input(CHUNK, heads, value_size)
    decay, beta = (graph.input(CHUNK, heads) for _ in range(2))
    state = graph.input(1, heads * key_size * value_size)
    inclusive, strict, eye, *corners = (graph.input(CHUNK, CHUNK) for _ in masks())

    def by_head(x: Value) -> Value:
        return graph.transpose(x, 1, 0, 2)

    def of_values(x: Value) -> Value:
        """[G, CHUNK, n] as [G, 1, CHUNK, n], which broadcasts over a key head's value heads."""
        return graph.reshape(x, key_heads, 1, CHUNK, x.shape[-1])

    def of_heads(x: Value) -> Value:
        return graph.reshape(x, heads, CHUNK, x.shape[-1])

    def factor(x: Value) -> Value:
        """[H, CHUNK, 1] as [G, S, CHUNK, 1]."""
        return graph.reshape(x, key_heads, shared, CHUNK, 1)

    q, k, v = by_head(q), by_head(k), by_head(v)
    decay, beta = (graph.reshape(graph.transpose(x, 1, 0), heads, CHUNK, 1) for x in (decay, beta))
    matrix = graph.reshape(state, heads, key_size, value_size)

    # exp(decay[i] - decay[j]), where j > i is masked. There it may overflow.
    row = graph.reshape(decay, heads, 1, CHUNK)
    ratio = graph.exp(graph.clamp(graph.subtract(decay, row), None, 0.0))
    ratio = graph.reshape(ratio, key_heads, shared, CHUNK, CHUNK)
    kept = graph.exp(decay)
    end = graph.slice(row, CHUNK - 1, 1)
    left = graph.exp(graph.subtract(end, decay))

    keys = of_values(graph.matmul(k, k, transpose_b=True))
    lower = graph.multiply(graph.multiply(keys, graph.multiply(ratio, strict)), factor(beta))
    lower = of_heads(lower)
    inverse = graph.subtract(eye, graph.multiply(lower, corners[0]))
    for corner in corners[1:]:
        product = graph.matmul(graph.matmul(inverse, graph.multiply(lower, corner)), inverse)
        inverse = graph.subtract(inverse, product)

    erased = of_heads(graph.multiply(of_values(k), factor(graph.multiply(beta, kept))))
    writes = graph.matmul(inverse, graph.multiply(v, beta))
    erases = graph.matmul(inverse, erased)
    written = graph.subtract(writes, graph.matmul(erases, matrix))
    scores = of_values(graph.matmul(q, k, transpose_b=True))
    scores = of_heads(graph.multiply(scores, graph.multiply(ratio, inclusive)))
    queries = of_heads(graph.multiply(of_values(q), factor(kept)))
    out = graph.add(graph.matmul(queries, matrix), graph.matmul(scores, written))
    added = of_heads(graph.multiply(of_values(k), factor(left)))
    added = graph.matmul(graph.transpose(added, 0, 2, 1), written)
    after = graph.add(graph.multiply(matrix, graph.exp(end)), added)
    binary = graph.serialize(graph.transpose(out, 1, 0, 2), graph.reshape(after, 1, -1))
    return GraphDelegate(
        binary, lambda q, k, v, d, b, state, *_: [v.new_empty(v.shape), torch.empty_like(state)],
        outputs=2,
    )  # fmt: skip


def masks() -> list[Tensor]:
    """Constants of block_call, each [CHUNK, CHUNK]: where the second token is not later, and where
    it is earlier; the unit matrix; and for each round of reference._unit_inverse the corners
    between blocks."""
    index = torch.arange(CHUNK)
    inclusive = (index[None, :] <= index[:, None]).float()
    found = [inclusive, inclusive.tril(-1), torch.eye(CHUNK)]
    size = 1
    while size < CHUNK:
        block, pair = index // size, index // (2 * size)
        joined = (pair[:, None] == pair[None, :]) & (block[:, None] != block[None, :])
        found.append(joined.float())
        size *= 2
    return found


class DeltaRule(nn.Module):
    """The gated delta rule of `nets`, layers of one shape, by their numbers: over `chunks`, or in
    steps."""

    def __init__(self, nets: dict[int, nn.Module], chunks: bool):
        super().__init__()
        net = next(iter(nets.values()))
        self.sizes = net.key_heads, net.value_heads // net.key_heads, net.key_size, net.value_size
        for i, net in nets.items():
            self.register_buffer(f"A_log{i}", net.A_log.detach().float())
            self.register_buffer(f"dt_bias{i}", net.dt_bias.detach().float())
        for i, mask in enumerate(masks() if chunks else ()):
            self.register_buffer(f"mask{i}", mask)

    def step(self, i: int, state: RunningState, q, k, v, a, b, started: Tensor) -> Tensor:
        """o [1, B, H V] of q, k [B, G, K], v [B, H, V] and a, b [1, B, H] of layer `i`."""
        g, beta = self._gates(i, a, b)
        rows = torch.arange(len(q))
        before = state.load("recurrent", rows, started)
        out, after = step_call(len(q), *self.sizes)(q, k, v, g.exp(), beta, before)
        state.store("recurrent", rows, after)
        return out.view(1, len(q), -1)

    def chunk(
        self, i: int, state: RunningState, q, k, v, a, b, positions: Tensor, row, started: Tensor
    ) -> Tensor:  # fmt: skip
        """o [1, T, H V] of the chunk of `row` int64 [1], inputs as in `step` with T for B."""
        count, call = q.shape[0], block_call(*self.sizes)
        # One more than are needed: torch.export makes a constant of a number that may be 1.
        blocks = torch.arange((count + CHUNK - 1) // CHUNK + 1)

        def block(before, number, last, q, k, v, g, beta, *masks):
            tokens = number * CHUNK + torch.arange(CHUNK)
            # Tokens after the last neither change a state nor let it decay.
            real = (tokens <= last).float()[:, None]
            tokens = torch.minimum(tokens, last)
            q, k, v, g, beta = (x.index_select(0, tokens) for x in (q, k, v, g, beta))
            out, after = call(q, k, v, (g * real).cumsum(0), beta * real, before, *masks)
            return [after, out]

        before = state.load("recurrent", row, started)
        tokens = positions - positions[0]
        given = tokens[-1], q, k, v, *self._gates(i, a, b)
        constants = (x for name, x in self.named_buffers() if name.startswith("mask"))
        if isinstance(count, int):
            # A chunk of one token, the only size that does not vary, needs no loop.
            after, out = block(before, torch.zeros(1, dtype=torch.int64), *given, *constants)
        else:
            after, out = scan_op(block, [before], [blocks], (*given, *constants))
            out = out.flatten(0, 1)
        state.store("recurrent", row, after)
        # torch.export cannot tell that there are as many for a slice.
        return out.index_select(0, tokens).view(1, count, -1)

    def _gates(self, i: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        constants = getattr(self, f"A_log{i}"), getattr(self, f"dt_bias{i}")
        return gates(a[0], b[0], *constants)
