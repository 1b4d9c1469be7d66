"""What a program remembers of a row, and memory for copies of it.

A full layer's keys and values have a slot for each position, and are copied in blocks of positions.
All else is copied whole: a ring, which holds the newest positions alone, and what goes on with
every token, such as a delta net's matrices.
"""

from math import prod
from typing import Any

import numpy as np

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.program import CACHES, OF_NO_ROW, RUNNING, Program

# Up to so many runs of blocks are copied one by one.
MOST_RUNS = 4


class RowState:
    """The state of a program's rows, and a pool for each tensor of it: copies of blocks of `size`
    positions, and copies of whole rows."""

    def __init__(self, program: Program, size: int):
        """Errors: RunnerError for a program whose state cannot be read, or has tensors that this
        does not know."""
        if program.state is None:
            where = "the manifest does not say where it is: export it again"
            if program.manifest["backend"] == "cuda":
                where = "it is inside of CudaBackend: export it with --backend launches"
            raise RunnerError(f"the program's state cannot be read, for {where}")
        self.size, self._transfers = size, program.transfers
        most = program.manifest["max_seq_len"]
        # Of each tensor its name and pieces [B, S, ...], which follow one another along the slots.
        self.by_position: list[tuple[str, list[Any]]] = []
        self.whole: list[tuple[str, list[Any]]] = []
        for name, pieces in program.state.items():
            kind = name.rpartition(".")[2]
            if kind in OF_NO_ROW:
                continue
            if kind not in CACHES | RUNNING or any(len(piece.shape) < 2 for piece in pieces):
                raise RunnerError(
                    f"the state has the tensor {name}, and it is not known how it goes on: no "
                    "prompt's beginning can be kept"
                )
            slots = sum(piece.shape[1] for piece in pieces)
            # A ring of so many slots never begins anew.
            is_full = kind in CACHES and slots >= most
            (self.by_position if is_full else self.whole).append((name, pieces))
        self.block_bytes = sum(size * _bytes(pieces[0][0, :1]) for _, pieces in self.by_position)
        self.row_bytes = sum(_bytes(piece[0]) for _, pieces in self.whole for piece in pieces)
        self._blocks: list[Any] = []
        self._rows: list[list[Any]] = []

    def make_room(self, blocks: int, rows: int) -> None:
        """Make pools of so many blocks and rows, in place of those that there are."""
        room, size = self._transfers.room, self.size
        self._blocks, self._rows = [], []
        self._blocks = [
            room((blocks, size, *pieces[0].shape[2:]), pieces[0]) for _, pieces in self.by_position
        ]
        self._rows = [
            [room((rows, *piece.shape[1:]), piece) for piece in pieces] for _, pieces in self.whole
        ]

    def keep_blocks(self, row: int, first: int, numbers: list[int]) -> None:
        """Copy the row's blocks from the one `first` on to those `numbers` of the pool."""
        self._copy_blocks(row, first, numbers, to_row=False)

    def put_blocks(self, row: int, numbers: list[int]) -> None:
        """Copy those blocks of the pool to the row, from its first position on."""
        self._copy_blocks(row, 0, numbers, to_row=True)

    def _copy_blocks(self, row: int, first: int, numbers: list[int], to_row: bool) -> None:
        found = runs(numbers)
        # Numbers go up, which waits for the device. Few runs of blocks need none.
        places = None if len(found) <= MOST_RUNS else self._transfers.upload(numbers)
        # Of the row and of the pool.
        pairs: list[tuple[Any, Any]] = []
        for (_, pieces), pool in zip(self.by_position, self._blocks):
            if len(pieces) > 1:
                for block, number in enumerate(numbers, first):
                    pairs += self._parts(pieces, row, block, pool[number])
            elif places is None:
                slots = pieces[0][row]
                for begin, number, count in found:
                    here = self._of(slots, first + begin, count)
                    pairs.append((here, pool[number : number + count]))
            else:
                here = self._of(pieces[0][row], first, len(numbers))
                if to_row:
                    self._transfers.gather(pool, places, here)
                else:
                    self._transfers.scatter(here, pool, places)
        self._transfers.copy_all([pair[::-1] for pair in pairs] if to_row else pairs)

    def keep_row(self, row: int, number: int) -> None:
        """Copy what is copied whole of the row to that row of the pool."""
        self._transfers.copy_all(self._pairs(row, number))

    def put_row(self, row: int, number: int) -> None:
        """Copy that row of the pool to the row."""
        self._transfers.copy_all([pair[::-1] for pair in self._pairs(row, number)])

    def _pairs(self, row: int, number: int) -> list[tuple[Any, Any]]:
        """What is copied whole of a row, and its places in the pools."""
        return [
            (piece[row], pool[number])
            for (_, pieces), pools in zip(self.whole, self._rows)
            for piece, pool in zip(pieces, pools)
        ]

    # Of the host

    def fits(self, blocks: int, copies: list[np.ndarray]) -> bool:
        """Whether these are the bytes of so many blocks and a row, each tensor's by itself."""
        sizes = [blocks * self.size * _bytes(pieces[0][0, :1]) for _, pieces in self.by_position]
        sizes += [_bytes(piece[0]) for _, pieces in self.whole for piece in pieces]
        return [copy.size for copy in copies] == sizes

    def read_blocks(self, numbers: list[int]) -> list[np.ndarray]:
        """The bytes uint8 [N] of those blocks of each pool."""
        places, found = self._transfers.upload(numbers), []
        for pool in self._blocks:
            blocks = self._transfers.room((len(numbers), *pool.shape[1:]), pool)
            self._transfers.gather(pool, places, blocks)
            found.append(self._transfers.read_bytes(blocks))
        return found

    def read_row(self, number: int) -> list[np.ndarray]:
        """The bytes of that row of each pool of rows."""
        pools = [pool for pools in self._rows for pool in pools]
        return [self._transfers.read_bytes(pool[number]) for pool in pools]

    def fill_blocks(self, copies: list[np.ndarray], first: int, numbers: list[int]) -> None:
        """Fill those blocks of the pools with a beginning's, from its block `first` on. `copies`
        are what `read_blocks` and `read_row` gave of it."""
        if not numbers:
            return
        places = self._transfers.upload(numbers)
        for pool, copy in zip(self._blocks, copies):
            blocks = self._transfers.room((len(numbers), *pool.shape[1:]), pool)
            step = _bytes(blocks[0])
            self._transfers.write_bytes(copy[first * step :][: _bytes(blocks)], blocks)
            self._transfers.scatter(blocks, pool, places)

    def fill_row(self, copies: list[np.ndarray], number: int) -> None:
        """Fill that row of the pools of rows."""
        pools = [pool for pools in self._rows for pool in pools]
        for pool, copy in zip(pools, copies[len(self._blocks) :]):
            self._transfers.write_bytes(copy, pool[number])

    def _of(self, slots: Any, first: int, count: int) -> Any:
        """So many blocks [count, size, ...] of slots [S, ...]."""
        taken = slots[first * self.size : (first + count) * self.size]
        # Of NumPy's arrays and torch's tensors a view: an axis is only divided.
        return taken.reshape((count, self.size, *taken.shape[1:]))

    def _parts(self, pieces: list[Any], row: int, block: int, kept: Any) -> list[tuple[Any, Any]]:
        """The parts of a block that lie in several pieces, and their places in `kept`."""
        first, found, start = block * self.size, [], 0
        for piece in pieces:
            begin = max(first, start)
            end = min(first + self.size, start + piece.shape[1])
            if begin < end:
                here = piece[row, begin - start : end - start]
                found.append((here, kept[begin - first : end - first]))
            start += piece.shape[1]
        return found


def runs(numbers: list[int]) -> list[tuple[int, int, int]]:
    """The runs of numbers that follow one another: where each begins among them, its first number,
    and how many there are."""
    found: list[tuple[int, int, int]] = []
    for i, number in enumerate(numbers):
        if found and number == found[-1][1] + found[-1][2]:
            found[-1] = *found[-1][:2], found[-1][2] + 1
        else:
            found.append((i, number, 1))
    return found


def _bytes(array: Any) -> int:
    return prod(array.shape) * array.itemsize
