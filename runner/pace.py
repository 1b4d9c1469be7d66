"""How long chunks of prompts and steps take, as it is learnt from those that ran, and how many
tokens of prompts may come between two steps."""

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from tokenloop.runner.program import Program

# The time of a step is the median of so many, the newest.
NEWEST_STEPS = 5
# What was not measured among so many chunks, the newest, is forgotten: it may be no longer so.
NEWEST_CHUNKS = 100
# What differs from what was expected by less than this factor may be noise, which must not add up:
# then other sizes are expected to take what was measured of them, but for DRIFT.
NOISE = 1.5
DRIFT = 1.2
# Rows may stand still for longer than was expected: what is far in its prompt takes longer, and so
# does what follows a chunk. Of so many stalls, the newest, no more than one may be too long. But no
# more than this factor is put down to that: it may have been another process.
NEWEST_STALLS = 100
MOST_OVERRUN = 1.25


@dataclass(frozen=True)
class Stall:
    """How long rows that run may stand still for the prompts of others between two steps: for so
    many `seconds`, or if that is None as long as `steps` steps take. Then no more than
    three steps' time is between two tokens."""

    seconds: float | None = None
    steps: float = 2


class Pace:
    """What is known of one program's times. All of it belongs to the thread whose turn it is."""

    def __init__(self, program: Program):
        self._program = program
        # Sizes of chunks are counted in these.
        self._unit = program.packing.multiple if program.packing else 1
        # Seconds of a chunk by its size, as it is expected now and as it was measured, which of the
        # chunks was the newest of each size, and how many there were. Seconds of the newest steps.
        self._chunks: dict[int, float] = {}
        self._measured: dict[int, float] = {}
        self._newest: dict[int, int] = {}
        self._count = 0
        self._steps: deque[float] = deque(maxlen=NEWEST_STEPS)
        # The tokens that were given last, and the seconds that they were given for. Of chunks that
        # had all of them by what factor rows stood still for longer, until the next step began.
        self._given: tuple[int, float] = 0, 0.0
        self._overruns: deque[float] = deque(maxlen=NEWEST_STALLS)
        # The newest of these chunks that is done, while no step after it is: the mark before it,
        # and its seconds.
        self._stall: tuple[Any, float] | None = None
        # What was submitted and may not be done: tokens of a chunk or None for steps, how many
        # steps or for how many seconds the chunk was given, if it has all that was given, and the
        # program's marks before and behind it.
        self._submitted: deque[tuple[int | None, float, Any, Any]] = deque()

    def add_chunk(self, tokens: int, begin: Any, end: Any) -> None:
        """A chunk of so many tokens runs between two marks of the program."""
        given, seconds = self._given
        # The fewest that a chunk can have may take longer than there is time for.
        is_full = tokens == given > self._unit
        self._submitted.append((tokens, seconds if is_full else 0.0, begin, end))

    def add_steps(self, count: int, begin: Any, end: Any) -> None:
        """So many steps run between two marks."""
        if count:
            self._submitted.append((None, count, begin, end))

    def seconds(self, stall: Stall) -> float:
        """The time that a stall may take. Before any step is known that is none."""
        self._learn()
        if stall.seconds is not None:
            return stall.seconds
        return stall.steps * statistics.median(self._steps) if self._steps else 0.0

    def tokens(self, seconds: float) -> int:
        """How many tokens of prompts take no longer than that: at least the fewest that a chunk can
        have if its prompt goes on."""
        self._learn()
        if self._overruns:
            # The second one is the longest but for one.
            overrun = sorted(self._overruns)[-2:][0]
            seconds /= min(max(1.0, overrun), MOST_OVERRUN)
        tokens = max(1, self._size(seconds)) * self._unit
        self._given = tokens, seconds
        return tokens

    def _size(self, seconds: float) -> int:
        """As `tokens`, in units, rounded down.

        Times are noisy, and a slope of two that are close says nothing. So no line goes beyond what
        was measured: one is between the largest size that fits and the next, which does not. Where
        all fit, a larger one needs no more than its share of the largest. So if a chunk takes
        fixed + slope * size, and what is expected of each size is wrong by up to a factor f, a size
        that is found takes no longer than f * seconds, or is one unit larger than what does; and it
        is no smaller than what takes seconds / f, but for one unit.
        """
        known = sorted(self._chunks.items())
        fits = [entry for entry in known if entry[1] <= seconds]
        if not fits:
            # A smaller one has at least its share.
            return int(known[0][0] * seconds / known[0][1]) if known else 1
        size, taken = fits[-1]
        for larger, longer in known:
            if larger > size:
                return size + int((larger - size) * (seconds - taken) / (longer - taken))
        # Larger ones are not known. A step beyond what is known is not a leap.
        return max(size + 1, int(min(2 * size, size * seconds / taken)))

    def _learn(self) -> None:
        """Note the times of what is done by now."""
        while self._submitted:
            tokens, given, begin, end = self._submitted[0]
            seconds = self._program.seconds(begin, end)
            if seconds is None:
                return
            self._submitted.popleft()
            if tokens is None:
                self._steps.append(seconds / given)
                if self._stall is not None:
                    stalled_at, wanted = self._stall
                    self._overruns.append(self._program.seconds(stalled_at, begin) / wanted)
                    self._stall = None
            else:
                self._note_chunk(-(-tokens // self._unit), seconds)
                self._stall = (begin, given) if given else None

    def _note_chunk(self, size: int, seconds: float) -> None:
        """Where one size takes longer than before, such as far from the beginning of a prompt, so
        do the others; half of it is put down to that."""
        if seconds <= 0:
            return
        if size in self._chunks:
            change = seconds / self._chunks[size]
            scale, may_be_noise = change**0.5, 1 / NOISE < change < NOISE
            for other, taken in self._chunks.items():
                if not may_be_noise:
                    self._measured[other] *= scale
                measured = self._measured[other]
                self._chunks[other] = min(max(taken * scale, measured / DRIFT), measured * DRIFT)
        self._count += 1
        self._chunks[size] = self._measured[size] = seconds
        self._newest[size] = self._count
        for other, count in list(self._newest.items()):
            if self._count - count >= NEWEST_CHUNKS:
                del self._chunks[other], self._measured[other], self._newest[other]
