"""An AOTInductor package driven method by method: weights and state are there once, for all."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from tokenloop.runner.engines.tensors import (
    ALONE,
    check_torch,
    explained,
    find_device,
    load_tensors,
)
from tokenloop.runner.engines.torch_memory import TorchMemory
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.program import GREEDY, Choice, Program, Selected
from tokenloop.runner.ranks import Place
from tokenloop.runner.transfers import Transfers


class InductorProgram(Program):
    """The methods of a .pt2 on torch tensors, on a CPU. Selection writes the same two buffers
    whatever it chooses by."""

    has_logits = True

    def __init__(self, artifact: Artifact, threads: int | None = None, place: Place = ALONE):
        """Load weights and methods. `threads` is how many compute. Of several ranks this is the one
        of `place`.

        Errors: RunnerError for a package of another torch or processor, and weights that do not
        fit it.
        """
        self._artifact, self.manifest = artifact, artifact.manifest
        check_torch(artifact)
        device = find_device(artifact)
        if threads is not None:
            torch.set_num_threads(threads)
        self.transfers = Transfers(TorchMemory(device))
        if place.count > 1:
            from tokenloop.runner.engines.ranks import Ranks

            self.ranks = Ranks(place, self.transfers.between_ranks)
        batch = self.manifest["batch"]
        with explained(artifact):
            self.constants = load_tensors(artifact, device, place)
            self.state = {e["name"]: [self.constants[e["name"]]] for e in self.manifest["state"]}
            self.embeds = "embed" in self.manifest["methods"]
            names = ["prefill", "decode_embedded", "greedy", "embed"]
            names += ["greedy_row"] * (batch > 1)
            self._methods = {name: self._load(name) for name in names}
        # The two buffers. Rows without a sequence are fed what is there, which must be a token.
        self._buffers = [torch.zeros(batch, 1, dtype=torch.int64) for _ in range(2)]
        self._row_id = self.empty(1, 1)

    def load_sampling(self, method: str, embed: bool) -> None:
        for name in self._artifact.sampling_methods(self.manifest["methods"], method, False):
            self._method(name)

    def load_change(self, method: str) -> None:
        self._method(f"{method}_row")

    def prefill(self, tokens: Tensor, positions: Tensor, *row: Tensor) -> Tensor:
        return self._call("prefill", tokens, positions, *row).contiguous()

    def decode(self, fed: Tensor, positions: Tensor) -> Tensor:
        hidden = fed if self.embedding else self._call("embed", fed)
        # Other methods take rows that follow one another. Those of ranks that do not divide the
        # vocabulary have what stands for no token between them.
        self.logits = self._call("decode_embedded", hidden, positions).contiguous()
        return self.logits

    def select(self, logits: Tensor, buffer: int, choice: Choice = GREEDY) -> Selected:
        self._change(logits, choice)
        token = self._buffers[buffer]
        self._call(choice.method, logits, *choice.inputs, token)
        return Selected(token, self.feed(token, buffer))

    def select_row(self, logits: Tensor, choice: Choice) -> Tensor:
        self._change(logits, choice)
        self._call(f"{choice.method}_row", logits, *choice.inputs, self._row_id)
        return self._row_id

    def _change(self, logits: Tensor, choice: Choice) -> None:
        """Change the logits in place. Rows without a change are not touched."""
        for method, rows in choice.changes:
            for row, inputs in rows.items():
                self._call(f"{method}_row", logits[row : row + 1], *inputs)

    def feed(self, token: Tensor, buffer: int) -> Tensor:
        return self._call("embed", token) if self.embedding else token

    def next_id(self, buffer: int) -> Tensor:
        return self._buffers[buffer]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    def _method(self, name: str) -> Callable:
        """The method, which is loaded when it is first needed, if not before."""
        if name not in self._methods:
            with explained(self._artifact):
                self._methods[name] = self._load(name)
        return self._methods[name]

    def _load(self, name: str) -> Callable:
        path = str(self._artifact.checked("program"))
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
        outputs = self._method(name)(list(inputs))
        if self.ranks is not None:
            self.ranks.check()
        return outputs[0] if outputs else None
