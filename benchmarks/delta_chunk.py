"""How fast is a gated delta net's part of a packed chunk on a CUDA GPU, between its projections?
`python -m benchmarks.delta_chunk` checks the operators, and prints floors and medians in a table.

The shapes are Qwen3.5 9B's: 32 value heads of 128 x 128, 16 key heads, bfloat16. The floor is each
input read once and each output written once, at 4.2 TB/s. Times are medians of CUDA graphs between
events. The peer is the reference in plain torch. `--sweep` measures other cuts of the work, of
which the operators' own are first, and `--dry` only checks, in Triton's interpreter. JSON goes to
$OUT, a directory, where that is set.
"""

# ruff: noqa: E402 (Triton reads what --dry sets)
import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from torch import Tensor

from benchmarks.chunk_common import index_scalars
from benchmarks.cuda_common import device_us, median_us, origin
from tokenloop.models.kernels import cuda
from tokenloop.models.kernels.causal_conv1d import reference as conv1d
from tokenloop.models.kernels.gated_delta_rule import operator as delta_operator
from tokenloop.models.kernels.gated_delta_rule import reference as delta_rule
from tokenloop.models.kernels.gated_rms_norm import operator as norm_operator
from tokenloop.models.kernels.gated_rms_norm import reference as gated_norm
from tokenloop.models.kernels.launch.launches import Launch, kept_launches

DEVICE = "cpu" if DRY else "cuda"
BANDWIDTH = 4.2e12
WIDTH = 4
# (key heads, value heads, size)
SHAPE = (1, 2, 16) if DRY else (16, 32, 128)
TOKENS = () if DRY else (1024, 8192, 32_768)
FEW = 1000  # tokens that are really there, in room for 8,192
# Of the largest value. bfloat16 is rounded in products, and in the interpreter cut off.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
TARGET_US, BLOCK_US = 600.0, 2.5  # of 8,192 tokens, and of a block in the pass over the states
BLOCKS = delta_operator.BLOCKS[2], (32, 4, 1), (64, 4, 2), (128, 4, 1), (32, 8, 3), (128, 8, 1)
STATES = (
    delta_operator.STATES[2], (128, 32, 4, 3), (128, 32, 8, 2), (128, 32, 8, 3), (128, 32, 4, 1),
    (64, 32, 4, 2), (64, 32, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 16, 4, 2),
)  # fmt: skip
NORMS = norm_operator.NUMBERS, (1024, 2), (1024, 4), (4096, 4), (2048, 2), (512, 1)
HEADER = f"{'tokens':>7}  {'what':<44}{'floor us':>9}{'us':>9}{'x floor':>9}"


class Chunk(NamedTuple):
    """starts, rows and first of the sequences, and how many tokens there are."""

    starts: Tensor
    rows: Tensor
    first: Tensor
    count: Tensor


def chunk(lengths: list[int], rows: list[int] | None = None, first: list[int] | None = None):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = list(range(len(lengths))) if rows is None else rows
    numbers = bounds, rows, first or [0] * len(lengths), bounds[-1:]
    return Chunk(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in numbers))


class Work:
    """What the projections give for T tokens, and the states of `rows` rows."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.bfloat16, rows: int = 1):
        groups, heads, size = SHAPE
        generator = torch.Generator(DEVICE).manual_seed(tokens)
        new = {"generator": generator, "device": DEVICE}
        self.channels = (2 * groups + heads) * size
        self.projected = torch.randn(tokens, self.channels + heads * size, dtype=dtype, **new)
        self.gates = torch.randn(tokens, 2 * heads, dtype=dtype, **new)
        self.A_log, self.dt_bias = torch.randn(2, heads, **new)
        self.taps = torch.randn(self.channels, WIDTH, dtype=dtype, **new)
        self.weight = torch.randn(size, dtype=dtype, **new)
        self.conv = torch.randn(rows, self.channels, WIDTH - 1, dtype=dtype, **new)
        self.table = torch.randn(rows, heads, size, size, **new)
        self.out = torch.randn(tokens, heads, size, dtype=dtype, **new)

    def part(self, *pieces: slice) -> "Work":
        """The same with only these tokens."""
        part = copy.copy(self)
        part.projected = torch.cat([self.projected[piece] for piece in pieces])
        part.gates = torch.cat([self.gates[piece] for piece in pieces])
        return part

    def convolve(self, operators, packed: Chunk, state: Tensor) -> Tensor:
        x = self.projected[:, : self.channels].T
        given = x, self.taps, None, packed.starts, state, packed.rows, packed.first, "silu"
        return operators.causal_conv1d(*given).T

    def rule(self, operators, packed: Chunk, state: Tensor) -> Tensor:
        groups, heads, size = SHAPE
        mixed = self.projected[:, : self.channels].unflatten(1, (-1, size))
        q, k, v = mixed.split([groups, groups, heads], 1)
        b, a = self.gates.split(heads, 1)
        given = q, k, v, a, b, self.A_log, self.dt_bias, state
        return operators.gated_delta_rule_chunk(*given, packed.starts, packed.rows, packed.first)

    def norm(self, operators, packed: Chunk) -> Tensor:
        gate = self.projected[:, self.channels :].unflatten(1, self.out.shape[1:])
        return operators.gated_rms_norm(self.out, gate, self.weight, 1e-6, packed.count)

    def floors(self, tokens: int) -> tuple[float, float, float]:
        """Microseconds of the convolution, the rule and the norm of so many tokens."""
        size = self.projected.element_size()
        values = self.out[0].numel()
        conv = 2 * self.channels * size
        rule = (self.channels + values) * size + 2 * self.gates.shape[1]
        states = 2 * self.table[0].nbytes
        pairs = (conv, 0), (rule, states), (3 * values * size, 0)
        return tuple((tokens * x + y) / BANDWIDTH * 1e6 for x, y in pairs)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def error(function: Callable, reference, packed: Chunk, table: Tensor | None = None) -> float:
    """The largest difference of output and states from the reference's, over the largest value."""
    count = int(packed.count)
    if table is None:
        return distance(function(cuda, packed)[:count], function(reference, packed)[:count])
    tables = table.clone(), table.clone()
    got, expected = (
        function(by, packed, state)[:count] for by, state in zip((cuda, reference), tables)
    )
    return max(distance(got, expected), distance(*tables))


def check_errors(tokens: int, dtype: torch.dtype) -> dict:
    """Of three sequences, and room that is not used and has garbage."""
    work = Work(tokens, dtype, 4)
    lengths = [tokens // 2 // 64 * 64, 0, 70, 17]
    packed = chunk(lengths, [2, -1, 0, 3], [128, 0, 0, 64])
    for x in (work.projected, work.gates, work.out):
        x[sum(lengths) :] = torch.nan
    errors = {
        "rule": error(work.rule, delta_rule, packed, work.table),
        "convolution": error(work.convolve, conv1d, packed, work.conv),
        "norm": error(work.norm, gated_norm, packed),
    }
    return {"tokens": tokens, "dtype": str(dtype), **errors, "bound": BOUNDS[dtype]}


def check_cuts(tokens: int, dtype: torch.dtype) -> dict[str, bool]:
    """Whether a prompt of so many tokens is bit for bit the same in chunks of each size, alone and
    behind another prompt."""
    work, other, same = Work(tokens + 100, dtype, 2), slice(tokens, tokens + 100), {}
    for name, table in (("rule", work.table), ("convolve", work.conv)):
        whole = table.clone()
        expected = getattr(work.part(slice(0, tokens)), name)(cuda, chunk([tokens]), whole)
        for size in (64, 128, tokens):
            alone, behind = table.clone(), table.clone()
            equal = {"alone": True, "packed": True}
            for begin in range(0, tokens, size):
                piece = slice(begin, min(begin + size, tokens))
                length = piece.stop - begin
                part, packed = work.part(piece), chunk([length], [0], [begin])
                out = getattr(part, name)(cuda, packed, alone)
                equal["alone"] &= torch.equal(out, expected[piece])
                part = work.part(other, piece, other)
                packed = chunk([100, length, 0], [1, 0, -1], [0, begin, 0])
                out = getattr(part, name)(cuda, packed, behind)[100 : 100 + length]
                equal["packed"] &= torch.equal(out, expected[piece])
            equal["alone"] &= torch.equal(alone[0], whole[0])
            equal["packed"] &= torch.equal(behind[0], whole[0])
            same |= {f"{name} {dtype} {size} {how}": is_equal for how, is_equal in equal.items()}
    return same


def relaunched(launch: Launch) -> Callable[[], None]:
    return lambda: launch.kernel[launch.grid](*launch.arguments, **launch.named)


def measure(tokens: int, lengths: list[int], repeats: int, what: str) -> list[dict]:
    """Rows of figures for a chunk with room for `tokens`."""
    work, packed, rows = Work(tokens, rows=len(lengths)), chunk(lengths), []
    conv, rule, norm = work.floors(sum(lengths))
    calls = max(1, min(8, 16_384 // tokens))

    def add(part: str, floor: float | None, us: float) -> float:
        row = {"tokens": tokens, "what": f"{what}: {part}", "floor_us": floor, "us": us}
        rows.append(row)
        return us

    def timed(function: Callable[[], object]) -> float:
        return median_us([function] * calls, repeats)

    with kept_launches() as launches:
        work.rule(cuda, packed, work.table)
    parts = [
        add(
            each.kernel.fn.__name__.removeprefix("gated_delta_rule_"), None, timed(relaunched(each))
        )
        for each in launches
    ]
    row = rows[-1]
    row["us_a_block"] = parts[-1] / max(1, triton.cdiv(max(lengths), delta_rule.CHUNK))
    add("delta rule", rule, timed(lambda: work.rule(cuda, packed, work.table)))
    add("convolution", conv, timed(lambda: work.convolve(cuda, packed, work.conv)))
    add("norm", norm, timed(lambda: work.norm(cuda, packed)))
    if what == "one prompt":
        times = device_us(lambda: work.rule(delta_rule, packed, work.table), 1, 1)
        add("delta rule in plain torch", rule, statistics.median(times))
    return rows


@contextlib.contextmanager
def replaced(place, name: str, value) -> Iterator[None]:
    own = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, own)


def sweep(repeats: int) -> None:
    """A line for each cut: of one prompt, and of 16, of 8,192 tokens in all."""
    cases = [(Work(8192, rows=len(lengths)), chunk(lengths)) for lengths in ([8192], [512] * 16)]

    def line(name: str, cut: tuple, own, value, number: int, what: str) -> None:
        text = f"{name:<8}{cut!s:<20}"
        for work, packed in cases:
            with replaced(own, name, value), kept_launches() as launches:
                work.norm(cuda, packed) if what == "norm" else work.rule(cuda, packed, work.table)
            try:
                text += f"{median_us([relaunched(launches[number])] * 2, repeats):>10.1f}"
            except Exception as failure:  # such as too much shared memory
                text += f"  {type(failure).__name__}"
        print(text, flush=True)

    for cut in BLOCKS:
        line("BLOCKS", cut, delta_operator, delta_operator.BLOCKS | {2: cut}, 0, "rule")
    for cut in STATES:
        line("STATES", cut, delta_operator, delta_operator.STATES | {2: cut}, 1, "rule")
    for cut in NORMS:
        line("NUMBERS", cut, norm_operator, cut, 0, "norm")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delta_chunk", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="only check, in the interpreter")
    parser.add_argument("--sweep", action="store_true", help="other cuts of the work")
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    return options


def show(row: dict) -> str:
    floor = row["floor_us"]
    shown = f"{'':>9}" if floor is None else f"{floor:>9.1f}"
    share = "" if floor is None else f"{row['us'] / floor:>9.2f}"
    more = f"   {row['us_a_block']:.2f} a block" if "us_a_block" in row else ""
    return f"{row['tokens']:>7}  {row['what']:<44}{shown}{row['us']:>9.1f}{share}{more}"


def main() -> None:
    options = parse()
    if options.dry:
        index_scalars()
    tokens = 203 if options.dry else 1061
    errors = [check_errors(tokens, dtype) for dtype in BOUNDS]
    same = {}
    for dtype in BOUNDS:
        same |= check_cuts(tokens, dtype)
    rows = []
    with torch.no_grad():
        if options.sweep:
            sweep(options.repeats)
        for count in TOKENS:
            rows += measure(count, [count], options.repeats, "one prompt")
        if not options.dry:
            rows += measure(8192, [512] * 16, options.repeats, "16 prompts of 512")
            rows += measure(8192, [FEW], options.repeats, f"{FEW} tokens in room for 8192")
    result = {**origin("delta_chunk"), "errors": errors, "same": same, "rows": rows}
    line = json.dumps(result)
    print(line)
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "delta_chunk.json").write_text(line + "\n")
    wrong = [name for name, equal in same.items() if not equal]
    for entry in errors:
        parts = {name: entry[name] for name in ("rule", "convolution", "norm")}
        print(f"{entry['dtype']}: errors {parts}, bound {entry['bound']:.1e}")
        wrong += [
            f"{entry['dtype']} {name}" for name, x in parts.items() if not x <= entry["bound"]
        ]
    print(f"bit for bit the same: {sum(same.values())} of {len(same)}; wrong: {wrong or 'nothing'}")
    if rows:
        print(HEADER)
        for row in rows:
            print(show(row))
        whole = {
            row["tokens"]: row["us"] for row in rows if row["what"] == "one prompt: delta rule"
        }
        for few, many in zip(TOKENS, TOKENS[1:]):
            ratio = whole[many] / whole[few] / (many / few)
            print(f"{many} tokens take {ratio:.2f} times what {few} take, a token")
        print(f"targets: {TARGET_US:.0f} us for 8192 tokens, {BLOCK_US} us a block of the states")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
