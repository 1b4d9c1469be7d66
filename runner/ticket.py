"""A request's place in an engine, and the way of its tokens from there to a reader."""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.request import Request
from tokenloop.runner.restriction import Restriction
from tokenloop.runner.result import Result, Token
from tokenloop.runner.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """Generating failed, and the request is not to blame. The reason is in the log."""


class Ticket(Result):
    """The output of one request in an engine, as it grows. One reader iterates over its tokens: in
    any thread with `for`, or in an event loop with `async for`.

    Besides those of a Result, `finish_reason` may be "timeout". Reading ends without an error after
    that, and after "cancelled". Tokens that have come by then are read first.

    Whoever has enough of it cancels it, or leaves a `with` of it; nothing else frees its row early.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, prompt_ids: list[int], limit: int,
        restriction: Restriction | None, deadline: float | None,
    ):  # fmt: skip
        """As Result; `deadline`, a time of time.monotonic, is when the output ends if it has not
        ended before."""
        super().__init__(request, tokenizer, prompt_ids, limit, restriction)
        self._deadline = deadline
        self._tokens: deque[Token] = deque()
        self._failed = False
        # Whatever changes is changed under its lock, and readers are told.
        self._changed = threading.Condition()
        # What a reader in an event loop waits for, and what tells it that the time is up.
        self._reader: asyncio.Future[None] | None = None
        self._alarm: tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle] | None = None

    # The reader's side

    def __iter__(self) -> "Ticket":
        return self

    def __next__(self) -> Token:
        """Errors: RunnerError for a request that was refused when its turn came, EngineError."""
        with self._changed:
            while not self._tokens:
                if self._is_over():
                    self._check()
                    raise StopIteration
                self._changed.wait(self._seconds_left())
            return self._tokens.popleft()

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Token:
        """Errors: as `__next__`."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._tokens:
                    return self._tokens.popleft()
                if self._is_over():
                    self._set_alarm(None)
                    self._check()
                    raise StopAsyncIteration
                told = self._reader = loop.create_future()
            self._set_alarm(loop)
            try:
                await told
            except asyncio.CancelledError:
                self._set_alarm(None)
                raise
            finally:
                self._reader = None

    def _set_alarm(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Let the reader in `loop`, or none, be told when the time is up: one alarm serves all of
        its tokens, and keeps nobody else's ticket alive."""
        if self._deadline is None or (self._alarm is not None and self._alarm[0] is loop):
            return
        if self._alarm is not None:
            self._alarm[1].cancel()
            self._alarm = None
        if loop is not None:
            seconds, ticket = self._seconds_left(), weakref.ref(self)
            self._alarm = loop, loop.call_later(seconds, _time_is_up, ticket)

    def arrived(self) -> list[Token]:
        """The tokens that have come and are not read; they are read with this."""
        with self._changed:
            tokens = list(self._tokens)
            self._tokens.clear()
        return tokens

    def run(self) -> "Ticket":
        """Read to the end, and return this object."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """End the output here, with the finish_reason "cancelled", if it has not ended yet. Its row
        or its place in the queue is free after the step that is under way. Any thread may call it.
        """
        self.end("cancelled")

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    # The engine's side

    def put(self, token_id: int, told: "Told") -> None:
        """Add the next token. A reader in an event loop is told by `told`. What goes wrong with
        this ends this output alone."""
        with self._changed:
            if self._is_over():
                return
            try:
                token = self.take(token_id)
            except Exception:
                LOG.exception("the text of a token failed")
                self._fail()
            else:
                if token is not None:
                    self._tokens.append(token)
            self._changed.notify_all()
            told.add(self, self._reader)

    def is_over(self) -> bool:
        """Whether the output has ended, or ends now because its time is up."""
        with self._changed:
            return self._is_over()

    def end(self, reason: str) -> None:
        """End the output with this finish_reason, if it has not ended yet."""
        with self._changed:
            if self.finish_reason is None:
                self.finish_reason = reason
                self._tell()

    def refuse(self, error: str) -> None:
        with self._changed:
            super().refuse(error)
            self._tell()

    def fail(self) -> None:
        """End the output because the engine could not go on with it."""
        with self._changed:
            if self.finish_reason is None:
                self._fail()
                self._tell()

    # Under the lock

    def _is_over(self) -> bool:
        if self.finish_reason is None and self._seconds_left() == 0:
            self.finish_reason = "timeout"
            self._tell()
        return self.finish_reason is not None

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _fail(self) -> None:
        self._failed = True
        Result.refuse(self, "generating failed; the reason is in the log of the engine")

    def _check(self) -> None:
        if self._failed:
            raise EngineError(self.error)
        if self.error is not None:
            raise RunnerError(self.error)

    def _tell(self) -> None:
        self._changed.notify_all()
        told = Told()
        told.add(self, self._reader)
        told.tell()


class Told:
    """Readers in event loops that are told together. To tell a loop takes a call of the system, in
    which the loop's thread takes over the interpreter's lock: once for all tokens of a step, not
    once for each."""

    def __init__(self) -> None:
        self._readers: dict[
            asyncio.AbstractEventLoop, list[tuple[Ticket, asyncio.Future[None]]]
        ] = {}

    def add(self, ticket: Ticket, reader: asyncio.Future[None] | None) -> None:
        """Tell the ticket's reader, if there is one, with the others."""
        if reader is not None:
            self._readers.setdefault(reader.get_loop(), []).append((ticket, reader))

    def tell(self) -> None:
        """Tell those that were added."""
        readers, self._readers = self._readers, {}
        for loop, told in readers.items():
            try:
                loop.call_soon_threadsafe(_wake, [reader for _, reader in told])
            except RuntimeError:
                # The readers' event loop is closed.
                for ticket, _ in told:
                    ticket.finish_reason = ticket.finish_reason or "cancelled"


def _wake(readers: list[asyncio.Future[None]]) -> None:
    for reader in readers:
        if not reader.done():
            reader.set_result(None)


def _time_is_up(found: "weakref.ref[Ticket]") -> None:
    ticket = found()
    if ticket is not None and ticket._reader is not None:
        _wake([ticket._reader])
