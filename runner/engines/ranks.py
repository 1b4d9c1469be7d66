"""A group of ranks by torch.distributed: what compiled methods gather, and what rank 0 tells all.

A method's operator gather_ranks (models/ranks.py declares it as well) comes here. torch's own
collectives hang within a package, in torch 2.13 and in fewer than 1,000 calls.
"""

import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenloop.runner import process
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.ranks import LostRank, Place
from tokenloop.runner.transfers import Copies

NAME = "tokenloop::gather_ranks"
# How long a rank waits for another that lives: it may still read its weights.
TIMEOUT = timedelta(minutes=15)
# How long a process may take to end.
ENDING_S = 3.0
# How often a rank looks whether the others live, and its exit status where they do not.
WATCHING_S = 0.2
LOST = 2

if not hasattr(torch.ops.tokenloop, "gather_ranks"):
    torch.library.define(NAME, "(Tensor x, int ranks) -> Tensor")


@torch.library.impl(NAME, "CPU")
def _gather(x: Tensor, ranks: int) -> Tensor:
    return Ranks.joined.gather_within(x)


class Ranks:
    """The group that this process has joined; there is one in a process, `joined`."""

    joined: "Ranks | None" = None

    def __init__(self, place: Place, received: Copies, backend: str = "gloo"):
        """Join the others. `received` counts what comes from them, and `backend` is
        torch.distributed's.

        Errors: RunnerError where they do not come.
        """
        self.place, self.received = place, received
        # What rank 0 told in a channel.
        self.told = Copies()
        # What ended a gathering within a method.
        self._fault: BaseException | None = None
        try:
            if Ranks.joined is None:
                dist.init_process_group(backend, timeout=TIMEOUT)
            # Where each rank is, so that others see whether it lives.
            own = socket.gethostname(), os.getpid()
            found: list[Any] = [None] * place.count
            dist.all_gather_object(found, own)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunnerError(
                f"rank {place.rank} of {place.count} does not reach the others: {reason}"
            ) from None
        self._where = found
        Ranks.joined = self

    def gather(self, x: Tensor) -> Tensor:
        """[N, ...] of each rank's x [...]. Errors: RunnerError where a rank is lost."""
        out = x.new_empty(self.place.count, *x.shape)
        self.run(dist.all_gather_single, out.flatten(), x.contiguous().flatten())
        self.received.count += 1
        self.received.bytes += out.nbytes - x.nbytes
        return out

    def gather_within(self, x: Tensor) -> Tensor:
        """As `gather`, for a method that compiled code runs. That would make another error of any,
        and a line on standard error: so the method goes on, with zeros, and `check` comes after."""
        if self._fault is None:
            try:
                return self.gather(x)
            except BaseException as error:
                self._fault = error
        return x.new_zeros(self.place.count, *x.shape)

    def check(self) -> None:
        """Errors: what ended a gathering within the method that has just run, such as a rank that
        is lost."""
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def all(self, value: Any) -> list[Any]:
        """What each rank has, in their order. Errors: as of `gather`."""
        values: list[Any] = [None] * self.place.count
        self.run(dist.all_gather_object, values, value)
        return values

    def watch(self) -> None:
        """From now on see whether the others live, and end this process some seconds after one has
        ended: a kernel that waits for another rank's does so for ever. Who ends at the same time
        for the same reason has ended by then."""
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def _watch(self) -> None:
        while not self._gone():
            time.sleep(WATCHING_S)
        time.sleep(ENDING_S)
        error = self._lost("a process has ended")
        if error.tells:
            process.say(f"error: {error}")
        os._exit(LOST)

    def share(self, value: Any) -> Any:
        """What rank 0 has. Errors: as of `gather`."""
        values = [value]
        self.run(dist.broadcast_object_list, values, 0)
        return values[0]

    def channel(self) -> "Channel":
        """A channel from rank 0 to the others. All ranks make it at the same time. Errors: as of
        `gather`."""
        return Channel(self)

    def run(self, collective: Any, *arguments: Any) -> None:
        """Call what needs all ranks. Errors: as of `gather`."""
        try:
            collective(*arguments)
        except RuntimeError as error:
            raise self._lost(str(error).strip().splitlines()[0]) from None

    def _lost(self, reason: str) -> LostRank:
        """Which ranks have ended, as far as this host can tell. The first that is left tells it."""
        own, until = self.place.rank, time.monotonic() + ENDING_S
        # A process that is killed closes its connections before it has ended.
        while not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(0.01)
        if not gone:
            return LostRank(f"rank {own} has lost the others: {reason}", True)
        one, names = len(gone) == 1, ", ".join(map(str, gone))
        line = f"rank{'' if one else 's'} {names} {'has' if one else 'have'} ended"
        return LostRank(line, set(range(own)) <= set(gone))

    def _gone(self) -> list[int]:
        return [i for i, (host, pid) in enumerate(self._where) if _has_ended(host, pid)]


class Channel:
    """Messages from rank 0 to the others, in a group of its own: they may come while methods
    gather, and on a GPU they stay on the hosts."""

    # Most messages fit one piece with their length before them.
    PIECE, LENGTH = 1024, 4

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._piece = torch.zeros(self.PIECE, dtype=torch.uint8)
        found: list[dist.ProcessGroup] = []
        ranks.run(lambda: found.append(dist.new_group(backend="gloo", timeout=TIMEOUT)))
        (self._group,) = found

    def send(self, data: bytes) -> None:
        """Tell all others, of rank 0. Errors: RunnerError where one is lost."""
        head = len(data).to_bytes(self.LENGTH, "little") + data[: self.PIECE - self.LENGTH]
        self._piece[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(self._piece)
        if rest := data[self.PIECE - self.LENGTH :]:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))
        self._ranks.told.count += 1
        self._ranks.told.bytes += len(data)

    def receive(self) -> bytes:
        """What rank 0 sends next, of another rank. Errors: RunnerError where one is lost."""
        self._broadcast(self._piece)
        piece = self._piece.numpy().tobytes()
        size = int.from_bytes(piece[: self.LENGTH], "little")
        data = piece[self.LENGTH : self.LENGTH + size]
        if size > len(data):
            rest = torch.empty(size - len(data), dtype=torch.uint8)
            self._broadcast(rest)
            data += rest.numpy().tobytes()
        return data

    def _broadcast(self, piece: Tensor) -> None:
        self._ranks.run(lambda: dist.broadcast(piece, 0, group=self._group))


def _has_ended(host: str, pid: int) -> bool:
    """Whether a process of this host is gone, or is dead and nobody has looked at it."""
    if host != socket.gethostname():
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
