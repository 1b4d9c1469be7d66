"""How long is it to the first token of a prompt whose beginning is known, and what do log
probabilities cost a step? `python -m benchmarks.prefix_cache --config qwen3-4b` prints both, beside
cold prompts and plain steps of the same run, and one JSON line.

Weights are random. The time is from the request until the host has the token, the median of
`--repeats` runs after one that warms up. Warm is a prompt that was computed before, and the same
with some tokens more. Cold are prompts that nobody saw, with a cache, which keeps them, and without
one. Warm and cold must have the same tokens and log probabilities.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cuda_common import export, origin, save
from tokenloop import runner
from tokenloop.runner import Request

MORE = 30


class Prompts:
    """Random prompts of a model, always other ones."""

    def __init__(self, model):
        self._draw, self._size = random.Random(0), model.vocab_size

    def __call__(self, count: int) -> list[int]:
        return [self._draw.randrange(5, self._size) for _ in range(count)]


def first_token_ms(model, prompt: list[int]) -> tuple[float, int]:
    """Milliseconds to the first token, and how many of the prompt's tokens were cached."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = model.generate(prompt, 1).run()
    return (time.perf_counter() - start) * 1e3, result.cached_tokens


def first_tokens(model, tokens: int, megabytes: int, repeats: int) -> list[dict]:
    """Rows of the table: cold and warm."""
    some_ids = Prompts(model)
    times: dict[str, list[tuple[float, int]]] = {
        "cold, no cache": [], "cold, kept": [], "warm": [], f"warm, {MORE} tokens more": [],
    }  # fmt: skip
    none, cold, warm, more = times.values()
    for _ in range(repeats + 1):
        none.append(first_token_ms(model, some_ids(tokens)))
    model.keep_prefixes(megabytes)
    for _ in range(repeats + 1):
        prompt = some_ids(tokens)
        cold.append(first_token_ms(model, prompt))
        warm.append(first_token_ms(model, prompt))
        more.append(first_token_ms(model, prompt + some_ids(MORE)))
    model.keep_prefixes(0)
    return [
        {
            "what": what, "tokens": tokens + MORE * ("more" in what),
            "cached_tokens": found[-1][1], "ms": statistics.median(ms for ms, _ in found[1:]),
            "all_ms": [ms for ms, _ in found[1:]],
        }
        for what, found in times.items()
    ]  # fmt: skip


def differing(model, tokens: int, megabytes: int, count: int = 8) -> int:
    """How many of so many prompts give another token or another bit of a log probability warm."""
    some_ids, differ = Prompts(model), 0
    model.keep_prefixes(0)
    for n in range(count):
        prompt = some_ids(tokens - 100 * n)
        request = Request(prompt, 8, logprobs=20, temperature=0.9 * (n % 2), seed=n)
        cold = model.generate(request).run()
        model.keep_prefixes(megabytes)
        model.generate(Request(prompt, 1)).run()
        warm = model.generate(request).run()
        model.keep_prefixes(0)
        assert warm.cached_tokens > 0
        differ += (cold.token_ids, cold.logprobs) != (warm.token_ids, warm.logprobs)
    return differ


def step_ms(model, rows: int, logprobs: int | None, repeats: int) -> float:
    """Milliseconds of a step of so many rows, all of which ask for these log probabilities."""
    some_ids, times = Prompts(model), []
    for _ in range(repeats + 1):
        requests = [Request(some_ids(64), 129, logprobs=logprobs) for _ in range(rows)]
        batch = model.generate_batch(requests)
        batch.run()
        times.append(1e3 * rows / batch.stats.decode_tok_s)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_cache", description=__doc__.split("?")[0]
    )
    parser.add_argument("--config", default="qwen3-4b", help="a name in benchmarks/configs")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="rows of the artifact")
    parser.add_argument("--megabytes", type=int, default=6000, help="of the cache")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        longest = options.tokens + MORE + 64
        flags = "--max-seq-len", longest, "--batch", options.batch
        model = runner.load(export(options.config, Path(directory), *flags))
    model.tokenizer.eos_token_ids.clear()
    rows = first_tokens(model, options.tokens, options.megabytes, options.repeats)
    differ = differing(model, options.tokens, options.megabytes)
    steps = [
        {"rows": n, "logprobs": k, "ms": step_ms(model, n, k, 3)}
        for n in sorted({1, options.batch})
        for k in (None, 0, 5, 20)
    ]
    result = origin("prefix_cache") | {
        "config": options.config, "batch": options.batch, "megabytes": options.megabytes,
        "first_tokens": rows, "steps": steps, "differ": differ,
    }  # fmt: skip
    print(f"{'to the first token':<26}{'tokens':>8}{'cached':>8}{'ms':>10}")
    for row in rows:
        print(f"{row['what']:<26}{row['tokens']:>8}{row['cached_tokens']:>8}{row['ms']:>10.2f}")
    print(f"{'a step':<26}{'rows':>8}{'logprobs':>10}{'ms':>8}")
    for step in steps:
        print(f"{'':<26}{step['rows']:>8}{step['logprobs']!s:>10}{step['ms']:>8.3f}")
    print(f"warm and cold differ in {differ} of 8 prompts")
    save(result, options.output)


if __name__ == "__main__":
    main()
