"""The AOTInductor package: every method compiled for one device; weights and state lie outside."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import aot_compile
from torch._inductor.package import package_aoti
from torch.export import Dim

from sampler.greedy import greedy
from sampler.sample import sample

# Any length but 0 and 1, which torch.export takes for constants.
TRACED_LENGTH = 3
OPTIONS = {
    "aot_inductor.package": True,
    # The runner loads weights and state once for all methods.
    "aot_inductor.package_constants_in_so": False,
}


class Prefill(nn.Module):
    """tokens int64 [1, T], positions int64 [T] (and row int64 [1], where there are several) ->
    logits float32 [1, V] after the last token."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        return self.network.prefill(tokens, positions, row)


class Decode(Prefill):
    """token int64 [B, 1], position int64 [B] -> logits float32 [B, V]."""

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        return self.network.decode(token, position)


class Greedy(nn.Module):
    """logits float32 [B, V], next_id int64 [B, 1], which is written."""

    def forward(self, logits: Tensor, next_id: Tensor) -> None:
        next_id.copy_(greedy(logits))


class Sample(nn.Module):
    """logits float32 [B, V]; temperature float32 [B], top_k int64 [B], top_p float32 [B], seed and
    position int64 [B]; next_id int64 [B, 1], which is written."""

    def forward(self, logits: Tensor, *sampling_and_next_id: Tensor) -> None:
        *sampling, next_id = sampling_and_next_id
        next_id.copy_(sample(logits, *sampling))


def write_package(
    model: nn.Module, max_prefill: int, path: Path, progress: Callable[[str], None]
) -> list[str]:
    """Compile the methods of a model for the device that it is on, into a .pt2 file; their names.

    The package's constants have the names of the model's parameters and buffers.
    """
    batch, vocab_size = model.batch, model.config.vocab_size
    device = model.lm_head.weight.device
    with device:
        methods = {
            "prefill": (Prefill(model), *_chunk(batch, max_prefill)),
            "decode": (Decode(model), (_integers(batch, 1), _integers(batch)), None),
        }
        for rows, suffix in {batch: "", 1: "_row" if batch > 1 else ""}.items():
            logits, next_id = torch.zeros(rows, vocab_size), _integers(rows, 1)
            numbers, integers = torch.ones(rows), _integers(rows)
            sampling = numbers, integers, numbers.clone(), integers.clone(), integers.clone()
            methods[f"greedy{suffix}"] = Greedy(), (logits, next_id), None
            methods[f"sample{suffix}"] = Sample(), (logits, *sampling, next_id), None
    files = {}
    for name, (method, example, shapes) in methods.items():
        progress(f"compiling {name}")
        program = torch.export.export(method, example, dynamic_shapes=shapes)
        files[name] = aot_compile(program.module(), example, options=OPTIONS)
    progress("writing")
    package_aoti(str(path), files)
    return sorted(methods)


def constants(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and constant buffers by name, and what else some are called: the other name, and
    the name that the tensor has in the first."""
    tensors, names, also = {}, {}, {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        if not is_state(name):
            first = names.setdefault(id(tensor), name)
            if first == name:
                tensors[name] = tensor
            else:
                also[name] = first
    return tensors, also


def state_entries(model: nn.Module) -> list[dict]:
    """Name, shape and dtype of every buffer that outlives a method's run, for the manifest."""
    return [
        {"name": name, "shape": list(buffer.shape), "dtype": str(buffer.dtype).split(".")[1]}
        for name, buffer in model.named_buffers()
        if is_state(name)
    ]


def is_state(name: str) -> bool:
    """Whether the buffer of that name belongs to a layer's cache."""
    return ".cache." in name


def _chunk(batch: int, max_prefill: int) -> tuple[tuple[Tensor, ...], list | None]:
    """Prefill's example inputs and their dynamic shapes."""
    # One token at most is no dynamic size.
    length = Dim("T", min=1, max=max_prefill) if max_prefill > 1 else None
    traced = min(TRACED_LENGTH, max_prefill)
    example = _integers(1, traced), torch.arange(traced)
    shapes = [{1: length}, {0: length}]
    if batch > 1:
        example, shapes = (*example, _integers(1)), [*shapes, None]
    return example, shapes if length is not None else None


def _integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)
