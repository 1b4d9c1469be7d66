"""What bounds the products of a decode step with packed weights, and which tiles are best?
`python -m benchmarks.packed_step` prints, for each product of Gemma 4 31B and 1 and 32 rows: the
floor of the bytes, the time of a kernel that only reads the words, the operators' own tiles, and
the best of others.

The kernels are compiled by processes of their own, side by side. Then all ways of a product take
turns in one process, in captured graphs over copies of the weight that no L2 holds.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import product as every
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.cuda_common import (
    Matrix,
    capture,
    device_us,
    kernel_options,
    kernel_parser,
    origin,
    read_bandwidth,
    save,
)
from benchmarks.kernels_cuda import GEMMA4_31B, copies_of, describe
from tokenloop.models.kernels.linear.linear_tiles import LinearTiles, linear_tiles
from tokenloop.models.kernels.linear.operator import launch_linear
from tokenloop.models.kernels.linear.packing import FLOAT8, SPAN_WORDS
from tokenloop.models.kernels.linear.triton_packing import WORDS

KINDS = {"int4": 4, "int8": 8, "fp8": 8}
# How many of them a step has.
COUNTS = dict(zip((matrix.name for matrix in GEMMA4_31B), (50, 50, 10, 10, 60, 60, 1)))
COMPILERS = 14  # processes
TURNS = 3


@triton.jit
def read_kernel(w_ptr, y_ptr, width, steps, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """Read BLOCK_N rows of `steps` spans of words as a product's program does, and nothing else."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * steps
    seen = tl.zeros([BLOCK_N, WORDS], tl.int16)
    for i in tl.range(begin, begin + steps, num_stages=STAGES):
        offsets = n[:, None].to(tl.int64) * width + i * WORDS + tl.arange(0, WORDS)[None, :]
        seen ^= tl.load(w_ptr + offsets)
    tl.store(y_ptr + tl.program_id(0), tl.sum(seen.to(tl.int32)))


def ways(matrix: Matrix, rows: int, bits: int) -> list[LinearTiles]:
    """Tiles of a product: the operators' own, then fewer parts and longer pipelines."""
    own = linear_tiles(rows, matrix.outputs, matrix.inputs, bits, torch.bfloat16, matrix.gated)
    if rows == 1:
        shapes = [(32, 2, 4), (32, 2, 6), (64, 4, 4), (64, 4, 6)]
        shapes = [(16, 2, 4), (32, 2, 4), (32, 4, 4)] if matrix.gated else shapes
    else:
        shapes = [(64, 4, 4), (128, 4, 3), (128, 8, 3)]
        shapes = [(32, 4, 3), (64, 4, 2), (64, 8, 3)] if matrix.gated else shapes
    parts = (1,) if matrix.outputs >= 10_000 else (2, 3)
    tiles = [
        LinearTiles(True, block_n, 128, splits, warps, stages)
        for (block_n, warps, stages), splits in every(shapes, parts)
    ]
    return list(dict.fromkeys([own, *tiles]))


def weights(matrix: Matrix, kind: str) -> tuple[Tensor, Tensor]:
    """Any words, and scales."""
    bits = KINDS[kind]
    shape = matrix.rows, matrix.inputs * bits // 16
    words = torch.randint(-(2**15), 2**15, shape, device="cuda", dtype=torch.int16)
    if bits == 4:
        groups = matrix.inputs // 128, matrix.rows
        return words, torch.full(groups, 1e-3, device="cuda", dtype=torch.bfloat16)
    # 0xBFBF: no byte is a float8 that is no number.
    words = (words & -16449).view(FLOAT8) if kind == "fp8" else words
    return words, torch.full((1, matrix.rows), 1e-3, device="cuda")


def calls_of(matrix: Matrix, kind: str, rows: int, words: Tensor, scale: Tensor) -> dict:
    """What is measured, by name, with these weights."""
    x = torch.ones(rows, matrix.inputs, device="cuda", dtype=torch.bfloat16)
    semaphores = torch.zeros(100_000, device="cuda", dtype=torch.int32)
    activation = "gelu_tanh" if matrix.gated else None
    calls: dict[str, Callable[[], object]] = {}
    for i, tiles in enumerate(ways(matrix, rows, KINDS[kind])):
        calls[describe(tiles, i == 0)] = lambda tiles=tiles: launch_linear(
            x, words, scale, None, semaphores, activation=activation, tiles=tiles
        )
    if rows == 1:
        seen = torch.empty(matrix.rows, device="cuda", dtype=torch.int32)
        width = words.view(torch.int16).shape[1]
        parts = 1 if matrix.outputs >= 10_000 else 4
        steps = width // SPAN_WORDS // parts
        calls["read"] = lambda: read_kernel[(matrix.rows // 64, parts)](
            words.view(torch.int16), seen, width, steps, BLOCK_N=64, STAGES=3, num_warps=2
        )
    return calls


def compile_part(kind: str, part: int) -> None:
    """Run each call once whose number this process takes."""
    # The kernels of full layers' are among the others'.
    matrices = [matrix for matrix in GEMMA4_31B if "full" not in matrix.name]
    number = 0
    for matrix, rows in every(matrices, (1, 32)):
        for call in calls_of(matrix, kind, rows, *weights(matrix, kind)).values():
            number += 1
            if number % COMPILERS == part:
                call()
    torch.cuda.synchronize()


def measure(matrix: Matrix, kind: str, rows: int, repeats: int) -> dict[str, float]:
    """Microseconds of each way."""
    copies = copies_of(list(weights(matrix, kind)))
    all_calls = [calls_of(matrix, kind, rows, *copy) for copy in copies]
    graphs = {name: capture([calls[name] for calls in all_calls])[0] for name in all_calls[0]}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(TURNS):
        for name, graph in graphs.items():
            times[name] += device_us(graph.replay, len(copies), repeats)
    return {name: statistics.median(of_name) for name, of_name in times.items()}


def main() -> None:
    parser = kernel_parser("packed_step", __doc__.split("\n\n")[0], repeats=3)
    parser.add_argument("--kind", choices=KINDS, default="int4", help="(default: %(default)s)")
    parser.add_argument("--compile", type=int, metavar="PART", help=f"one of {COMPILERS} processes")
    options = kernel_options(parser, None)
    if options.compile is not None:
        compile_part(options.kind, options.compile)
        return
    command = [sys.executable, "-m", "benchmarks.packed_step", "--kind", options.kind, "--compile"]
    root = Path(__file__).resolve().parents[1]
    compilers = [subprocess.Popen([*command, str(i)], cwd=root) for i in range(COMPILERS)]
    failed = sum(process.wait() != 0 for process in compilers)
    if failed:
        print(f"{failed} of {COMPILERS} processes failed to compile their kernels", flush=True)
    bandwidth, results = read_bandwidth(), []
    print(f"a product of a vector reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    for rows in (1, 32):
        total = dict.fromkeys(("floor", "own", "best"), 0.0)
        for matrix in GEMMA4_31B:
            times = measure(matrix, options.kind, rows, options.repeats)
            size = matrix.rows * matrix.inputs * KINDS[options.kind] / 8
            size += matrix.rows * matrix.inputs / 128 * 2 if options.kind == "int4" else 0
            products = sorted((us, way) for way, us in times.items() if way != "read")
            own = next(us for us, way in products if way.endswith("*"))
            figures = {"floor": 1e6 * size / bandwidth, "own": own, "best": products[0][0]}
            for name, us in figures.items():
                total[name] += us * COUNTS[matrix.name] / 1e3
            read = f" read {times['read']:6.1f}" if "read" in times else ""
            best = "; ".join(f"{us:.1f} {way}" for us, way in products[:3])
            text = " ".join(f"{name} {us:6.1f}" for name, us in figures.items())
            print(f"{rows:2} {matrix.name:16} {text}{read}  {best}", flush=True)
            results.append({"rows": rows, "name": matrix.name, **figures, "us": times})
        print(f"{rows:2} rows, ms of a step's products: {json.dumps(total)}", flush=True)
    save({**origin("packed_step"), "kind": options.kind, "results": results}, options.output)


if __name__ == "__main__":
    main()
