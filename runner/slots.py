"""The rows of a batch: which sequence each runs, and the arrays on the device that say so."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from tokenloop.runner.request import Request
from tokenloop.runner.transfers import Transfers

# What `sample` takes between the logits and the positions, each [B].
PARAMETERS = {
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float32,
    "seed": np.int64,
}


def selection_name(sampled: bool, embed: bool = False) -> str:
    """The method that chooses tokens and, with `embed`, looks up their embeddings."""
    return ("sample" if sampled else "greedy") + ("_embed" if embed else "")


class Sequence(Protocol):
    """What the loop needs of a sequence. It has a `finish_reason` as soon as whoever reads the
    tokens has given it one, and ends there."""

    prompt_ids: list[int]
    limit: int
    request: Request
    finish_reason: str | None


class Rows:
    """The `count` rows of one run of the loop, of which the first `used` take sequences.

    A row without a sequence, or whose sequence needs no more steps, is idle: it computes along at
    position 0, and nobody reads what comes of it. That spoils nothing, and neither does a step
    too many after an end token: a sequence that takes the row later sees only what it wrote itself
    at the positions before its own.
    """

    def __init__(
        self,
        count: int,
        used: int,
        table: np.ndarray,
        transfers: Transfers,
        positions_from_host: bool = False,
        slots: dict[str, Any] | None = None,
    ):
        """`table` has the positions from 0 on, int64, on the device. What goes up goes to `slots`,
        memory by the names "lines" (of positions) and those of PARAMETERS, where there is any."""
        self._used, self._table, self._transfers = used, table, transfers
        self._slots = slots or {}
        self._from_host = positions_from_host
        self._sequences: list[Sequence | None] = [None] * count
        # Of each row's sequence: tokens whose computation was submitted.
        self._submitted = [0] * count
        # Lines of positions for the steps to come, unless a sequence joins or leaves early.
        self._schedule: Iterator[np.ndarray] | None = None
        self._values: dict[str, list] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._members_changed = True

    def join(self, waiting: Iterator[Sequence]) -> list[tuple[int, Sequence]]:
        """Give the free rows to sequences that wait; the rows that now need a first token."""
        joined = []
        for row in range(self._used):
            if self._sequences[row] is None and (sequence := next(waiting, None)) is not None:
                self._sequences[row], self._submitted[row] = sequence, 1
                self._schedule, self._members_changed = None, True
                joined.append((row, sequence))
        return joined

    def leave(self, row: int) -> None:
        """Free the row of a sequence that is finished."""
        if self._runs(row):
            self._schedule = None
        self._sequences[row], self._members_changed = None, True

    def occupied(self) -> list[tuple[int, Sequence]]:
        """The rows that have a sequence, in their order."""
        return [(row, s) for row, s in enumerate(self._sequences) if s is not None]

    def need_a_step(self) -> bool:
        """Whether any sequence has more tokens to come than are submitted."""
        return any(map(self._runs, range(self._used)))

    def next_step(self) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Of the next step: positions int64 [B], and what `sample` takes after the logits, or
        nothing where all that run are greedy."""
        count, sampled = len(self._sequences), False
        starts, steps = [0] * count, [0] * count
        for row in range(self._used):
            if self._runs(row):
                sequence, submitted = self._sequences[row], self._submitted[row]
                starts[row] = len(sequence.prompt_ids) + submitted - 1
                steps[row] = sequence.limit - submitted
                sampled = sampled or sequence.request.temperature > 0
                self._submitted[row] += 1
        positions = self._positions(starts, steps)
        return positions, (*self._parameters(), positions) if sampled else ()

    def first_step(self, row: int, position: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `sample_row` takes after the logits of a row's prompt, or nothing where the row is
        greedy. `position` int64 [1] is the prompt's last."""
        if self._sequences[row].request.temperature == 0:
            return ()
        return *(array[row : row + 1] for array in self._parameters()), position

    def _runs(self, row: int) -> bool:
        sequence = self._sequences[row]
        return sequence is not None and self._submitted[row] < sequence.limit

    def _positions(self, starts: list[int], steps: list[int]) -> np.ndarray:
        """The next step's, of rows that begin at `starts` and run for so many `steps`."""
        if self._from_host:
            return self._transfers.upload(starts)
        if len(starts) == 1:
            # ExecuTorch's CPU kernels take a view of the table as it is: not even a copy.
            return self._table[starts[0] : starts[0] + 1]
        if self._schedule is None:
            line = np.arange(max(steps))[:, None]
            lines = np.where(line < np.array(steps), np.array(starts) + line, 0)
            self._schedule = iter(self._transfers.upload(lines, out=self._slots.get("lines")))
        return next(self._schedule)

    def _parameters(self) -> list[np.ndarray]:
        """The four arrays, of which those go up that changed. A row without a sequence is greedy,
        which costs least."""
        if not self._members_changed:
            return list(self._arrays.values())
        self._members_changed = False
        for name, dtype in PARAMETERS.items():
            default = getattr(Request, name)
            values = self._values.get(name) or [default] * len(self._sequences)
            wanted = list(values)
            for row, sequence in enumerate(self._sequences):
                temperature = sequence.request.temperature if sequence else 0
                if name == "temperature":
                    wanted[row] = temperature
                elif temperature > 0:
                    wanted[row] = getattr(sequence.request, name)
            if name not in self._arrays or wanted != values:
                self._values[name] = wanted
                self._arrays[name] = self._transfers.upload(wanted, dtype, self._slots.get(name))
        return list(self._arrays.values())
