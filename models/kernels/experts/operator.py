"""Routed experts on CUDA: only those that are chosen are read.

route           1 launch
experts         2: gate and up with the activation, then down with the weighted sum
route_experts   the same, and `route` for many rows
experts_chunk   6: count, cut and place the tokens' choices by expert; gate and up; down; the
                weighted sum. 8 for many tokens and float4, which becomes bfloat16 first
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.experts import packing
from tokenloop.models.kernels.experts.chunk_tiles import ChunkTiles, chunk_tiles
from tokenloop.models.kernels.experts.step_tiles import down_tiles, gate_up_tiles
from tokenloop.models.kernels.experts.triton import down_kernel, gate_up_kernel, route_kernel
from tokenloop.models.kernels.experts.triton_chunk import (
    count_pairs_kernel,
    cut_blocks_kernel,
    dequantize_float4_kernel,
    down_chunk_kernel,
    gate_up_chunk_kernel,
    place_pairs_kernel,
    weigh_kernel,
)
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator

# With more rows than this each program of the first products would route too much.
FEW_ROWS = 4

# Pairs of a token and a choice that one program counts, and that one places.
COUNTED, PLACED = 1024, 256
# Of what each expert gives for a token, until it is weighed and added to the others'.
PARTIAL_DTYPE = torch.float32
# Rows and inputs of which one program makes bfloat16.
DENSE_N, DENSE_K = 64, 128


@operator("route")
def route(
    scores: Tensor, experts: int, count: int, normalized: bool, tokens: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See reference.route. The scores are contiguous."""
    return _route(scores, experts, count, normalized, tokens, scales)


def _routed(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Memory for the experts that rows choose, and their weights."""
    rows, device = len(scores), scores.device
    chosen = torch.empty(rows, count, dtype=torch.int64, device=device)
    return chosen, torch.empty(rows, count, dtype=scores.dtype, device=device)


def _route(
    scores: Tensor, experts: int, count: int, normalized: bool, tokens: Tensor | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, width = scores.shape
    chosen, weights = _routed(scores, count)
    launch(route_kernel, (rows,))(
        scores, tokens, scales, chosen, weights, experts, width, C=count, NORMALIZED=normalized,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_C=triton.next_power_of_2(count),
        num_warps=1,
    )  # fmt: skip
    return chosen, weights


@operator("experts")
def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See reference.experts. Raises ValueError for a tensor that is not contiguous, and for tables
    whose dtype does not fit."""
    tables = Tables(gate_up, down, gate_up_bias, down_bias, activation, gate_up_scale, down_scale)
    return _run(x, (chosen, weights), None, tables, (shared, shared_down, scores))


@operator("route_experts")
def route_experts(
    x: Tensor, scores: Tensor, count: int, normalized: bool, scales: Tensor | None,
    gate_up: Tensor, down: Tensor, shared: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See reference.route_experts. Up to FEW_ROWS rows are routed by the first products, and more
    by a launch of their own. Raises ValueError as `experts`."""
    tables = Tables(gate_up, down, gate_up_bias, down_bias, activation, gate_up_scale, down_scale)
    beside = shared, shared_down, None if shared is None else scores
    if len(x) > FEW_ROWS:
        routed = _route(scores, len(down), count, normalized, None, scales)
        return _run(x, routed, None, tables, beside)
    return _run(x, _routed(scores, count), Routing(scores, scales, normalized), tables, beside)


class Tables(NamedTuple):
    """The experts' matrices, and what belongs to them."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    gate_up_scale: Tensor | None
    down_scale: Tensor | None


class Routing(NamedTuple):
    """What rows choose their experts by: `route`'s scores, scales, and whether weights add up to
    1."""

    scores: Tensor
    scales: Tensor | None
    normalized: bool


def _run(
    x: Tensor, routed: tuple[Tensor, Tensor], routing: Routing | None, tables: Tables,
    beside: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """Both launches. With `routing` the first fills `routed`. `beside` are what all rows have, or
    the inputs of the matrix that makes it, that matrix, and the scores that weigh it."""
    (chosen, weights), (shared, shared_down, scores) = routed, beside
    choice = routing or Routing(None, None, False)
    check_contiguous(
        x=x, chosen=chosen, weights=weights, shared=shared, shared_down=shared_down, scores=scores,
        choice=choice.scores,
    )  # fmt: skip
    rows, count = chosen.shape
    experts, size = tables.down.shape[:2]
    inner = tables.gate_up.shape[1] // 2
    groups = _groups(
        x, inner, (tables.gate_up, tables.gate_up_scale), (tables.down, tables.down_scale)
    )
    h = torch.empty(rows, count, inner, dtype=x.dtype, device=x.device)
    cut = gate_up_tiles(size, groups[0])
    launch(gate_up_kernel, (triton.cdiv(inner, cut.block_n), rows * count))(
        x, choice.scores, choice.scales, chosen, weights, tables.gate_up, tables.gate_up_scale,
        tables.gate_up_bias, h, inner, size, experts, _width(choice.scores),
        ACTIVATION=tables.activation, C=count, NORMALIZED=choice.normalized, GROUP=groups[0],
        BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_C=triton.next_power_of_2(count), num_warps=cut.warps,
    )  # fmt: skip
    y = torch.empty_like(x)
    hidden, inputs = None, 0
    if shared_down is not None:
        shared, hidden, inputs = None, shared, shared_down.shape[1]
    cut = down_tiles(count, inner, groups[1])
    launch(down_kernel, (triton.cdiv(size, cut.block_n), rows))(
        h, chosen, weights, tables.down, tables.down_scale, tables.down_bias, shared, hidden,
        shared_down, scores, y, size, inner, _width(scores), inputs,
        C=count, GROUP=groups[1], AHEAD=shared_down is not None and inputs % 8 == 0,
        BLOCK_C=triton.next_power_of_2(count), BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        BLOCK_S=min(512, triton.next_power_of_2(inputs or 1)), num_warps=cut.warps,
    )  # fmt: skip
    return y


def _width(scores: Tensor | None) -> int:
    return 0 if scores is None else scores.shape[1]


def _groups(
    x: Tensor, inner: int, gate_up: tuple[Tensor, Tensor | None], down: tuple[Tensor, Tensor | None]
) -> tuple[int, int]:
    """`_group` of both tables, each with its scales."""
    return _group(x, x.shape[1], *gate_up), _group(x, inner, *down)


def _group(x: Tensor, inputs: int, table: Tensor, scale: Tensor | None) -> int:
    """How many inputs of a row share a scale, or 0 for none or all of them.

    Errors: ValueError for a table that is neither of x's dtype without scales, nor in a layout of
    packing.py where x is bfloat16.
    """
    if scale is None and table.dtype == x.dtype:
        return 0
    rows, group = table.shape[:2], None
    if x.dtype == torch.bfloat16 and scale is not None:
        if table.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32:
            if scale.shape == rows:
                group = 0
            else:
                sizes = (size for size in packing.GROUP_SIZES if inputs % size == 0)
                group = next((n for n in sizes if scale.shape == (*rows, inputs // n)), None)
        if (table.dtype, scale.dtype) == (torch.int16, torch.uint8):
            fits = inputs % packing.GROUP == 0 and table.shape[2] * packing.FIELDS == inputs
            if fits and scale.shape == (*rows, inputs // packing.GROUP):
                group = packing.GROUP
    if group is None:
        shape = None if scale is None else tuple(scale.shape)
        raise ValueError(
            f"activations are {x.dtype}, experts {table.dtype} of shape {tuple(table.shape)} "
            f"with scales of shape {shape}"
        )
    check_contiguous(table=table, scale=scale)
    return group


@operator("experts_chunk")
def experts_chunk(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, count: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See reference.experts_chunk. Raises ValueError as `experts`."""
    given = gate_up_bias, down_bias, activation, gate_up_scale, down_scale
    return launch_experts_chunk(x, chosen, weights, gate_up, down, count, shared, scores, *given)


def _dense(table: Tensor, scale: Tensor | None, group: int) -> tuple[Tensor, Tensor | None, int]:
    """Table, scales and group of the same matrices, of which float4 are bfloat16 now."""
    if table.dtype != torch.int16:
        return table, scale, group
    experts, outputs, words = table.shape
    inputs = words * packing.FIELDS
    out = torch.empty(experts, outputs, inputs, dtype=torch.bfloat16, device=table.device)
    rows = experts * outputs
    launch(dequantize_float4_kernel, (triton.cdiv(rows, DENSE_N), triton.cdiv(inputs, DENSE_K)))(
        table, scale, out, rows, inputs, BLOCK_N=DENSE_N, BLOCK_K=DENSE_K,
        EVEN=inputs % DENSE_K == 0, num_warps=4,
    )  # fmt: skip
    return out, None, 0


def launch_experts_chunk(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, count: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
    tiles: ChunkTiles | None = None,
) -> Tensor:  # fmt: skip
    """experts_chunk, cut as `tiles` say."""
    check_contiguous(
        x=x, chosen=chosen, weights=weights, gate_up=gate_up, down=down, shared=shared,
        scores=scores,
    )  # fmt: skip
    experts, size, inner = *down.shape[:2], gate_up.shape[1] // 2
    groups = _groups(x, inner, (gate_up, gate_up_scale), (down, down_scale))
    tokens, choices = chosen.shape
    pairs = tokens * choices
    tiles = tiles or chunk_tiles(pairs, experts, size, inner, x.dtype, max(groups))
    most_blocks = triton.cdiv(pairs, tiles.block_m) + experts

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    parts, begins = empty(triton.cdiv(pairs, COUNTED), experts), empty(experts)
    slots, blocks, used = empty(pairs), empty(most_blocks, 3), empty(1)
    block_e = triton.next_power_of_2(experts)
    launch(count_pairs_kernel, (parts.shape[0],))(
        chosen, count, parts, experts, C=choices, BLOCK_P=COUNTED, BLOCK_E=block_e, num_warps=8
    )
    launch(cut_blocks_kernel, (1,))(
        parts, count, begins, blocks, used, experts,
        C=choices, BLOCK_M=tiles.block_m, BLOCK_P=COUNTED, BLOCK_E=block_e, PARTS=16, num_warps=8,
    )  # fmt: skip
    launch(place_pairs_kernel, (triton.cdiv(pairs, PLACED),))(
        chosen, count, begins, slots, C=choices, BLOCK_P=PLACED, num_warps=4
    )
    h, given = empty(pairs, inner, dtype=x.dtype), empty(pairs, size, dtype=PARTIAL_DTYPE)
    sorted_pairs = slots, blocks, used
    cut = tiles.gate_up
    table = (gate_up, gate_up_scale, groups[0])
    table, scale, group = _dense(*table) if tiles.dense else table
    launch(gate_up_chunk_kernel, (triton.cdiv(inner, cut.block_n) * most_blocks,))(
        x, *sorted_pairs, table, scale, gate_up_bias, h, inner, size,
        ACTIVATION=activation, C=choices, GROUP=group,
        BLOCK_M=tiles.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        EVEN=size % cut.block_k == 0, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    cut = tiles.down
    table = (down, down_scale, groups[1])
    # The memory of the other table's floats is free by now.
    table, scale, group = _dense(*table) if tiles.dense else table
    launch(down_chunk_kernel, (triton.cdiv(size, cut.block_n) * most_blocks,))(
        h, *sorted_pairs, table, scale, down_bias, given, size, inner,
        GROUP=group, BLOCK_M=tiles.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        EVEN=inner % cut.block_k == 0, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    y = torch.empty_like(x)
    block_n = min(1024, triton.next_power_of_2(size))
    launch(weigh_kernel, (tokens, triton.cdiv(size, block_n)))(
        given, weights, count, shared, scores, y, size, _width(scores),
        C=choices, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y
