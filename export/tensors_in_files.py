"""Large tensors in files, so that an export takes the memory of a few of them and not of a model.

The system writes pages of a file back where memory is wanted, and it can do that with no other
memory. A tensor's file has no name as soon as it is mapped, and is gone with the tensor.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tokenloop.export.errors import ExportError

# Smaller tensors are in memory: a file takes pages and system calls of its own.
LEAST_BYTES = 1 << 20
CPU = torch.device("cpu")
_directory: ContextVar[Path | None] = ContextVar("directory", default=None)


@contextmanager
def tensors_in_files(parent: Path) -> Iterator[None]:
    """Within this the functions below put large tensors into files of a directory in `parent`,
    which is removed at the end. Elsewhere they use memory, as torch does."""
    with tempfile.TemporaryDirectory(prefix="tensors-", dir=parent) as directory:
        before = _directory.set(Path(directory))
        try:
            yield
        finally:
            _directory.reset(before)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """torch.empty. Errors: ExportError where the disk has no space for it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not _in_file(n_bytes):
        return torch.empty(shape, dtype=dtype, device=device)
    with _new_file() as file:
        if hasattr(os, "posix_fallocate"):
            # A full disk would otherwise end the process where it first writes.
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        storage = torch.UntypedStorage.from_file(file.name, True, n_bytes)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy, in `dtype` if it is given. Errors: those of `empty`."""
    return empty(tensor.shape, dtype or tensor.dtype, tensor.device).copy_(tensor)


def file_of(data: bytes) -> Path | None:
    """A file with `data`, until the end of `tensors_in_files`. None where it may stay in memory.
    Errors: those of `empty`."""
    if not _in_file(len(data)):
        return None
    with _new_file(delete=False) as file:
        file.write(data)
    return Path(file.name)


@contextmanager
def _new_file(delete: bool = True) -> Iterator[BinaryIO]:
    directory = _directory.get()
    try:
        with tempfile.NamedTemporaryFile(dir=directory, delete=delete) as file:
            yield file
    except OSError as error:
        raise ExportError(
            f"cannot write {directory.parent.parent}: {error.strerror}; an export needs space for "
            "its weights there as it works with them, beside the artifact: choose another --output"
        ) from error


def _in_file(n_bytes: int) -> bool:
    return n_bytes >= LEAST_BYTES and _directory.get() is not None
