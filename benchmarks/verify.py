"""What it costs that a program is hashed before it is loaded: python -m benchmarks.verify

The ceiling is reading the file. Hashes are compared, then what a start pays for a program that was
never hashed, and for one that was. Times are the process's own (CPU), for the file is in memory.
"""

import argparse
import hashlib
import os
import ssl
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import DEFAULT_ARTIFACT, finish, machine, print_machine
from tokenloop.runner.files import PIECE
from tokenloop.runner.manifest import open_artifact


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=DEFAULT_ARTIFACT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    options = parser.parse_args()
    found = machine()
    print_machine(found)
    path = open_artifact(options.artifact).program_file
    size = path.stat().st_size
    crc = [0]
    updates: dict[str, Callable[[bytes], object]] = {
        "reading": len,
        "crc32": lambda piece: crc.append(zlib.crc32(piece, crc.pop())),
        **{name: hashlib.new(name).update for name in ("sha1", "sha256", "blake2b")},
    }
    rows = {
        name: median_ms(lambda update=update: read(path, update), options.repeats)
        for name, update in updates.items()
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache

        def start(verify: bool | None) -> None:
            open_artifact(options.artifact, verify).checked("program")

        rows["start, --no-verify"] = median_ms(lambda: start(False), options.repeats)
        rows["start, --verify"] = median_ms(lambda: start(True), options.repeats)
        start(None)
        rows["start, hashed before"] = median_ms(lambda: start(None), options.repeats)
    print(f"program     {size / 1e6:.0f} MB; {ssl.OPENSSL_VERSION}")
    for name, ms in rows.items():
        print(f"{name:<21} {ms:8.2f} ms")
    finish({"benchmark": "verify", "machine": found, "bytes": size, "ms": rows}, options.save)
    return 0


def read(path: Path, update: Callable[[memoryview], object]) -> None:
    piece = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            update(piece[:count])


def median_ms(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    sys.exit(main())
