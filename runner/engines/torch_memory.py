"""Device memory of an engine that computes on torch tensors, on the CPU or a CUDA GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenloop.runner.transfers import Transfers

ALIGNMENT = 16


class TorchMemory:
    """The memory that Transfers copies. On CUDA everything happens on one stream, except for
    prefetched reads, which have another one: they wait for what was submitted before them, and what
    is submitted after them does not wait for them."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None):
        """`stream` is the device's stream to use, by default one of its own."""
        self.device = device
        if stream is None and device.type == "cuda":
            stream = torch.cuda.Stream(device)
        self.stream = stream
        self._reads = torch.cuda.Stream(device) if self.stream else None
        # Pinned buffers and events that are free, by shape, and those that have been read into, by
        # the address of what was read.
        self._pinned: dict[tuple[int, ...], list[tuple[Tensor, torch.cuda.Event]]] = {}
        self._fetched: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def new(self, array: np.ndarray) -> Tensor:
        """As HostMemory.new."""
        if self.stream is None:
            return torch.from_numpy(array)
        with torch.cuda.stream(self.stream):
            return pinned(array).to(self.device, non_blocking=True)

    def copy(self, source: Tensor | np.ndarray, destination: Tensor) -> None:
        """As HostMemory.copy."""
        if isinstance(source, np.ndarray):
            source = torch.from_numpy(source) if self.stream is None else pinned(source)
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """As HostMemory.copy_all. On a GPU a launch copies many tensors of one type."""
        by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            by_type.setdefault(pair[0].dtype, []).append(pair)
        with torch.cuda.stream(self.stream):
            for same in by_type.values():
                sources, destinations = zip(*same)
                torch._foreach_copy_(destinations, sources)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """As HostMemory.empty."""
        with torch.cuda.stream(self.stream):
            try:
                return torch.empty(shape, dtype=like.dtype, device=self.device)
            except RuntimeError as error:  # of a GPU OutOfMemoryError, which is one
                raise MemoryError(str(error)) from None

    def gather(self, pool: Tensor, numbers: Tensor, destination: Tensor) -> None:
        """As HostMemory.gather."""
        with torch.cuda.stream(self.stream):
            torch.index_select(pool, 0, numbers, out=destination)

    def scatter(self, source: Tensor, pool: Tensor, numbers: Tensor) -> None:
        """As HostMemory.scatter."""
        with torch.cuda.stream(self.stream):
            pool.index_copy_(0, numbers, source)

    def read_bytes(self, array: Tensor) -> np.ndarray:
        """As HostMemory.read_bytes."""
        with torch.cuda.stream(self.stream):
            return array.flatten().view(torch.uint8).to("cpu", copy=True).numpy()

    def write_bytes(self, data: np.ndarray, array: Tensor) -> None:
        """As HostMemory.write_bytes."""
        # Not of memory that may not be written, which torch warns of.
        values = torch.from_numpy(data.copy()).view(array.dtype).reshape(array.shape)
        with torch.cuda.stream(self.stream):
            array.copy_(values)

    def prefetch(self, values: Tensor) -> None:
        """As HostMemory.prefetch."""
        if self.stream is None:
            return
        free = self._pinned.setdefault(tuple(values.shape), [])
        if not free:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            free.append((buffer, torch.cuda.Event()))
        buffer, event = free.pop()
        self._reads.wait_stream(self.stream)
        with torch.cuda.stream(self._reads):
            buffer.copy_(values, non_blocking=True)
            event.record()
        # It may be given up before it is read; its memory may not be another's until then.
        values.record_stream(self._reads)
        self._fetched[values.data_ptr()] = buffer, event

    def read(self, values: Tensor) -> list[int]:
        """As HostMemory.read."""
        if self.stream is None:
            return values.flatten().tolist()
        if values.data_ptr() not in self._fetched:
            self.prefetch(values)
        buffer, event = self._fetched.pop(values.data_ptr())
        event.synchronize()
        numbers = buffer.flatten().tolist()
        self._pinned[tuple(buffer.shape)].append((buffer, event))
        return numbers


def pinned(array: np.ndarray) -> Tensor:
    """A copy of a host array from which numbers go up to a GPU without the host waiting for what
    was submitted before. From other memory they do not: then the device would have nothing to do
    until the host has submitted the next step. torch keeps the memory of such a tensor that is gone
    until copies from it are done, and then for the next one of about that size."""
    values = torch.from_numpy(array)
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)


class Aligned:
    """Makes a method's inputs fit compiled kernels. On a GPU these take addresses that ALIGNMENT
    divides, and a view can begin at another one: it is copied. A copy is valid until the next of
    its shape and type in its place among the inputs."""

    def __init__(self, transfers: Transfers, is_cuda: bool):
        self._transfers, self._is_cuda = transfers, is_cuda
        self._copies: dict[tuple, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if not self._is_cuda:
            return list(inputs)
        return [self._aligned(place, tensor) for place, tensor in enumerate(inputs)]

    def _aligned(self, place: int, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() % ALIGNMENT == 0:
            return tensor
        key = (place, *tensor.shape, tensor.dtype)
        if key not in self._copies:
            self._copies[key] = torch.empty_like(tensor)
        self._transfers.copy(tensor, self._copies[key])
        return self._copies[key]
