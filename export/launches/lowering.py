"""A method as the launches of kernels that it comes to, and where in memory their tensors are.

torch.export traces the method to a graph of operators (models/kernels) and views. Each operator's
function is then called with tensors that have no memory, and its launches are kept. Nothing here
knows a GPU, or how a kernel is compiled.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export.graph_signature import InputKind

from tokenloop.export.errors import ExportError
from tokenloop.models.kernels.launch.launches import FUNCTIONS, Launch, kept_launches

ALIGNMENT = 256  # of tensors in the workspace, in bytes


class Pointer(NamedTuple):
    """Bytes after the beginning of some memory: the "workspace" "", "input" or "output" number i,
    or the "tensor" of a name. `dtype` and `shape` are those of the tensor that begins there."""

    memory: str
    which: int | str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Slot(NamedTuple):
    """A tensor of the workspace: its bytes, and the first and the last launch that needs it."""

    size: int
    first: int
    last: int


@dataclass
class Lowered:
    """A method: its launches, whose tensors are Pointers, its inputs and outputs, and the bytes of
    the workspace, which it can share with other methods."""

    launches: list[Launch]
    inputs: list[Pointer]
    outputs: list[Pointer]
    workspace: int


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tracer(torch.fx.Interpreter):
    """Runs a graph of operators and views, and keeps the launches."""

    def __init__(self, graph: torch.fx.GraphModule):
        super().__init__(graph)
        self.launches: list[Launch] = []
        # Where a tensor of the workspace is copied whole, it is made in the copy's place.
        self.copied: dict[int, Tensor] = {}

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if not isinstance(target, OpOverload):
            if target is not operator.getitem:
                raise ExportError(f"a CUDA method has {target}, which is no operator of tokenloop")
            return super().call_function(target, args, kwargs)
        if target.namespace == "tokenloop":
            with kept_launches() as launches:
                result = FUNCTIONS[target._schema.name](*args, **kwargs)
            self.launches += launches
            return result
        if target is torch.ops.aten.copy_.default:
            to, source = args
            if to.shape != source.shape or to.dtype != source.dtype:
                raise ExportError(f"a CUDA method copies {source.shape} to {to.shape}")
            self.copied[storage_of(source)] = to
            return to
        result = super().call_function(target, args, kwargs)
        given = {storage_of(x) for x in args if isinstance(x, Tensor)}
        results = result if isinstance(result, (tuple, list)) else [result]
        if not all(storage_of(x) in given for x in results):
            raise ExportError(f"a CUDA method has {target}, which no kernel of tokenloop does")
        return result


def names_of(tensors: Mapping[str, Tensor]) -> dict[int, tuple[str, int]]:
    """By storage, the name of the tensor that owns it, and the byte at which that begins."""
    return {
        storage_of(x): (name, x.storage_offset() * x.element_size()) for name, x in tensors.items()
    }


def lower(
    method: nn.Module, examples: list[tuple[Tensor, ...]], names: dict[int, tuple[str, int]]
) -> list[Lowered]:
    """The launches of `method` for each of the `examples`, its inputs, which may differ in sizes.

    `names` are those of `names_of` for the method's weights and state. The method is traced with
    the first of the examples. Errors: ExportError for an operation that is neither an operator nor
    a view.
    """
    # Tracing calls the operators, too, and nothing shall run.
    with kept_launches():
        program = torch.export.export(method, examples[0])
    lowered = []
    for example in examples:
        inputs = [torch.empty_like(x, device="meta") for x in example]
        given, mine = [], iter(inputs)
        for spec in program.graph_signature.input_specs:
            is_input = spec.kind == InputKind.USER_INPUT
            given.append(next(mine) if is_input else _named(method, spec.target))
        tracer = Tracer(program.graph_module)
        outputs = [x for x in tracer.run(*given) if x is not None]
        lowered.append(place(tracer.launches, inputs, outputs, names, tracer.copied))
    return lowered


def _named(method: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    return getattr(method.get_submodule(owner), name)


def place(
    launches: list[Launch], inputs: list[Tensor], outputs: list[Tensor],
    names: dict[int, tuple[str, int]], copied: dict[int, Tensor],
) -> Lowered:  # fmt: skip
    """Give every tensor of the launches a place."""
    of_inputs = {storage_of(x): ("input", i) for i, x in enumerate(inputs)}
    slots: dict[int, Slot] = {}

    def resolved(x: Tensor) -> Tensor:
        to = copied.get(storage_of(x))
        if to is None:
            return x
        if not (x.is_contiguous() and to.is_contiguous() and x.numel() == to.numel()):
            raise ExportError("a CUDA method copies a part of a tensor")
        return to

    def need(x: Tensor, first: int, last: int) -> None:
        key = storage_of(resolved(x))
        if key in of_inputs or key in names:
            return
        size = x.untyped_storage().nbytes()
        old = slots.get(key, Slot(size, first, last))
        slots[key] = Slot(size, min(first, old.first), max(last, old.last))

    if any(storage_of(x) in of_inputs or x.storage_offset() for x in outputs):
        raise ExportError("a CUDA method gives an input, or a part of a tensor")
    for i, launch in enumerate(launches):
        for value in (*launch.arguments, *launch.named.values()):
            if isinstance(value, Tensor):
                need(value, i, i)
    own = of_inputs | {storage_of(x): ("output", i) for i, x in enumerate(outputs)}
    for key in own.keys() & slots.keys():
        del slots[key]
    offsets, workspace = plan(slots.values())
    offset_of = dict(zip(slots, offsets))

    def pointer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = resolved(x)
        key, start = storage_of(x), x.storage_offset() * x.element_size()
        layout = x.dtype, tuple(x.shape), tuple(x.stride())
        if key in own:
            return Pointer(*own[key], start, *layout)
        if key in names:
            name, begin = names[key]
            return Pointer("tensor", name, start - begin, *layout)
        return Pointer("workspace", "", offset_of[key] + start, *layout)

    placed = [
        Launch(
            launch.kernel, launch.grid, tuple(map(pointer, launch.arguments)),
            {name: pointer(value) for name, value in launch.named.items()},
        )
        for launch in launches
    ]  # fmt: skip
    return Lowered(placed, [*map(pointer, inputs)], [*map(pointer, outputs)], workspace)


def plan(slots: Iterable[Slot]) -> tuple[list[int], int]:
    """An offset for each slot, and the bytes in all. Slots that are needed at the same time do not
    overlap. The largest are placed first, each as low as it can be."""
    slots = list(slots)
    offsets, placed, total = [0] * len(slots), [], 0
    for i in sorted(range(len(slots)), key=lambda i: (-slots[i].size, i)):
        slot, offset = slots[i], 0
        for begin, end in sorted(
            (offsets[j], offsets[j] + slots[j].size)
            for j in placed
            if slots[j].first <= slot.last and slot.first <= slots[j].last
        ):
            if offset + slot.size <= begin:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[i] = offset
        placed.append(i)
        total = max(total, offset + slot.size)
    return offsets, -(-total // ALIGNMENT) * ALIGNMENT
