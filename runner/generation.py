"""Generations under way: one request's, or those of a batch, with their statistics."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.loop import LoopOptions
from tokenloop.runner.request import Request
from tokenloop.runner.result import Result, Token
from tokenloop.runner.transfers import Transfers

if TYPE_CHECKING:
    from tokenloop.runner.model import Model


@dataclass(frozen=True)
class Stats:
    """Of one generation; times in seconds, rates in tokens per second, memory in megabytes (1e6).

    `prefill_tok_s` is up to the first token, computed; `decode_tok_s` is of the tokens after it;
    `time_to_first_token_s` also has the wait until the host has read it. `transfers` are the copies
    made for this generation alone.
    """

    prompt_tokens: int
    new_tokens: int
    time_to_first_token_s: float
    prefill_tok_s: float
    decode_tok_s: float | None
    peak_rss_mb: float
    transfers: dict[str, dict[str, int]]


@dataclass(frozen=True)
class BatchStats:
    """Of a batch so far, all rows together, in the units of Stats.

    `requests` and `prompt_tokens` are of those that have begun; `steps` are calls of decode;
    `prefill_tok_s` is of prompts, of the time up to their first tokens; `decode_tok_s` is of all
    other tokens, of all other time. A rate is None where there is nothing to measure.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    prefill_tok_s: float | None
    decode_tok_s: float | None
    peak_rss_mb: float
    transfers: dict[str, dict[str, int]]


class Generation(Result):
    """The tokens of one prompt as they come; afterwards `text`, `token_ids`, `stats`."""

    def __init__(self, model: "Model", request: Request, options: LoopOptions):
        """Errors: RunnerError for a request that the model cannot run."""
        super().__init__(request, model.tokenizer, *model.fit(request, options))
        self._model, self._options = model, options
        self._transfers: Transfers | None = None
        self._start = self._prefilled = self._first = self._last = 0.0
        self._tokens = self._run()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def run(self) -> "Generation":
        """Generate to the end, and return this object."""
        for _ in self._tokens:
            pass
        return self

    def _run(self) -> Iterator[Token]:
        loop = self._model.loop
        before = loop.transfers.snapshot()
        self._start = time.perf_counter()
        for _, token_id in self._model.tokens(self, [self], 1, self._options):
            self._last = time.perf_counter()
            if not self._first:
                self._first, self._prefilled = self._last, loop.prefilled_at
            self._transfers = loop.transfers.since(before)
            token = self.take(token_id)
            if token is not None:
                yield token
            if self.finish_reason is not None:
                return

    @property
    def stats(self) -> Stats:
        """Speed and copies so far."""
        if self._transfers is None:
            raise RunnerError("nothing has been generated yet: iterate over the generation first")
        prefill, decode = self._prefilled - self._start, self._last - self._prefilled
        return Stats(
            prompt_tokens=len(self.prompt_ids),
            new_tokens=len(self.token_ids),
            time_to_first_token_s=self._first - self._start,
            prefill_tok_s=len(self.prompt_ids) / prefill,
            decode_tok_s=(self.taken - 1) / decode if self.taken > 1 else None,
            peak_rss_mb=peak_rss_mb(),
            transfers=self._transfers.as_dict(),
        )

    def as_dict(self) -> dict:
        """What `run.py --json` prints of it."""
        return super().as_dict() | {"stats": asdict(self.stats) if self._transfers else None}


class BatchGeneration:
    """Several requests at a time: iterate over (index of the request, Token) as they come.

    `results` has a Result for each request that has been taken from the input, in its order.
    """

    def __init__(
        self,
        model: "Model",
        requests: Iterable[Request | str | list[int]],
        rows: int,
        options: LoopOptions,
    ):
        self.results: list[Result] = []
        self._model, self._requests = model, requests
        self._transfers = Transfers()
        self._steps, self._prefill_s, self._seconds = 0, 0.0, 0.0
        self._events = self._run(rows, options)

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        return self._events

    def run(self) -> list[Result]:
        """Generate to the end, and return the results, in the requests' order."""
        for _ in self._events:
            pass
        return self.results

    def _accepted(self, options: LoopOptions) -> Iterator[Result]:
        """The results to be of the requests that can run, taken from the input one by one."""
        for index, request in enumerate(self._requests):
            if not isinstance(request, Request):
                request = Request(request)
            try:
                fitted = self._model.fit(request, options)
                result = Result(request, self._model.tokenizer, *fitted, index)
            except RunnerError as error:
                result = Result(request, self._model.tokenizer, [], 0, index)
                result.refuse(f"request {index + 1}: {error}")
            self.results.append(result)
            if result.error is None:
                yield result

    def _run(self, rows: int, options: LoopOptions) -> Iterator[tuple[int, Token]]:
        loop = self._model.loop
        before, steps, prefill_s = loop.transfers.snapshot(), loop.steps, loop.prefill_s
        start = time.perf_counter()
        for result, token_id in self._model.tokens(self, self._accepted(options), rows, options):
            self._seconds = time.perf_counter() - start
            self._steps, self._prefill_s = loop.steps - steps, loop.prefill_s - prefill_s
            self._transfers = loop.transfers.since(before)
            token = result.take(token_id)
            if token is not None:
                yield result.index, token

    @property
    def stats(self) -> BatchStats:
        """Speed and copies so far."""
        begun = [result for result in self.results if result.taken]
        prompt_tokens = sum(len(result.prompt_ids) for result in begun)
        decoded, seconds = sum(r.taken - 1 for r in begun), self._seconds - self._prefill_s
        return BatchStats(
            requests=len(begun),
            prompt_tokens=prompt_tokens,
            new_tokens=sum(len(result.token_ids) for result in begun),
            steps=self._steps,
            prefill_tok_s=prompt_tokens / self._prefill_s if begun else None,
            decode_tok_s=decoded / seconds if decoded else None,
            peak_rss_mb=peak_rss_mb(),
            transfers=self._transfers.as_dict(),
        )


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
