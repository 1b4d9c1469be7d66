"""Memory that all GPUs of a group write, by torch's symmetric memory: what a package's kernels tell
those of the other ranks.

A mailbox has a flag int32 for each rank's slot, and two rooms of all ranks' slots. The kernels are
told its addresses by the tensor NAME.peers int64 [2 N + 1]: of all ranks' flags, of all ranks'
rooms, and the number of this rank (models/kernels/reduce_ranks of the exporter). NCCL is not used.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from tokenloop.runner.engines.ranks import Ranks
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.ranks import Place

# What torchrun tells each process: its number on its host.
LOCAL_RANK = "LOCAL_RANK"


def choose_device(place: Place) -> None:
    """Make the GPU of this rank's number on its host torch's own. Errors: RunnerError for fewer
    GPUs than ranks."""
    number, there = int(os.environ.get(LOCAL_RANK, place.rank)), torch.cuda.device_count()
    if 0 < there <= number:
        raise RunnerError(
            f"rank {place.rank} is for the GPU {number}, and torch sees {there}: start no more "
            "processes than there are GPUs, or export with a smaller --tensor-parallel"
        )
    if there:
        torch.cuda.set_device(number)


class Mailboxes:
    """The mailboxes of one rank. The memory is there as long as this is."""

    def __init__(
        self, entries: dict[str, dict[str, int]], ranks: Ranks, tensors: Mapping[str, Tensor],
        device: torch.device,
    ):  # fmt: skip
        """Make the mailboxes that the manifest has, by name, and write where they are into
        `tensors`. All ranks do that at once. Errors: RuntimeError of GPUs that cannot write one
        another's memory."""
        rank, count = ranks.place
        self._kept: list[Any] = []
        for name, entry in entries.items():
            slots = count * entry["slots"]
            flags = symmetric.empty(slots, dtype=torch.int32, device=device).zero_()
            room = symmetric.empty(
                2 * slots * entry["slot_bytes"], dtype=torch.uint8, device=device
            )
            handles = [symmetric.rendezvous(memory, dist.group.WORLD) for memory in (flags, room)]
            addresses = [int(address) for handle in handles for address in handle.buffer_ptrs]
            tensors[f"{name}.peers"].copy_(torch.tensor([*addresses, rank]))
            self._kept += [flags, room, *handles]
        # Nobody raises a flag before all are down.
        torch.cuda.synchronize(device)
        ranks.all(None)
