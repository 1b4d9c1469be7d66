"""A program's constants in files, until the program is written.

ExecuTorch copies each constant outside a delegate into an object of bytes: an embedding, and with
plain kernels all weights. A Cord takes files in place of those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from executorch.exir._serialize._cord import FileBackedData
from executorch.exir.emit._emitter import _Emitter

from tokenloop.export.tensors_in_files import file_of


def in_file(data: bytes) -> bytes | FileBackedData:
    """`data`, as a file where it is large. Errors: those of `tensors_in_files.empty`."""
    path = file_of(data)
    return data if path is None else FileBackedData(str(path))


@contextmanager
def constants_in_files() -> Iterator[None]:
    """Within this large constants of a program that is emitted are files."""
    save = _Emitter._save_new_const_tensor

    def save_in_file(emitter: _Emitter, *arguments: Any) -> int:
        buffers = emitter.program_state.constant_buffer
        count = len(buffers)
        index = save(emitter, *arguments)
        if len(buffers) > count:
            buffers[-1].storage = in_file(buffers[-1].storage)
        return index

    with mock.patch.object(_Emitter, "_save_new_const_tensor", save_in_file):
        yield
