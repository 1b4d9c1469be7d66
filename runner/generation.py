"""Generations under way: one request's, or those of a batch, with their statistics."""

import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.loop import Loop, LoopOptions
from tokenloop.runner.prefix_cache import PrefixCache
from tokenloop.runner.request import Request
from tokenloop.runner.restriction import Restriction
from tokenloop.runner.result import Result, Token
from tokenloop.runner.speculation import DraftCounts
from tokenloop.runner.tokenizer import Tokenizer
from tokenloop.runner.transfers import Transfers


@dataclass(frozen=True)
class Stats:
    """Of one generation or of a batch so far, all rows together. Times are in seconds, rates in
    tokens per second, memory in megabytes (1e6).

    `requests` and `prompt_tokens` count those that have begun, `steps` the calls of decode.
    `time_to_first_token_s` runs until the host has read the very first token; `prefill_tok_s` is of
    prompts, over the time until their first tokens were computed; `decode_tok_s` is of all other
    tokens, over all other time. A time or a rate is None where there is nothing to measure.
    `transfers` are the copies made for this generation alone. `draft_rounds` are those of the steps
    that tried drafts, `drafted_tokens` of which `accepted_tokens` held.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    time_to_first_token_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    peak_rss_mb: float
    transfers: dict[str, dict[str, int]]
    draft_rounds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class BatchGeneration:
    """Several requests at a time: iterate over (index of the request, Token) as they come.

    `results` has a Result for each request that has been taken from the input, in its order.
    `is_finished` says whether all has come that will come.
    """

    def __init__(
        self, loop: Loop, results: Iterable[Result], rows: int, options: LoopOptions,
        prepare: Callable[[], None] = lambda: None, cache: PrefixCache | None = None,
    ):  # fmt: skip
        """`results` are taken one by one, when a row is free; those that were refused never begin.
        At most `rows` run at a time, in the variant `options`, which is one of `loop.variant`.
        Beginnings of prompts are taken from `cache` and kept there. `prepare` makes the program
        ready. What this ends and where it is refused, Turn.begin says.
        """
        self.results: list[Result] = []
        self.is_finished = False
        self._loop = loop
        self._steps, self._prefill_s, self._drafts = 0, 0.0, DraftCounts()
        # When it began, and the loop's counts then and with the newest token. Until the host had
        # read the first token, and the newest one.
        self._start, self._before, self._copies = 0.0, None, ()
        self._first_s, self._newest_s = None, 0.0
        loop.turn.begin(self, prepare)
        coming = accepted(results, self.results)
        self._tokens = loop.tokens(coming, rows, options, cache=cache)

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        return self

    def __next__(self) -> tuple[int, Token]:
        """Errors: RunnerError where another generation was started since, or another thread is at
        it, which then goes on."""
        event = None if self.is_finished else self._loop.turn.use(self, self._advance)
        if event is None:
            raise StopIteration
        return event

    def run(self) -> list[Result]:
        """Generate to the end, and return the results, in the requests' order."""
        for _ in self:
            pass
        return self.results

    def _advance(self) -> tuple[int, Token] | None:
        """The next token that is to be shown, or None at the end."""
        loop = self._loop
        if self._before is None:
            self._before = loop.transfers.snapshot(), loop.steps, loop.prefill_s, loop.drafts
            self._start = time.perf_counter()
        _, steps, prefill_s, _ = self._before
        try:
            for result, token_id in self._tokens:
                self._newest_s = time.perf_counter() - self._start
                if self._first_s is None:
                    self._first_s = self._newest_s
                self._steps, self._prefill_s = loop.steps - steps, loop.prefill_s - prefill_s
                self._copies = loop.transfers.snapshot()
                self._drafts = loop.drafts
                token = result.take(token_id)
                if token is not None:
                    return result.index, token
        except BaseException:
            self.is_finished = True
            raise
        self.is_finished = True
        return None

    @property
    def stats(self) -> Stats:
        """Speed and copies so far."""
        begun = [result for result in self.results if result.taken]
        prompt_tokens = sum(len(result.prompt_ids) for result in begun)
        decoded, seconds = sum(r.taken - 1 for r in begun), self._newest_s - self._prefill_s
        copies, drafts = Transfers(), DraftCounts()
        if begun:
            copies = self._loop.transfers.since(self._before[0], self._copies)
            drafts = self._drafts.since(self._before[3])
        return Stats(
            requests=len(begun),
            prompt_tokens=prompt_tokens,
            new_tokens=sum(len(result.token_ids) for result in begun),
            steps=self._steps,
            time_to_first_token_s=self._first_s,
            prefill_tok_s=prompt_tokens / self._prefill_s if begun else None,
            decode_tok_s=decoded / seconds if decoded else None,
            peak_rss_mb=peak_rss_mb(),
            transfers=copies.as_dict(),
            draft_rounds=drafts.rounds,
            drafted_tokens=drafts.drafted,
            accepted_tokens=drafts.accepted,
        )


class Generation(Result):
    """The tokens of one prompt as they come; afterwards `text`, `token_ids`, `stats`. It is a batch
    of one request."""

    def __init__(
        self, loop: Loop, request: Request, tokenizer: Tokenizer, prompt_ids: list[int],
        limit: int, restriction: Restriction | None, options: LoopOptions,
        prepare: Callable[[], None], cache: PrefixCache | None = None,
    ):  # fmt: skip
        """As Result; and `loop`, `options`, `prepare` and `cache` as of BatchGeneration."""
        super().__init__(request, tokenizer, prompt_ids, limit, restriction)
        # The batch does not keep this alive. What nobody has any more is gone at once, and in no
        # other thread's way.
        self._batch = BatchGeneration(loop, [weakref.proxy(self)], 1, options, prepare, cache)

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        """Errors: RunnerError as of BatchGeneration, and for an output that cannot follow its
        grammar."""
        if self.finish_reason is not None:
            raise StopIteration
        try:
            _, token = next(self._batch)
        except StopIteration:
            if self.error is not None:
                raise RunnerError(self.error) from None
            raise
        if self.finish_reason is not None:
            # Whoever has all of it may start another generation.
            self._batch.is_finished = True
        return token

    def run(self) -> "Generation":
        """Generate to the end, and return this object."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        super().cancel()
        self._batch.is_finished = True

    @property
    def stats(self) -> Stats:
        """Speed and copies so far. Errors: RunnerError before the first token."""
        if not self.taken:
            raise RunnerError("nothing has been generated yet: iterate over the generation first")
        return self._batch.stats

    def as_dict(self) -> dict:
        """The object that `run.py --json` prints."""
        stats = asdict(self.stats) if self.taken else None
        if stats:
            # They say nothing about a single request, nor drafts where there are none.
            del stats["requests"], stats["steps"]
            if not stats["draft_rounds"]:
                del stats["draft_rounds"], stats["drafted_tokens"], stats["accepted_tokens"]
        return super().as_dict() | {"stats": stats}


def accepted(results: Iterable[Result], taken: list[Result]) -> Iterator[Result]:
    """The results that were not refused, as they are asked for. All are put into `taken`."""
    for result in results:
        taken.append(result)
        if result.error is None:
            yield result


def peak_rss_mb() -> float:
    """The process's largest resident size so far, in megabytes (1e6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux begins with the parent's.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, but bytes on macOS.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
