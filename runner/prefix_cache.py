"""The beginnings of prompts, as they were prefilled: a prompt that begins as an earlier one did
takes what is kept of it, and computes the rest.

A prompt gives the same bytes either way. So a beginning ends only where a prompt without the cache
may be cut, and only what a prefill computed is kept: a step rounds otherwise.

Beginnings are kept as a tree of blocks of ids. A full layer's keys and values are kept block by
block, so that beginnings which are equal are kept once, and each block of a kept beginning ends one
too. What goes on with every token, and a ring, is kept only as it was at some places: where the
last block of a prompt ends, and where a prompt leaves what is known of others.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.program import Program
from tokenloop.runner.row_state import RowState

MB = 10**6
# The number of a copy that is not there.
NOWHERE = -1


@dataclass(eq=False)
class Node:
    """A block of ids after those of its `parent`, and the numbers of the copies in the pools: of
    the `block`, and of the rest of the state at its end, if that is kept."""

    parent: Optional["Node"]
    key: bytes
    depth: int
    block: int = NOWHERE
    state: int = NOWHERE
    children: dict[bytes, "Node"] = field(default_factory=dict)


@dataclass(frozen=True)
class Beginning:
    """What a prompt found: the number of its positions that the row has now, and those, ascending,
    at which its state is to be kept."""

    cached: int
    keep_at: tuple[int, ...]


def block_size(program: Program) -> int:
    """How many tokens a block has: a prompt may be cut where it divides the position. There its
    chunks end in any case, or no byte depends on where they end."""
    if program.packing is None:
        return program.manifest["max_prefill"]
    return program.packing.multiple


class PrefixCache:
    """The kept beginnings of one program's prompts, in `budget` bytes. What was not used for the
    longest time goes first. All of it belongs to the thread whose turn the program is, but for the
    counts: tokens that were `cached_tokens`, `evictions`, and `used_bytes`."""

    def __init__(self, program: Program, budget: int, room: tuple[int, int] | None = None):
        """`budget` is in bytes. It is divided here between blocks and states that are kept whole,
        unless `room` are the numbers of both. The device's memory for them is taken at once.

        Errors: RunnerError for a program whose state cannot be read, and a budget that holds not
        one beginning.
        """
        size = block_size(program)
        self._rows = RowState(program, size)
        self.size, self.budget = size, budget
        # Whether a beginning can be taken only where all of its state is kept.
        self.needs_states = bool(self._rows.whole)
        longest = program.manifest["max_seq_len"] // size
        blocks, states = room or self._divide(budget, longest)
        try:
            self._rows.make_room(blocks, states)
        except MemoryError:
            raise RunnerError(
                f"prefix_cache_mb is {budget / MB:g}, and the device has not so much memory free: "
                "take less, or 0 for no cache"
            ) from None
        self.blocks, self.states = blocks, states
        self.cached_tokens = self.evictions = 0
        self.clear()

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that are in use."""
        blocks = (self.blocks - len(self._free_blocks)) * self._rows.block_bytes
        return blocks + (self.states - len(self._free_states)) * self._rows.row_bytes

    @classmethod
    def for_one(cls, program: Program, tokens: int) -> "PrefixCache":
        """A cache for one prompt of so many tokens. Errors: RunnerError as of the constructor, and
        for a prompt that has less than a block."""
        size = block_size(program)
        rows = RowState(program, size)
        # Of the last block the state is kept only if a token comes after it.
        blocks = (tokens - 1 if rows.whole else tokens) // size
        if blocks == 0:
            raise RunnerError(
                f"the prompt has {tokens} tokens; {size + bool(rows.whole)} are the least whose "
                "beginning can be kept"
            )
        states = int(bool(rows.whole))
        budget = blocks * rows.block_bytes + states * rows.row_bytes
        return cls(program, budget, (blocks, states))

    def clear(self) -> None:
        """Forget all beginnings."""
        self._root = Node(None, b"", 0)
        self._free_blocks = list(range(self.blocks))[::-1]
        self._free_states = list(range(self.states))[::-1]
        # What may go, the first one first: blocks, of which one is used before those that it comes
        # after, so that the first one has none after it; or else blocks with a state.
        self._order: OrderedDict[Node, None] = OrderedDict()

    def keys(self, ids: list[int]) -> list[bytes]:
        """The blocks of a prompt's ids, as this object takes them."""
        count = len(ids) // self.size
        data = np.asarray(ids[: count * self.size], np.int64).tobytes()
        step = 8 * self.size
        return [data[i * step : (i + 1) * step] for i in range(count)]

    def take(self, row: int, keys: list[bytes], last: int) -> Beginning:
        """Fill the row with the longest kept beginning of a prompt, of `last` of its blocks at
        most, and say where its own state is to be kept. The last block of all may not be taken if
        no id comes after it."""
        known = path = self._walk(keys[:last])
        if self.needs_states:
            path = path[: self._deepest(path)]
        if path:
            self._rows.put_blocks(row, [node.block for node in path])
            if self.needs_states:
                self._rows.put_row(row, path[-1].state)
            self._touch(path)
        wanted = {len(known), last} if self.needs_states else {len(keys)}
        cached = len(path) * self.size
        self.cached_tokens += cached
        keep_at = sorted(depth * self.size for depth in wanted if depth > len(path))
        return Beginning(cached, tuple(keep_at))

    def keep(self, row: int, keys: list[bytes], position: int) -> None:
        """Keep the beginning of a prompt up to `position`, where a block ends. The row is prefilled
        so far, and no further where `needs_states`. If there is no room for all of it, keep what
        there is room for, or nothing."""
        self._keep(
            keys[: position // self.size],
            lambda first, new: self._rows.keep_blocks(row, first, new),
            lambda number: self._rows.keep_row(row, number),
        )

    def will_help(
        self, keys: list[bytes], last: int, other: list[bytes], keep_at: tuple[int, ...]
    ) -> bool:
        """Whether a prompt had better wait for the `other` one, whose state will be kept at
        `keep_at`: it can then take more than now. `last` as `take` has it."""
        pairs = enumerate(zip(keys[:last], other))
        equal = next((i for i, (a, b) in pairs if a != b), min(last, len(other)))
        path = self._walk(keys[:last])
        ends = [position // self.size for position in keep_at]
        if self.needs_states:
            return max((end for end in ends if end <= equal), default=0) > self._deepest(path)
        return min(equal, max(ends, default=0)) > len(path)

    def copies(self, keys: list[bytes]) -> tuple[int, list[np.ndarray]]:
        """The longest kept beginning of a prompt: its positions, and bytes uint8 [N] of each tensor
        of its state, on the host."""
        path = self._walk(keys)
        if self.needs_states:
            path = path[: self._deepest(path)]
        if not path:
            return 0, []
        copies = self._rows.read_blocks([node.block for node in path])
        if self.needs_states:
            copies += self._rows.read_row(path[-1].state)
        return len(path) * self.size, copies

    def add(self, keys: list[bytes], copies: list[np.ndarray]) -> None:
        """Keep a beginning of which `copies` gave all. Errors: RunnerError where it does not fit
        the memory, or the program's state."""
        count = len(keys) * self.size
        if not keys or not self._rows.fits(len(keys), copies):
            raise RunnerError(
                f"a state after {count} tokens has {[copy.size for copy in copies]} bytes, which "
                "is not what this artifact has: save it again"
            )
        if self._rows.by_position and len(keys) > self.blocks:
            raise RunnerError(
                f"prefix_cache_mb is {self.budget / MB:g}, and holds {self.blocks * self.size} "
                f"tokens; {count} are to be kept: give it more"
            )
        self._keep(
            keys,
            lambda first, new: self._rows.fill_blocks(copies, first, new),
            lambda number: self._rows.fill_row(copies, number),
        )

    # The tree

    def _keep(
        self, keys: list[bytes], fill_blocks: Callable[[int, list[int]], None],
        fill_state: Callable[[int], None],
    ) -> None:  # fmt: skip
        """As `keep`. `fill_blocks` is given the first block that is new, and the places of the new
        ones in their pools; `fill_state` a place."""
        path = self._walk(keys)
        self._touch(path)
        if self.needs_states and len(path) == len(keys) and path[-1].state != NOWHERE:
            return
        kept = {self._root, *path}
        if self.needs_states and not (self._free_states or self._evict(kept)):
            return
        missing = len(keys) - len(path)
        if self._rows.by_position:
            while len(self._free_blocks) < missing and self._evict(kept):
                pass
            if len(self._free_blocks) < missing:
                if self.needs_states:
                    return
                missing = len(self._free_blocks)
            new = [self._free_blocks.pop() for _ in range(missing)]
        else:
            new = [NOWHERE] * missing
        fill_blocks(len(path), new)
        for block in new:
            parent = path[-1] if path else self._root
            node = Node(parent, keys[len(path)], len(path) + 1, block)
            parent.children[node.key] = node
            path.append(node)
        if self.needs_states and path[-1].state == NOWHERE:
            path[-1].state = self._free_states.pop()
            fill_state(path[-1].state)
        self._touch(path)

    def _walk(self, keys: list[bytes]) -> list[Node]:
        """The nodes of the longest beginning that the tree has."""
        node, path = self._root, []
        for key in keys:
            node = node.children.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def _deepest(self, path: list[Node]) -> int:
        """How many of the nodes end with one that has a state."""
        return max((node.depth for node in path if node.state != NOWHERE), default=0)

    def _touch(self, path: list[Node]) -> None:
        """Note that the nodes are used now."""
        used = path[::-1]
        if self.needs_states:
            used = [node for node in used[:1] if node.state != NOWHERE]
        for node in used:
            self._order[node] = None
            self._order.move_to_end(node)

    def _evict(self, kept: set[Node]) -> bool:
        """Give up the node that may go first of those that are not to be `kept`, and what is of no
        use without it; whether there is one."""
        node = next((node for node in self._order if node not in kept), None)
        if node is None:
            return False
        del self._order[node]
        self.evictions += 1
        if node.state != NOWHERE:
            self._free_states.append(node.state)
            node.state = NOWHERE
        while not node.children and node.state == NOWHERE and node not in kept:
            if node.block != NOWHERE:
                self._free_blocks.append(node.block)
            del node.parent.children[node.key]
            if not self.needs_states:
                # Each node is of use by itself.
                break
            node = node.parent
        return True

    def _divide(self, budget: int, longest: int) -> tuple[int, int]:
        """How many blocks and states the budget is for, of which a prompt needs `longest` blocks at
        most. Errors: RunnerError."""
        block, state = self._rows.block_bytes, self._rows.row_bytes
        least = block + state
        if longest == 0 or budget < least:
            what = "no prompt is long enough" if longest == 0 else f"{-(-least // MB)} is the least"
            raise RunnerError(
                f"prefix_cache_mb is {budget / MB:g}; a beginning of {self.size} tokens takes "
                f"{least / MB:.3g} MB of this artifact's state, and {what}: take 0 for no cache"
            )
        if not self.needs_states:
            return budget // block, 0
        # Half of it each; but no more blocks than states can be the ends of.
        states = max(1, budget // 2 // state)
        if block == 0:
            return 0, budget // state
        blocks = min((budget - states * state) // block, states * longest)
        return blocks, (budget - blocks * block) // state
