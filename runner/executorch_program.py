"""An ExecuTorch program driven method by method, without copies between the methods."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from runner import executorch_runtime
from runner.artifact import Artifact
from runner.errors import RunnerError
from runner.executorch_runtime import Method, Program
from runner.transfers import Transfers

BACKENDS = {"xnnpack": "XnnpackBackend", "portable": None, "cuda": "CudaBackend"}
# Which ExecuTorch has a backend.
BUILDS = {
    "XnnpackBackend": "the wheel from PyPI",
    "CudaBackend": "ExecuTorch's CUDA wheel (PyPI's is without it) or a build with "
    "EXECUTORCH_BUILD_CUDA=ON",
}
WITH_THIS_VERSION = "export it again with this version of ExecuTorch"
INT64 = np.dtype("int64")
FLOAT32 = np.dtype("float32")


class ExecuTorchProgram:
    """The loaded methods of a .pte. Every output is a view of memory that the method owns, valid
    until the same method runs again; an input's memory is used in place.

    `transfers` copies to, from and within the arrays that the methods take. Nothing is captured
    here, and so no input needs a slot of its own.
    """

    has_graphs = False
    slots: dict[str, np.ndarray] = {}

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load prefill, decode, and greedy twice: its two outputs are the two next_id buffers. What
        samples is loaded when it is first needed, so that greedy users pay nothing for it.

        `threads` is how many the kernels use, by default as many as there are processors for them.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks,
        and a method whose inputs or outputs are not what the manifest says.
        """
        self._artifact = artifact
        self.transfers = Transfers()
        with native_stderr():
            self._open(threads)
        greedy_row = ["greedy_row"] if artifact.manifest["batch"] > 1 else []
        self._prefill, self._decode, *methods = self._load(
            "prefill", "decode", "greedy", "greedy", *greedy_row
        )
        self._greedy, self._greedy_row = methods[:2], methods[2:]
        self._sample: list[Method] = []
        self._sample_row: list[Method] = []

    def _open(self, threads: int | None) -> None:
        backend = check_backend(self._artifact, executorch_runtime.registered_backends())
        if backend == "XnnpackBackend":
            # Weights are packed once for all methods, and not once for each.
            executorch_runtime.set_backend_option(backend, "weight_cache_enabled", True)
        # Before the methods: they keep the pool of threads that they were loaded with.
        executorch_runtime.set_num_threads(threads)
        self._program = open_program(self._artifact)

    def _load(self, *names: str) -> list[Method]:
        path = self._artifact.program_file
        with explained(f"{path}: a method cannot be loaded", WITH_THIS_VERSION):
            return [self._program.load_method(name) for name in names]

    def load_sampling(self) -> None:
        """Have what samples ready. Errors: RunnerError for an artifact that cannot sample."""
        if self._sample:
            return
        methods = self._load(
            "sample", *self._artifact.sampling_methods(self._program.method_names())
        )
        self._sample, self._sample_row = methods[:2], methods[2:]

    def prefill(
        self, tokens: np.ndarray, positions: np.ndarray, row: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T], in the row
        int64 [1] of a batch of several."""
        inputs = [tokens, positions] if row is None else [tokens, positions, row]
        return self._prefill.call(inputs)[0]

    def decode(self, token: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Logits float32 [B, V] after token int64 [B, 1] at position int64 [B]."""
        return self._decode.call([token, position])[0]

    def select(self, logits: np.ndarray, buffer: int, *sampling: np.ndarray) -> np.ndarray:
        """The next token int64 [B, 1] of logits float32 [B, V], in next_id buffer 0 or 1.

        `sampling` is nothing, for greedy selection, or temperature float32 [B], top_k int64 [B],
        top_p float32 [B], seed int64 [B] and position int64 [B] of the newest token that was fed.
        """
        methods = self._sample if sampling else self._greedy
        return methods[buffer].call([logits, *sampling])[0]

    def select_row(self, logits: np.ndarray, *sampling: np.ndarray) -> np.ndarray:
        """As `select`, of one row of a batch of several, in memory of its own: int64 [1, 1]."""
        (method,) = self._sample_row if sampling else self._greedy_row
        return method.call([logits, *sampling])[0]

    def empty(self, *shape: int) -> np.ndarray:
        """Memory int64 of that shape, for tokens."""
        return np.empty(shape, np.int64)

    def next_id(self, buffer: int) -> np.ndarray:
        """The next_id buffer int64 [B, 1] that greedy selection writes, and anyone may."""
        return self._greedy[buffer].outputs()[0]


def check_backend(artifact: Artifact, registered: list[str]) -> str | None:
    """The name of the backend that the artifact needs, None where plain kernels are all. Errors:
    RunnerError for one that is not among those `registered`, or not known at all."""
    name = artifact.manifest["backend"]
    if name not in BACKENDS:
        raise RunnerError(f"backend {name!r} is unknown: {', '.join(BACKENDS)} are known")
    backend = BACKENDS[name]
    if backend is not None and backend not in registered:
        raise RunnerError(
            f"this ExecuTorch has no {backend}, which {artifact.directory} needs "
            f"(it has {', '.join(sorted(registered))}): install {BUILDS[backend]}, or export with "
            "another --backend"
        )
    return backend


def open_program(artifact: Artifact) -> Program:
    """The artifact's program, whose methods have the slots that the runner relies on. Errors:
    RunnerError for a file that is no program, and for other slots."""
    path = artifact.program_file
    with path.open("rb") as file:
        identifier = file.read(8)[4:]
    # ExecuTorch would log the identifier as it is, whatever a terminal makes of it.
    if identifier[:2] != b"ET" or not identifier[2:].isdigit():
        raise RunnerError(
            f"{path} is not a program that ExecuTorch can load (its identifier is "
            f"{identifier}; one such as b'ET12' is right): export it again"
        )
    with explained(f"{path} is not a program that ExecuTorch can load", "export it again"):
        program = Program(path)
    with explained(f"{path}: a method cannot be loaded", WITH_THIS_VERSION):
        _check_methods(program, artifact)
    return program


def _check_methods(program: Program, artifact: Artifact) -> None:
    """The runner relies on these slots; a program with others must not get as far as a call."""
    manifest = artifact.manifest
    names = program.method_names()
    if "get_max_context_len" not in names:
        raise RunnerError(f"{artifact.program_file} has no get_max_context_len: export it again")
    (positions,) = program.load_method("get_max_context_len").call([])
    if positions != manifest["max_seq_len"]:
        raise RunnerError(
            f"{artifact.program_file}: its caches have {positions} positions; the manifest says "
            f"max_seq_len {manifest['max_seq_len']}"
        )
    for name, (*inputs, output) in _slots(manifest).items():
        if name not in names:
            if name in ("sample", "sample_row"):
                continue
            raise RunnerError(f"{artifact.program_file} has no method {name}: export it again")
        meta = program.method_meta(name)
        if (len(meta.inputs), len(meta.outputs)) != (len(inputs), 1):
            raise RunnerError(
                f"{artifact.program_file}: {name} has {len(meta.inputs)} inputs and "
                f"{len(meta.outputs)} outputs; {len(inputs)} and 1 are right"
            )
        for (slot, dtype, shape), tensor in zip((*inputs, output), meta.inputs + meta.outputs):
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
                found = f"{tensor.shape} of {tensor.dtype}" if tensor else "no tensor"
                raise RunnerError(
                    f"{artifact.program_file}: {name}'s {slot} is {found}; the manifest says "
                    f"{shape} of {dtype}"
                )
        # On a GPU only planned memory is the GPU's.
        planned = manifest["backend"] == "cuda"
        if meta.outputs[0].is_memory_planned != planned:
            where = "memory of the host" if planned else "memory that the next method overwrites"
            raise RunnerError(
                f"{artifact.program_file}: {name}'s output lies in {where}; it must be exported "
                f"with alloc_graph_output={planned}"
            )


def _slots(manifest: dict) -> dict[str, tuple]:
    """Name, type and largest shape of each method's inputs and, last, its output."""
    batch, chunk = manifest["batch"], manifest["max_prefill"]

    def logits(rows):
        return "logits", FLOAT32, (rows, manifest["vocab_size"])

    def token(rows):
        return "token", INT64, (rows, 1)

    def sampling(rows):
        types = {"temperature": FLOAT32, "top_k": INT64, "top_p": FLOAT32, "seed": INT64}
        types["position"] = INT64
        return [(name, dtype, (rows,)) for name, dtype in types.items()]

    prompt = ("tokens", INT64, (1, chunk)), ("positions", INT64, (chunk,))
    slots = {
        "prefill": (*prompt, *([("row", INT64, (1,))] if batch > 1 else []), logits(1)),
        "decode": (token(batch), ("position", INT64, (batch,)), logits(batch)),
        "greedy": (logits(batch), token(batch)),
        "sample": (logits(batch), *sampling(batch), token(batch)),
    }
    if batch > 1:
        slots["greedy_row"] = logits(1), token(1)
        slots["sample_row"] = logits(1), *sampling(1), token(1)
    return slots


def _reason(log, error: RuntimeError) -> str:
    """The newest error that ExecuTorch logged, or an operator that it has no kernel for."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line[:2] == "E "]
    # A line begins with the time and the place in the source.
    reasons = [line.partition("] ")[2].strip() for line in lines]
    missing = [reason for reason in reasons if reason.startswith("Missing operator")]
    return (missing or reasons or str(error).splitlines()[:1])[-1]


@contextmanager
def explained(fault: str, advice: str) -> Iterator[None]:
    """Make one line of an error of ExecuTorch's, with the reason that it logged."""
    with native_stderr() as log:
        try:
            yield
        except RuntimeError as error:
            raise RunnerError(f"{fault} ({_reason(log, error)}): {advice}") from None


@contextmanager
def native_stderr() -> Iterator:
    """Keep what native code writes to file descriptor 2 out of sight: ExecuTorch logs the
    processor's features there, and on an error the reason."""
    with tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)
