"""What does each launch of a layer's decode step cost on a CUDA GPU? `python -m
benchmarks.step_launches --config qwen3.5-35b-a3b` prints, for every launch of a layer of each kind,
its bytes, the time that they take at the memory's speed, and what it took.

The step is benchmarks/fused_step.py's, with random weights, in a graph. `alone us` is a kernel's
time where none overlap, and `step us` the time from the end of the kernel before it to its own end
in the graph whose kernels overlap, as the profiler sees them. Figures are means of all layers of a
kind but the network's first, each the median of several replays. The last line of each kind has
sums, and the time of a step without the profiler is printed above. It ends with one JSON line.
"""

import argparse
import itertools
import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda_common import device_us, origin, profiled, save
from benchmarks.fused_step import captured, make_step, replay
from tokenloop.export.launches.cuda_step import CudaStep
from tokenloop.export.launches.lowering import storage_of
from tokenloop.models.kernels.launch.launches import Launch, kept_launches

BANDWIDTH = 4.3e12  # that an H200 reads with
REPLAYS = 7


def launches_of(step: CudaStep, position: int) -> list[list[Launch]]:
    """The launches of each layer, and those after the last of them."""
    size, ends, finish = step.norm.weight.shape[0], [], step.finish
    hidden = torch.ones(1, 1, size, dtype=torch.bfloat16, device="cuda")
    with kept_launches() as launches, torch.no_grad():

        def finished(*args):
            branches = finish(*args)
            ends.append(len(launches))
            return branches

        step.finish = finished
        step(hidden, torch.full((1,), position, device="cuda"))
        del step.finish
    return [launches[a:b] for a, b in itertools.pairwise([0, *ends, len(launches)])]


def bytes_of(launch: Launch, state: dict[int, str], position: int, share: float) -> float:
    """What a launch has to move of weights and state, by the names of `state` by storage. Of
    experts' matrices it reads that `share`."""
    size, seen = 0.0, set()
    for x in (*launch.arguments, *launch.named.values()):
        name = state.get(storage_of(x)) if isinstance(x, Tensor) else None
        if name is None or name in seen or "semaphores" in name:
            continue
        seen.add(name)
        nbytes = math.prod(x.shape) * x.element_size()
        if x.ndim == 3 and ".experts." in name:
            size += nbytes * share
        elif name.endswith((".conv", ".recurrent")):
            size += 2 * nbytes
        elif x.ndim == 4:
            size += nbytes * (position + 1) / x.shape[1]
        else:
            size += nbytes
    return size


def kernels(events: list[dict], count: int) -> list[list[dict]]:
    """The kernels of each replay, in order. Errors: ValueError where a replay has not `count`."""
    found = [event for event in events if event["cat"] == "kernel"]
    if len(found) != REPLAYS * count:
        raise ValueError(f"{len(found)} kernels ran in {REPLAYS} replays of {count} launches")
    return [found[i : i + count] for i in range(0, len(found), count)]


def ends(run: list[dict]) -> list[float]:
    return list(itertools.accumulate((event["ts"] + event["dur"] for event in run), max))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_launches", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--config", default="qwen3.5-35b-a3b", help="a name in benchmarks/configs")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="of the weights")
    parser.add_argument("--position", type=int, default=256, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    step = make_step(options.config, options.layers, 1, 1024, options.bits)
    named = itertools.chain(step.named_parameters(), step.named_buffers())
    state = {storage_of(x): name for name, x in named}
    moe = next((layer.moe for layer in step.layers if layer.moe is not None), None)
    share = 1.0 if moe is None else moe.num_experts_per_tok / moe.num_experts
    layers = launches_of(step, options.position)
    flat = list(itertools.chain.from_iterable(layers))
    times: dict[bool, list[float]] = {}
    result = origin("step_launches") | {"config": options.config, "bits": options.bits}
    for overlap in (False, True):
        graph, _, where, _ = captured(step, options.position, 1, overlap)
        ms = statistics.median(device_us(lambda graph=graph: replay(graph), 8, 9)) / 1e3
        result["overlap_ms" if overlap else "ms"] = ms

        def replays(graph=graph) -> None:
            for _ in range(REPLAYS):
                graph.replay()

        runs = kernels(profiled(replays), len(flat))
        if overlap:
            took = [
                [b - a for a, b in itertools.pairwise([run[0]["ts"], *ends(run)])] for run in runs
            ]
        else:
            took = [[event["dur"] for event in run] for run in runs]
        times[overlap] = [statistics.median(each) for each in zip(*took)]
    total = sum(bytes_of(each, state, options.position, share) for each in flat)
    result |= {"bytes": total, "floor_ms": total / BANDWIDTH * 1e3}
    print(
        f"{torch.cuda.get_device_name()}, {options.config}, {len(step.layers)} layers, "
        f"{len(flat)} launches: {result['ms']:.3f} ms, overlapping {result['overlap_ms']:.3f}, "
        f"floor {result['floor_ms']:.3f}"
    )
    kinds, begin = defaultdict(list), 0
    for i, launches in enumerate(layers):
        last = i == len(step.layers)
        kind = "end" if last else type(step.layers[i]).__name__
        if last or i:
            kinds[kind].append((launches, begin))
        begin += len(launches)
    result["launches"] = {}
    for kind, members in kinds.items():
        rows = []
        for j, launch in enumerate(members[0][0]):
            nbytes = bytes_of(launch, state, options.position, share)
            alone, step_us = (
                statistics.mean(times[overlap][begin + j] for _, begin in members)
                for overlap in (False, True)
            )
            grid = math.prod(launch.grid)
            rows.append([launch.kernel.__name__, grid, nbytes, alone, step_us])
        result["launches"][kind] = rows
        print(f"{kind}: {len(rows)} launches")
        sums = [sum(column) for column in list(zip(*rows))[2:]]
        for name, grid, nbytes, alone, step_us in [*rows, ["sum", 0, *sums]]:
            floor = nbytes / BANDWIDTH * 1e6
            print(
                f"  {name:<32}{grid:>6}{nbytes / 1e6:>9.3f} MB  floor {floor:6.2f}  alone "
                f"{alone:6.2f} us  step {step_us:6.2f} us  gap {step_us - floor:6.2f}"
            )
    save(result, options.output)


if __name__ == "__main__":
    main()
