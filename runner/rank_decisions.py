"""What a loop decides by a clock, a client or a user, which ranks must decide alike.

Rank 0 decides and tells the others, which run the same loop: so all ranks make the same calls in
the same order, and have the same bits. A message has the decisions since the one before it, and is
sent before the program is called that depends on them. Each step's tokens are compared.
"""

import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from tokenloop.runner import process
from tokenloop.runner.decisions import Decisions
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.pace import Stall
from tokenloop.runner.prefix_cache import PrefixCache
from tokenloop.runner.ranks import LostRank
from tokenloop.runner.request import DEFAULTS, Request
from tokenloop.runner.result import Result
from tokenloop.runner.sequence import Sequence

if TYPE_CHECKING:
    from tokenloop.runner.model import Model

# So often rank 0 says that it is there, which tells it whether the others are.
BEAT_S = 1.0
# What follows gives rank 0 so long to end, once it is told to end itself.
ENDING_S = 20
# What of a request is of no use without its text.
OF_TEXT = {"stop", "chat", "shown_tokens"}


class Leading(Decisions):
    """The decisions of rank 0, which tells them. Within this the model's generations are led, one
    after the other; in the end the others are told that there are no more."""

    def __init__(self, model: "Model", fail: Callable[[LostRank], None]):
        """`fail` is called where another rank is lost while nothing runs, in a thread of its own.
        The others of the model's ranks have Following."""
        self._model, self._fail = model, fail
        self._channel = model.loop.program.ranks.channel()
        # What is not told yet.
        self._log: list[Any] = []
        # Messages are sent one at a time: those of the loop's thread, and beats.
        self._sending = threading.Lock()
        self._sent_at, self._is_over = time.monotonic(), threading.Event()
        # The newest run's cache, and how many there were.
        self._cache: PrefixCache | None = None
        self._caches = 0
        self._beats = threading.Thread(target=self._beat, name="tokenloop ranks", daemon=True)

    def __enter__(self) -> "Leading":
        self._model.loop.decisions = self
        self._beats.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        # What an interrupt or a lost rank has left may be half of a message.
        if error is None or isinstance(error, Exception) and not isinstance(error, LostRank):
            self.end()

    def end(self) -> None:
        """Tell the others to end, if they have not been told. Nothing may run."""
        with self._sending:
            if not self._is_over.is_set():
                self._is_over.set()
                self._channel.send(_bytes({"end": True}))

    def run(
        self, sequences: Iterable[Sequence], used: int, options: Any, stall: Stall | None,
        cache: PrefixCache | None,
    ) -> Iterator[Sequence]:  # fmt: skip
        # Of a run that was given up.
        self._log.clear()
        if cache is not None and cache is not self._cache:
            self._cache, self._caches = cache, self._caches + 1
        told = None if cache is None else [self._caches, cache.budget, *_state(cache)]
        self._send(
            {"used": used, "options": asdict(options), "stall": stall is not None, "cache": told}
        )
        return Joining(iter(sequences), self._log)

    def ended(self, sequence: Sequence) -> bool:
        is_over = sequence.finish_reason is not None
        self._log.append(is_over)
        return is_over

    def made(self, value: int) -> int:
        self._log.append([value])
        return value

    def agree(self, value: int) -> None:
        self._log.append(value)

    def tell(self) -> None:
        if self._log:
            self._send(self._log)
            self._log.clear()

    def _send(self, message: Any) -> None:
        data = _bytes(message)
        with self._sending:
            self._channel.send(data)
            self._sent_at = time.monotonic()

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            try:
                with self._sending:
                    waited = time.monotonic() - self._sent_at
                    if waited >= BEAT_S and not self._is_over.is_set():
                        self._channel.send(_bytes([]))
            except LostRank as error:
                self._fail(error)
                return


class Joining:
    """The sequences that join, which are put into the log; None stands for one that does not."""

    def __init__(self, waiting: Iterator[Sequence], log: list[Any]):
        self._waiting, self._log = waiting, log

    def __iter__(self) -> "Joining":
        return self

    def __next__(self) -> Sequence:
        sequence = next(self._waiting, None)
        self._log.append(None if sequence is None else _told(sequence))
        if sequence is None:
            raise StopIteration
        return sequence


class Following(Decisions):
    """The decisions of another rank: those that rank 0 tells."""

    def __init__(self, model: "Model"):
        self._model, ranks = model, model.loop.program.ranks
        self._rank, self._channel = ranks.place.rank, ranks.channel()
        self._log: deque[Any] = deque()
        # The run that rank 0 has begun and this rank has not.
        self._next: dict[str, Any] | None = None
        self._cache: PrefixCache | None = None
        self._caches = 0
        self._options: Any = None
        self._interrupted = False

    def follow(self) -> int:
        """Run what rank 0 runs until it ends; the exit status. Interrupts and SIGTERM are rank 0's.

        Errors: RunnerError where this rank has come to other tokens, and where rank 0 is lost, but
        for one that ends because it was told to, as this one was.
        """
        loop = self._model.loop
        loop.decisions = self
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        try:
            while (run := self._next_run()) is not None:
                self._options = type(loop.variant(None))(**run["options"])
                stall, cache = Stall() if run["stall"] else None, self._cache_of(run["cache"])
                try:
                    for _ in loop.tokens((), run["used"], self._options, stall, cache):
                        pass
                except GivenUp:
                    continue
        except LostRank:
            if not self._interrupted:
                raise
            return process.INTERRUPTED
        return 0

    def run(
        self, sequences: Iterable[Sequence], used: int, options: Any, stall: Stall | None,
        cache: PrefixCache | None,
    ) -> Iterator[Sequence]:  # fmt: skip
        return self

    def __iter__(self) -> "Following":
        return self

    def __next__(self) -> Sequence:
        told = self._told(dict, type(None))
        if told is None:
            raise StopIteration
        if "logit_bias" in told:
            told["logit_bias"] = dict(told["logit_bias"])
        request, model = Request(**told), self._model
        found = Result(request, model.tokenizer, *model.fit(request))
        model.load_sampling(request, self._options)
        return found

    def ended(self, sequence: Sequence) -> bool:
        return self._told(bool)

    def made(self, value: int) -> int:
        return self._told(list)[0]

    def agree(self, value: int) -> None:
        if (theirs := self._told(int)) != value:
            raise RunnerError(
                f"rank {self._rank} has come to other tokens than rank 0 ({value} and {theirs}): "
                "no output of these ranks can be trusted; start them again"
            )

    def tell(self) -> None:
        pass

    def _told(self, *kinds: type) -> Any:
        """What rank 0 has decided next, which must be of one of these types."""
        while not self._log:
            if self._next is not None:
                raise GivenUp
            self._receive()
        value = self._log.popleft()
        if type(value) not in kinds:
            raise RunnerError(
                f"rank {self._rank} is at another place of the loop than rank 0, which tells it "
                f"{str(value)[:80]}: run the same version on all ranks"
            )
        return value

    def _next_run(self) -> dict[str, Any] | None:
        """The next run, or None at the end of them all."""
        while self._next is None:
            self._receive()
        # What is left is of a run that was given up.
        self._log.clear()
        run, self._next = self._next, None
        return None if "end" in run else run

    def _receive(self) -> None:
        message = json.loads(self._channel.receive())
        if isinstance(message, list):
            self._log.extend(message)
        else:
            self._next = message

    def _cache_of(self, told: list[int] | None) -> PrefixCache | None:
        """This rank's cache for a run, of which rank 0 tells the number, the budget and _state."""
        if told is None:
            return None
        number, budget, *state = told
        if number != self._caches:
            self._caches = number
            self._cache = PrefixCache(self._model.loop.program, budget)
        if state != _state(self._cache):
            raise RunnerError(
                f"rank {self._rank} keeps other beginnings of prompts than rank 0 "
                f"({_state(self._cache)} and {state}): start the ranks again"
            )
        return self._cache

    def _interrupt(self, *_: object) -> None:
        # Rank 0 is told the same, and ends. If it does not, this rank does.
        if not self._interrupted:
            self._interrupted = True
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(ENDING_S)


class GivenUp(Exception):
    """Rank 0 has given the run up, and begun another one or ended."""


def _bytes(message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":"), default=_plain).encode()


def _state(cache: PrefixCache) -> list[int]:
    """What is equal where all that is kept is."""
    return [cache.used_bytes, cache.cached_tokens, cache.evictions]


def _told(sequence: Sequence) -> dict[str, Any]:
    """What another rank must know of a sequence: a Request's parameters, and ids as its prompt."""
    request, told = sequence.request, {"prompt": sequence.prompt_ids}
    for name, default in DEFAULTS.items():
        value = getattr(request, name)
        if name not in OF_TEXT and value is not default:
            told[name] = value
    if request.logit_bias:
        # JSON has no numbers for keys.
        told["logit_bias"] = [(int(i), float(b)) for i, b in request.logit_bias.items()]
    return told


def _plain(value: Any) -> int | float:
    """NumPy's numbers and others as Python's own."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{value!r} is no number")
