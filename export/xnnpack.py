"""What runs inside XNNPACK: a network's regions between two attentions, each one delegate call.

A network of L layers is L + 1 regions: embedding scale to the first queries, keys and values; from
each attention's result to the next layer's queries; and from the last attention to the logits.
The regions between are equal but for their weights, so one of each kind is traced and partitioned
and the others are serialized from it with their own weights. That, and nothing left outside for
the partitioner to cut at, is what makes the export fast.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.operators import node_visitor
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    XNNGraph,
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
from executorch.exir import lowered_backend_module as exir_lowered
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.delegate import executorch_call_delegate
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from models.gemma3 import RMSNorm

# With this key XnnpackBackend runs one of its 17 graph passes, the only one that our regions need.
COMPILE_SPECS = [CompileSpec("dqlinear_partitioner", b"")]
# The validity check refuses quantized_decomposed operators, and XNNPACK's partitioner does not
# expect operators with dimension orders.
COMPILE_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


class DelegatedRMSNorm(nn.Module):
    """RMSNorm whose mean is a matrix product: XNNPACK has no mean over the last axis."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        size = norm.weight.numel()
        self.register_buffer("average", torch.full((1, size), 1.0 / size))
        self.register_buffer("eps", torch.tensor([norm.eps]))
        self.register_buffer("weight", 1.0 + norm.weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.average) + self.eps) * self.weight


class DelegatedGELU(nn.Module):
    """GELU's tanh approximation as x * sigmoid(2u): the partitioner would silently take
    aten.gelu for the exact one, whatever its `approximate` says."""

    def __init__(self):
        super().__init__()
        slope = 2.0 * (2.0 / torch.pi) ** 0.5
        self.register_buffer("slope", torch.tensor([slope]))
        self.register_buffer("cubic", torch.tensor([slope * 0.044715]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * (x * x * self.cubic + self.slope))


def prepare(model: nn.Module) -> None:
    """Replace, in place, the modules that XNNPACK does not take as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, DelegatedRMSNorm(child))
            elif isinstance(child, nn.GELU) and child.approximate == "tanh":
                setattr(module, name, DelegatedGELU())


class FirstRegion(nn.Module):
    """embedding [1, T, D], cos and sin [T, 1, head_dim] -> x, q, k, v."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.register_buffer("scale", torch.tensor([backbone.embed_scale]))
        self.after = backbone.layers[0]

    def forward(self, embedding: Tensor, cos: Tensor, sin: Tensor):
        x = embedding * self.scale
        return x, *self.after.project(x, {self.after.self_attn.kind: (cos, sin)})


class MiddleRegion(nn.Module):
    """x [1, T, D], attended [1, T, H, head_dim], cos, sin -> x, q, k, v of the next layer."""

    def __init__(self, before: nn.Module, after: nn.Module):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor, attended: Tensor, cos: Tensor, sin: Tensor):
        x = self.before.finish(x, attended)
        return x, *self.after.project(x, {self.after.self_attn.kind: (cos, sin)})


class LastRegion(nn.Module):
    """x [1, 1, D], attended [1, 1, H, head_dim] -> (logits [1, V],): one position's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.before, self.norm = model.model.layers[-1], model.model.norm
        self.lm_head = model.lm_head

    def forward(self, x: Tensor, attended: Tensor):
        return (self.lm_head(self.norm(self.before.finish(x, attended))).view(1, -1),)


class LoweredBackendModule(exir_lowered.LoweredBackendModule):
    """A lowered region that costs nothing to trace: its outputs' shapes are known, so no pass of
    the outer program has to run the region's graph again. (ExecuTorch goes by the class's name.)
    """

    def __deepcopy__(self, memo) -> "LoweredBackendModule":
        return self


@dataclass(frozen=True)
class ShapesOf:
    """Stands where ExecuTorch looks for a lowered module's original program."""

    program: ExportedProgram

    @property
    def graph(self) -> torch.fx.Graph:
        return self.program.graph

    def module(self):
        outputs = [node.meta["val"] for node in self.graph.output_node().args[0]]

        def run(*inputs: Tensor) -> list[Tensor]:
            # The one dynamic size is T, the second axis of x, which is one of the inputs.
            length = next(x.shape[1] for x in inputs if x.dim() > 2 and x.shape[0] == 1)
            return [
                inputs[0].new_empty([s if isinstance(s, int) else length for s in out.shape])
                for out in outputs
            ]

        return run


@dataclass(frozen=True)
class RegionKind:
    """One kind of region, traced and partitioned: the delegate's program, and how the region's
    arguments and results are ordered for it."""

    program: ExportedProgram
    arguments: tuple[int, ...]
    results: tuple[int, ...]

    def lower(self, region: nn.Module) -> "LoweredRegion":
        """Serialize this kind with the weights of `region`."""
        program = self.program
        weights = dict(region.named_parameters(remove_duplicate=False))
        weights |= dict(region.named_buffers(remove_duplicate=False))
        state = {name: weights[name] for name in program.state_dict}
        constants = {name: weights.get(name, old) for name, old in program.constants.items()}
        with_weights = ExportedProgram(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=state,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            constants=constants,
            verifiers=[program.verifier],
        )
        data = NamedDataStore()
        lowered = LoweredBackendModule(
            ShapesOf(program),
            XnnpackBackend.__name__,
            serialize(with_weights, data),
            [],
            data.get_named_data_store_output(),
        )
        lowered.meta = {"debug_handle_map": {}}
        return LoweredRegion(lowered, self)


def serialize(program: ExportedProgram, data: NamedDataStore) -> bytes:
    """The delegate's bytes for a partitioned program; its weights go to `data`.

    XnnpackBackend.preprocess without its graph passes, which would run again for every region.
    """
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
    return serialize_xnnpack_binary(graph, bytearray())


class LoweredRegion(nn.Module):
    """A region as a delegate call, to be traced into the program around it."""

    def __init__(self, lowered: LoweredBackendModule, kind: RegionKind):
        super().__init__()
        self.lowered = lowered
        self.arguments, self.results = kind.arguments, kind.results

    def forward(self, *args: Tensor) -> list[Tensor]:
        outputs = executorch_call_delegate(self.lowered, *(args[i] for i in self.arguments))
        return [outputs[i] for i in self.results]


def trace(region: nn.Module, examples: Sequence[Tensor], length: Dim | None) -> RegionKind:
    """Trace and partition one region; `length` is the dynamic T of its arguments, if any.

    Raises RuntimeError when XNNPACK does not take the whole region.
    """
    shapes = None
    if length is not None:
        # cos and sin are [T, 1, head_dim]; everything else has T on its second axis.
        shapes = tuple({1: length} if x.shape[0] == 1 else {0: length} for x in examples)
    program = torch.export.export(region, tuple(examples), dynamic_shapes=shapes)
    edge = to_edge_transform_and_lower(
        {"forward": program},
        partitioner=[RegionPartitioner()],
        compile_config=COMPILE_CONFIG,
    ).exported_program()
    calls = [n for n in edge.graph.nodes if n.op == "call_function"]
    delegates = [n for n in calls if n.target is executorch_call_delegate]
    left = [n for n in calls if n not in delegates and n.target is not operator.getitem]
    if len(delegates) != 1 or left:
        raise RuntimeError(
            f"{type(region).__name__} became {len(delegates)} XNNPACK delegates and left "
            f"{sorted({str(n.target) for n in left})} outside: change the region"
        )
    (call,) = delegates
    inputs = list(edge.graph_signature.user_inputs)
    lowered = getattr(edge.graph_module, call.args[0].target)
    return RegionKind(
        lowered.original_module,
        tuple(inputs.index(node.name) for node in call.args[1:]),
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
    """A slice that leaves the other axes whole, whatever their size: for xnn_define_static_slice
    the size 0 means "to the end"."""

    def define_node(self, node, xnn_graph, vals_to_ids, debug_handle) -> None:
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        sliced = xnn_graph.xnodes[-1].xnode_union
        dim = node.args[1] % sliced.num_dims
        sliced.sizes = [size if i == dim else 0 for i, size in enumerate(sliced.sizes)]


class RegionPartitioner(XnnpackPartitioner):
    """Takes constants other than weights into the delegate as well."""

    def __init__(self):
        configs = [c for c in ALL_PARTITIONER_CONFIGS if c is not SliceCopyConfig]
        super().__init__(configs=[*configs, DynamicSliceConfig])
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, COMPILE_SPECS)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        result = super().partition(exported_program)
        tag_constant_data(exported_program)
        return result
