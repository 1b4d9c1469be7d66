"""How fast are the kernels of a decode step on a CUDA GPU, beside cuBLAS and torch's attention?
`python -m benchmarks.kernels_cuda` prints the ceiling, the figures and one JSON line.

Times are medians of CUDA graphs of many calls between events, over copies of the weights or caches
that no L2 holds. A share is of what a copy within the device moves. Errors are the largest
difference from the reference in float32, over the largest value. Several cuts of the work are
measured; the one the operators use is marked with *.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda_common import (
    Matrix,
    copy_bandwidth,
    heading,
    kernel_options,
    kernel_parser,
    median_us,
    origin,
    save,
)
from tokenloop.models.kernels import cuda
from tokenloop.models.kernels.attention.attend_tiles import AttendTiles, attend_tiles, most_splits
from tokenloop.models.kernels.attention.operator import launch_attend
from tokenloop.models.kernels.attention.reference import attend_step
from tokenloop.models.kernels.linear import reference
from tokenloop.models.kernels.linear.linear_tiles import LARGE, LinearTiles, linear_tiles
from tokenloop.models.kernels.linear.operator import launch_linear
from tokenloop.models.kernels.linear.packing import quantize_int4, quantize_int8
from tokenloop.models.kernels.rms_norm.operator import Norm

BATCHES = 1, 8, 32
CONTEXTS = 128, 256, 1024, 8192
COLD_BYTES = 200e6  # several times the largest L2
MOST_COPIES = 96
FORMS = {4: "int4", 0: "bf16", 8: "int8"}
EPS = 1e-6


@dataclass(frozen=True)
class Layout:
    """Attention of one kind of layer, with caches of so many slots."""

    name: str
    kv_heads: int
    groups: int
    head_dim: int
    slots: int
    values_are_keys: bool = False


GEMMA3_270M = (
    Matrix("gemma3 qkv", 1536, 640), Matrix("gemma3 o", 640, 1024),
    Matrix("gemma3 gate up", 2048, 640, True), Matrix("gemma3 down", 640, 2048),
    Matrix("gemma3 head", 262_144, 640),
)  # fmt: skip
GEMMA4_31B = (
    Matrix("gemma4 qkv", 16_384, 5376), Matrix("gemma4 o", 5376, 8192),
    Matrix("gemma4 full qk", 18_432, 5376), Matrix("gemma4 full o", 5376, 16_384),
    Matrix("gemma4 gate up", 21_504, 5376, True), Matrix("gemma4 down", 5376, 21_504),
    Matrix("gemma4 head", 262_144, 5376),
)  # fmt: skip
QWEN3_4B = (
    Matrix("qwen3 qkv", 6144, 2560), Matrix("qwen3 o", 2560, 4096),
    Matrix("qwen3 gate up", 9728, 2560, True), Matrix("qwen3 down", 2560, 9728),
    Matrix("qwen3 head", 151_936, 2560),
)  # fmt: skip
MATRICES = GEMMA4_31B + GEMMA3_270M + QWEN3_4B
LAYOUTS = (
    Layout("gemma3 full", 1, 4, 256, 8192), Layout("gemma3 sliding", 1, 4, 256, 512),
    Layout("gemma4 full", 4, 8, 512, 8192, True), Layout("gemma4 sliding", 16, 2, 256, 1024),
    Layout("qwen3", 8, 4, 128, 8192),
)  # fmt: skip


def linear_candidates(matrix: Matrix, bits: int, rows: int) -> list[LinearTiles]:
    """Ways to cut a product, the operators' own first."""
    shape = matrix.outputs, matrix.inputs
    own = linear_tiles(rows, *shape, bits, torch.bfloat16, matrix.gated)
    small = matrix.inputs <= 2048 and matrix.outputs <= 4096
    # Integer weights go by spans, whatever the block of inputs.
    if bits:
        shapes = [(64, 128, 4, 3), (64, 128, 4, 4), (32, 128, 2, 3), (32, 128, 2, 4)]
        shapes += [(32, 128, 4, 4), (16, 128, 1, 3), (64, 128, 2, 3)]
        shapes = shapes if bits == 4 else shapes[:4]
    elif small:
        shapes = [(16, 128, 4, 4), (16, 256, 4, 3), (16, 128, 4, 8), (16, 128, 2, 8)]
        shapes += [(64, 128, 4, 4), (32, 128, 4, 8)]
        # 16 outputs a warp, of 8 rows at least.
        shapes += [(16, 128, 1, 5), (16, 256, 1, 3), (32, 256, 2, 3), (64, 256, 4, 3)]
    else:
        shapes = [(64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4)]
    # Fewer parts, and longer pipelines to make up for it.
    middle = not bits and not small and matrix.outputs * matrix.inputs < LARGE
    if middle:
        shapes += [(64, 64, 4, 10), (64, 128, 4, 7), (32, 128, 2, 6), (32, 128, 4, 10)]
        shapes += [(32, 64, 2, 8), (128, 64, 4, 7)]
    ways = [own]
    for block_n, block_k, warps, stages in shapes:
        tiles = -(-matrix.outputs // block_n)
        for target in (1, 264) if small else (80, 132, 264, 528) if middle else (264, 528):
            splits = 1
            while splits < 8 and tiles * splits < target and matrix.inputs >= 1024 * splits:
                splits *= 2
            ways.append(LinearTiles(True, block_n, block_k, splits, warps, stages))
    if not bits and rows <= 8 and small:
        plain = [(4, 1024, 4), (2, 1024, 2), (4, 1024, 2), (8, 1024, 8)]
        ways += [LinearTiles(False, n, k, warps=warps) for n, k, warps in plain]
    return list(dict.fromkeys(ways))


def attend_candidates(layout: Layout) -> list[AttendTiles]:
    """Ways to cut attention, the operator's own first."""
    own = attend_tiles(layout.slots, layout.kv_heads, layout.head_dim, torch.bfloat16)
    splits = most_splits(layout.kv_heads)
    block = 16 if layout.head_dim > 256 else 32
    ways = [own]
    for block_s in (block, 2 * block):
        for most, least in ((splits, 1), (splits, 2), (splits // 2, 1), (splits // 2, 4)):
            ways.append(AttendTiles(block_s, most, least, stages=3))
    ways += [
        AttendTiles(2 * block, splits // 4, stages=3),
        AttendTiles(2 * block, splits, 4, stages=3),
        AttendTiles(4 * block, splits, 2, stages=2),
        AttendTiles(block, splits, stages=3, fan=16),
        AttendTiles(block, splits, stages=3, fan=4),
        AttendTiles(block, splits, stages=3, combined=4096),
    ]
    return list(dict.fromkeys(ways))


def build(calls: list[Callable[[], object]]) -> None:
    """Compile what the calls need side by side. One that fails will fail again, and be reported,
    where it is measured."""
    with ThreadPoolExecutor(16) as pool:
        wait([pool.submit(call) for call in calls])
    torch.cuda.synchronize()


def copies_of(tensors: list[Tensor], used: float | None = None) -> list[list[Tensor]]:
    """The tensors and clones of them, until what is `used` of them fills more than an L2."""
    used = used or sum(x.nbytes for x in tensors)
    count = max(2, min(MOST_COPIES, int(COLD_BYTES // used) + 1))
    return [tensors] + [[x.clone() for x in tensors] for _ in range(count - 1)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


class Report:
    """Rows of figures, printed as they come and again as a table at the end."""

    def __init__(self, bandwidth: float, deadline: float):
        self.bandwidth, self.deadline, self.rows = bandwidth, deadline, []

    def measure(self, row: dict, size: float, repeats: int, work: Callable[[], tuple]) -> None:
        """Add the time of work() -> (calls, error); what fails is a row as well."""
        if time.monotonic() > self.deadline:
            row["failure"] = "no time left"
        else:
            try:
                calls, row["error"] = work()
                row["us"] = median_us(calls, repeats)
                row["share"] = size / (row["us"] * 1e-6) / self.bandwidth
            # Triton's and CUDA's failures have no common type; the next way may work.
            except Exception as failure:
                row["failure"] = f"{type(failure).__name__}: {failure}".split("\n")[0][:90]
        self.rows.append(row)

    def table(self) -> str:
        lines = [f"{'what':<22}{'form':<6}{'B':>3} {'us':>9}{'share':>7}{'error':>9}  way"]
        for row in self.rows:
            head = f"{row['name']:<22}{row['form']:<6}{row['rows']:>3} "
            if "failure" in row:
                lines.append(f"{head}{'-':>9}{'':>16}  {row['way']}: {row['failure']}")
            else:
                error = "" if row["error"] is None else f"{row['error']:.1e}"
                figures = f"{row['us']:>9.2f}{row['share']:>7.1%}{error:>9}"
                lines.append(f"{head}{figures}  {row['way']}")
        return "\n".join(lines)


def describe(tiles: LinearTiles | AttendTiles, own: bool) -> str:
    if isinstance(tiles, LinearTiles):
        kind = "dot" if tiles.dot else "rows"
        within = " norm" if tiles.norm else ""
        text = f"{kind} n{tiles.block_n} k{tiles.block_k} split{tiles.splits}{within}"
    else:
        text = f"slots{tiles.block_s} split{tiles.splits} least{tiles.least} fan{tiles.fan}"
    return f"{text} warps{tiles.warps} stages{tiles.stages}{' *' if own else ''}"


def quantized(weight: Tensor, bits: int) -> list[Tensor | None]:
    if not bits:
        return [weight, None]
    return list(quantize_int8(weight) if bits == 8 else quantize_int4(weight))


def measure_matrix(report: Report, matrix: Matrix, bits: int, semaphores: Tensor, repeats: int):
    """All cuts and batches of a matrix, whether rows differ in company, and cuBLAS."""
    generator = torch.Generator("cuda").manual_seed(matrix.outputs)
    new = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    activation = "gelu_tanh" if matrix.gated else None
    weight = torch.randn(matrix.rows, matrix.inputs, **new) * matrix.inputs**-0.5
    tensors = [x for x in quantized(weight, bits) if x is not None]
    copies = copies_of(tensors)
    size = sum(x.nbytes for x in tensors)
    all_x = torch.randn(max(BATCHES), matrix.inputs, **new)

    def product(x: Tensor, copy: list[Tensor], tiles: LinearTiles) -> Tensor:
        scale = copy[1] if bits else None
        options = {"activation": activation, "tiles": tiles}
        return launch_linear(x, copy[0], scale, None, semaphores, **options)[1]

    expected = reference.linear(
        all_x, tensors[0], tensors[1] if bits else None, None, semaphores,
        activation=activation, out_float32=True,
    )  # fmt: skip

    build(
        [
            lambda rows=rows, tiles=tiles: product(all_x[:rows], copies[0], tiles)
            for rows in BATCHES
            for tiles in linear_candidates(matrix, bits, rows)
        ]
    )
    for rows in BATCHES:
        x = all_x[:rows]
        for i, tiles in enumerate(linear_candidates(matrix, bits, rows)):

            def work(x=x, tiles=tiles):
                y = product(x, copies[0], tiles)
                calls = [lambda copy=copy: product(x, copy, tiles) for copy in copies]
                return calls, relative_error(y, expected[: x.shape[0]])

            row = {"name": matrix.name, "form": FORMS[bits], "rows": rows}
            report.measure(row | {"way": describe(tiles, i == 0)}, size, repeats, work)
        if not bits:

            def work(x=x):
                return [lambda copy=copy: F.linear(x, copy[0]) for copy in copies], None

            row = {"name": matrix.name, "form": "bf16", "rows": rows, "way": "cuBLAS"}
            report.measure(row, size, repeats, work)
    unequal = []
    for tiles in linear_candidates(matrix, bits, 32):
        try:
            together = product(all_x, copies[0], tiles)
            alone = [product(all_x[i : i + 1], copies[0], tiles)[0] for i in (0, 17, 31)]
            if not torch.equal(torch.stack(alone), together[[0, 17, 31]]):
                unequal.append(describe(tiles, False))
        except Exception as failure:
            unequal.append(f"{describe(tiles, False)}: {type(failure).__name__}")
    print(f"{matrix.name} {FORMS[bits]}: rows that differ in company: {unequal or 'none'}")


def measure_norm(
    report: Report, matrix: Matrix, bits: int, semaphores: Tensor, repeats: int
) -> None:
    """One row's product after a branch is added and normed: a launch of its own, or within."""
    generator = torch.Generator("cuda").manual_seed(matrix.outputs)
    new = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    weight = torch.randn(matrix.rows, matrix.inputs, **new) * matrix.inputs**-0.5
    copies = copies_of([x for x in quantized(weight, bits) if x is not None])
    size = sum(x.nbytes for x in copies[0])
    x, branch, post_weight, norm_weight = (torch.randn(1, matrix.inputs, **new) for _ in range(4))
    norm = Norm(norm_weight[0], EPS, 0.0, branch, post_weight[0])
    options = {"activation": "gelu_tanh" if matrix.gated else None, "norm": norm}
    ways = []
    for tiles in linear_candidates(matrix, bits, 1):
        apart, within = (tiles._replace(norm=norm) for norm in (False, True))
        within_it = not tiles.dot and matrix.inputs <= tiles.block_k
        ways += [apart, within] if within_it else [apart]
    ways = list(dict.fromkeys(ways))[: 99 if matrix.inputs <= 1024 else 6]

    def product(copy: list[Tensor], tiles: LinearTiles) -> Tensor:
        scale = copy[1] if bits else None
        return launch_linear(x, copy[0], scale, None, semaphores, **options, tiles=tiles)[1]

    build([lambda tiles=tiles: product(copies[0], tiles) for tiles in ways])
    for tiles in ways:

        def work(tiles=tiles):
            apart = product(copies[0], tiles._replace(norm=False))
            error = relative_error(product(copies[0], tiles), apart)
            return [lambda copy=copy: product(copy, tiles) for copy in copies], error

        row = {"name": f"{matrix.name} normed", "form": FORMS[bits], "rows": 1}
        report.measure(row | {"way": describe(tiles, False)}, size, repeats, work)


def measure_attention(report: Report, layout: Layout, semaphores: Tensor, repeats: int) -> None:
    """All cuts of a layout at several contexts, and torch's attention over the filled slots."""
    new = {"device": "cuda", "dtype": torch.bfloat16}
    inv_freq = 1e4 ** -(torch.arange(0, layout.head_dim, 2, device="cuda") / layout.head_dim)
    heads = layout.groups * layout.kv_heads
    width = heads + layout.kv_heads * (1 if layout.values_are_keys else 2)
    weight = torch.ones(layout.head_dim, **new)
    options = {
        "scale": layout.head_dim**-0.5, "eps": EPS,
        "values_are_keys": layout.values_are_keys, "value_norm": layout.values_are_keys,
    }  # fmt: skip
    for rows in BATCHES:
        for context in CONTEXTS:
            filled = min(context, layout.slots)
            size = 4.0 * rows * filled * layout.kv_heads * layout.head_dim
            shape = (rows, layout.slots, layout.kv_heads, layout.head_dim)
            caches = copies_of([torch.randn(shape, **new), torch.randn(shape, **new)], size)
            qkv = torch.randn(rows, width * layout.head_dim, **new)
            position = torch.full((rows,), context - 1, device="cuda")
            inputs = (weight, weight, inv_freq, semaphores)

            def attend(cache, tiles, qkv=qkv, position=position, inputs=inputs):
                return launch_attend(qkv, position, *cache, *inputs, **options, tiles=tiles)

            clones = [x.clone() for x in caches[0]]
            expected = attend_step(qkv, position, *clones, *inputs, **options)
            candidates = attend_candidates(layout)
            build([lambda t=tiles, f=attend, c=clones: f(c, t) for tiles in candidates])
            for i, tiles in enumerate(candidates):

                def work(tiles=tiles, caches=caches, expected=expected, attend=attend):
                    error = relative_error(attend(caches[0], tiles), expected)
                    return [lambda cache=cache: attend(cache, tiles) for cache in caches], error

                row = {"name": layout.name, "form": f"c{context}", "rows": rows}
                report.measure(row | {"way": describe(tiles, i == 0)}, size, repeats, work)

            def work(caches=caches, filled=filled, rows=rows):
                q = torch.randn(rows, heads, 1, layout.head_dim, **new)

                def torch_attention(cache):
                    k, v = (x[:, :filled].transpose(1, 2) for x in cache)
                    return F.scaled_dot_product_attention(q, k, v, enable_gqa=layout.groups > 1)

                return [lambda cache=cache: torch_attention(cache) for cache in caches], None

            row = {"name": layout.name, "form": f"c{context}", "rows": rows, "way": "torch"}
            report.measure(row, size, repeats, work)


def measure_layer(
    report: Report,
    name: str,
    matrices: tuple[Matrix, ...],
    layout: Layout,
    bits: int,
    semaphores: Tensor,
    repeats: int,
) -> None:
    """A whole layer by the operators: `matrices` are qkv, o, gate and up, down."""
    new = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = matrices[0].inputs
    weights = []
    for matrix in matrices:
        weight = torch.randn(matrix.rows, matrix.inputs, **new) * matrix.inputs**-0.5
        weights += quantized(weight, bits)
    size = sum(x.nbytes for x in weights if x is not None)
    count = max(2, min(MOST_COPIES, int(COLD_BYTES // size) + 1))
    layers = [[None if w is None else w.clone() for w in weights] for _ in range(count)]
    norm, head_norm = torch.ones(inputs, **new), torch.ones(layout.head_dim, **new)
    inv_freq = 1e4 ** -(torch.arange(0, layout.head_dim, 2, device="cuda") / layout.head_dim)
    step = {"eps": EPS, "offset": 0.0}
    for rows in BATCHES:
        shape = (rows, layout.slots, layout.kv_heads, layout.head_dim)
        caches = [torch.randn(shape, **new) for _ in range(2)]
        for context in (256, 8192):
            position = torch.full((rows,), context - 1, device="cuda")
            x = torch.randn(rows, inputs, **new)

            def layer(w, x=x, position=position, caches=caches):
                residual = (x, x, norm, None, norm)
                x, qkv = cuda.add_norm_linear(*residual, *w[0:2], None, semaphores, **step)
                attended = cuda.attend_step(
                    qkv, position, *caches, head_norm, head_norm, inv_freq, semaphores,
                    scale=layout.head_dim**-0.5, values_are_keys=layout.values_are_keys, **step,
                )  # fmt: skip
                branch = cuda.linear(attended, *w[2:4], None, semaphores)
                x, h = cuda.add_norm_linear(
                    x, branch, norm, None, norm, *w[4:6], None, semaphores,
                    activation="gelu_tanh", **step,
                )  # fmt: skip
                return cuda.linear(h, *w[6:8], None, semaphores)

            def work(layer=layer):
                return [lambda w=w: layer(w) for w in layers], None

            row = {"name": f"{name} layer", "form": FORMS[bits], "rows": rows}
            filled = 4.0 * rows * min(context, layout.slots) * layout.kv_heads * layout.head_dim
            report.measure(row | {"way": f"context {context}"}, size + filled, repeats, work)


def main() -> None:
    parser = kernel_parser("kernels_cuda", __doc__, 7)
    parser.add_argument(
        "--seconds", type=float, default=220, metavar="S",
        help="what has not begun by then is left out (default: 220)",
    )  # fmt: skip
    parser.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="parts whose name matches, such as 'layer|int4'",
    )
    options = kernel_options(parser, None)

    start = time.monotonic()
    bandwidth = copy_bandwidth()
    print(heading(bandwidth))
    report = Report(bandwidth, start + options.seconds)
    semaphores = torch.zeros(
        cuda.semaphores_size(max(BATCHES), 262_144, 16), dtype=torch.int32, device="cuda"
    )
    layers = (
        ("gemma4 sliding", GEMMA4_31B[0:2] + GEMMA4_31B[4:6], LAYOUTS[3]),
        ("gemma4 full", GEMMA4_31B[2:6], LAYOUTS[2]),
        ("gemma3", GEMMA3_270M[:4], LAYOUTS[1]),
        ("qwen3", QWEN3_4B[:4], LAYOUTS[4]),
    )

    def section(name: str, action: Callable[..., None], *arguments) -> None:
        if not re.search(options.only, name) or time.monotonic() > report.deadline:
            return
        try:
            action(report, *arguments, semaphores, options.repeats)
        # One that cannot even be set up, for want of memory, is not the others' end.
        except Exception as failure:
            text = f"{type(failure).__name__}: {failure}".split("\n")[0][:90]
            report.rows.append({"name": name, "form": "", "rows": 0, "way": "", "failure": text})
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - start:.0f} s: {name}", flush=True)

    for bits in FORMS:
        for matrix in MATRICES:
            section(f"{matrix.name} {FORMS[bits]}", measure_matrix, matrix, bits)
    for matrix in MATRICES:
        if matrix.name.endswith(("qkv", "full qk", "gate up")):
            for bits in (0, 4):
                section(f"{matrix.name} {FORMS[bits]} normed", measure_norm, matrix, bits)
    for layout in LAYOUTS:
        section(f"{layout.name} attention", measure_attention, layout)
    for name, matrices, layout in layers:
        for bits in FORMS:
            section(f"{name} {FORMS[bits]} layer", measure_layer, name, matrices, layout, bits)
    print(report.table())
    answer = {
        **origin("kernels_cuda"),
        "copy_tb_s": bandwidth / 1e12,
        "repeats": options.repeats,
        "rows": report.rows,
    }
    save(answer, options.output)


if __name__ == "__main__":
    main()
