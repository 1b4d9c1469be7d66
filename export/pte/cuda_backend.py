"""The ExecuTorch program for CUDA: one CudaBackend delegate a method, and everything on the GPU.

Inputs and outputs are CUDA memory, so that nothing is copied to the host between the methods.
CudaBackend has weights and state once for all methods, by their names. They lie in a .ptd file.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
from executorch.exir import (
    EdgeCompileConfig,
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
from tokenloop.export.methods import Decode, Prefill, integers, prompt_chunk
from tokenloop.sampler.greedy import greedy


class Greedy(nn.Module):
    """logits float32 [B, V] -> token int64 [B, 1]: sampler.greedy."""

    def forward(self, logits: Tensor) -> Tensor:
        return greedy(logits)


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


def trace(model: nn.Module) -> dict[str, ExportedProgram]:
    """The methods of a model on the CPU whose weights are loaded."""
    batch, vocab_size = model.batch, model.config.vocab_size
    chunk, shapes = prompt_chunk(batch, model.max_chunk)
    step = integers(batch, 1), integers(batch)
    # Conditions of attention's strides on T, which torch 2.11 cannot decide, are checked later.
    later = {"prefer_deferred_runtime_asserts_over_guards": True}
    methods = {
        "prefill": torch.export.export(Prefill(model), chunk, dynamic_shapes=shapes, **later),
        "decode": torch.export.export(Decode(model), step),
    }
    # There is no `sample`. Inductor of torch 2.11 gives no valid code for Philox's products of an
    # index, nor for sums along a large vocabulary. The sampler's own kernels are no ATen operators.
    for rows, suffix in {batch: "", 1: "_row" if batch > 1 else ""}.items():
        logits = torch.zeros(rows, vocab_size)
        methods["greedy" + suffix] = torch.export.export(Greedy(), (logits,))
    return methods


def build_program(
    model: nn.Module, constants: dict[str, int | bool | list[int]],
    progress: Callable[[str], None],
) -> tuple[ExecutorchProgramManager, list[str]]:  # fmt: skip
    """The multi-method program of a model on the CPU whose weights are loaded, and its methods'
    names. `constants` become metadata methods. `progress` is called with what begins."""
    progress("tracing the methods")
    methods = trace(model)
    # ExecuTorch's own attention kernel is for bfloat16 alone.
    kernels = b"OFF" if model.lm_head.weight.dtype == torch.float32 else b"ON"
    partitioners = {
        name: [
            CudaPartitioner(
                [
                    CudaBackend.generate_method_name_compile_spec(name),
                    CompileSpec("triton_kernel_mode", kernels),
                ]
            )
        ]
        for name in methods
    }
    progress("compiling the methods")
    edge = to_edge_transform_and_lower(
        methods,
        transform_passes={name: [OwnConstants(name)] for name in methods},
        partitioner=partitioners,
        constant_methods=constants,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
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
    return program, sorted(methods)


def write_program(program: ExecutorchProgramManager, path: Path) -> Path:
    """Write the program to `path`, a .pte, and its weights to the .ptd beside it that is
    returned."""
    with path.open("wb") as file:
        program.write_to_file(SmallWrites(file))
    program.write_tensor_data_to_file(str(path.parent))
    (data,) = path.parent.glob("*.ptd")
    return data.rename(path.with_suffix(".ptd"))
