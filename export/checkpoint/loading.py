"""Loading a checkpoint's tensors into a model, after a check that every one of them fits.

Weights are finite: what has a NaN or an infinity in it is refused while it is read. Finding that
out takes a sum of each tensor: 0.05 s for 250 million weights in float32, 0.02 s in bfloat16 (one
core of the project's CPU).

Knows no architecture: the caller's `rename` says what a tensor is called in the model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tokenloop.export.checkpoint.contents import Checkpoint, Grid, NamedGrid
from tokenloop.export.errors import ExportError
from tokenloop.export.tensors_in_files import copied, empty
from tokenloop.models.layers import Rearranged, Shard, Stacked

# The values of these dtypes, spelled as in safetensors, are the weights themselves. fp8, fp4 and
# integer tensors need scales that lie elsewhere.
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")


# What a checkpoint's tensor is in a model. None is for one that is left out.
Target = str | Shard | Rearranged | Stacked | None


class Part(NamedTuple):
    """Rows of a stored tensor, or all of it for None, and the parameter or shard that they are."""

    target: str | Shard | Rearranged
    rows: slice | None


def load_weights(
    model: torch.nn.Module, checkpoint: Checkpoint, rename: Callable[[str], Target], *,
    progress: Callable[[str], None] | None = None, dtype: torch.dtype = torch.float32,
    grids: bool = False,
) -> None:  # fmt: skip
    """Replace every parameter of `model` (on the meta device) by the checkpoint's tensor.

    `rename` maps a checkpoint's name to a parameter's, to the shard of one that the tensor is, to
    those of parameters that are stacked in it, or to None for a tensor that is dropped knowingly.
    Several modules may share a parameter (a tied head): it needs one tensor, under any of its
    names, and stays shared. It may have a tensor under each name if they are equal. Buffers are
    left alone. `progress` is called with each tensor's name before it is read. With `grids` a
    linear layer whose weight lies on a grid, and is no shard, has a NamedGrid as `grid`. A module
    with matrices of experts, all of which lie on grids of one kind, has `grids` of them, by the
    parameters' names.

    Errors: ExportError before any data is read, for a parameter without a tensor or without all of
    its shards, a tensor without a parameter, a wrong shape, two tensors under one name, or a dtype
    that is not a plain float. ExportError also for tensors of one parameter that differ, and for
    one with a value that is not finite in `dtype`.
    """
    owners: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name))
    parameters, targets = check_fit(model, checkpoint, rename)
    loaded: dict[torch.nn.Parameter, tuple[str, torch.Tensor]] = {}
    on_grid: dict[torch.nn.Parameter, NamedGrid | None] = {}
    pieces: dict[torch.nn.Parameter, list[tuple[Part, NamedGrid | None]]] = {}
    for name, parts in targets.items():
        if not parts:
            continue
        if progress is not None:
            progress(name)
        try:
            tensor = checkpoint.stored[name].read()
        except OSError as error:
            raise ExportError(
                f"{checkpoint.path}: {name} cannot be read: {error.strerror}"
            ) from error
        if tensor.dtype != dtype:
            tensor = copied(tensor, dtype)
        _check_finite(checkpoint, name, tensor)
        for target, rows in parts:
            parameter = parameters[_parameter_name(target)]
            if grids and parameter.ndim == 3:
                read_grid = checkpoint.stored[name].grid
                grid = None if read_grid is None else _grid_of(name, read_grid(), None)
                pieces.setdefault(parameter, []).append((Part(target, rows), grid))
            values = tensor if rows is None else tensor[rows]
            if isinstance(target, Rearranged):
                values = target.of(values)
            if isinstance(target, Shard):
                if parameter not in loaded:
                    loaded[parameter] = name, empty(parameter.shape, dtype)
                target.of(loaded[parameter][1]).copy_(values)
            elif parameter not in loaded:
                # A part would keep the memory of the whole.
                loaded[parameter] = name, values if values is tensor else copied(values)
                read_grid = checkpoint.stored[name].grid
                if grids and parameter.ndim < 3 and read_grid is not None:
                    on_grid[parameter] = _grid_of(name, read_grid(), rows)
            elif not torch.equal(loaded[parameter][1], values):
                raise ExportError(
                    f"{checkpoint.path}: {loaded[parameter][0]} and {name} differ, and the model's "
                    "config ties them"
                )
    for parameter, (_, tensor) in loaded.items():
        weight = torch.nn.Parameter(tensor, requires_grad=False)
        grid = on_grid.get(parameter)
        for module, attribute in owners[parameter]:
            setattr(module, attribute, weight)
            if grid is not None and isinstance(module, torch.nn.Linear):
                module.grid = grid
    for parameter, found in pieces.items():
        for module, attribute in owners[parameter]:
            if grid := _grid_of_experts(parameter.shape, found):
                module.grids = {**getattr(module, "grids", {}), attribute: grid}


def _grid_of_experts(
    shape: tuple[int, ...], pieces: list[tuple[Part, NamedGrid | None]]
) -> NamedGrid | None:
    """The grid of matrices [E, N, K], which consist of those pieces. None where one lies on none,
    or they are of several kinds."""
    grids = [found.grid for _, found in pieces if found is not None]
    kinds = {grid._replace(group_size=0, scales=None) for grid in grids}
    # Those of float4 lie as their weight does, which is transposed.
    fit = all(
        part.rows is None and grid.is_float4 == getattr(part.target, "transposed", False)
        for (part, _), grid in zip(pieces, grids)
    )
    if len(grids) < len(pieces) or len(kinds) > 1 or not fit:
        return None
    size = math.gcd(*(grid.group_size for grid in grids))

    def scales() -> torch.Tensor:
        table = torch.empty(*shape[:2], shape[2] // size)
        for (part, _), grid in zip(pieces, grids):
            each, target = grid.scales(), part.target
            if isinstance(target, Rearranged):
                each = target.of(each)
            place = target.of(table) if isinstance(target, Shard) else table
            place.copy_(each.repeat_interleave(grid.group_size // size, -1))
        return table

    return NamedGrid(pieces[0][1].name, grids[0]._replace(group_size=size, scales=scales))


def _grid_of(name: str, grid: Grid | None, rows: slice | None) -> NamedGrid | None:
    """The grid of some rows of a tensor, or of all."""
    if grid is None or rows is None:
        return grid and NamedGrid(name, grid)
    return NamedGrid(name, grid).rows(torch.arange(rows.start, rows.stop))


def _names(target: Target) -> set[str]:
    """Those of the parameters that a tensor is, or is a part of."""
    if target is None:
        return set()
    return set(target.names) if isinstance(target, Stacked) else {_parameter_name(target)}


def _parameter_name(target: str | Shard | Rearranged) -> str:
    return target if isinstance(target, str) else target.name


def _check_finite(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    # One pass without temporaries: no sum of a NaN or an infinity is finite. The sum of finite
    # values may be infinite, too.
    if math.isfinite(tensor.sum()):
        return
    wrong = (~tensor.isfinite()).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ExportError(
            f"{checkpoint.path}: {name} has {len(wrong)} values that are not finite in "
            f"{str(tensor.dtype).removeprefix('torch.')}, {tensor[at].item()} at {list(at)} first; "
            "a weight is a finite number"
        )


def check_fit(
    model: torch.nn.Module, checkpoint: Checkpoint, rename: Callable[[str], Target]
) -> tuple[dict[str, torch.nn.Parameter], dict[str, list[Part]]]:
    """Compare the names, shapes and dtypes of all tensors with the model's. No data is read.

    Returns the model's parameters by name, and the parts of each tensor, of which one that is left
    out has none. Errors: those of `load_weights` that need no data.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = {
        name: _parts(checkpoint, name, rename(name), parameters) for name in checkpoint.stored
    }
    _check_targets(checkpoint, parameters, targets)
    return parameters, targets


def _parts(
    checkpoint: Checkpoint, name: str, target: Target, parameters: dict[str, torch.nn.Parameter]
) -> list[Part]:
    """The parts of the tensor `name`. Errors: ExportError for stacked parameters that the model
    does not have, and for rows that are not as many as theirs."""
    if checkpoint.stored[name].is_nothing and not _names(target) & parameters.keys():
        return []
    if not isinstance(target, Stacked):
        return [] if target is None else [Part(target, None)]
    parts, end = [], 0
    for each in target.names:
        if each not in parameters:
            raise ExportError(
                f"{checkpoint.path}: the model has no place for the tensor {name} (as {each})"
            )
        begin, end = end, end + len(parameters[each])
        parts.append(Part(each, slice(begin, end)))
    shape = checkpoint.stored[name].shape
    if shape[:1] != (end,):
        rows = " + ".join(str(part.rows.stop - part.rows.start) for part in parts)
        raise ExportError(
            f"{checkpoint.path}: {name} has the shape {shape}, the model needs {rows} = {end} rows"
        )
    return parts


def _check_targets(
    checkpoint: Checkpoint, parameters: dict[str, torch.nn.Parameter],
    targets: dict[str, list[Part]],
) -> None:  # fmt: skip
    taken: dict[str | Shard, str] = {}
    elements: dict[torch.nn.Parameter, int] = {}
    sharded: set[torch.nn.Parameter] = set()
    for name, target, rows in [(name, *part) for name, parts in targets.items() for part in parts]:
        tensor = checkpoint.stored[name]
        shape = tensor.shape
        if rows is not None:
            shape = rows.stop - rows.start, *shape[1:]
        if _parameter_name(target) not in parameters:
            raise ExportError(
                f"{checkpoint.path}: the model has no place for the tensor {name} "
                f"(as {_parameter_name(target)})"
            )
        parameter = place = parameters[_parameter_name(target)]
        if isinstance(target, Shard):
            try:
                place = target.of(parameter)
            except IndexError as error:
                raise ExportError(
                    f"{checkpoint.path}: {name} is number {target.entry} of "
                    f"{len(parameter)} in the model"
                ) from error
        if target in taken:
            raise ExportError(
                f"{checkpoint.path}: {taken[target]} and {name} are both "
                f"{_parameter_name(target)} in the model; one of them is right"
            )
        taken[target] = name
        elements[parameter] = elements.get(parameter, 0) + place.numel()
        if isinstance(target, Shard):
            sharded.add(parameter)
        if parameter in sharded and elements[parameter] > parameter.numel():
            raise ExportError(
                f"{checkpoint.path}: with {name} there is more than one tensor for a part of "
                f"{_parameter_name(target)}; one of them is right"
            )
        needed = tuple(place.shape)
        if isinstance(target, Rearranged):
            needed = target.stored_shape(needed)
        if shape != needed:
            raise ExportError(
                f"{checkpoint.path}: {name} has the shape {shape}, the model needs {needed}"
            )
        if tensor.dtype not in PLAIN_FLOATS:
            raise ExportError(
                f"{checkpoint.path}: {name} has the dtype {tensor.dtype}; "
                f"{', '.join(PLAIN_FLOATS)} can be loaded"
            )
    missing = [
        name
        for name, parameter in parameters.items()
        if elements.get(parameter, 0) < parameter.numel()
    ]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        some = parameters[missing[0]] in elements
        raise ExportError(
            f"{checkpoint.path} has {'only a part of' if some else 'no tensor for'} the parameter "
            f"{missing[0]}{more}"
        )
