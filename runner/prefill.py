"""Prompts, cut into the chunks that a program's prefill takes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenloop.runner.program import Program

# A prompt and the row that it is for.
Prompt = tuple[int, list[int]]


class ChunkedPrefill:
    """One prompt after the other, each in chunks of up to max_prefill tokens."""

    def __init__(self, program: Program, table: Any):
        """`table` int64 [N] has the numbers from 0 on, on the device."""
        self._program, self._table = program, table
        self._most: int = program.manifest["max_prefill"]
        self._several: bool = program.manifest["batch"] > 1

    def logits(self, prompts: list[Prompt], from_host: bool) -> Iterator[tuple[int, Any]]:
        """The rows, and the logits float32 [1, V] after their prompts, each valid until the next is
        asked for. Positions are uploaded for each chunk if `from_host`."""
        upload = self._program.transfers.upload
        for row, prompt_ids in prompts:
            # The prompt goes up once; chunks are views of it.
            ids = upload([prompt_ids])
            where = (self._table[row : row + 1],) if self._several else ()
            for start in range(0, ids.shape[1], self._most):
                chunk = ids[:, start : start + self._most]
                positions = self._table[start : start + chunk.shape[1]]
                if from_host:
                    positions = upload(range(start, start + chunk.shape[1]))
                logits = self._program.prefill(chunk, positions, *where)
            yield row, logits


class Part(NamedTuple):
    """Tokens of one prompt in a packed chunk: for `row`, from position `first` on. `ends` says
    whether the prompt ends with them."""

    row: int
    first: int
    ids: list[int]
    ends: bool


def packed(prompts: list[Prompt], capacity: int, parts: int, multiple: int) -> Iterator[list[Part]]:
    """The prompts in chunks of up to `capacity` tokens and `parts` parts, in their order.

    A part that does not end its prompt has a number of tokens that `multiple` divides, and so every
    part begins at a position that it divides. `capacity` is at least `multiple`.
    """
    chunk, free = [], capacity
    for row, ids in prompts:
        first = 0
        while first < len(ids):
            rest = len(ids) - first
            size = rest if rest <= free else free // multiple * multiple
            if size == 0 or len(chunk) == parts:
                yield chunk
                chunk, free = [], capacity
                continue
            ends = size == rest
            chunk.append(Part(row, first, ids[first : first + size], ends))
            first, free = first + size, free - size
    if chunk:
        yield chunk


class PackedPrefill:
    """Prompts that come together share chunks, without padding between them."""

    def __init__(self, program: Program):
        """`program` has `packing`."""
        self._program, self._packing = program, program.packing

    def logits(self, prompts: list[Prompt], from_host: bool) -> Iterator[tuple[int, Any]]:
        """As ChunkedPrefill.logits. Where a chunk begins always goes up with its tokens, so
        `from_host` changes nothing."""
        for chunk in packed(prompts, *self._packing):
            logits = self._program.prefill_packed(chunk)
            for i, part in enumerate(chunk):
                if part.ends:
                    yield part.row, logits[i : i + 1]


def layout(chunk: list[Part], parts: int) -> dict[str, np.ndarray]:
    """What kernels are told of a chunk of up to `parts` parts, int32 (models/kernels/packed.py).

    `starts` [parts + 1] are the parts' beginnings among the tokens, and the number of tokens in
    place of those that are not there. `rows` [parts] are -1 for those. `first` [parts] are
    positions. `last_starts` and `last_first` are those of a chunk of each part's last token alone.
    """
    rows, first = np.full(parts, -1, np.int32), np.zeros(parts, np.int32)
    last_first, sizes = np.zeros(parts, np.int32), np.zeros(parts, np.int32)
    for i, part in enumerate(chunk):
        rows[i], first[i], sizes[i] = part.row, part.first, len(part.ids)
        last_first[i] = part.first + len(part.ids) - 1
    starts = np.concatenate([[0], sizes.cumsum()]).astype(np.int32)
    last_starts = np.minimum(np.arange(parts + 1), len(chunk)).astype(np.int32)
    return {
        "starts": starts, "rows": rows, "first": first,
        "last_starts": last_starts, "last_first": last_first,
    }  # fmt: skip
