"""GGUF files as they are: the header's values, and tensors dequantized one at a time.

Knows no architecture (see gguf_architectures.py) and no tokenizer. The format is described in
ggml's docs/gguf.md. The `gguf` package supplies block sizes and dequantization; its GGUFReader is
not used, because it takes 12 s for a vocabulary of 262,144 tokens (an array for each) and fails
on a truncated file with an IndexError.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
import torch

from tokenloop.export.checkpoint.gguf_metadata import check_metadata
from tokenloop.export.errors import ExportError
from tokenloop.export.tensors_in_files import empty
from tokenloop.models.config_fields import shown

STRING, ARRAY, FLOAT32, BOOL = 8, 9, 6, 7
SCALAR_FORMATS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {
    10: "Q", 11: "q", 12: "d",
}  # fmt: skip
MAX_DIMENSIONS = 4
# The version of the layouts of quantized blocks.
LAYOUTS = gguf.GGML_QUANT_VERSION
ALIGNMENTS = {1 << power for power in range(3, 32)}
# Elements dequantized at a time. The gguf package holds a few copies of what it is given.
BLOCK_ELEMENTS = 1 << 20
# The fewest bytes of a string, of a key with its value, and of a tensor's row in the table.
STRING_BYTES, VALUE_BYTES, INFO_BYTES = 8, 13, 32


def _first_half(blocks: np.ndarray) -> np.ndarray:
    """The scale of a block that begins with it, as float16."""
    return blocks[:, :2].copy().view(np.float16).astype(np.float32)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """The 16 scales of a block of Q6_K: int8 each, times a float16 at the end."""
    whole = blocks[:, 208:].copy().view(np.float16).astype(np.float32)
    return whole * blocks[:, 192:208].copy().view(np.int8).astype(np.float32)


# Types whose values are whole numbers times a scale: the least and the most of those, how many
# share a scale, and the scales of blocks of bytes (ggml's block_q4_0 and so on). The other types
# add a minimum, or look values up.
GRIDS = {
    gguf.GGMLQuantizationType.Q4_0: (-8, 7, 32, _first_half),
    gguf.GGMLQuantizationType.Q5_0: (-16, 15, 32, _first_half),
    gguf.GGMLQuantizationType.Q8_0: (-128, 127, 32, _first_half),
    gguf.GGMLQuantizationType.Q6_K: (-32, 31, 16, _q6_k),
}


class GgufTensor(NamedTuple):
    """Where one tensor lies: `shape` in PyTorch order, `offset` in bytes from the file's start."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        block_size, type_size = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block_size * type_size

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def unstacked(self) -> "list[GgufTensor]":
        """Its parts along the first dimension, of two or more."""
        count, *shape = self.shape
        size = self.n_bytes // count
        return [
            self._replace(shape=tuple(shape), offset=self.offset + i * size) for i in range(count)
        ]

    def dequantize(self) -> torch.Tensor:
        """Read the tensor: float32 of `shape`, in memory of its own."""
        # Any bytes are values of some type. Those that are not finite are for the caller to refuse.
        with np.errstate(all="ignore"):
            return self._rows(self.shape[-1], lambda data: gguf.dequantize(data, self.type))

    def scales(self) -> torch.Tensor:
        """The scale of each group of a type of GRIDS, float32 [..., shape[-1] / group size]."""
        _, _, size, parts = GRIDS[self.type]
        block_bytes = gguf.GGML_QUANT_SIZES[self.type][1]
        return self._rows(
            self.shape[-1] // size,
            lambda data: parts(data.reshape(-1, block_bytes)).reshape(len(data), -1),
        )

    def _rows(self, width: int, convert: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
        """float32 [..., width], of which `convert` makes rows from the bytes uint8 of rows."""
        rows = math.prod(self.shape[:-1])
        tensor = empty((rows, width), torch.float32)
        output = tensor.numpy()
        step = max(1, BLOCK_ELEMENTS // self.shape[-1])
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, rows, step):
                block = output[start : start + step]
                data = np.fromfile(file, dtype=np.uint8, count=len(block) * self.row_bytes)
                if data.size != len(block) * self.row_bytes:
                    raise ExportError(f"{self.path} became shorter while {self.name} was read")
                block[:] = convert(data.reshape(len(block), self.row_bytes))
        return tensor.reshape(*self.shape[:-1], width)


class _Header:
    """Reads the header's values in order, and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def check_left(self, size: int) -> None:
        """Errors: ExportError for a header that says that `size` bytes follow where fewer do."""
        if size > self.left:
            raise ExportError(
                f"{self.path} is truncated: its header goes on after the last of its "
                f"{self.path.stat().st_size} bytes; get the whole file"
            )

    def take(self, size: int) -> bytes:
        self.check_left(size)
        self.left -= size
        return self.file.read(size)

    def count(self, least_bytes: int) -> int:
        """How many things follow, each of `least_bytes` or more."""
        count = self.number("Q")
        self.check_left(count * least_bytes)
        return count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExportError(
                f"{self.path} is damaged: a string in its header is not UTF-8"
            ) from error

    def value(self, kind: int) -> Any:
        """A scalar, a string, a list of strings, or a NumPy array of numbers."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in SCALAR_FORMATS:
            raise ExportError(f"{self.path} is damaged: its header has a value of type {kind}")
        if kind == BOOL:
            byte = self.number("B")
            if byte > 1:
                raise ExportError(f"{self.path} is damaged: its header has {byte} for a bool")
            return bool(byte)
        number = self.number(SCALAR_FORMATS[kind])
        # The shortest decimal: an epsilon stored as float32 reads 1e-06, as in config.json.
        return float(str(np.float32(number))) if kind == FLOAT32 else number

    def array(self, kind: int, length: int) -> list[str] | np.ndarray:
        if kind == STRING:
            self.check_left(length * STRING_BYTES)
            return [self.string() for _ in range(length)]
        if kind not in SCALAR_FORMATS:
            raise ExportError(f"{self.path} is damaged: its header has an array of type {kind}")
        dtype = np.dtype("<" + SCALAR_FORMATS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype=dtype)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Read the metadata and the table of tensors of the GGUF file `path`; no tensor data.

    Errors: ExportError for a file that is not GGUF, of another version or byte order, or truncated
    anywhere (every length is compared with the file's size); for a value of the wrong kind
    (gguf_metadata.py), and another version of the layouts of blocks; for a tensor of a type that
    the `gguf` package cannot dequantize, and for tensors that lie at no multiple of the alignment
    or in one another.
    """
    with path.open("rb") as file:
        header = _Header(file, path)
        magic = file.read(4)
        if magic != b"GGUF":
            raise ExportError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        header.left -= 4
        version = header.number("I")
        if version in (2 << 24, 3 << 24):
            raise ExportError(
                f"{path} is a big-endian GGUF file; convert it to little-endian with "
                "`gguf-convert-endian`"
            )
        if version not in (2, 3):
            raise ExportError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
        n_tensors, n_values = header.count(INFO_BYTES), header.count(VALUE_BYTES)
        metadata = {}
        for _ in range(n_values):
            key = header.string()
            if key in metadata:
                raise ExportError(f"{path} is damaged: it has the key {shown(key)} twice")
            metadata[key] = header.value(header.number("I"))
        check_metadata(path, metadata)
        if (layouts := metadata.get("general.quantization_version", LAYOUTS)) != LAYOUTS:
            raise ExportError(
                f"{path}: general.quantization_version is {layouts}; {LAYOUTS} is supported"
            )
        infos = [_tensor_info(header) for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment not in ALIGNMENTS:
            raise ExportError(
                f"{path} is damaged: general.alignment is {shown(alignment)}; a power of two from "
                "8 is right"
            )
        data_start = -(-file.tell() // alignment) * alignment
    file_size = path.stat().st_size
    tensors = {}
    for name, shape, kind, offset in infos:
        tensor = GgufTensor(
            path, name, shape, _dequantizable(path, name, kind), data_start + offset
        )
        if name in tensors:
            raise ExportError(f"{path} is damaged: it has two tensors named {name}")
        if shape[-1] % gguf.GGML_QUANT_SIZES[tensor.type][0]:
            raise ExportError(
                f"{path} is damaged: {name} is {tensor.type.name}, but its rows of {shape[-1]} "
                "elements are not whole blocks"
            )
        if offset % alignment:
            raise ExportError(
                f"{path} is damaged: {name} begins at byte {offset} of the data, which is no "
                f"multiple of the alignment, {alignment}"
            )
        if tensor.offset + tensor.n_bytes > file_size:
            raise ExportError(
                f"{path} is truncated: {name} ends at byte {tensor.offset + tensor.n_bytes}, the "
                f"file at byte {file_size}; get the whole file"
            )
        tensors[name] = tensor
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for first, second in zip(in_order, in_order[1:]):
        if first.offset + first.n_bytes > second.offset:
            raise ExportError(
                f"{path} is damaged: {first.name} ends at byte {first.offset + first.n_bytes}, and "
                f"{second.name} begins at byte {second.offset}"
            )
    return metadata, tensors


def _tensor_info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """One row of the table: name, shape in PyTorch order, type number, offset into the data."""
    name = header.string()
    n_dimensions = header.number("I")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ExportError(f"{header.path} is damaged: {name} has {n_dimensions} dimensions")
    # GGUF lists the fastest-moving dimension first, PyTorch last.
    shape = tuple(header.number("Q") for _ in range(n_dimensions))[::-1]
    if 0 in shape:
        raise ExportError(f"{header.path} is damaged: {name} has the shape {shape}")
    return name, shape, header.number("I"), header.number("Q")


def _dequantizable(path: Path, name: str, kind: int) -> gguf.GGMLQuantizationType:
    """`kind` as the package's enum, if the package can dequantize it (tried on one block)."""
    label = str(kind)
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        label = quantization.name
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[quantization][1]), dtype=np.uint8)
        gguf.dequantize(block, quantization)
    except (ValueError, NotImplementedError) as error:
        raise ExportError(
            f"{path}: {name} has the type {label}, which the gguf package cannot dequantize; "
            "requantize the model to another type, such as Q8_0"
        ) from error
    return quantization
