"""Prompts, cut into the chunks that a program's prefill takes.

A prompt may wait between two of its chunks while other rows step. What a row computes meanwhile is
written at the position where its next chunk begins (slots.py), and the chunk overwrites it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tokenloop.runner.program import Program


@dataclass
class Prompt:
    """A prompt and the row that it is for. `first` is how many of its ids are prefilled. With
    `by_token` a chunk has one, and the logits after each are wanted."""

    row: int
    ids: list[int]
    first: int = 0
    by_token: bool = False

    @property
    def is_done(self) -> bool:
        return self.first == len(self.ids)


class Prefill:
    """The prompts of one run of the loop that are not prefilled to their end, in their order."""

    def __init__(self, program: Program):
        self.program = program
        self.prompts: list[Prompt] = []

    def add(self, row: int, ids: list[int], by_token: bool = False) -> None:
        """Let a prompt wait for its turn. `by_token` is for a program that has logits."""
        self.prompts.append(Prompt(row, ids, by_token=by_token))

    def drop(self, row: int) -> None:
        """Forget the row's prompt, if it waits."""
        self.prompts = [prompt for prompt in self.prompts if prompt.row != row]

    def part_done(self) -> list[Prompt]:
        """The prompts of which a beginning is prefilled."""
        return [prompt for prompt in self.prompts if prompt.first]

    def advance(self) -> list[tuple[Prompt, Any]]:
        """Prefill one more chunk. Returns the prompts that are done with it, or go by tokens, and
        the logits float32 [1, V] after what is prefilled, which are valid until the next call."""
        raise NotImplementedError


class ChunkedPrefill(Prefill):
    """One prompt after the other, each in chunks of up to max_prefill tokens."""

    def __init__(self, program: Program, table: Any, from_host: bool):
        """`table` int64 [N] has the numbers from 0 on, on the device. Positions are uploaded for
        each chunk if `from_host`."""
        super().__init__(program)
        self._table, self._from_host = table, from_host
        self._most: int = program.manifest["max_prefill"]
        self._several: bool = program.manifest["batch"] > 1
        # The ids int64 [1, N] of the first prompt: they go up once, and chunks are views of them.
        self._ids: Any = None

    def advance(self) -> list[tuple[Prompt, Any]]:
        prompt, upload = self.prompts[0], self.program.transfers.upload
        if prompt.first == 0:
            self._ids = upload([prompt.ids])
        start = prompt.first
        chunk = self._ids[:, start : start + (1 if prompt.by_token else self._most)]
        prompt.first += chunk.shape[1]
        positions = self._table[start : prompt.first]
        if self._from_host:
            positions = upload(range(start, prompt.first))
        where = (self._table[prompt.row : prompt.row + 1],) if self._several else ()
        logits = self.program.prefill(chunk, positions, *where)
        if prompt.is_done:
            del self.prompts[0]
        return [(prompt, logits)] if prompt.is_done or prompt.by_token else []


class Part(NamedTuple):
    """Tokens of one prompt in a packed chunk: for `row`, from position `first` on. `ends` says
    whether the prompt ends with them."""

    row: int
    first: int
    ids: list[int]
    ends: bool


def next_chunk(prompts: list[Prompt], capacity: int, parts: int, multiple: int) -> list[Part]:
    """The next of the chunks that `packed` says. What it has of the prompts is taken from them."""
    chunk, free = [], capacity
    while prompts and len(chunk) < parts:
        prompt = prompts[0]
        rest = len(prompt.ids) - prompt.first
        size = rest if rest <= free else free // multiple * multiple
        if size == 0:
            break
        first, ends = prompt.first, size == rest
        chunk.append(Part(prompt.row, first, prompt.ids[first : first + size], ends))
        prompt.first, free = first + size, free - size
        if not ends:
            break
        del prompts[0]
    return chunk


def packed(
    prompts: Iterable[tuple[int, list[int]]], capacity: int, parts: int, multiple: int
) -> Iterator[list[Part]]:
    """Prompts, each a row and its ids, in chunks of up to `capacity` tokens and `parts` parts, in
    their order.

    A part that does not end its prompt has a number of tokens that `multiple` divides, and so every
    part begins at a position that it divides. `capacity` is at least `multiple`.
    """
    waiting = [Prompt(row, ids) for row, ids in prompts]
    while waiting:
        yield next_chunk(waiting, capacity, parts, multiple)


class PackedPrefill(Prefill):
    """Prompts that come together share chunks, without padding between them. Where a chunk begins
    always goes up with its tokens. `program` has `packing`."""

    def advance(self) -> list[tuple[Prompt, Any]]:
        prompts = {prompt.row: prompt for prompt in self.prompts}
        chunk = next_chunk(self.prompts, *self.program.packing)
        logits = self.program.prefill_packed(chunk)
        ended = [(i, part) for i, part in enumerate(chunk) if part.ends]
        return [(prompts[part.row], logits[i : i + 1]) for i, part in ended]


LAYOUT = "starts", "rows", "first", "last_starts", "last_first"


def layout(chunk: list[Part], out: dict[str, np.ndarray]) -> None:
    """Fill `out` with what kernels are told of a chunk, int32 (models/kernels/packed.py).

    `starts` [P + 1] are the parts' beginnings among the tokens, and the number of tokens in place
    of those that are not there. `rows` [P] are -1 for those. `first` [P] are positions.
    `last_starts` [P + 1] and `last_first` [P] are those of a chunk of each part's last token alone.
    """
    starts, rows, first, last_starts, last_first = (out[name] for name in LAYOUT)
    count = len(chunk)
    rows[count:], first[count:], last_first[count:] = -1, 0, 0
    begin = 0
    for i, part in enumerate(chunk):
        size = len(part.ids)
        starts[i], rows[i], first[i] = begin, part.row, part.first
        last_starts[i], last_first[i] = i, part.first + size - 1
        begin += size
    starts[count:], last_starts[count:] = begin, count
