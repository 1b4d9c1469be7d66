"""How products of routed experts over many tokens are cut, by shape. No result depends on it."""

from typing import NamedTuple

import torch

from tokenloop.models.kernels.experts import packing


class Tiles(NamedTuple):
    """Outputs of a program (of gate and of up as many each), inputs of one of its steps, stages of
    the pipeline, and warps."""

    block_n: int
    block_k: int
    stages: int
    warps: int


class ChunkTiles(NamedTuple):
    """The most pairs of a program, which are all of one expert, the two products' tiles, and
    whether float4 becomes bfloat16 in memory first."""

    block_m: int
    gate_up: Tiles
    down: Tiles
    dense: bool = False


# With so many pairs an expert float4 becomes bfloat16 in memory, once for all of them, and not
# again in every program.
DENSE_PAIRS = 288


def chunk_tiles(
    pairs: int, experts: int, size: int, inner: int, dtype: torch.dtype, group: int = 0
) -> ChunkTiles:
    """For so many pairs of a token and a choice, and experts' matrices of size x inner. `group`
    inputs of a row have a scale, or none or all of them with 0."""
    if group == packing.GROUP and pairs >= DENSE_PAIRS * experts:
        return chunk_tiles(pairs, experts, size, inner, dtype)._replace(dense=True)
    if group:
        # A product of float8 is of one group. Longer ones of float4 leave room for fewer programs,
        # where one has two of them.
        cut = Tiles(64, 64, 3, 4)
        block_m = next((m for m in (16, 32) if 1.4 * pairs <= m * experts), 64)
        if group != packing.GROUP:
            return ChunkTiles(block_m, cut, cut)
        return ChunkTiles(block_m, Tiles(64, 64, 4, 4), Tiles(64, 128, 3, 4))
    if dtype == torch.float32:
        # Not by the tensor cores: a thread has all inputs of its outputs.
        return ChunkTiles(32, Tiles(32, 32, 2, 4), Tiles(64, 32, 2, 4))
    if size % 16 or inner % 16:
        # Loads of single elements need the registers that larger tiles would.
        return ChunkTiles(16, Tiles(64, 32, 2, 4), Tiles(64, 32, 2, 4))
    # A block has room for more than an expert's share: where two are needed, both read the weights.
    share = pairs / experts
    few = Tiles(64, 64, 4, 4)
    for block_m in (16, 32, 64):
        if 1.4 * share <= block_m:
            return ChunkTiles(block_m, few, few)
    if size % 64 or inner % 64:
        return ChunkTiles(64, few, few)
    return ChunkTiles(128, Tiles(128, 64, 4, 8), Tiles(256, 64, 4, 8))
