"""What does sampling cost in a decode step on a CUDA GPU? A step's milliseconds with all rows
greedy, all sampled, half of them sampled, and all sampled with top-k and top-p; and with a grammar
in all rows or in one of four, and with penalties. The artifacts are of Qwen3-0.6B's shape with
random weights in bf16, of 1 row and of 32.

`python -m benchmarks.sampled_step` exports them; with --artifact it takes one or more that
were exported before. It prints the kernels of a step, its milliseconds and their ratio to all
greedy, whether the ids are those of the loop without graphs, and one JSON line. A figure is the
median of generations that take turns with those of the other kinds.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cuda_common import PROMPT, export, origin, profiled, save
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request

SAMPLED = {"temperature": 0.8}
FILTERED = SAMPLED | {"top_k": 40, "top_p": 0.95}
# What rows ask for, in turn; a single row asks for the first.
KINDS = {
    "greedy": [{}],
    "sampled": [SAMPLED],
    "half sampled": [SAMPLED, {}],
    "top-k and top-p": [FILTERED],
    "grammar": [{"grammar": "start: /[a-z ]{4000}/"}],
    "1 of 4 a grammar": [{"grammar": "start: /[a-z ]{4000}/"}, {}, {}, {}],
    "penalties": [{"repetition_penalty": 1.1, "frequency_penalty": 0.2}],
}
PLAIN = LoopOptions(graph=False)
# Tokens of a row after which steps are timed.
WARM_UP = 16


def run(model, kind: str, steps: int, options: LoopOptions | None = None) -> tuple[list, float]:
    """Ids of a generation of so many steps in each row, and milliseconds of a step."""
    asked = KINDS[kind]
    requests = [
        Request([*PROMPT, 5 + row], steps + 1, seed=row, **asked[row % len(asked)])
        for row in range(model.batch)
    ]
    batch, taken, times = model.generate_batch(requests, options), 0, []
    for index, _ in batch:
        # A step's tokens come row by row; prompts are still computed while the first steps run.
        if index == 0:
            taken += 1
            if taken in (WARM_UP, steps + 1):
                times.append(time.perf_counter())
    ids = [result.token_ids for result in batch.results]
    return ids, 1e3 * (times[-1] - times[0]) / (steps + 1 - WARM_UP) if times[1:] else 0.0


def kernels_of_a_step(model, kind: str) -> float:
    """Kernels that the profiler sees of a step, from the difference of two lengths."""
    counts = []
    for steps in (8, 40):
        events = profiled(lambda steps=steps: run(model, kind, steps))
        counts.append(sum(event["cat"] == "kernel" for event in events))
    return (counts[1] - counts[0]) / 32


def measure(model, steps: int, repeats: int) -> list[dict]:
    """Every kind's figures; of one row there is no half and no fourth."""
    kinds = [kind for kind in KINDS if model.batch > 1 or len(KINDS[kind]) == 1]
    # The first run of a kind loads its methods and captures its graphs.
    ids = {kind: run(model, kind, steps)[0] for kind in kinds}
    times = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            times[kind].append(run(model, kind, steps)[1])
    greedy_ms = statistics.median(times["greedy"])
    return [
        {
            "batch": model.batch,
            "kind": kind,
            "kernels": kernels_of_a_step(model, kind),
            "ms": statistics.median(times[kind]),
            "of_greedy": statistics.median(times[kind]) / greedy_ms,
            "all_ms": times[kind],
            "identical": run(model, kind, steps, PLAIN)[0] == ids[kind],
        }
        for kind in kinds
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="qwen3-0.6b", help="a name in benchmarks/configs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], metavar="N")
    parser.add_argument("--artifact", type=Path, nargs="+", help="exported before; only these")
    parser.add_argument("--steps", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for case in options.artifact or options.batch:
            artifact = case if options.artifact else export(
                options.config, Path(directory), "--quant", "bf16", "--batch", case,
                "--max-seq-len", 1024,
            )  # fmt: skip
            model = runner.load(artifact)
            # A grammar needs an end. Nothing else shall have one.
            model.tokenizer.eos_token_ids[:] = [model.vocab_size - 1]
            for row in measure(model, options.steps, options.repeats):
                rows.append({"artifact": artifact.name, "quant": model.manifest["quant"]} | row)
                print(
                    f"{artifact.name}, {row['batch']} rows, {row['kind']:<16} "
                    f"{row['kernels']:7.1f} kernels {row['ms']:8.3f} ms "
                    f"{row['of_greedy']:6.3f} x greedy, ids "
                    + ("identical" if row["identical"] else "DIFFERENT"),
                    flush=True,
                )
            # Before the next one's weights come.
            del model
            gc.collect()
    save({**origin("sampled_step"), "steps": options.steps, "rows": rows}, options.output)
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
