"""Every copy between host and device, or within the device, is made here and counted.

On the CPU "the device" is memory that the runner owns: an upload still copies, so that the counts
mean the same on every engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Copies:
    """How many copies were made in one direction, and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, array: Any) -> None:
        self.count += 1
        self.bytes += array.nbytes


class HostMemory:
    """Device memory of an engine that computes on NumPy arrays. An engine that computes on torch
    tensors has engines/torch_memory.py."""

    def new(self, array: np.ndarray) -> np.ndarray:
        """Device memory with the contents of a host array that nobody else has."""
        return array

    def copy(self, source: np.ndarray, destination: np.ndarray) -> None:
        """Fill device memory from a host array or from device memory."""
        destination[...] = source

    def copy_all(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """As `copy` for pairs of source and destination within device memory, which do not depend
        on one another."""
        for source, destination in pairs:
            destination[...] = source

    def empty(self, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        """Device memory of that shape, and of the type of `like`."""
        return np.empty(shape, like.dtype)

    def gather(self, pool: np.ndarray, numbers: np.ndarray, destination: np.ndarray) -> None:
        """Fill destination [N, ...] with those of pool [M, ...] that have the numbers [N]."""
        destination[...] = pool[numbers]

    def scatter(self, source: np.ndarray, pool: np.ndarray, numbers: np.ndarray) -> None:
        """Copy source [N, ...] to those of pool [M, ...] that have the numbers [N]."""
        pool[numbers] = source

    def read_bytes(self, array: np.ndarray) -> np.ndarray:
        """The bytes uint8 [N] of an array, on the host."""
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()

    def write_bytes(self, data: np.ndarray, array: np.ndarray) -> None:
        """Fill an array with what `read_bytes` gave of one like it."""
        array[...] = data.view(array.dtype).reshape(array.shape)

    def prefetch(self, values: np.ndarray) -> None:
        """Begin to read device memory as it is after all that was submitted until now."""

    def read(self, values: np.ndarray) -> list[int]:
        """The numbers on the host, as they were when they were prefetched, or else now."""
        return values.ravel().tolist()


class Transfers:
    """Makes copies and counts them by direction, since the program was loaded."""

    DIRECTIONS = ("host_to_device", "device_to_device", "device_to_host")

    def __init__(self, memory: Any = None):
        """`memory` is the engine's, HostMemory or one with its methods."""
        self._memory = memory or HostMemory()
        self.host_to_device, self.device_to_device, self.device_to_host = (
            Copies() for _ in self.DIRECTIONS
        )
        # What came from other ranks. The program counts it; there is none where it runs alone.
        self.between_ranks = Copies()

    def upload(self, values: Sequence | np.ndarray, dtype: type = np.int64, out: Any = None) -> Any:
        """A copy of numbers, nested or not, as int64 or another type in device memory: of its own,
        or at the beginning of `out`."""
        array = np.array(values, dtype)
        self.host_to_device.add(array)
        if out is None:
            return self._memory.new(array)
        out = out[: len(array)]
        self._memory.copy(array, out)
        return out

    def send(self, staging: Any, count: int) -> None:
        """Copy the first `count` numbers of a buffer for uploads (engines/staging.py) to the device
        memory that it is for."""
        self.host_to_device.add(staging.send(count))

    def copy(self, source: Any, destination: Any) -> None:
        """Copy within device memory, between arrays of one shape and type."""
        self._memory.copy(source, destination)
        self.device_to_device.add(source)

    def copy_all(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """As `copy` for pairs of source and destination that do not depend on one another."""
        self._memory.copy_all(pairs)
        for source, _ in pairs:
            self.device_to_device.add(source)

    def room(self, shape: tuple[int, ...], like: Any) -> Any:
        """Device memory of that shape for copies of what has the type of `like`."""
        return self._memory.empty(shape, like)

    def gather(self, pool: Any, numbers: Any, destination: Any) -> None:
        """As HostMemory.gather, within device memory: one copy."""
        self._memory.gather(pool, numbers, destination)
        self.device_to_device.add(destination)

    def scatter(self, source: Any, pool: Any, numbers: Any) -> None:
        """As HostMemory.scatter, within device memory: one copy."""
        self._memory.scatter(source, pool, numbers)
        self.device_to_device.add(source)

    def read_bytes(self, array: Any) -> np.ndarray:
        """As HostMemory.read_bytes."""
        self.device_to_host.add(array)
        return self._memory.read_bytes(array)

    def write_bytes(self, data: np.ndarray, array: Any) -> None:
        """As HostMemory.write_bytes."""
        self.host_to_device.add(data)
        self._memory.write_bytes(data, array)

    def prefetch(self, values: Any) -> None:
        """Begin to read these values as they are after all that was submitted until now. Their next
        `download` gives that."""
        self._memory.prefetch(values)

    def download(self, values: Any) -> list[int]:
        """The numbers of an int64 array, of any shape, on the host."""
        self.device_to_host.add(values)
        return self._memory.read(values)

    def snapshot(self) -> tuple[int, ...]:
        """The counts as they are now, count and bytes by direction, and of what came from other
        ranks. It is taken with each token."""
        up, within, down = self.host_to_device, self.device_to_device, self.device_to_host
        counts = up.count, up.bytes, within.count, within.bytes, down.count, down.bytes
        return *counts, self.between_ranks.count, self.between_ranks.bytes

    def since(
        self, earlier: tuple[int, ...], later: tuple[int, ...] | None = None
    ) -> "Transfers":  # fmt: skip
        """The counts of what was copied between two snapshots, by default until now."""
        difference = Transfers(self._memory)
        counts = [b - a for a, b in zip(earlier, later or self.snapshot())]
        for i, name in enumerate((*self.DIRECTIONS, "between_ranks")):
            setattr(difference, name, Copies(*counts[2 * i : 2 * i + 2]))
        return difference

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Counts and bytes by direction."""
        names = [*self.DIRECTIONS] + ["between_ranks"] * bool(self.between_ranks.count)
        return {name: dict(vars(getattr(self, name))) for name in names}
