"""A lowered method, run launch by launch on the memory that it was given."""

import torch

from tokenloop.export.launches.lowering import Lowered, Pointer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def replay(
    method: Lowered, inputs: list[torch.Tensor], tensors: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The outputs. Inputs and `tensors`, weights and state by name, are written where the method
    writes them. All other memory is NaN until then."""

    def poisoned(size: int) -> torch.Tensor:
        return torch.full((max(1, size),), 0xFF, dtype=torch.uint8, device=DEVICE)

    workspace = poisoned(method.workspace)
    outputs = [poisoned(torch.Size(x.shape).numel() * x.dtype.itemsize) for x in method.outputs]

    def tensor(x):
        if not isinstance(x, Pointer):
            return x
        if x.memory == "tensor":
            whole = tensors[x.which].flatten()
        elif x.memory == "input":
            whole = inputs[x.which].flatten()
        else:
            memory = workspace if x.memory == "workspace" else outputs[x.which]
            count = memory.numel() // x.dtype.itemsize
            whole = memory[: count * x.dtype.itemsize].view(x.dtype)
        return whole.as_strided(x.shape, x.stride, x.offset // x.dtype.itemsize)

    for launch in method.launches:
        arguments = map(tensor, launch.arguments)
        named = {name: tensor(value) for name, value in launch.named.items()}
        launch.kernel[launch.grid](*arguments, **named)
    return [tensor(x) for x in method.outputs]
