"""A program whose device has a clock of its own: it says how long chunks and steps take, and the
host waits for it only where it reads tokens."""

from collections.abc import Callable

import numpy as np

from tests.threads import VOCABULARY, YieldingProgram
from tokenloop.runner.prefill import Part
from tokenloop.runner.program import Packing
from tokenloop.runner.transfers import HostMemory, Transfers

MULTIPLE = 4


class TimedMemory(HostMemory):
    def __init__(self, program: "TimedProgram"):
        self._program = program
        self._prefetched = 0.0

    def prefetch(self, values) -> None:
        self._prefetched = self._program.submitted_s

    def read(self, values) -> list[int]:
        self._program.reached_s = self._prefetched
        return super().read(values)


class TimedProgram(YieldingProgram):
    """Packed prompts, cut where MULTIPLE divides the position. `chunk_s` gives the seconds of a
    chunk, and a step takes `step_s`. The device has work until `submitted_s`, and the host knows
    that it has come to `reached_s`. `chunks` has the sizes of all chunks."""

    is_asynchronous = True

    def __init__(
        self, batch: int, chunk_s: Callable[[list[Part]], float], step_s: float,
        max_seq_len: int = 4096, capacity: int = 1024,
    ):  # fmt: skip
        super().__init__(batch, max_seq_len)
        self.packing = Packing(capacity, batch, MULTIPLE)
        self.transfers = Transfers(TimedMemory(self))
        self.chunk_s, self.step_s = chunk_s, step_s
        self.submitted_s = self.reached_s = 0.0
        self.chunks: list[int] = []

    def prefill_packed(self, chunk: list[Part]):
        logits = np.zeros((self.manifest["batch"], VOCABULARY), np.float32)
        for i, part in enumerate(chunk):
            end = part.first + len(part.ids)
            self._state[part.row, part.first : end] = part.ids
            logits[i] = self._logits(part.row, end - 1)
        self.chunks.append(sum(len(part.ids) for part in chunk))
        self.submitted_s += self.chunk_s(chunk)
        return logits

    def decode(self, fed, positions):
        self.submitted_s += self.step_s
        return super().decode(fed, positions)

    def mark(self) -> float:
        return self.submitted_s

    def seconds(self, begin: float, end: float) -> float | None:
        return end - begin if end <= self.reached_s else None
