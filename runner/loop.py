"""The loop: tokens go from method to method in place, and the host only reads them."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.slots import Rows, Sequence
from tokenloop.runner.transfers import Transfers

FEEDS = ("auto", "embed", "alias", "host")


@dataclass(frozen=True)
class LoopOptions:
    """Variants of the loop, for comparison: all of them give the same tokens.

    `feed`: "alias" hands a token, a method's output, to the next method as its input, "embed" in
    its stead the token's embedding, which selection has looked up, "host" uploads the tokens that
    the host has read; "auto" is "embed" where the artifact has the methods for it, else "alias".
    `positions`: "device" takes them from what went up when the
    program was loaded or a sequence joined, "host" uploads them for each call. `double_buffering`:
    the next steps are submitted before the newest tokens are read. `run_ahead`: how many steps are
    submitted at once, whose tokens are gathered on the device and read together. Both need a token
    that the host does not feed. `graph`: a step is one launch of a captured graph, where the
    program can be captured. `overlap`: the graph's kernels begin while the ones ahead of them end,
    where the artifact has kernels that can.
    """

    feed: str = "auto"
    positions: str = "device"
    double_buffering: bool = True
    run_ahead: int = 1
    graph: bool = True
    overlap: bool = True

    def __post_init__(self):
        if self.feed not in FEEDS:
            raise RunnerError(f"feed is {self.feed!r}; it must be one of {', '.join(FEEDS)}")
        if self.run_ahead < 1:
            raise RunnerError(f"run_ahead is {self.run_ahead}; it must be at least 1")
        if self.run_ahead > 1 and self.feed == "host":
            raise RunnerError(
                f"run_ahead is {self.run_ahead} and feed 'host': each step would wait for the host"
            )


class Loop:
    """Drives one program of `batch` rows: in each one sequence at a time, from position 0 on.

    Nothing has to be reset between sequences: a method sees only what was written in its row at
    the positions before its own.
    """

    def __init__(self, program: Any, batch: int, max_seq_len: int, max_prefill: int):
        """`program` is what runner.model.load_program gives."""
        self.program, self.batch = program, batch
        self.max_seq_len, self.max_prefill = max_seq_len, max_prefill
        self.transfers: Transfers = program.transfers
        # Since the program was loaded: decode steps, and seconds until first tokens were computed.
        self.steps, self.prefill_s = 0, 0.0
        # When the newest first token had been computed, by time.perf_counter.
        self.prefilled_at = 0.0
        # The rows' numbers, for `prefill`, are taken from it as well.
        self._table = self.transfers.upload(range(max(max_seq_len, batch)))
        if program.has_graphs:
            program.capture(self._table)

    def variant(self, options: LoopOptions | None) -> LoopOptions:
        """The variant that `options` mean here, whose feed is a certain one. Errors: RunnerError
        for one that the program lacks the methods for."""
        options = options or LoopOptions()
        if options.feed == "auto":
            return replace(options, feed="embed" if self.program.embeds else "alias")
        if options.feed == "embed" and not self.program.embeds:
            raise RunnerError(
                "feed is 'embed', and the artifact lacks the methods for it: take 'alias', or "
                "export it again"
            )
        return options

    def tokens(
        self, sequences: Iterable[Sequence], used: int, options: LoopOptions
    ) -> Iterator[tuple[Sequence, int]]:
        """The ids that follow the sequences' prompts, as they come, `used` sequences at a time.

        A sequence is taken when a row is free for it, and leaves when `limit` ids have come or it
        has a `finish_reason`; surplus steps may by then have been submitted, whose results are
        dropped. The caller keeps len(prompt_ids) + limit within max_seq_len, both being at least 1,
        and has `options` from `variant`.
        """
        transfers, waiting = self.transfers, iter(sequences)
        ahead = options.double_buffering and options.feed != "host"
        rows = Rows(
            self.batch, used, self._table, transfers,
            options.positions == "host", self.program.slots,
        )  # fmt: skip
        steps = Steps(self, rows, options)
        read = [0] * self.batch
        while True:
            # 1. Sequences join: their first tokens lie beside the others' newest ones.
            joined = set()
            for row, sequence in rows.join(waiting):
                start, read[row] = time.perf_counter(), 0
                logits, position = self._prefill(row, sequence.prompt_ids, options)
                steps.begin(row, logits, rows.first_step(row, position))
                self.prefilled_at = time.perf_counter()
                self.prefill_s += self.prefilled_at - start
                joined.add(row)
            if not rows.occupied():
                return
            # 2. The next steps are submitted, and then the tokens before them are read.
            unread = steps.newest()
            transfers.prefetch(unread)
            if ahead:
                steps.submit()
            ids = transfers.download(unread)
            # 3. Sequences that are finished leave.
            for start in range(0, len(ids), self.batch):
                for row, sequence in rows.occupied():
                    if row in joined and start + self.batch < len(ids):
                        continue  # Its first token is in the last line.
                    read[row] += 1
                    if sequence.finish_reason is None:
                        yield sequence, ids[start + row]
                    if sequence.finish_reason is not None or read[row] == sequence.limit:
                        rows.leave(row)
            if not ahead:
                steps.submit(ids if options.feed == "host" else None)

    def _prefill(self, row: int, prompt_ids: list[int], options: LoopOptions) -> tuple[Any, Any]:
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


class Steps:
    """The steps of one run of the loop: what the newest one gave, and the next ones."""

    def __init__(self, loop: Loop, rows: Rows, options: LoopOptions):
        self._loop, self._rows, self._options = loop, rows, options
        self._program, self._transfers = loop.program, loop.transfers
        self._embed = options.feed == "embed"
        # The next_id buffer that has, or will have, the newest tokens [B, 1], and its number; and
        # what the next step is fed: these, or the hidden buffer beside them.
        self._token, self._fed, self._buffer = None, None, 0
        # Tokens [N, B] of the newest steps, gathered in one half of the ring, where they are.
        self._gathered: Any = None
        self._ring: tuple = ()

    def begin(self, row: int, logits: Any, sampling: tuple) -> None:
        """Select the row's first token from its prompt's logits. Of a batch of one row that is the
        newest token without a copy."""
        if self._loop.batch == 1:
            self._token, self._fed = self._program.select(
                logits, self._buffer, *sampling, embed=self._embed
            )
            self._gathered = None
            return
        if self._token is None:
            self._token = self._program.next_id(self._buffer)
        token = self._program.select_row(logits, *sampling)
        self._transfers.copy(token, self._token[row : row + 1])
        self._fed = self._token
        if self._embed:
            self._fed = self._program.embed(self._token, self._buffer)
        if self._gathered is not None:
            self._transfers.copy(token[0], self._gathered[-1, row : row + 1])

    def newest(self) -> Any:
        """What has not been read: the tokens int64 [N, B] or [B, 1] of the newest steps, in memory
        that the steps which are submitted next leave alone."""
        if self._options.run_ahead == 1:
            return self._token
        if self._gathered is None:
            self._gathered = self._half_of_the_ring()[:1]
            self._transfers.copy(self._token[:, 0], self._gathered[0])
        return self._gathered

    def submit(self, ids: list[int] | None = None) -> None:
        """As many next steps as the options say and the rows need, the first of them fed with `ids`
        from the host, if they are given."""
        self._gathered = None
        if not self._rows.need_a_step():
            return
        count = self._options.run_ahead
        lines = self._half_of_the_ring() if count > 1 else None
        if ids is not None:
            self._fed = self._transfers.upload(
                [[i] for i in ids], out=self._program.next_id(self._buffer)
            )
        done = 0
        while done < count and self._rows.need_a_step():
            positions, sampling = self._rows.next_step()
            self._loop.steps += 1
            self._buffer = 1 - self._buffer
            self._token, self._fed = self._step(positions, sampling)
            if lines is not None:
                self._transfers.copy(self._token[:, 0], lines[done])
            done += 1
        if lines is not None:
            self._gathered = lines[:done]

    def _step(self, positions: Any, sampling: tuple) -> tuple[Any, Any]:
        """One more token of each row, in the next_id buffer whose turn it is, and what the step
        after it is fed."""
        if self._program.has_graphs and self._options.graph:
            return self._program.step(
                self._fed, positions, self._buffer, *sampling, embed=self._embed,
                overlap=self._options.overlap,
            )  # fmt: skip
        logits = self._program.decode(self._fed, positions, self._embed)
        return self._program.select(logits, self._buffer, *sampling, embed=self._embed)

    def _half_of_the_ring(self) -> Any:
        """Memory int64 [run_ahead, B] that nothing unread is in."""
        if not self._ring:
            shape = self._options.run_ahead, self._loop.batch
            self._ring = tuple(self._program.empty(*shape) for _ in range(2))
        self._ring = self._ring[::-1]
        return self._ring[0]
