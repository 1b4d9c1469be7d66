"""An artifact's tensors on a device, and the processor that its code needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import Artifact
from tokenloop.runner.ranks import Place

ALONE = Place(0, 1)


def check_torch(artifact: Artifact) -> None:
    """Errors: RunnerError for an artifact that another torch compiled."""
    found, wanted = (
        version.split("+")[0]
        for version in (torch.__version__, artifact.manifest["versions"]["torch"])
    )
    if found.split(".")[:2] != wanted.split(".")[:2]:
        raise RunnerError(
            f"{artifact.directory} was compiled by torch {wanted}, and this is {found}: "
            "export it again, or install that torch"
        )


def find_device(artifact: Artifact) -> torch.device:
    """The artifact's device. Errors: RunnerError where this machine's is not what the artifact's
    code was compiled for."""
    manifest = artifact.manifest
    device = torch.device(manifest["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunnerError(
            f"{artifact.directory} is for a CUDA GPU, and torch sees none here: export with "
            "--device cpu"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        processor = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        processor = torch.backends.cpu.get_cpu_capability()
    if manifest.get("processor", processor) != processor:
        raise RunnerError(
            f"{artifact.directory} was compiled for {manifest['processor']}, and this machine's "
            f"{manifest['device']} is {processor}: export it for that"
        )
    return device


def load_tensors(
    artifact: Artifact, device: torch.device, place: Place = ALONE
) -> dict[str, Tensor]:
    """The weights, the state, which is zero, and the views of both, by name. Of several ranks each
    reads what is its own. Errors: RunnerError for weights that are damaged, and a view of a tensor
    that is not there."""
    entry = artifact.manifest["weights"]
    if "random" in entry:
        tensors = _random(entry["random"], device)
    else:
        path = artifact.checked("weights")
        try:
            if place.count == 1:
                tensors = load_file(path, device=str(device))
            else:
                sharded = artifact.manifest["tensor_parallel"]["sharded"]
                tensors = _shards(path, set(sharded), device, place)
        except SafetensorError as error:
            raise RunnerError(f"{path} is damaged ({error}): export it again") from None
    for state in artifact.manifest["state"]:
        dtype = getattr(torch, state["dtype"])
        tensors[state["name"]] = torch.zeros(state["shape"], dtype=dtype, device=device)
    for name, view in entry["views"].items():
        if view["of"] not in tensors:
            raise RunnerError(
                f"{artifact.directory}: {name} is a part of the tensor {view['of']}, which neither "
                "the weights nor the manifest's state have: export it again"
            )
        layout = view["shape"], view["stride"], view["offset"]
        tensors[name] = tensors[view["of"]].as_strided(*layout)
    return tensors


def _shards(path: Path, sharded: set[str], device: torch.device, place: Place) -> dict[str, Tensor]:
    """A file's tensors. Of those that are `sharded` the first axis is the ranks'."""
    tensors = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if name not in sharded:
                tensors[name] = file.get_tensor(name)
                continue
            of_ranks = file.get_slice(name)
            if (found := of_ranks.get_shape()[0]) != place.count:
                raise RunnerError(
                    f"{path} has {name} of {found} ranks, and the manifest says {place.count}: "
                    "export it again"
                )
            # Compiled code takes a tensor to begin where its storage does.
            tensors[name] = of_ranks[place.rank : place.rank + 1][0].clone()
    if missing := sharded - tensors.keys():
        raise RunnerError(f"{path} has no {min(missing)}: export it again")
    return tensors


def _random(entries: list[dict], device: torch.device) -> dict[str, Tensor]:
    """Random weights, for measurements: always the same ones on a device."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for entry in entries:
        tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=device)
        if tensor.dtype == torch.float8_e4m3fn:
            # Any byte without the highest bit of the exponent is a number below 2.
            tensor.view(torch.uint8).random_(generator=generator).bitwise_and_(0xBF)
        elif not tensor.is_floating_point():
            tensor.random_(generator=generator)
        elif tensor.dim() == 1:
            # Weights of norms, and frequencies.
            tensor.uniform_(0.5, 1.0, generator=generator)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        tensors[entry["name"]] = tensor
    return tensors


@contextmanager
def explained(artifact: Artifact) -> Iterator[None]:
    """Make one line of torch's errors while an artifact is loaded."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise RunnerError(
            f"{artifact.directory} does not fit the GPU's memory ({reason}): free some, or export "
            "it with a smaller --max-seq-len or --batch"
        ) from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunnerError(
            f"{artifact.program_file} cannot be loaded ({reason}): export it again"
        ) from None
