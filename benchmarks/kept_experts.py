"""How fast are routed experts as a checkpoint has them, against bfloat16, on a CUDA GPU? `python -m
benchmarks.kept_experts` checks them, and prints medians of a step and of chunks.

The shape is gpt-oss-20b's: 32 experts, of which a token chooses 4, of 2880 and 2880. Calls choose
other experts in turns, so that no weight is still in the L2. The floor is the weights' bytes over
4.2 TB/s, of those that are chosen. `--sweep` measures other cuts of a step, and `--dry` only
checks, small, in Triton's interpreter. JSON goes to $OUT, a directory, where that is set.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from benchmarks.cuda_common import median_us, origin
from tokenloop.models.kernels.experts import operator, packing
from tokenloop.models.kernels.experts.chunk_tiles import ChunkTiles, Tiles
from tokenloop.models.kernels.experts.step_tiles import StepTiles, down_tiles

BANDWIDTH = 4.2e12
ERROR = 1e-2  # of the largest value
TOKENS = 1, 4, 128, 1024
SWEPT = [(n, k) for n in (4, 8, 16) for k in (512, 1024, 2048)]


class Work:
    """Tables of every kind with the options of each, of `experts` of size x inner."""

    def __init__(self, experts: int, choices: int, size: int, inner: int, device: str):
        self.experts, self.choices, self.size, self.device = experts, choices, size, device
        self.generator = torch.Generator(device).manual_seed(0)
        shapes = (experts, 2 * inner, size), (experts, size, inner)
        self.biases = {
            "gate_up_bias": self.normal(*shapes[0][:2]), "down_bias": self.normal(*shapes[1][:2]),
            "activation": "clamped_swiglu",
        }  # fmt: skip
        words, powers = zip(*map(self.float4, shapes))
        scales = dict(zip(("gate_up_scale", "down_scale"), powers))
        floats = [packing.dequantize(*table).bfloat16() for table in zip(words, powers)]
        # The same values, which have few bits. 2880 has groups of 64, and none of 128.
        values = [table.clamp(-448, 448).to(torch.float8_e4m3fn) for table in floats]
        ones = [torch.ones(*shape[:2], shape[2] // 64, device=device) for shape in shapes]
        self.kinds: dict[str, tuple[list[Tensor], dict]] = {
            "bfloat16": (floats, {}), "float4": (list(words), scales),
            "float8, groups": (values, dict(zip(scales, ones))),
        }  # fmt: skip

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).bfloat16()

    def float4(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        given = {"generator": self.generator, "device": self.device}
        *rows, inputs = shape
        words = torch.randint(-(2**15), 2**15, (*rows, inputs // 4), **given).to(torch.int16)
        return words, torch.randint(121, 125, (*rows, inputs // 32), **given).to(torch.uint8)

    def inputs(self, tokens: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, and experts from `first` on for the first of them."""
        x, weights = self.normal(tokens, self.size), self.normal(tokens, self.choices).softmax(-1)
        chosen = first + torch.arange(tokens * self.choices, device=self.device)
        return x, chosen.view(tokens, self.choices) % self.experts, weights

    def call(self, kind: str, inputs: tuple[Tensor, ...], **options) -> Tensor:
        tables, scales = self.kinds[kind]
        given = scales | self.biases | options
        if len(inputs[0]) <= 4:
            return operator.experts(*inputs, *tables, **given)
        count = torch.tensor([len(inputs[0])], dtype=torch.int32, device=self.device)
        return operator.launch_experts_chunk(*inputs, *tables, count, **given)


def errors(work: Work, tokens: int, **options) -> Iterator[tuple[str, float]]:
    """How far each kind is from bfloat16, of the largest value."""
    inputs = work.inputs(tokens, 0)
    expected = work.call("bfloat16", inputs).float()
    for kind in list(work.kinds)[1:]:
        error = (work.call(kind, inputs, **options).float() - expected).abs().max()
        yield kind, (error / expected.abs().max()).item()


def times(work: Work, tokens: int) -> dict[str, float]:
    """Microseconds of each kind, in a graph of calls with other experts each."""
    given = [work.inputs(tokens, call * work.choices) for call in range(8)]
    found = {}
    for kind in work.kinds:
        counts = {}
        if tokens > 4:
            counts = {"count": torch.tensor([tokens], dtype=torch.int32, device=work.device)}
        tables, scales = work.kinds[kind]
        options = scales | work.biases | counts
        run = operator.experts_chunk if counts else operator.experts
        calls = [partial(run, *x, *tables, **options) for x in given]
        found[kind] = median_us(calls, 20)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if options.dry:
        work, cut = Work(5, 2, 64, 64, "cpu"), Tiles(64, 64, 2, 4)
        checked = [(2, {}), (6, {"tiles": ChunkTiles(16, cut, cut)})]
    else:
        work, checked = Work(32, 4, 2880, 2880, "cuda"), [(tokens, {}) for tokens in TOKENS]
    rows = []
    for tokens, given in checked:
        found = dict(errors(work, tokens, **given))
        print(f"{tokens} tokens: " + ", ".join(f"{k} {e:.1e}" for k, e in found.items()))
        if max(found.values()) > ERROR:
            print(f"more than {ERROR} is wrong")
            return 1
        if options.dry:
            continue
        chosen = min(work.experts, tokens * work.choices) / work.experts
        for kind, us in times(work, tokens).items():
            tables, scales = work.kinds[kind]
            stored = sum(table.nbytes for table in (*tables, *scales.values()))
            floor = stored * chosen / BANDWIDTH * 1e6
            rows.append({"tokens": tokens, "kind": kind, "floor_us": floor, "us": us})
            print(f"{tokens:>6}  {kind:<16}{floor:>8.1f}{us:>9.1f} us{us / floor:>7.2f} x floor")
    if options.sweep:
        for block_n, most in SWEPT:
            cut = StepTiles(block_n, most, 4)
            operator.gate_up_tiles = lambda inputs, group, cut=cut: cut
            # Without groups all of a row's experts are in a program at once.
            operator.down_tiles = lambda *given, cut=cut: cut if given[-1] else down_tiles(*given)
            rows.append({"block_n": block_n, "block_k": most, "us": times(work, 1)})
            cut = ", ".join(f"{kind} {us:.1f}" for kind, us in rows[-1]["us"].items())
            print(f"a step with {block_n} outputs, {most} inputs: {cut}")
    if (out := os.environ.get("OUT")) and not options.dry:
        result = origin("kept_experts") | {"rows": rows}
        (Path(out) / "kept_experts.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
