"""An AOTInductor package driven method by method: weights and state are there once, for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tokenloop.runner.slots import PARAMETERS, selection_name
from tokenloop.runner.transfers import Transfers


class InductorProgram:
    """The loaded methods of a .pt2 on its device.

    `transfers` copies to, from and within the device; `embeds` says whether selection can look up
    the next step's embedding. On CUDA a step can be one launch of a graph that was captured: it
    takes the next positions from `slots["lines"]`, or the table, by itself.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None):
        """Load weights and methods. `threads` is how many compute on a CPU.

        Errors: RunnerError for a package of another torch, device or processor, weights that do
        not fit it, and a device without enough memory.
        """
        self._artifact, manifest = artifact, artifact.manifest
        self._device = _device(artifact)
        if threads is not None:
            torch.set_num_threads(threads)
        memory = TorchMemory(self._device)
        self.transfers, self._stream = Transfers(memory), memory.stream
        self._batch = manifest["batch"]
        self.has_graphs = self._device.type == "cuda"
        with self._on_stream(), _explained(artifact):
            self.constants = _constants(artifact, self._device)
            self.embeds = "embed" in manifest["methods"]
            # Whether selection looks the embedding up itself; else "embed" does it afterwards.
            self._fused = "greedy_embed" in manifest["methods"]
            names = ["prefill", "decode_embedded", selection_name(False, self._fused)]
            names += ["greedy_row"] * (self._batch > 1)
            names += ["embed"] * (self._batch > 1 or not self._fused)
            names += ["next_positions"] * self.has_graphs
            self._methods = {name: self._load(name) for name in names}
            # Of each of the two buffers: next_id, and hidden beside it. Rows without a sequence are
            # fed what is there: it must be a token.
            shape, dtype = (self._batch, 1, manifest["hidden_size"]), manifest["dtype"]
            hidden = torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
            self._buffers = [(self.empty(self._batch, 1).zero_(), hidden.clone()) for _ in range(2)]
            self._row_id = self.empty(1, 1)
            self.slots = {
                name: memory.new(np.zeros(self._batch, dtype)) for name, dtype in PARAMETERS.items()
            }
            if self.has_graphs and self._batch > 1:
                self.slots["lines"] = self.empty(manifest["max_seq_len"], self._batch).zero_()
        self._aligned = Aligned(self.transfers, self.has_graphs)

    def load_sampling(self, embed: bool = False) -> None:
        """Have what samples ready. Errors: RunnerError for an artifact that cannot sample."""
        methods = self._artifact.manifest["methods"]
        for name in self._artifact.sampling_methods(methods, embed and self._fused):
            self._method(name)

    def capture(self, table: Tensor) -> None:
        """Capture steps, whose positions are entries of `table` int64 [N], 0 to N - 1, or, of
        several rows, lines of the slot "lines". Errors: RunnerError where memory is short."""
        lines = self.slots.get("lines", table[:, None])
        parameters = [self.slots[name] for name in PARAMETERS]
        waiting = self._artifact.manifest.get("waiting_kernels", [])
        with self._on_stream(), _explained(self._artifact):
            self._steps = StepGraphs(
                self, lines, table, parameters, self.transfers, self._stream, waiting
            )
            self._steps.warm_up()

    def step(
        self, fed: Tensor, positions: Tensor, buffer: int, *sampling: Tensor, embed: bool = False,
        overlap: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`decode` and `select` in one launch, after `capture`; with `overlap` its kernels begin
        while the ones ahead of them end, where they can."""
        return self._steps.step(fed, positions, buffer, *sampling, embed=embed, overlap=overlap)

    def next_positions(self, lines: Tensor, next_line: Tensor, position: Tensor) -> None:
        """Fill position int64 [B] from lines int64 [N, B] at next_line int64 [1], and add 1."""
        self._call("next_positions", lines, next_line, position)

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        """Logits float32 [1, V] after tokens int64 [1, T] at positions int64 [T], in the row
        int64 [1] of a batch of several."""
        return self._call("prefill", tokens, positions, *(() if row is None else (row,)))

    def decode(self, fed: Tensor, position: Tensor, embed: bool = False) -> Tensor:
        """Logits float32 [B, V] after token int64 [B, 1] at position int64 [B], which is `fed` or,
        with `embed`, whose embedding hidden [B, 1, D] is."""
        hidden = fed if embed else self._call("embed", fed)
        return self._call("decode_embedded", hidden, position)

    def select(
        self, logits: Tensor, buffer: int, *sampling: Tensor, embed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The next token int64 [B, 1] of logits float32 [B, V], in next_id buffer 0 or 1, and what
        the next step is fed: the token or, with `embed`, hidden [B, 1, D] beside it.

        `sampling` is nothing, for greedy selection, or temperature float32 [B], top_k int64 [B],
        top_p float32 [B], seed int64 [B] and position int64 [B] of the newest token that was fed.
        """
        out, fused = self._buffers[buffer], embed and self._fused
        self._call(selection_name(bool(sampling), fused), logits, *sampling, *out[: 1 + fused])
        return out[0], self.embed(out[0], buffer) if embed and not fused else out[embed]

    def select_row(self, logits: Tensor, *sampling: Tensor) -> Tensor:
        """As `select`, of one row of a batch of several, in memory of its own: int64 [1, 1]."""
        self._call(selection_name(bool(sampling)) + "_row", logits, *sampling, self._row_id)
        return self._row_id

    def embed(self, token: Tensor, buffer: int) -> Tensor:
        """What the next step is fed of the tokens int64 [B, 1] in a next_id buffer, as `select`
        gives it: hidden [B, 1, D]."""
        hidden = self._call("embed", token)
        if not self._fused:
            return hidden
        self.transfers.copy(hidden, self._buffers[buffer][1])
        return self._buffers[buffer][1]

    def next_id(self, buffer: int) -> Tensor:
        """The next_id buffer int64 [B, 1] that selection writes, and anyone may."""
        return self._buffers[buffer][0]

    def fed(self, buffer: int, embed: bool) -> Tensor:
        """What a step is fed that follows `select` into this buffer."""
        return self._buffers[buffer][embed]

    def empty(self, *shape: int) -> Tensor:
        """Memory int64 of that shape, for tokens."""
        return torch.empty(shape, dtype=torch.int64, device=self._device)

    def _method(self, name: str) -> Callable:
        """The method, which is loaded when it is first needed, if not before."""
        if name not in self._methods:
            with self._on_stream(), _explained(self._artifact):
                self._methods[name] = self._load(name)
        return self._methods[name]

    def _load(self, name: str) -> Callable:
        path = str(self._artifact.program_file)
        # What torch._inductor.package makes of it imports the whole compiler. As to the name see
        # write_package in export/pt2.py.
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
    """Weights, state, which is zero, and what is a view of one of them, by name."""
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
    """Weights for measurements where there are none: always the same on a device."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for entry in entries:
        tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=device)
        if not tensor.is_floating_point():
            tensor.random_(generator=generator)
        elif tensor.dim() == 1:
            # Of norms, and frequencies.
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
