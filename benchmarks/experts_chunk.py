"""How fast are routed experts over a packed chunk of tokens on a CUDA GPU? `python -m
benchmarks.experts_chunk` checks them, and prints floors, medians and TFLOP/s in a table.

The floor is the products' operations over 790 TFLOP/s, or the weights' bytes over 4.2 TB/s, if that
is longer. Times are medians of CUDA graphs of calls between events; the weights are larger than any
L2. The peer is torch's: a sort, two torch._grouped_mm with the activation between, and the weighted
sum, or a loop over experts without _grouped_mm. `--sweep` measures other tiles, and `--dry` only
checks, in Triton's interpreter. JSON goes to $OUT, a directory, where that is set.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda_common import kernel_times, median_us, origin, profiled
from tokenloop.models.kernels.experts import operator, reference
from tokenloop.models.kernels.experts.chunk_tiles import ChunkTiles, Tiles, chunk_tiles

FLOPS, BANDWIDTH = 790e12, 4.2e12
TOKENS = 128, 1024, 8192
CALLS = 4  # of a graph
ERROR = 2e-2  # of the largest value: two roundings to bfloat16
HEADER = (
    f"{'network':<18}{'T':>6}  {'what':<34}{'floor us':>9}{'us':>9}{'x floor':>8}{'TFLOP/s':>9}"
)
SWEPT_GATE_UP = (
    (64, Tiles(64, 64, 4, 4)), (64, Tiles(128, 64, 4, 4)), (64, Tiles(128, 64, 4, 8)),
    (128, Tiles(64, 64, 4, 4)), (128, Tiles(64, 64, 3, 4)), (128, Tiles(64, 64, 4, 8)),
    (128, Tiles(128, 64, 3, 8)), (128, Tiles(128, 64, 4, 8)), (256, Tiles(64, 64, 4, 8)),
)  # fmt: skip
SWEPT_DOWN = (
    (64, Tiles(128, 64, 4, 4)), (64, Tiles(256, 64, 4, 8)), (128, Tiles(128, 64, 3, 4)),
    (128, Tiles(128, 64, 3, 8)), (128, Tiles(128, 64, 4, 8)), (128, Tiles(256, 64, 3, 8)),
    (128, Tiles(256, 64, 4, 8)), (256, Tiles(128, 64, 4, 8)),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Experts E, of which k are chosen, hidden size D, an expert's size I, whether all tokens have
    one more."""

    name: str
    experts: int
    chosen: int
    size: int
    inner: int
    is_shared: bool

    def floor_us(self, tokens: int) -> float:
        weights = min(self.experts, tokens * self.chosen) * 3 * self.size * self.inner * 2
        return max(self.flops(tokens) / FLOPS, weights / BANDWIDTH) * 1e6

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.chosen * 3 * self.size * self.inner


SHAPES = (
    Shape("Qwen3.5-35B-A3B", 256, 8, 2048, 512, True),
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, False),
)
DRY = Shape("dry", 5, 3, 40, 24, True)


class Work:
    """Weights of a shape, and inputs of a chunk, all of whose tokens exist."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        e, d, i = shape.experts, shape.size, shape.inner
        self.gate_up = self.made(e, 2 * i, d, scale=d**-0.5)
        self.down = self.made(e, d, i, scale=i**-0.5)

    def made(self, *shape: int, scale: float = 1.0) -> Tensor:
        given = {"device": self.device, "dtype": torch.bfloat16, "generator": self.generator}
        return torch.randn(shape, **given).mul_(scale)

    def chunk(self, tokens: int) -> dict[str, Tensor]:
        x, scores = self.made(tokens, self.shape.size), self.made(tokens, self.shape.experts + 1)
        chosen, weights = operator.route(scores, self.shape.experts, self.shape.chosen, True)
        count = torch.tensor([tokens], dtype=torch.int32, device=self.device)
        given = {"x": x, "chosen": chosen, "weights": weights, "count": count}
        if self.shape.is_shared:
            given |= {"shared": self.made(tokens, self.shape.size), "scores": scores}
        return given | {"gate_up": self.gate_up, "down": self.down}


def part_of(given: dict[str, Tensor], rows: slice, room: int = 0) -> dict[str, Tensor]:
    """Some of the tokens, and `room` more that do not exist."""
    part = dict(given)
    for name in ("x", "chosen", "weights", "shared", "scores"):
        if name in given:
            found = given[name][rows]
            beyond = torch.full((room, found.shape[1]), torch.nan).to(found)
            part[name] = torch.cat([found, beyond])
    part["count"] = torch.full_like(given["count"], len(part["x"]) - room)
    return part


def check(given: dict[str, Tensor], cuts: list[ChunkTiles]) -> list[tuple[str, float]]:
    """What was compared and how much it differs, of the largest value; only the first may."""
    got, expected = operator.experts_chunk(**given), reference.experts_chunk(**given)
    rows = slice(len(got) // 3, len(got) // 3 + min(100, len(got) // 2))
    alone = operator.experts_chunk(**part_of(given, rows))
    padded = operator.experts_chunk(**part_of(given, rows, len(got) // 2))[: len(alone)]
    pairs = [("reference", got, expected), ("alone", alone, got[rows])]
    pairs += [("with room", padded, got[rows])]
    for tiles in cuts:
        cut = operator.launch_experts_chunk(**given, tiles=tiles)
        pairs.append((f"tiles of {tiles.block_m} x {tiles.gate_up.block_n}", cut, got))
    largest = float(expected.float().abs().max())
    # torch's max, unlike Python's, keeps a NaN.
    return [(name, float((a.float() - b.float()).abs().max()) / largest) for name, a, b in pairs]


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], sorted by expert, times each one's weight of [E, N, K]."""
    if hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
    bounds = [0, *ends.tolist()]
    return torch.cat([F.linear(x[a:b], w) for a, b, w in zip(bounds, bounds[1:], weight)])


def peer(x, chosen, weights, gate_up, down, count, shared=None, scores=None) -> Tensor:
    order = chosen.flatten().argsort()
    sizes = (chosen.flatten()[:, None] == torch.arange(len(down), device=x.device)).sum(0)
    ends = sizes.cumsum(0).int()
    gate, up = grouped(x[order // chosen.shape[1]], gate_up, ends).chunk(2, dim=-1)
    out = grouped(F.silu(gate) * up, down, ends) * weights.flatten()[order, None]
    y = torch.empty_like(out).index_copy_(0, order, out)
    y = y.view(len(x), -1, x.shape[1]).sum(1)
    return y if shared is None else y + scores[:, -1:].sigmoid() * shared


def measure(work: Work, tokens: int, repeats: int, sweep: bool, rows: list[dict]) -> None:
    shape = work.shape
    given = work.chunk(tokens)
    small = Tiles(64, 64, 4, 4)
    cuts = [ChunkTiles(size, small, small) for size in (16, 32, 64, 128)]
    large = Tiles(128, 64, 4, 8)
    cuts.append(ChunkTiles(128, large, Tiles(256, 64, 4, 8)))
    for name, error in check(given, cuts):
        right = error <= (ERROR if name == "reference" else 0.0)
        print(f"{shape.name} {tokens}: {name} {error:.1e} {'ok' if right else 'WRONG'}", flush=True)
        rows.append({"network": shape.name, "tokens": tokens, "check": name, "error": error})

    def add(what: str, call: Callable[[], object]) -> None:
        try:
            us = median_us([call] * CALLS, repeats)
        except Exception as error:  # a peer's or a tile's: the others are still of interest
            print(f"{shape.name} {tokens}: {what}: {type(error).__name__} {str(error)[:200]}")
            return
        floor, rate = shape.floor_us(tokens), shape.flops(tokens) / us * 1e-6
        row = {"network": shape.name, "tokens": tokens, "what": what, "floor_us": floor, "us": us}
        rows.append(row | {"tflops": rate})

    pairs = tokens * shape.chosen
    own = chunk_tiles(pairs, shape.experts, shape.size, shape.inner, torch.bfloat16)
    add("experts_chunk", lambda: operator.experts_chunk(**given))
    operator.PARTIAL_DTYPE, kept = torch.bfloat16, operator.PARTIAL_DTYPE
    add("  bfloat16 before the weighted sum", lambda: operator.experts_chunk(**given))
    operator.PARTIAL_DTYPE = kept
    add("torch's", lambda: peer(**given))
    route = given.get("scores"), shape.experts, shape.chosen, True, given["count"]
    if shape.is_shared:
        add("route", lambda: operator.route(*route))
    if sweep:
        for name, swept in (("gate_up", SWEPT_GATE_UP), ("down", SWEPT_DOWN)):
            for block_m, cut in swept:
                tiles = own._replace(block_m=block_m, **{name: cut})
                label = f"  {name} {block_m} x {'/'.join(map(str, cut))}"
                add(label, lambda t=tiles: operator.launch_experts_chunk(**given, tiles=t))
    events = profiled(lambda: operator.experts_chunk(**given))
    for kernel, _, us in kernel_times(events):
        rows.append({"network": shape.name, "tokens": tokens, "kernel": kernel, "us": us})


def table(rows: list[dict]) -> None:
    for row in rows:
        if "kernel" in row:
            print(f"{row['network']:<18}{row['tokens']:>6}  {row['kernel']:<34}{row['us']:>18.1f}")
    print()
    print(HEADER)
    for row in rows:
        if "what" in row:
            print(
                f"{row['network']:<18}{row['tokens']:>6}  {row['what']:<34}{row['floor_us']:>9.1f}"
                f"{row['us']:>9.1f}{row['us'] / row['floor_us']:>8.2f}{row['tflops']:>9.1f}"
            )
    wrong = [row for row in rows if "check" in row]
    wrong = [r for r in wrong if not r["error"] <= (ERROR if r["check"] == "reference" else 0.0)]
    print(f"{len(wrong)} checks failed" if wrong else "all checks passed")
    if wrong:
        print(*wrong, sep="\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts_chunk", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    parser.add_argument("--sweep", action="store_true", help="measure other tiles as well")
    parser.add_argument("--dry", action="store_true", help="check small shapes without a GPU")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1")
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    return options


def dry() -> list[dict]:
    given = Work(DRY, "cpu").chunk(9)
    tiles = ChunkTiles(4, Tiles(8, 8, 2, 4), Tiles(16, 8, 2, 4))
    rows = []
    for name, error in check(given, [tiles]):
        # NumPy's order of addition depends on the sizes.
        rows.append({"network": DRY.name, "tokens": 9, "check": "reference", "error": error})
        print(f"{name} {error:.1e}")
    error = float((peer(**given) - reference.experts_chunk(**given)).abs().max())
    print(f"the peer differs from the reference by {error:.1e}")
    return rows


def main() -> None:
    options = parse()
    rows: list[dict] = []
    if options.dry:
        rows = dry()
    else:
        for shape in SHAPES:
            work = Work(shape, "cuda")
            for tokens in TOKENS:
                sweep = options.sweep and tokens == max(TOKENS)
                measure(work, tokens, options.repeats, sweep, rows)
            del work
    result = {**origin("experts_chunk"), "repeats": options.repeats, "rows": rows}
    if os.environ.get("OUT"):
        path = Path(os.environ["OUT"]) / "experts_chunk.json"
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    table(rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
