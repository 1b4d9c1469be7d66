"""What are double buffering, the embedding lookup in the selection, and kernels that overlap worth?
Qwen3's shapes with random weights in bf16, on a CUDA GPU: double buffering off and on, the step fed
with the token ("alias") or with its embedding ("embed"); and the last of these without overlap.
`python -m benchmarks.double_buffering` prints milliseconds of a step, the share of it in which the
GPU waits, whether the ids are identical, a table, and one JSON line.

A variant's time is the median of its generations, which take turns with the other variants'. Idle
is of a profiled generation: what lies between a step's last kernel and the next step's first. With
one --config and one --batch there is one export.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cuda_common import PROMPT, export, idle_share, origin, profiled, save
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request

# Each with the batches that it is measured at.
CONFIGS = {"qwen3-0.6b": (1,), "qwen3-4b": (1, 16, 32), "qwen3-14b": (1,)}
VARIANTS = [
    LoopOptions(feed, double_buffering=double_buffering)
    for feed in ("alias", "embed")
    for double_buffering in (False, True)
] + [LoopOptions("embed", overlap=False)]


def run(model, options: LoopOptions, count: int) -> tuple[list[list[int]], float]:
    """Ids of a generation of `count` tokens in each row, and milliseconds of a step."""
    # Rows of other prompts; the first is the others' own beginning.
    prompts = [[*PROMPT[: len(PROMPT) - row % 7], *[5] * (row % 7)] for row in range(model.batch)]
    batch = model.generate_batch([Request(prompt, count) for prompt in prompts], options)
    results = batch.run()
    step_ms = 1e3 * model.batch / batch.stats.decode_tok_s
    return [result.token_ids for result in results], step_ms


def measure(model, count: int, repeats: int) -> list[dict]:
    """Every variant's figures, in the order of VARIANTS."""
    # The first run of a variant captures its graphs.
    ids = [run(model, options, count)[0] for options in VARIANTS]
    times: list[list[float]] = [[] for _ in VARIANTS]
    for _ in range(repeats):
        for options, measured in zip(VARIANTS, times):
            measured.append(run(model, options, count)[1])
    rows = []
    for i, options in enumerate(VARIANTS):
        row = {
            "batch": model.batch,
            "max_seq_len": model.max_seq_len,
            "feed": options.feed,
            "double_buffering": options.double_buffering,
            "overlap": options.overlap,
            "ms": statistics.median(times[i]),
            "all_ms": times[i],
            "identical": ids[i] == ids[0],
        }
        if model.loop.program.has_graphs:
            events = profiled(lambda options=options: run(model, options, count))
            row["idle_share"] = idle_share(events, "next_positions")
        rows.append(row)
    return rows


def table(rows: list[dict]) -> Table:
    found = Table(box=None, pad_edge=False)
    for name in ("config", "batch", "feed", "double buffering", "overlap"):
        found.add_column(name)
    for name in ("ms / step", "gain", "idle"):
        found.add_column(name, justify="right")
    found.add_column("ids")
    for row in rows:
        off = next(
            r for r in rows
            if (r["config"], r["batch"], r["feed"]) == (row["config"], row["batch"], row["feed"])
            and not r["double_buffering"] and r["overlap"]
        )  # fmt: skip
        idle = row.get("idle_share")
        gain = off["ms"] / row["ms"] - 1 if row["double_buffering"] and row["overlap"] else None
        found.add_row(
            row["config"], str(row["batch"]), row["feed"],
            "on" if row["double_buffering"] else "off",
            "on" if row["overlap"] else "off",
            f"{row['ms']:.3f}",
            "" if gain is None else f"{gain:+.1%}",
            "" if idle is None else f"{idle:.2%}",
            "identical" if row["identical"] else "DIFFERENT",
        )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.double_buffering", description=__doc__.split("?")[0]
    )
    parser.add_argument(
        "--config", nargs="+", choices=CONFIGS, default=list(CONFIGS),
        help="of benchmarks/configs",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="instead of each config's"
    )
    parser.add_argument("--artifact", type=Path, help="one that was exported before, and only it")
    parser.add_argument("--max-seq-len", type=int, default=1024, metavar="N")
    parser.add_argument("--steps", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        cases = [(c, n) for c in options.config for n in options.batch or CONFIGS[c]]
        if options.artifact:
            cases = [(options.artifact.name, None)]
        for config, batch in cases:
            artifact = options.artifact or export(
                config, Path(directory), "--quant", "bf16", "--batch", batch,
                "--max-seq-len", options.max_seq_len,
            )  # fmt: skip
            model = runner.load(artifact)
            model.tokenizer.eos_token_ids.clear()
            for row in measure(model, options.steps + 1, options.repeats):
                rows.append({"config": config, "quant": model.manifest["quant"]} | row)
                print(*(f"{key}={value}" for key, value in rows[-1].items() if key != "all_ms"))
            # Before the next one's weights come.
            del model
            gc.collect()
    Console(width=110).print(table(rows))
    result = {
        **origin("double_buffering"),
        "steps": options.steps,
        "rows": rows,
    }
    save(result, options.output)
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
