"""A long run of several ranks: each result is what its request gives alone, on every rank.

    python -m tests.ranks_soak --artifact ARTIFACT --steps 100000 --save ranks_soak.json

The artifact is one of `--tensor-parallel`; its ranks are processes of this machine. Clients of
rank 0 join and leave all the time: greedy, with seeds, penalties and grammars, reading to the end,
cancelling, or with so little time that it runs out. Engines follow one another, with other rows,
variants of the loop, stalls and prefix caches; between them generations are given up half way. The
exit status is 1 if a token is another one, on any rank, or if nothing goes on for two minutes.
"""

import argparse
import faulthandler
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

from tests.driving import variants
from tokenloop.runner import Engine, LoopOptions, Model, Request, RunnerError, load
from tokenloop.runner.rank_decisions import Following, Leading
from tokenloop.runner.ranks import end_ranks, leave, place

PROMPT_LENGTHS = 1, 2, 7, 8, 15, 31, 64, 120
NEW_TOKENS = 1, 2, 5, 16, 40
SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False,
    "properties": {"a": {"enum": ["x", "yes", 17]}},
}  # fmt: skip
CLIENTS, PATIENCE_S = 8, 120


def requests_of(model: Model, draw: random.Random, kinds: int) -> list[Request]:
    """Different requests, some of whose prompts begin alike."""
    beginning, found = [draw.randrange(model.vocab_size) for _ in range(64)], []
    for _ in range(kinds):
        size = draw.choice(PROMPT_LENGTHS)
        ids = beginning[:size] if draw.random() < 0.5 else []
        ids = ids + [draw.randrange(model.vocab_size) for _ in range(max(1, size - len(ids)))]
        more: dict = {}
        if draw.random() < 0.5:
            more |= {
                "temperature": draw.choice((0.7, 1.0)), "top_k": draw.choice((0, 1, 40)),
                "top_p": draw.choice((1.0, 0.9)), "seed": draw.randrange(1 << 40),
            }  # fmt: skip
        if draw.random() < 0.2:
            bias = {draw.randrange(model.vocab_size): draw.uniform(-5, 5)}
            more |= {"logit_bias": bias, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
        if draw.random() < 0.1:
            more["json_schema"] = SCHEMA
        if draw.random() < 0.1:
            more["logprobs"] = 2
        found.append(Request(ids, draw.choice(NEW_TOKENS), **more))
    return found


class Soak:
    """Clients of engines on rank 0. `counts` says how results ended: "whole", "cancelled", "late",
    "given up", and "wrong", of which there must be none."""

    def __init__(self, model: Model, seed: int, kinds: int = 60):
        self._model, self._draw = model, random.Random(seed)
        self._requests = requests_of(model, self._draw, kinds)
        self._expected = [model.generate(one).run().token_ids for one in self._requests]
        self.counts: Counter[str] = Counter()
        self.engines = self.cached_tokens = 0
        self._counting = threading.Lock()

    def run(self, steps: int, seconds: float, fail) -> None:
        """Engines, one after the other, until there are so many steps or so much time is over."""
        loop, draw = self._model.loop, self._draw
        begin, end = loop.steps, time.monotonic() + seconds
        while time.monotonic() < end and (left := steps - (loop.steps - begin)) > 0:
            until = loop.steps + min(left, draw.randint(50, 3000))
            options = draw.choice(variants() + [LoopOptions()] * 10)
            stall = draw.choice((None, None, 0.0, 0.001, 1.0))
            cache_mb = draw.choice((0, 0.05, 0.3, 16))
            rows = draw.randint(1, self._model.batch)
            with Engine(
                self._model, rows, CLIENTS, stall, options, cache_mb, fail
            ) as engine:  # fmt: skip
                clients = [
                    threading.Thread(target=self._client, args=(engine, until, draw.random()))
                    for _ in range(draw.randint(1, CLIENTS))
                ]
                for client in clients:
                    client.start()
                for client in clients:
                    while client.is_alive():
                        before = loop.steps, sum(self.counts.values())
                        client.join(PATIENCE_S)
                        if client.is_alive() and before == (loop.steps, sum(self.counts.values())):
                            faulthandler.dump_traceback()
                            fail(TimeoutError(f"nothing goes on after {loop.steps - begin} steps"))
            self.engines += 1
            self.cached_tokens += engine.counts.cached_tokens
            self._give_up()

    def _client(self, engine: Engine, until: int, seed: float) -> None:
        draw = random.Random(seed)
        while self._model.loop.steps < until:
            number = draw.randrange(len(self._requests))
            way = draw.random()
            timeout_s = draw.uniform(1e-4, 0.05) if way < 0.1 else None
            ticket = engine.submit(self._requests[number], timeout_s)
            try:
                if way > 0.8:
                    for _ in itertools.islice(ticket, draw.randint(1, 20)):
                        pass
                    ticket.cancel()
                elif way > 0.7:
                    time.sleep(draw.uniform(0, 0.02))
                    ticket.cancel()
                ticket.run()
            except RunnerError as error:
                # Alone it was not refused.
                print(f"request {number}: {error}", file=sys.stderr)
            reasons = {"cancelled": "cancelled", "timeout": "late", "error": "refused"}
            ended = reasons.get(ticket.finish_reason)
            self._count(number, ticket.token_ids, ended)
            if draw.random() < 0.2:
                time.sleep(draw.uniform(0, 0.02))

    def _give_up(self) -> None:
        number = self._draw.randrange(len(self._requests))
        result = self._model.generate(self._requests[number])
        for _ in itertools.islice(result, self._draw.randint(1, 5)):
            pass
        self._count(number, result.token_ids, "given up")

    def _count(self, number: int, ids: list[int], ended: str | None) -> None:
        expected = self._expected[number]
        right = ids == (expected if ended is None else expected[: len(ids)])
        right = right and ended != "refused"
        with self._counting:
            self.counts[ended or "whole" if right else "wrong"] += 1


def lead(options: argparse.Namespace) -> int:
    """What rank 0 does; the exit status."""
    fail, start = partial(end_ranks, "ranks_soak"), time.perf_counter()
    model = load(options.artifact, 1)
    with Leading(model, fail):
        soak = Soak(model, options.seed)
        steps = model.loop.steps
        soak.run(options.steps, options.seconds, fail)
    program = model.loop.program
    found = {
        "artifact": options.artifact.name, "ranks": place().count, "batch": model.batch,
        "seed": options.seed, "steps": model.loop.steps - steps, "engines": soak.engines,
        "results": sum(soak.counts.values()), **soak.counts, "wrong": soak.counts["wrong"],
        "cached_tokens": soak.cached_tokens, "gathers": program.transfers.between_ranks.count,
        "messages": program.ranks.told.count, "message_bytes": program.ranks.told.bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    if options.save is not None:
        options.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if soak.counts["wrong"] else 0


def start(command: list[str], ranks: int, **options) -> list[subprocess.Popen]:
    """A command's processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after them in any case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args(arguments)
    if place().count > 1:
        follow = not place().leads
        return leave(Following(load(options.artifact, 1)).follow() if follow else lead(options))
    manifest = json.loads((options.artifact / "manifest.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "tests.ranks_soak", *arguments]
    ranks = start(command, manifest["tensor_parallel"]["ranks"])
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
