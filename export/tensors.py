"""The tensors that an artifact's methods need, by name: weights, views of them, and state."""

from pathlib import Path

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
    """Whether the buffer of that name is written: a layer's cache, or the kernels' semaphores."""
    return ".cache." in name or name == "kernel_semaphores"


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


def write_weights(tensors: dict[str, Tensor], directory: Path, random: bool) -> dict:
    """Write model.safetensors, unless the weights are `random`, and return the manifest's entry.
    Errors: ExportError if it cannot be written."""
    if random:
        return {"random": entries(tensors)}
    path = directory / "model.safetensors"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    # It has no other exception for a full disk, whose reason it tells.
    except SafetensorError as error:
        raise ExportError(f"cannot write {path.name}: {error}") from error
    return {"file": path.name}
