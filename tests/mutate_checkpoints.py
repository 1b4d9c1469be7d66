"""Mutated checkpoints are read, or refused in one line: python -m tests.mutate_checkpoints

Tiny checkpoints of every kind (tests/tiny_checkpoints.py) are changed at random
(tests/mutations.py) and opened as the exporter opens them: config, tensors' table, tokenizer,
template and weights, but nothing is lowered. Each mutant has a process of its own with a limit of
20 s and of 4 GiB. What counts as a fault: an end by a signal, a traceback, 20 s, a message of
several lines, anything else on stderr, an allocation beyond twice the checkpoint's size (and what
the unchanged one takes), and success where nothing good can come of the mutant: weights that are
not finite, tensors in one another, an index that names a file outside of the directory.

Prints the faults and one JSON line. `--count 10000 --seed 0` takes some minutes on two cores.
"""

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.mutations import HOPELESS, KINDS, mutate
from tests.tiny_checkpoints import write_checkpoints
from tokenloop.export.checkpoint import check_fit, load_weights, open_checkpoint
from tokenloop.export.checkpoint.network import describe, without_memory
from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
from tokenloop.export.errors import ExportError
from tokenloop.models import ARCHITECTURES

SECONDS, ADDRESS_SPACE = 20, 4 << 30
# Beyond twice the checkpoint: what one path of the code allocates and another does not.
SLACK = 32 << 20
LONGEST_MESSAGE = 1000


def read_checkpoint(path: Path, directory: Path) -> None:
    """All that the exporter does with a checkpoint before it lowers anything, in its order.

    Caches have one position. The tokenizer's files go to `directory`. Errors: ExportError.
    """
    checkpoint = open_checkpoint(path)
    described = describe(checkpoint, ARCHITECTURES, "tokenloop export")
    _, architecture, config = described
    check_fit(without_memory(described), checkpoint, architecture.checkpoint_name)
    with torch.device("meta"):
        model = architecture.Network(config, 1)
    write_tokenizer(checkpoint, directory)
    with torch.no_grad():
        load_weights(model, checkpoint, architecture.checkpoint_name)
    checkpoint.sha256()


@dataclass
class Mutant:
    """A process that reads one mutant, and where it says what came of it."""

    name: str
    kind: str
    directory: Path
    result: int


def virtual_memory(field: str) -> int:
    """VmSize or VmPeak of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")


def attempt(source: Path, kind: str, seed: str, directory: Path) -> dict:
    """Make a mutant of the checkpoint `source` in `directory`, read it, and say what came of it."""
    # A mutant lies in a directory of its own. What its index names outside is beside it.
    (directory / "artifact").mkdir(parents=True)
    path = directory / source.name
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)
    if kind:
        mutate(path, kind, random.Random(seed))
    files = [path] if path.is_file() else list(path.iterdir())
    size = sum(file.lstat().st_size for file in files)
    errors = os.open(directory / "stderr", os.O_CREAT | os.O_RDWR)
    os.dup2(errors, 2)
    before = virtual_memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    outcome = {"outcome": "read"}
    try:
        read_checkpoint(path, directory / "artifact")
    except ExportError as error:
        outcome = {"outcome": "refused", "message": str(error)[: 2 * LONGEST_MESSAGE]}
    return outcome | {
        "allocated": virtual_memory("VmPeak") - before,
        "size": size,
        "stderr": os.pread(errors, 500, 0).decode(errors="replace"),
    }


def start(name: str, source: Path, kind: str, seed: str, directory: Path) -> tuple[int, Mutant]:
    """Begin to read a mutant of the checkpoint `source`. Returns the process's id, too."""
    read, write = os.pipe()
    if process := os.fork():
        os.close(write)
        return process, Mutant(name, kind, directory, read)
    try:
        os.close(read)
        try:
            outcome = attempt(source, kind, seed, directory)
        except BaseException:
            lines = traceback.format_exc()[-2 * LONGEST_MESSAGE :]
            outcome = {"outcome": "traceback", "message": lines}
        os.write(write, json.dumps(outcome).encode())
    finally:
        os._exit(0)


def finish(mutant: Mutant, status: int, plain: int) -> dict:
    """What came of a mutant whose process has ended; `plain` bytes are what the unchanged one
    allocates. A "fault" says what must not happen."""
    with os.fdopen(mutant.result, "rb") as pipe:
        said = pipe.read()
    shutil.rmtree(mutant.directory, ignore_errors=True)
    result = json.loads(said) if said else {"outcome": "nothing said"}
    message = result.get("message", "")
    if os.WIFSIGNALED(status):
        ended = os.WTERMSIG(status)
        fault = "hang" if ended == signal.SIGALRM else f"signal {ended}"
    elif result["outcome"] not in ("read", "refused"):
        fault = "traceback"
    elif len(message.splitlines()) > 1 or len(message) > LONGEST_MESSAGE:
        fault = "more than a line"
    elif result["stderr"]:
        fault = "stderr"
    elif mutant.kind in HOPELESS and result["outcome"] == "read":
        fault = "accepted"
    elif result["allocated"] > 2 * result["size"] + plain + SLACK:
        fault = "memory"
    else:
        fault = None
    return result | {"name": mutant.name, "fault": fault}


def run(count: int, seed: int, workers: int, root: Path) -> list[dict]:
    """Read `count` mutants, `workers` at once."""
    sources = write_checkpoints(root / "checkpoints")
    (root / "work").mkdir()
    # Every child would copy what the collector touches.
    gc.collect()
    gc.freeze()
    jobs = [(source.name, source, "", "") for source in sources]
    for i in range(count):
        choice = random.Random(f"{seed} {i}")
        source = choice.choice(sources)
        kind = choice.choice(KINDS[source.is_dir()])
        jobs.append((f"{i}: {kind} of {source.name}", source, kind, f"{seed} {i} mutant"))
    plain: dict[str, int] = {}
    running: dict[int, tuple[Mutant, str]] = {}
    results = []
    while jobs or running:
        # The unchanged checkpoints come first, alone.
        while jobs and len(running) < workers and (len(plain) == len(sources) or not running):
            name, source, kind, text = jobs.pop(0)
            directory = root / "work" / f"{len(results)}-{len(running)}-{time.monotonic_ns()}"
            process, mutant = start(name, source, kind, text, directory)
            running[process] = mutant, source.name
        process, status = os.wait()
        mutant, source_name = running.pop(process)
        result = finish(mutant, status, plain.get(source_name, 0))
        if source_name not in plain:
            if result["outcome"] != "read":
                raise ValueError(f"the unchanged {source_name} is not read: {result}")
            plain[source_name] = result["allocated"]
        else:
            results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--show", action="store_true", help="print every message, to look at them")
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        results = run(options.count, options.seed, options.workers, Path(directory))
    faults = [result for result in results if result["fault"]]
    for result in results if options.show else faults:
        print(result["fault"], "|", result["name"], "|", result.get("message", result["outcome"]))
        if result.get("stderr"):
            print("  stderr:", result["stderr"])
    summary = {
        "mutants": len(results), "seed": options.seed,
        "seconds": round(time.perf_counter() - begin),
        "outcomes": Counter(result["outcome"] for result in results),
        "faults": Counter(result["fault"] for result in faults),
    }  # fmt: skip
    print(json.dumps(summary))
    if options.save is not None:
        options.save.write_text(json.dumps(summary) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
