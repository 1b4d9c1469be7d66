"""An ExecuTorch program driven method by method, without copies between the methods."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tokenloop.runner.engines import executorch_runtime
from tokenloop.runner.engines.executorch_runtime import Method, Program
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.slots import selection_name
from tokenloop.runner.transfers import Transfers

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
# What selects for all rows, and writes next_id buffers; and what an artifact may leave out.
BUFFERED = {"greedy", "sample", "greedy_embed", "sample_embed"}
OPTIONAL = {"decode_embedded", "embed", "sample_row"} | BUFFERED - {"greedy"}


class ExecuTorchProgram:
    """The loaded methods of a .pte. Every output is a view of memory that the method owns, valid
    until the same method runs again; an input's memory is used in place.

    `transfers` copies to, from and within the arrays that the methods take; `embeds` says whether
    selection can look up the next step's embedding. Nothing is captured
    here, and so no input needs a slot of its own.
    """

    has_graphs = False
    slots: dict[str, np.ndarray] = {}

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load what a greedy loop calls. What samples, and what feeds the loop in another way, is
        loaded when it is first needed, so that who does without pays nothing for it.

        `threads` is how many the kernels use, by default as many as there are processors for them.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks,
        and a method whose inputs or outputs are not what the manifest says.
        """
        self._artifact = artifact
        self.transfers = Transfers()
        with native_stderr():
            self._open(threads)
        self._batch: int = artifact.manifest["batch"]
        self.embeds = {"embed", "decode_embedded", "greedy_embed"} <= set(
            self._program.method_names()
        )
        self._loaded: dict[str, list[Method]] = {}
        names = [selection_name(False, self.embeds)]
        names += ["prefill", "decode_embedded" if self.embeds else "decode"]
        if self._batch > 1:
            names += ["greedy_row"] + ["embed"] * self.embeds
        for name in names:
            self._load(name)

    def _open(self, threads: int | None) -> None:
        backend = check_backend(self._artifact, executorch_runtime.registered_backends())
        if backend == "XnnpackBackend":
            # Weights are packed once for all methods, and not once for each.
            executorch_runtime.set_backend_option(backend, "weight_cache_enabled", True)
        # Before the methods: they keep the pool of threads that they were loaded with.
        executorch_runtime.set_num_threads(threads)
        self._program = open_program(self._artifact)

    def _load(self, name: str) -> list[Method]:
        """The method, which is loaded when it is first needed, if not before: twice, if its outputs
        are the two next_id buffers."""
        if name not in self._loaded:
            count = 2 if name in BUFFERED else 1
            path = self._artifact.program_file
            with explained(f"{path}: a method cannot be loaded", WITH_THIS_VERSION):
                self._loaded[name] = [self._program.load_method(name) for _ in range(count)]
        return self._loaded[name]

    def load_sampling(self, embed: bool = False) -> None:
        """Have what samples ready. Errors: RunnerError for an artifact that cannot sample."""
        for name in self._artifact.sampling_methods(self._program.method_names(), embed):
            self._load(name)

    def prefill(
        self, tokens: np.ndarray, positions: np.ndarray, row: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T], in the row
        int64 [1] of a batch of several."""
        inputs = [tokens, positions] if row is None else [tokens, positions, row]
        return self._load("prefill")[0].call(inputs)[0]

    def decode(self, fed: np.ndarray, position: np.ndarray, embed: bool = False) -> np.ndarray:
        """Logits float32 [B, V] after token int64 [B, 1] at position int64 [B], which is `fed` or,
        with `embed`, whose embedding hidden float32 [B, 1, D] is."""
        (method,) = self._load("decode_embedded" if embed else "decode")
        return method.call([fed, position])[0]

    def select(
        self, logits: np.ndarray, buffer: int, *sampling: np.ndarray, embed: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next token int64 [B, 1] of logits float32 [B, V], in next_id buffer 0 or 1, and what
        the next step is fed: the token or, with `embed`, hidden float32 [B, 1, D] beside it.

        `sampling` is nothing, for greedy selection, or temperature float32 [B], top_k int64 [B],
        top_p float32 [B], seed int64 [B] and position int64 [B] of the newest token that was fed.
        """
        methods = self._load(selection_name(bool(sampling), embed))
        outputs = methods[buffer].call([logits, *sampling])
        return outputs[0], outputs[-1]

    def select_row(self, logits: np.ndarray, *sampling: np.ndarray) -> np.ndarray:
        """As `select`, of one row of a batch of several, in memory of its own: int64 [1, 1]."""
        (method,) = self._load(selection_name(bool(sampling)) + "_row")
        return method.call([logits, *sampling])[0]

    def embed(self, token: np.ndarray, buffer: int) -> np.ndarray:
        """What the next step is fed of the tokens int64 [B, 1] in a next_id buffer, as `select`
        gives it: hidden float32 [B, 1, D]."""
        return self._load("embed")[0].call([token])[0]

    def empty(self, *shape: int) -> np.ndarray:
        """Memory int64 of that shape, for tokens."""
        return np.empty(shape, np.int64)

    def next_id(self, buffer: int) -> np.ndarray:
        """The next_id buffer int64 [B, 1] that greedy selection writes, and anyone may."""
        return self._load(selection_name(False, self.embeds))[buffer].outputs()[0]


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
    for name, (inputs, outputs) in _slots(manifest).items():
        if name not in names:
            if name in OPTIONAL:
                continue
            raise RunnerError(f"{artifact.program_file} has no method {name}: export it again")
        meta = program.method_meta(name)
        if (len(meta.inputs), len(meta.outputs)) != (len(inputs), len(outputs)):
            raise RunnerError(
                f"{artifact.program_file}: {name} has {len(meta.inputs)} inputs and "
                f"{len(meta.outputs)} outputs; {len(inputs)} and {len(outputs)} are right"
            )
        for (slot, dtype, shape), tensor in zip(inputs + outputs, meta.inputs + meta.outputs):
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
                found = f"{tensor.shape} of {tensor.dtype}" if tensor else "no tensor"
                raise RunnerError(
                    f"{artifact.program_file}: {name}'s {slot} is {found}; the manifest says "
                    f"{shape} of {dtype}"
                )
        # On a GPU only planned memory is the GPU's.
        planned = manifest["backend"] == "cuda"
        if any(output.is_memory_planned != planned for output in meta.outputs):
            where = "memory of the host" if planned else "memory that the next method overwrites"
            raise RunnerError(
                f"{artifact.program_file}: {name}'s output lies in {where}; it must be exported "
                f"with alloc_graph_output={planned}"
            )


def _slots(manifest: dict) -> dict[str, tuple[list, list]]:
    """Name, type and largest shape of each method's inputs, and of its outputs."""
    batch, chunk = manifest["batch"], manifest["max_prefill"]

    def logits(rows):
        return "logits", FLOAT32, (rows, manifest["vocab_size"])

    def token(rows):
        return "token", INT64, (rows, 1)

    def hidden(rows):
        return "hidden", FLOAT32, (rows, 1, manifest["hidden_size"])

    def sampling(rows):
        types = {"temperature": FLOAT32, "top_k": INT64, "top_p": FLOAT32, "seed": INT64}
        types["position"] = INT64
        return [(name, dtype, (rows,)) for name, dtype in types.items()]

    prompt = [("tokens", INT64, (1, chunk)), ("positions", INT64, (chunk,))]
    position = "position", INT64, (batch,)
    slots = {
        "prefill": (prompt + [("row", INT64, (1,))] * (batch > 1), [logits(1)]),
        "decode": ([token(batch), position], [logits(batch)]),
        "decode_embedded": ([hidden(batch), position], [logits(batch)]),
        "embed": ([token(batch)], [hidden(batch)]),
        "greedy": ([logits(batch)], [token(batch)]),
        "sample": ([logits(batch), *sampling(batch)], [token(batch)]),
    }
    for name in ("greedy", "sample"):
        inputs, outputs = slots[name]
        slots[f"{name}_embed"] = inputs, [*outputs, hidden(batch)]
    if batch > 1:
        slots["greedy_row"] = [logits(1)], [token(1)]
        slots["sample_row"] = [logits(1), *sampling(1)], [token(1)]
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
