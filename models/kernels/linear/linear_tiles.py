"""How the work of a linear layer is cut, by shape: constants, so that an export repeats.

What depends on the number of rows does not change a result: whether the norm is a launch of its
own, and the tiles of integer weights.
"""

from typing import NamedTuple

import torch

# With more rows than this each program of a linear layer would norm too much: it is done once.
SHARED_NORM = 4

# The columns of the smallest product of matrices.
FEW_ROWS = 8

PROCESSORS = 132  # of an H100 or H200

# Programs that fetch weights while they wait for the kernels ahead: those that can begin by then.
AHEAD = 2 * PROCESSORS

# Layers of so many weights or more have not been measured with few parts and long pipelines.
LARGE = 2**26

# With fewer products than this a layer's programs leave room for more warps.
SMALL = 2**21


class LinearTiles(NamedTuple):
    """Outputs of one program, inputs of one of its steps, parts of the inputs, warps, and stages of
    the pipeline.

    With `dot` a program takes all rows by tensor cores, else one row by plain products. With `norm`
    each program of the latter norms its row itself, if a norm comes first and rows are few.
    """

    dot: bool
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    norm: bool = False


def linear_tiles(
    rows: int, outputs: int, inputs: int, bits: int, dtype: torch.dtype, gated: bool = False
) -> LinearTiles:
    """For `rows` of `inputs`, and weights of so many bits, or 0 where they are of `dtype`; a gated
    layer has twice `outputs` rows of weights."""
    if dtype == torch.float32 and not bits:
        return LinearTiles(False, 8, 1024 if inputs <= 1024 else 256, norm=inputs <= 1024)
    if not bits and inputs <= 2048 and outputs <= 8192:
        warps = 4 if outputs * inputs < SMALL else 2
        return LinearTiles(False, 4, 1024, warps=warps, norm=inputs <= 1024)
    # Layers of few outputs cut the inputs into parts, to have programs for every processor. An H100
    # and an H200 measured how many: with floating-point weights, as many as run at once. Integer
    # weights and few rows take 2 warps, and half as many outputs where a program has twice the
    # weights (gated layers, 8 bits). The number of parts must not depend on rows: their sums are
    # rounded.
    tile = 32 if bits == 8 or (bits and gated) else 64
    tiles = -(-outputs // tile)
    if bits:
        splits = 1
        while splits < 8 and tiles * splits < 400 and inputs // splits >= 1024:
            splits *= 2
        # A fourth stage of large blocks would leave shared memory for fewer programs.
        stages = 4 if bits == 8 and not gated else 3
        if rows <= FEW_ROWS:
            return LinearTiles(True, tile, 128, splits, warps=2, stages=stages)
        return LinearTiles(True, 64, 128, splits, stages=stages)
    large = outputs * inputs >= LARGE
    programs = 2 * PROCESSORS if large else PROCESSORS
    splits = max(1, min(programs // tiles, 8, inputs // 512))
    # Short blocks begin sooner; four of a gated layer leave room for two programs of 32 rows.
    if splits > 1 if large else gated:
        return LinearTiles(True, 64, 64, splits, stages=4 if gated else 6)
    # A program that has a processor to itself uses all of its memory for a long pipeline: that is
    # better than more parts, which have to be added up.
    has_processor = not large and tiles * splits <= PROCESSORS
    return LinearTiles(True, 64, 128, splits, stages=7 if has_processor else 4)
