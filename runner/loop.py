"""The loop: the token goes from method to method in place, and the host only reads it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.executorch_program import ExecuTorchProgram
from runner.transfers import Transfers


@dataclass(frozen=True)
class LoopOptions:
    """Variants of the loop, for comparison: all of them give the same tokens.

    `feed`: "alias" hands a method's output to the next method as its input, "host" uploads
    the token that the host has read. `positions`: "device" takes them from the table that went up
    when the program was loaded, "host" uploads one for each call. `double_buffering`: step n + 1
    is submitted before token n is read; impossible where the host feeds the token.
    """

    feed: str = "alias"
    positions: str = "device"
    double_buffering: bool = True


class Loop:
    """Drives one program: one sequence at a time, from position 0 on.

    Nothing has to be reset between sequences: a method sees only what was written at the
    positions before its own.
    """

    def __init__(self, program: ExecuTorchProgram, max_seq_len: int, max_prefill: int):
        self.program = program
        self.max_seq_len, self.max_prefill = max_seq_len, max_prefill
        self.transfers = Transfers()
        # When the newest sequence's first token had been computed, by time.perf_counter.
        self.prefilled_at = 0.0
        self._table = self.transfers.upload(range(max_seq_len))

    def tokens(self, prompt: Sequence[int], limit: int, options: LoopOptions) -> Iterator[int]:
        """The ids that follow `prompt` (at least one id), at most `limit`, greedily chosen.

        The caller keeps len(prompt) + limit within max_seq_len, and stops reading at an end token;
        with double buffering a surplus step may by then have run.
        """
        transfers, program = self.transfers, self.program
        # 1. The prompt goes up once; chunks are views of it.
        ids = transfers.upload([prompt])
        for start in range(0, len(prompt), self.max_prefill):
            chunk = ids[:, start : start + self.max_prefill]
            logits = program.prefill(chunk, self._positions(start, chunk.shape[1], options))
        token = program.select(logits, 0)
        self.prefilled_at = time.perf_counter()

        # 2. Step n feeds token n and gives token n + 1, in the other buffer.
        for n in range(limit):
            position, more = len(prompt) + n, n + 1 < limit
            following = None
            if more and options.double_buffering and options.feed == "alias":
                following = self._step(token, position, n + 1, options)
            (read,) = transfers.download(token)
            yield read
            if more and following is None:
                if options.feed == "host":
                    token = transfers.upload([[read]])
                following = self._step(token, position, n + 1, options)
            token = following

    def _step(self, token, position: int, n: int, options: LoopOptions):
        logits = self.program.decode(token, self._positions(position, 1, options))
        return self.program.select(logits, n % 2)

    def _positions(self, start: int, count: int, options: LoopOptions):
        if options.positions == "host":
            return self.transfers.upload(range(start, start + count))
        # ExecuTorch's CPU kernels take a view of the table as it is: not even a copy.
        return self._table[start : start + count]
