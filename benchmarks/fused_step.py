"""How long does the network's part of a decode step take on a CUDA GPU, without a package?
`python -m benchmarks.fused_step --config qwen3-4b` captures a shape's step of
export/launches/cuda_step.py with random weights in a graph, as the runner does, and times its
replay. Kernels and their tiles can be tried without an export. It prints milliseconds of a step,
with kernels that overlap and without, and one JSON line.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.cuda_common import (
    CONFIGS,
    config_argument,
    device_us,
    kernel_times,
    origin,
    profiled,
    save,
)
from tokenloop.export.launches.cuda_step import CudaStep
from tokenloop.export.random_weights import make_parameters
from tokenloop.models import by_model_type
from tokenloop.models.kernels.launch.dependent_launch import WAITING
from tokenloop.runner.engines.programmatic_launch import let_overlap

REPLAYS = 8


def make_step(name: str, layers: int, batch: int, max_seq_len: int, bits: int) -> CudaStep:
    """The fused step of the first `layers` layers of a shape of benchmarks/configs."""
    keys = json.loads((CONFIGS / f"{name}.json").read_text())
    module = by_model_type()[keys["model_type"]]
    keys["num_hidden_layers"] = min(layers, keys["num_hidden_layers"])
    if "layer_types" in keys:
        keys["layer_types"] = keys["layer_types"][: keys["num_hidden_layers"]]
    config = module.Config.from_dict(keys)
    with torch.device("meta"):
        network = module.Network(config, max_seq_len, batch, torch.bfloat16)
    make_parameters(network, torch.device("cuda"), torch.bfloat16)
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    return CudaStep(network.to("cuda").eval(), bits).cuda()


def captured(step: CudaStep, position: int, batch: int, overlap: bool) -> tuple:
    """A graph of a step, its logits, and how many of its dependencies are programmatic."""
    size = step.norm.weight.shape[0]
    hidden = torch.ones(batch, 1, size, dtype=torch.bfloat16, device="cuda")
    where = torch.full((batch,), position, device="cuda")
    with torch.no_grad():
        step(hidden, where)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            logits = step(hidden, where)
    count = let_overlap(graph, WAITING) if overlap else 0
    graph.instantiate()
    return graph, logits, where, count


def replay(graph: torch.cuda.CUDAGraph) -> None:
    for _ in range(REPLAYS):
        graph.replay()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fused_step", description=__doc__.split("\n\n")[0]
    )
    config_argument(parser, "qwen3-4b")
    parser.add_argument("--layers", type=int, default=1000, metavar="N", help="(default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="of the weights")
    parser.add_argument("--max-seq-len", type=int, default=1024, metavar="N")
    parser.add_argument("--position", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=9, metavar="N")
    parser.add_argument("--kernels", action="store_true", help="print the time of each kernel")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    rows = []
    for batch in options.batch:
        step = make_step(options.config, options.layers, batch, options.max_seq_len, options.bits)
        row, given = {"config": options.config, "batch": batch, "bits": options.bits}, {}
        for overlap in (False, True):
            graph, logits, where, count = captured(step, options.position, batch, overlap)
            us = device_us(lambda graph=graph: replay(graph), REPLAYS, options.repeats)
            row["overlap_ms" if overlap else "ms"] = statistics.median(us) / 1e3
            # At position 0 a hybrid's states begin anew.
            where.zero_()
            graph.replay()
            given[overlap] = logits.clone()
            if options.kernels and not overlap:
                where.fill_(options.position)
                kernels = kernel_times(profiled(graph.replay))
        row |= {"programmatic": count, "identical": torch.equal(given[False], given[True])}
        print(
            f"{options.config} x {batch}, {options.bits or 16} bits: {row['ms']:.3f} ms, "
            f"overlapping {row['overlap_ms']:.3f} ({count} dependencies), "
            f"{'identical' if row['identical'] else 'DIFFERENT'}",
            flush=True,
        )
        if options.kernels:
            for name, count, us in kernels:
                print(f"{us:9.2f} us  {count:6.1f} x  {name[:90]}")
        rows.append(row)
        del step, graph, logits, given
    save({**origin("fused_step"), "rows": rows}, options.output)


if __name__ == "__main__":
    main()
