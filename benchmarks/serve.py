"""What does serving cost? `python -m benchmarks.serve` gives the same requests to the loop itself
and to the server, whole and as streams, prints tokens a second, and one JSON line.

The ceiling is the loop: BatchGeneration over all requests, in a process of its own. The contenders
take turns, and every round starts each of them anew, so that start to ready is measured too.
Clients run on the same processors as the server. Texts must be equal. With `--clients` each client
asks anew when it has its answer. With `--join-tokens` it measures the time between two tokens, too,
while prompts of so many tokens join (joining.py).
"""

import argparse
import asyncio
import datetime
import json
import random
import statistics
import sys
import time
from pathlib import Path

from benchmarks.common import (
    DEFAULT_ARTIFACT,
    DEFAULT_TEXT,
    BenchmarkError,
    finish,
    machine,
    print_machine,
    run,
)
from benchmarks.joining import measure_joining
from benchmarks.served import Served, ask_all

TARGET, TARGET_CUDA = 0.95, 0.97
STEPS = 3


def ids_of(artifact: Path) -> tuple[list[int], dict]:
    """The ids of a text, and the manifest."""
    from tokenloop.runner.manifest import open_artifact
    from tokenloop.runner.tokenizer import Tokenizer

    found = open_artifact(artifact)
    tokenizer = Tokenizer(found.directory, found.manifest["tokenizer"], found.read)
    text = DEFAULT_TEXT.read_text(encoding="utf-8")[:60_000]
    return tokenizer.encode(text), found.manifest


def requests_of(artifact: Path, count: int) -> list[dict]:
    """Greedy requests with prompts of 16 to 256 ids of a text, or fewer where the context is short,
    and 48 to 128 tokens of output."""
    ids, manifest = ids_of(artifact)
    bos, ids = ids[:1], ids[1:]
    longest = min(255, manifest["max_seq_len"] - 129)
    draw, found = random.Random(0), []
    for _ in range(count):
        start, size = draw.randrange(len(ids) - longest), draw.randint(15, longest)
        prompt = bos + ids[start : start + size]
        found.append({"prompt": prompt, "max_tokens": draw.randint(48, 128)})
    return found


def offline(artifact: Path, requests: list[dict]) -> dict:
    """All requests in one batch: seconds, tokens and texts."""
    from tokenloop.runner import Request, load

    model = load(artifact)
    batch = [Request(r["prompt"], r["max_tokens"]) for r in requests]
    # As the server, whose first request is not timed.
    model.generate_batch(batch[:1]).run()
    start, before = time.perf_counter(), time.process_time()
    results = model.generate_batch(batch).run()
    return {
        "seconds": time.perf_counter() - start,
        "processor_s": time.process_time() - before,
        "tokens": sum(len(result.token_ids) for result in results),
        "texts": [result.text for result in results],
        "rows": model.batch,
    }


def measure_server(
    artifact: Path, requests: list[dict], clients: int, stream: bool, stall_ms: float | None
) -> dict:
    """All requests, of so many clients at once."""
    server = Served(artifact, stall_ms)

    async def everything() -> dict:
        await ask_all(server.port, requests[:1], 1, stream)
        start, before = time.perf_counter(), server.processor_s()
        answers = await ask_all(server.port, requests, clients, stream)
        seconds = time.perf_counter() - start
        gaps = [b - a for _, _, times in answers for a, b in zip(times, times[1:])]
        return {
            "seconds": seconds,
            "processor_s": server.processor_s() - before,
            "tokens": sum(count for _, count, _ in answers),
            "texts": [text for text, _, _ in answers],
            "gaps_ms": [1e3 * gap for gap in gaps],
            "ready_s": server.ready_s,
        }

    try:
        return asyncio.run(everything())
    finally:
        server.close()


def logprobs_ms(artifact: Path, repeats: int = 101) -> dict[str, float]:
    """What a token's log probability costs the host, by the number of alternatives, in milliseconds
    of a processor."""
    import numpy as np

    from tokenloop.runner.logprobs import logprobs_of
    from tokenloop.runner.manifest import open_artifact

    size = open_artifact(artifact).manifest["vocab_size"]
    logits = np.random.default_rng(0).normal(0, 5, size).astype(np.float32)
    found = {}
    for count in (0, 5, 20):
        times = []
        for _ in range(repeats):
            start = time.process_time()
            logprobs_of(logits, 5, count)
            times.append(time.process_time() - start)
        found[str(count)] = 1e3 * statistics.median(times)
    return found


def print_joining(found: dict) -> None:
    step, gaps, steps = found["step"], found["joining"], found["steps"]
    print(f"floor       a step of {found['rows']} rows: {step['p50']:.2f} ms between two tokens")
    print(
        f"joining     prompts of {found['tokens']}: {gaps['p50']:.2f} ms, 99 % within "
        f"{gaps['p99']:.2f} ms: {steps['p99']:.2f} steps ({STEPS})"
    )
    print(
        f"            99.9 % within {gaps['p99.9']:.2f} ms; {gaps['joined']} joined, each after "
        f"{gaps['joined_ms']:.0f} ms",
        flush=True,
    )


def benchmark(options: argparse.Namespace) -> dict:
    artifact, found = options.artifact.resolve(), machine()
    print_machine(found)
    requests = requests_of(artifact, options.requests)
    clients = options.clients or len(requests)
    ids, manifest = ids_of(artifact)
    joining = None
    if options.join_tokens:
        joining = measure_joining(
            artifact, ids, manifest["batch"], options.join_tokens, manifest["max_seq_len"],
            options.seconds, options.max_stall_ms,
        )  # fmt: skip
        print_joining(joining)
    again = ["-m", "benchmarks.serve", "--offline", "--artifact", artifact]
    again += ["--requests", options.requests]
    rounds: dict[str, list[dict]] = {"loop": [], "server": [], "server, streams": []}
    for n in range(options.repeats):
        print(f"round {n + 1} of {options.repeats}", file=sys.stderr, flush=True)
        done = run([sys.executable, *again], "the loop")
        rounds["loop"].append(json.loads(done.output.splitlines()[-1]))
        for name in ("server", "server, streams"):
            stream = name != "server"
            measured = measure_server(artifact, requests, clients, stream, options.max_stall_ms)
            rounds[name].append(measured)
    expected = rounds["loop"][0]["texts"]
    for name, measured in rounds.items():
        if any(one["texts"] != expected for one in measured):
            raise BenchmarkError(f"{name}: a text differs from the loop's")
    speed = {
        name: [one["tokens"] / one["seconds"] for one in measured]
        for name, measured in rounds.items()
    }
    gaps = sorted(gap for one in rounds["server, streams"] for gap in one["gaps_ms"])
    ready = [one["ready_s"] for name in ("server", "server, streams") for one in rounds[name]]
    result = {
        "benchmark": "serve",
        "artifact": artifact.name,
        "rows": rounds["loop"][0]["rows"],
        "requests": len(requests),
        "clients": clients,
        # Otherwise a text that is another request's would not show.
        "distinct_texts": len(set(expected)),
        "prompt_tokens": sum(len(request["prompt"]) for request in requests),
        "new_tokens": rounds["loop"][0]["tokens"],
        "max_stall_ms": options.max_stall_ms,
        "tok_s": {name: statistics.median(values) for name, values in speed.items()},
        "tok_s_range": {name: [min(values), max(values)] for name, values in speed.items()},
        # Of one round each, which ran beside each other.
        "of_the_loop": {
            name: statistics.median(a / b for a, b in zip(speed[name], speed["loop"]))
            for name in ("server", "server, streams")
        },
        # On a busy machine this says more: a token's time of the processors, without the clients'.
        "processor_ms_of_a_token": {
            name: statistics.median(1e3 * one["processor_s"] / one["tokens"] for one in measured)
            for name, measured in rounds.items()
        },
        "between_chunks_ms": {
            f"p{p}": gaps[min(len(gaps) - 1, len(gaps) * p // 100)] for p in (50, 99)
        },
        "ready_s": [min(ready), statistics.median(ready), max(ready)],
        "joining": joining,
        "logprobs_ms": logprobs_ms(artifact),
        "repeats": options.repeats,
        "machine": found,
        "date": datetime.date.today().isoformat(),
    }
    target = TARGET_CUDA if manifest.get("device") == "cuda" else TARGET
    print(f"ceiling     the loop: {result['tok_s']['loop']:.1f} tok/s, {result['rows']} rows")
    for name, ratio in result["of_the_loop"].items():
        print(f"{name:<17} {result['tok_s'][name]:7.1f} tok/s, {ratio:.3f} of it ({target})")
    texts = f"{result['distinct_texts']} texts, all the loop's"
    print(f"answers           all of {len(requests)} for {clients} clients, {texts}")
    for name, ms in result["processor_ms_of_a_token"].items():
        print(f"{name:<17} {ms:7.2f} ms of the processors for a token")
    between = result["between_chunks_ms"]
    print(f"between chunks    {between['p50']:.1f} ms, and 99 % within {between['p99']:.1f} ms")
    print(f"start to ready    {result['ready_s'][1]:.2f} s, at most {result['ready_s'][2]:.2f} s")
    for count, ms in result["logprobs_ms"].items():
        print(f"log probability   {ms:.2f} ms of a processor, with {count} alternatives")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=DEFAULT_ARTIFACT)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-stall-ms", type=float, help="(default: the server's)")
    parser.add_argument("--clients", type=int, help="at a time (default: one for each request)")
    parser.add_argument(
        "--join-tokens", type=int, default=0, metavar="N",
        help="measure the time between tokens while prompts of N tokens join, too",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10, help="how long that takes")
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.offline:
            found = offline(options.artifact, requests_of(options.artifact, options.requests))
            print(json.dumps(found))
        else:
            finish(benchmark(options), options.save)
    except BenchmarkError as error:
        print(f"python -m benchmarks.serve: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
