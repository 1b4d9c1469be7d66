"""An AOTInductor package driven method by method: weights and state are there once, for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from tokenloop.runner.engines.step_graphs import StepGraphs
from tokenloop.runner.engines.torch_memory import Aligned, TorchMemory
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.program import GREEDY, PARAMETERS, Choice, Program, Selected, Step
from tokenloop.runner.transfers import Transfers


class InductorProgram(Program):
    """The methods of a .pt2 on torch tensors of its device, a CPU or a CUDA GPU. Selection writes
    the same two buffers whatever it chooses by. On CUDA a step can be one launch of a graph, which
    finds its positions by itself."""

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load weights and methods. `threads` is how many compute on a CPU.

        Errors: RunnerError for a package of another torch, device or processor, weights that do
        not fit it, and a device without enough memory.
        """
        self._artifact, self.manifest = artifact, artifact.manifest
        self._device = _device(artifact)
        if threads is not None:
            torch.set_num_threads(threads)
        memory = TorchMemory(self._device)
        self.transfers, self._stream = Transfers(memory), memory.stream
        batch, methods = self.manifest["batch"], self.manifest["methods"]
        self.has_graphs = self._device.type == "cuda"
        self._aligned = Aligned(self.transfers, self.has_graphs)
        with self._on_stream(), _explained(artifact):
            self.constants = _constants(artifact, self._device)
            self.embeds = "embed" in methods
            # Whether selection looks the embedding up itself; else "embed" does it afterwards.
            self._fused = "greedy_embed" in methods
            names = ["prefill", "decode_embedded", "greedy" + "_embed" * self._fused]
            names += ["greedy_row"] * (batch > 1)
            names += ["embed"] * (batch > 1 or not self._fused)
            names += ["next_positions"] * self.has_graphs
            self._methods = {name: self._load(name) for name in names}
            # The two buffers: next_id, and hidden beside it. Rows without a sequence are fed what
            # is there, which must be a token.
            shape, dtype = (batch, 1, self.manifest["hidden_size"]), self.manifest["dtype"]
            hidden = torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
            self._buffers = [(self.empty(batch, 1).zero_(), hidden.clone()) for _ in range(2)]
            self._row_id = self.empty(1, 1)
            self.step_inputs = {
                name: memory.new(np.zeros(batch, dtype)) for name, dtype in PARAMETERS.items()
            }
            if self.has_graphs and batch > 1:
                lines = self.empty(self.manifest["max_seq_len"], batch).zero_()
                self.step_inputs["lines"] = lines

    def capture(self, table: Tensor) -> None:
        if not self.has_graphs:
            return
        lines = self.step_inputs.get("lines", table[:, None])
        waiting = self.manifest.get("waiting_kernels", [])
        with self._on_stream(), _explained(self._artifact):
            parameters = [self.step_inputs[name] for name in PARAMETERS]
            self._graphs = StepGraphs(
                self._run, partial(self._call, "next_positions"), lines, table, parameters,
                self.transfers, self._stream, waiting,
            )  # fmt: skip
            self.begin(self.embeds)
            # At position 0, which every sequence overwrites.
            for buffer in (0, 1):
                self.next_id(1 - buffer).zero_()
                self.step(self._fed(1 - buffer), Step(lines[0], 0, GREEDY), buffer)
            self.begin(embed=False)

    def load_sampling(self, method: str, embed: bool) -> None:
        methods, fused = self.manifest["methods"], embed and self._fused
        for name in self._artifact.sampling_methods(methods, method, fused):
            self._method(name)

    def begin(self, embed: bool, graph: bool = True, overlap: bool = True) -> None:
        self.embedding, self._graph, self._overlap = embed, graph and self.has_graphs, overlap

    def prefill(self, tokens: Tensor, positions: Tensor, *row: Tensor) -> Tensor:
        return self._call("prefill", tokens, positions, *row)

    def step(self, fed: Tensor, step: Step, buffer: int) -> Selected:
        if not self._graph:
            return super().step(fed, step, buffer)
        # A captured step reads the buffer itself. A token that the host fed is in it as well.
        assert fed.data_ptr() == self._fed(1 - buffer).data_ptr()
        self._graphs.submit(step, buffer, self.embedding, self._overlap)
        return Selected(self.next_id(buffer), self._fed(buffer))

    def _run(self, step: Step, buffer: int) -> None:
        """A step as it is captured."""
        super().step(self._fed(1 - buffer), step, buffer)

    def decode(self, fed: Tensor, positions: Tensor) -> Tensor:
        hidden = fed if self.embedding else self._call("embed", fed)
        return self._call("decode_embedded", hidden, positions)

    def select(self, logits: Tensor, buffer: int, choice: Choice = GREEDY) -> Selected:
        out, fused = self._buffers[buffer], self.embedding and self._fused
        self._call(choice.method + "_embed" * fused, logits, *choice.inputs, *out[: 1 + fused])
        return Selected(out[0], out[1] if fused else self.feed(out[0], buffer))

    def select_row(self, logits: Tensor, choice: Choice) -> Tensor:
        self._call(f"{choice.method}_row", logits, *choice.inputs, self._row_id)
        return self._row_id

    def feed(self, token: Tensor, buffer: int) -> Tensor:
        if not self.embedding:
            return token
        hidden = self._call("embed", token)
        if not self._fused:
            return hidden
        self.transfers.copy(hidden, self._buffers[buffer][1])
        return self._buffers[buffer][1]

    def next_id(self, buffer: int) -> Tensor:
        return self._buffers[buffer][0]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._device)

    def _fed(self, buffer: int) -> Tensor:
        """What a step is fed that follows `select` into this buffer, where selection looks up."""
        return self._buffers[buffer][self.embedding]

    def _method(self, name: str) -> Callable:
        """The method, which is loaded when it is first needed, if not before."""
        if name not in self._methods:
            with self._on_stream(), _explained(self._artifact):
                self._methods[name] = self._load(name)
        return self._methods[name]

    def _load(self, name: str) -> Callable:
        path = str(self._artifact.program_file)
        # torch._inductor.package's loader would import the whole compiler. The name ends in a mark:
        # see write_package in export/pt2/package.py.
        package = AOTIModelPackageLoader(path, f"{name}-", True, 1, -1)
        constants = {}
        for needed in package.get_constant_fqns():
            if needed not in self.constants:
                raise RunnerError(
                    f"{self._artifact.directory}: {name} needs the tensor {needed}, which neither "
                    "the weights nor the manifest's state have: export it again"
                )
            constants[needed] = self.constants[needed]
        package.load_constants(constants, False, True, user_managed=True)
        return package.boxed_run

    def _call(self, name: str, *inputs: Tensor) -> Tensor | None:
        method = self._method(name)
        with self._on_stream():
            outputs = method(self._aligned(*inputs))
        return outputs[0] if outputs else None

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream)


def _device(artifact: Artifact) -> torch.device:
    """The artifact's device, if this machine's is what the package was compiled for."""
    manifest = artifact.manifest
    found, wanted = torch.__version__.split("+")[0], manifest["versions"]["torch"].split("+")[0]
    if found.split(".")[:2] != wanted.split(".")[:2]:
        raise RunnerError(
            f"{artifact.directory} was compiled by torch {wanted}, and this is {found}: "
            "export it again, or install that torch"
        )
    device = torch.device(manifest["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunnerError(
            f"{artifact.directory} is for a CUDA GPU, and torch sees none here: export with "
            "--device cpu"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        processor = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        processor = torch.backends.cpu.get_cpu_capability()
    if processor != manifest["processor"]:
        raise RunnerError(
            f"{artifact.directory} was compiled for {manifest['processor']}, and this machine's "
            f"{manifest['device']} is {processor}: export it here"
        )
    return device


def _constants(artifact: Artifact, device: torch.device) -> dict[str, Tensor]:
    """The weights, the state, which is zero, and the views of both, by name."""
    entry = artifact.manifest["weights"]
    if "random" in entry:
        tensors = _random(entry["random"], device)
    else:
        path = artifact.directory / entry["file"]
        try:
            tensors = load_file(path, device=str(device))
        except SafetensorError as error:
            raise RunnerError(f"{path} is damaged ({error}): export it again") from None
    for state in artifact.manifest["state"]:
        dtype = getattr(torch, state["dtype"])
        tensors[state["name"]] = torch.zeros(state["shape"], dtype=dtype, device=device)
    for name, view in entry["views"].items():
        layout = view["shape"], view["stride"], view["offset"]
        tensors[name] = tensors[view["of"]].as_strided(*layout)
    return tensors


def _random(entries: list[dict], device: torch.device) -> dict[str, Tensor]:
    """Random weights, for measurements: always the same ones on a device."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for entry in entries:
        tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=device)
        if not tensor.is_floating_point():
            tensor.random_(generator=generator)
        elif tensor.dim() == 1:
            # Weights of norms, and frequencies.
            tensor.uniform_(0.5, 1.0, generator=generator)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        tensors[entry["name"]] = tensor
    return tensors


@contextmanager
def _explained(artifact: Artifact) -> Iterator[None]:
    """Make one line of torch's errors while an artifact is loaded."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise RunnerError(
            f"{artifact.directory} does not fit the GPU's memory ({reason}): free some, or export "
            "it with a smaller --max-seq-len or --batch"
        ) from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunnerError(
            f"{artifact.program_file} cannot be loaded ({reason}): export it again"
        ) from None
