"""Prompts, cut into the chunks that a program's prefill takes.

A prompt may wait between two of its chunks while other rows step. What a row computes meanwhile is
written at the position where its next chunk begins (slots.py), and the chunk overwrites it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tokenloop.runner.prefix_cache import PrefixCache
from tokenloop.runner.program import Program


@dataclass
class Prompt:
    """A prompt and the row that it is for. `first` is how many of its ids are prefilled. With
    `by_token` a chunk has one, and the logits after each are wanted.

    `keys` are the ids' blocks, as a PrefixCache has them, if it may keep and take any of it.
    `cached` of the ids were prefilled by an earlier prompt. At the positions `keep_at` that are yet
    to come the row's state is kept for later ones; with `must_cut` a chunk ends there."""

    row: int
    ids: list[int]
    first: int = 0
    by_token: bool = False
    keys: list[bytes] = field(default_factory=list)
    has_begun: bool = False
    cached: int = 0
    keep_at: tuple[int, ...] = ()
    must_cut: bool = False

    @property
    def is_done(self) -> bool:
        return self.first == len(self.ids)

    @property
    def until(self) -> int:
        """The position where its next chunk ends at the latest."""
        return self.keep_at[0] if self.must_cut and self.keep_at else len(self.ids)


class Prefill:
    """The prompts of one run of the loop that are not prefilled to their end, in their order."""

    def __init__(self, program: Program, cache: PrefixCache | None = None):
        """`cache` has the beginnings of earlier prompts, and gets those of these."""
        self.program, self._cache = program, cache
        self.prompts: list[Prompt] = []
        # Of the newest chunk.
        self.taken = 0

    def add(self, row: int, ids: list[int], by_token: bool = False) -> None:
        """Let a prompt wait for its turn. `by_token` is for a program that has logits."""
        # By tokens a prompt rounds otherwise.
        uses_cache = self._cache is not None and not by_token
        keys = self._cache.keys(ids) if uses_cache else []
        self.prompts.append(Prompt(row, ids, 0, by_token, keys))

    def drop(self, row: int) -> None:
        """Forget the row's prompt, if it waits."""
        self.prompts = [prompt for prompt in self.prompts if prompt.row != row]

    def part_done(self) -> list[Prompt]:
        """The prompts of which a beginning is prefilled."""
        return [prompt for prompt in self.prompts if prompt.first]

    def advance(self, most: int | None = None) -> list[tuple[Prompt, Any]]:
        """Prefill one more chunk, of at most so many tokens where no byte depends on its size.
        Returns the prompts that are done with it, or go by tokens, and the logits float32 [1, V]
        after what is prefilled, which are valid until the next call. `taken` is then the number of
        its tokens."""
        raise NotImplementedError

    def _begin(self, prompt: Prompt) -> None:
        """Let a prompt begin that has not, where an earlier one had come that began as it does. Not
        before its turn: until then others may be prefilled that begin so."""
        if prompt.has_begun:
            return
        prompt.has_begun = True
        if prompt.keys:
            found = self._cache.take(prompt.row, prompt.keys, self._last(prompt))
            prompt.first = prompt.cached = found.cached
            prompt.keep_at, prompt.must_cut = found.keep_at, self._cache.needs_states

    def _keep(self, prompt: Prompt) -> None:
        """Keep what was prefilled of a prompt, if it is time for that."""
        while prompt.keep_at and prompt.first >= prompt.keep_at[0]:
            self._cache.keep(prompt.row, prompt.keys, prompt.keep_at[0])
            prompt.keep_at = prompt.keep_at[1:]

    def _last(self, prompt: Prompt) -> int:
        """How many of a prompt's blocks may be taken: at least one id is computed."""
        return (len(prompt.ids) - 1) // self._cache.size


class ChunkedPrefill(Prefill):
    """One prompt after the other, each in chunks of up to max_prefill tokens."""

    def __init__(
        self, program: Program, table: Any, from_host: bool, cache: PrefixCache | None = None
    ):
        """`table` int64 [N] has the numbers from 0 on, on the device. Positions are uploaded for
        each chunk if `from_host`."""
        super().__init__(program, cache)
        self._table, self._from_host = table, from_host
        self._most: int = program.manifest["max_prefill"]
        self._several: bool = program.manifest["batch"] > 1
        # The ids int64 [1, N] of the first prompt: they go up once, and chunks are views of them.
        self._ids: Any = None

    def advance(self, most: int | None = None) -> list[tuple[Prompt, Any]]:
        # Rounding depends on a chunk's size, which is therefore the same without other rows.
        prompt, upload = self.prompts[0], self.program.transfers.upload
        if not prompt.has_begun:
            self._begin(prompt)
            self._ids = upload([prompt.ids])
        start = prompt.first
        chunk = self._ids[:, start : start + (1 if prompt.by_token else self._most)]
        self.taken = chunk.shape[1]
        prompt.first += self.taken
        positions = self._table[start : prompt.first]
        if self._from_host:
            positions = upload(range(start, prompt.first))
        where = (self._table[prompt.row : prompt.row + 1],) if self._several else ()
        logits = self.program.prefill(chunk, positions, *where)
        self._keep(prompt)
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
    """The next of the chunks that `packed` says. What it has of the prompts is taken from them, and
    those that end with it are taken from the list."""
    chunk, free = [], capacity
    for prompt in list(prompts):
        rest = prompt.until - prompt.first
        size = rest if rest <= free else free // multiple * multiple
        if size == 0 or len(chunk) == parts:
            break
        first, free = prompt.first, free - size
        prompt.first += size
        ids = prompt.ids[first : prompt.first]
        chunk.append(Part(prompt.row, first, ids, prompt.is_done))
        if size < rest:
            break
    prompts[:] = [prompt for prompt in prompts if not prompt.is_done]
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

    def advance(self, most: int | None = None) -> list[tuple[Prompt, Any]]:
        capacity, parts, multiple = self.program.packing
        if most is not None:
            capacity = max(multiple, min(capacity, most))
        prompts = {prompt.row: prompt for prompt in self._ready(capacity, parts)}
        left = list(prompts.values())
        chunk = next_chunk(left, capacity, parts, multiple)
        self.taken = sum(len(part.ids) for part in chunk)
        logits = self.program.prefill_packed(chunk)
        for part in chunk:
            self._keep(prompts[part.row])
        self.prompts = [prompt for prompt in self.prompts if not prompt.is_done]
        ended = [(i, part) for i, part in enumerate(chunk) if part.ends]
        return [(prompts[part.row], logits[i : i + 1]) for i, part in ended]

    def _ready(self, capacity: int, parts: int) -> list[Prompt]:
        """The prompts that the next chunk may be of, which have begun, in their order. One that
        begins as another one ahead of it does waits until that one's beginning is kept."""
        ready: list[Prompt] = []
        for prompt in self.prompts:
            if prompt.keys and not prompt.has_begun:
                mine = prompt.keys, self._last(prompt)
                if any(self._cache.will_help(*mine, p.keys, p.keep_at) for p in ready):
                    continue
            # Those that there is no room for begin later.
            if len(ready) == parts or capacity <= 0:
                break
            self._begin(prompt)
            ready.append(prompt)
            capacity -= prompt.until - prompt.first
        return ready


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
