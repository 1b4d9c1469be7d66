"""A cache of what exports have in common, in the directory that TOKENLOOP_CACHE names.

Nothing is kept without that variable. A result is found again by all that it comes from: the
function and its arguments, the sources, the packages' versions and the compiler.
"""

import os
import pickle
import platform
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from tokenloop.export.artifact import installed_version
from tokenloop.export.errors import ExportError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "export", "models", "sampler"
PACKAGES = "torch", "executorch", "triton"


def place(function: Callable, arguments: tuple, processor: str) -> Path | None:
    """The file of a result, which need not exist. None if nothing is kept.

    `arguments` are plain values. `processor` is what compiled code needs, "" for none. Errors:
    ExportError if the directory cannot be made.
    """
    directory = os.environ.get("TOKENLOOP_CACHE")
    if not directory:
        return None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"TOKENLOOP_CACHE: cannot make {directory}: {error.strerror}") from error
    key = sha256()
    machine = platform.python_version(), platform.machine(), processor, os.environ.get("CXX")
    comes_from = function.__module__, function.__name__, arguments, machine
    key.update(repr((comes_from, [installed_version(name) for name in PACKAGES])).encode())
    for source in sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py")):
        key.update(f"{source.relative_to(ROOT)} ".encode() + sha256(source.read_bytes()).digest())
    return Path(directory, f"{function.__name__.strip('_')}-{key.hexdigest()[:32]}.pickle")


def result_of(function: Callable, arguments: tuple, file: Path | None) -> bytes:
    """function(*arguments), pickled. It is read from `file`, or computed and kept there.

    One of several processes computes it, and the others wait.
    """
    if file is None:
        return pickle.dumps(function(*arguments))
    with FileLock(file.with_suffix(".lock")):
        if file.exists():
            return file.read_bytes()
        result = pickle.dumps(function(*arguments))
        # The file is whole or absent. What does not fit on the disk is computed again next time.
        unfinished = file.with_suffix(".tmp")
        try:
            unfinished.write_bytes(result)
            unfinished.replace(file)
        except OSError:
            unfinished.unlink(missing_ok=True)
        return result
