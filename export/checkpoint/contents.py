"""What an opened checkpoint is: a config, and tensors that are read one at a time."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

HASH_CHUNK_BYTES = 1 << 20


class Grid(NamedTuple):
    """What the values of a weight [N, K] are multiples of: whole numbers from `least` to `most`, or
    with `is_float8` numbers of float8_e4m3fn, times the scale that `group_size` neighbours of a row
    share. `scales` reads those, float [N, K / group_size].

    The matrices of experts [E, N, K] have scales [E, N, K / group_size]. With `is_float4` values
    are those of e2m1 times powers of 2, and the tensor is [E, K, N], its scales
    [E, K / group_size, N].
    """

    least: int
    most: int
    group_size: int
    scales: Callable[[], torch.Tensor]
    is_float8: bool = False
    is_float4: bool = False

    @property
    def numbers(self) -> str:
        """What is multiplied, in words."""
        if self.is_float4:
            return "float4"
        return "float8" if self.is_float8 else f"{self.least} to {self.most}"


class NamedGrid(NamedTuple):
    """The grid of a linear layer's weight or of experts' matrices, and what the checkpoint calls
    the weight, or the first of its shards."""

    name: str
    grid: Grid

    def rows(self, index: torch.Tensor) -> "NamedGrid":
        """That of the weight's rows `index`."""
        scales = self.grid.scales
        return self._replace(grid=self.grid._replace(scales=lambda: scales()[index]))


class StoredTensor(NamedTuple):
    """A tensor that is not read yet. `read` gives it in `dtype`, spelled as in safetensors.

    `grid` is there for a weight that may lie on one, and gives the grid or None. It reads no more
    than scales and zero points. `is_nothing` is true for a bias of zeros that a format writes
    beside every weight: a network that has no such bias does not need it.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]
    grid: Callable[[], Grid | None] | None = None
    is_nothing: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. It holds no file open and no tensor data.

    `config` is the text model's config.json, as Hugging Face has it. `metadata` has a GGUF file's
    own keys and values and is empty for safetensors. Tensors are read in the order of `stored`.
    `quantization` names the method of a quantized directory, whose weights are read as floats.
    `unused` are names of its tensors that describe activations, of which nothing is used.
    """

    path: Path
    kind: Literal["gguf", "safetensors"]
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    stored: dict[str, StoredTensor] = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    quantization: str | None = None
    unused: tuple[str, ...] = ()

    def sha256(self) -> str:
        """The hexadecimal hash of the weight files' bytes, joined in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted(self.weight_files):
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()
