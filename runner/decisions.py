"""What the loop decides by a clock, a client or a user."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenloop.runner.pace import Stall
    from tokenloop.runner.prefix_cache import PrefixCache
    from tokenloop.runner.sequence import Sequence


class Decisions:
    """The decisions of a process that makes them alone, or whose ranks make the same ones by
    themselves. Ranks that must be told have those of rank_decisions.py."""

    def run(
        self, sequences: Iterable["Sequence"], used: int, options: Any, stall: "Stall | None",
        cache: "PrefixCache | None",
    ) -> Iterator["Sequence"]:  # fmt: skip
        """Begin a run of Loop.tokens with these arguments; the sequences that join."""
        return iter(sequences)

    def ended(self, sequence: "Sequence") -> bool:
        """Whether a sequence has a `finish_reason`, which any thread may give it."""
        return sequence.finish_reason is not None

    def made(self, value: int) -> int:
        """The value that the loop goes on with, of which this one is by this process's clock."""
        return value

    def agree(self, value: int) -> None:
        """All ranks have this value. Errors: RunnerError where one has another."""

    def tell(self) -> None:
        """The program is called next: what was decided must be known."""
