"""Run several of the CUDA tests and benchmarks within a limit of time, so that a GPU that is lent
for minutes is used: `python -m benchmarks.suite --beside NAME ... --alone NAME ... --output DIR`.

Tests and exports run side by side, benchmarks one after another when these are done. What would
not end in time is not begun, and what does not end is stopped. Logs and results go to the output's
directory, artifacts to another one, where a later call finds them. Exports need no GPU, so they can
be made before it is lent.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cuda_common import ROOT, export_command

# Of each artifact its shape of benchmarks/configs, and what its export takes besides.
ARTIFACTS = {
    "gemma3-270m": ("gemma3-270m", "--quant", "bf16", "--max-seq-len", 2048),
    "gemma4-31b-int4": ("gemma4-31b", "--quant", "int4", "--max-seq-len", 8448),
    "gemma4-31b": ("gemma4-31b", "--quant", "bf16", "--max-seq-len", 8448),
    "qwen3.5-9b": ("qwen3.5-9b", "--quant", "bf16", "--max-seq-len", 32_768),
} | {
    f"{config}-{batch}": (
        config, "--quant", "bf16", "--batch", batch, "--max-seq-len", 1024,
    )
    for config, batch in (
        ("qwen3-4b", 1), ("qwen3-4b", 16), ("qwen3-4b", 32), ("qwen3-0.6b", 1), ("qwen3-14b", 1),
    )
}  # fmt: skip
TESTS = {
    "cuda-tests": ("-n", 12, "tests/cuda"),
    "kernel-tests": ("-n", 4, "tests/models/kernels"),
    "hybrid-tests": ("tests/export/test_fused_hybrid.py",),
    "sampler-tests": ("-n", 4, "tests/sampler/kernels"),
}
# Of each benchmark its module, the artifact that it is given, its flags, and the seconds for it.
BENCHMARKS = {
    "cuda_270m": ("cuda", "gemma3-270m", ("--positions", 256, 1900, "--peer"), 130),
    "cuda_31b_int4": (
        "cuda", "gemma4-31b-int4", ("--positions", 256, 8192, "--steps", 64), 120,
    ),
    "cuda_31b": ("cuda", "gemma4-31b", ("--positions", 256, 8192, "--steps", 64), 120),
    "transfers": ("transfers", "gemma3-270m", ("--repeats", 3), 50),
    "hybrid": ("hybrid", "qwen3.5-9b", ("--steps", 64), 160),
    "sampler_cuda": ("sampler_cuda", None, ("--repeats", 7), 75),
    "sampled_step_4b-1": ("sampled_step", "qwen3-4b-1", (), 60),
    "sampled_step_4b-32": ("sampled_step", "qwen3-4b-32", (), 60),
    "gated_delta": ("gated_delta", None, ("--repeats", 7), 20),
    "causal_conv1d": ("causal_conv1d", None, ("--repeats", 7), 40),
    "kernels_cuda": ("kernels_cuda", None, ("--seconds", 170), 200),
} | {
    f"double_buffering_{name.removeprefix('qwen3-')}": ("double_buffering", name, (), 60)
    for name in ARTIFACTS
    if name.startswith("qwen3-")
}  # fmt: skip

INTERRUPTED_S = 10  # for what is interrupted to end


@dataclass
class Job:
    """A process, its log, and when it was begun."""

    name: str
    process: subprocess.Popen
    log: Path
    start: float


class Suite:
    def __init__(self, output: Path, artifacts: Path, seconds: float):
        self.output, self.artifacts = output, artifacts
        self.deadline = time.monotonic() + seconds
        self.table = Table("what", "status", "seconds", "its last line", box=None, pad_edge=False)

    def begin(self, name: str, command: list[object]) -> Job:
        log = self.output / f"{name}.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Job(name, process, log, time.monotonic())

    def end(self, job: Job) -> bool:
        """Whether it has ended, or is stopped as it is late: then it is in the table."""
        status = job.process.poll()
        if status is None:
            if time.monotonic() < self.deadline:
                return False
            # pytest reports what has failed so far.
            os.kill(job.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(INTERRUPTED_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            status = job.process.wait()
        lines = job.log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line and line[0] != "{"), "")
        seconds = f"{time.monotonic() - job.start:.0f}"
        self.table.add_row(job.name, str(status), seconds, last[-100:])
        return True

    def wait(self, jobs: list[Job]) -> None:
        while jobs:
            jobs = [job for job in jobs if not self.end(job)]
            time.sleep(0.2)

    def beside(self, names: list[str]) -> None:
        jobs = []
        for name in names:
            if name in TESTS:
                command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", *TESTS[name]]
            else:
                config, *flags = ARTIFACTS[name]
                command = export_command(config, self.artifacts / name, *flags)
            jobs.append(self.begin(name, command))
        self.wait(jobs)

    def alone(self, names: list[str]) -> None:
        for name in names:
            module, artifact, flags, seconds = BENCHMARKS[name]
            command = ["-m", f"benchmarks.{module}", *flags]
            command += ["--output", self.output / f"{name}.json"]
            if artifact is not None:
                command += ["--artifact", self.artifacts / artifact]
            if time.monotonic() + seconds > self.deadline:
                self.table.add_row(name, "-", "0", f"not begun: it may take {seconds} s")
            elif artifact is not None and not (self.artifacts / artifact).is_dir():
                self.table.add_row(name, "-", "0", f"not begun: there is no {artifact}")
            else:
                self.wait([self.begin(name, command)])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__.split("\n\n")[0]
    )
    beside = [*TESTS, *ARTIFACTS]
    parser.add_argument("--beside", nargs="+", choices=beside, default=[], metavar="NAME")
    parser.add_argument("--alone", nargs="+", choices=BENCHMARKS, default=[], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=580, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    options = parser.parse_args()
    for directory in (options.output, options.artifacts):
        directory.mkdir(parents=True, exist_ok=True)
    suite = Suite(options.output.resolve(), options.artifacts.resolve(), options.seconds)
    suite.beside(options.beside)
    suite.alone(options.alone)
    Console(width=160).print(suite.table)


if __name__ == "__main__":
    main()
