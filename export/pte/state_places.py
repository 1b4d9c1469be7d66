"""Where an ExecuTorch program keeps its state: in arenas, which the runner owns."""

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from tokenloop.export.pte.block_cache import BlockCache
from tokenloop.export.pte.running_state import RunningState

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager


def state_places(
    manager: "ExecutorchProgramManager", model: nn.Module,
    caches: Mapping[int, BlockCache | RunningState] | None,
) -> list[dict]:  # fmt: skip
    """For each tensor of the manifest's state the memories that it lies in, in the order of its
    slots: the tensor's name (`of`), the `arena`, `offset` in bytes, and a view of the memory in
    `shape` [B, S, ...] and `stride`, in elements.

    `caches` has what the program has in place of the network's own caches, by layer.
    """
    planned = _planned(manager)
    places = []

    def add(of: str, memory: str, shape: list[int], stride: list[int], spare: int = 0) -> None:
        arena, offset, elements = planned[memory]
        assert elements == prod(shape) + spare, f"{memory} has another size than {of}"
        entry = {"of": of, "arena": arena, "offset": offset, "shape": shape, "stride": stride}
        places.append(entry)

    for i, layer in enumerate(model.model.layers):
        for name, buffer in layer.named_buffers():
            if ".cache." not in name:
                continue
            kind = name.split(".cache.")[-1]
            of = f"caches.{i}.{kind}"
            if caches is None:
                shape = list(buffer.shape)
                add(of, f"network.model.layers.{i}.{name}", shape, list(buffer.stride()))
                continue
            for memory, *place in caches[i].pieces(kind):
                add(of, f"caches.{i}.{memory}", *place)
    return places


def _planned(manager: "ExecutorchProgramManager") -> dict[str, tuple[int, int, int]]:
    """Arena, offset in bytes and elements, float32, of each buffer that a method writes. All
    methods have it there."""
    found: dict[str, tuple[int, int, int]] = {}
    for method in sorted(manager.methods):
        program = manager.exported_program(method)
        names = program.graph_signature.inputs_to_buffers
        written = set(program.graph_signature.buffers_to_mutate.values())
        for node in program.graph.nodes:
            name = names.get(node.name) if node.op == "placeholder" else None
            if name not in written:
                continue
            spec = node.meta["spec"]
            # Arena 0 of the program's own count is not the runner's.
            place = spec.mem_id - 1, spec.mem_offset, prod(spec.shape)
            assert spec.dtype == torch.float32, f"{name} is {spec.dtype}"
            assert found.setdefault(name, place) == place, f"{method} has {name} elsewhere"
    return found
