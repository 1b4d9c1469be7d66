"""Threads that use one model at once: each generation gives what it gives alone, or is refused.

    python -m tests.threads --calls 1000000
    python -m tests.threads --calls 20000 --artifact artifacts/gemma3-xnnpack

The program gives Python's global lock away inside its methods, as engines do. Threads generate one
prompt or a batch, at once or token by token; they give generations up, cancel them, and advance
those of other threads. The exit status is 1 if anything but a RunnerError came, or another token.
"""

import argparse
import itertools
import json
import random
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tokenloop import runner
from tokenloop.runner import Model, Request, RunnerError
from tokenloop.runner.grammar import Grammars
from tokenloop.runner.loop import Loop
from tokenloop.runner.program import GREEDY, Choice, Program, Selected
from tokenloop.runner.transfers import Transfers

VOCABULARY = 97


def masked(logits, allowed):
    bits = np.unpackbits(allowed, bitorder="little")[: len(logits)]
    return np.where(bits == 1, logits, -np.inf)


def adjusted(logits, ids, scale, bias):
    found, x = logits.copy(), logits[ids]
    found[ids] = np.where(x < 0, x * scale, x / scale) + bias
    return found


CHANGED = {"mask": masked, "adjust": adjusted}


class YieldingProgram(Program):
    """Its logits depend on all tokens of a row's sequence and on nothing else. Each method lets
    another thread run while it is under way, and `intruders` counts methods that began then."""

    has_logits = True

    def __init__(self, batch: int, max_seq_len: int = 64, max_prefill: int = 5):
        self.manifest = {
            "batch": batch, "max_seq_len": max_seq_len, "max_prefill": max_prefill,
            "vocab_size": VOCABULARY, "methods": ["mask_row", "adjust_row"], "backend": "none",
        }  # fmt: skip
        self.transfers, self.intruders = Transfers(), 0
        self._inside = threading.Lock()
        self._state = np.zeros((batch, max_seq_len), np.int64)
        self._ids = np.zeros((2, batch, 1), np.int64)
        self._row_id = np.zeros((1, 1), np.int64)

    def load_sampling(self, method: str, embed: bool) -> None:
        self._run(lambda: None)

    def prefill(self, tokens, positions, *row):
        return self._run(lambda: self._prefill(tokens, positions, *row))

    def decode(self, fed, positions):
        return self._run(lambda: self._decode(fed, positions))

    def select(self, logits, buffer, choice: Choice = GREEDY):
        token = self._run(lambda: self._choose(self._ids[buffer], logits, choice))
        return Selected(token, token)

    def select_row(self, logits, choice):
        return self._run(lambda: self._choose(self._row_id, logits, choice))

    def next_id(self, buffer):
        return self._ids[buffer]

    def empty(self, *shape):
        return np.zeros(shape, np.int64)

    def _run(self, method):
        alone = self._inside.acquire(blocking=False)
        self.intruders += not alone
        try:
            time.sleep(0)
            done = method()
            time.sleep(0)
            return done
        finally:
            if alone:
                self._inside.release()

    def _prefill(self, tokens, positions, row=(0,)):
        self._state[row[0], positions] = tokens[0]
        return self._logits(row[0], positions[-1])

    def _decode(self, fed, positions):
        for row, position in enumerate(positions):
            self._state[row, position] = fed[row, 0]
        rows = [self._logits(row, position) for row, position in enumerate(positions)]
        self.logits = np.concatenate(rows)
        return self.logits

    def _logits(self, row, last):
        logits = np.zeros((1, VOCABULARY), np.float32)
        logits[0, zlib.crc32(self._state[row, : last + 1].tobytes()) % VOCABULARY] = 1
        return logits

    def _choose(self, out, logits, choice):
        for method, rows in choice.changes:
            for row, inputs in rows.items():
                logits[row] = CHANGED[method](logits[row], *(values[0] for values in inputs))
        out[:, 0] = logits.argmax(axis=1)
        if choice.inputs:
            seeds, temperature = choice.inputs[3], choice.inputs[0]
            out[:, 0] = np.where(temperature > 0, (out[:, 0] + seeds) % VOCABULARY, out[:, 0])
        return out


class Tokenizer:
    """Ids as text, in place of an artifact's tokenizer."""

    eos_token_ids = ()

    def stream(self, shown_tokens=()):
        return SimpleNamespace(push=lambda token_id: f"{token_id} ", finish=lambda: "")


def yielding_model(batch: int = 3, max_seq_len: int = 64) -> Model:
    """A model of YieldingProgram, which no artifact is needed for."""
    model = Model.__new__(Model)
    model.loop = Loop(YieldingProgram(batch, max_seq_len))
    model.manifest = model.loop.program.manifest
    model.vocab_size, model.max_seq_len = VOCABULARY, model.manifest["max_seq_len"]
    model.batch, model.tokenizer, model.load_s = batch, Tokenizer(), 0.0
    model._directory = Path("artifacts/yielding")
    model.grammars = Grammars(model.tokenizer, VOCABULARY)
    return model


class Stress:
    """Threads on one model. `counts` says how calls ended: "right", "refused", "given up" (some
    tokens, which are right), and "wrong" or the name of an error, of which there must be none."""

    def __init__(self, model: Model, seed: int = 0):
        self._model, self._seed = model, seed
        draw = random.Random(seed)
        self.requests = [
            Request(
                [draw.randrange(2, 90) for _ in range(draw.choice((1, 2, 3, 7, 12, 31)))],
                draw.randint(1, 6), temperature=draw.choice((0, 0, 0.8)), seed=draw.randint(1, 9),
            )
            for _ in range(24)
        ]  # fmt: skip
        # What each gives alone, before there is another thread.
        self.expected = [model.generate(request).run().token_ids for request in self.requests]
        self.counts: Counter[str] = Counter()
        self._lock, self._last = threading.Lock(), None

    def run(self, threads: int, calls: int) -> Counter[str]:
        """Make so many calls in so many threads; the counts."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            begun = [
                threading.Thread(target=self._work, args=(n, range(n, calls, threads)))
                for n in range(threads)
            ]
            for thread in begun:
                thread.start()
            for thread in begun:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        return self.counts

    def _work(self, number: int, calls: range) -> None:
        draw, found = random.Random(f"{self._seed} {number}"), Counter()
        ways = [self._whole] * 4 + [self._slowly, self._slowly, self._batch, self._other]
        ways += [self._given_up, self._cancelled]
        for _ in calls:
            try:
                found[draw.choice(ways)(draw)] += 1
            except RunnerError as error:
                found["refused" if "\n" not in str(error) else "several lines"] += 1
                # Whoever was first gets on.
                time.sleep(draw.random() * 4e-3)
            except Exception as error:
                found[f"{type(error).__name__}: {error}"] += 1
        with self._lock:
            self.counts += found

    def _begin(self, draw: random.Random):
        number = draw.randrange(len(self.requests))
        generation = self._model.generate(self.requests[number])
        self._last = generation, self.expected[number]
        return self._last

    def _whole(self, draw) -> str:
        generation, expected = self._begin(draw)
        return "right" if generation.run().token_ids == expected else "wrong"

    def _slowly(self, draw) -> str:
        generation, expected = self._begin(draw)
        try:
            for _ in generation:
                time.sleep(0)
        except RunnerError:
            if generation.token_ids != expected[: len(generation.token_ids)]:
                return "wrong"
            raise
        return "right" if generation.token_ids == expected else "wrong"

    def _given_up(self, draw) -> str:
        generation, expected = self._begin(draw)
        count = draw.randint(1, 3)
        head = [token.id for token in itertools.islice(generation, count)]
        # Another thread may have taken some.
        return "given up" if is_part(head, expected) else "wrong"

    def _cancelled(self, draw) -> str:
        generation, expected = self._begin(draw)
        next(generation, None)
        generation.cancel()
        return "given up" if is_part(generation.token_ids, expected) else "wrong"

    def _other(self, draw) -> str:
        """One more token of the generation that was begun last, mostly in another thread."""
        if self._last is None:
            return "given up"
        generation, expected = self._last
        next(generation, None)
        ids = list(generation.token_ids)
        return "given up" if ids == expected[: len(ids)] else "wrong"

    def _batch(self, draw) -> str:
        numbers = [draw.randrange(len(self.requests)) for _ in range(draw.randint(1, 4))]
        results = self._model.generate_batch([self.requests[n] for n in numbers]).run()
        found = [result.token_ids for result in results]
        return "right" if found == [self.expected[n] for n in numbers] else "wrong"


def is_part(ids: list[int], whole: list[int]) -> bool:
    """Whether the ids come in `whole`, in that order."""
    left = iter(whole)
    return all(token_id in left for token_id in ids)


def bad(counts: Counter[str]) -> dict[str, int]:
    """What must not be among the counts."""
    return {key: n for key, n in counts.items() if key not in ("right", "refused", "given up")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artifact", type=Path, help="in place of the program that yields")
    options = parser.parse_args()
    model = runner.load(options.artifact, 1) if options.artifact else yielding_model()
    start = time.perf_counter()
    counts = Stress(model, options.seed).run(options.threads, options.calls)
    intruders = getattr(model.loop.program, "intruders", 0)
    found = {"calls": options.calls, "threads": options.threads, "seed": options.seed}
    found |= {"intruders": intruders, **dict(counts)}
    print(json.dumps(found | {"seconds": round(time.perf_counter() - start, 1)}))
    return 1 if bad(counts) or intruders else 0


if __name__ == "__main__":
    sys.exit(main())
