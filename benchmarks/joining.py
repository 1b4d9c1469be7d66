"""How long is it between two tokens while long prompts join all the time, against a step's time?

All rows of a server but one stream. Through the one that is left long prompts go, one after the
other, each for one token. Before that all rows stream, and nobody joins: the median between two
tokens is then a step, the floor.
"""

import asyncio
import statistics
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.common import BenchmarkError
from benchmarks.served import Served, answered, events

# A stream begins with so many tokens of a prompt.
BEFORE = 64
# Of those who join one is computed, and one waits.
JOINERS = 2
# What there is when the first streams have begun counts for neither.
SETTLE_S = 1.0


async def measure(
    port: int, ids: list[int], streams: int, join_tokens: int, longest: int, seconds: float
) -> dict:
    """Milliseconds between two tokens of one of the `streams`, for so many seconds, while prompts
    of `join_tokens` join, or nobody if that is 0."""
    gaps: list[float] = []
    waited: list[float] = []
    begun = [asyncio.Event() for _ in range(streams)]
    counted_from = float("inf")

    async def stream(number: int) -> None:
        request = {"prompt": ids[number * 7 :][:BEFORE], "max_tokens": longest - BEFORE}
        while True:
            before = None
            async for now, event in events(port, request):
                if not event.get("choices"):
                    continue
                begun[number].set()
                if before is not None and before >= counted_from:
                    gaps.append(1e3 * (now - before))
                before = now

    async def join(number: int) -> None:
        place = number * 1009
        while True:
            # Never the beginning of an earlier one.
            prompt = [ids[(place + i) % len(ids)] for i in range(join_tokens)]
            place += 2 * 1009 + 1
            start = time.perf_counter()
            async with answered(port, {"prompt": prompt, "max_tokens": 1}) as reader:
                await reader.read()
            if start >= counted_from:
                waited.append(1e3 * (time.perf_counter() - start))

    tasks = [asyncio.ensure_future(stream(n)) for n in range(streams)]
    try:
        started = asyncio.gather(*(event.wait() for event in begun))
        await first_of(started, *tasks)
        tasks += [asyncio.ensure_future(join(n)) for n in range(JOINERS * (join_tokens > 0))]
        counted_from = time.perf_counter() + SETTLE_S
        await first_of(asyncio.ensure_future(asyncio.sleep(SETTLE_S + seconds)), *tasks)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    if len(gaps) < 100:
        raise BenchmarkError(f"{len(gaps)} waits between tokens in {seconds:g} s are too few")
    gaps.sort()
    return {
        "streams": streams,
        "count": len(gaps),
        **{f"p{p:g}": gaps[int(len(gaps) * p / 100)] for p in (50, 90, 99, 99.9)},
        "longest": gaps[-1],
        "joined": len(waited),
        "joined_ms": statistics.median(waited) if waited else None,
    }


async def first_of(done: asyncio.Future, *tasks: asyncio.Future) -> None:
    """Wait until that is done. Errors: what one of the others raises before."""
    await asyncio.wait([done, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()
    await done


def measure_joining(
    artifact: Path, ids: list[int], rows: int, join_tokens: int, longest: int,
    seconds: float, stall_ms: float | None,
) -> dict:  # fmt: skip
    """A server whose rows stream, alone and while prompts join. `longest` is its context."""
    if not BEFORE < join_tokens < longest:
        raise BenchmarkError(
            f"--join-tokens is {join_tokens}; {BEFORE + 1} to {longest - 1} fit this artifact"
        )
    if rows < 2:
        raise BenchmarkError("--join-tokens needs an artifact of several rows: export with --batch")
    server = Served(artifact, stall_ms)
    try:
        steps = asyncio.run(measure(server.port, ids, rows, 0, longest, seconds / 2))
        joining = asyncio.run(measure(server.port, ids, rows - 1, join_tokens, longest, seconds))
    finally:
        server.close()
    return {
        "tokens": join_tokens,
        "rows": rows,
        "step": steps,
        "joining": joining,
        "steps": {p: joining[p] / steps["p50"] for p in ("p50", "p90", "p99", "p99.9")},
        "ready_s": server.ready_s,
    }
