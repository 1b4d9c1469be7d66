"""A quantization_config, whose keys are read or refused, and the tensors of quantized weights."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from tokenloop.export.checkpoint.contents import StoredTensor
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown


class Settings(NamedTuple):
    """The entry `name` of the config.json in the directory `path`."""

    path: Path
    name: str
    entry: dict[str, Any]

    def check_keys(self, known: Collection[str]) -> None:
        """Errors: ExportError for a key that is not `known` and says something."""
        for key, value in self.entry.items():
            if key not in known and key != "quant_method" and value:
                self.refuse(key, value, "what it asks for is not known, and it may change weights")

    def only(self, key: str, *right: Any, default: Any = None) -> Any:
        """The value, which is one of `right`. Errors: ExportError for another."""
        value = self.entry.get(key, default)
        # 1 is no true, nor 1.0 a 1.
        if not any(value == item and type(value) is type(item) for item in right):
            self.refuse(key, value, f"{' or '.join(map(repr, right))} can be read")
        return value

    def whole(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """The value, a whole number. Errors: ExportError for another."""
        value = self.entry.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, value, f"a whole number from {least} to {most} is right")
        return value

    def refuse(self, key: str, value: Any, right: str) -> NoReturn:
        raise ExportError(f"{self.path}: {self.name}.{key} is {shown(value)}; {right}")

    def misfit(self, tensor: str, what: str) -> NoReturn:
        """Errors: ExportError about the tensor of that name."""
        raise ExportError(f"{self.path}: {tensor} {what}")


class Parts(NamedTuple):
    """The tensors that stand for the weight `name`, by what their names have instead of it."""

    settings: Settings
    name: str
    tensors: dict[str, StoredTensor]

    def expect(self, part: str, dtypes: Collection[str], *shapes: tuple[int, ...]) -> StoredTensor:
        """The part, of one of those dtypes and shapes (any shape where none are given). Errors:
        ExportError where it is missing or another."""
        tensor = self.tensors.get(part)
        if tensor is None:
            self.settings.misfit(self.name, f"has no {part}")
        if tensor.dtype not in dtypes:
            self.settings.misfit(
                f"{part} of {self.name}", f"is {tensor.dtype}; {' or '.join(dtypes)} can be read"
            )
        if 0 in tensor.shape:
            self.settings.misfit(f"{part} of {self.name}", f"has the shape {tensor.shape}")
        if shapes and tensor.shape not in shapes:
            right = " or ".join(map(str, dict.fromkeys(shapes)))
            self.settings.misfit(
                f"{part} of {self.name}", f"has the shape {tensor.shape}; {right} is right"
            )
        return tensor

    def read(self, part: str) -> Tensor:
        return self.tensors[part].read()


def gather(
    settings: Settings, stored: dict[str, StoredTensor], suffixes: dict[str, str], weight: str
) -> tuple[dict[str, StoredTensor], list[Parts]]:
    """The tensors that are what they are, and those of each quantized weight.

    `suffixes` maps the ends of the names of a weight's tensors to what the parts are called, and
    `weight` is the end of the name that the weight gets.
    """
    plain, found = {}, {}
    # A suffix may be the end of another.
    longest_first = sorted(suffixes, key=len, reverse=True)
    for name, tensor in stored.items():
        suffix = next((end for end in longest_first if name.endswith(end)), None)
        if suffix is None:
            plain[name] = tensor
        else:
            found.setdefault(name.removesuffix(suffix) + weight, {})[suffixes[suffix]] = tensor
    for name in found.keys() & plain.keys():
        settings.misfit(name, f"is there as floats and as {', '.join(found[name])}")
    return plain, [Parts(settings, name, tensors) for name, tensors in found.items()]


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., 2 * n] of bytes uint8 [..., n]: the low half of each byte comes first."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def fields(words: Tensor, bits: int, order: Iterable[int] | None = None) -> Tensor:
    """Fields int32 [..., n * 32 / bits] of words int32 [..., n], the lowest bits first.

    With an `order`, entry i of a word's fields is the one that lies at place order[i].
    """
    places = list(range(32 // bits)) if order is None else list(order)
    shifts = torch.tensor([bits * place for place in places], dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """scale [..., R, C] for each of shape [..., N, K]: one for a block, the last of which may be
    cut off. Rows of a block are repeated; columns are only where they differ."""
    rows, columns = shape[-2:]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(block[1], -1)[..., :columns]
    if scale.shape[-2] > 1:
        scale = scale.repeat_interleave(block[0], -2)[..., :rows, :]
    return scale
