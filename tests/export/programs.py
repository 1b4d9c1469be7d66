"""What tests of whole programs share: an export in this process, and feeding what it made."""

import copy
import functools
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tokenloop.export import command
from tokenloop.export.pte import block_cache, program_json, pte_artifact, pte_program
from tokenloop.export.pte.selection import Greedy


def export_here(family: command.Family, arguments: list, first_block: int):
    """Export as the script does, with caches of such a first block: a copy of the network that the
    program was made of."""
    options = command.parse_arguments(family, [str(argument) for argument in arguments])
    networks = []

    def build_program(model, *arguments):
        networks.append(copy.deepcopy(model))
        return build(model, *arguments)

    build = pte_program.build_program
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(block_cache, "FIRST_BLOCK", first_block)
        patch.setattr(block_cache, "FIRST_BLOCK_OF_ROWS", first_block)
        patch.setattr(pte_program, "build_program", build_program)
        patch.setattr(pte_artifact, "SelectionExport", GreedyExport)
        command.export(family, options, lambda _: None)
    return networks[0]


class GreedyExport:
    """What of SelectionExport these tests need: `sample` takes long to export."""

    def __init__(self, batch: int, vocab_size: int, backend: str):
        self._program = greedy_program(batch, vocab_size)

    def result(self):
        return program_json.from_json(self._program)


@functools.cache
def greedy_program(batch: int, vocab_size: int) -> bytes:
    """The program of `greedy`, and of `greedy_row` where there are several rows."""
    rows = {"greedy": batch} if batch == 1 else {"greedy": batch, "greedy_row": 1}
    exported = {
        name: torch.export.export(Greedy(), (torch.zeros(count, vocab_size),))
        for name, count in rows.items()
    }
    program = pte_program.to_program(exported, {}, True, lambda _: None)
    return program_json.to_json(program.executorch_program)


def feed(program, ids: np.ndarray, chunks, decoded: int = 0) -> np.ndarray:
    """Prefill chunks of these lengths from position 0 on, decode some more ids: the logits after
    each call."""
    rows, start = [], 0
    for length in chunks:
        positions = np.arange(start, start + length)
        rows.append(program.prefill(ids[:, start : start + length], positions)[0].copy())
        start += length
    for position in range(start, start + decoded):
        row = program.decode(ids[:, position : position + 1], np.array([position]))
        rows.append(row[0].copy())
    return np.array(rows)


def even(length: int, chunk: int) -> list[int]:
    """So many positions in chunks of this size, and what is left."""
    return [chunk] * (length // chunk) + [length % chunk] * (length % chunk > 0)


def assert_rows_near(
    program, network, ids: np.ndarray, lengths: list[int], chunk: int, steps: int,
    near: Callable[[np.ndarray, np.ndarray], None],
) -> None:  # fmt: skip
    """The logits of rows that begin with so many of ids int64 [B, T], in chunks of up to `chunk`,
    and of so many steps of all rows after that, are `near` the eager network's."""
    for row, length in enumerate(lengths):
        start = 0
        for count in even(length, chunk):
            given = ids[row : row + 1, start : start + count], np.arange(start, start + count)
            actual = program.prefill(*given, np.array([row])).copy()
            with torch.no_grad():
                arguments = map(torch.from_numpy, (*given, np.array([row])))
                near(actual, network.prefill(*arguments).numpy())
            start += count
    for step in range(steps):
        position = np.array(lengths) + step
        token = ids[np.arange(len(lengths)), position][:, None]
        actual = program.decode(token, position).copy()
        with torch.no_grad():
            expected = network.decode(torch.from_numpy(token), torch.from_numpy(position)).numpy()
        near(actual, expected)


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same logits but for rounding: these differ by 0.15 from token to token."""
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=1e-5)
    assert np.array_equal(actual.argmax(1), expected.argmax(1))


def assert_near_of_quantized(
    actual: np.ndarray, expected: np.ndarray, same: float, limit: float
) -> None:
    """The same logits but for codes that lie between two: they may be rounded up here and down
    there, which shows in a text from then on, but no more than `limit`. The others are the same,
    which are at least this part of them."""
    error = np.abs(actual - expected).max(1)
    assert error.max() < limit
    assert np.quantile(error, same) < 1e-5
