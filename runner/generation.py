"""Generations under way: one request's, or those of a batch, with their statistics."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.loop import Loop, LoopOptions
from tokenloop.runner.request import Request
from tokenloop.runner.result import Result, Token
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
    `transfers` are the copies made for this generation alone.
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


class BatchGeneration:
    """Several requests at a time: iterate over (index of the request, Token) as they come.

    `results` has a Result for each request that has been taken from the input, in its order.
    """

    def __init__(self, loop: Loop, results: Iterable[Result], rows: int, options: LoopOptions):
        """`results` are taken one by one, when a row is free; those that were refused never begin.
        At most `rows` run at a time, in the variant `options`, which is one of `loop.variant`.
        Starting another generation on the loop ends this one."""
        loop.owner = self
        self.results: list[Result] = []
        self._loop = loop
        self._transfers = Transfers()
        self._steps, self._prefill_s = 0, 0.0
        # Until the host had read the first token, and the newest one.
        self._first_s, self._newest_s = None, 0.0
        self._events = self._run(self._accepted(results), rows, options)

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        return self._events

    def run(self) -> list[Result]:
        """Generate to the end, and return the results, in the requests' order."""
        for _ in self._events:
            pass
        return self.results

    def _accepted(self, results: Iterable[Result]) -> Iterator[Result]:
        for result in results:
            self.results.append(result)
            if result.error is None:
                yield result

    def _run(
        self, results: Iterator[Result], rows: int, options: LoopOptions
    ) -> Iterator[tuple[int, Token]]:
        self._check_owner()
        loop = self._loop
        before, steps, prefill_s = loop.transfers.snapshot(), loop.steps, loop.prefill_s
        start = time.perf_counter()
        for result, token_id in loop.tokens(results, rows, options):
            self._newest_s = time.perf_counter() - start
            if self._first_s is None:
                self._first_s = self._newest_s
            self._steps, self._prefill_s = loop.steps - steps, loop.prefill_s - prefill_s
            self._transfers = loop.transfers.since(before)
            token = result.take(token_id)
            if token is not None:
                yield result.index, token
            self._check_owner()

    def _check_owner(self) -> None:
        # Even the first step would overwrite the state of the generation that was started later.
        if self._loop.owner is not self:
            raise RunnerError(
                "another generation was started on this model, and its state is shared: "
                "finish one before you start the next"
            )

    @property
    def stats(self) -> Stats:
        """Speed and copies so far."""
        begun = [result for result in self.results if result.taken]
        prompt_tokens = sum(len(result.prompt_ids) for result in begun)
        decoded, seconds = sum(r.taken - 1 for r in begun), self._newest_s - self._prefill_s
        return Stats(
            requests=len(begun),
            prompt_tokens=prompt_tokens,
            new_tokens=sum(len(result.token_ids) for result in begun),
            steps=self._steps,
            time_to_first_token_s=self._first_s,
            prefill_tok_s=prompt_tokens / self._prefill_s if begun else None,
            decode_tok_s=decoded / seconds if decoded else None,
            peak_rss_mb=peak_rss_mb(),
            transfers=self._transfers.as_dict(),
        )


class Generation(Result):
    """The tokens of one prompt as they come; afterwards `text`, `token_ids`, `stats`. It is a batch
    of one request."""

    def __init__(
        self, loop: Loop, request: Request, tokenizer: Tokenizer, prompt_ids: list[int],
        limit: int, options: LoopOptions,
    ):  # fmt: skip
        """As Result; and `loop` and `options` as of BatchGeneration."""
        super().__init__(request, tokenizer, prompt_ids, limit)
        self._batch = BatchGeneration(loop, [self], 1, options)
        self._tokens = self._run()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def run(self) -> "Generation":
        """Generate to the end, and return this object."""
        for _ in self._tokens:
            pass
        return self

    def _run(self) -> Iterator[Token]:
        for _, token in self._batch:
            yield token
            # Whoever has all of it may start another generation.
            if self.finish_reason is not None:
                return

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
            # They say nothing about a single request.
            del stats["requests"], stats["steps"]
        return super().as_dict() | {"stats": stats}


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
