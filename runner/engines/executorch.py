"""An ExecuTorch program driven method by method, without copies between the methods."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tokenloop.runner.engines import executorch_runtime
from tokenloop.runner.engines.executorch_runtime import Method
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.program import GREEDY, PARAMETERS, Choice, Program, Selected
from tokenloop.runner.restriction import ADJUSTED, mask_bytes
from tokenloop.runner.transfers import Transfers

BACKENDS = {"xnnpack": "XnnpackBackend", "portable": None, "cuda": "CudaBackend"}
# The ExecuTorch that has a backend.
BUILDS = {
    "XnnpackBackend": "the wheel from PyPI",
    "CudaBackend": "ExecuTorch's CUDA wheel (PyPI's is without it) or a build with "
    "EXECUTORCH_BUILD_CUDA=ON",
}
WITH_THIS_VERSION = "export it again with this version of ExecuTorch"
INT64 = np.dtype("int64")
FLOAT32 = np.dtype("float32")
# Methods that select for all rows, and write next_id buffers; and those an artifact may leave out.
BUFFERED = {"greedy", "sample", "greedy_embed", "sample_embed"}
OPTIONAL = {"decode_embedded", "decode_greedy", "embed", "sample_row", "mask_row", "adjust_row"}
OPTIONAL |= BUFFERED - {"greedy"}
OPTIONAL |= {f"sample_unfiltered{suffix}" for suffix in ("", "_embed", "_row")}


class ExecuTorchProgram(Program):
    """The methods of a .pte on NumPy arrays. Each method owns the memory of its outputs, so that
    greedy selection and sampling have next_id buffers of their own."""

    has_logits = True

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load the methods of a greedy loop. Those that sample, and those that feed the loop in
        another way, are loaded when they are first needed: nobody waits for what is never called.

        `threads` is how many the kernels use, by default as many as there are processors for them.

        Errors: RunnerError for a file that is no program, a backend that this ExecuTorch lacks,
        and a method whose inputs or outputs are not what the manifest says.
        """
        self._artifact, self.manifest = artifact, artifact.manifest
        self.transfers = Transfers()
        with native_stderr():
            backend = check_backend(artifact, executorch_runtime.registered_backends())
            if backend == "XnnpackBackend":
                # Weights are packed once for all methods, and not once for each.
                executorch_runtime.set_backend_option(backend, "weight_cache_enabled", True)
            # Before the methods: they keep the pool of threads that they were loaded with.
            executorch_runtime.set_num_threads(threads)
            self._program = open_program(artifact)
        self.state = state_of(self._program, artifact)
        several = self.manifest["batch"] > 1
        self.embeds = {"embed", "decode_embedded", "greedy_embed"} <= set(
            self._program.method_names()
        )
        self._loaded: dict[str, list[Method]] = {}
        names = ["greedy" + "_embed" * self.embeds]
        names += ["prefill", "decode_embedded" if self.embeds else "decode"]
        if several:
            names += ["greedy_row"] + ["embed"] * self.embeds
        for name in names:
            self._load(name)

    def _load(self, name: str) -> list[Method]:
        """The method, which is loaded when it is first needed, if not before: twice, if its outputs
        are the two next_id buffers."""
        if name not in self._loaded:
            count = 2 if name in BUFFERED else 1
            path = self._artifact.program_file
            with explained(f"{path}: a method cannot be loaded", WITH_THIS_VERSION):
                self._loaded[name] = [self._program.load_method(name) for _ in range(count)]
        return self._loaded[name]

    def _call(self, name: str, *inputs: np.ndarray, buffer: int = 0) -> list[np.ndarray]:
        return self._load(name)[buffer].call(inputs)

    def load_sampling(self, method: str, embed: bool) -> None:
        for name in self._artifact.sampling_methods(self._program.method_names(), method, embed):
            self._load(name)

    def load_change(self, method: str) -> None:
        self._load(f"{method}_row")

    def prefill(self, tokens: np.ndarray, positions: np.ndarray, *row: np.ndarray) -> np.ndarray:
        return self._call("prefill", tokens, positions, *row)[0]

    def pool(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._call("pool", tokens, positions)[0]

    def decode(self, fed: np.ndarray, positions: np.ndarray) -> np.ndarray:
        name = "decode_embedded" if self.embedding else "decode"
        self.logits = self._call(name, fed, positions)[0]
        return self.logits

    def select(self, logits: np.ndarray, buffer: int, choice: Choice = GREEDY) -> Selected:
        self._change(logits, choice)
        name = choice.method + "_embed" * self.embedding
        outputs = self._call(name, logits, *choice.inputs, buffer=buffer)
        return Selected(outputs[0], outputs[-1])

    def select_row(self, logits: np.ndarray, choice: Choice) -> np.ndarray:
        self._change(logits, choice)
        return self._call(f"{choice.method}_row", logits, *choice.inputs)[0]

    def _change(self, logits: np.ndarray, choice: Choice) -> None:
        """Change the logits in place. Rows without a change are not touched."""
        for method, rows in choice.changes:
            for row, inputs in rows.items():
                place = logits[row : row + 1]
                self.transfers.copy(self._call(f"{method}_row", place, *inputs)[0], place)

    def feed(self, token: np.ndarray, buffer: int) -> np.ndarray:
        return self._call("embed", token)[0] if self.embedding else token

    def next_id(self, buffer: int) -> np.ndarray:
        return self._load("greedy" + "_embed" * self.embeds)[buffer].outputs()[0]

    def empty(self, *shape: int) -> np.ndarray:
        return np.empty(shape, np.int64)


def check_backend(artifact: Artifact, registered: list[str]) -> str | None:
    """The name of the backend that the artifact needs, None where plain kernels are all. Errors:
    RunnerError for one that is not among those `registered`."""
    backend = BACKENDS[artifact.manifest["backend"]]
    if backend is not None and backend not in registered:
        raise RunnerError(
            f"this ExecuTorch has no {backend}, which {artifact.directory} needs "
            f"(it has {', '.join(sorted(registered))}): install {BUILDS[backend]}, or export with "
            "another --backend"
        )
    return backend


def state_of(
    program: executorch_runtime.Program, artifact: Artifact
) -> dict[str, list[np.ndarray]] | None:
    """The program's state, which lies in its arenas: as Program.state has it, None where the
    manifest does not say the places. Errors: RunnerError for a place that is in no arena."""
    if "state_places" not in artifact.manifest:
        return None
    dtypes = {entry["name"]: np.dtype(entry["dtype"]) for entry in artifact.manifest["state"]}
    state: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}
    for place in artifact.manifest["state_places"]:
        dtype = dtypes[place["of"]]
        strides = [dtype.itemsize * step for step in place["stride"]]
        try:
            memory = program.arenas[place["arena"]].bytes
            piece = np.ndarray(place["shape"], dtype, memory, place["offset"], strides)
        except (IndexError, OverflowError, TypeError, ValueError):
            sizes = [arena.bytes.size for arena in program.arenas]
            raise RunnerError(
                f"{artifact.program_file}: the manifest has {place['of']} at {place['offset']} of "
                f"arena {place['arena']}, and the program's arenas have {sizes} bytes: export it "
                "again"
            ) from None
        state[place["of"]].append(piece)
    return state


def open_program(
    artifact: Artifact, arrays: executorch_runtime.Arrays | None = None
) -> executorch_runtime.Program:
    """The artifact's program, whose methods have the inputs and outputs that the runner relies on.
    They are `arrays`, by default NumPy's. Errors: RunnerError for a file that is no program, and
    for other inputs and outputs."""
    path = artifact.checked("program")
    weights = artifact.checked("weights") if "weights" in artifact.manifest else None
    with path.open("rb") as file:
        identifier = file.read(8)[4:]
    # ExecuTorch would log the identifier as it is, whatever a terminal makes of it.
    if identifier[:2] != b"ET" or not identifier[2:].isdigit():
        raise RunnerError(
            f"{path} is not a program that ExecuTorch can load (its identifier is "
            f"{identifier}; one such as b'ET12' is right): export it again"
        )
    with explained(f"{path} is not a program that ExecuTorch can load", "export it again"):
        program = executorch_runtime.Program(path, weights, arrays)
    with explained(f"{path}: a method cannot be loaded", WITH_THIS_VERSION):
        _check_methods(program, artifact)
    return program


def _check_methods(program: executorch_runtime.Program, artifact: Artifact) -> None:
    """The runner relies on these inputs and outputs; a program with others must not get as far as
    a call."""
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
    for name, (inputs, outputs) in _signatures(manifest).items():
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
        for (value, dtype, shape), tensor in zip(inputs + outputs, meta.inputs + meta.outputs):
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
                found = f"{tensor.shape} of {tensor.dtype}" if tensor else "no tensor"
                raise RunnerError(
                    f"{artifact.program_file}: {name}'s {value} is {found}; the manifest says "
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


def _signatures(manifest: dict) -> dict[str, tuple[list, list]]:
    """Name, type and largest shape of each method's inputs, and of its outputs."""
    batch, chunk = manifest["batch"], manifest["max_prefill"]
    # NumPy has no bfloat16, so that it stays ScalarType's number.
    width = {"float32": FLOAT32, "bfloat16": 15}[manifest["dtype"]]

    def logits(rows):
        return "logits", FLOAT32, (rows, manifest["vocab_size"])

    def token(rows):
        return "token", INT64, (rows, 1)

    def hidden(rows):
        return "hidden", width, (rows, 1, manifest["hidden_size"])

    def sampling(rows):
        types = PARAMETERS | {"position": np.int64}
        return [(name, np.dtype(dtype), (rows,)) for name, dtype in types.items()]

    allowed = "allowed", np.dtype("uint8"), (1, mask_bytes(manifest["vocab_size"]))
    # At most the whole vocabulary, each token once.
    most = 1, manifest["vocab_size"]
    adjusted = [(name, np.dtype(dtype), most) for name, dtype in ADJUSTED.items()]
    prompt = [("tokens", INT64, (1, chunk)), ("positions", INT64, (chunk,))]
    position = "position", INT64, (batch,)
    found = {
        "prefill": (prompt + [("row", INT64, (1,))] * (batch > 1), [logits(1)]),
        "decode": ([token(batch), position], [logits(batch)]),
        "decode_embedded": ([hidden(batch), position], [logits(batch)]),
        "embed": ([token(batch)], [hidden(batch)]),
        "greedy": ([logits(batch)], [token(batch)]),
        "sample": ([logits(batch), *sampling(batch)], [token(batch)]),
        "sample_unfiltered": ([logits(batch), *sampling(batch)], [token(batch)]),
        "decode_greedy": ([token(batch), position], [token(batch)]),
        "mask_row": ([logits(1), allowed], [logits(1)]),
        "adjust_row": ([logits(1), *adjusted], [logits(1)]),
    }
    if "pooled_size" in manifest:
        found["pool"] = prompt, [("pooled", FLOAT32, (1, manifest["pooled_size"]))]
    for name in ("greedy", "sample", "sample_unfiltered"):
        inputs, outputs = found[name]
        found[f"{name}_embed"] = inputs, [*outputs, hidden(batch)]
    if batch > 1:
        found["greedy_row"] = [logits(1)], [token(1)]
        for name in ("sample_row", "sample_unfiltered_row"):
            found[name] = [logits(1), *sampling(1)], [token(1)]
    return found


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
