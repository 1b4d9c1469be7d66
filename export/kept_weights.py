"""`--quant keep`: a checkpoint's own numbers and scales, where a backend has a layout for them.

Weights are loaded as floats like any others. A linear layer whose weight lies on a grid
(export/checkpoint/contents.py) has it as `grid`, and its integers, or float8, are found again with
the grid's own scales: exactly, which is checked. What a backend has no layout for stays floating
point. So nothing is quantized anew.

Shapes: N outputs and K inputs of a linear layer, G groups of inputs; E experts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenloop.export.checkpoint.contents import Checkpoint, Grid, NamedGrid
from tokenloop.export.errors import ExportError
from tokenloop.export.tensors_in_files import empty
from tokenloop.models.kernels.experts.packing import GROUP as FLOAT4_GROUP
from tokenloop.models.kernels.experts.packing import GROUP_SIZES, float4_codes, float4_values
from tokenloop.models.kernels.linear.packing import FLOAT8, SPAN_WORDS

BACKENDS = "xnnpack", "inductor", "launches"
# Rows of 4 bits are longer (packing.py).
SHORTEST_4_BIT_ROW = 2 * SPAN_WORDS + 1
# Weights whose integers are found at a time.
BLOCK_ELEMENTS = 1 << 24
# The parameters of routed experts that may be kept (models/moe.py).
EXPERT_TABLES = "gate_up_proj", "down_proj"
# XNNPACK's groups of 4 bits are multiples of this.
XNNPACK_GROUP = 32


class Layout(NamedTuple):
    """Integers of `bits`, 4 or 8, or float8. `group_size` neighbours in a row share a scale."""

    bits: int
    group_size: int
    is_float8: bool = False


def layout(backend: str, grids: Sequence[Grid], inputs: int) -> Layout | None:
    """The backend's layout that layers of those grids have together, or None."""
    # A scale may be repeated, so that all have groups of one size.
    size = math.gcd(*(grid.group_size for grid in grids))
    least, most = min(grid.least for grid in grids), max(grid.most for grid in grids)
    is_row = size == inputs
    # Of the kernels for CUDA. 256 is a group, too; they have been tuned for 128.
    group = next((known for known in (128, 64, 32) if size % known == 0), None)
    if any(grid.is_float8 for grid in grids):
        if backend != "launches" or not all(grid.is_float8 for grid in grids):
            return None
        found = size if is_row else group
        return Layout(8, found, is_float8=True) if found else None
    if backend not in BACKENDS or least < -128 or most > 127:
        return None
    if least >= -8 and most <= 7:
        if backend == "launches" and inputs >= SHORTEST_4_BIT_ROW and group:
            return Layout(4, group)
        if backend == "inductor" and inputs >= SHORTEST_4_BIT_ROW:
            return Layout(4, size)
        if backend == "xnnpack" and (is_row or size % XNNPACK_GROUP == 0 and _bfloat16(grids)):
            return Layout(4, size)
    if is_row or backend == "inductor":
        return Layout(8, size)
    return Layout(8, group) if backend == "launches" and group else None


def experts_layout(backend: str, grid: Grid, inputs: int) -> int | None:
    """The size of the groups in which the backend has experts' matrices on the grid, or None."""
    if backend != "launches":
        return None
    if grid.is_float4:
        return FLOAT4_GROUP if grid.group_size == FLOAT4_GROUP else None
    if not grid.is_float8 or grid.group_size == inputs:
        return inputs if grid.is_float8 else None
    return next((size for size in GROUP_SIZES if grid.group_size % size == 0), None)


def _bfloat16(grids: Iterable[Grid]) -> bool:
    """Whether all scales are numbers of bfloat16, as XNNPACK has those of groups."""
    return all(bool((s := grid.scales()).bfloat16().eq(s).all()) for grid in grids)


def can_keep(checkpoint: Checkpoint, backend: str) -> bool:
    """Whether there is a weight whose integers or float8 the backend has a layout for."""
    for tensor in checkpoint.stored.values():
        if backend not in BACKENDS or tensor.grid is None or (grid := tensor.grid()) is None:
            continue
        if len(tensor.shape) == 2 and layout(backend, [grid], tensor.shape[1]):
            return True
        if len(tensor.shape) == 3:
            inputs = tensor.shape[1 if grid.is_float4 else 2]
            if experts_layout(backend, grid, inputs):
                return True
    return False


def grid_of(linear: nn.Module) -> NamedGrid | None:
    """What load_weights gave the layer."""
    return getattr(linear, "grid", None)


def codes_and_scales(linear: nn.Module, group_size: int) -> tuple[Tensor, Tensor]:
    """The integers int8 or numbers float8 [N, K], and the scales float32 [N, K / group_size], of a
    layer with a grid.

    Errors: ExportError where they are not the weight, which no format that is read gives.
    """
    return _codes_and_scales(linear.weight.detach(), linear.grid, group_size)


def expert_codes_and_scales(
    experts: nn.Module, table: str, group_size: int
) -> tuple[Tensor, Tensor]:
    """The numbers float8, or codes uint8 of float4, [E * N, K], and the scales float32
    [E * N, K / group_size], of the experts' parameter `table`. Errors: as `codes_and_scales`."""
    name, grid = experts.grids[table]
    rows = grid._replace(scales=lambda: grid.scales().flatten(0, 1))
    weight = getattr(experts, table).detach().flatten(0, 1)
    return _codes_and_scales(weight, NamedGrid(name, rows), group_size)


def _codes_and_scales(weight: Tensor, named: NamedGrid, group_size: int) -> tuple[Tensor, Tensor]:
    name, grid = named
    scales = grid.scales().float()
    dtype = torch.uint8 if grid.is_float4 else FLOAT8 if grid.is_float8 else torch.int8
    codes = empty(weight.shape, dtype)
    for begin in range(0, len(weight), step := max(1, BLOCK_ELEMENTS // weight.shape[1])):
        rows = slice(begin, begin + step)
        some, each = weight[rows], scales[rows].repeat_interleave(grid.group_size, 1)
        # bfloat16 has 8 bits, and so tells 257 neighbours of integers apart, and all of float8.
        whole = (some.float() / each).nan_to_num_().clamp_(grid.least, grid.most)
        if grid.is_float4:
            found = float4_codes(whole)
            whole = float4_values(found)
        else:
            found = whole = whole.to(FLOAT8).float() if grid.is_float8 else whole.round_()
        if not torch.equal((whole * each).to(some.dtype), some):
            raise ExportError(
                f"{name} is no multiple of its scales by {grid.numbers} in {weight.dtype}; another "
                "--quant makes numbers of it anew"
            )
        codes[rows] = found
    return codes, scales.repeat_interleave(grid.group_size // group_size, 1)


class Keeping:
    """What of a network's linear layers one backend keeps; `lines` says it when all are done."""

    def __init__(self, backend: str, floats: torch.dtype):
        self.backend, self.floats = backend, str(floats).removeprefix("torch.")
        self.kept: list[str] = []
        self.left: list[NamedGrid] = []
        self.without = 0
        # Layers whose routed experts are kept, and those whose are not, with the grid of one.
        self.experts = self.float_experts = 0
        self.left_experts: NamedGrid | None = None

    def layout(self, linears: Sequence[nn.Module]) -> Layout | None:
        """How layers that lie together are kept, None for not at all. Counts them."""
        grids = [grid for linear in linears if (grid := grid_of(linear)) is not None]
        found = None
        if len(grids) == len(linears):
            found = layout(self.backend, [grid.grid for grid in grids], linears[0].weight.shape[1])
        if found is None:
            self.left += grids
        else:
            self.kept += [grid.name for grid in grids]
        self.without += len(linears) - len(grids)
        return found

    def expert_groups(self, experts: nn.Module) -> dict[str, int] | None:
        """In which groups the experts' matrices are kept, by their names, None for not at all.
        Counts them."""
        grids = getattr(experts, "grids", {})
        found = {
            name: experts_layout(self.backend, grid.grid, experts.get_parameter(name).shape[2])
            for name, grid in grids.items()
        }
        if len(found) == len(EXPERT_TABLES) and all(found.values()):
            self.experts += 1
            return found
        self.float_experts += 1
        left = [grids[name] for name in found if found[name] is None] or [*grids.values()]
        self.left_experts = self.left_experts or next(iter(left), None)
        return None

    def lines(self) -> list[str]:
        """One line."""
        line = f"--quant keep: {len(self.kept)} layers have the checkpoint's numbers and scales"
        if self.experts:
            line += f", and the routed experts of {self.experts} layers"
        if self.left:
            name, grid = self.left[0]
            line += (
                f"; {len(self.left)} are {self.floats}, for --backend {self.backend} has no layout "
                f"for them or not the same for all that it packs together: {name} with "
                f"{grid.numbers} in groups of {grid.group_size}, for one"
            )
        if self.without:
            line += f"; {self.without} are neither integers nor float8 in the checkpoint"
        if self.float_experts:
            line += f"; the routed experts of {self.float_experts} layers are {self.floats}"
        if self.left_experts is not None:
            name, grid = self.left_experts
            line += (
                f", for --backend {self.backend} has no layout for all their matrices: {name} with "
                f"{grid.numbers} in groups of {grid.group_size}, for one"
            )
        return [line]
