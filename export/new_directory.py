"""A directory that appears whole under its name, or not at all.

It is filled beside its target, as `.NAME-RANDOM.unfinished`. Its process holds a lock (flock) on
it, so that what a killed process left can be told from what is being filled. Whoever makes the next
directory beside it removes what is left.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What is being filled, what was moved out of its way, and what is only removed: half of that may be
# gone already.
UNFINISHED, REPLACED, REMOVED = ".unfinished", ".replaced", ".removed"
LEFT = re.compile(r"\.(.+)-[a-z0-9_]{8}\.(unfinished|replaced|removed)")
# Of linux/fcntl.h and linux/fs.h.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` at the end. Nothing is left after an exception.

    A directory that stands at `target` is replaced at once, where the system can exchange two names
    (Linux, on most file systems). Elsewhere it is missing for a moment, and put back by the next
    call if the process is killed in it. Of several that make one target the last one stays.
    Errors: OSError.
    """
    clear(target.parent)
    directory, lock = _make(target)
    replaced = directory.with_suffix(REPLACED)
    try:
        yield directory
        # mkdtemp keeps other users out. The target is as readable as any new directory.
        umask = os.umask(0)
        os.umask(umask)
        directory.chmod(0o777 & ~umask)
        _put(directory, target, replaced)
        _remove(replaced)
    finally:
        _put_back(replaced, target)
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def clear(parent: Path) -> None:
    """Remove what killed processes left in `parent`, and put back what they had moved away."""
    try:
        paths = [path for path in parent.iterdir() if LEFT.fullmatch(path.name)]
    # Who may write to a directory need not be allowed to list it.
    except PermissionError:
        return
    # What was moved away comes first: the lock on what should have replaced it is looked at. If two
    # processes were killed, the newest is put back.
    for path in sorted(paths, key=_last_moved, reverse=True):
        if path.suffix == REPLACED:
            filling = path.with_suffix(UNFINISHED)
            lock = _lock(filling)
            if lock is not None or not filling.exists():
                _put_back(path, parent / LEFT.fullmatch(path.name)[1])
            if lock is not None:
                os.close(lock)
    for path in paths:
        if path.suffix != REPLACED and (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _last_moved(path: Path) -> int:
    try:
        return path.lstat().st_ctime_ns
    except FileNotFoundError:
        return 0


def _put_back(replaced: Path, target: Path) -> None:
    """Move `replaced` to where it was, or remove it if that is taken."""
    if not _is_own(replaced):
        return
    try:
        if not os.path.lexists(target):
            replaced.rename(target)
            return
    # Another process was faster: it did the same, or its directory is there by now.
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
    _remove(replaced)


def _remove(replaced: Path) -> None:
    """Remove what was replaced. Nobody may put back a part of it."""
    removed = replaced.with_suffix(REMOVED)
    # It is gone, or what an earlier process could not remove is in the way.
    with suppress(OSError):
        replaced.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _make(target: Path) -> tuple[Path, int]:
    """A new directory beside `target`, and the descriptor that locks it."""
    while True:
        path = tempfile.mkdtemp(UNFINISHED, f".{target.name}-", target.parent)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process clears up, and takes this for a dead one's.
        except BlockingIOError:
            os.close(lock)
            continue
        # A file system without locks: nobody else can lock it, and so nobody removes it.
        except OSError:
            return Path(path), lock
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(lock)):
            return Path(path), lock
        os.close(lock)


def _is_own(path: Path) -> bool:
    """Whether `path` is a directory of this user's, and no link."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _lock(path: Path) -> int | None:
    """A descriptor that locks `path`. None if it is somebody's, or is no directory of this user."""
    try:
        if not _is_own(path):
            return None
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Somebody's (EWOULDBLOCK), or a file system without locks.
    except OSError:
        os.close(lock)
        return None
    return lock


def _put(directory: Path, target: Path, replaced: Path) -> None:
    """Make `directory` the `target`, whatever other processes do with that in the meantime."""
    while True:
        try:
            # This takes the place of nothing, and of an empty directory.
            directory.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if exchange(directory, target):
                return
            # What an earlier turn moved away is older than what is there now.
            _remove(replaced)
            target.rename(replaced)
        # Another process has just moved the target away.
        except FileNotFoundError:
            continue


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once. False where the system or the file system cannot. Errors: OSError
    if one of them is missing, among others."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
