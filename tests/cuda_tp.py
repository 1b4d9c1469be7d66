"""The ranks' sum over several GPUs of one host, as a decode step has it: in a captured graph, over
torch's symmetric memory.

`torchrun --nproc-per-node 2 tests/cuda_tp.py` prints a line of JSON for each size: microseconds of
one sum with its residual and norm, and of NCCL's all-reduce alone in the same kind of graph. It
compares all bits of 10,000 sums with those of the other ranks and of the reference.
"""

import json
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from tokenloop.models.kernels.reduce_ranks.operator import reduce_add_norm
from tokenloop.models.kernels.reduce_ranks.reference import reduce_add_norm as reference

SUMS, REPLAYS = 200, 50
SIZES = (1, 2560), (1, 5376), (32, 5376)


def peers_of(rows: int, size: int, rank: int, ranks: int) -> tuple[torch.Tensor, list]:
    """What reduce_add_norm takes as peers, and what must live as long."""
    group = dist.group.WORLD
    flags = symmetric.empty(ranks * rows, dtype=torch.int32, device="cuda").zero_()
    rooms = symmetric.empty(2 * ranks * rows * size, dtype=torch.bfloat16, device="cuda")
    handles = [symmetric.rendezvous(memory, group) for memory in (flags, rooms)]
    addresses = [int(address) for handle in handles for address in handle.buffer_ptrs]
    return torch.tensor([*addresses, rank], device="cuda"), [flags, rooms, *handles]


def graph_of(function: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(SUMS):
            function()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """The median of what one sum takes."""
    times = []
    for _ in range(REPLAYS):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / SUMS)
    return round(statistics.median(times), 2)


def measure(rows: int, size: int, rank: int, ranks: int) -> dict:
    def normal(*shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    peers, _kept = peers_of(rows, size, rank, ranks)
    epochs = torch.zeros(rows, dtype=torch.int32, device="cuda")
    parts = [normal(rows, size, seed=r + 1) for r in range(ranks)]
    x, weight, post = normal(rows, size, seed=90), normal(size, seed=91), normal(size, seed=92)
    own, state = parts[rank], x.clone()
    torch.cuda.synchronize()
    dist.barrier()
    results = []

    def step() -> None:
        total, h = reduce_add_norm(state, own, post, None, weight, peers, epochs, eps=1e-6)
        results[:] = total, h
        state.copy_(h)  # the next sum depends on this one

    graph = graph_of(step, torch.cuda.Stream())
    time = microseconds(graph)
    # Sums as the reference makes them, with what is now the residual.
    before = state.clone()
    graph.replay()
    torch.cuda.synchronize()
    for _ in range(SUMS):
        before = reference(before, parts, post, None, weight, eps=1e-6)[1]
    difference = (before.float() - state.float()).abs().max().item()
    all_states = [torch.empty_like(state) for _ in range(ranks)]
    dist.all_gather(all_states, state)
    given = own.clone()
    nccl = microseconds(graph_of(lambda: dist.all_reduce(given), torch.cuda.Stream()))
    return {
        "ranks": ranks, "rows": rows, "size": size, "us": time, "nccl_us": nccl,
        "sums": int(epochs[0]), "ranks_equal": all(torch.equal(each, state) for each in all_states),
        "difference": difference,
    }  # fmt: skip


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    for rows, size in SIZES:
        found = measure(rows, size, rank, ranks)
        if rank == 0:
            print(json.dumps(found), flush=True)
        assert found["ranks_equal"], found
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
