"""The ranks of a group: processes that torchrun starts, each with a part of every layer.

All of them run the same loop for the same requests, and get the same tokens. Rank 0 reads what is
asked and prints. Imports no torch: a command knows its rank before it knows the model.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from tokenloop.runner import process
from tokenloop.runner.errors import RunnerError

T = TypeVar("T")
# What torchrun tells each process.
RANK, COUNT = "RANK", "WORLD_SIZE"
# A fault that is every rank's is told by rank 0, whose end ends the others before they tell it.
PATIENCE_S = 2.0
# Several threads of a process may find that a rank is lost.
_TELLING, _LOST = threading.Lock(), []


class Place(NamedTuple):
    """The rank number `rank` of `count`."""

    rank: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this is the rank that reads and prints."""
        return self.rank == 0

    def read(self, function: Callable[[], T]) -> T | None:
        """What the function gives, of the rank that leads. None of the others, whose standard input
        and output are closed."""
        if self.leads:
            return function()
        process.discard(sys.stdout)
        return None


def place() -> Place:
    """This process's place, as torchrun set it. Errors: RunnerError for half of it, or nonsense."""
    found = [os.environ.get(name) for name in (RANK, COUNT)]
    if found == [None, None]:
        return Place(0, 1)
    try:
        rank, count = map(int, found)
    except (TypeError, ValueError):
        rank, count = -1, 0
    if not 0 <= rank < count:
        raise RunnerError(
            f"{RANK} is {found[0]!r} and {COUNT} is {found[1]!r}; both are torchrun's: a number "
            "below another one"
        )
    return Place(rank, count)


class LostRank(RunnerError):
    """Another rank has ended. Only one of those that are left `tells` it."""

    def __init__(self, line: str, tells: bool):
        super().__init__(line)
        self.tells = tells


def tell(program: str, error: RunnerError) -> None:
    """Print a fault to standard error, once for all ranks."""
    if isinstance(error, LostRank):
        with _TELLING:
            if error.tells and not _LOST:
                process.say(f"{program}: error: {error}")
            _LOST.append(error)
        return
    if os.environ.get(RANK, "0") != "0":
        time.sleep(PATIENCE_S)
    process.say(f"{program}: error: {error}")


def leave(status: int) -> int:
    """The exit status again; one of several processes ends here, at once. torch takes seconds to
    take a group of ranks down."""
    if os.environ.get(COUNT, "1") == "1":
        return status
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def end_ranks(program: str, error: Exception) -> None:
    """Print a fault that some thread of this process has met, and end the process, and so the
    other ranks."""
    if not isinstance(error, RunnerError):
        error = RunnerError(f"{type(error).__name__}: {error}")
    tell(program, error)
    leave(2)


def check_ranks(directory: Any, manifest: dict[str, Any]) -> Place:
    """This process's place among those that the artifact needs. Errors: RunnerError where they are
    not as many."""
    own = place()
    needed = manifest.get("tensor_parallel", {}).get("ranks", 1)
    if own.count != needed:
        right = (
            f"torchrun --nproc-per-node {needed} runner/run.py"
            if needed > 1
            else f"leave out torchrun, or export it with --tensor-parallel {own.count}"
        )
        raise RunnerError(
            f"{directory} is for {needed} process{'es' * (needed > 1)}, and there "
            f"{'are' if own.count > 1 else 'is'} {own.count}: {right}"
        )
    return own
