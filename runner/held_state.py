"""What goes on with every token, kept aside while a prompt waits between two of its chunks: a step
of the other rows computes along in its row, and would take it further."""

from typing import Any

from tokenloop.runner.program import CACHES, OF_NO_ROW, RUNNING, Program


class HeldStates:
    """The states of rows whose prompts wait. A row has memory for its own from the first time on.

    Caches by position need none of it: what a step writes there the next chunk overwrites.
    """

    def __init__(self, program: Program):
        self._transfers = program.transfers
        kinds = {tensor["name"].rpartition(".")[2] for tensor in program.manifest.get("state", [])}
        # Whether prompts can wait: there is nothing else, and the runner can reach what there is.
        is_reached = program.state is not None or not kinds & RUNNING
        self.can_wait = kinds <= CACHES | RUNNING | OF_NO_ROW and is_reached
        self._pieces: list[Any] = [
            piece
            for name, pieces in (program.state or {}).items()
            if name.rpartition(".")[2] in RUNNING
            for piece in pieces
        ]
        self._copies: dict[int, list[Any]] = {}

    def keep(self, rows: list[int]) -> bool:
        """Keep the states of these rows aside; whether there is memory for it."""
        room = self._transfers.room
        try:
            for row in rows:
                if row not in self._copies:
                    self._copies[row] = [room((1, *p.shape[1:]), p)[0] for p in self._pieces]
        except MemoryError:
            return False
        self._copy([pair[::-1] for pair in self._pairs(rows)])
        return True

    def put(self, rows: list[int]) -> None:
        """Put back what was kept of these rows."""
        self._copy(self._pairs(rows))

    def _pairs(self, rows: list[int]) -> list[tuple[Any, Any]]:
        return [
            (copy, piece[row])
            for row in rows
            for piece, copy in zip(self._pieces, self._copies[row])
        ]

    def _copy(self, pairs: list[tuple[Any, Any]]) -> None:
        if pairs:
            self._transfers.copy_all(pairs)
