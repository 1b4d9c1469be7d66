"""What restricts the rows of a step, as the device is told of it."""

from typing import Any

import numpy as np

from tokenloop.runner.program import Change, Program
from tokenloop.runner.restriction import Restriction, mask_bytes

# What changes nothing: bytes that allow all of their tokens, and ids that stand for none.
NOTHING = {"mask": ("allowed", np.uint8, 0xFF), "adjust": ("ids", np.int64, -1)}


class Changes:
    """Uploads what changes the logits of restricted rows, and of no others, in one run of the loop.

    A program that has no arrays of its own for it is given new ones, and changes row by row. In a
    program's arrays every row has a place, in which is what changes nothing unless it is
    restricted.
    """

    def __init__(self, program: Program):
        self._inputs, self._upload = program.step_inputs, program.transfers.upload
        self._mask_bytes = mask_bytes(program.manifest["vocab_size"])
        # By method whose changes lie in the rows' places. None before the first change, for an
        # earlier run may have left some.
        self._told: dict[str, dict[int, Restriction]] | None = None

    def first(self, row: int, restriction: Restriction) -> tuple[Change, ...]:
        """What changes the logits [1, V] of a row's first token."""
        changes = self._uploaded({row: restriction})
        return tuple(Change(method, {0: rows[row]}) for method, rows in changes)

    def of(self, restrictions: dict[int, Restriction]) -> tuple[Change, ...]:
        """What changes the logits [B, V] of a step: rows have these restrictions, or none."""
        changes = self._uploaded(restrictions)
        told = dict(changes)
        for method, before in (self._told or {}).items():
            for row in set(before) - set(told.get(method, {})):
                self._reset(method, row)
        return changes

    def _uploaded(self, restrictions: dict[int, Restriction]) -> tuple[Change, ...]:
        """Penalties and biases come first, and masks last."""
        if self._told is None:
            self._told = {"mask": {}, "adjust": {}}
            for name, dtype, nothing in NOTHING.values():
                if (whole := self._inputs.get(name)) is not None:
                    self._upload(np.full(tuple(whole.shape), nothing), dtype, whole)
        adjusted = {row: self._adjusted(row, r) for row, r in restrictions.items() if r.adjusts}
        masked = {row: self._mask(row, r) for row, r in restrictions.items() if r.masks}
        changes = Change("adjust", adjusted), Change("mask", masked)
        return tuple(change for change in changes if change.rows)

    def _mask(self, row: int, restriction: Restriction) -> tuple[Any, ...]:
        return self._put(
            "mask", row, restriction, {"allowed": restriction.allowed(self._mask_bytes)}
        )

    def _adjusted(self, row: int, restriction: Restriction) -> tuple[Any, ...]:
        if self._told["adjust"].get(row, restriction) is not restriction:
            # Those of an earlier sequence may be more.
            self._reset("adjust", row)
        arrays = restriction.adjusted()
        if "ids" not in self._inputs and len(arrays["ids"]) == 1:
            # Methods that take any number take at least 2.
            arrays = {name: array[[0, 0]] for name, array in arrays.items()}
        return self._put("adjust", row, restriction, arrays)

    def _put(
        self, method: str, row: int, restriction: Restriction, arrays: dict[str, np.ndarray]
    ) -> tuple[Any, ...]:
        """Upload a row's arrays; where they are, each of one row."""
        places = []
        for name, array in arrays.items():
            whole = self._inputs.get(name)
            if whole is None:
                places.append(self._upload(array[None], array.dtype))
            else:
                self._upload(array, array.dtype, whole[row])
                places.append(whole[row : row + 1])
        if any(name in self._inputs for name in arrays):
            self._told[method][row] = restriction
        return tuple(places)

    def _reset(self, method: str, row: int) -> None:
        name, dtype, nothing = NOTHING[method]
        place = self._inputs[name][row]
        self._upload(np.full(tuple(place.shape), nothing), dtype, place)
        del self._told[method][row]
