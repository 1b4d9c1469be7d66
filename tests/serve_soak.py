"""A long run of one server: memory stays flat, and each answer is what its request gives alone.

    python -m tests.serve_soak --artifact ARTIFACT --tokens 1000000 --save serve_soak.json

Clients come all the time. They ask for whole answers and streams, greedy and sampled with seeds;
hang up before or while they are answered, or in the middle of their own body; send bodies that are
none; and ask for what is refused. The exit status is 1 if an answer is another one than it must be,
or if the server's memory grows by more than 1 % after the first tenth of the run.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.serving import events_of, request_of
from tokenloop.runner import Model, Request, load

ROOT = Path(__file__).resolve().parents[1]
GROWTH = 1.01
COMPLETIONS = "/v1/completions"
LENGTHS = 1, 2, 3, 7, 12, 31, 64
NEW_TOKENS = 1, 2, 5, 16, 40, 100
BAD_BODIES = (
    b"", b"{", b"[]", b"\xff", b'{"prompt": 5}', b'{"prompt": "x", "n": 1e3}', b'{"prompt": [-1]}',
    b'{"prompt": "x", "tools": []}', b'{"prompt": "x", "prompt": "y"}', b"[" * 5000,
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request's body, and the answer that it has alone."""

    body: dict
    text: str
    finish_reason: str
    tokens: int


def requests_of(model: Model, draw: random.Random, kinds: int) -> list[Asked]:
    """Different requests, with prompts of ids."""
    found = []
    for _ in range(kinds):
        size, count = draw.choice(LENGTHS), draw.choice(NEW_TOKENS)
        ids = [draw.randrange(model.vocab_size) for _ in range(size)]
        sampling = {"temperature": 0.0}
        if draw.random() < 0.5:
            sampling = {
                "temperature": 0.9,
                "top_p": draw.choice((1.0, 0.9)),
                "seed": draw.randrange(9),
            }
        result = model.generate(Request(ids, count, **sampling)).run()
        body = {"prompt": ids, "max_tokens": count, **sampling}
        reason = result.finish_reason
        found.append(Asked(body, result.text, reason, len(result.token_ids)))
    return found


class Soak:
    """Clients of the server at `port`. `counts` says how their calls ended: "whole", "streamed",
    "refused", "hung up", and "wrong", of which there must be none."""

    def __init__(self, port: int, asked: list[Asked], seed: int = 0):
        self._port, self._asked, self._draw = port, asked, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.tokens = 0

    async def run(
        self, tokens: int, clients: int, each_hundredth: Callable[[], None] = lambda: None
    ) -> None:
        """Let so many clients call until there are so many tokens."""
        done = 0

        async def client() -> None:
            nonlocal done
            ways = [self._whole] * 4 + [self._streamed] * 4
            ways += [self._hung_up, self._bad, self._half]
            while self.tokens < tokens:
                kind, right = await self._draw.choice(ways)()
                self.counts[kind if right else "wrong"] += 1
                if self.tokens * 100 // tokens > done:
                    done = self.tokens * 100 // tokens
                    each_hundredth()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _send(self, body: bytes, **headers: str):
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        head = {"content-type": "application/json"} | headers
        writer.write(request_of("POST", COMPLETIONS, body, head))
        return reader, writer

    async def _answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and body, without the lines that chunks have."""
        reader, writer = await self._send(body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        data = await reader.read()
        writer.close()
        if "transfer-encoding: chunked" in head.lower():
            data = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n(?:\r\n$)?", b"", data)
        return int(head.split()[1]), data

    async def _whole(self) -> tuple[str, bool]:
        one = self._draw.choice(self._asked)
        status, data = await self._answer(json.dumps(one.body).encode())
        self.tokens += one.tokens
        choice = json.loads(data)["choices"][0] if status == 200 else None
        return "whole", choice is not None and self._is_right(one, choice["text"], [choice])

    async def _streamed(self) -> tuple[str, bool]:
        one = self._draw.choice(self._asked)
        status, data = await self._answer(json.dumps(one.body | {"stream": True}).encode())
        self.tokens += one.tokens
        *chunks, last = events_of(data)
        choices = [chunk["choices"][0] for chunk in chunks]
        text = "".join(choice["text"] for choice in choices)
        return "streamed", last == "[DONE]" and self._is_right(one, text, choices)

    def _is_right(self, one: Asked, text: str, choices: list[dict]) -> bool:
        return (text, choices[-1]["finish_reason"]) == (one.text, one.finish_reason)

    async def _hung_up(self) -> tuple[str, bool]:
        one = self._draw.choice(self._asked)
        stream = {"stream": self._draw.random() < 0.7}
        reader, writer = await self._send(json.dumps(one.body | stream).encode())
        # Before the answer, or after some of it.
        if self._draw.random() < 0.5:
            await reader.read(1)
        writer.transport.abort()
        return "hung up", True

    async def _bad(self) -> tuple[str, bool]:
        status, data = await self._answer(self._draw.choice(BAD_BODIES))
        return "refused", status == 400 and "error" in json.loads(data)

    async def _half(self) -> tuple[str, bool]:
        _, writer = await self._send(b'{"prompt": "', **{"content-length": "1000"})
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()
        return "hung up", True


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    asked = requests_of(load(options.artifact), random.Random(options.seed), 100)
    command = [sys.executable, str(ROOT / "runner/serve.py"), "--port", "0"]
    command += ["--artifact", str(options.artifact), "--max-stall-ms", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        for line in server.stderr:
            if ready := re.search(r" on http://127\.0\.0\.1:(\d+) ", line):
                break
        else:
            print("the server did not start", file=sys.stderr)
            return 1
        # What it says from now on is dropped.
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        soak, start = Soak(int(ready[1]), asked, options.seed), time.perf_counter()
        memory: list[float] = []
        asyncio.run(
            soak.run(
                options.tokens, options.clients, lambda: memory.append(resident_mb(server.pid))
            )
        )
        seconds = time.perf_counter() - start
        server.send_signal(signal.SIGTERM)
        server.wait()
        drain.wait()
    tenth = memory[len(memory) // 10]
    found = {
        "artifact": options.artifact.name, "tokens": soak.tokens, "clients": options.clients,
        "seed": options.seed, "counts": dict(soak.counts), "seconds": round(seconds, 1),
        "resident_mb": {"after a tenth": round(tenth, 1), "at the end": round(memory[-1], 1)},
        "growth": round(memory[-1] / tenth, 4),
    }  # fmt: skip
    line = json.dumps(found)
    print(line)
    if options.save is not None:
        options.save.write_text(line + "\n", encoding="utf-8")
    return 1 if soak.counts["wrong"] or memory[-1] > GROWTH * tenth else 0


if __name__ == "__main__":
    sys.exit(main())
