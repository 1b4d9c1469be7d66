"""The files of a directory that others have filled: plain names, regular files, known contents.

Native code reads a large file only after it has been hashed. That is done once: the user's cache
directory remembers which file on disk was right, and a file that is written again is another one.
Imports neither NumPy nor an engine.
"""

import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tokenloop.runner.errors import RunnerError

PIECE = 1 << 20  # Bytes that are hashed at a time.
MOST_BYTES = 1 << 28  # Of a file of which nothing says how large it is.
# File systems date changes in steps of up to 2 s. A file that is younger could be changed once more
# and keep its date, so it is hashed again next time.
SETTLED_NS = 2_000_000_000
PLAIN_NAME = "the plain name of a file in the artifact: no directory, no .."


class Digest(NamedTuple):
    """What a file must be."""

    bytes: int
    sha256: str


class Identity(NamedTuple):
    """A file on disk, and the times when its contents and its entry were last changed."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int


def is_plain_name(name: object) -> bool:
    """Whether `name` is a file's name and nothing else: no path, no control characters."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not {"/", "\\"} & set(name)
        and len(name.encode()) <= 255
    )


def open_file(directory: Path, name: str) -> BinaryIO:
    """Open the regular file `name` of the directory to read it, without a buffer.

    Errors: RunnerError for a name that is a path, for a file that is missing, that cannot be read,
    or that is no regular file, and for a link that leads out of the directory.
    """
    if not is_plain_name(name):
        raise RunnerError(f"{directory} names the file {name!r}; it must be {PLAIN_NAME}")
    path = directory / name
    real = os.path.realpath(path)
    if os.path.dirname(real) != os.path.realpath(directory):
        raise RunnerError(
            f"{path} is a link to {real!r}, which is not in the artifact: put the file in its place"
        )
    try:
        kind = os.stat(real, follow_symlinks=False).st_mode
        if not stat.S_ISREG(kind):
            raise RunnerError(f"{path} is {_kind(kind)}; it must be a file: export it again")
        # A FIFO that has come since then is opened without waiting.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(real, flags), "rb", buffering=0)
    except FileNotFoundError:
        raise RunnerError(
            f"{path} is missing, though the manifest names it: export it again"
        ) from None
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror}") from None


def read_file(directory: Path, name: str, expected: Digest | None = None) -> bytes:
    """The contents of the file, which are those `expected`. Errors: as `open_file` and `check`."""
    with open_file(directory, name) as file:
        size = os.fstat(file.fileno()).st_size
        if expected is not None:
            _check_size(directory / name, size, expected)
        elif size > MOST_BYTES:
            raise RunnerError(
                f"{directory / name} has {size} bytes; {MOST_BYTES >> 20} MiB are the most: export "
                "it again"
            )
        data = file.readall()
    if expected is not None:
        _check_sha256(directory / name, hashlib.sha256(data).hexdigest(), expected)
    return data


def check_size(directory: Path, name: str, expected: Digest) -> None:
    """Errors: as `open_file`, and RunnerError for a file of another size."""
    with open_file(directory, name) as file:
        _check_size(directory / name, os.fstat(file.fileno()).st_size, expected)


def check(
    directory: Path, name: str, expected: Digest, verify: bool | None, checked: set[Identity]
) -> Path:
    """The path of a file that is what is `expected`.

    It is hashed if nobody has hashed it since it was last changed; with `verify` in any case, and
    with `verify` false never. Those among `checked` are not hashed again, and it joins them.

    Errors: as `open_file`, and RunnerError for another size or hash.
    """
    path = directory / name
    with open_file(directory, name) as file:
        identity = _identity(file)
        _check_size(path, identity.bytes, expected)
        if identity in checked:
            return path
        if verify or (verify is None and not _is_known(identity, expected)):
            settled = time.time_ns() - identity.ctime_ns > SETTLED_NS
            _check_sha256(path, _sha256(file), expected)
            if settled and _identity(file) == identity:
                _remember(identity, expected)
        checked.add(identity)
    return path


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFLNK: "a link to itself"}
    return kinds.get(stat.S_IFMT(mode), "a device or socket")


def _identity(file: BinaryIO) -> Identity:
    found = os.fstat(file.fileno())
    times = found.st_mtime_ns, found.st_ctime_ns
    return Identity(found.st_dev, found.st_ino, found.st_size, *times)


def _sha256(file: BinaryIO) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    while count := file.readinto(piece):
        digest.update(piece[:count])
    return digest.hexdigest()


def _check_size(path: Path, size: int, expected: Digest) -> None:
    if size != expected.bytes:
        raise RunnerError(
            f"{path} has {size} bytes and should have {expected.bytes}: it is truncated or of "
            "another export; export it again"
        )


def _check_sha256(path: Path, sha256: str, expected: Digest) -> None:
    if sha256 != expected.sha256:
        raise RunnerError(
            f"{path} is damaged (its sha256 is {sha256[:12]}..., and the manifest says "
            f"{expected.sha256[:12]}...): export it again"
        )


def _memory(identity: Identity) -> Path | None:
    """Where the user's cache has what is known of a file, if there is a cache. A file that takes
    the place of another takes its entry, too."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        return None
    return Path(cache, "tokenloop", "verified", f"{identity.device:x}-{identity.inode:x}")


def _known(identity: Identity, expected: Digest) -> bytes:
    return f"{identity.bytes} {identity.mtime_ns} {identity.ctime_ns} {expected.sha256}\n".encode()


def _is_known(identity: Identity, expected: Digest) -> bool:
    path = _memory(identity)
    # What cannot be read is not known, and the file is hashed.
    with suppress(OSError):
        return path is not None and path.read_bytes() == _known(identity, expected)
    return False


def _remember(identity: Identity, expected: Digest) -> None:
    path = _memory(identity)
    if path is None:
        return
    # Where the cache cannot be written, the file is hashed at each start.
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_bytes(_known(identity, expected))
        new.replace(path)
