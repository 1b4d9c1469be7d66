"""Every copy between host and device, or within the device, is made here and counted.

On the CPU "the device" is NumPy arrays that the runner owns: an upload still copies, so that the
counts mean the same on every engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Copies:
    """How many copies were made in one direction, and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, array: np.ndarray) -> None:
        self.count += 1
        self.bytes += array.nbytes

    def since(self, earlier: "Copies") -> "Copies":
        return Copies(self.count - earlier.count, self.bytes - earlier.bytes)


@dataclass
class Transfers:
    """Makes copies and counts them by direction, since the program was loaded."""

    host_to_device: Copies = field(default_factory=Copies)
    device_to_device: Copies = field(default_factory=Copies)
    device_to_host: Copies = field(default_factory=Copies)

    def upload(self, values: Sequence | np.ndarray, dtype: type = np.int64) -> np.ndarray:
        """A copy of numbers, nested or not, as int64 or another type in device memory."""
        array = np.array(values, dtype)
        self.host_to_device.add(array)
        return array

    def copy(self, source: np.ndarray, destination: np.ndarray) -> None:
        """Copy within device memory, between arrays of one shape and type."""
        destination[...] = source
        self.device_to_device.add(source)

    def download(self, values: np.ndarray) -> list[int]:
        """The numbers of an int64 array, of any shape, on the host."""
        self.device_to_host.add(values)
        return values.ravel().tolist()

    def snapshot(self) -> "Transfers":
        """The counts as they are now."""
        return self.since(Transfers())

    def since(self, earlier: "Transfers") -> "Transfers":
        """The counts of what was copied after `earlier`, a snapshot."""
        return Transfers(
            self.host_to_device.since(earlier.host_to_device),
            self.device_to_device.since(earlier.device_to_device),
            self.device_to_host.since(earlier.device_to_host),
        )

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Counts and bytes by direction."""
        return {name: vars(getattr(self, name)) for name in self.__dataclass_fields__}
