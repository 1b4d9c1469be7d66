"""An ExecuTorch program on a CUDA GPU, over torch tensors.

It needs ExecuTorch's library with CudaBackend, which PyPI's wheel does not have. All of this file
that is not CUDA's is tested on the CPU, with programs for ExecuTorch's plain kernels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenloop.runner.engines import executorch_runtime as runtime
from tokenloop.runner.engines.executorch import (
    WITH_THIS_VERSION,
    check_backend,
    explained,
    native_stderr,
    open_program,
)
from tokenloop.runner.engines.executorch_abi import load_cuda
from tokenloop.runner.engines.executorch_runtime import CPU, CUDA, Arrays, Device
from tokenloop.runner.engines.tensors import find_device
from tokenloop.runner.engines.torch_memory import Aligned, TorchMemory
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.program import GREEDY, Choice, Program, Selected
from tokenloop.runner.transfers import Transfers

# ScalarType's numbers of what NumPy has no type for.
BFLOAT16 = 15
EMBEDDED = {"embed", "decode_embedded", "greedy_embed"}


class TensorArrays(Arrays):
    """torch tensors on one device as what methods take and give."""

    def __init__(self, device: torch.device):
        self.torch_device = device
        self.device = Device(CUDA, device.index or 0) if device.type == "cuda" else Device(CPU)

    def memory(self, size: int, device: Device) -> "TensorArena":
        if device.type not in (CPU, self.device.type):
            raise RunnerError(
                f"the program has memory on a device of type {device.type}, and runs on "
                f"{self.torch_device}"
            )
        where = self.torch_device if device.type == self.device.type else torch.device("cpu")
        return TensorArena(torch.zeros(size, dtype=torch.uint8, device=where))

    def dtype_of(self, array: Any) -> Any:
        return NUMBERED.get(array.dtype) if isinstance(array, Tensor) else None

    def address_of(self, array: Tensor, name: str) -> int:
        if array.device.type != self.torch_device.type or not array.is_contiguous():
            raise ValueError(
                f"{name} lies on {array.device} with strides {array.stride()}; a contiguous one "
                f"on {self.torch_device} is right"
            )
        return array.data_ptr()


# The types as TensorMeta has them.
NUMBERED = {
    getattr(torch, dtype.name): dtype
    for dtype in runtime.DTYPES.values()
    if dtype.name in ("int64", "int32", "float32", "bool", "uint8")
} | {torch.bfloat16: BFLOAT16}
TORCH_DTYPES = {runtime.NUMBERS.get(dtype, dtype): each for each, dtype in NUMBERED.items()}


class TensorArena:
    """Memory of a program as a torch tensor of bytes."""

    def __init__(self, bytes: Tensor):
        self.bytes, self.address, self.size = bytes, bytes.data_ptr(), bytes.numel()

    def view(self, start: int, number: int, shape: tuple[int, ...], name: str) -> Tensor:
        """As executorch_runtime.Memory.view."""
        if number not in TORCH_DTYPES:
            raise TypeError(f"{name} is of scalar type {number}, which no method gives")
        dtype = TORCH_DTYPES[number]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self.bytes[start : start + size].view(dtype).view(shape)


class ExecuTorchCudaProgram(Program):
    """The methods of a .pte and its .ptd, on torch tensors of the artifact's device.

    What a method gives is copied to memory of this program's own, for the method has planned it
    where the next one works. The copy also puts the methods into an order: each has a stream of its
    own, and only work in the default stream between two of them does that.
    """

    is_asynchronous = True

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load the methods of a greedy loop. `threads` means nothing to a GPU.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks, a
        machine without a GPU, and a method whose inputs or outputs are not what the manifest says.
        """
        self._artifact, self.manifest = artifact, artifact.manifest
        manifest = self.manifest
        with native_stderr():
            load_cuda()
            backend = check_backend(artifact, runtime.registered_backends())
            device = find_device(artifact)
            self._program = open_program(artifact, TensorArrays(device))
            if backend == "CudaBackend":
                # Programs before executorch 1.5.1 would have a cache for each method otherwise.
                runtime.set_backend_option(backend, "weight_sharing_across_methods", True)
        self.is_asynchronous = device.type == "cuda"
        stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._memory = TorchMemory(device, stream)
        self.transfers = Transfers(self._memory)
        self._aligned = Aligned(self.transfers, device.type == "cuda")
        names = set(self._program.method_names())
        self.embeds = names >= EMBEDDED
        self.fuses = "decode_greedy" in names
        self._methods: dict[str, runtime.Method] = {}
        several = manifest["batch"] > 1
        self._load("prefill", "decode", "greedy", *["greedy_row"] * several)
        self._load(*["decode_greedy"] * self.fuses)
        self._outputs: dict[tuple, Tensor] = {}

    def load_sampling(self, method: str, embed: bool) -> None:
        self._load(*self._artifact.sampling_methods(self.manifest["methods"], method, embed))

    def load_change(self, method: str) -> None:
        self._load(f"{method}_row")

    def begin(self, embed: bool, graph: bool = True, overlap: bool = True) -> None:
        super().begin(embed, graph, overlap)
        if embed:
            self._load(*sorted(EMBEDDED))

    def prefill(self, tokens: Tensor, positions: Tensor, *row: Tensor) -> Tensor:
        return self._call("prefill", (tokens, positions, *row))[0]

    def decode(self, fed: Tensor, positions: Tensor) -> Tensor:
        name = "decode_embedded" if self.embedding else "decode"
        return self._call(name, (fed, positions))[0]

    def step(self, fed: Tensor, step: Any, buffer: int) -> Selected:
        if self.embedding or not self.fuses or step.choice.method != GREEDY.method:
            return super().step(fed, step, buffer)
        (token,) = self._call("decode_greedy", (fed, step.positions), buffer, "token")
        return Selected(token, token)

    def select(self, logits: Tensor, buffer: int, choice: Choice = GREEDY) -> Selected:
        self._change(logits, choice)
        name = choice.method + "_embed" * self.embedding
        outputs = self._call(name, (logits, *choice.inputs), buffer, "token")
        return Selected(outputs[0], outputs[-1])

    def select_row(self, logits: Tensor, choice: Choice) -> Tensor:
        self._change(logits, choice)
        return self._call(f"{choice.method}_row", (logits, *choice.inputs))[0]

    def _change(self, logits: Tensor, choice: Choice) -> None:
        """Change the logits in place. Rows without a change are not touched."""
        for method, rows in choice.changes:
            for row, inputs in rows.items():
                place = logits[row : row + 1]
                (changed,) = self._call(f"{method}_row", (place, *inputs))
                self.transfers.copy(changed, place)

    def feed(self, token: Tensor, buffer: int) -> Tensor:
        return self._call("embed", (token,), buffer)[0] if self.embedding else token

    def next_id(self, buffer: int) -> Tensor:
        key = "token", buffer, 0
        if key not in self._outputs:
            # Rows that nothing was chosen for are fed as well.
            self._outputs[key] = self.empty(self.manifest["batch"], 1).zero_()
        return self._outputs[key]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._memory.device)

    def _load(self, *names: str) -> None:
        fault = f"{self._artifact.program_file}: a method cannot be loaded"
        with explained(fault, WITH_THIS_VERSION):
            for name in names:
                if name not in self._methods:
                    self._methods[name] = self._program.load_method(name)

    def _call(
        self, name: str, inputs: Sequence[Tensor], buffer: int = 0, kind: str | None = None
    ) -> list[Tensor]:
        """Copies of what the method gives, in memory of this `kind` of output and this number; by
        default no two methods have the same."""
        self._load(name)
        copies = []
        for place, output in enumerate(self._methods[name].call(self._aligned(*inputs))):
            key = kind or name, buffer, place
            if key not in self._outputs:
                self._outputs[key] = torch.empty_like(output)
            self.transfers.copy(output, self._outputs[key])
            copies.append(self._outputs[key])
        return copies
