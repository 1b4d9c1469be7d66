"""What the benchmarks of a packed chunk's linear layers, norms and gates share.

JSON goes to $OUT, a directory, where that is set. --dry runs tiny shapes in Triton's interpreter,
without a GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

if "--dry" in sys.argv:
    # This is read when Triton defines a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.cuda_common import median_us, origin  # noqa: E402

BYTES_S, FLOP_S = 4.2e12, 790e12  # what an H200 reaches
COLD_BYTES = 150e6  # several times the largest L2


def index_scalars() -> None:
    """NumPy 2.4 no longer takes an array of one element as a loop's end, which the interpreter's
    scalars are."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def allocate() -> None:
    """Give kernels the memory where they write their descriptors; a thread has its own way."""
    import triton

    triton.set_allocator(
        lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )


def time_us(calls: list[Callable[[], object]], repeats: int, dry: bool) -> float:
    if not dry:
        return median_us(calls, repeats)
    start = time.perf_counter()
    calls[0]()
    return (time.perf_counter() - start) * 1e6


def equal(got: Tensor, expected: Tensor) -> str:
    """ "same", or how many of the elements differ."""
    unequal = int((got != expected).sum())
    return "same" if not unequal else f"{unequal / got.numel():.1e}"


def table(rows: list[dict]) -> str:
    """The figures, the fastest way of each product first; * is the operator's own."""
    lines = [
        f"{'what':<20}{'T':>5}{'floor us':>10}{'us':>10}{'floor/us':>9}{'TFLOP/s':>9}{'TB/s':>6}"
        f"{'bits':>9}  way"
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["tokens"]), []).append(row)
    for group in groups.values():
        for row in sorted(group, key=lambda row: row.get("us", 1e9)):
            head = f"{row['name']:<20}{row['tokens']:>5}{row['floor_us']:>10.2f}"
            way = row["way"] + (" *" if row["own"] else "")
            if "failure" in row:
                lines.append(
                    f"{head}{'-':>10}{'':>24}{row.get('bits', '-'):>9}  {way}: {row['failure']}"
                )
                continue
            lines.append(
                f"{head}{row['us']:>10.2f}{row['floor_us'] / row['us']:>9.1%}{row['tflops']:>9.1f}"
                f"{row['tb_s']:>6.2f}{row['bits']:>9}  {way}"
            )
    return "\n".join(lines)


def run(benchmark: str, description: str, measure: Callable[..., None]) -> None:
    """A benchmark's command. `measure` adds its rows to a list."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=description
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter")
    parser.add_argument(
        "--seconds", type=float, default=95, metavar="S",
        help="what has not begun by then is left out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(), metavar="T", help="sizes of chunks"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME",
        help="what has NAME in its name, such as qwen3-4b",
    )  # fmt: skip
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    if options.dry:
        index_scalars()
    rows: list[dict] = []
    deadline = time.monotonic() + options.seconds
    try:
        measure(rows, deadline, options.repeats, options.dry, options.tokens, options.only)
    finally:
        if "OUT" in os.environ:
            path = Path(os.environ["OUT"]) / f"{benchmark}.json"
            path.write_text(json.dumps(origin(benchmark) | {"rows": rows}) + "\n")
        print(table(rows), flush=True)
