"""An ExecuTorch program driven method by method, without copies between the methods.

Only the extension itself is imported: executorch.runtime would pull in the whole export stack.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from runner.artifact import Artifact
from runner.errors import RunnerError

# The kernels that artifacts use beside the runtime's own, as the wheel has them.
KERNEL_LIBRARIES = (
    "kernels/quantized/libquantized_ops_aot_lib.so",
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
)
BACKENDS = {"xnnpack": "XnnpackBackend", "portable": None, "cuda": "CudaBackend"}
INT64 = 4  # ScalarType::Long in executorch/runtime/core/portable_type/scalar_type.h
FLOAT32 = 6


class ExecuTorchProgram:
    """The loaded methods of a .pte. Every output is a view of memory that the method owns, valid
    until the same method runs again; an input's memory is used in place."""

    def __init__(self, artifact: Artifact):
        """Load prefill, decode, and greedy twice: its two outputs are the two next_id buffers.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks,
        and a method whose inputs or outputs are not what the manifest says.
        """
        extension = _load_extension()
        backend = artifact.manifest["backend"]
        if backend not in BACKENDS:
            raise RunnerError(f"backend {backend!r} is unknown: {', '.join(BACKENDS)} are known")
        registered = extension._get_registered_backend_names()
        if BACKENDS[backend] is not None and BACKENDS[backend] not in registered:
            raise RunnerError(
                f"this ExecuTorch has no {BACKENDS[backend]}, which {artifact.directory} needs "
                f"(it has {', '.join(sorted(registered))}): install a build that has it, or "
                "export with another --backend"
            )
        path = str(artifact.program_file)
        with artifact.program_file.open("rb") as file:
            identifier = file.read(8)[4:]
        # ExecuTorch would log the identifier, and aborts the process if that is not UTF-8.
        if identifier[:2] != b"ET" or not identifier[2:].isdigit():
            raise RunnerError(
                f"{path} is not a program that ExecuTorch can load (its identifier is "
                f"{identifier}; one such as b'ET12' is right): export it again"
            )
        with _native_stderr() as log:
            try:
                # Kept: methods do not keep the program alive.
                self._program = extension._load_program(
                    path, program_verification=extension.Verification.InternalConsistency
                )
            except RuntimeError as error:
                raise RunnerError(
                    f"{path} is not a program that ExecuTorch can load "
                    f"({_last_line(log, error)}): export it again"
                ) from None
            _check_methods(self._program, artifact)
            try:
                self._prefill, self._decode = map(self._program.load_method, ("prefill", "decode"))
                self._select = [self._program.load_method("greedy") for _ in range(2)]
            except RuntimeError as error:
                raise RunnerError(
                    f"{path}: a method cannot be loaded ({_last_line(log, error)}): export it "
                    "again with this version of ExecuTorch"
                ) from None

    def prefill(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T]."""
        return self._prefill.call([tokens, positions], False)[0]

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits float32 [1, V] after token int64 [1, 1] at position int64 [1]."""
        return self._decode.call([token, position], False)[0]

    def select(self, logits: Tensor, buffer: int) -> Tensor:
        """The next token int64 [1, 1] of logits float32 [1, V], in next_id buffer 0 or 1."""
        return self._select[buffer].call([logits], False)[0]


def _load_extension():
    try:
        from executorch.extension.pybindings import _C
    except ImportError as error:
        raise RunnerError(
            f"executorch cannot be imported ({error}): it must match torch {torch.__version__}"
        ) from None
    root = Path(_C.__file__).parents[2]
    for library in KERNEL_LIBRARIES:
        torch.ops.load_library(root / library)
    return _C


def _check_methods(program, artifact: Artifact) -> None:
    """The runner relies on these slots; a program with others must not get as far as a call."""
    manifest = artifact.manifest
    names = [program.get_method_name(i) for i in range(program.num_methods())]
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
        if (meta.num_inputs(), meta.num_outputs()) != (len(inputs), 1):
            raise RunnerError(
                f"{artifact.program_file}: {name} has {meta.num_inputs()} inputs and "
                f"{meta.num_outputs()} outputs; {len(inputs)} and 1 are right"
            )
        if meta.output_tensor_meta(0).is_memory_planned():
            raise RunnerError(
                f"{artifact.program_file}: {name}'s output lies in memory that the next method "
                "overwrites; it must be exported with alloc_graph_output=False"
            )
        found = [meta.input_tensor_meta(i) for i in range(len(inputs))]
        found.append(meta.output_tensor_meta(0))
        for (slot, dtype, shape), tensor in zip((*inputs, output), found):
            if (tensor.dtype(), tuple(tensor.sizes())) != (dtype, shape):
                raise RunnerError(
                    f"{artifact.program_file}: {name}'s {slot} is {tuple(tensor.sizes())} of "
                    f"scalar type {tensor.dtype()}; the manifest says {shape} of type {dtype}"
                )


def _last_line(log, error: Exception) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return (lines or str(error).splitlines())[-1].strip()


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
