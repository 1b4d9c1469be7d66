"""How fast is an artifact on this processor, beside llama.cpp and transformers, and how fast
could it be? `python -m benchmarks.cpu` prints the ceiling, the figures, and one JSON line.

Every contender runs in a process of its own, so that loading is a new process's and peak memory
its own. They alternate round by round; figures are medians over the rounds, with min and max.
"""

import argparse
import datetime
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.common import (
    DEFAULT_TEXT,
    ROOT,
    THREADS,
    WORKER,
    BenchmarkError,
    Contender,
    add_arguments,
    check_paths,
    finish,
    llama_cpp_peers,
    machine,
    print_machine,
    run,
    tokenloops,
    work,
)

PROMPT = "The capital of France is"
# What each figure is, and whether more of it is better.
FIGURES = {
    "prefill_tok_s": ("prefill of 128 tokens, tok/s", True),
    "prefill_512_tok_s": ("prefill of 512 tokens, tok/s", True),
    "decode_tok_s": ("decode at context 128 to 256, tok/s", True),
    "decode_ms_at_100": ("decode at context 100, ms per token", False),
    "decode_ms_at_2000": ("decode at context 2,000, ms per token", False),
    "ttft_s": ("prompt of 128 tokens to first token, s", False),
    "start_to_first_token_s": ("process start to first token, s", False),
    "load_s": ("load, s", False),
    "peak_rss_mb": ("peak resident memory, 128 + 128 tokens, MB", False),
    "peak_rss_long_mb": ("peak resident memory, up to 2,034 tokens, MB", False),
    "artifact_mb": ("on disk, MB", False),
}
DTYPES = ("float32", "bfloat16")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description="Measure an artifact on the CPU, side by side with its peers.",
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument(
        "--export", action="store_true", help="measure the export of such an artifact as well"
    )
    parser.add_argument(
        "--transformers",
        action="store_true",
        help="measure transformers with the same weights in float32 and bfloat16 as well",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="instead measure N rows beside one, of an artifact that is exported for it",
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")
    if options.batch is not None and options.batch < 2:
        parser.error(f"--batch is {options.batch}; it must be at least 2")
    return options


def measure_round(contender: Contender, ids: list[int], prompt_ids: list[int], text: str) -> dict:
    """One contender's figures of one round, from three new processes; `text` is that of the first
    128 of `ids`."""
    spec = contender.spec
    if spec["engine"] == "tokenloop":
        # The user's own command; the first byte comes with the first token.
        script = [contender.python, ROOT / "runner" / "run.py", "--artifact", spec["path"]]
        start = [*script, "--max-new-tokens", "8", PROMPT]
        generate = [*script, "--max-new-tokens", "128", text]
    else:
        worker = [contender.python, *WORKER]
        start = [*worker, "start", json.dumps({**spec, "ids": prompt_ids})]
        generate = [*worker, "generate", json.dumps({**spec, "ids": ids[:128], "limit": 128})]
    started, generated = run(start, contender.name), run(generate, contender.name)
    figures, process = work(contender.python, "speed", contender.name, **spec, ids=ids)
    return {
        **figures,
        "start_to_first_token_s": started.first_byte_s,
        "peak_rss_mb": generated.peak_rss_mb,
        "peak_rss_long_mb": process.peak_rss_mb,
        "artifact_mb": contender.megabytes,
    }


def summarize(rounds: list[dict], bandwidth: float, weights_mb: float | None) -> dict:
    """Medians of the rounds, their ranges, and the ceiling of decoding."""
    summary, ranges = {}, {}
    for key in FIGURES:
        values = [figures[key] for figures in rounds if figures[key] is not None]
        summary[key] = statistics.median(values) if values else None
        ranges[key] = [min(values), max(values)] if values else None
    weights_mb = weights_mb or rounds[0]["weights_mb"]
    summary["export_s"] = None
    summary["weights_mb_per_token"] = weights_mb
    ceiling = bandwidth * 1e3 / weights_mb if weights_mb else None
    summary["ceiling_decode_tok_s"] = ceiling
    decode = summary["decode_tok_s"]
    summary["of_ceiling"] = decode / ceiling if decode and ceiling else None
    return rounded({**summary, "ranges": ranges})


def rounded(value):
    """Five significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def print_table(results: dict[str, dict]) -> None:
    """For each figure a row of ours and one of each peer, with ours / peer."""
    ours = next(iter(results.values()))
    width = max(map(len, results))
    for key, (title, more) in FIGURES.items():
        print(f"\n{title} ({'more' if more else 'less'} is better)")
        for name, result in results.items():
            if result[key] is None:
                print(f"  {name:<{width}} {'-':>10}")
                continue
            low, high = result["ranges"][key]
            line = f"  {name:<{width}} {result[key]:>10.5g}  {low:>10.5g} .. {high:<10.5g}"
            if result is not ours and ours[key] is not None:
                line += f"   ours / peer {ours[key] / result[key]:.2f}"
            if key == "decode_tok_s" and result["of_ceiling"] is not None:
                line += f"   {result['of_ceiling']:.0%} of its ceiling"
            print(line.rstrip())
    print(flush=True)


def weights_mb(contender: Contender) -> float:
    """Megabytes of weights that an artifact's decode method reads for each token."""
    directory = Path(contender.spec["path"])
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    program = directory / manifest["program"]["file"]
    answer, _ = work(contender.python, "weights", "the weights", program=str(program))
    return answer["weights_mb"]


def measure_export(options: argparse.Namespace, manifest: dict, directory: Path) -> dict:
    """Seconds and peak memory of exporting once more what the artifact is."""
    command = [sys.executable, ROOT / "export" / "gemma.py", "--output", directory / "export"]
    for key in ("backend", "quant", "max_seq_len", "max_prefill", "batch"):
        command += ["--" + key.replace("_", "-"), manifest[key]]
    if options.model is not None:
        command += ["--model", options.model]
    process = run(command, "export/gemma.py")
    return {"export_s": process.wall_s, "export_rss_mb": process.peak_rss_mb}


def transformers_peers(model: Path, directory: Path) -> list[Contender]:
    """The checkpoint as transformers would load it, written to `directory` for the purpose."""
    directories = {dtype: directory / dtype for dtype in DTYPES}
    paths = {dtype: str(path) for dtype, path in directories.items()}
    work(sys.executable, "save_transformers", "transformers", model=str(model), directories=paths)
    return [
        Contender(
            f"transformers {dtype}",
            sys.executable,
            {"engine": "transformers", "path": paths[dtype]},
            sum(file.stat().st_size for file in path.iterdir()) / 1e6,
        )
        for dtype, path in directories.items()
    ]


def benchmark(options: argparse.Namespace, directory: Path) -> dict:
    check_paths(options)
    if options.transformers and options.model is None:
        raise BenchmarkError("--transformers needs --model: the demo model is not installed")
    # 1. The machine and its ceiling.
    found = machine()
    print_machine(found)
    ours, *others = tokenloops(options)
    text, path = DEFAULT_TEXT.read_text(encoding="utf-8"), str(options.artifact)
    read, _ = work(ours.python, "texts", "tokenloop", path=path, texts=[text, PROMPT])
    manifest, (ids, prompt_ids), prompt = read["manifest"], read["ids"], read["prompt"]
    weights = {contender.name: weights_mb(contender) for contender in (ours, *others)}
    limit, _ = work(ours.python, "ceiling", "the ceiling", threads=THREADS)
    bandwidth = limit["bandwidth_gb_s"]
    print(f"bandwidth   {bandwidth:.1f} GB/s, plain reads of 1 GiB by {THREADS} threads")
    read_mb = weights[ours.name]
    program_mb = manifest["files"][manifest["program"]["file"]]["bytes"] / 1e6
    print(f"ceiling     {bandwidth * 1e3 / read_mb:.0f} tok/s of decoding; each token reads")
    print(f"            {read_mb:.0f} MB: the linear layers of the program's")
    print(f"            {program_mb:.0f} MB (the KV cache comes on top)")

    # 2. The contenders, one round after the other.
    peers, line = llama_cpp_peers(options, manifest["max_seq_len"])
    peers = others + peers
    print(line, flush=True)
    if options.transformers:
        try:
            peers += transformers_peers(options.model, directory)
        except BenchmarkError as error:
            print(f"no transformers: {error}", flush=True)
    rounds: dict[str, list[dict]] = {contender.name: [] for contender in (ours, *peers)}
    for n, contender in itertools.product(range(options.repeats), (ours, *peers)):
        if contender.name not in rounds:
            continue
        show(f"round {n + 1} of {options.repeats}: {contender.name}")
        try:
            rounds[contender.name].append(measure_round(contender, ids[:2000], prompt_ids, prompt))
        except BenchmarkError as error:
            if contender is ours:
                raise
            print(f"without {error}", flush=True)
            del rounds[contender.name]
    # Other work on the machine can only have hidden some of the bandwidth.
    again, _ = work(ours.python, "ceiling", "the ceiling", threads=THREADS)
    print(f"bandwidth   {again['bandwidth_gb_s']:.1f} GB/s after the rounds; the best counts")
    bandwidth = max(bandwidth, again["bandwidth_gb_s"])
    results = {
        name: summarize(measured, bandwidth, weights.get(name)) for name, measured in rounds.items()
    }
    print_table(results)
    result = results.pop(ours.name)
    if options.export:
        show("exporting")
        result |= rounded(measure_export(options, manifest, directory))
        print(f"export in {result['export_s']:.1f} s, peak {result['export_rss_mb']:.0f} MB\n")
    return {
        **result,
        "peers": results,
        "ratios": rounded(
            {
                name: {key: result[key] / peer[key] for key in FIGURES if result[key] and peer[key]}
                for name, peer in results.items()
            }
        ),
        "repeats": options.repeats,
        "bandwidth_gb_s": rounded(bandwidth),
        "machine": found,
        "date": datetime.date.today().isoformat(),
        "llama_cpp": line,
        "artifact": options.artifact.name,
        "quant": manifest["quant"],
    }


def benchmark_batch(options: argparse.Namespace, directory: Path) -> dict:
    """Tokens per second of N rows and of one, of each engine that has rows."""
    check_paths(options)
    found = machine()
    print_machine(found)
    (ours,) = tokenloops(options)
    text, rows = DEFAULT_TEXT.read_text(encoding="utf-8"), options.batch
    read, _ = work(ours.python, "texts", ours.name, path=ours.spec["path"], texts=[text])
    manifest, (ids,) = read["manifest"], read["ids"]
    show(f"exporting with --batch {rows}")
    measure_export(options, {**manifest, "batch": rows}, directory)
    peers, line = llama_cpp_peers(options, 512 * rows)
    print(line, flush=True)
    # Each engine's name -> how it is started for N rows, and for one.
    several = replace(ours, spec={**ours.spec, "path": str(directory / "export")})
    contenders = {ours.name: (several, ours)} | {peer.name: (peer, peer) for peer in peers}
    measured: dict[str, dict[int, list[float]]] = {name: {rows: [], 1: []} for name in contenders}
    for n, (name, started) in itertools.product(range(options.repeats), contenders.items()):
        show(f"round {n + 1} of {options.repeats}: {name}")
        for count, contender in zip((rows, 1), started):
            answer, _ = work(
                contender.python, "batch", name, **contender.spec, ids=ids[:2000], rows=count
            )
            measured[name][count].append(answer["decode_tok_s"])
    results = {}
    print(f"\ndecode at context 128 to 256, tok/s{'1 row':>12}{rows:>7} rows{'ratio':>8}")
    for name, by_rows in measured.items():
        one, all_rows = (statistics.median(by_rows[count]) for count in (1, rows))
        ratios = [a / b for a, b in zip(by_rows[rows], by_rows[1])]
        ratio = statistics.median(ratios)
        print(f"{name:<35}{one:>12.1f}{all_rows:>12.1f}{ratio:>8.2f}")
        results[name] = {
            "one_row_tok_s": one,
            "decode_tok_s": all_rows,
            "ratio": ratio,
            "ratio_range": [min(ratios), max(ratios)],
        }
    return {
        "benchmark": "cpu --batch",
        "rows": rows,
        "results": rounded(results),
        "repeats": options.repeats,
        "machine": found,
        "date": datetime.date.today().isoformat(),
        "llama_cpp": line,
        "quant": manifest["quant"],
    }


def show(what: str) -> None:
    """What is going on, on standard error."""
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    options = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as directory:
            measure = benchmark_batch if options.batch else benchmark
            result = measure(options, Path(directory))
        finish(result, options.save)
    except BenchmarkError as error:
        print(f"python -m benchmarks.cpu: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
