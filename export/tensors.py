"""The tensors that an artifact's methods need, by name: weights, views of them, and state."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenloop.export.errors import ExportError


def tensors_of(
    *methods: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, Tensor]]:
    """What the methods' packages need: weights, views of weights or state, and state, by name.

    A view is the name `of` the whole, the `offset` of its first element, its `shape` and `stride`.
    Tensors with several names are weights or state under only one of them.
    """
    weights, views, state, named = {}, {}, {}, {}
    for method in methods:
        named |= dict(method.named_parameters(remove_duplicate=False))
        named |= dict(method.named_buffers(remove_duplicate=False))
    # Whole tensors come before their parts. The shortest name comes first among equals.
    owners: dict[int, str] = {}
    for name in sorted(named, key=lambda name: (-named[name].nbytes, len(name), name)):
        tensor = named[name]
        owner = owners.setdefault(tensor.untyped_storage()._cdata, name)
        if owner != name:
            views[name] = {
                "of": owner, "offset": tensor.storage_offset(), "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
            }  # fmt: skip
        elif is_state(name):
            state[name] = tensor
        else:
            weights[name] = tensor
    return weights, views, state


def is_state(name: str) -> bool:
    """Whether the buffer of that name is written: a layer's cache, a round's part of it, the
    kernels' semaphores, or what the runner and the kernels write of a mailbox of ranks."""
    other = name.endswith((".draft_k", ".draft_v", ".peers", ".epochs"))
    return ".cache." in name or other or name == "kernel_semaphores"


def entries(tensors: dict[str, Tensor]) -> list[dict]:
    """Names, shapes and dtypes, for the manifest."""
    return [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for name, tensor in tensors.items()
    ]


# What is written first, as safetensors does: the dtypes whose elements are the largest.
DTYPES = {
    torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip


def write_weights(
    tensors: dict[str, Tensor], directory: Path, random: bool,
    parts: Mapping[int, Sequence[Tensor]] | None = None,
) -> dict:  # fmt: skip
    """Write model.safetensors, unless the weights are `random`, and return the manifest's entry.

    `parts` has, by their storage, the parts along the first axis of tensors that are only places.
    Errors: ExportError if the file cannot be written.
    """
    if random:
        return {"random": entries(tensors)}
    path = directory / "model.safetensors"
    try:
        if parts:
            _write_parts(tensors, path, parts)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except OSError as error:
        raise ExportError(f"cannot write {path.name}: {error.strerror}") from error
    # It has no other exception for a full disk, whose reason it tells.
    except SafetensorError as error:
        raise ExportError(f"cannot write {path.name}: {error}") from error
    return {"file": path.name}


def write_shards(
    of_ranks: Sequence[dict[str, Tensor]], directory: Path, random: bool,
    packed: Mapping[int, Sequence[Tensor]] | None = None,
) -> tuple[dict, dict]:  # fmt: skip
    """Write model.safetensors of the ranks' weights by name, unless they are `random`, and return
    the manifest's entries of the weights and of the ranks.

    What all ranks have alike is there once. Of other tensors there is the ranks' one behind the
    other, along a first axis, so a rank reads no more than its own. `packed` has all
    ranks' parts of places, as of write_weights. Errors: as of write_weights.
    """
    packed = packed or {}
    tensors, parts, sharded = {}, {}, []

    def pieces(x: Tensor) -> Sequence[Tensor]:
        return packed.get(x.untyped_storage()._cdata, [x])

    for name, first in of_ranks[0].items():
        each = [weights[name] for weights in of_ranks]
        if {(x.shape, x.dtype, x.stride()) for x in each} != {
            (first.shape, first.dtype, first.stride())
        }:
            raise ExportError(f"{name} has not one shape on all ranks")
        if random or all(all(map(torch.equal, pieces(x), pieces(first))) for x in each[1:]):
            tensors[name] = first
            if (key := first.untyped_storage()._cdata) in packed:
                parts[key] = packed[key]
            continue
        place = first.new_empty(len(each), *first.shape)
        tensors[name] = place
        parts[place.untyped_storage()._cdata] = [piece for x in each for piece in pieces(x)]
        sharded.append(name)
    entry = write_weights(tensors, directory, random, parts)
    return entry, {"tensor_parallel": {"ranks": len(of_ranks), "sharded": sorted(sharded)}}


def _write_parts(
    tensors: dict[str, Tensor], path: Path, parts: Mapping[int, Sequence[Tensor]]
) -> None:
    """The file that save_file would write, without all tensors in memory at once: a header of JSON
    after its length, and the tensors' bytes (safetensors' format.rst)."""
    order, header, end = list(DTYPES), {}, 0
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name]
            for part in parts.get(tensor.untyped_storage()._cdata, [tensor]):
                file.write(part.detach().contiguous().flatten().view(torch.uint8).numpy().data)
