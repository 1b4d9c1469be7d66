"""How the kernels' work is cut, by shape: constants, so that an export repeats.

What depends on the number of rows does not change a result: whether a norm is a launch of its own,
and the tiles of integer weights.
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

# Weights of a layer from which on few parts and long pipelines have not been measured.
LARGE = 2**26

# Parts of attention that one program adds up, and programs, if there are parts for more.
FAN = 8
PROGRAMS = 1024


class LinearTiles(NamedTuple):
    """Outputs and inputs of one program and step, parts of the inputs, warps, stages of the
    pipeline; by tensor cores or, a row a program, by plain products: then with `norm`, of few rows,
    each program norms its row itself, where a norm comes first."""

    dot: bool
    block_n: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    norm: bool = False


class AttendTiles(NamedTuple):
    """Slots of one step, most parts of them, least steps of a part, warps, stages, parts that a
    program adds up and elements that it does at once."""

    block_s: int
    splits: int
    least: int = 1
    warps: int = 4
    stages: int = 2
    fan: int = FAN
    combined: int = 8192


def linear_tiles(
    rows: int, outputs: int, inputs: int, bits: int, dtype: torch.dtype, gated: bool = False
) -> LinearTiles:
    """For `rows` of `inputs`, and weights of so many bits, 0 where they are of `dtype`; gated, they
    are twice `outputs`."""
    if dtype == torch.float32 and not bits:
        return LinearTiles(False, 8, 1024 if inputs <= 1024 else 256, norm=inputs <= 1024)
    if not bits and inputs <= 2048 and outputs <= 8192:
        return LinearTiles(False, 4, 1024, warps=2, norm=inputs <= 1024)
    # Layers of few outputs need parts of the inputs to have programs for every processor, how many
    # an H100 and an H200 measured: of floating-point weights as many as run at once. Integers of
    # few rows take 2 warps, and where a program has twice as many, of gated layers or 8 bits, half
    # as many outputs. How many parts there are must not depend on rows: their sums are rounded.
    tile = 32 if bits == 8 or (bits and gated) else 64
    tiles = -(-outputs // tile)
    if bits:
        splits = 1
        while splits < 8 and tiles * splits < 400 and inputs // splits >= 1024:
            splits *= 2
        # A fourth stage of what is large would leave shared memory for fewer programs.
        stages = 4 if bits == 8 and not gated else 3
        if rows <= FEW_ROWS:
            return LinearTiles(True, tile, 128, splits, warps=2, stages=stages)
        return LinearTiles(True, 64, 128, splits, stages=stages)
    large = outputs * inputs >= LARGE
    turn = 2 * PROCESSORS if large else PROCESSORS
    splits = max(1, min(turn // tiles, 8, inputs // 512))
    # Short blocks begin sooner; four of a gated layer leave room for two programs of 32 rows.
    if splits > 1 if large else gated:
        return LinearTiles(True, 64, 64, splits, stages=4 if gated else 6)
    # A program that has a processor to itself takes all of its memory for a long pipeline: that is
    # better than more parts, which have to be added up.
    has_processor = not large and tiles * splits <= PROCESSORS
    return LinearTiles(True, 64, 128, splits, stages=7 if has_processor else 4)


def most_splits(kv_heads: int) -> int:
    """Parts of the slots of a row and key/value head, a power of two."""
    return min(64, max(8, 128 // kv_heads))


def attend_tiles(slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> AttendTiles:
    """For caches of [slots, kv_heads, head_dim] a row."""
    splits = most_splits(kv_heads)
    if dtype == torch.float32:
        return AttendTiles(16, splits, warps=8, stages=1)
    # Short heads have few and long parts, in small steps: many rows have programs enough, which
    # are to have room beside the products before them.
    if head_dim <= 128:
        return AttendTiles(32, splits, least=8, stages=4)
    # Few heads, with many parts each, take larger steps, so that there is less to add up; so do
    # parts of long caches, of which little may be filled.
    block_s = 32 if head_dim > 256 or kv_heads > 8 else 64
    return AttendTiles(block_s, splits, least=2 if slots > 1024 else 1, stages=3)
