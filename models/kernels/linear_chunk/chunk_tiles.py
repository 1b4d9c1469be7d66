"""How a linear layer over a chunk is cut, by shape: constants, so that an export repeats.

None of it changes a result's bits.
"""

from typing import NamedTuple

import torch

PROCESSORS = 132  # of an H100 or H200


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


def chunk_tiles(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, gated: bool = False
) -> ChunkTiles:
    """For up to `tokens` tokens; a gated layer has twice `outputs` rows of weights."""
    if dtype == torch.float32:
        return FLOAT32
    halves = 2 if gated else 1
    # The copies by descriptors need rows of whole 16 bytes.
    aligned = inputs % 8 == 0 and outputs % 8 == 0
    if tokens <= 128:
        # Weights are streamed once: every processor must have some. Small tiles of outputs read
        # the activations often, but from L2.
        block_t = 64 if tokens <= 64 else 128
        block_n = 128 // halves
        while block_n > 16 and -(-outputs // block_n) < PROCESSORS:
            block_n //= 2
        rows = block_t + block_n * halves
        # Whole lines of 256 bytes, and as many of them in flight as shared memory has room for.
        stages = max(3, min(8, 200 * 1024 // (rows * 256)))
        return ChunkTiles(block_t, block_n, 128, 4, stages)
    if not aligned:
        return ChunkTiles(128, 128 // halves, 64, 8, 4)
    # The large tile, unless it leaves more processors idle than the small one costs.
    large = _rounds(tokens, outputs * halves, 128, 256) * 2.0
    small = _rounds(tokens, outputs * halves, 128, 128) * 1.15
    if large <= small:
        if gated:
            return ChunkTiles(128, 128, 64, 8, 4, True)
        return ChunkTiles(128, 256, 64, 8, 4, True, parts=2)
    return ChunkTiles(128, 128 // halves, 64, 8, 4, True)


def word_tiles(tokens: int, outputs: int, bits: int, gated: bool = False) -> WordTiles:
    """For up to `tokens` tokens and words of 4 or 8 bits."""
    block_t = 64 if tokens <= 64 else 128
    # 64 outputs are the least that the tensor cores take.
    return WordTiles(block_t, 64, 4, 3 if block_t == 64 or bits == 8 else 2)


def _rounds(tokens: int, rows: int, block_t: int, block_n: int) -> int:
    """Tiles that the busiest processor has."""
    return -(-(-(-tokens // block_t) * -(-rows // block_n)) // PROCESSORS)
