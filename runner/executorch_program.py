"""An ExecuTorch program driven method by method, without copies between the methods."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from runner import executorch_runtime
from runner.artifact import Artifact
from runner.errors import RunnerError
from runner.executorch_runtime import ExecuTorchError, Program

BACKENDS = {"xnnpack": "XnnpackBackend", "portable": None, "cuda": "CudaBackend"}
INT64 = np.dtype("int64")
FLOAT32 = np.dtype("float32")


class ExecuTorchProgram:
    """The loaded methods of a .pte. Every output is a view of memory that the method owns, valid
    until the same method runs again; an input's memory is used in place."""

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load prefill, decode, and greedy twice: its two outputs are the two next_id buffers.

        `threads` is how many the kernels use, by default as many as there are processors for them.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks,
        and a method whose inputs or outputs are not what the manifest says.
        """
        backend = artifact.manifest["backend"]
        if backend not in BACKENDS:
            raise RunnerError(f"backend {backend!r} is unknown: {', '.join(BACKENDS)} are known")
        with _native_stderr() as log:
            self._load(artifact, threads, log)

    def _load(self, artifact: Artifact, threads: int | None, log) -> None:
        registered = executorch_runtime.registered_backends()
        backend = BACKENDS[artifact.manifest["backend"]]
        if backend is not None and backend not in registered:
            raise RunnerError(
                f"this ExecuTorch has no {backend}, which {artifact.directory} needs "
                f"(it has {', '.join(sorted(registered))}): install a build that has it, or "
                "export with another --backend"
            )
        if backend == "XnnpackBackend":
            # Weights are packed once for all methods, and not once for each.
            executorch_runtime.set_backend_option(backend, "weight_cache_enabled", True)
        # Before the methods: they keep the pool of threads that they were loaded with.
        executorch_runtime.set_num_threads(threads)
        path = str(artifact.program_file)
        with artifact.program_file.open("rb") as file:
            identifier = file.read(8)[4:]
        # ExecuTorch would log the identifier as it is, whatever a terminal makes of it.
        if identifier[:2] != b"ET" or not identifier[2:].isdigit():
            raise RunnerError(
                f"{path} is not a program that ExecuTorch can load (its identifier is "
                f"{identifier}; one such as b'ET12' is right): export it again"
            )
        try:
            program = Program(path)
        except ExecuTorchError as error:
            raise RunnerError(
                f"{path} is not a program that ExecuTorch can load "
                f"({_reason(log, error)}): export it again"
            ) from None
        try:
            _check_methods(program, artifact)
            self._prefill, self._decode = map(program.load_method, ("prefill", "decode"))
            self._select = [program.load_method("greedy") for _ in range(2)]
        except ExecuTorchError as error:
            raise RunnerError(
                f"{path}: a method cannot be loaded ({_reason(log, error)}): export it "
                "again with this version of ExecuTorch"
            ) from None

    def prefill(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T]."""
        return self._prefill.call([tokens, positions])[0]

    def decode(self, token: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Logits float32 [1, V] after token int64 [1, 1] at position int64 [1]."""
        return self._decode.call([token, position])[0]

    def select(self, logits: np.ndarray, buffer: int) -> np.ndarray:
        """The next token int64 [1, 1] of logits float32 [1, V], in next_id buffer 0 or 1."""
        return self._select[buffer].call([logits])[0]


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
    logits = ("logits", FLOAT32, (1, manifest["vocab_size"]))
    chunk, one = manifest["max_prefill"], (1, 1)
    slots = {
        "prefill": (("tokens", INT64, (1, chunk)), ("positions", INT64, (chunk,)), logits),
        "decode": (("token", INT64, one), ("position", INT64, (1,)), logits),
        "greedy": (logits, ("token", INT64, one)),
    }
    for name, (*inputs, output) in slots.items():
        if name not in names:
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
        if meta.outputs[0].is_memory_planned:
            raise RunnerError(
                f"{artifact.program_file}: {name}'s output lies in memory that the next method "
                "overwrites; it must be exported with alloc_graph_output=False"
            )


def _reason(log, error: ExecuTorchError) -> str:
    """The newest error that ExecuTorch logged, or an operator that it has no kernel for."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line[:2] == "E "]
    # A line begins with the time and the place in the source.
    reasons = [line.partition("] ")[2].strip() for line in lines]
    missing = [reason for reason in reasons if reason.startswith("Missing operator")]
    return (missing or reasons or [str(error)])[-1]


@contextmanager
def _native_stderr() -> Iterator:
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
