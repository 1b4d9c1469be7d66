"""An artifact for CUDA of one or several ranks, run on GPUs: the same ids on all ranks, in all
variants of the loop, alone and beside others; and what a step takes.

`torchrun --nproc-per-node 2 tests/cuda_tp_artifact.py ARTIFACT --ids FILE` writes the ids to a
file, or compares them with those that are there, such as one rank's. It prints a line of JSON, and
ends with status 1 where ids differ. `--time` measures only, of an artifact with random weights.
With `--one-gpu` all ranks take the same GPU, in turns of milliseconds: that is slow, and says
nothing of several GPUs' memory, but all else is what it is there.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from tokenloop.runner.loop import LoopOptions
from tokenloop.runner.model import Model
from tokenloop.runner.ranks import leave, place
from tokenloop.runner.request import Request

PROMPTS = [[5, 9, 3, 7, 1], [12, *range(20, 60)], [7]]
VARIANTS = {
    "default": LoopOptions(), "no graph": LoopOptions(graph=False),
    "no overlap": LoopOptions(overlap=False), "alias": LoopOptions(feed="alias"),
    "run ahead": LoopOptions(run_ahead=4), "host": LoopOptions(feed="host"),
}  # fmt: skip


def ids_of(model: Model, sampled: bool, tokens: int) -> dict[str, list[list[int]]]:
    """Of all prompts, by how they were computed."""
    given = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7} if sampled else {}
    found = {
        name: [model.generate(p, tokens, options, **given).run().token_ids for p in PROMPTS]
        for name, options in VARIANTS.items()
    }
    requests = [Request(p, tokens, **given) for p in PROMPTS]
    batch = model.generate_batch(requests)
    batch.run()
    return found | {"batch": [result.token_ids for result in batch.results]}


def step_ms(model: Model, rows: int, tokens: int = 100) -> float:
    """The median of three runs' milliseconds a step, of so many rows."""
    times = []
    for _ in range(4):
        batch = model.generate_batch([Request(PROMPTS[0], tokens) for _ in range(rows)])
        begin = time.perf_counter()
        batch.run()
        times.append((time.perf_counter() - begin) * 1e3 / tokens)
    return round(statistics.median(times[1:]), 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--ids", type=Path, help="where one rank's ids are, or will be")
    parser.add_argument("--time", action="store_true", help="measure steps, compare nothing")
    parser.add_argument("--tokens", type=int, default=48, help="of each prompt")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks take the first GPU")
    options = parser.parse_args()
    if options.one_gpu:
        # torch refuses it otherwise.
        os.environ |= {"LOCAL_RANK": "0", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    begin = time.perf_counter()
    model = Model(options.artifact)
    load_s = time.perf_counter() - begin
    ranks, own = model.loop.program.ranks, place()
    line = {"artifact": options.artifact.name, "ranks": own.count, "load_s": round(load_s, 1)}
    status = 0
    if options.time:
        import torch

        line["step_ms"] = {rows: step_ms(model, rows) for rows in sorted({1, model.batch})}
        line["gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    else:
        for kind, sampled in ("greedy", False), ("sampled", True):
            found = ids_of(model, sampled, options.tokens)
            again = ids_of(model, sampled, options.tokens)
            of_ranks = [found] if ranks is None else ranks.all(found)
            first = found["default"]
            checks = {
                "ranks": all(each == found for each in of_ranks), "runs": again == found,
                **{name: ids == first for name, ids in found.items()},
            }  # fmt: skip
            if options.ids is not None and own.leads:
                path = options.ids.with_suffix(f".{kind}.json")
                if path.exists():
                    checks["the file's"] = json.loads(path.read_text()) == first
                else:
                    path.write_text(json.dumps(first))
            line[kind] = [name for name, same in checks.items() if not same] or "equal"
            line[f"{kind} ids"] = len({i for ids in first for i in ids})
            status |= not all(checks.values())
    if own.leads:
        print(json.dumps(line), flush=True)
    return leave(int(status))


if __name__ == "__main__":
    sys.exit(main())
