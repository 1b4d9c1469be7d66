"""Speculation: a step tries several tokens that the text so far or another model suggests, and
those that it would have chosen one by one are the sequence's.

What the text suggests the device finds, and it sees which hold, so that a round is submitted before
the host has read the one before it. A model is fed what the host has read. The host decides whether
a round tries drafts: it costs more than one that does not, and they may not hold. That changes no
token.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from tokenloop.runner.program import Program, selection_method
from tokenloop.runner.sequence import Sequence

SPECULATIONS = ("lookup", "draft")
# What drafts that do not hold may cost in all: a share of the time without any. A long run of
# drafts that hold does not pay for more than some that do not.
ALLOWED, MOST_CREDIT = 0.01, 4.0
# So many tries a model's drafts may fail in the beginning: they hold more often or less.
FIRST_TRIES = 3


class DraftCounts(NamedTuple):
    """Rounds that tried drafts, how many drafts they tried, and how many of these held."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def plus(self, more: "DraftCounts") -> "DraftCounts":
        """The counts of both together."""
        return DraftCounts(*(a + b for a, b in zip(self, more)))

    def since(self, earlier: "DraftCounts") -> "DraftCounts":
        """The counts from `earlier` on."""
        return DraftCounts(*(a - b for a, b in zip(self, earlier)))


def can_speculate(sequence: Sequence) -> bool:
    """Whether rounds can give all that the request asks for. A round has no log probabilities, and
    what restricts a token follows from the token before it."""
    request = sequence.request
    asks = request.logprobs is not None or request.prompt_logprobs
    return sequence.restriction is None and not asks


class Repetition:
    """Whether the newest two tokens of a text have followed one another before."""

    def __init__(self, ids: list[int]):
        self._newest, self._pairs = ids[-1], set(zip(ids, ids[1:]))
        self.found = False

    def add(self, token_id: int) -> None:
        """Go on by a token."""
        pair = self._newest, token_id
        self.found = pair in self._pairs
        self._pairs.add(pair)
        self._newest = token_id


class Budget:
    """What drafts have saved, less what they have cost, in rounds without drafts. It is enough for
    a first try or several, and grows with every round."""

    def __init__(self, cost: float, tries: int = 1):
        """`cost` is that of a round with drafts, in rounds without."""
        self.price(cost)
        self._credit = tries * self._loss

    def price(self, cost: float) -> None:
        """From now on a round with drafts takes so long."""
        self._loss = max(0.0, cost - 1)
        self._most = MOST_CREDIT * max(1.0, self._loss)

    @property
    def is_enough(self) -> bool:
        """Whether a try may fail."""
        return self._credit >= self._loss

    def spend(self, drafted: bool) -> None:
        """A round is submitted."""
        self._credit += ALLOWED - self._loss * drafted

    def earn(self, accepted: int) -> None:
        """Drafts were accepted."""
        self._credit = min(self._credit + accepted, self._most)


class Drafts(Protocol):
    """A model whose drafts are tried (draft_model.py). `budget` is for all sequences together: one
    that its drafts do not fit is soon found out. `wanted` are how many may be tried now, and `see`
    learns how many of so many held."""

    budget: Budget

    def wanted(self) -> int: ...
    def propose(self, ids: list[int], count: int) -> list[int]: ...
    def see(self, count: int, accepted: int) -> None: ...


class Rounds:
    """The rounds of one sequence, from its first token on. `submitted` counts them, and `counts`
    are of those that tried drafts and have been read."""

    def __init__(
        self, program: Program, sequence: Sequence, first: Any, ahead: bool,
        draft: Drafts | None = None,
    ):  # fmt: skip
        """`first` int64 [1, 1] is the token that was chosen after the prompt. With `ahead` a round
        is submitted before the one before it is read, unless its drafts are those of `draft`, which
        need the newest token. Without that they are what the text suggests."""
        self._program, self._sequence, self._first = program, sequence, first
        self._ahead, self.counts = ahead, DraftCounts()
        self._method = selection_method([sequence.request], program.manifest)
        self.submitted = 0
        # Rounds that are not read: what they give, and how many drafts they try.
        self._unread: deque[tuple[Any, int]] = deque()
        # How many tokens there are as far as rounds have been read.
        self._count = 1
        self._text = Repetition(sequence.prompt_ids)
        self._draft, self._ids = draft, list(sequence.prompt_ids)
        self._budget = Budget(program.draft_cost) if draft is None else draft.budget
        program.begin_rounds(sequence.prompt_ids, first, sequence.request)

    def tokens(self) -> Iterator[int]:
        """The sequence's tokens, until it has a `finish_reason` or as many as its limit."""
        sequence, taken = self._sequence, 0
        ids = self._read(self._first)
        while True:
            for token_id in ids:
                if sequence.finish_reason is not None:
                    return
                self._text.add(token_id)
                self._ids.append(token_id)
                taken += 1
                yield token_id
                if taken == sequence.limit:
                    return
            if not self._unread:
                self._submit(all_read=True)
            values, drafted = self._unread[0]
            count, *chosen = self._read(values)
            self._unread.popleft()
            self._count += count
            ids = chosen[:count]
            if drafted:
                # What fills a round up behind a model's drafts may hold by chance.
                accepted = min(count - 1, drafted)
                self._budget.earn(accepted)
                if self._draft is not None:
                    self._draft.see(drafted, accepted)
                self.counts = self.counts.plus(DraftCounts(1, drafted, accepted))

    def _read(self, values: Any) -> list[int]:
        """The numbers of a round, or the first token. The next round may be submitted before."""
        transfers = self._program.transfers
        transfers.prefetch(values)
        if self._ahead:
            self._submit(all_read=False)
        return transfers.download(values)

    def _submit(self, all_read: bool) -> None:
        """Submit a round, if it is needed whatever the unread ones give, if there is room for it
        whatever they give, and if it is known what a model's drafts follow."""
        program, sequence = self._program, self._sequence
        drafts, room = program.draft_tokens, program.manifest["max_seq_len"]
        most = sum(1 + drafts * (drafted > 0) for _, drafted in self._unread)
        # The furthest that the newest token's position may be.
        position = len(sequence.prompt_ids) - 1 + self._count + most
        if self._count + len(self._unread) >= sequence.limit or position >= room:
            return
        drafted, given = 0, None
        if position + drafts >= room:
            pass
        elif self._draft is None:
            drafted = drafts * (self._text.found and self._budget.is_enough)
        elif drafted := self._draft.wanted():
            if not all_read:
                return
            given = self._draft.propose(self._ids, drafted)
            given = [*given, *given[-1:] * (drafts - drafted)]
        self._budget.spend(drafted > 0)
        buffer = self.submitted % 2
        values = program.submit_round(drafted > 0, self._method, buffer, given)
        self._unread.append((values, drafted))
        self.submitted += 1
