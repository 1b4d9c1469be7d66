"""What is copied between host and GPU, in every variant of the loop? The published case of
executorch#20286: a prompt of 19 tokens, 128 new ones. `python -m benchmarks.transfers` prints the
copies that torch.profiler saw beside those that runner/transfers.py counted, tokens per second (of
a run without the profiler), whether the ids are identical, and one JSON line.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.cuda_common import PROMPT, copies, export, launches, origin, profiled, save
from tokenloop import runner
from tokenloop.runner import LoopOptions
from tokenloop.runner.compare import variants

SHORT = {"host_to_device": "H2D", "device_to_device": "D2D", "device_to_host": "D2H"}
COLUMNS = (
    f"{'new':>4}  {'feed':<6}{'positions':<11}{'double b.':<11}{'graph':<7}{'ahead':<7}"
    + "".join(f"{name + ' seen':>16}{'counted':>14}" for name in SHORT.values())
    + f"{'graphs':>8}{'kernels':>9}{'tok/s':>9}  ids"
)


def measure(model, options: LoopOptions, count: int, repeats: int) -> dict:
    """One variant's copies, speed and ids, after one run to warm up."""
    model.generate(PROMPT, count, options=options).run()
    rates = [
        model.generate(PROMPT, count, options=options).run().stats.decode_tok_s
        for _ in range(repeats)
    ]
    done = []
    events = profiled(lambda: done.append(model.generate(PROMPT, count, options=options).run()))
    return {
        "options": vars(options),
        "new_tokens": count,
        "seen": copies(events),
        "counted": done[0].stats.transfers,
        **launches(events),
        "tok_s": sorted(rates)[len(rates) // 2],
        "ids": done[0].token_ids,
    }


def print_row(row: dict) -> None:
    options = row["options"]

    def cell(entry: dict) -> str:
        return f"{entry['count']} / {entry['bytes']}"

    print(
        f"{row['new_tokens']:>4}  {options['feed']:<6}{options['positions']:<11}"
        f"{str(options['double_buffering']):<11}{str(options['graph']):<7}{options['run_ahead']:<7}"
        + "".join(f"{cell(row['seen'][k]):>16}{cell(row['counted'][k]):>14}" for k in SHORT)
        + f"{row['graphs']:>8}{row['kernels']:>9}{row['tok_s']:>9.1f}  "
        + ("identical" if row["identical"] else "DIFFERENT"),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfers", description=__doc__.split("?")[0]
    )
    parser.add_argument("--artifact", type=Path, help="default: --config with random weights")
    parser.add_argument("--config", default="gemma3-270m", help="a name in benchmarks/configs")
    parser.add_argument("--quant", default="bf16", help="of the export (default: bf16)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        artifact = options.artifact or export(
            options.config, Path(directory), "--quant", options.quant, "--max-seq-len", 2048
        )
        model = runner.load(artifact)
        model.tokenizer.eos_token_ids.clear()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {artifact.name}")
        print(f"copies / bytes, prompt {len(PROMPT)}, 128 new tokens\n{COLUMNS}")
        rows: list[dict] = []
        lengths = [(LoopOptions(), count, 1) for count in (32, 128, 512)]
        for variant, count, repeats in [
            (v, 128, options.repeats) for v in variants(model)
        ] + lengths:
            row = measure(model, variant, count, repeats)
            first = (rows or [row])[0]["ids"]
            row["identical"] = all(a == b for a, b in zip(row["ids"], first))
            rows.append(row)
            print_row(row)
    for row in rows:
        del row["ids"]
    result = {
        **origin("transfers"),
        "artifact": artifact.name,
        "rows": rows,
    }
    save(result, options.output)


if __name__ == "__main__":
    main()
