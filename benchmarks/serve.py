"""What does serving cost? `python -m benchmarks.serve` gives the same requests to the loop itself
and to the server, whole and as streams, prints tokens a second, and one JSON line.

The ceiling is the loop: BatchGeneration over all requests, in a process of its own. The contenders
take turns, and every round starts each of them anew, so that start to ready is measured too.
Clients run on the same processors as the server. Texts must be equal.
"""

import argparse
import asyncio
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import (
    DEFAULT_ARTIFACT,
    DEFAULT_TEXT,
    ROOT,
    BenchmarkError,
    finish,
    machine,
    print_machine,
    run,
)

START = re.compile(r" on http://127\.0\.0\.1:(\d+) ")
TARGET = 0.95


def requests_of(artifact: Path, count: int) -> list[dict]:
    """Greedy requests with prompts of 16 to 256 ids of a text, and 48 to 128 tokens of output."""
    from tokenloop.runner.manifest import open_artifact
    from tokenloop.runner.tokenizer import Tokenizer

    found = open_artifact(artifact)
    tokenizer = Tokenizer(found.directory, found.manifest["tokenizer"], found.read)
    ids = tokenizer.encode(DEFAULT_TEXT.read_text(encoding="utf-8")[:60_000])
    bos, ids = ids[:1], ids[1:]
    sizes = [(15 + 48 * (n * 7 % 6), 48 + 16 * (n * 5 % 6)) for n in range(count)]
    return [
        {"prompt": bos + ids[n * 311 :][:size], "max_tokens": limit}
        for n, (size, limit) in enumerate(sizes)
    ]


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


class Served:
    """`runner/serve.py` in a process: its `port`, and `ready_s` from its start on."""

    def __init__(self, artifact: Path, stall_ms: float):
        command = [sys.executable, str(ROOT / "runner/serve.py"), "--port", "0"]
        command += ["--artifact", str(artifact), "--max-stall-ms", str(stall_ms)]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        said = ""
        for line in self.process.stderr:
            said = line
            if ready := START.search(line):
                self.ready_s, self.port = time.perf_counter() - start, int(ready[1])
                break
        else:
            raise BenchmarkError(f"the server: {said.strip()}")

    def processor_s(self) -> float:
        """Seconds of processors that it has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        # It logs each request.
        self.process.communicate()


async def ask(port: int, request: dict, stream: bool) -> tuple[str, int, list[float]]:
    """Text, number of tokens, and when pieces of it came."""
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = json.dumps(request | {"temperature": 0, "stream": stream} | options).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    while await reader.readline() != b"\r\n":
        pass
    if b" 200 " not in status:
        raise BenchmarkError(f"the server: {(await reader.read()).decode()}")
    text, times, usage = "", [], None
    if stream:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                usage = event["usage"] or usage
                if event["choices"]:
                    times.append(time.perf_counter())
                    text += event["choices"][0]["text"]
    else:
        answer = json.loads(await reader.read())
        text, usage = answer["choices"][0]["text"], answer["usage"]
    writer.close()
    return text, usage["completion_tokens"], times


def measure_server(artifact: Path, requests: list[dict], stream: bool, stall_ms: float) -> dict:
    """All requests at once, each from a client of its own."""
    server = Served(artifact, stall_ms)

    async def everything() -> dict:
        await ask(server.port, requests[0], stream)
        start, before = time.perf_counter(), server.processor_s()
        answers = await asyncio.gather(*(ask(server.port, r, stream) for r in requests))
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


def benchmark(options: argparse.Namespace) -> dict:
    artifact, found = options.artifact.resolve(), machine()
    print_machine(found)
    requests = requests_of(artifact, options.requests)
    again = ["-m", "benchmarks.serve", "--offline", "--artifact", artifact]
    again += ["--requests", options.requests]
    rounds: dict[str, list[dict]] = {"loop": [], "server": [], "server, streams": []}
    for n in range(options.repeats):
        print(f"round {n + 1} of {options.repeats}", file=sys.stderr, flush=True)
        done = run([sys.executable, *again], "the loop")
        rounds["loop"].append(json.loads(done.output.splitlines()[-1]))
        for name in ("server", "server, streams"):
            measured = measure_server(artifact, requests, name != "server", options.max_stall_ms)
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
        "logprobs_ms": logprobs_ms(artifact),
        "repeats": options.repeats,
        "machine": found,
        "date": datetime.date.today().isoformat(),
    }
    print(f"ceiling     the loop: {result['tok_s']['loop']:.1f} tok/s, {result['rows']} rows")
    for name, ratio in result["of_the_loop"].items():
        print(f"{name:<17} {result['tok_s'][name]:7.1f} tok/s, {ratio:.3f} of it ({TARGET})")
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
    parser.add_argument("--max-stall-ms", type=float, default=100)
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
