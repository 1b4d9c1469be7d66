"""What a program remembers of a row, and memory for copies of it.

A full layer's keys and values have a slot for each position, and are copied in blocks of positions.
All else is copied whole: a ring, which holds the newest positions alone, and what goes on with
every token, such as a delta net's matrices.
"""

from math import prod
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.program import Program

CACHES, RUNNING, OF_NO_ROW = {"k", "v"}, {"conv", "recurrent"}, {"kernel_semaphores"}


class RowState:
    """The state of a program's rows, and a pool for each tensor of it: copies of blocks of `size`
    positions, and copies of whole rows."""

    def __init__(self, program: Program, size: int):
        """Errors: RunnerError for a program whose state cannot be read, or has tensors that this
        does not know."""
        if program.state is None:
            backend = program.manifest["backend"]
            raise RunnerError(
                f"the state of an artifact for {backend} cannot be read, so no prompt's beginning "
                "is kept: export it for another --backend"
            )
        self.size, self._transfers = size, program.transfers
        most = program.manifest["max_seq_len"]
        # Of each tensor its name and pieces [B, S, ...], which follow one another along the slots.
        self.by_position: list[tuple[str, list[Any]]] = []
        self.whole: list[tuple[str, list[Any]]] = []
        for name, pieces in program.state.items():
            kind = name.rpartition(".")[2]
            if kind in OF_NO_ROW:
                continue
            if kind not in CACHES | RUNNING:
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
        if not numbers or not self.by_position:
            return
        places = self._transfers.upload(numbers)
        for (_, pieces), pool in zip(self.by_position, self._blocks):
            if len(pieces) == 1:
                self._transfers.scatter(self._of(pieces[0][row], first, numbers), pool, places)
                continue
            for block, number in enumerate(numbers, first):
                for here, there in self._parts(pieces, row, block, pool[number]):
                    self._transfers.copy(here, there)

    def put_blocks(self, row: int, numbers: list[int]) -> None:
        """Copy those blocks of the pool to the row, from its first position on."""
        if not numbers or not self.by_position:
            return
        places = self._transfers.upload(numbers)
        for (_, pieces), pool in zip(self.by_position, self._blocks):
            if len(pieces) == 1:
                self._transfers.gather(pool, places, self._of(pieces[0][row], 0, numbers))
                continue
            for block, number in enumerate(numbers):
                for here, there in self._parts(pieces, row, block, pool[number]):
                    self._transfers.copy(there, here)

    def keep_row(self, row: int, number: int) -> None:
        """Copy what is copied whole of the row to that row of the pool."""
        for (_, pieces), pools in zip(self.whole, self._rows):
            for piece, pool in zip(pieces, pools):
                self._transfers.copy(piece[row], pool[number])

    def put_row(self, row: int, number: int) -> None:
        """Copy that row of the pool to the row."""
        for (_, pieces), pools in zip(self.whole, self._rows):
            for piece, pool in zip(pieces, pools):
                self._transfers.copy(pool[number], piece[row])

    def _of(self, slots: Any, first: int, numbers: list[int]) -> Any:
        """Blocks [N, size, ...] of slots [S, ...]."""
        count = len(numbers)
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


def _bytes(array: Any) -> int:
    return prod(array.shape) * array.itemsize
