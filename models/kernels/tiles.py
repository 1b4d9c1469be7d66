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
    rows: int, outputs: int, inputs: int, bits: int, dtype: torch.dtype
) -> LinearTiles:
    """For `rows` of `inputs`, and weights of so many bits, 0 where they are of `dtype`."""
    if dtype == torch.float32 and not bits:
        return LinearTiles(False, 8, 1024 if inputs <= 1024 else 256, norm=inputs <= 1024)
    if not bits and inputs <= 2048 and outputs <= 8192:
        return LinearTiles(False, 4, 1024, warps=2, norm=inputs <= 1024)
    # Small layers need parts of the inputs to have programs for every processor. How many are best
    # an H200 measured: of integers more, and the most where inputs are many.
    programs = 256 if not bits else 300 if inputs <= 2**14 else 400
    splits = 1
    while splits < 8 and outputs // 64 * splits < programs and inputs // splits >= 1024:
        splits *= 2
    # Integers are unpacked into what `mma` takes: with 4 warps and more than 8 rows it would be
    # `wgmma`, which waits for each product, and may sum otherwise. A fourth stage would leave
    # shared memory for fewer programs.
    if bits and rows <= FEW_ROWS:
        return LinearTiles(True, 64, 128, splits, stages=3)
    if bits:
        return LinearTiles(True, 32, 128, splits, warps=2, stages=3)
    # Short blocks and a long pipeline begin sooner.
    if outputs * inputs < 2**24:
        return LinearTiles(True, 64, 64, splits, stages=6)
    return LinearTiles(True, 64, 128, splits)


def most_splits(kv_heads: int) -> int:
    """Parts of the slots of a row and key/value head, a power of two."""
    return min(64, max(8, 128 // kv_heads))


def attend_tiles(slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> AttendTiles:
    """For caches of [slots, kv_heads, head_dim] a row."""
    splits = most_splits(kv_heads)
    if dtype == torch.float32:
        return AttendTiles(16, splits, warps=8, stages=1)
    # Few heads, with many parts each, take larger steps, so that there is less to add up; so do
    # parts of long caches, of which little may be filled.
    block_s = 32 if head_dim > 256 or kv_heads > 8 else 64
    return AttendTiles(block_s, splits, 2 if slots > 1024 else 1, stages=3)
