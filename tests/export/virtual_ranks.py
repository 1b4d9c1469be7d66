"""Ranks that are processes of this machine, with mailboxes in memory that they share, at the same
addresses in all of them: Triton's interpreter runs the kernels of all ranks at once, and they wait
for one another as they do on GPUs."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence

import torch

from tokenloop.export.launches.cuda_step import CudaStep

DEADLINE_S = 120


def connect(steps: Sequence[CudaStep]) -> list[torch.Tensor]:
    """Make the mailboxes of all ranks' steps, and tell the steps. The result must live as long."""
    kept, ranks = [], len(steps)
    for name, entry in steps[0].mailboxes().items():
        slots = ranks * entry["slots"]
        flags = [torch.zeros(slots, dtype=torch.int32).share_memory_() for _ in steps]
        size = 2 * slots * entry["slot_bytes"]
        rooms = [torch.full((size,), 0xFF, dtype=torch.uint8).share_memory_() for _ in steps]
        addresses = [x.data_ptr() for x in (*flags, *rooms)]
        for rank, step in enumerate(steps):
            step.get_submodule(name).peers.copy_(torch.tensor([*addresses, rank]))
        kept += flags + rooms
    return kept


def run(function: Callable[[int], torch.Tensor], shape: Sequence[int], ranks: int) -> torch.Tensor:
    """[N, ...] of function(rank), a float32 tensor of the `shape`, each in a process of its own."""
    found = torch.full((ranks, *shape), float("nan")).share_memory_()

    def work(rank: int) -> None:
        try:
            found[rank] = function(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(ranks)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(DEADLINE_S)
    ended = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    assert ended == [0] * ranks
    return found
