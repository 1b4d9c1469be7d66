"""How a program finds its tokens in a packed chunk.

A launch has count_blocks() blocks, which depends on shapes alone. Sequence i gets the blocks from
starts[i] // BLOCK + i on: as many as it has tokens for, and at times one more.
"""

import triton
import triton.language as tl


def count_blocks(tokens: int, sequences: int, block: int) -> int:
    """Blocks that hold any `sequences` of `tokens` tokens in all."""
    return tokens // block + sequences


@triton.jit
def find_tokens(starts_ptr, block, SEQUENCES: tl.constexpr, PADDED: tl.constexpr, BLOCK):
    """(sequence, its first token in the chunk, how many it has, number of the block in it).

    A block that starts past the sequence's tokens has nothing to do. PADDED is SEQUENCES or the
    next power of two.
    """
    i = tl.arange(0, PADDED)
    starts = tl.load(starts_ptr + i, mask=i < SEQUENCES, other=2**30)
    begins = starts // BLOCK + i
    sequence = tl.sum((begins <= block).to(tl.int32), 0) - 1
    start = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    return sequence, start, count, block - (start // BLOCK + sequence)
