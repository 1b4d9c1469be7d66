"""How the work of a chunk's attention is cut, by shape: constants, so that an export repeats.

No cut depends on the number of tokens or sequences: results would.
"""

from typing import NamedTuple

import torch

PROCESSORS = 132  # of an H100 or H200
# Elements of the keys that programs at work together read: with values 16 MB in bfloat16.
TOGETHER = 2**22


class ChunkTiles(NamedTuple):
    """Queries and keys of a block, warps, stages of the pipeline, whether keys and values come
    through tensor descriptors, and parts of a head's results that are programs of their own."""

    block_m: int
    block_n: int
    warps: int = 8
    stages: int = 2
    tma: bool = True
    split: int = 1


class GluonTiles(NamedTuple):
    """Warpgroups that take 64 queries each, keys of a block, and stages of keys and of values. The
    keys of a head of 512 have one stage whatever the values have."""

    consumers: int = 2
    block_n: int = 128
    stages: int = 2


def parts_of_head(head_dim: int) -> int:
    """How many programs of the Gluon kernels share a head's results: a warpgroup's registers hold
    64 x 256 of them."""
    return max(1, head_dim // 256)


def gluon_tiles(
    tokens: int, sequences: int, heads: int, head_dim: int, slots: int, dtype: torch.dtype,
    is_ring: bool,
) -> GluonTiles | None:  # fmt: skip
    """How a Gluon kernel cuts a chunk; None where it is the Triton kernel's.

    That depends on the layer alone, since the two kernels' results differ in their last bits. The
    keys of a block do, too.
    """
    if dtype != torch.bfloat16 or head_dim not in ((256,) if is_ring else (128, 256, 512)):
        return None
    if is_ring and slots % 64:
        return None
    # One warpgroup a program, where else processors would idle, or where sequences have one token.
    programs = heads * parts_of_head(head_dim) * -(-tokens // 64)
    alone = tokens <= sequences or programs <= PROCESSORS
    stages = 2
    if head_dim == 512 and not alone:
        stages = 1
    elif is_ring and alone:
        stages = 3
    return GluonTiles(1 if alone else 2, 128 if head_dim == 128 else 64, stages)


def chunk_tiles(slots: int, head_dim: int, dtype: torch.dtype, is_ring: bool) -> ChunkTiles:
    """For caches of `slots` a row and heads of head_dim."""
    if dtype == torch.float32:
        return ChunkTiles(16 if head_dim <= 256 else 8, 16, warps=8, stages=1, tma=False)
    if head_dim <= 128:
        tiles = ChunkTiles(128, 64 if is_ring else 128, warps=8, stages=3)
    elif head_dim <= 256:
        tiles = ChunkTiles(128, 64, warps=8, stages=2)
    else:
        tiles = ChunkTiles(128, 32, warps=8, stages=2, split=head_dim // 256)
    # A block of a ring must not wrap around.
    return tiles._replace(tma=not (is_ring and slots % tiles.block_n))


def heads_together(tokens: int, kv_heads: int, head_dim: int, is_ring: bool) -> int:
    """Of how many key/value heads all blocks of queries run before those of others.

    With all heads together the longest programs come first, which leaves the least to wait for in
    the end. But a long chunk's keys and values of them all would not stay in L2. A ring's do.
    """
    most = kv_heads if is_ring else max(1, TOGETHER // (tokens * head_dim))
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)


def rotated_tokens(head_dim: int) -> int:
    """Tokens whose queries and keys one program rotates."""
    return min(64, max(4, 2048 // head_dim))
