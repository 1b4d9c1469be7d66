"""An export's memory is that of a few tensors, for the others are in files that go with them."""

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from executorch.exir._serialize._cord import FileBackedData
from torch import nn

from tests.export.test_checkpoint import write_gguf
from tokenloop.export import packed_weights
from tokenloop.export import tensors_in_files as files
from tokenloop.export.background import M_MMAP_THRESHOLD, return_memory
from tokenloop.export.checkpoint import Checkpoint, StoredTensor, load_weights
from tokenloop.export.checkpoint.gguf_reader import read_header
from tokenloop.export.errors import ExportError
from tokenloop.export.packed_weights import PackedLinear
from tokenloop.export.pte import calibrate, quantize
from tokenloop.export.pte.calibrate import _replace
from tokenloop.export.pte.pte_program import to_program
from tokenloop.export.pte.quantize import QuantizedLinear
from tokenloop.export.recipes import FP8
from tokenloop.models.kernels.linear.packing import (
    quantize_float8,
    quantize_int4,
    quantize_int8,
)

MEGABYTE = 1 << 20


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    text = Path("/proc/self/status").read_text()
    return 1024 * sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", text))


def in_file(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is that of a file of `tensors_in_files`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return "/tensors-" in line
    return False


def test_a_large_tensor_is_in_a_file_that_is_gone_with_it(tmp_path):
    assert not in_file(files.empty((MEGABYTE,), torch.int8))
    with files.tensors_in_files(tmp_path):
        small = files.empty((MEGABYTE - 1,), torch.int8)
        large = files.empty((512, 1024), torch.bfloat16)
        assert not in_file(small) and in_file(large)
        (directory,) = tmp_path.iterdir()
        # It has no name from the beginning, so nothing is left of it after being killed.
        assert not list(directory.iterdir())
        copy = files.copied(torch.arange(MEGABYTE).view(1024, 1024).t(), torch.float32)
        assert in_file(copy) and copy.is_contiguous()
        assert copy[3, 5] == 5 * 1024 + 3
        large.fill_(2)
    assert not list(tmp_path.iterdir())
    assert (large == 2).all() and in_file(large)
    assert not in_file(files.empty((MEGABYTE,), torch.int8))


def test_tensors_of_another_device_are_no_files(tmp_path):
    with files.tensors_in_files(tmp_path):
        assert files.copied(torch.empty(1 << 30, device="meta")).device.type == "meta"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with files.tensors_in_files(tmp_path):
        with pytest.raises(ExportError, match="No space left on device; an export needs space"):
            files.empty((MEGABYTE,), torch.int8)
        (directory,) = tmp_path.iterdir()
        assert not list(directory.iterdir())


class Layers(nn.Module):
    def __init__(self, count: int, size: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))


COUNT, SIZE = 24, 1024


@pytest.fixture
def checkpoint(tmp_path):
    """GGUF in 8 bits, COUNT layers of 4 MB in float32."""
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
    data = gguf.quantize(rows, kind)
    tensors = {f"blk.{i}.attn_output.weight": (data, kind) for i in range(COUNT)}
    path = write_gguf(tmp_path / "a.gguf", tensors)
    stored = {
        name: StoredTensor(tensor.shape, "F32", tensor.dequantize)
        for name, tensor in read_header(path)[1].items()
    }
    return Checkpoint(path, "gguf", {}, (path,), stored)


def loaded(checkpoint, dtype: torch.dtype) -> Layers:
    with torch.device("meta"):
        network = Layers(COUNT, SIZE)
    load_weights(
        network, checkpoint, lambda name: f"layers.{name.split('.')[1]}.weight", dtype=dtype
    )
    return network


STEPS = {
    "read": lambda linear: linear,
    "int8 words": lambda linear: PackedLinear([linear], 8),
    "int4 words": lambda linear: PackedLinear([linear], 4),
    "float8": lambda linear: PackedLinear([linear], FP8),
    "8da8w": lambda linear: QuantizedLinear(linear, 8, None),
    "calibrated": lambda linear: _replace(linear, torch.mul, torch.full((SIZE,), 2.0)),
}


@pytest.fixture
def gives_back():
    """As in an export. By itself malloc keeps more memory the more the process has used before."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    return_memory()
    yield
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)


@pytest.mark.usefixtures("one_thread", "gives_back")
@pytest.mark.parametrize("step", STEPS)
def test_the_memory_of_weights_is_that_of_a_few_tensors(tmp_path, checkpoint, step):
    result = SIZE * SIZE * 4
    loaded(checkpoint, torch.float32)  # what the first use of anything takes
    STEPS[step](nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False))
    with files.tensors_in_files(tmp_path), torch.no_grad():
        before = anonymous()
        network = loaded(checkpoint, torch.float32)
        made = [STEPS[step](linear) for linear in network.layers]
        grown = anonymous() - before
        assert len(made) == COUNT and grown < COUNT * result / 2


FREES_BELOW_WHAT_LIVES_ON = """
import ctypes, sys
from pathlib import Path
from tokenloop.export.background import return_memory
def anonymous():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])
libc, size = ctypes.CDLL(None), 2 << 20
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "export":
    return_memory()
large = libc.malloc(31 << 20)
libc.free(ctypes.c_void_p(large))
before, blocks = anonymous(), []
for _ in range(40):
    blocks.append(libc.malloc(size))
    ctypes.memset(blocks[-1], 1, size)
    libc.malloc(64 << 10)
for block in blocks:
    libc.free(ctypes.c_void_p(block))
print((anonymous() - before) // size)
"""


@pytest.mark.parametrize(("process", "most"), [("export", 5), ("other", 40)])
def test_an_export_gives_back_what_lies_below_memory_that_lives_on(process, most):
    command = [sys.executable, "-c", FREES_BELOW_WHAT_LIVES_ON, process]
    kept = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Without it the test would say nothing.
    assert kept <= most if process == "export" else kept > most / 2


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.arange(MEGABYTE // 4).view(-1, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.rows)


def test_a_programs_constants_are_files_until_it_is_written(tmp_path):
    def program() -> bytes:
        methods = {"forward": torch.export.export(Table(), (torch.arange(3),))}
        made = to_program(methods, {}, False, lambda what: None)
        kinds.append({type(buffer.storage) for buffer in made.executorch_program.constant_buffer})
        return made.buffer

    kinds: list[set[type]] = []
    expected = program()
    with files.tensors_in_files(tmp_path):
        assert program() == expected
    assert kinds == [{bytes}, {bytes, FileBackedData}]


@pytest.mark.parametrize(
    "shapes", [[(300, 520)], [(256, 1024), (64, 1024), (64, 1024)], [(999, 72), (7, 72)]]
)
def test_squares_of_columns_and_errors_of_rows_in_parts_are_those_of_the_whole(monkeypatch, shapes):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    linear = nn.Linear(shapes[0][1], shapes[0][0])
    linear.weight, mean = nn.Parameter(weights[0], requires_grad=False), weights[0][0].clone()
    expected = calibrate.mean_squares(weights), *QuantizedLinear(linear, 8, None, mean).buffers()
    for module in (calibrate, quantize):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1000)
    assert torch.equal(expected[0], torch.cat(weights).square().mean(0))
    got = calibrate.mean_squares(weights), *QuantizedLinear(linear, 8, None, mean).buffers()
    assert all(torch.equal(one, other) for one, other in zip(got, expected))


@pytest.mark.parametrize(
    ("bits", "whole"), [(4, quantize_int4), (8, quantize_int8), (FP8, quantize_float8)]
)
def test_weights_packed_by_blocks_are_those_of_the_whole(monkeypatch, bits, whole):
    monkeypatch.setattr(packed_weights, "BLOCK_ELEMENTS", 2000)
    weight = torch.randn(62, 256, generator=torch.Generator().manual_seed(0))
    expected = whole(weight)
    got = packed_weights.quantized([weight[:20], weight[20:]], bits)
    for one, other in zip(got, expected):
        # The manifest has strides, also where they mean nothing.
        assert torch.equal(one, other) and one.stride() == other.stride()
