"""A long run of one model: memory stays flat, and each result is what its request gives alone.

    python -m tests.soak --artifact artifacts/gemma3-xnnpack --tokens 1000000 --save soak.json

Batches and single generations follow one another. Requests join and leave, greedy and sampled with
seeds; some are cancelled, and some generations are given up half way. The variant of the loop
changes. The exit status is 1 if a token is another one, or if memory grows by more than 1 % after
the first tenth of the run. Ctrl-C ends it sooner, with the figures until then.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.driving import variants
from tokenloop import runner
from tokenloop.runner import LoopOptions, Model, Request

GROWTH = 1.01
PROMPT_LENGTHS = 1, 2, 3, 7, 12, 31, 64, 129
# A GPU has many rows. With few requests or short ones most of them would be empty.
NEW_TOKENS = {"cpu": (1, 2, 5, 16, 40), "cuda": (1, 5, 40, 100, 200, 350)}
REQUESTS = {"cpu": 24, "cuda": 600}  # of a batch at the most


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the process, and bytes in use on the GPU (0 without one)."""

    resident: int
    gpu: int

    @classmethod
    def now(cls, cuda: bool) -> "Memory":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        gpu = 0
        if cuda:
            import torch

            free, total = torch.cuda.mem_get_info()
            gpu = total - free
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), gpu)

    def growth_to(self, later: "Memory") -> dict[str, float]:
        pairs = {"resident": (self.resident, later.resident), "gpu": (self.gpu, later.gpu)}
        return {name: after / before for name, (before, after) in pairs.items() if before}


class Soak:
    """Random generations on one model. `counts` says how results ended: "whole", "cancelled",
    "given up", and "wrong", of which there must be none."""

    def __init__(self, model: Model, seed: int = 0, kinds: int = 32):
        """`kinds` is how many different requests there are."""
        self._model, self._draw = model, random.Random(seed)
        manifest = model.manifest
        device = manifest.get("device", "cpu")
        self._new_tokens, self._requests = NEW_TOKENS[device], REQUESTS[device]
        options = [option for option in variants() if self._can(option)]
        # A variant that feeds from the host is slow, and others are what people use.
        self._options = [LoopOptions()] * 3 * len(options) + options
        self.requests = [self._request(manifest) for _ in range(kinds)]
        self.expected = [model.generate(request).run().token_ids for request in self.requests]
        self.counts: Counter[str] = Counter()
        self.tokens = 0

    def run(self, tokens: int, cuda: bool = False, report=lambda found: None) -> dict[str, float]:
        """Generate at least so many tokens, or those until Ctrl-C; how many times as much memory
        there is in the end as after the first tenth. `report` is called with each hundredth's
        figures."""
        before, start = None, time.perf_counter()
        done = 0
        try:
            while self.tokens < tokens:
                (self._single if self._draw.random() < 0.1 else self._batch)()
                if before is None and self.tokens >= tokens / 10:
                    before = Memory.now(cuda)
                if self.tokens * 100 // tokens > done:
                    done = self.tokens * 100 // tokens
                    seconds = round(time.perf_counter() - start, 1)
                    memory = Memory.now(cuda)
                    report({"tokens": self.tokens, "seconds": seconds, **vars(memory)})
        except KeyboardInterrupt:
            if before is None:
                raise
        return before.growth_to(Memory.now(cuda))

    def _can(self, options: LoopOptions) -> bool:
        try:
            self._model.loop.variant(options)
        except runner.RunnerError:
            return False
        return True

    def _request(self, manifest: dict) -> Request:
        draw = self._draw
        room = manifest["max_seq_len"]
        lengths = [n for n in PROMPT_LENGTHS if n + max(self._new_tokens) <= room]
        ids = [draw.randrange(manifest["vocab_size"]) for _ in range(draw.choice(lengths))]
        if draw.random() < 0.5:
            return Request(ids, draw.choice(self._new_tokens))
        sampling = {
            "temperature": draw.choice((0.7, 1.0)), "top_k": draw.choice((0, 1, 40)),
            "top_p": draw.choice((1.0, 0.9)), "seed": draw.randrange(1 << 40),
        }  # fmt: skip
        return Request(ids, draw.choice(self._new_tokens), **sampling)

    def _single(self) -> None:
        number, draw = self._draw.randrange(len(self.requests)), self._draw
        result = self._model.generate(self.requests[number], options=draw.choice(self._options))
        if draw.random() < 0.3:
            for _ in itertools.islice(result, draw.randint(1, 5)):
                pass
            self._count(result, number, "given up")
        else:
            self._count(result.run(), number, "whole")

    def _batch(self) -> None:
        draw = self._draw
        count = draw.randint(1, self._requests)
        numbers = [draw.randrange(len(self.requests)) for _ in range(count)]
        requests = [self.requests[number] for number in numbers]
        most = self._model.batch
        rows = draw.choice((draw.randint(1, most), most, most))
        batch = self._model.generate_batch(requests, draw.choice(self._options), rows)
        cancelled = {i for i in range(len(numbers)) if draw.random() < 0.1}
        last = draw.randint(1, 60) if draw.random() < 0.1 else None
        for index, _ in itertools.islice(batch, last):
            if index in cancelled and draw.random() < 0.5:
                batch.results[index].cancel()
        for result, number in zip(batch.results, numbers):
            ended = {"cancelled": "cancelled", None: "given up"}.get(result.finish_reason, "whole")
            self._count(result, number, ended)

    def _count(self, result, number: int, ended: str) -> None:
        expected, ids = self.expected[number], result.token_ids
        right = ids == (expected if ended == "whole" else expected[: len(ids)])
        self.counts[ended if right else "wrong"] += 1
        self.tokens += len(ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="for the engine; by default all processors")
    parser.add_argument("--save", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    model = runner.load(options.artifact, options.threads)
    cuda = model.manifest["device"] == "cuda"
    soak = Soak(model, options.seed)
    start = time.perf_counter()
    hundredths = []

    def report(found: dict) -> None:
        hundredths.append(found)
        if len(hundredths) % 10 == 0:
            print(json.dumps(found), flush=True)

    growth = soak.run(options.tokens, cuda, report)
    found = {
        "artifact": options.artifact.name, "batch": model.batch, "seed": options.seed,
        "tokens": soak.tokens, "results": sum(soak.counts.values()), **soak.counts,
        "growth": {name: round(value, 5) for name, value in growth.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    print(json.dumps(found))
    if options.save:
        text = json.dumps(found | {"hundredths": hundredths}, indent=1)
        options.save.write_text(text + "\n", encoding="utf-8")
    return 1 if soak.counts["wrong"] or max(growth.values()) > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
