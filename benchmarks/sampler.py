"""What does it cost to choose tokens with ExecuTorch's CPU kernels, all rows in one call?
`python -m benchmarks.sampler` prints the floor, the figures, and one JSON line.

Three ways give a step's tokens: `ours` is one call of `greedy` or `sample` for all rows and one
copy to the host; `loop` is the same methods made for one row, called row after row, each token
copied to the host; `torch` is eager torch with the steps of transformers' warpers and multinomial.
Figures are medians of interleaved rounds. Every token of `ours` is compared with the reference's.
(benchmarks/sampler_cuda.py asks the same of a GPU.)
"""

import argparse
import datetime
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import THREADS
from tokenloop.export.pte.pte_program import to_program
from tokenloop.export.pte.selection import selection_methods
from tokenloop.runner.engines import executorch_runtime
from tokenloop.sampler.sample import sample

VOCABULARIES = 151_936, 262_144
BATCHES = 1, 4, 16, 32
TEMPERATURE, EXPONENT = 0.8, 1.2
# Of each case: top_k, top_p, and which rows are greedy: all, none, or every other.
CASES = {
    "greedy": (0, 1.0, "all"),
    "sampled": (0, 1.0, "none"),
    "half greedy, half sampled": (0, 1.0, "half"),
    "top-p 0.95": (0, 0.95, "none"),
    "top-k 40, top-p 0.95": (40, 0.95, "none"),
    "half greedy, half top-k": (40, 0.95, "half"),
}
WAYS = ("ours", "loop", "torch")


@dataclass(frozen=True)
class Methods:
    """`greedy` and `sample` of one batch size, as ExecuTorch runs them."""

    greedy: executorch_runtime.Method
    sample: executorch_runtime.Method

    @classmethod
    def of(cls, batch: int, vocabulary: int) -> "Methods":
        """Export them, and load them."""
        with tempfile.NamedTemporaryFile(suffix=".pte") as file:
            methods = selection_methods(batch, vocabulary)
            to_program(methods, {}, True, lambda what: None).write_to_file(file)
            file.flush()
            program = executorch_runtime.Program(file.name)
            return cls(program.load_method("greedy"), program.load_method("sample"))


@dataclass(frozen=True)
class Work:
    """Logits [B, V] whose probabilities are like those of words, 1 / rank^1.2, and the rows'
    parameters: temperature, top_k, top_p, seed and position."""

    logits: Tensor
    parameters: tuple[Tensor, ...]

    @classmethod
    def make(cls, case: str, vocabulary: int, batch: int) -> "Work":
        top_k, top_p, rows = CASES[case]
        generator = torch.Generator().manual_seed(vocabulary + batch)
        scores = -EXPONENT * torch.arange(1, vocabulary + 1).log()
        logits = torch.stack(
            [scores[torch.randperm(vocabulary, generator=generator)] for _ in range(batch)]
        )
        chosen = [rows == "all" or (rows == "half" and i % 2 == 1) for i in range(batch)]
        parameters = (
            torch.tensor([0.0 if is_greedy else TEMPERATURE for is_greedy in chosen]),
            torch.full((batch,), top_k),
            torch.full((batch,), top_p),
            torch.arange(batch) * 7919,
            torch.full((batch,), 100),
        )
        return cls(logits, parameters)

    def row(self, i: int) -> "Work":
        return Work(self.logits[i : i + 1], tuple(x[i : i + 1] for x in self.parameters))


def tokens_of(methods: Methods, work: Work) -> list[int]:
    """One call for all rows, and one copy to the host."""
    arrays = [work.logits.numpy(), *(x.numpy() for x in work.parameters)]
    if not work.parameters[0].any():
        return methods.greedy.call(arrays[:1])[0].ravel().tolist()
    return methods.sample.call(arrays)[0].ravel().tolist()


def torch_tokens(work: Work) -> list[int]:
    """The usual way: warpers and multinomial over the rows that are sampled, argmax of the rest."""
    temperature, top_k, top_p, *_ = work.parameters
    tokens = torch.argmax(work.logits, -1)
    rows = temperature > 0
    if rows.any():
        logits = work.logits[rows] / temperature[rows, None]
        if top_k[0]:
            kth = torch.topk(logits, int(top_k[0])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if top_p[0] < 1:
            ascending, order = torch.sort(logits)
            removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p[0]
            removed[:, -1:] = False
            logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
        tokens[rows] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return tokens.tolist()


def measure(work: Work, methods: Methods, one: Methods, repeats: int) -> dict:
    """Milliseconds of a step each way, method calls, copies, and how many tokens were wrong."""
    batch = len(work.logits)
    alone = [work.row(i) for i in range(batch)]
    steps: dict[str, Callable[[], list[int]]] = {
        "ours": lambda: tokens_of(methods, work),
        "loop": lambda: [tokens_of(one, row)[0] for row in alone],
        "torch": lambda: torch_tokens(work),
    }
    expected = sample(work.logits, *work.parameters).ravel().tolist()
    wrong = sum(
        a != b for way in ("ours", "loop") for a, b in zip(steps[way](), expected, strict=True)
    )
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(repeats):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            times[way].append(1e3 * (time.perf_counter() - start))
    return {
        "ms": {way: statistics.median(values) for way, values in times.items()},
        "calls": {"ours": 1, "loop": batch},
        "copies": {"ours": 1, "loop": batch},
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")

    # torch, torchao and executorch warn about one another.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = common.machine()
    common.print_machine(found)
    limit, _ = common.work(sys.executable, "ceiling", "the ceiling", threads=THREADS)
    bandwidth = limit["bandwidth_gb_s"] * 1e9
    executorch_runtime.set_num_threads(THREADS)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(f"floor: the logits read once at {bandwidth / 1e9:.1f} GB/s. Milliseconds a step:")
    ways = "".join(f"{way:>9}" for way in WAYS)
    print(f"{'case':<26}{'V':>8}{'B':>4}{'floor':>8}{ways}{'calls':>8}{'wrong':>7}", flush=True)
    rows = []
    for vocabulary in VOCABULARIES:
        methods = {batch: Methods.of(batch, vocabulary) for batch in BATCHES}
        for case in CASES:
            for batch in BATCHES:
                work = Work.make(case, vocabulary, batch)
                result = measure(work, methods[batch], methods[1], options.repeats)
                floor_ms = 1e3 * work.logits.nbytes / bandwidth
                print(
                    f"{case:<26}{vocabulary:>8}{batch:>4}{floor_ms:>8.2f}"
                    + "".join(f"{result['ms'][way]:>9.2f}" for way in WAYS)
                    + f"{'/'.join(map(str, result['calls'].values())):>8}{result['wrong']:>7}",
                    flush=True,
                )
                shape = {"case": case, "vocabulary": vocabulary, "batch": batch}
                rows.append(shape | {"floor_ms": floor_ms} | result)
    answer = {
        "benchmark": "sampler",
        "date": datetime.date.today().isoformat(),
        "machine": found,
        "torch": torch.__version__,
        "bandwidth_gb_s": limit["bandwidth_gb_s"],
        "repeats": options.repeats,
        "rows": rows,
    }
    common.finish(answer, options.save)


if __name__ == "__main__":
    main()
