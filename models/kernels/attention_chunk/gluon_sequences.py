"""How a program of the Gluon kernels finds its tiles in a packed chunk.

A tile is BLOCK_M queries of a sequence, and one of PARTS: a head, or half of its columns. There are
as many as the tokens need that are really there, and programs take them in rounds.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tokenloop.models.kernels.launch.gluon_launch import after_wait

# Queries of a warpgroup: the rows of its instruction.
ROWS = gl.constexpr(64)


class Work(NamedTuple):
    """A chunk's sequences, and how many tiles they make."""

    starts_ptr: gl.tensor
    rows_ptr: gl.tensor
    first_ptr: gl.tensor
    tiles: gl.tensor


@gluon.jit
def add(a, b):
    return a + b


@gluon.constexpr_function
def padded(sequences):
    """The next power of two that a warp's threads divide."""
    return max(32, 1 << (sequences - 1).bit_length())


@gluon.jit
def blocks_of_sequences(starts_ptr, rows_ptr, BLOCK_M: gl.constexpr, SEQUENCES: gl.constexpr):
    """int32 [padded(SEQUENCES)]: blocks of BLOCK_M queries that each sequence has."""
    PADDED: gl.constexpr = padded(SEQUENCES)
    # Every warp has them all, so that none waits for another.
    LAYOUT: gl.constexpr = gl.BlockedLayout([PADDED // 32], [32], [gl.num_warps()], [0])
    i = gl.arange(0, PADDED, layout=LAYOUT)
    there = i < SEQUENCES
    starts = gl.load(starts_ptr + i, mask=there, other=0)
    ends = gl.load(starts_ptr + 1 + i, mask=there, other=0)
    rows = gl.load(rows_ptr + i, mask=there, other=-1)
    return gl.where(rows >= 0, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)


@gluon.jit
def find_work(
    starts_ptr, rows_ptr, first_ptr, PARTS: gl.constexpr, BLOCK_M: gl.constexpr,
    SEQUENCES: gl.constexpr,
):  # fmt: skip
    """The Work of a chunk, once the kernels ahead are done."""
    blocks = blocks_of_sequences(starts_ptr, rows_ptr, BLOCK_M, SEQUENCES)
    return Work(starts_ptr, rows_ptr, first_ptr, after_wait(gl.sum(blocks, 0) * PARTS))


@gluon.jit
def rounds(work):
    """How many tiles this program takes: all programs' rounds go back and forth, so that each gets
    long and short ones."""
    programs = gl.num_programs(0)
    whole = work.tiles // programs
    place = gl.program_id(0)
    if whole % 2 == 1:
        place = programs - 1 - place
    return whole + (place < work.tiles - whole * programs).to(gl.int32)


@gluon.jit
def find_tile(round, work, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, SEQUENCES: gl.constexpr):
    """This program's tile of a round: (the sequence's cache row, the first query's number in the
    chunk, its position, how many queries the sequence has from it on, part, the position of the
    sequence's first query)."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if round % 2 == 1:
        place = programs - 1 - place
    tile = round * programs + place
    block = tile // PARTS
    sequence = block * 0
    if SEQUENCES > 1:
        ends = gl.associative_scan(
            blocks_of_sequences(work.starts_ptr, work.rows_ptr, BLOCK_M, SEQUENCES), 0, add
        )
        passed = ends <= block
        sequence = gl.sum(passed.to(gl.int32), 0)
        block -= gl.max(gl.where(passed, ends, 0), 0)
    start = gl.load(work.starts_ptr + sequence)
    count = gl.load(work.starts_ptr + sequence + 1) - start
    # The last queries of a sequence see the most keys: they come first.
    skipped = ((count + BLOCK_M - 1) // BLOCK_M - 1 - block) * BLOCK_M
    first = gl.load(work.first_ptr + sequence)
    row = gl.load(work.rows_ptr + sequence)
    return row, start + skipped, first + skipped, count - skipped, tile % PARTS, first
