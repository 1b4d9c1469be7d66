"""An ExecuTorch program on a CUDA GPU, through torch and ExecuTorch's own Python extension.

It needs an ExecuTorch with CudaBackend, which PyPI's wheel does not have. The project has exported
programs for CudaBackend, and has never run one. All of this file that is not CUDA's is tested on
the CPU, with programs for ExecuTorch's plain kernels.
"""

import numpy as np
import torch
from executorch.extension.pybindings import _C
from torch import Tensor

from tokenloop.runner.engines.executorch import (
    WITH_THIS_VERSION,
    check_backend,
    explained,
    native_stderr,
    open_program,
)
from tokenloop.runner.engines.executorch_runtime import set_backend_option
from tokenloop.runner.engines.torch_memory import Aligned, TorchMemory
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.program import GREEDY, Choice, Program, Selected
from tokenloop.runner.transfers import Transfers


class ExecuTorchCudaProgram(Program):
    """The methods of a .pte and its .ptd, on torch tensors of the artifact's device.

    What a method gives is copied to memory of this program's own, for the method has planned it
    where the next one works. The copy also puts the methods into an order: each has a stream of its
    own, and only work in the default stream between two of them does that.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load the methods of a greedy loop. `threads` means nothing to a GPU.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks, a
        machine without a GPU, and a method whose inputs or outputs are not what the manifest says.
        """
        self._artifact, self.manifest = artifact, artifact.manifest
        manifest = self.manifest
        with native_stderr():
            backend = check_backend(artifact, _C._get_registered_backend_names())
            open_program(artifact)
        device = torch.device(manifest["device"])
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RunnerError(
                f"{artifact.directory} is for a CUDA GPU, and torch sees none here: export with "
                "another --backend"
            )
        if backend == "CudaBackend":
            # Otherwise each method would have a cache of its own.
            set_backend_option(backend, "weight_sharing_across_methods", True)
        stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._memory = TorchMemory(device, stream)
        self.transfers = Transfers(self._memory)
        self._aligned = Aligned(self.transfers, device.type == "cuda")
        path = artifact.checked("program")
        weights = artifact.checked("weights") if "weights" in manifest else None
        with explained(f"{path} is not a program that ExecuTorch can load", "export it again"):
            data = None if weights is None else str(weights)
            self._program = _C._load_program(str(path), data_path=data)
        batch, vocab_size = manifest["batch"], manifest["vocab_size"]
        self._methods = {}
        self._load("prefill", "decode", "greedy", *["greedy_row"] * (batch > 1))
        self._next_ids = [self.empty(batch, 1) for _ in range(2)]
        self._row_id = self.empty(1, 1)
        self._logits = {
            rows: self._memory.new(np.zeros((rows, vocab_size), np.float32)) for rows in (1, batch)
        }

    def load_sampling(self, method: str, embed: bool) -> None:
        self._load(*self._artifact.sampling_methods(self.manifest["methods"], method, embed))

    def load_change(self, method: str) -> None:
        self._load(f"{method}_row")

    def prefill(self, tokens: Tensor, positions: Tensor, *row: Tensor) -> Tensor:
        return self._call("prefill", (tokens, positions, *row), self._logits[1])

    def decode(self, fed: Tensor, positions: Tensor) -> Tensor:
        return self._call("decode", (fed, positions), self._logits[len(fed)])

    def select(self, logits: Tensor, buffer: int, choice: Choice = GREEDY) -> Selected:
        self._change(logits, choice)
        token = self._call(choice.method, (logits, *choice.inputs), self._next_ids[buffer])
        return Selected(token, token)

    def select_row(self, logits: Tensor, choice: Choice) -> Tensor:
        self._change(logits, choice)
        return self._call(f"{choice.method}_row", (logits, *choice.inputs), self._row_id)

    def _change(self, logits: Tensor, choice: Choice) -> None:
        """Change the logits in place. Rows without a change are not touched."""
        for method, rows in choice.changes:
            for row, inputs in rows.items():
                place = logits[row : row + 1]
                self._call(f"{method}_row", (place, *inputs), place)

    def next_id(self, buffer: int) -> Tensor:
        return self._next_ids[buffer]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._memory.device)

    def _load(self, *names: str) -> None:
        fault = f"{self._artifact.program_file}: a method cannot be loaded"
        with explained(fault, WITH_THIS_VERSION):
            for name in names:
                if name not in self._methods:
                    self._methods[name] = self._program.load_method(name)

    def _call(self, name: str, inputs: tuple[Tensor, ...], into: Tensor) -> Tensor:
        # False: the output is a view of the method's memory.
        (output,) = self._methods[name].call(self._aligned(*inputs), False)
        self.transfers.copy(output, into)
        return into
