"""XNNPACK graphs written node by node, where no traced operator says what is wanted.

Every method of GraphBuilder adds one node (xnnpack.h names them xnn_define_*) and returns its
result. Sizes are those of an example. A method's inputs may later have other sizes on every axis
that no slice cuts. XNNPACK works the rest out from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    XNN_FLAG_TRANSPOSE_B,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir import lowered_backend_module as exir_lowered
from executorch.exir.delegate import executorch_call_delegate
from torch import Tensor

CONCATENATIONS = {
    2: schema.XNNConcatenate2, 3: schema.XNNConcatenate3, 4: schema.XNNConcatenate4,
    5: schema.XNNConcatenate5,
}  # fmt: skip


class LoweredBackendModule(exir_lowered.LoweredBackendModule):
    """A delegate that costs nothing to trace. Its outputs' shapes are known, so no pass of the
    outer program has to run a graph again. ExecuTorch goes by the class's name."""

    def __deepcopy__(self, memo) -> "LoweredBackendModule":
        return self


@dataclass(frozen=True)
class ShapesOnly:
    """Stands where ExecuTorch looks for a delegate's original program. `run` makes tensors of the
    outputs' shapes from the inputs."""

    run: Callable[..., list[Tensor]]
    outputs: int

    @property
    def graph(self) -> torch.fx.Graph:
        graph = torch.fx.Graph()
        graph.output((None,) * self.outputs)
        return graph

    def module(self) -> Callable[..., list[Tensor]]:
        return self.run


def delegate(binary: bytes, run: Callable[..., list[Tensor]], outputs: int, named_data=None):
    """`binary` as a module that executorch_call_delegate takes."""
    lowered = LoweredBackendModule(
        ShapesOnly(run, outputs), "XnnpackBackend", binary, [], named_data
    )
    lowered.meta = {"debug_handle_map": {}}
    return lowered


class GraphDelegate:
    """A graph without weights as a delegate call: tensors in, tensors out.

    It is no nn.Module, because torch.export would look for one in the branches of a condition.
    """

    def __init__(self, binary: bytes, run: Callable[..., list[Tensor]], outputs: int = 1):
        self.lowered = delegate(binary, run, outputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return executorch_call_delegate(self.lowered, *inputs)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its id, and its shape in the example."""

    id: int
    shape: tuple[int, ...]


class GraphBuilder:
    """Collects float32 nodes. Inputs and outputs are numbered in the order of their definition."""

    def __init__(self):
        self._nodes: list[schema.XNode] = []
        self._values: list[tuple[Value, schema.XValue]] = []
        self._inputs: list[Value] = []

    def input(self, *shape: int) -> Value:
        """A float32 argument of the delegate."""
        return self._external(self._value(shape))

    def int8_input(self, *shape: int) -> Value:
        """An int8 argument of the delegate, as the floats -128.0 to 127.0."""
        codes = self._value(shape, schema.PerTensorQuant(scale=1.0, zero_point=0))
        self._external(codes)
        return self._node(schema.XNNConvert, shape, codes)

    def add(self, a: Value, b: Value) -> Value:
        """a + b with broadcasting."""
        return self._node(schema.XNNAdd, torch.broadcast_shapes(a.shape, b.shape), a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        """a - b with broadcasting."""
        return self._node(schema.XNNSubtract, torch.broadcast_shapes(a.shape, b.shape), a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        """a * b with broadcasting."""
        return self._node(schema.XNNMultiply, torch.broadcast_shapes(a.shape, b.shape), a, b)

    def relu(self, x: Value) -> Value:
        """max(x, 0)."""
        limits = schema.OutputMinMax(output_min=0.0, output_max="+inf")
        return self._node(schema.XNNClamp, x.shape, x, limits=limits)

    def clamp(self, x: Value, low: float | None, high: float) -> Value:
        """x between `low`, if there is one, and `high`."""
        limits = schema.OutputMinMax("-inf" if low is None else low, high)
        return self._node(schema.XNNClamp, x.shape, x, limits=limits)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        return self._node(schema.XNNSigmoid, x.shape, x)

    def tanh(self, x: Value) -> Value:
        """tanh(x)."""
        return self._node(schema.XNNTanh, x.shape, x)

    def silu(self, x: Value) -> Value:
        """x * sigmoid(x)."""
        return self.multiply(x, self.sigmoid(x))

    def exp(self, x: Value) -> Value:
        """e to the power of x."""
        return self._node(schema.XNNExp, x.shape, x)

    def softmax(self, x: Value) -> Value:
        """Softmax over the last axis."""
        return self._node(schema.XNNSoftmax, x.shape, x)

    def matmul(self, a: Value, b: Value, transpose_b: bool = False) -> Value:
        """a [B, M, K] times b [B, K, N], or b [B, N, K] transposed."""
        columns = b.shape[-2] if transpose_b else b.shape[-1]
        flags = XNN_FLAG_TRANSPOSE_B if transpose_b else 0
        shape = (*a.shape[:-1], columns)
        return self._node(schema.XNNBatchMatrixMultiply, shape, a, b, flags=flags)

    def reshape(self, x: Value, *shape: int) -> Value:
        """x with another shape. One size may be -1."""
        example = tuple(torch.empty(x.shape, device="meta").view(shape).shape)
        sizes = [0 if size == -1 else size for size in shape]  # 0 is XNNPACK's -1
        return self._shaped(
            schema.XNNStaticReshape, example, x, num_dims=len(shape), new_shape=sizes
        )

    def transpose(self, x: Value, *axes: int) -> Value:
        """x with its axes in another order."""
        shape = tuple(x.shape[axis] for axis in axes)
        return self._shaped(
            schema.XNNStaticTranspose, shape, x, num_dims=len(axes), perm=list(axes)
        )

    def slice(self, x: Value, begin: int, size: int) -> Value:
        """`size` entries of the last axis from `begin` on."""
        rest = len(x.shape) - 1
        return self._shaped(
            schema.XNNStaticSlice,
            (*x.shape[:-1], size),
            x,
            num_dims=rest + 1,
            offsets=[0] * rest + [begin],
            sizes=[0] * rest + [size],  # 0 is a whole axis
        )

    def concatenate(self, parts: Sequence[Value], axis: int) -> Value:
        """The parts joined along `axis`."""
        parts = list(parts)
        while len(parts) > 1:
            group, parts = parts[:5], parts[5:]
            shape = list(group[0].shape)
            shape[axis] = sum(part.shape[axis] for part in group)
            joined = self._value(shape)
            ids = [part.id for part in group] + [XNN_INVALID_VALUE_ID] * (5 - len(group))
            node = CONCATENATIONS[len(group)](axis, *ids[:4], joined.id, 0, ids[4])
            self._nodes.append(schema.XNode(node, 0))
            parts.insert(0, joined)
        return parts[0]

    def serialize(self, *outputs: Value) -> bytes:
        """The delegate's bytes, with `outputs` as its results."""
        externals = [*self._inputs, *outputs]
        for value, stored in self._values:
            if value in externals:
                tensor = stored.xvalue_union
                if isinstance(tensor, schema.XNNQuantizedTensorValue):
                    tensor = tensor.tensor_value
                tensor.external_id = externals.index(value)
                tensor.flags = (
                    XNN_VALUE_FLAG_EXTERNAL_OUTPUT
                    if value in outputs
                    else XNN_VALUE_FLAG_EXTERNAL_INPUT
                )
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=[stored for _, stored in self._values],
            num_externs=len(externals),
            input_ids=[value.id for value in self._inputs],
            output_ids=[value.id for value in outputs],
            constant_data=[schema.ConstantDataOffset(0, 0)],
        )
        return serialize_xnnpack_binary(graph, bytearray())

    def _external(self, value: Value) -> Value:
        self._inputs.append(value)
        return value

    def _value(self, shape: Sequence[int], quantization=None) -> Value:
        value = Value(len(self._values), tuple(shape))
        types = schema.XNNDatatype
        tensor = schema.XNNTensorValue(
            datatype=types.xnn_datatype_qint8 if quantization else types.xnn_datatype_fp32,
            num_dims=len(shape),
            dims=list(shape),
            constant_buffer_idx=0,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=value.id,
        )
        if quantization:
            tensor = schema.XNNQuantizedTensorValue(tensor, quantization)
        self._values.append((value, schema.XValue(tensor)))
        return value

    def _node(self, kind, shape, *inputs: Value, flags: int = 0, limits=None) -> Value:
        result = self._value(shape)
        node = kind(*(value.id for value in inputs), result.id, flags)
        self._nodes.append(schema.XNode(node, 0, limits))
        return result

    def _shaped(self, kind, shape, x: Value, **parameters) -> Value:
        result = self._value(shape)
        node = kind(**parameters, input_id=x.id, output_id=result.id, flags=0)
        self._nodes.append(schema.XNode(node, 0))
        return result
