"""What is speculation worth? Qwen3-0.6B's and Gemma 3 270M's shapes with random weights in bf16, on
a CUDA GPU, or a checkpoint with --model: milliseconds of a token with and without it, for text that
repeats itself and for text that does not.

`python -m benchmarks.speculation` prints what it can be worth at most (a round's tokens, over its
cost in steps), then a row for each text, and one JSON line. A figure is the median of generations
that take turns. With random weights the greedy text soon repeats itself, and sampled text does so
the less the higher its temperature is; with --model the prompt is a text twice over, of which the
second time is left to the model, or the text once. All ids must be those of the plain loop. The
target is 1.8 x for text that repeats, and 0.97 x at least for any.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cuda_common import PROMPT, ROOT, export, origin, save
from tokenloop import runner
from tokenloop.models.kernels.drafts.reference import next_drafts
from tokenloop.runner import LoopOptions, Request

CONFIGS = ("gemma3-270m", "qwen3-0.6b")
# Of random weights: what is asked for, from what repeats to what does not.
SAMPLED = {
    "greedy": {},
    "temperature 0.02": {"temperature": 0.02},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 1": {"temperature": 1.0},
    "top-k 40, top-p 0.95": {"temperature": 1.0, "top_k": 40, "top_p": 0.95},
}
ALICE = ROOT / "benchmarks/data/alice.txt"


def texts(model, is_random: bool, count: int) -> dict[str, Request]:
    """What is generated, by its name: `count` tokens of each."""
    if is_random:
        return {name: Request(PROMPT, count, **kind) for name, kind in SAMPLED.items()}
    once = model.tokenizer.encode(ALICE.read_text(encoding="utf-8"))[: count + 40]
    return {
        "the prompt again": Request([*once, *once[1:40]], count),
        "goes on, greedy": Request(once[:40], count),
        "goes on, sampled": Request(once[:40], count, temperature=1.0),
    }


def tokens_a_round(ids: list[int], begin: int, drafts: int) -> float:
    """How many tokens a round of so many drafts would give on average, of a text whose first token
    after the prompt is at the place `begin`, if all rounds tried them."""
    rounds, place = 0, begin
    while place < len(ids) - 1:
        tokens, positions = (torch.zeros(1 + drafts, dtype=torch.int64) for _ in range(2))
        next_drafts(torch.tensor(ids[: place + 1]), torch.tensor([place]), tokens, positions)
        coming = ids[place + 1 : place + 1 + drafts]
        pairs = zip(tokens[1:].tolist(), coming)
        held = next((i for i, (draft, token) in enumerate(pairs) if draft != token), len(coming))
        place += min(1 + held, len(ids) - 1 - place)
        rounds += 1
    return (len(ids) - 1 - begin) / rounds


def count_tokens(artifact: Path, tokens: int) -> list[dict]:
    """Tokens a round by text and number of drafts, of an artifact for any engine: its plain loop's
    texts say them."""
    model, rows = runner.load(artifact), []
    model.tokenizer.eos_token_ids.clear()
    for name, request in texts(model, False, tokens).items():
        done = model.generate(request).run()
        ids, begin = [*done.prompt_ids, *done.token_ids], len(done.prompt_ids)
        found = {str(drafts): tokens_a_round(ids, begin, drafts) for drafts in (3, 7, 15)}
        rows.append({"text": name, "tokens": len(done.token_ids), "tokens_a_round": found})
        print(f"{name:<20}", *(f"{k} drafts {value:.2f}" for k, value in found.items()), sep="  ")
    return rows


def ms_of(model, request: Request, options: LoopOptions) -> tuple[float, list[int], object]:
    """Milliseconds of a token, the ids, and the statistics."""
    done = model.generate(request, options=options).run()
    return 1e3 / done.stats.decode_tok_s, done.token_ids, done.stats


def measure(
    model, requests: dict[str, Request], repeats: int, speculate: str = "lookup"
) -> list[dict]:
    """A row for each text."""
    plain, speculated = LoopOptions(), LoopOptions(speculate=speculate)
    rows = []
    for name, request in requests.items():
        # The first run of each kind captures its graphs.
        found = [ms_of(model, request, options)[1] for options in (plain, speculated)]
        times: dict[LoopOptions, list[float]] = {plain: [], speculated: []}
        for _ in range(repeats):
            for options, measured in times.items():
                ms, _, stats = ms_of(model, request, options)
                measured.append(ms)
        plain_ms, ms = (statistics.median(measured) for measured in times.values())
        rows.append(
            {
                "text": name, "tokens": len(found[0]), "plain_ms": plain_ms, "ms": ms,
                "ratio": plain_ms / ms, "draft_rounds": stats.draft_rounds,
                "drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens,
                "identical": found[0] == found[1], "all_plain_ms": times[plain],
                "all_ms": times[speculated],
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict]) -> Table:
    found = Table(box=None, pad_edge=False)
    for name in ("model", "text"):
        found.add_column(name)
    for name in ("plain, ms", "ms", "ratio", "rounds with drafts", "accepted"):
        found.add_column(name, justify="right")
    found.add_column("ids")
    for row in rows:
        found.add_row(
            row["model"], row["text"], f"{row['plain_ms']:.3f}", f"{row['ms']:.3f}",
            f"{row['ratio']:.2f}", str(row["draft_rounds"]),
            f"{row['accepted_tokens']} of {row['drafted_tokens']}",
            "identical" if row["identical"] else "DIFFERENT",
        )  # fmt: skip
    return found


def exported(options: argparse.Namespace, directory: Path) -> dict[str, Path]:
    """The artifacts to measure, by name."""
    if options.artifacts:
        return {path.name: path for path in options.artifacts}
    flags = "--draft-tokens", options.draft_tokens, "--max-seq-len", options.max_seq_len
    if options.model is None:
        return {name: export(name, directory, *flags) for name in options.config}
    output = directory / Path(options.model).name
    command = [ROOT / "export" / options.script, "--device", "cuda", "--model", options.model]
    command = [sys.executable, *command, *flags, "--output", output]
    subprocess.run([str(part) for part in command], check=True)
    return {output.name: output}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description=__doc__.split("?")[0]
    )
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--model", help="a checkpoint, instead of random weights")
    parser.add_argument(
        "--artifacts", nargs="+", type=Path, metavar="DIR", help="which were exported before"
    )
    parser.add_argument(
        "--export-only", type=Path, metavar="DIR", help="export there, and measure nothing"
    )
    parser.add_argument("--script", default="gemma.py", help="of export/, for --model")
    parser.add_argument(
        "--count", type=Path, metavar="DIR",
        help="only print how many tokens a round would give, of an artifact that needs no rounds",
    )  # fmt: skip
    parser.add_argument("--draft-tokens", type=int, default=7, metavar="K")
    parser.add_argument("--max-seq-len", type=int, default=1024, metavar="N")
    parser.add_argument("--tokens", type=int, default=257, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    if options.export_only is not None:
        exported(options, options.export_only)
        return 0
    if options.count is not None:
        rows = count_tokens(options.count, options.tokens)
        save({**origin("speculation, tokens a round"), "rows": rows}, options.output)
        return 0
    rows, costs = [], {}
    with tempfile.TemporaryDirectory() as directory:
        for name, artifact in exported(options, Path(directory)).items():
            model = runner.load(artifact)
            model.tokenizer.eos_token_ids.clear()
            program = model.loop.program
            costs[name] = cost = program.draft_cost
            most = (1 + program.draft_tokens) / cost
            print(f"{name}: a round costs {cost:.3f} steps; at most {most:.2f} x", flush=True)
            is_random = "random" in model.manifest["weights"]
            requests = texts(model, is_random, options.tokens)
            rows += [{"model": name} | row for row in measure(model, requests, options.repeats)]
            # Before the next one's weights come.
            del model
            gc.collect()
    Console(width=110).print(table(rows))
    result = {
        **origin("speculation"), "draft_cost": costs,
        "rows": rows,
    }  # fmt: skip
    save(result, options.output)
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
