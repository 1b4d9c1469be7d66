"""Run thousands of damaged artifacts: python -m tests.mutate_artifacts --count 10000 --seed 0

Each mutant is run by the command line in a process of its own. It must be refused in one line, or
give the ids of the whole artifact. What must not be is counted: an end by a signal, a traceback, a
run of more than 20 s, other ids, memory beyond twice the artifact and what the whole one takes, and
anything read in a directory beside the artifact that has the same files. Mutant number N of a seed
is always the same. The exit status is 1 if there was a fault.
"""

import argparse
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.artifact_mutants import MANIFEST, mutate

ROOT = Path(__file__).resolve().parents[1]
FAULTS = "signal", "traceback", "hang", "wrong ids", "read outside", "memory"
LIMIT_S = 20
# Beyond twice the artifact and what the whole one takes: as much as torch takes, which is imported
# for an artifact that says it is for a GPU.
SLACK_MB = 256
PROGRAM = "tokenloop run"
IN_ACCESS, IN_OPEN = 1, 0x20  # sys/inotify.h
ENGINES = {
    "executorch": "executorch_runtime", "inductor": "inductor", "launches": "launches",
}  # fmt: skip


class Run(NamedTuple):
    """What came of a process: its exit status, or minus a signal's number, None after LIMIT_S."""

    status: int | None
    output: str
    errors: str
    peak_mb: float


def run_forked(function: Callable[[], int], directory: Path) -> Run:
    """Run the function in a copy of this process, whose output goes to files in the directory."""
    files = [directory / "stdout", directory / "stderr"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle], [], [], LIMIT_S)
    os.close(handle)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status) if ready else None
    output, errors = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Run(code, output, errors, usage.ru_maxrss / 1024)


class Watch:
    """Notices whatever is opened or read in a directory, by whichever process."""

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        added = libc.inotify_add_watch(
            self._descriptor, os.fsencode(directory), IN_ACCESS | IN_OPEN
        )
        if self._descriptor < 0 or added < 0:
            raise OSError(ctypes.get_errno(), "the directory cannot be watched", str(directory))

    def seen(self) -> bool:
        """Whether there was anything since the last call."""
        try:
            return bool(os.read(self._descriptor, 1 << 16))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


def ids_of(run: Run) -> list | None:
    """The prompt's ids and the generated ones that a run printed, None without a line of JSON."""
    try:
        entry = json.loads(run.output)
        return [entry["prompt_ids"], entry["token_ids"], entry["text"]]
    except (ValueError, KeyError, TypeError):
        return None


def fault_of(run: Run, expected: list | None, most_mb: float) -> str | None:
    """Which of FAULTS a run is, if any. `expected` are the whole artifact's ids, or None where
    others may be right."""
    fault = _fault_of_end(run, expected)
    return "memory" if fault is None and run.peak_mb > most_mb else fault


def _fault_of_end(run: Run, expected: list | None) -> str | None:
    if run.status is None:
        return "hang"
    if run.status < 0:
        return "signal"
    if run.status == 0:
        found = ids_of(run)
        return "wrong ids" if found is None or expected not in (None, found) else None
    line = run.errors.startswith(f"{PROGRAM}: error: ") and run.errors.count("\n") == 1
    return None if run.status == 2 and line and run.output == "" else "traceback"


def mutants(
    artifact: Path, numbers: range, seed: int, report: Callable[[int, str, str], None]
) -> dict:
    """Run these mutants: how many of each kind were refused, ran, or were which fault. `report` is
    told of each fault: the mutant's number, the fault, and what was done and printed."""
    from tokenloop.runner import run

    # What a run imports; threads would not be there after a fork, and none is started here.
    for name in ("model", "prefill", "engines." + ENGINES[_engine(artifact)]):
        import_module(f"tokenloop.runner.{name}")
    for name in ("jinja2.sandbox", "sentencepiece", "tokenizers"):
        import_module(name)
    counts, faults, peak_mb, start = {}, Counter(), 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        work, outside = Path(root, "artifact"), Path(root, "outside")
        shutil.copytree(artifact, outside)
        # The user's cache is not written.
        os.environ["XDG_CACHE_HOME"] = str(Path(root, "cache"))
        arguments = ["--artifact", str(work), "--json", "--max-new-tokens", "8", "--chat", "hello"]
        if not _has_template(artifact):
            arguments.remove("--chat")
        shutil.copytree(outside, work)
        whole = run_forked(lambda: run.main(arguments, PROGRAM), Path(root))
        size = sum(file.stat().st_size for file in work.iterdir())
        most_mb = whole.peak_mb + 2 * size / 2**20 + SLACK_MB
        expected = ids_of(whole)
        if expected is None:
            raise SystemExit(f"the whole artifact does not run: {whole.errors}")
        for number in numbers:
            shutil.rmtree(work)
            shutil.copytree(outside, work)
            kind, is_damage = mutate(work, outside, Random(f"{seed} {number}"))
            watch = Watch(outside)
            found = run_forked(lambda: run.main(arguments, PROGRAM), Path(root))
            fault = fault_of(found, expected if is_damage else None, most_mb)
            if watch.seen():
                fault = "read outside"
            watch.close()
            peak_mb = max(peak_mb, found.peak_mb)
            outcome = fault or ("ran" if found.status == 0 else "refused")
            counts.setdefault(kind, Counter())[outcome] += 1
            if fault:
                faults[fault] += 1
                told = f"{kind}, {found.peak_mb:.0f} MB: {found.output}{found.errors}"
                report(number, fault, told)
    return {
        "mutants": len(numbers), "seed": seed, "faults": {name: faults[name] for name in FAULTS},
        "refused": sum(c["refused"] for c in counts.values()),
        "ran": sum(c["ran"] for c in counts.values()),
        "peak_mb": round(peak_mb, 1), "seconds": round(time.perf_counter() - start, 1),
        "kinds": {kind: dict(counts[kind]) for kind in sorted(counts)},
    }  # fmt: skip


def _manifest(artifact: Path) -> dict:
    return json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))


def _engine(artifact: Path) -> str:
    return _manifest(artifact)["engine"]


def _has_template(artifact: Path) -> bool:
    return _manifest(artifact)["tokenizer"]["chat_template"] is not None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate_artifacts", description=__doc__)
    parser.add_argument("--artifact", type=Path, help="default: that of tests/toy_artifact.py")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="the mutant of that number alone")
    parser.add_argument("--output", type=Path, help="a file for the JSON line")
    options = parser.parse_args()
    numbers = range(options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)

    def report(number: int, fault: str, what: str) -> None:
        print(f"mutant {number}: {fault}: {what}", flush=True)

    with tempfile.TemporaryDirectory(prefix="toy-") as directory:
        artifact = options.artifact
        if artifact is None:
            artifact = make_toy(Path(directory, "toy"))
        found = mutants(artifact, numbers, options.seed, report)
    for kind, outcomes in found["kinds"].items():
        print(f"{kind:<36} {', '.join(f'{n} {name}' for name, n in sorted(outcomes.items()))}")
    line = json.dumps(found)
    print(line)
    if options.output is not None:
        options.output.write_text(line + "\n")
    return int(any(found["faults"].values()))


def make_toy(directory: Path) -> Path:
    """Make the toy artifact in a process of its own: what exports it starts threads."""
    command = [sys.executable, "-m", "tests.toy_artifact", directory]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return directory


if __name__ == "__main__":
    sys.exit(main())
