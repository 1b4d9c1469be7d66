"""A server in a process, and clients of it: what the benchmark of serving measures with."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.common import ROOT, BenchmarkError

START = re.compile(r" on http://127\.0\.0\.1:(\d+) ")
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


class Served:
    """`runner/serve.py` in a process: its `port`, and `ready_s` from its start on."""

    def __init__(self, artifact: Path, stall_ms: float | None):
        command = [sys.executable, str(ROOT / "runner/serve.py"), "--port", "0"]
        command += ["--artifact", str(artifact), "--max-queue", "4096"]
        command += [] if stall_ms is None else ["--max-stall-ms", str(stall_ms)]
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
        # It logs each request, and waits for whoever reads that.
        self._log = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def processor_s(self) -> float:
        """Seconds of processors that it has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self._log.wait()
        self.process.stderr.close()


@asynccontextmanager
async def answered(port: int, request: dict) -> AsyncIterator[asyncio.StreamReader]:
    """The body of the answer to a greedy request; whoever leaves early hangs up. Errors:
    BenchmarkError for one that is refused."""
    body = json.dumps(request | {"temperature": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        head = f"{HEAD}connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        while await reader.readline() != b"\r\n":
            pass
        if b" 200 " not in status:
            raise BenchmarkError(f"the server: {(await reader.read()).decode()}")
        yield reader
    finally:
        writer.close()


async def events(port: int, request: dict) -> AsyncIterator[tuple[float, dict]]:
    """The events of a stream, each with the time when it came."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with answered(port, request | options) as reader:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                yield now, json.loads(line.removeprefix(b"data: "))


async def ask(port: int, request: dict, stream: bool) -> tuple[str, int, list[float]]:
    """Text, number of tokens, and when pieces of it came."""
    if not stream:
        async with answered(port, request) as reader:
            answer = json.loads(await reader.read())
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"], []
    text, times, usage = "", [], None
    async for now, event in events(port, request):
        if "error" in event:
            raise BenchmarkError(f"the server: {event['error']['message']}")
        usage = event["usage"] or usage
        if event["choices"]:
            times.append(now)
            text += event["choices"][0]["text"]
    return text, usage["completion_tokens"], times


async def ask_all(
    port: int, requests: list[dict], clients: int, stream: bool
) -> list[tuple[str, int, list[float]]]:
    """The answers to all requests, in their order. Each client asks anew when it has its answer."""
    left = iter(enumerate(requests))
    answers: list[tuple[str, int, list[float]] | None] = [None] * len(requests)

    async def client() -> None:
        for number, request in left:
            answers[number] = await ask(port, request, stream)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers
