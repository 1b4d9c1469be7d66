"""What runs inside XNNPACK: a network's regions between two attentions, each one delegate call.

Every layer is two regions, one before and one after its attention, and the head is a third kind.
Regions of a kind differ only in their weights. One of each kind is traced and partitioned, and the
others are serialized from it with their own weights. That makes the export fast, and so does
leaving nothing outside for the partitioner to cut at.
"""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.operators import node_visitor
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    XNNFullyConnected,
    XNNGraph,
    XNNQuantizedTensorValue,
)
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.xnnpack_preprocess import (
    DEFAULT_DEBUG_HANDLE,
    XnnpackBackend,
    generate_node_to_external_map,
)
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.delegate import executorch_call_delegate
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tokenloop.export.pte.constants_in_files import in_file
from tokenloop.export.pte.quantize import QuantizedLinear, blocks_of
from tokenloop.export.pte.running_regions import RUNNING, DelegatedLength, prepare_running
from tokenloop.export.pte.xnnpack_graph import CONCATENATIONS, delegate
from tokenloop.export.tensors_in_files import empty
from tokenloop.models.layers import RMSNorm
from tokenloop.models.per_layer import HALF

# With this key XnnpackBackend runs one of its 17 graph passes, the only one that our regions need.
COMPILE_SPECS = [CompileSpec("dqlinear_partitioner", b"")]
# The validity check refuses quantized_decomposed operators, and XNNPACK's partitioner does not
# expect operators with dimension orders.
COMPILE_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
MOST_JOINED = max(CONCATENATIONS)


class DelegatedRMSNorm(nn.Module):
    """RMSNorm whose mean is a matrix product: XNNPACK has no mean over the last axis."""

    def __init__(self, norm: RMSNorm, scale: float = 1.0):
        super().__init__()
        size = norm.weight.numel()
        self.register_buffer("average", torch.full((1, size), 1.0 / size))
        self.register_buffer("eps", torch.tensor([norm.eps]))
        weight = norm.offset + norm.weight.detach().float()
        self.register_buffer("weight", weight * (norm.scale * scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.average, self.eps)) * self.weight


class DelegatedValueNorm(nn.Module):
    """DelegatedRMSNorm without weights, of heads of `size` elements."""

    def __init__(self, eps: float, size: int):
        super().__init__()
        self.register_buffer("average", torch.full((1, size), 1.0 / size))
        self.register_buffer("eps", torch.tensor([eps]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.average, self.eps))


class DelegatedScale(nn.Module):
    """x times a number, which XNNPACK takes as a tensor only."""

    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


# The slope of DelegatedGELU's sigmoid, and what x cubed is multiplied by.
GELU = 2.0 * (2.0 / torch.pi) ** 0.5, 2.0 * (2.0 / torch.pi) ** 0.5 * 0.044715


class DelegatedGELU(nn.Module):
    """GELU's tanh approximation as x * sigmoid(2u). The partitioner would silently take aten.gelu
    for the exact one, whatever its `approximate` says."""

    def __init__(self):
        super().__init__()
        for name, value in zip(("slope", "cubic"), GELU):
            self.register_buffer(name, torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * (x * x * self.cubic + self.slope))


def prepare(model: nn.Module) -> None:
    """Replace, in place, the modules that XNNPACK does not take as they are. Queries are scaled
    where they are normalised, or would be, so that attention need not scale them."""
    for layer in model.model.layers:
        if layer.mixer.layer_type in RUNNING:
            prepare_running(layer.mixer)
        else:
            prepare_attention(layer.mixer)
        if (scalar := layer.layer_scalar) is not None:
            # A region's constants are buffers.
            del layer.layer_scalar
            layer.register_buffer("layer_scalar", scalar.detach().float())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, DelegatedRMSNorm(child))
            elif isinstance(child, nn.GELU) and child.approximate == "tanh":
                setattr(module, name, DelegatedGELU())


def prepare_attention(attention: nn.Module) -> None:
    """As `prepare`, of attention."""
    if attention.q_norm is None:
        attention.q_norm = DelegatedScale(attention.scale)
    else:
        attention.q_norm = DelegatedRMSNorm(attention.q_norm, attention.scale)
    if attention.v_norm is not None:
        attention.v_norm = DelegatedValueNorm(attention.v_norm.eps, attention.head_dim)
    if attention.output_gate:
        # packed_weights.separate has made two layers of them.
        attention.gates, attention.q_proj = attention.q_proj.gates, attention.q_proj.queries
        attention.output_gate = False


def tensors_of(layer: nn.Module) -> tuple:
    """Names, shapes and dtypes of a layer's weights: those of layers of one kind are the same."""
    tensors = *layer.named_parameters(), *layer.named_buffers()
    return tuple((name, tuple(x.shape), x.dtype) for name, x in tensors if ".cache." not in name)


class InParts(nn.Module):
    """A linear layer of x [1, B, K] that takes a few rows at a time, one part after the other.

    XNNPACK's int8 kernels multiply at most 5 rows at once, and take more rows in passes over the
    whole weight. With rows cut here, the second pass finds its weight in the processor's cache.
    """

    ROWS_AT_ONCE = 5

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        count = -(-x.shape[1] // self.ROWS_AT_ONCE)
        if count == 1:
            return self.linear(x)
        size = -(-x.shape[1] // count)
        parts = [self.linear(x[:, i : i + size]) for i in range(0, x.shape[1], size)]
        # XNNPACK joins a few tensors at once.
        while len(parts) > 1:
            groups = [parts[i : i + MOST_JOINED] for i in range(0, len(parts), MOST_JOINED)]
            parts = [torch.cat(group, 1) if len(group) > 1 else group[0] for group in groups]
        return parts[0]


def in_parts(layer: nn.Module) -> nn.Module:
    """A layer with the same weights whose linear layers are InParts."""
    tensors = (*layer.parameters(), *layer.buffers())
    layer = copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, QuantizedLinear)):
                setattr(module, name, InParts(child))
    return layer


class BeforeAttention(nn.Module):
    """x [1, T, D], cos and sin [T, 1, head_dim] -> a layer's q [K, T, G head_dim], k and v
    [K, T, head_dim] if it has keys of its own, for K key-value heads with G query heads each; and
    its output gates [1, T, K G head_dim], if it has any."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        mixer, gates = self.layer.mixer, ()
        if hasattr(mixer, "gates"):
            norm = self.layer.norm("mixer")
            gates = (mixer.gates(x if norm is None else norm(x)),)
        return *self._heads(x, cos, sin), *gates

    def _heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        mixer = self.layer.mixer
        q, k, v = self._project(x, {mixer.rotation: (cos, sin)})
        heads, size = mixer.kv_heads, mixer.head_dim
        wide = q.shape[2] // heads * size
        own = (k, v) if mixer.has_keys else ()
        if heads == 1:
            return q.reshape(1, -1, wide), *(x.reshape(1, -1, size) for x in own)
        q, *own = q.reshape(-1, heads, wide), *(x.view(-1, heads, size) for x in own)
        return q.permute(1, 0, 2), *(x.permute(1, 0, 2) for x in own)

    def _project(self, x: Tensor, rope: dict) -> tuple[Tensor, ...]:
        return self.layer.project(x, rope)[0]


class AfterMixer(nn.Module):
    """x [1, T, D], what came of the mixer, and the layer's own input [1, T, P] if it has any ->
    (x after the layer,). A layer with experts gives x before them, what they read [1, T, D], and
    the router's scores of them [1, T, E]. What the experts give is then added to that x, or if
    `adds_later` by AfterExperts, with what lies beside them if there is anything.

    This one takes what `Mixer.combine` takes, a gated delta net's [1, T, H V] both.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mixed: Tensor, gate: Tensor | None, *own: Tensor):
        layer, mlp = self.layer, self.layer.mlp
        if mlp.moe is None:
            return (layer.finish(x, mixed, gate, *own),)
        x = layer.add_mixed(x, mixed, gate)
        norm = layer.norm("mlp")
        normed = x if norm is None else norm(x)
        hidden, scores = mlp.read(normed, x)
        beside = mlp.beside(normed) if mlp.dense is not None else None
        if not adds_later(layer):
            return x if beside is None else x + beside, hidden, scores
        return x, hidden, scores, *(() if beside is None else (beside,))


def adds_later(layer: nn.Module) -> bool:
    """Whether more than a sum follows a layer's experts."""
    ends = layer.norm("mlp_branch"), layer.per_layer, layer.layer_scalar
    return layer.mlp.moe is not None and (
        layer.mlp.reads_residual or any(end is not None for end in ends)
    )


class AfterExperts(nn.Module):
    """What the experts gave [1, T, D], x before them, what is added to what they gave if there is
    anything, and the layer's own input [1, T, P] if it has any -> (x after the layer,)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.adds = layer, layer.mlp.dense is not None

    def forward(self, out: Tensor, x: Tensor, *beside_and_own: Tensor) -> tuple[Tensor]:
        branch = self.layer.mlp.given(out)
        if self.adds:
            beside, *beside_and_own = beside_and_own
            branch = beside + branch
        return (self.layer.add_fed(x, branch, *beside_and_own),)


class PerLayerInputs(nn.Module):
    """models.per_layer.PerLayerInputs of x [1, T, D] and own [1, T, L * P] -> all layers' inputs,
    [1, T, L * P]."""

    def __init__(self, inputs: nn.Module):
        super().__init__()
        self.inputs = inputs
        self.register_buffer("factor", torch.tensor([HALF]))

    def forward(self, x: Tensor, own: Tensor) -> tuple[Tensor]:
        inputs = self.inputs
        shape = 1, -1, inputs.layers, inputs.size
        projected = inputs.projection_norm(inputs.projection(x).view(shape))
        return ((projected.view(1, -1, inputs.width) + own) * self.factor,)


class AfterAttention(AfterMixer):
    """AfterMixer of attended [K, T, G head_dim], and of gates [1, T, K G head_dim] where there are
    any."""

    def forward(self, x: Tensor, attended: Tensor, *gates_and_own: Tensor) -> tuple[Tensor, ...]:
        has_gates = hasattr(self.layer.mixer, "gates")
        gates, own = gates_and_own[:has_gates], gates_and_own[has_gates:]
        attended = self._joined(attended)
        for gate in gates:
            attended = attended * torch.sigmoid(gate)
        return super().forward(x, attended, None, *own)

    def _joined(self, attended: Tensor) -> Tensor:
        """[1, T, K G head_dim]."""
        if attended.shape[0] > 1:
            attended = attended.permute(1, 0, 2).contiguous()
        return attended.view(1, -1, self.layer.mixer.o_proj.in_features)


class AfterShortConv(AfterMixer):
    """AfterMixer of the convolution's taps, each [1, T, D], and of what its result is multiplied
    by."""

    def forward(self, x: Tensor, *taps_gate_and_own: Tensor) -> tuple[Tensor, ...]:
        convolution = self.layer.mixer.conv
        taps, (gate, *own) = (
            taps_gate_and_own[: convolution.width], taps_gate_and_own[convolution.width :],
        )  # fmt: skip
        return super().forward(x, convolution(*taps), gate, *own)


class Head(nn.Module):
    """x [1, N, D] -> logits [N, V] of `linear`, and its input [1, N, D]."""

    def __init__(self, norm: nn.Module, linear: nn.Module):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(x)
        return self.linear(hidden).view(-1, self.linear.out_features), hidden


class PooledHead(nn.Module):
    """x [1, 1, D] -> (`norm` of it, divided by its length,)."""

    def __init__(self, norm: nn.Module, size: int):
        super().__init__()
        # The eps of torch's normalize, which takes it of the length.
        self.norm, self.length = norm, DelegatedLength(size, eps=1e-12**2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.length(self.norm(x)),)


@dataclass(frozen=True)
class RegionKind:
    """One kind of region, traced and partitioned. `program` is the delegate's. `arguments` says
    where each of its arguments comes from: a position among the region's, or the name of a buffer
    of the region. `results` is the order of its results."""

    program: ExportedProgram
    arguments: tuple[int | str, ...]
    results: tuple[int, ...]

    def lower(self, region: nn.Module) -> "LoweredRegion":
        """Serialize this kind with the weights of `region`."""
        program = self.program
        weights = dict(region.named_parameters(remove_duplicate=False))
        weights |= dict(region.named_buffers(remove_duplicate=False))
        with_weights = ExportedProgram(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict={name: weights[name] for name in program.state_dict},
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            constants={name: weights.get(name, old) for name, old in program.constants.items()},
            verifiers=[program.verifier],
        )
        binary, data = serialize(with_weights)
        lowered = delegate(binary, self._shapes(), len(self.results), data)
        constants = {name: weights[name] for name in self.arguments if isinstance(name, str)}
        return LoweredRegion(lowered, self, constants)

    def _shapes(self):
        """The function from tensors like the program's arguments to tensors like its results."""
        values = [node.meta["val"] for node in self.program.graph.find_nodes(op="placeholder")]
        names = [node.name for node in self.program.graph.find_nodes(op="placeholder")]
        users = set(self.program.graph_signature.user_inputs)
        inputs = [value for name, value in zip(names, values) if name in users]
        outputs = [node.meta["val"] for node in self.program.graph.output_node().args[0]]

        def run(*tensors: Tensor) -> list[Tensor]:
            sizes = {
                str(symbol): size
                for value, tensor in zip(inputs, tensors)
                for symbol, size in zip(value.shape, tensor.shape)
            }
            return [tensors[0].new_empty([sizes.get(str(n), n) for n in o.shape]) for o in outputs]

        return run


class DataInFiles(NamedDataStore):
    """Weights as files, from which ExecuTorch copies them into the program's. Otherwise it would
    hold all of them until the program is written."""

    def add_named_data(self, key: str, data: bytes | Tensor, *arguments, **named) -> None:
        if isinstance(data, bytes):
            data = in_file(data)
        super().add_named_data(key, data, *arguments, **named)


def in_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 2)] of codes int8 [N, K], or with sizes of 1, from -8 to 7: each plus 8,
    the first of two in the lower half. It is what ExecuTorch's convert_to_qc4w gives, which takes
    three times the codes' memory."""
    codes = codes if codes.ndim == 2 else codes.squeeze()
    packed = empty((len(codes), -(-codes.shape[1] // 2)), torch.uint8)
    for rows in blocks_of(codes):
        block = codes[rows]
        if block.min() < -8 or block.max() > 7:
            raise RuntimeError("codes of 4 bits are below -8 or above 7")
        halves = F.pad((block + 8).view(torch.uint8), (0, block.shape[1] % 2), value=8)
        packed[rows] = halves[:, 1::2] << 4 | halves[:, ::2]
    return packed


# For the partitioner, which serializes what is traced, too.
node_visitor.NodeVisitor.convert_to_qc4w = staticmethod(in_nibbles)


def serialize(program: ExportedProgram) -> tuple[bytes, NamedDataStoreOutput]:
    """The delegate's bytes for a partitioned program, and its weights.

    This is XnnpackBackend.preprocess without its graph passes, which would run for every region.
    """
    data = DataInFiles()
    external = generate_node_to_external_map(program, program.graph_module)
    graph = XNNGraph(
        version="0",
        xnodes=[],
        xvalues=[],
        num_externs=len(external),
        input_ids=[],
        output_ids=[],
        constant_data=[ConstantDataOffset(0, 0)],
    )
    visitors = node_visitor.get_node_visitors(program, external, data)
    ids: dict[torch.fx.Node, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            visitors[node.target.__name__].define_node(node, graph, ids, DEFAULT_DEBUG_HANDLE)
    weights = data.get_named_data_store_output()
    rename(graph, weights)
    return serialize_xnnpack_binary(graph, bytearray()), weights


def rename(graph: XNNGraph, weights: NamedDataStoreOutput) -> None:
    """Name linear layers' weights by all that is packed with them. ExecuTorch names data by a hash
    of its bytes. By such names XNNPACK's cache would take layers of equal bytes for one, whatever
    their shapes, scales and biases."""
    values = [value.xvalue_union for value in graph.xvalues]
    tensors = [getattr(value, "tensor_value", value) for value in values]
    by_id = {tensor.id_out: (tensor, value) for tensor, value in zip(tensors, values)}
    layers = [node.xnode_union for node in graph.xnodes]
    for layer in layers:
        if not isinstance(layer, XNNFullyConnected):
            continue
        weight, value = by_id[layer.filter_id]
        stored = [weight.constant_buffer_idx]
        if isinstance(value, XNNQuantizedTensorValue):
            stored.append(value.quant_params.scale_buffer_idx)
        if layer.bias_id in by_id:
            stored.append(by_id[layer.bias_id][0].constant_buffer_idx)
        codes, *others = (graph.constant_data[i] for i in stored)
        parts = codes.named_key, *weight.dims, *(other.named_key for other in others)
        entry = weights.pte_data[codes.named_key]
        codes.named_key = sha256(" ".join(map(str, parts)).encode()).hexdigest()
        weights.pte_data[codes.named_key] = entry
    used = {constant.named_key for constant in graph.constant_data}
    weights.pte_data = {name: entry for name, entry in weights.pte_data.items() if name in used}


class LoweredRegion(nn.Module):
    """A region as a delegate call, to be traced into the program around it.

    Constants of elementwise operators are arguments of the delegate. XNNPACK packs the weights of
    linear layers into its cache, where all methods share them. It then lets go of everything else
    that the delegate brought along.
    """

    def __init__(self, lowered, kind: RegionKind, constants: dict[str, Tensor]):
        super().__init__()
        self.lowered = lowered
        self.arguments, self.results = kind.arguments, kind.results
        for name, tensor in constants.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, *args: Tensor) -> list[Tensor]:
        inputs = (
            args[i] if isinstance(i, int) else getattr(self, i.replace(".", "_"))
            for i in self.arguments
        )
        outputs = executorch_call_delegate(self.lowered, *inputs)
        return [outputs[i] for i in self.results]


def trace(
    region: nn.Module, examples: Sequence[Tensor], shapes: Sequence[dict[int, Dim]] | None
) -> RegionKind:
    """Trace and partition one region. `shapes` are the dynamic axes of its arguments, if any.

    Raises RuntimeError when XNNPACK does not take the whole region.
    """
    program = torch.export.export(region, tuple(examples), dynamic_shapes=shapes and tuple(shapes))
    edge = to_edge_transform_and_lower(
        {"forward": program}, partitioner=[RegionPartitioner()], compile_config=COMPILE_CONFIG,
    ).exported_program()  # fmt: skip
    calls = [n for n in edge.graph.nodes if n.op == "call_function"]
    delegates = [n for n in calls if n.target is executorch_call_delegate]
    left = [n for n in calls if n not in delegates and n.target is not operator.getitem]
    if len(delegates) != 1 or left:
        raise RuntimeError(
            f"{type(region).__name__} became {len(delegates)} XNNPACK delegates and left "
            f"{sorted({str(n.target) for n in left})} outside: change the region"
        )
    (call,) = delegates
    signature = edge.graph_signature
    origin: dict[str, int | str] = {name: i for i, name in enumerate(signature.user_inputs)}
    origin |= signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    lowered = getattr(edge.graph_module, call.args[0].target)
    return RegionKind(
        lowered.original_module,
        tuple(origin[node.name] for node in call.args[1:]),
        tuple(node.args[1] for node in edge.graph.output_node().args[0]),
    )


class DynamicSliceConfig(SliceCopyConfig):
    """Slices along a static axis are fine though another axis is dynamic: see DynamicSlice."""

    def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
        if not self.check_common_constraints(node, ep):
            return False
        dim = node.args[1]
        sizes = node.args[0].meta["val"].shape[dim], node.meta["val"].shape[dim]
        return len(node.args) <= 4 and all(isinstance(size, int) for size in sizes)


# Importing the partitioner has registered ExecuTorch's visitors.
_SliceCopyVisitor = node_visitor._node_visitor_dict["aten.slice_copy.Tensor"]


@node_visitor.register_node_visitor
class DynamicSlice(_SliceCopyVisitor):
    """A slice that leaves the other axes whole, whatever their size. A size of 0 means the whole
    axis to xnn_define_static_slice."""

    def define_node(self, node, xnn_graph, vals_to_ids, debug_handle) -> None:
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        sliced = xnn_graph.xnodes[-1].xnode_union
        dim = node.args[1] % sliced.num_dims
        sliced.sizes = [size if i == dim else 0 for i, size in enumerate(sliced.sizes)]


class RegionPartitioner(XnnpackPartitioner):
    """Leaves constants other than linear layers' weights outside: see LoweredRegion."""

    def __init__(self):
        configs = [c for c in ALL_PARTITIONER_CONFIGS if c is not SliceCopyConfig]
        super().__init__(configs=[*configs, DynamicSliceConfig])
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, COMPILE_SPECS)

    def ops_to_not_decompose(self, program: ExportedProgram):
        """The operators without the filter, for which the region would be traced twice more."""
        operators, _ = super().ops_to_not_decompose(program)
        return operators, None
