"""How the work of attention is cut, by shape: constants, so that an export repeats."""

from typing import NamedTuple

import torch

# Parts of attention that one program adds up, and programs, if there are parts for more.
FAN = 8
PROGRAMS = 1024


class AttendTiles(NamedTuple):
    """Slots of one step, the most parts, the fewest steps of a part, warps, stages, parts that a
    program adds up, and elements that it adds at once."""

    block_s: int
    splits: int
    least: int = 1
    warps: int = 4
    stages: int = 2
    fan: int = FAN
    combined: int = 8192


def most_splits(kv_heads: int) -> int:
    """The most parts of the slots of a row and key/value head, a power of two."""
    return min(64, max(8, 128 // kv_heads))


def attend_tiles(slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> AttendTiles:
    """For caches of [slots, kv_heads, head_dim] a row."""
    splits = most_splits(kv_heads)
    if dtype == torch.float32:
        return AttendTiles(16, splits, warps=8, stages=1)
    # Short heads have few and long parts, in small steps. Many rows have programs enough, and these
    # need room beside the products before them.
    if head_dim <= 128:
        return AttendTiles(32, splits, least=8, stages=4)
    # Few heads, with many parts each, take larger steps, so that there is less to add up. So do
    # long caches, of which little may be filled.
    block_s = 32 if head_dim > 256 or kv_heads > 8 else 64
    return AttendTiles(block_s, splits, least=2 if slots > 1024 else 1, stages=3)
