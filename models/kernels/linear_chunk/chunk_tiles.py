"""How a linear layer over a chunk is cut, by shape: constants, so that an export repeats.

None of it changes a result's bits.
"""

import math
from typing import NamedTuple

import torch

PROCESSORS = 132  # of an H100 or H200
# Programs that ask for weights while they wait for the kernels ahead: those that can begin by then.
FIRST = 2 * PROCESSORS


class ChunkTiles(NamedTuple):
    """Tokens, outputs and inputs of a tile, warps, and stages of the pipeline.

    block_n counts the outputs of a gated layer; its tile has as many rows of gates and of ups.
    With `descriptors` a program stays for all its tiles, of which it stores `parts` one after the
    other; `flatten` makes one loop of its tiles and their inputs, and with `specialize` some warps
    only copy. A tile has `extra` outputs beside its block_n; one by descriptors only if not gated.
    """

    block_t: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False
    parts: int = 1
    flatten: bool = True
    specialize: bool = False
    group: int = 8
    extra: int = 0


class WordTiles(NamedTuple):
    """Tokens and outputs of a tile of integer weights, which goes by spans, warps, and stages."""

    block_t: int
    block_n: int
    warps: int = 4
    stages: int = 3


# With so many tokens or fewer a layer makes bfloat16 of its integer weights itself.
IN_TILE = 256

FLOAT32 = ChunkTiles(64, 64, 32, 4, 2)


class Shape(NamedTuple):
    """Tokens and rows of weights of a tile, rows beside those, inputs of a step, and warps."""

    block_t: int
    rows: int
    extra: int
    block_k: int
    warps: int


SHAPES = tuple(
    Shape(*shape)
    for shape in (
        (128, 256, 0, 64, 8), (128, 128, 32, 64, 8), (128, 128, 0, 64, 4), (128, 64, 0, 64, 4),
        (128, 32, 0, 128, 4), (64, 256, 0, 64, 4), (64, 128, 0, 64, 4), (64, 64, 0, 128, 4),
        (64, 32, 0, 128, 4),
    )
)  # fmt: skip
# A model of the time that a layer takes, to choose by. Its constants are fitted to 212 figures of
# an H200, which they give to 5%: ways that are within a third of the fastest, for 64, 128, 1024 and
# 8192 tokens. What it chose was the fastest or within 4.3% of that, for each of the products.
#
# A processor multiplies and reads from L2 so much in a microsecond, and all read so much from
# memory. Times of what goes on at once are added as powers, of these exponents.
FLOP, OWN_BYTES, BYTES = 7.05e6, 117e3, 4.04e6
OWN_POWER, MEMORY_POWER = 2.65, 3.2
# Microseconds until a program multiplies, and between tiles, by how a kernel copies.
POINTERS, FLAT, NESTED = (1.1, 3.8), (5.0, 0.1), (5.0, 2.5)
# Processors without work leave power to the others: so much of their time is not lost.
IDLE = 0.2
# What the second, narrow accumulator costs, where a kernel copies by descriptors and by pointers.
# It helps where 160 outputs fill the processors once.
BESIDE, BESIDE_POINTERS = 1.3, 1.1
# Shared memory of a program but for barriers; copies by descriptors keep some of it for results.
SHARED, POINTERS_SHARED = 226 * 1024, 200 * 1024


def chunk_tiles(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, gated: bool = False,
    out_float32: bool = False,
) -> ChunkTiles:  # fmt: skip
    """For up to `tokens` tokens; a gated layer has twice `outputs` rows of weights."""
    if dtype == torch.float32:
        return FLOAT32
    halves = 2 if gated else 1
    # Copies by descriptors need rows of whole 16 bytes, and begin later.
    aligned = inputs % 8 == 0 and outputs % 8 == 0

    def by_descriptors(shape: Shape) -> bool:
        return aligned and (tokens > 128 or shape.extra > 0 and not gated)

    def microseconds(shape: Shape) -> float:
        rows = shape.rows + shape.extra
        tiles = -(-tokens // shape.block_t) * -(-outputs * halves // rows)
        (begin, between), beside = POINTERS, BESIDE_POINTERS
        if by_descriptors(shape):
            begin, between = NESTED if gated or shape.extra else FLAT
            beside = BESIDE
        multiply = 2.0 * shape.block_t * rows * inputs / FLOP
        read = 2.0 * inputs * (shape.block_t + rows) / OWN_BYTES
        own = _together(multiply, read, OWN_POWER) * (beside if shape.extra else 1.0)
        busy = tiles / PROCESSORS
        rounds = math.ceil(busy)
        several = (rounds - IDLE * (rounds - busy)) * own + rounds * between
        memory = 2.0 * inputs * outputs * halves / BYTES
        return begin + _together(several, memory, MEMORY_POWER)

    shape = min(
        (
            shape
            for shape in SHAPES
            if shape.block_t <= max(tokens, 64)
            and (not shape.extra or gated != by_descriptors(shape))
        ),
        key=microseconds,
    )
    block_t, rows, extra, block_k, warps = shape
    step = (block_t + rows + extra) * block_k * 2
    block = block_t, rows // halves, block_k
    if not by_descriptors(shape):
        stages = min(7 if block_k == 128 else 8, POINTERS_SHARED // step)
        warps = 8 if block_t == 128 and rows >= 128 else warps
        return ChunkTiles(*block, warps, stages, extra=extra // halves)
    parts = 2 if rows == 256 and not gated else 1
    kept = block_t * (rows // halves + extra) // parts * (4 if out_float32 else 2)
    stages = min(5 if rows > 64 else 7, (SHARED - kept) // step)
    # One loop of tiles and inputs is slower where its end has an activation, or two accumulators.
    flatten = not gated and not extra
    return ChunkTiles(*block, warps, stages, True, parts, flatten=flatten, extra=extra)


def _together(a: float, b: float, power: float) -> float:
    return (a**power + b**power) ** (1 / power)


def word_tiles(tokens: int, outputs: int, bits: int, gated: bool = False) -> WordTiles:
    """For up to `tokens` tokens and words of 4 or 8 bits."""
    block_t = 64 if tokens <= 64 else 128
    # 64 outputs are the least that the tensor cores take.
    return WordTiles(block_t, 64, 4, 3 if block_t == 64 or bits == 8 else 2)
