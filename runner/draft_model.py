"""A smaller model that drafts another one's tokens: its greedy ones, K at a time.

It may be of any engine, and knows nothing of the other. Texts come to it as the host has read them,
and its drafts go back over the host.
"""

import time
from itertools import takewhile
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.prefill import ChunkedPrefill, PackedPrefill
from tokenloop.runner.program import GREEDY, Program, Selected, Step
from tokenloop.runner.row_state import RowState
from tokenloop.runner.speculation import FIRST_TRIES, Budget

# Times that drafting is tried before it is used, and how many of the last ones are timed.
TRIED, TIMED = 5, 3


class DraftModel:
    """A program of one row, which is this one's alone. A round with all the drafts that there may
    be takes `cost` rounds without. `budget` is what drafts may cost: one at a time is tried first,
    and more if all hold.

    What it has computed of a text stays, and goes on where the next text does. A full layer's keys
    lie by position, so those behind a draft that did not hold are overwritten. A ring's slots had
    what is still seen before, and what goes on with every token cannot be taken back: those are
    kept aside before the drafts are fed, and put back if not all of them hold.
    """

    def __init__(self, program: Program, count: int, round_cost: float, round_s: float):
        """`count` drafts are tried at a time at most. A round that tries them takes so many rounds
        without, which take `round_s` seconds.

        Errors: RunnerError for a program whose state cannot be read, or has no room beside it.
        """
        self.program, transfers = program, program.transfers
        self._state = RowState(program, program.manifest["max_seq_len"])
        try:
            self._state.make_room(0, 1)
        except MemoryError:
            needed = self._state.row_bytes
            raise RunnerError(
                f"the device has no room for {needed} bytes beside it: export one with shorter "
                "sequences"
            ) from None
        self._table = transfers.upload(range(program.manifest["max_seq_len"]))
        program.capture(self._table)
        program.begin(embed=False)
        if program.packing is None:
            self._prefill = ChunkedPrefill(program, self._table, False)
        else:
            self._prefill = PackedPrefill(program)
        self._drafts, self._buffer = program.empty(count), 0
        # What was computed: a text of `_kept` tokens, after which there is a copy of the state, and
        # drafts after it.
        self._fed: list[int] = []
        self._kept = 0
        self._most, self._count = count, 1
        self._round_cost, self._draft_cost = round_cost, self._measured(count) / count / round_s
        self.cost = self._cost(count)
        self.budget = Budget(self._cost(1), FIRST_TRIES)

    def _cost(self, count: int) -> float:
        return self._round_cost + count * self._draft_cost

    def wanted(self) -> int:
        """How many drafts may be tried now: twice as many as held last, if all did, and one more
        than did otherwise, or as many as there is a budget for."""
        for count in range(self._count, 0, -1):
            self.budget.price(self._cost(count))
            if self.budget.is_enough:
                return count
        return 0

    def see(self, count: int, accepted: int) -> None:
        """So many of `count` drafts held."""
        self._count = min(self._most, 2 * count if accepted == count else accepted + 1)

    def propose(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens that the model would choose after a text. There are positions for all
        of them."""
        first = self._go_back(ids)
        # If this is interrupted, nothing is known of what was computed.
        self._fed, self._kept = [], 0
        token, fed = self._feed(ids, first)
        transfers = self.program.transfers
        transfers.copy(token[:, 0], self._drafts[:1])
        for i in range(1, count):
            token, fed = self._step(fed, len(ids) + i - 1)
            transfers.copy(token[:, 0], self._drafts[i : i + 1])
        drafts = transfers.download(self._drafts[:count])
        self._fed, self._kept = [*ids, *drafts[:-1]], len(ids)
        return drafts

    def _go_back(self, ids: list[int]) -> int:
        """Make what was computed a beginning of this text, without its newest token; of how many
        tokens."""
        # Most often all that was kept is.
        same = self._kept if ids[: self._kept] == self._fed[: self._kept] else 0
        pairs = zip(self._fed[same:], ids[same:])
        same += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        same = min(same, len(ids) - 1)
        if same < len(self._fed) and self._state.whole:
            if same >= self._kept:
                self._state.put_row(0, 0)
                same = self._kept
            else:
                same = 0
        return same

    def _feed(self, ids: list[int], first: int) -> Selected:
        """Compute a text from its place `first` on, and keep the state after it; the token that
        follows."""
        program = self.program
        if first == len(ids) - 1:
            place = program.next_id(self._buffer)
            chosen = self._step(program.transfers.upload([ids[-1:]], out=place), first)
        else:
            self._prefill.drop(0)
            self._prefill.add(0, ids)
            self._prefill.prompts[0].first = first
            while self._prefill.prompts:
                done = self._prefill.advance()
            ((_, logits),) = done
            chosen = program.select(logits, self._buffer)
        if self._state.whole:
            self._state.keep_row(0, 0)
        return chosen

    def _step(self, fed: Any, position: int) -> Selected:
        """A step that is fed what lies in the newest buffer; it writes the other one."""
        self._buffer = 1 - self._buffer
        step = Step(self._table[position : position + 1], position, GREEDY)
        return self.program.step(fed, step, self._buffer)

    def _measured(self, count: int) -> float:
        """Seconds that `count` drafts take after a short text."""
        taken = []
        for _ in range(TRIED):
            begin = time.perf_counter()
            self.propose([0], count)
            taken.append(time.perf_counter() - begin)
        return min(taken[-TIMED:])
