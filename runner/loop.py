"""The loop: tokens go from method to method in place, and the host only reads them."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from runner.executorch_program import ExecuTorchProgram
from runner.rows import Rows, Sequence
from runner.transfers import Transfers


@dataclass(frozen=True)
class LoopOptions:
    """Variants of the loop, for comparison: all of them give the same tokens.

    `feed`: "alias" hands a method's output to the next method as its input, "host" uploads
    the tokens that the host has read. `positions`: "device" takes them from what went up when the
    program was loaded or a sequence joined, "host" uploads them for each call. `double_buffering`:
    step n + 1 is submitted before token n is read; impossible where the host feeds the token.
    """

    feed: str = "alias"
    positions: str = "device"
    double_buffering: bool = True


class Loop:
    """Drives one program of `batch` rows: in each one sequence at a time, from position 0 on.

    Nothing has to be reset between sequences: a method sees only what was written in its row at
    the positions before its own.
    """

    def __init__(self, program: ExecuTorchProgram, batch: int, max_seq_len: int, max_prefill: int):
        self.program, self.batch = program, batch
        self.max_seq_len, self.max_prefill = max_seq_len, max_prefill
        self.transfers = Transfers()
        # Since the program was loaded: decode steps, and seconds until first tokens were computed.
        self.steps, self.prefill_s = 0, 0.0
        # When the newest first token had been computed, by time.perf_counter.
        self.prefilled_at = 0.0
        # The rows' numbers, for `prefill`, are taken from it as well.
        self._table = self.transfers.upload(range(max(max_seq_len, batch)))

    def tokens(
        self, sequences: Iterable[Sequence], used: int, options: LoopOptions
    ) -> Iterator[tuple[Sequence, int]]:
        """The ids that follow the sequences' prompts, as they come, `used` sequences at a time.

        A sequence is taken when a row is free for it, and leaves when `limit` ids have come or it
        has a `finish_reason`; with double buffering a surplus step may by then have run, whose
        result is dropped. The caller keeps len(prompt_ids) + limit within max_seq_len, both being
        at least 1.
        """
        transfers, waiting = self.transfers, iter(sequences)
        ahead = options.double_buffering and options.feed == "alias"
        rows = Rows(self.batch, used, self._table, transfers, options.positions == "host")
        token, buffer, read = None, 0, [0] * self.batch
        while True:
            # 1. Sequences join: their first tokens lie beside the others' newest ones.
            for row, sequence in rows.join(waiting):
                start, read[row] = time.perf_counter(), 0
                logits, position = self._prefill(row, sequence.prompt_ids, options)
                sampling = rows.first_step(row, position)
                token = self._first(row, logits, sampling, token, buffer)
                self.prefilled_at = time.perf_counter()
                self.prefill_s += self.prefilled_at - start
            if not rows.occupied():
                return
            # 2. The next step is submitted, and then the tokens that it was fed are read.
            buffer, following = 1 - buffer, None
            if ahead and rows.need_a_step():
                following = self._step(rows, token, buffer)
            ids = transfers.download(token)
            # 3. Sequences that are finished leave.
            for row, sequence in rows.occupied():
                read[row] += 1
                if sequence.finish_reason is None:
                    yield sequence, ids[row]
                if sequence.finish_reason is not None or read[row] == sequence.limit:
                    rows.leave(row)
            if not ahead and rows.need_a_step():
                if options.feed == "host":
                    token = transfers.upload([[i] for i in ids])
                following = self._step(rows, token, buffer)
            token = following

    def _prefill(
        self, row: int, prompt_ids: list[int], options: LoopOptions
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [1, V] after the prompt, and its last position int64 [1]."""
        # The prompt goes up once; chunks are views of it.
        ids = self.transfers.upload([prompt_ids])
        where = (self._table[row : row + 1],) if self.batch > 1 else ()
        for start in range(0, ids.shape[1], self.max_prefill):
            chunk = ids[:, start : start + self.max_prefill]
            positions = self._table[start : start + chunk.shape[1]]
            if options.positions == "host":
                positions = self.transfers.upload(range(start, start + chunk.shape[1]))
            logits = self.program.prefill(chunk, positions, *where)
        return logits, positions[-1:]

    def _first(
        self,
        row: int,
        logits: np.ndarray,
        sampling: tuple[np.ndarray, ...],
        token: np.ndarray | None,
        buffer: int,
    ) -> np.ndarray:
        """`token` int64 [B, 1] with the row's first token: a next_id buffer, that one if there is
        none yet. Of one row it is what selection gives, without a copy."""
        if self.batch == 1:
            return self.program.select(logits, buffer, *sampling)
        if token is None:
            token = self.program.next_id(buffer)
        self.transfers.copy(self.program.select_row(logits, *sampling), token[row : row + 1])
        return token

    def _step(self, rows: Rows, token: np.ndarray, buffer: int) -> np.ndarray:
        """One more token of each row, in that next_id buffer."""
        positions, sampling = rows.next_step()
        self.steps += 1
        logits = self.program.decode(token, positions)
        return self.program.select(logits, buffer, *sampling)
