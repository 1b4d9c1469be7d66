"""Routed experts around an XNNPACK call whose weights are its arguments.

A step gathers the chosen experts' weights, so that no others are read. A chunk computes all
experts, because its tokens together choose nearly all. Shapes: N tokens, E experts, k chosen for
each token, D hidden size, I an expert's own size.
"""

import functools

import torch
from torch import Tensor, nn

from tokenloop.export.pte.quantize import QuantizedExperts
from tokenloop.export.pte.xnnpack_graph import GraphBuilder, GraphDelegate
from tokenloop.export.pte.xnnpack_regions import GELU
from tokenloop.models.layers import SWIGLU_LIMIT, SWIGLU_SLOPE
from tokenloop.models.moe import SparseMoe


@functools.cache
def expert_call(
    count: int, tokens: int, hidden_size: int, size: int, int8: bool, activation: str = "silu",
    bias: bool = False,
) -> GraphDelegate:  # fmt: skip
    """The weighted results [count, N, D] of `count` experts.

    Arguments: x [count, N, D], weights [count, N, 1], gate_up [count, 2 I, D] and down
    [count, D, I]. With `int8` gate_up and down are codes, each followed by a scale for each of its
    rows, [count, 1, 2 I] and [count, 1, D]. With `bias` each has one for each of its rows besides,
    of the same shapes. After `weights` come the `constants` of the activation. N may vary.
    """
    graph = GraphBuilder()
    weight = graph.int8_input if int8 else graph.input
    x, weights = graph.input(count, tokens, hidden_size), graph.input(count, tokens, 1)
    given = [graph.input(1) for _ in constants(activation)]

    def product(x, rows: int, columns: int):
        out = graph.matmul(x, weight(count, rows, columns), transpose_b=True)
        out = graph.multiply(out, graph.input(count, 1, rows)) if int8 else out
        return graph.add(out, graph.input(count, 1, rows)) if bias else out

    gate_up = product(x, 2 * size, hidden_size)
    gate, up = graph.slice(gate_up, 0, size), graph.slice(gate_up, size, size)
    if activation == "clamped_swiglu":
        (slope,) = given
        gate = graph.clamp(gate, None, SWIGLU_LIMIT)
        up = graph.clamp(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
        gated = graph.multiply(gate, graph.sigmoid(graph.multiply(gate, slope)))
        hidden = graph.add(graph.multiply(up, gated), gated)
    elif activation == "gelu_tanh":
        slope, cubic = given
        inner = graph.add(graph.multiply(graph.multiply(gate, gate), cubic), slope)
        gelu = graph.multiply(gate, graph.sigmoid(graph.multiply(gate, inner)))
        hidden = graph.multiply(gelu, up)
    else:
        hidden = graph.multiply(graph.silu(gate), up)
    out = product(hidden, hidden_size, size)
    binary = graph.serialize(graph.multiply(out, weights))
    return GraphDelegate(binary, lambda x, *_: [torch.empty_like(x)])


def constants(activation: str) -> tuple[float, ...]:
    """The numbers that an activation needs: of gpt-oss's clamped SwiGLU the slope, and of GELU's
    tanh approximation those of DelegatedGELU."""
    return {"clamped_swiglu": (SWIGLU_SLOPE,), "gelu_tanh": GELU}.get(activation, ())


class LoweredExperts(nn.Module):
    """hidden [1, N, D], scores [1, N, E] -> what the experts add, [1, N, D]. The module is traced
    into the program around it."""

    def __init__(self, moe: SparseMoe):
        super().__init__()
        self.route, self.config = moe.route, moe.moe
        self.int8 = isinstance(moe.experts, QuantizedExperts)
        stored = dict(moe.experts.named_buffers() if self.int8 else moe.experts.named_parameters())
        stored |= dict(moe.experts.named_parameters())
        # Buffers are in the order of the call's arguments.
        for matrix in ("gate_up_proj", "down_proj"):
            for name, tensor in stored.items():
                if name.startswith(matrix):
                    tensor = tensor[:, None] if tensor.ndim == 2 else tensor
                    self.register_buffer(name, tensor.detach())

    def forward(self, hidden: Tensor, scores: Tensor) -> Tensor:
        chosen, weights = self.route(scores[0])
        count, size = hidden.shape[1:]
        stored = list(self.buffers())
        # As in SparseMoe, a size that is known when the method is traced decides.
        if isinstance(count, int) and chosen.numel() < self.config.num_experts:
            stored = [tensor.index_select(0, chosen.flatten()) for tensor in stored]
            x = hidden[0, :, None].expand(-1, chosen.shape[1], -1).reshape(-1, 1, size)
            given = x, weights.reshape(-1, 1, 1), *self._constants()
            out = self._call(*x.shape)(*given, *stored)[0]
            return out.view(1, count, -1, size).sum(2)
        experts = self.config.num_experts
        dense = scores.new_zeros(count, experts).scatter(1, chosen, weights)
        x = hidden.expand(experts, -1, -1).contiguous()
        given = x, dense.t()[..., None].contiguous(), *self._constants()
        return self._call(*x.shape)(*given, *stored)[0].sum(0)[None]

    def _constants(self) -> tuple[Tensor, ...]:
        return tuple(torch.full((1,), value) for value in constants(self.config.activation))

    def _call(self, count: int, tokens: int, hidden_size: int) -> GraphDelegate:
        # Any example will do for a number that varies.
        tokens = tokens if isinstance(tokens, int) else 3
        c = self.config
        sizes = count, tokens, hidden_size, c.moe_intermediate_size
        return expert_call(*sizes, self.int8, c.activation, c.bias)
