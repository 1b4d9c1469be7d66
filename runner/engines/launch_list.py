"""A program for CUDA: compiled kernels, and for each method the list of their launches.

export/launches/launch_file.py writes the file, a zip archive of program.json and of *.cubin. An
argument of a launch is a number, or an address: [memory, which, bytes after its beginning].
"""

import json
import zipfile
from collections.abc import Mapping
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver
from torch import Tensor

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact

# Beyond this a kernel must be allowed to have so much shared memory.
STATIC_SHARED = 48 * 1024
# Bytes that the workspace leaves to graphs, outputs and the driver.
KEPT_FREE = 256 * 2**20


def call(function: Any, *arguments: Any) -> Any:
    """What a driver function gives besides its status. Errors: RuntimeError for a failure."""
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return results[0] if results else None


class LaunchList:
    """The methods of a file. All share one workspace, and each has outputs of its own."""

    def __init__(self, artifact: Artifact, tensors: Mapping[str, Tensor], device: torch.device):
        """Load the kernels. `tensors` are the weights and the state by name, on the device.

        Errors: RunnerError for a file that is damaged, and a tensor that is not there. RuntimeError
        for a kernel that the driver refuses.
        """
        path = artifact.program_file
        self._tensors, self._device, self._path = tensors, device, path
        data = BytesIO(artifact.read(path.name))
        try:
            with zipfile.ZipFile(data) as archive:
                program = json.loads(archive.read("program.json"))
                codes = {name: archive.read(name) for name in archive.namelist()}
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise RunnerError(f"{path} is damaged ({error}): export it again") from None
        torch.cuda.init()
        self._modules = []
        self._kernels = [self._load(entry, codes[entry["file"]]) for entry in program["kernels"]]
        self._entries = program["methods"]
        self._workspace: Tensor | None = None

    def keep_what_fits(self, prefix: str, ranks: Any = None) -> list[int]:
        """The sizes N of methods `prefix`N, in ascending order, but for those whose workspace does
        not fit the GPU's free memory, or that of another of the `ranks`. The smallest is always
        among them."""
        entries = {
            int(name.removeprefix(prefix)): entry
            for name, entry in self._entries.items()
            if name.startswith(prefix)
        }
        free, _ = torch.cuda.mem_get_info(self._device)
        room = free - KEPT_FREE
        kept = [n for n in sorted(entries) if entries[n]["workspace"] <= room] or [min(entries)]
        if ranks is not None:
            kept = min(ranks.all(kept), key=len)
        for size in entries.keys() - kept:
            del self._entries[f"{prefix}{size}"]
        return kept

    def method(self, name: str) -> "Method":
        """A method, ready to be launched. Errors: RunnerError for one that is not there."""
        if name not in self._entries:
            raise RunnerError(f"{self._path} has no method {name}: export it again")
        if self._workspace is None:
            size = max(1, *(entry["workspace"] for entry in self._entries.values()))
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
        return Method(self._entries[name], self._kernels, self._bases(name), self._device)

    def inputs(self, name: str) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shapes and dtypes of a method's inputs by name."""
        inputs = self._entries[name]["inputs"]
        return {x["name"]: (x["shape"], getattr(torch, x["dtype"])) for x in inputs}

    def _bases(self, name: str) -> dict[str, int]:
        found = {"": self._workspace.data_ptr()}
        for needed in self._entries[name]["tensors"]:
            if needed not in self._tensors:
                raise RunnerError(
                    f"{self._path}: {name} needs the tensor {needed}, which neither the weights "
                    "nor the manifest's state have: export it again"
                )
            found[needed] = self._tensors[needed].data_ptr()
        return found

    def _load(self, entry: dict, code: bytes) -> tuple[int, int, int]:
        """A kernel's function, threads of a program, and bytes of its shared memory."""
        module = call(driver.cuModuleLoadData, code)
        function = call(driver.cuModuleGetFunction, module, entry["symbol"].encode())
        self._modules.append(module)
        attribute = driver.CUfunction_attribute
        if entry["shared"] > STATIC_SHARED:
            largest = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver.cuFuncSetAttribute, function, largest, entry["shared"])
        # A capture may not load a kernel, and drivers put that off until one is needed.
        call(driver.cuFuncLoad, function)
        return function, 32 * entry["warps"], entry["shared"]


class Method:
    """A method's launches, with the addresses of what they read and write."""

    def __init__(
        self, entry: dict, kernels: list[tuple[Any, int, int]], bases: Mapping[str, int],
        device: torch.device,
    ):  # fmt: skip
        """`bases` are addresses by tensor name, and "" is the workspace's."""
        self.outputs = tuple(
            torch.zeros(x["shape"], dtype=getattr(torch, x["dtype"]), device=device)
            for x in entry["outputs"]
        )
        owned = [x.data_ptr() for x in self.outputs]
        launches = entry["launches"]
        total = sum(len(arguments) for _, _, arguments in launches)
        # Every argument has a word, and the driver is given the words' addresses.
        self._words = np.zeros(total, np.uint64)
        self._addresses = self._words.ctypes.data + 8 * np.arange(total, dtype=np.uint64)
        begin, words = self._addresses.ctypes.data, []
        # Words that are addresses within an input: the input, the word, and bytes.
        self._of_inputs: list[tuple[int, int, int]] = []
        self._launches = []
        for kernel, grid, arguments in launches:
            self._launches.append((*kernels[kernel], grid, begin + 8 * len(words)))
            for argument in arguments:
                if isinstance(argument, int):
                    words.append(argument & (2**64 - 1))
                    continue
                memory, which, offset = argument
                if memory == "input":
                    self._of_inputs.append((which, len(words), offset))
                    words.append(0)
                elif memory == "output":
                    words.append(owned[which] + offset)
                else:
                    words.append(bases[which] + offset)
        self._words[:] = words
        self._sizes = [prod(x["shape"]) for x in entry["inputs"]]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Launch on torch's current stream with these inputs, contiguous, which are read and
        written where they are. The outputs are the same tensors every time."""
        assert [x.numel() for x in inputs] == self._sizes
        for i, word, offset in self._of_inputs:
            self._words[word] = inputs[i].data_ptr() + offset
        stream = torch.cuda.current_stream().cuda_stream
        launch, success = driver.cuLaunchKernel, driver.CUresult.CUDA_SUCCESS
        for function, threads, shared, (x, y, z), arguments in self._launches:
            (status,) = launch(function, x, y, z, threads, 1, 1, shared, stream, arguments, 0)
            if status != success:
                raise RuntimeError(f"a kernel cannot be launched: {status.name}")
        return self.outputs
