"""The slots of a batch: which sequence runs in each row, and what the device is told of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenloop.runner.changes import Changes
from tokenloop.runner.decisions import Decisions
from tokenloop.runner.program import GREEDY, PARAMETERS, Choice, Program, Step, selection_method
from tokenloop.runner.request import Request
from tokenloop.runner.sequence import Sequence

# Lines of positions go up for so many steps at most, so that a sequence that joins costs little
# however many tokens are to come.
MOST_LINES = 512


class Slots:
    """The rows of one run of the loop, of which the first `used` take sequences.

    A sequence joins, begins once its prompt is prefilled, and leaves. A row is idle when it has no
    sequence that has begun, or one that needs no more steps. It computes along at position 0, and
    nobody reads what comes of it. That spoils nothing, and neither does a step too many after an
    end token: a sequence that takes the row later sees only what it wrote itself at the positions
    before its own. A row whose prompt is prefilled in part computes along where the next chunk
    begins, which overwrites it.
    """

    def __init__(
        self, program: Program, used: int, table: Any, positions_from_host: bool,
        decisions: Decisions,
    ):  # fmt: skip
        """`table` int64 [N] has the positions from 0 on, on the device."""
        self._decisions = decisions
        self._program, self._used, self._table = program, used, table
        self._from_host = positions_from_host
        count = program.manifest["batch"]
        self._sequences: list[Sequence | None] = [None] * count
        # Of each row's sequence: whether it has begun, tokens whose computation was submitted, and
        # how much of the prompt is prefilled while it has not begun.
        self._begun = [False] * count
        self._submitted = [0] * count
        self._prefilled = np.zeros(count, np.int64)
        # Lines of positions for the steps to come, and the next one's number. They hold until a
        # sequence joins or leaves early; those of a single row are the table, and always hold.
        # While a prompt waits for its next chunk, which moves on with every step, there is one.
        self._lines = table[:, None] if count == 1 else None
        self._line = 0
        self._values: dict[str, list] = {}
        self._parameters: dict[str, Any] = {}
        self._members_changed = True
        # Of the step that is under way: its rows that run.
        self._running: dict[int, Sequence] = {}
        self._changes = Changes(program)

    def join(self, waiting: Iterator[Sequence]) -> list[tuple[int, Sequence]]:
        """Give the free rows to sequences that wait; the rows that now need a first token."""
        joined = []
        for row in range(self._used):
            if self._sequences[row] is None and (sequence := next(waiting, None)) is not None:
                self._sequences[row], self._submitted[row] = sequence, 1
                self._members_changed = True
                joined.append((row, sequence))
        return joined

    def wait(self, row: int, prefilled: int) -> None:
        """Let a row wait whose prompt is prefilled in part, up to the position `prefilled`."""
        self._prefilled[row] = prefilled
        self._forget_lines()

    def begin(self, row: int) -> None:
        """Let a row run that has a first token."""
        self._begun[row] = True
        self._prefilled[row] = 0
        self._forget_lines()

    def leave(self, row: int) -> None:
        """Free the row of a sequence that is finished."""
        if self._runs(row):
            self._forget_lines()
        self._sequences[row], self._members_changed = None, True
        self._begun[row], self._prefilled[row] = False, 0

    def occupied(self) -> list[tuple[int, Sequence]]:
        """The rows that have a sequence, in their order."""
        return [(row, s) for row, s in enumerate(self._sequences) if s is not None]

    def begun(self) -> list[tuple[int, Sequence]]:
        """Those of them that have a first token."""
        return [(row, sequence) for row, sequence in self.occupied() if self._begun[row]]

    def waiting(self) -> list[tuple[int, Sequence]]:
        """Those of them that have none yet."""
        return [(row, sequence) for row, sequence in self.occupied() if not self._begun[row]]

    def want_logprobs(self) -> list[tuple[int, int]]:
        """The rows whose next step's log probabilities are asked for, each with the number of
        alternatives."""
        found = [(row, s.request.logprobs) for row, s in self.begun() if self._runs(row)]
        return [(row, count) for row, count in found if count is not None]

    def restricted(self) -> bool:
        """Whether a row that has begun needs its newest token before the next one is chosen."""
        return any(sequence.restriction is not None for _, sequence in self.begun())

    def see(self, row: int, token_id: int) -> None:
        """Let the row's restriction follow its newest token, if it has one."""
        sequence = self._sequences[row]
        if sequence.restriction is not None and not self._decisions.ended(sequence):
            sequence.restriction.see(token_id)
            self._end_if_faulty(sequence)

    def need_a_step(self) -> bool:
        """Whether any sequence has more tokens to come than are submitted."""
        return any(map(self._runs, range(self._used)))

    def sequence(self, row: int) -> Sequence:
        """The sequence of a row that has one."""
        return self._sequences[row]

    def first_choice(self, row: int) -> Choice:
        """How the row's first token is chosen, after the last position of its prompt."""
        sequence = self._sequences[row]
        last = len(sequence.prompt_ids) - 1
        choice = self._choice([sequence.request], self._table[last : last + 1], row)
        if sequence.restriction is None:
            return choice
        changes = self._changes.first(row, sequence.restriction)
        self._end_if_faulty(sequence)
        return choice._replace(changes=changes)

    def next_step(self) -> Step:
        """What the next step is given, if no row that runs is restricted."""
        step = self.next_positions()
        return step._replace(choice=self.next_choice(step.positions))

    def next_positions(self) -> Step:
        """What the next step is given but for the choice, which `next_choice` then gives."""
        running = {row: s for row, s in self.occupied() if self._runs(row)}
        starts, steps = self._prefilled.copy(), np.zeros(len(self._sequences), np.int64)
        for row, sequence in running.items():
            starts[row] = len(sequence.prompt_ids) + self._submitted[row] - 1
            steps[row] = sequence.limit - self._submitted[row]
            self._submitted[row] += 1
        self._running = running
        if self._from_host:
            line, positions = None, self._program.transfers.upload(starts)
        else:
            line = self._next_line(starts, steps)
            positions = self._lines[line]
        return Step(positions, line, GREEDY)

    def next_choice(self, positions: Any) -> Choice:
        """How the step at these positions chooses tokens, as far as tokens have been seen."""
        choice = self._choice([s.request for s in self._running.values()], positions)
        restrictions = {r: s.restriction for r, s in self._running.items() if s.restriction}
        if not restrictions:
            return choice
        changes = self._changes.of(restrictions)
        for row in restrictions:
            self._end_if_faulty(self._running[row])
        return choice._replace(changes=changes)

    def _end_if_faulty(self, sequence: Sequence) -> None:
        if sequence.restriction.fault is not None and sequence.finish_reason is None:
            sequence.refuse(sequence.restriction.fault)

    def _runs(self, row: int) -> bool:
        return self._begun[row] and self._submitted[row] < self._sequences[row].limit

    def _forget_lines(self) -> None:
        if len(self._sequences) > 1:
            self._lines = None

    def _next_line(self, starts: np.ndarray, steps: np.ndarray) -> int:
        """The number of the next step's line, of rows int64 [B] that begin at `starts` and run for
        so many `steps`."""
        if len(starts) == 1:
            return int(starts[0])
        if self._lines is None or self._line == len(self._lines):
            count = 1 if self._prefilled.any() else min(steps.max(), MOST_LINES)
            ahead = np.arange(count)[:, None]
            lines = np.where(ahead < steps, starts + ahead, self._prefilled)
            out = self._program.step_inputs.get("lines")
            self._lines, self._line = self._program.transfers.upload(lines, out=out), 0
        self._line += 1
        return self._line - 1

    def _choice(self, requests: list[Request], positions: Any, row: int | None = None) -> Choice:
        """How the tokens of these requests are chosen, in all rows or in one alone."""
        method = selection_method(requests, self._program.manifest)
        if method == "greedy":
            return GREEDY
        self._upload_parameters()
        arrays = self._parameters.values()
        if row is not None:
            arrays = [array[row : row + 1] for array in arrays]
        return Choice(method, (*arrays, positions))

    def _upload_parameters(self) -> None:
        """Bring the arrays of PARAMETERS up to date: those go up that changed. A row without a
        sequence is greedy, which costs least."""
        if not self._members_changed:
            return
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
            if name not in self._parameters or wanted != values:
                self._values[name] = wanted
                out = self._program.step_inputs.get(name)
                self._parameters[name] = self._program.transfers.upload(wanted, dtype, out)
