"""How a linear layer over a chunk is cut, by shape: constants, so that an export repeats.

None of it changes a result's bits.
"""

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
    only copy.
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


class WordTiles(NamedTuple):
    """Tokens and outputs of a tile of integer weights, which goes by spans, warps, and stages."""

    block_t: int
    block_n: int
    warps: int = 4
    stages: int = 3


# With so many tokens or fewer a layer makes bfloat16 of its integer weights itself.
IN_TILE = 256

FLOAT32 = ChunkTiles(64, 64, 32, 4, 2)


# Tokens and rows of weights of a tile, inputs of a step, warps, and the share of the tensor cores'
# speed that such tiles reach.
SHAPES = (
    (128, 256, 64, 8, 1.0), (128, 128, 64, 4, 0.95), (128, 64, 128, 4, 0.6),
    (128, 32, 128, 4, 0.35), (64, 256, 64, 4, 0.7), (64, 128, 64, 4, 0.6), (64, 64, 128, 4, 0.5),
    (64, 32, 128, 4, 0.3),
)  # fmt: skip
# What a processor multiplies and reads from L2 in a microsecond, and what all read from L2 and from
# memory: of an H200, to choose by.
FLOP, OWN_BYTES, L2_BYTES, BYTES = 5.98e6, 75e3, 6.5e6, 4.2e6
# Shared memory of a program but for barriers; copies by descriptors keep some of it for results.
SHARED = 226 * 1024


def chunk_tiles(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, gated: bool = False,
    out_float32: bool = False,
) -> ChunkTiles:  # fmt: skip
    """For up to `tokens` tokens; a gated layer has twice `outputs` rows of weights."""
    if dtype == torch.float32:
        return FLOAT32
    halves = 2 if gated else 1
    # Copies by descriptors need rows of whole 16 bytes, and begin later.
    descriptors = inputs % 8 == 0 and outputs % 8 == 0 and tokens > 128

    def microseconds(shape: tuple) -> float:
        block_t, rows, _, _, share = shape
        tiles = _tiles(tokens, outputs * halves, block_t, rows)
        read = 2.0 * inputs * (block_t + rows)
        own = max(2.0 * block_t * rows * inputs / (FLOP * share), read / OWN_BYTES) + 1.5
        weights = 2.0 * inputs * outputs * halves
        return max(-(-tiles // PROCESSORS) * own, tiles * read / L2_BYTES, weights / BYTES)

    shape = min((s for s in SHAPES if s[0] <= max(tokens, 64)), key=microseconds)
    block_t, rows, block_k, warps, _ = shape
    parts = 2 if descriptors and rows == 256 and not gated else 1
    kept = block_t * rows // halves // parts * (4 if out_float32 else 2) if descriptors else 0
    stages = min(5 if descriptors else 8, (SHARED - kept) // ((block_t + rows) * block_k * 2))
    several = _tiles(tokens, outputs * halves, block_t, rows) > PROCESSORS
    if several and not descriptors and stages >= 6:
        # Two programs of a processor share its memory.
        stages //= 2
    # One loop of tiles and inputs is slower where its end has an activation.
    shape = block_t, rows // halves, block_k, warps, stages
    return ChunkTiles(*shape, descriptors, parts, flatten=not gated)


def _tiles(tokens: int, rows: int, block_t: int, block_n: int) -> int:
    return -(-tokens // block_t) * -(-rows // block_n)


def word_tiles(tokens: int, outputs: int, bits: int, gated: bool = False) -> WordTiles:
    """For up to `tokens` tokens and words of 4 or 8 bits."""
    block_t = 64 if tokens <= 64 else 128
    # 64 outputs are the least that the tensor cores take.
    return WordTiles(block_t, 64, 4, 3 if block_t == 64 or bits == 8 else 2)
