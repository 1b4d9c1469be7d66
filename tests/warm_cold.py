"""Prompts with shared beginnings give the same bytes with the prefix cache and without it.

    python -m tests.warm_cold --artifact A --artifact B --prompts 1000 --save warm_cold.json

Greedy and seeded, one row at a time and as many as the artifact has, with memory for all beginnings
and for few. Compared are the ids, and where the artifact gives them all log probabilities. Where a
token knows its chunk, it is also counted how many logits are others when chunks end elsewhere: that
is why beginnings end where chunks do. The exit status is 1 if a byte differs.
"""

import argparse
import datetime
import json
import random
import sys
from pathlib import Path

import numpy as np

from tokenloop import runner
from tokenloop.runner import Engine, Model, Request
from tokenloop.runner.prefix_cache import MB, block_size
from tokenloop.runner.row_state import RowState


def some_requests(model: Model, count: int, seed: int = 0) -> list[Request]:
    """Requests whose prompts begin as others do: behind one of a few beginnings, or as an earlier
    prompt goes on; half of them greedy."""
    draw = random.Random(seed)
    most = min(model.max_seq_len - 13, 20 * block_size(model.loop.program))

    def some_ids(size: int) -> list[int]:
        return [draw.randrange(3, model.vocab_size) for _ in range(size)]

    begin = [some_ids(draw.randint(1, max(1, most * 3 // 4))) for _ in range(1 + count // 25)]
    requests: list[Request] = []
    for n in range(count):
        ids = draw.choice(begin)
        if n % 4 == 0 and requests:
            ids = draw.choice(requests).prompt
        if n % 7 == 0:
            ids = ids[: draw.randint(1, len(ids))]
        ids = (ids + some_ids(draw.choice((0, 1, 2, 9, 30))))[:most]
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": n} if n % 2 else {}
        logprobs = 5 if model.loop.program.has_logits else None
        requests.append(Request(ids, draw.randint(1, 12), logprobs=logprobs, **sampled))
    return requests


def bytes_of(result) -> tuple:
    return result.token_ids, result.finish_reason, result.logprobs


def compare(model: Model, requests: list[Request]) -> dict:
    """Counts of what differs and of what was found, by rows and by memory."""
    cold = [bytes_of(model.generate(request).run()) for request in requests]
    prompt_tokens = sum(len(request.prompt) for request in requests)
    found = []
    small = smallest(model)
    for rows in sorted({1, model.batch}):
        for budget in (64 * MB, 8 * small):
            with Engine(model, rows, len(requests), 0, prefix_cache_mb=budget / MB) as engine:
                tickets = engine.submit_all(requests)
                warm = [bytes_of(ticket.run()) for ticket in tickets]
                counts = engine.counts
            found.append(
                {
                    "rows": rows,
                    "budget_bytes": budget,
                    "differ": sum(a != b for a, b in zip(warm, cold)),
                    "prompts_that_found_something": sum(t.cached_tokens > 0 for t in tickets),
                    "cached_tokens": counts.cached_tokens,
                    "prompt_tokens": prompt_tokens,
                    "evictions": counts.cache_evictions,
                }
            )
    return {"prompts": len(requests), "runs": found}


def smallest(model: Model) -> int:
    """Bytes of one beginning of one block."""
    program = model.loop.program
    rows = RowState(program, block_size(program))
    return rows.block_bytes + rows.row_bytes


def other_chunks(model: Model, prompts: list[list[int]], seed: int = 0) -> dict[str, int]:
    """How many logits after these prompts are others when a prompt's chunks end elsewhere, and when
    they end at the same places again."""
    program, table, draw = model.loop.program, model.loop._table, random.Random(seed)
    most, where = model.manifest["max_prefill"], (table[:1],) * (model.batch > 1)

    def logits(ids: list[int], sizes: list[int]) -> np.ndarray:
        up, start = program.transfers.upload([ids]), 0
        for size in sizes:
            end = start + size
            out = program.prefill(up[:, start:end], table[start:end], *where)
            start = end
        return np.asarray(out).copy().view(np.int32)

    found = {"logits": 0, "other_chunks_differ": 0, "same_chunks_differ": 0}
    for ids in prompts:
        whole, rest = divmod(len(ids), most)
        sizes, others, left = [most] * whole + [rest] * (rest > 0), [], len(ids)
        while left:
            others.append(min(left, draw.randint(1, most)))
            left -= others[-1]
        first = logits(ids, sizes)
        found["logits"] += first.size
        if others != sizes:
            found["other_chunks_differ"] += int((logits(ids, others) != first).sum())
        found["same_chunks_differ"] += int((logits(ids, sizes) != first).sum())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, action="append", required=True)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    result = {"seed": options.seed, "date": datetime.date.today().isoformat(), "artifacts": {}}
    for artifact in options.artifact:
        model = runner.load(artifact)
        requests = some_requests(model, options.prompts, options.seed)
        found = {name: model.manifest[name] for name in ("engine", "backend", "model_type")}
        found |= {"block_tokens": block_size(model.loop.program)}
        found |= compare(model, requests)
        if model.loop.program.packing is None:
            found["chunks"] = other_chunks(model, [r.prompt for r in requests[:20]])
        result["artifacts"][artifact.name] = found
        print(json.dumps({artifact.name: found}), flush=True)
    if options.save:
        options.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    runs = [run for found in result["artifacts"].values() for run in found["runs"]]
    return 1 if any(run["differ"] for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
