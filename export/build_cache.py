"""A cache of what exports have in common, in the directory that TOKENLOOP_CACHE names.

Nothing is kept without that variable. A result is found again by all that it comes from: the
function and its arguments, the sources, the packages' versions and the compiler.

Artifacts contain what is kept here, and run it. So nothing is read from a directory or a file that
another user owns or may write to. Results are files of bytes in a zip, and reading one runs
nothing.
"""

import io
import os
import platform
import stat
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from tokenloop.export.artifact import installed_version
from tokenloop.export.errors import ExportError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "export", "models", "sampler"
PACKAGES = "torch", "executorch", "triton"
# A file begins with the digest of the rest.
DIGEST = sha256()
# What a function gives whose result is kept: files' bytes by name, or by method and name.
Files = dict[str, "bytes | Files"]


def place(function: Callable, arguments: tuple, processor: str) -> Path | None:
    """The file of a result, which need not exist. None if nothing is kept.

    `arguments` are plain values. `processor` is what compiled code needs, "" for none. A line on
    stderr says why a directory is not used. Errors: ExportError if the directory cannot be made.
    """
    directory = os.environ.get("TOKENLOOP_CACHE")
    if not directory:
        return None
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"TOKENLOOP_CACHE: cannot make {directory}: {error.strerror}") from error
    if fault := distrust(Path(directory).resolve()):
        print(f"TOKENLOOP_CACHE: {directory} {fault}: it is not used", file=sys.stderr)
        return None
    key = sha256()
    machine = platform.python_version(), platform.machine(), processor, os.environ.get("CXX")
    comes_from = function.__module__, function.__name__, arguments, machine
    key.update(repr((comes_from, [installed_version(name) for name in PACKAGES])).encode())
    for source in sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py")):
        key.update(f"{source.relative_to(ROOT)} ".encode() + sha256(source.read_bytes()).digest())
    return Path(directory, f"{function.__name__.strip('_')}-{key.hexdigest()[:32]}.zip")


def kept(file: Path | None) -> bytes | None:
    """The packed result in `file`, or None. What is damaged or not the user's own is removed, and a
    line on stderr says so."""
    if file is None or not os.path.lexists(file):
        return None
    fault = distrust(file)
    if fault is None:
        data = file.read_bytes()
        result = data[DIGEST.digest_size :]
        if data[: DIGEST.digest_size] == sha256(result).digest():
            return result
        fault = "is damaged"
    print(f"TOKENLOOP_CACHE: {file} {fault}: it is made again", file=sys.stderr)
    file.unlink(missing_ok=True)
    return None


def result_of(function: Callable, arguments: tuple, file: Path | None) -> bytes:
    """function(*arguments), packed. It is read from `file`, or computed and kept there.

    One of several processes computes it, and the others wait.
    """
    if file is None:
        return pack(function(*arguments))
    with FileLock(file.with_suffix(".lock")):
        if (result := kept(file)) is not None:
            return result
        result = pack(function(*arguments))
        # The file is whole or absent. What does not fit on the disk is computed again next time.
        unfinished = file.with_suffix(".tmp")
        try:
            unfinished.unlink(missing_ok=True)
            unfinished.touch(mode=0o600, exist_ok=False)
            unfinished.write_bytes(sha256(result).digest() + result)
            unfinished.replace(file)
        except OSError:
            unfinished.unlink(missing_ok=True)
        return result


def distrust(path: Path) -> str | None:
    """Why somebody other than the user can have written `path`, or None if nobody can."""
    status = path.lstat()
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):o}; try chmod go-w)"
    return None


def pack(files: Files) -> bytes:
    """`files` as a zip. The same files give the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            parts = content if isinstance(content, dict) else {"": content}
            for part, contents in parts.items():
                # ZipInfo has a constant date.
                archive.writestr(zipfile.ZipInfo(f"{name}/{part}" if part else name), contents)
    return data.getvalue()


def unpack(data: bytes) -> Files:
    """What `pack` was given."""
    files: Files = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name, _, part = entry.filename.partition("/")
            if part:
                files.setdefault(name, {})[part] = archive.read(entry)
            else:
                files[name] = archive.read(entry)
    return files
