"""Kill exports at random moments, starve them of disk, and run two at once.

Whatever happens, the output is absent or whole: the artifact that was there, or the new one, byte
for byte. What is left beside it goes with the next export. Prints one JSON line.

    python -m tests.kill_exports --kills 100 --starve 20 --pairs 10 --fillings 2000 --seed 0
"""

import argparse
import ctypes
import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

from tokenloop.export import new_directory
from tokenloop.export.artifact import new_artifact

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
# An export whose process hangs longer than this is a fault.
PATIENCE_S = 300


def digest(directory: Path) -> str | None:
    """Of the names and contents of a directory's files. None if it is absent."""
    if not directory.exists():
        return None
    total = sha256()
    for file in sorted(directory.iterdir()):
        total.update(f"{file.name} ".encode() + sha256(file.read_bytes()).digest())
    return total.hexdigest()


def left_beside(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir()} - {output.name}


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


def fork(work: Callable[[], int], log: Path) -> int:
    """The id of a process that does `work`, prints to `log` and exits with its result."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    """The exit status of a process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# 1. Directories without an export: many kills in little time.


def fill_for_ever(output: Path, exchanges: bool, ready: int) -> int:
    """Put one small artifact after the other at `output`. Each file names its artifact."""
    if not exchanges:
        new_directory.exchange = lambda first, second: False
        rename = Path.rename

        def rename_slowly(path: Path, target: Path) -> None:
            rename(path, target)
            time.sleep(0.001)

        Path.rename = rename_slowly
    number = 0
    while True:
        with new_artifact(output) as directory:
            for name in ("a", "b", "c", "manifest.json"):
                (directory / name).write_text(f"{os.getpid()} {number}")
        if number == 0:
            os.write(ready, b".")
        number += 1


def is_filled(output: Path) -> bool:
    texts = {path.name: path.read_text() for path in output.iterdir()}
    return sorted(texts) == ["a", "b", "c", "manifest.json"] and len(set(texts.values())) == 1


def kill_fillings(count: int, directory: Path, seed: int, exchanges: bool) -> dict[str, int]:
    """Kill `count` processes that put artifacts at one output, one or two of them at a time."""
    output, found, generator = directory / "artifact", Counter(), random.Random(seed)
    while found["kills"] < count:
        ready, end = os.pipe()
        killed, *others = [
            fork(partial(fill_for_ever, output, exchanges, end), directory.parent / "log")
            for _ in range(1 + found["kills"] % 2)
        ]
        os.close(end)
        require(bool(select.select([ready], [], [], PATIENCE_S)[0]), "nothing was filled")
        time.sleep(generator.random() * 0.02)
        os.kill(killed, signal.SIGKILL)
        statuses = [wait(killed)]
        for other in others:
            # One that lives goes on, whatever it finds of the dead one.
            time.sleep(generator.random() * 0.002)
            os.kill(other, signal.SIGKILL)
            statuses.append(wait(other))
        require(set(statuses) == {-signal.SIGKILL}, (directory.parent / "log").read_text())
        os.close(ready)
        found["kills"] += 1 + len(others)
        found["left"] += bool(left_beside(output))
        if not output.exists():
            require(not exchanges, "the output is missing")
            found["missing until the next export"] += 1
        # What the next export does first.
        new_directory.clear(directory)
        require(not left_beside(output), f"left: {left_beside(output)}")
        require(is_filled(output), f"{output} is half an artifact")
    return dict(found)


# 2. Whole exports, of a network as small as can be.


LENGTHS = {"old": 64, "new": 65}


def write_checkpoint(directory: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import write_byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    write_byte_tokenizer(directory, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return directory


class Exports:
    """Exports of two artifacts, "old" and "new", each in a process of its own that has imported all
    it needs. Tracing takes most of a small export's time and writes nothing, so it is done once:
    what it gave for a length is given again, unless an export should be `traced`."""

    def __init__(self, work: Path):
        import torch

        from tokenloop.export import command
        from tokenloop.export.pte import pte_artifact, pte_program  # noqa: F401

        # A thread pool would not be there after a fork.
        torch.set_num_threads(1)
        self.work, self.log = work, work / "log"
        self.checkpoint = write_checkpoint(work / "checkpoint")
        self.build, self.built = pte_program.build_program, {}
        pte_program.build_program = self.build_once
        for name in LENGTHS:
            require(command.main(self.arguments(name, work / name / "artifact")) == 0, name)
        self.whole = {name: digest(work / name / "artifact") for name in LENGTHS}
        self.seconds = {}
        for traced in (True, False):
            output, start = work / f"traced {traced}" / "artifact", time.perf_counter()
            require(wait(self.start("new", output, traced)) == 0, self.log.read_text())
            self.seconds[traced] = time.perf_counter() - start
            require(digest(output) == self.whole["new"], "two exports differ")
        self.bytes = sum(file.stat().st_size for file in output.iterdir())

    def build_once(self, model, backend: str, constants: dict, *rest):
        from executorch.exir._serialize._cord import Cord

        length = model.max_seq_len
        if length not in self.built:
            program, *others = self.build(model, backend, constants, *rest)
            self.built[length] = bytes(program), *others
        program, *others = self.built[length]
        return Cord(program), *others

    def arguments(self, name: str, output: Path) -> list[str]:
        return [
            *("--model", str(self.checkpoint), "--backend", "portable", "--output", str(output)),
            *("--max-seq-len", str(LENGTHS[name]), "--max-prefill", "8"),
        ]

    def start(self, name: str, output: Path, traced: bool = False, log: Path | None = None) -> int:
        """The id of a process that exports."""
        from tokenloop.export import command
        from tokenloop.export.pte import pte_program

        def work() -> int:
            if traced:
                pte_program.build_program = self.build
            return command.main(self.arguments(name, output))

        return fork(work, log or self.log)

    def place_old(self, output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(self.work / "old" / "artifact", output)


def kill_exports(exports: Exports, count: int, seed: int) -> dict[str, int]:
    """Kill `count` exports: every other one at any moment, the others while files are written."""
    generator, found = random.Random(seed), Counter()
    output = exports.work / "kill" / "artifact"
    output.parent.mkdir()
    while found["kills"] < count:
        i = found["exports"]
        found["exports"] += 1
        if i % 4 < 2:
            exports.place_old(output)
        else:
            shutil.rmtree(output, ignore_errors=True)
        before, left = digest(output), left_beside(output)
        traced = i % 10 == 8
        process = exports.start("new", output, traced)
        if i % 2 == 0:
            time.sleep(generator.random() * exports.seconds[traced])
        else:
            deadline = time.monotonic() + PATIENCE_S
            while not list(output.parent.glob(".artifact-*/model.pte")):
                if digest(output) == exports.whole["new"] or time.monotonic() > deadline:
                    break
                time.sleep(0.0002)
            time.sleep(generator.random() * 0.002)
        os.kill(process, signal.SIGKILL)
        killed = wait(process) == -signal.SIGKILL
        after = digest(output)
        require(after in (before, exports.whole["new"]), f"export {i}: half an artifact")
        beside = left_beside(output)
        # An export that came so far as to make its own directory has removed the one before it.
        require(len(beside) <= 1, f"export {i}: left {beside}")
        require(killed or not beside, f"export {i} ended and left {beside}")
        if killed:
            found["kills"] += 1
            found["kills of traced ones"] += traced
            found["kills with the new artifact in place"] += after == exports.whole["new"]
            found["kills that left something"] += bool(beside - left)
        print(f"{dict(found)}", file=sys.stderr)
    require(wait(exports.start("new", output)) == 0, exports.log.read_text())
    require(digest(output) == exports.whole["new"], "the last export is not whole")
    require(not left_beside(output), f"the last export leaves {left_beside(output)}")
    return dict(found)


def mount_disk(path: Path, size: int) -> bool:
    """Mount a disk of `size` bytes that this process alone sees. False where that is not allowed"""
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user[0] else 0)):
        return False
    if user[0]:
        Path("/proc/self/setgroups").write_text("deny")
        for kind, number in zip(("uid", "gid"), user):
            Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    # Otherwise the mount would be everybody's.
    private = 1 << 18 | 1 << 14
    libc.mount(b"none", b"/", None, private, None)
    return not libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode())


def starve(exports: Exports, count: int, seed: int) -> dict[str, int]:
    """Run `count` exports to a disk that has less room than they need."""
    generator, found = random.Random(seed), Counter()
    for i in range(count):
        disk = exports.work / f"disk{i}"
        disk.mkdir()
        output, room = disk / "artifact", int(generator.random() * exports.bytes)

        def run(disk=disk, output=output, room=room, i=i) -> int:
            from tokenloop.export import command

            occupied = 2 * exports.bytes if i % 2 else 0
            mounted = mount_disk(disk, occupied + room)
            if i % 2:
                exports.place_old(output)
                if mounted:
                    # The old artifact's files and a filler leave as much room as there should be.
                    free = os.statvfs(disk)
                    surplus = free.f_bavail * free.f_frsize - room
                    (disk / "filler").write_bytes(bytes(max(surplus, 0)))
            if not mounted:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            before = digest(output)
            status = command.main(exports.arguments("new", output))
            require(status == 2, f"exit status {status} with {room} bytes of disk")
            require(digest(output) == before, "the output has changed")
            require(left_beside(output) <= {"filler"}, f"left {left_beside(output)}")
            return 2 if mounted else 3

        log = exports.work / "starve.log"
        status = wait(fork(run, log))
        lines = log.read_text().splitlines()
        require(status in (2, 3), "\n".join(lines))
        reasons = [os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)]
        require(len(lines) == 1 and any(reason in lines[0] for reason in reasons), "\n".join(lines))
        found["starved"] += 1
        found["by a full disk" if status == 2 else "by a limit of a file's size"] += 1
        print(f"starved {i}: {lines[0]}", file=sys.stderr)
    return dict(found)


def run_pairs(exports: Exports, count: int, seed: int) -> dict[str, int]:
    """Run two exports to one output at a time, `count` times; of every third pair kill one."""
    generator, found = random.Random(seed), Counter()
    output = exports.work / "pair" / "artifact"
    for i in range(count):
        if i % 2:
            shutil.rmtree(output.parent, ignore_errors=True)
        pair = {}
        for name in generator.sample(["old", "new"], 2):
            pair[name] = exports.start(name, output, log=exports.work / f"{name}.log")
            time.sleep(generator.random() * 0.05)
        if i % 3 == 2:
            time.sleep(generator.random() * exports.seconds[False])
            os.kill(pair["old"], signal.SIGKILL)
        statuses = {name: wait(process) for name, process in pair.items()}
        require(statuses["new"] == 0, (exports.work / "new.log").read_text())
        require(statuses["old"] in (0, -9), (exports.work / "old.log").read_text())
        names = {exports.whole[name]: name for name in pair}
        require(digest(output) in names, "a mixture")
        require(len(left_beside(output)) <= (statuses["old"] != 0), f"{left_beside(output)}")
        found["pairs"] += 1
        found["won by the one that began first"] += names[digest(output)] == next(iter(pair))
        print(f"pair {i}: {dict(found)}", file=sys.stderr)
    return dict(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="exports to kill")
    parser.add_argument("--starve", type=int, default=20, help="exports to starve of disk")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of exports to one output")
    parser.add_argument("--fillings", type=int, default=2000, help="processes without an export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    start, results = time.perf_counter(), {"seed": options.seed}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for exchanges in (True, False) if options.fillings else ():
            name = "exchanged" if exchanges else "renamed twice"
            (work / name).mkdir()
            results[f"fillings, {name}"] = kill_fillings(
                options.fillings // 2, work / name, options.seed, exchanges
            )
        if options.kills or options.starve or options.pairs:
            os.environ.setdefault("TOKENLOOP_CACHE", str(work / "cache"))
            exports = Exports(work)
            results["pairs"] = run_pairs(exports, options.pairs, options.seed)
            results["starved"] = starve(exports, options.starve, options.seed)
            results["exports"] = kill_exports(exports, options.kills, options.seed)
    results["seconds"] = round(time.perf_counter() - start)
    print(json.dumps(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
