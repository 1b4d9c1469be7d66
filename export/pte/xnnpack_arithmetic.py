"""XNNPACK graphs recorded from Python's own arithmetic. A formula is written once for tensors and
for a delegate."""

from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from torch import Tensor

from tokenloop.export.pte.xnnpack_graph import GraphBuilder, GraphDelegate, Value


class Recorder(GraphBuilder):
    """A graph recorded from Python's own arithmetic on Recorded values."""

    def __init__(self):
        super().__init__()
        self._constants: dict[float, Value] = {}

    def argument(self, *shape: int) -> "Recorded":
        """As GraphBuilder.input. All arguments come before any operation."""
        return Recorded(self, self.input(*shape))

    def unary(self, kind: type, x: Value) -> "Recorded":
        return Recorded(self, self._node(kind, x.shape, x))

    def binary(self, kind: type, a: Value, b) -> "Recorded":
        """`b` is Recorded or a number."""
        if isinstance(b, Recorded):
            b = b.value
        else:
            if b not in self._constants:
                self._constants[b] = self.input(1)
            b = self._constants[b]
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return Recorded(self, self._node(kind, shape, a, b))

    def interleave(self, columns: "list[Recorded]") -> "Recorded":
        """[N] each -> [1, columns N]: the first of each, the second of each, ..."""
        count, (size,) = len(columns), columns[0].value.shape
        rows = self.concatenate([self.reshape(c.value, 1, size) for c in columns], axis=0)
        turned = self._shaped(
            schema.XNNStaticTranspose, (size, count), rows, num_dims=2, perm=[1, 0]
        )
        return Recorded(self, self.reshape(turned, 1, -1))

    def delegate(self, result: "Recorded", shape: tuple[int, ...]):
        """The function of the arguments, in their order."""
        call = GraphDelegate(self.serialize(result.value), lambda *_: [torch.empty(shape)])
        constants = list(self._constants)

        def run(*arguments: Tensor) -> Tensor:
            return call(*arguments, *(torch.full((1,), float(value)) for value in constants))[0]

        return run


@dataclass(frozen=True)
class Recorded:
    """A float32 value of a Recorder."""

    graph: Recorder
    value: Value

    def __add__(self, other):
        return self.graph.binary(schema.XNNAdd, self.value, other)

    def __sub__(self, other):
        return self.graph.binary(schema.XNNSubtract, self.value, other)

    def __mul__(self, other):
        return self.graph.binary(schema.XNNMultiply, self.value, other)

    def __truediv__(self, other):
        return self.graph.binary(schema.XNNDiv, self.value, other)

    def __neg__(self):
        return self.graph.unary(schema.XNNNegate, self.value)

    def clamp(self, min: float):
        return self.graph.binary(schema.XNNMaximum, self.value, min)

    def floor(self):
        return self.graph.unary(schema.XNNFloor, self.value)

    def exp(self):
        return self.graph.unary(schema.XNNExp, self.value)

    def log(self):
        return self.graph.unary(schema.XNNLog, self.value)
