"""What the benchmarks on a CUDA GPU share: artifacts, weights, times, the profiler's view,
results."""

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = Path(__file__).resolve().parent / "configs"
# A prompt of 19 tokens, as in executorch#20286.
PROMPT = [2, *(i * 37 % 250 + 3 for i in range(18))]
DIRECTIONS = {
    "Memcpy HtoD": "host_to_device",
    "Memcpy DtoD": "device_to_device",
    "Memcpy DtoH": "device_to_host",
}


@dataclass(frozen=True)
class Matrix:
    """A weight [outputs, inputs], or where gated [2 * outputs, inputs]."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False

    @property
    def rows(self) -> int:
        return self.outputs * (2 if self.gated else 1)


def export_command(config: str, output: Path, *flags: object) -> list[str]:
    """Of the artifact of a network of benchmarks/configs with random weights, after Python."""
    scripts = {"qwen3.5": "qwen3_5.py", "qwen3-": "qwen3.py", "gemma": "gemma.py"}
    script = next(script for name, script in scripts.items() if config.startswith(name))
    command = [
        ROOT / "export" / script, "--device", "cuda",
        "--random-weights", CONFIGS / f"{config}.json", "--output", output, *flags,
    ]  # fmt: skip
    return [str(part) for part in command]


def export(config: str, directory: Path, *flags: object) -> Path:
    """The artifact that export_command makes."""
    output = directory / "-".join([config, *(str(flag).lstrip("-") for flag in flags)])
    command = [sys.executable, *export_command(config, output, *flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{config} cannot be exported: {done.stderr[-2000:]}")
    print(done.stdout.strip(), flush=True)
    return output


def decode_ms(model, position: int, steps: int, repeats: int, options) -> list[float]:
    """Milliseconds of a step, of `repeats` generations of so many steps around `position`: from the
    first token's arrival on the host to the last one's."""
    prompt = [2, *(i * 37 % 250 + 3 for i in range(position - steps // 2 - 1))]
    times = []
    for _ in range(repeats):
        stats = model.generate(prompt, steps + 1, options=options).run().stats
        times.append(1e3 / stats.decode_tok_s)
    return times


def capture(calls: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of the calls, and what the last one gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            result = call()
    return graph, result


def device_us(action: Callable[[], object], calls: int, repeats: int) -> list[float]:
    """Microseconds of each call between events around `action`, which makes `calls`."""
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return times


def median_us(calls: list[Callable[[], object]], repeats: int) -> float:
    """Microseconds of one of `calls`, in a graph of them all."""
    return statistics.median(device_us(capture(calls)[0].replay, len(calls), repeats))


def copy_bandwidth() -> float:
    """Bytes per second read and written by a copy within the device. (Not of a captured one: in a
    graph it moves two thirds of that.)"""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    median = statistics.median(device_us(lambda: target.copy_(source), 1, 20))
    return 2 * source.nbytes / (median * 1e-6)


def read_bandwidth() -> float:
    """Bytes per second of the weights that cuBLAS reads in a product with one vector, bfloat16:
    what a decode step does, and more than a copy reaches."""
    weight = torch.randn(2**18, 2**13, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 2**13, dtype=torch.bfloat16, device="cuda")
    return weight.nbytes / (median_us([lambda: F.linear(x, weight)], 20) * 1e-6)


def profiled(action: Callable[[], object]) -> list[dict]:
    """What torch.profiler's trace has of the device, and of calls of the CUDA runtime, while
    `action` ran, in order of time; microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver")
    return sorted((e for e in events if e.get("cat") in kinds), key=lambda event: event["ts"])


def copies(events: list[dict]) -> dict[str, dict[str, int]]:
    """Copies and their bytes by direction, as runner/transfers.py counts them."""
    found = {name: {"count": 0, "bytes": 0} for name in DIRECTIONS.values()}
    for event in events:
        if event["cat"] == "gpu_memcpy":
            entry = found[DIRECTIONS[event["name"][:11]]]
            entry["count"] += 1
            entry["bytes"] += event["args"]["bytes"]
    return found


def launches(events: list[dict]) -> dict[str, int]:
    """How often the host launched a graph, and how often a kernel."""
    calls = Counter(e["name"] for e in events if e["cat"] in ("cuda_runtime", "cuda_driver"))
    kernels = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
    return {"graphs": calls["cudaGraphLaunch"], "kernels": sum(calls[name] for name in kernels)}


def kernel_times(events: list[dict]) -> list[tuple[str, int, float]]:
    """(kernel, how often it ran, microseconds in all), the longest first."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event["cat"] == "kernel":
            times.setdefault(event["name"], []).append(event["dur"])
    rows = [(name, len(all_of), sum(all_of)) for name, all_of in times.items()]
    return sorted(rows, key=lambda row: -row[2])


def after_prefill(events: list[dict]) -> list[dict]:
    """The events from the first decode step's first kernel on."""
    names = (event["name"] if event["cat"] == "kernel" else "" for event in events)
    return events[next(i for i, name in enumerate(names) if "next_positions" in name) :]


def idle_share(events: list[dict], first_kernel: str) -> float:
    """The share of a step in which the GPU waits for the next step: median gap before each
    `first_kernel`, which begins a step, over the median time from one to the next."""
    kernels = [event for event in events if event["cat"] == "kernel"]
    starts = [i for i, event in enumerate(kernels) if first_kernel in event["name"]][2:]
    ends = [kernels[i - 1]["ts"] + kernels[i - 1]["dur"] for i in starts]
    gaps = [max(0.0, kernels[i]["ts"] - end) for i, end in zip(starts, ends)]
    steps = [kernels[b]["ts"] - kernels[a]["ts"] for a, b in itertools.pairwise(starts)]
    return statistics.median(gaps) / statistics.median(steps)


def kernel_parser(benchmark: str, description: str, repeats: int) -> argparse.ArgumentParser:
    """Of a benchmark of kernels, by its file's name."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=description
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    return parser


def kernel_options(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    return options


def config_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --config, a name in benchmarks/configs."""
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--config", choices=names, default=default, help="(default: %(default)s)")


def origin(benchmark: str) -> dict[str, str]:
    """What every result says of where it is from."""
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def heading(bandwidth: float) -> str:
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; "
        f"a copy moves {bandwidth / 1e12:.2f} TB/s"
    )


def save(result: dict, path: Path | None) -> None:
    """Print the JSON line, and write it where it is asked for."""
    line = json.dumps(result)
    print(line)
    if path is not None:
        path.write_text(line + "\n")
