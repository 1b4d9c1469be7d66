"""The ExecuTorch program for CUDA: one CudaBackend delegate a method, and everything on the GPU.

Inputs and outputs are CUDA memory, so that nothing is copied to the host between the methods.
CudaBackend has weights and state once for all methods, by their names. They lie in a .ptd file.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.propagate_device_config import PropagateDeviceConfig
from torch import Tensor, nn
from torch.export import ExportedProgram

from tokenloop.export.artifact import SmallWrites
from tokenloop.export.errors import ExportError
from tokenloop.export.methods import Decode, DecodeEmbedded, Prefill, integers, prompt_chunk
from tokenloop.export.pte.cuda_inductor import one_form, replaced
from tokenloop.export.pte.cuda_library import decode, missing_shims
from tokenloop.export.pte.side_by_side import SideBySide
from tokenloop.models.decoder import Backbone
from tokenloop.sampler.kernels import operator

# What a process takes of a GPU beside its tensors: CUDA's context, kernels and workspaces.
CONTEXT = 1 << 30


class DecodeGreedy(Prefill):
    """token int64 [B, 1], position int64 [B] -> the next token int64 [B, 1]: a step in one call."""

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        return operator.greedy(self.network.decode(token, position))


class Choose(nn.Module):
    """logits float32 [B, V], and for sampling temperature float32 [B], top_k int64 [B], top_p
    float32 [B], seed and position int64 [B] -> token int64 [B, 1]."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, *sampling: Tensor) -> Tensor:
        return self.function(logits, *sampling)


class Lookup(nn.Module):
    """token int64 [B, 1] -> hidden [B, 1, D], which decode_embedded takes. The module holds only
    the network's table of embeddings, by the name that it has in the network's methods: CudaBackend
    takes tensors of one name for one tensor."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.network = nn.Module()
        self.network.model = nn.Module()
        self.network.model.embed_tokens = backbone.embed_tokens
        self.embed = backbone.embed

    def forward(self, token: Tensor) -> Tensor:
        return self.embed(token)


class ChooseEmbed(Lookup):
    """What Choose takes -> token int64 [B, 1], and its embedding [B, 1, D]."""

    def __init__(self, backbone: Backbone, function: Callable[..., Tensor]):
        super().__init__(backbone)
        self.function = function

    def forward(self, logits: Tensor, *sampling: Tensor) -> tuple[Tensor, Tensor]:
        token = self.function(logits, *sampling)
        return token, self.embed(token)


class OwnConstants(ExportedProgramPassBase):
    """Names the tensors that ExecuTorch makes of numbers after the method. ExecuTorch counts them
    anew in each method, and CudaBackend takes two methods' tensors of one name for one tensor."""

    PREFIX = "_lifted_tensor_constant"

    def __init__(self, method: str):
        self.method = method

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        state = exported_program.state_dict
        for spec in exported_program.graph_signature.input_specs:
            if spec.target is not None and spec.target.startswith(self.PREFIX):
                value = state.pop(spec.target)
                spec.target = self.method + spec.target
                state[spec.target] = value
        return ExportedProgramPassResult(exported_program, True)


def modules(model: nn.Module) -> dict[str, tuple]:
    """What each method of a model is traced from: a module, its example inputs, and export's
    options."""
    batch, vocab_size = model.batch, model.config.vocab_size
    chunk, shapes = prompt_chunk(batch, model.max_chunk)
    step = integers(batch, 1), integers(batch)
    # Conditions of attention's strides on T, which torch 2.11 cannot decide, are checked later.
    later = {"prefer_deferred_runtime_asserts_over_guards": True, "dynamic_shapes": shapes}
    hidden = torch.zeros(batch, 1, model.config.hidden_size, dtype=model.lm_head.weight.dtype)
    methods = {
        "prefill": (Prefill(model), chunk, later),
        "decode": (Decode(model), step, {}),
        "decode_embedded": (DecodeEmbedded(model), (hidden, step[1]), {}),
        "decode_greedy": (DecodeGreedy(model), step, {}),
        "embed": (Lookup(model.model), step[:1], {}),
    }
    for rows, suffix in {batch: "", 1: "_row" if batch > 1 else ""}.items():
        numbers, counts = torch.ones(rows), integers(rows)
        logits = torch.zeros(rows, vocab_size)
        sampling = numbers, counts, numbers.clone(), counts.clone(), counts.clone()
        for name, function in operator.SELECTION.items():
            example = (logits, *(() if name == "greedy" else sampling))
            methods[name + suffix] = Choose(function), example, {}
            if not suffix:
                methods[f"{name}_embed"] = ChooseEmbed(model.model, function), example, {}
    return methods


def lower(
    model: nn.Module, names: Iterable[str], constants: dict[str, int | bool | list[int]] | None,
    progress: Callable[[str], None] = lambda what: None,
) -> EdgeProgramManager:  # fmt: skip
    """Methods of a model on the CPU whose weights are loaded, traced and compiled."""
    progress("tracing the methods")
    every = modules(model)
    methods = {}
    for name in names:
        module, example, options = every[name]
        methods[name] = torch.export.export(module, example, **options)
    # ExecuTorch's own attention kernel is for bfloat16 alone.
    kernels = b"OFF" if model.lm_head.weight.dtype == torch.float32 else b"ON"
    partitioners = {
        name: [
            CudaPartitioner(
                [
                    CudaBackend.generate_method_name_compile_spec(name),
                    CompileSpec("triton_kernel_mode", kernels),
                    CompileSpec("max_autotune", b"OFF"),
                ]
            )
        ]
        for name in methods
    }
    progress("compiling the methods")
    with refused(), one_form():
        return to_edge_transform_and_lower(
            methods,
            transform_passes={name: [OwnConstants(name)] for name in methods},
            partitioner=partitioners,
            constant_methods=constants,
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )


def build_program(
    model: nn.Module, constants: dict[str, int | bool | list[int]],
    progress: Callable[[str], None], directory: Path,
) -> tuple[ExecutorchProgramManager, list[str]]:  # fmt: skip
    """The multi-method program of a model on the CPU whose weights are loaded, and its methods'
    names. `constants` become metadata methods. `progress` is called with what begins. `directory`
    is for files that writing the program needs."""
    names = list(modules(model))
    with ExitStack() as stack:
        if fits_beside(model, len(lists := groups(names))):
            progress("starting processes")
            beside = stack.enter_context(SideBySide(lower_for_one, model, lists, directory))
            compiled = beside.preprocess_multimethod
            stack.enter_context(replaced(CudaBackend, "preprocess_multimethod", compiled))
        edge = lower(model, names, constants, progress)
    progress("planning memory")
    program = edge.to_executorch(
        ExecutorchBackendConfig(
            # Inputs and outputs stay on the GPU, where the caller and the delegates have them.
            propagate_device_config=PropagateDeviceConfig(
                skip_h2d_for_method_inputs=True, skip_d2h_for_method_outputs=True
            ),
            # Outputs are planned, because Python gives host memory to those that are not.
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        )
    )
    check_shims(program)
    return program, sorted(names)


def groups(names: list[str]) -> list[list[str]]:
    """The methods for each process: one that has the whole network, or all others."""
    whole = [name for name in names if name.startswith(("prefill", "decode"))]
    return [*([name] for name in whole), [name for name in names if name not in whole]]


def fits_beside(model: nn.Module, processes: int) -> bool:
    """Whether the GPU has room for all processes. Each has the weights and the state there, another
    copy of the state and one of its largest tensors to try kernels with, and a context."""
    tensors = [*model.parameters(), *model.buffers()]
    free, _ = torch.cuda.mem_get_info()
    return processes * (2 * sum(each.nbytes for each in tensors) + CONTEXT) < free


def lower_for_one(model: nn.Module, names: list[str]) -> None:
    lower(model, names, None)


@contextmanager
def refused() -> Iterator[None]:
    """Make an ExportError of CudaBackend's error for operators that it has no kernels for, which
    names a method and then an operator a line."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"Method (\w+) missing fallback kernels.*?((?:\n  - .*)+)", str(error))
        if found is None:
            raise
        operators = ", ".join(found[2].split("\n  - ")[1:])
        raise lacking(found[1], operators) from error


def lacking(method: str, what: str) -> ExportError:
    return ExportError(
        f"the method {method} needs {what}, which ExecuTorch's runtime for CUDA does not have: "
        "export with --backend launches"
    )


def check_shims(program: ExecutorchProgramManager) -> None:
    """Errors: ExportError for a compiled method that asks the runtime for what it does not have."""
    named, file = program._named_data, program.executorch_program
    for plan in file.execution_plan:
        for delegate in plan.delegates:
            key, _ = decode(bytes(file.backend_delegate_data[delegate.processed.index].data))
            library = bytes(named.buffers[named.pte_data[key].buffer_index])
            if missing := missing_shims(library):
                raise lacking(plan.name, ", ".join(missing))


def write_program(program: ExecutorchProgramManager, path: Path) -> Path:
    """Write the program to `path`, a .pte, and its weights to the .ptd beside it that is
    returned."""
    with path.open("wb") as file:
        program.write_to_file(SmallWrites(file))
    program.write_tensor_data_to_file(str(path.parent))
    (data,) = path.parent.glob("*.ptd")
    return data.rename(path.with_suffix(".ptd"))
