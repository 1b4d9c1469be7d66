"""An engine: one thread owns a model, and requests of any thread or event loop queue for its rows.

Requests join and leave between two steps, first come, first served. Each gives what it gives alone.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.loop import LoopOptions
from tokenloop.runner.model import Model, cache_of
from tokenloop.runner.pace import Stall
from tokenloop.runner.request import Request, is_integer, is_number
from tokenloop.runner.ticket import Ticket, Told

LOG = logging.getLogger(__name__)
PREFIX_CACHE_MB = 256


class QueueFull(RunnerError):
    """More requests wait than may."""


class EngineClosed(RunnerError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Counts:
    """Requests that are `waiting` and `running` now; and since the engine began, tokens of prompts
    that got a row, `new_tokens` that were generated, steps, and how often the program `failed`.

    Of the prompts' tokens `cached_tokens` were not computed. The cache has `cache_bytes` in use of
    `cache_budget`, and has given up something `cache_evictions` times."""

    waiting: int
    running: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    failed: int
    cached_tokens: int
    cache_bytes: int
    cache_budget: int
    cache_evictions: int


class Engine:
    """Runs requests on a model, which is the engine's alone until `close`. What `model.generate` is
    asked meanwhile is refused.

    `with Engine(model) as engine:` closes it in the end. Any thread may call its methods.
    """

    def __init__(
        self, model: Model, rows: int | None = None, max_queue: int = 256,
        max_stall_s: float | None = None, options: LoopOptions | None = None,
        prefix_cache_mb: float | None = 0, fail: Callable[[Exception], None] | None = None,
    ):  # fmt: skip
        """At most `rows` run at a time, by default as many as the model has, and `max_queue` more
        wait. Rows that run stand still for the prompts of others for `max_stall_s` at most, by
        default for as long as two steps take, or for as long as one chunk takes (Loop.tokens).

        `prefix_cache_mb` megabytes (1e6 bytes) of the device's memory are for beginnings of
        prompts, which later ones then need not compute; with 0 there is the model's prefix cache,
        if it has one. None is PREFIX_CACHE_MB where that can be, and otherwise `cache_fault` says
        why not.

        When the program fails, those that have a row fail with it, and others go on. With several
        ranks they cannot: `fail` is called with the error, in the engine's thread, and does not
        return.

        Errors: RunnerError for numbers out of their range, an artifact whose state cannot be kept,
        and a model that is in use.
        """
        rows = model.batch if rows is None else rows
        if not is_integer(rows) or not 1 <= rows <= model.batch:
            raise RunnerError(f"rows is {rows!r}; it must be 1 to {model.batch}")
        if not is_integer(max_queue) or max_queue < 0:
            raise RunnerError(f"max_queue is {max_queue!r}; it must be at least 0")
        if max_stall_s is not None and not (is_number(max_stall_s) and max_stall_s >= 0):
            raise RunnerError(f"max_stall_s is {max_stall_s!r}; it must be at least 0")
        self.model, self.rows, self.max_queue = model, rows, max_queue
        self._stall, self._options = Stall(max_stall_s), model.loop.variant(options)
        # Under the lock of `_changed`: who waits, who has a row or had one until just now, and
        # whether it goes on.
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._is_closed = False
        self._prompt_tokens = self._new_tokens = self._failed = 0
        self._steps_before = model.loop.steps
        self._fail = fail
        # Of a user of the model's Turn.
        self.is_finished = False
        self.prefix_cache, self.cache_fault = model.prefix_cache, None
        if prefix_cache_mb != 0:
            budget = PREFIX_CACHE_MB if prefix_cache_mb is None else prefix_cache_mb
            try:
                self.prefix_cache = cache_of(model.loop.program, budget)
            except RunnerError as error:
                if prefix_cache_mb is not None:
                    raise
                self.cache_fault = str(error)
        begun: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(begun,), name="tokenloop engine", daemon=True
        )
        self._thread.start()
        begun.result()
        atexit.register(self.close)

    def submit(self, request: Request | str | list[int], timeout_s: float | None = None) -> Ticket:
        """Let a request wait for a row; its tokens come to the ticket. After `timeout_s`, counted
        from now, it ends wherever it is.

        Errors: RunnerError for a request that cannot run, QueueFull, EngineClosed.
        """
        return self.submit_all([request], timeout_s)[0]

    def submit_all(
        self, requests: Iterable[Request | str | list[int]], timeout_s: float | None = None
    ) -> list[Ticket]:
        """As `submit` for several, one behind the other: all of them wait, or none does."""
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s > 0):
            raise RunnerError(f"timeout_s is {timeout_s!r}; it must be above 0")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        tickets = []
        for request in requests:
            request = request if isinstance(request, Request) else Request(request)
            fitted = self.model.fit(request)
            tickets.append(Ticket(request, self.model.tokenizer, *fitted, deadline))
        with self._changed:
            if self._is_closed:
                raise EngineClosed("the engine is closed: it takes no more requests")
            self._forget_ended()
            here = len(self._waiting) + len(self._running)
            if here + len(tickets) > self.rows + self.max_queue:
                raise QueueFull(
                    f"{here} requests are running or waiting and {len(tickets)} more are too many; "
                    f"{self.rows + self.max_queue} are the most: try again later"
                )
            self._waiting += tickets
            self._changed.notify_all()
        return tickets

    @property
    def counts(self) -> Counts:
        """What is going on."""
        with self._changed:
            self._forget_ended()
            cache = self.prefix_cache
            of_cache = (0, 0, 0, 0)
            if cache is not None:
                of_cache = cache.cached_tokens, cache.used_bytes, cache.budget, cache.evictions
            return Counts(
                len(self._waiting), len(self._running), self._prompt_tokens, self._new_tokens,
                self.model.loop.steps - self._steps_before, self._failed, *of_cache,
            )  # fmt: skip

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self._is_closed

    def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, cancel those that wait, and after `grace_s` those that run. When
        this returns, the model is free."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.cancel()
        self._thread.join(grace_s)
        with self._changed:
            running = list(self._running)
        for ticket in running:
            ticket.cancel()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The engine's thread

    def _work(self, begun: Future) -> None:
        turn = self.model.loop.turn
        try:
            turn.begin(self, lambda: None)
        except RunnerError as error:
            begun.set_exception(error)
            return
        begun.set_result(None)
        while self._wait():
            try:
                turn.hold(self, self._generate)
            # Whatever the program raises: those whose state it had end with it. Others go on.
            except Exception as error:
                if self._fail is not None:
                    self._fail(error)
                LOG.exception("the program failed, and with it the requests that had a row")
                if self.prefix_cache is not None:
                    # Whatever was being copied.
                    self.prefix_cache.clear()
                with self._changed:
                    self._failed += 1
                    failed, self._running = self._running, []
                for ticket in failed:
                    ticket.fail()
        self.is_finished = True

    def _wait(self) -> bool:
        """Wait until requests do; whether any does."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return bool(self._waiting)

    def _generate(self) -> None:
        """Run what waits, and what comes meanwhile, until there is nothing left."""
        joining, told = Joining(self._next), Told()
        try:
            for ticket, token_id in self.model.loop.tokens(
                joining, self.rows, self._options, self._stall, self.prefix_cache, told.tell
            ):
                self._new_tokens += 1
                ticket.put(token_id, told)
        finally:
            told.tell()

    def _next(self) -> Ticket | None:
        """The next request that can run, for a row that is free."""
        while True:
            with self._changed:
                if not self._waiting:
                    return None
                ticket = self._waiting.popleft()
                self._forget_ended()
                self._running.append(ticket)
            if ticket.is_over():
                continue
            try:
                self.model.load_sampling(ticket.request, self._options)
            except RunnerError as error:
                ticket.refuse(str(error))
                continue
            # It is this request's, and others run.
            except Exception:
                LOG.exception("the methods that sample failed to load")
                ticket.fail()
                continue
            self._prompt_tokens += len(ticket.prompt_ids)
            return ticket

    def _forget_ended(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_over())
        self._running = [ticket for ticket in self._running if not ticket.is_over()]


class Joining:
    """The requests that wait, as the loop asks for them: there may be none now and some later."""

    def __init__(self, take: Callable[[], Ticket | None]):
        """`take` gives the next one, or None where none waits."""
        self._take = take

    def __iter__(self) -> "Joining":
        return self

    def __next__(self) -> Ticket:
        ticket = self._take()
        if ticket is None:
            raise StopIteration
        return ticket
