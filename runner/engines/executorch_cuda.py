"""An ExecuTorch program on a CUDA GPU, through torch and ExecuTorch's own Python extension.

It needs an ExecuTorch with CudaBackend, which PyPI's wheel does not have. What of this file is not
CUDA's is tested on the CPU, with programs for ExecuTorch's plain kernels; with CudaBackend the
project has exported programs, but not run this file.
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
from tokenloop.runner.transfers import Transfers


class ExecuTorchCudaProgram:
    """The loaded methods of a .pte and its .ptd, on the artifact's device.

    What a method gives is copied to memory of this program's own. The method has planned it where
    the next one works; and each method has a stream of its own, which only work in the default
    stream between them, such as this copy, puts into an order.
    """

    has_graphs = embeds = False
    slots: dict[str, Tensor] = {}

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load what greedy selection needs. `threads` are nothing to a GPU.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks, a
        machine without a GPU, and a method whose inputs or outputs are not what the manifest says.
        """
        self._artifact, manifest = artifact, artifact.manifest
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
            # Or each method would have a cache of its own.
            set_backend_option(backend, "weight_sharing_across_methods", True)
        stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._memory = TorchMemory(device, stream)
        self.transfers = Transfers(self._memory)
        self._aligned = Aligned(self.transfers, device.type == "cuda")
        path = artifact.program_file
        weights = (
            artifact.directory / manifest["weights"]["file"] if "weights" in manifest else None
        )
        with explained(f"{path} is not a program that ExecuTorch can load", "export it again"):
            data = None if weights is None else str(weights)
            self._program = _C._load_program(str(path), data_path=data)
        self._row = "_row" if manifest["batch"] > 1 else ""
        self._methods = {}
        self._load("prefill", "decode", "greedy", "greedy" + self._row)
        batch, vocab_size = manifest["batch"], manifest["vocab_size"]
        self._next_ids = [self.empty(batch, 1) for _ in range(2)]
        self._row_id = self.empty(1, 1)
        self._logits = {
            rows: self._memory.new(np.zeros((rows, vocab_size), np.float32)) for rows in (1, batch)
        }

    def load_sampling(self, embed: bool = False) -> None:
        """Have what samples ready. Errors: RunnerError for an artifact that cannot sample."""
        self._load(*self._artifact.sampling_methods(self._artifact.manifest["methods"], embed))

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T], in the row
        int64 [1] of a batch of several."""
        inputs = (tokens, positions) if row is None else (tokens, positions, row)
        return self._call("prefill", inputs, self._logits[1])

    def decode(self, token: Tensor, position: Tensor, embed: bool = False) -> Tensor:
        """Logits float32 [B, V] after token int64 [B, 1] at position int64 [B]; never `embed`."""
        return self._call("decode", (token, position), self._logits[len(token)])

    def select(
        self, logits: Tensor, buffer: int, *sampling: Tensor, embed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The next token int64 [B, 1] of logits float32 [B, V], in next_id buffer 0 or 1; twice,
        for it is also what the next step is fed. Never `embed`.

        `sampling` is nothing, for greedy selection, or temperature float32 [B], top_k int64 [B],
        top_p float32 [B], seed int64 [B] and position int64 [B] of the newest token that was fed.
        """
        method = "sample" if sampling else "greedy"
        token = self._call(method, (logits, *sampling), self._next_ids[buffer])
        return token, token

    def select_row(self, logits: Tensor, *sampling: Tensor) -> Tensor:
        """As `select`, of one row of a batch of several, in memory of its own: int64 [1, 1]."""
        method = "sample_row" if sampling else "greedy_row"
        return self._call(method, (logits, *sampling), self._row_id)

    def next_id(self, buffer: int) -> Tensor:
        """The next_id buffer int64 [B, 1] that selection writes, and anyone may."""
        return self._next_ids[buffer]

    def empty(self, *shape: int) -> Tensor:
        """Memory int64 of that shape, for tokens."""
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
