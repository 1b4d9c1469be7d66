"""How fast are the kernels of prefill on a CUDA GPU, and are their results the same whatever the
chunk? `python -m benchmarks.prefill_kernels` prints the figures, saves them as JSON to
$OUT/prefill_kernels.json where OUT is set, and prints a table last. --dry runs tiny shapes in
Triton's interpreter, without a GPU.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

if "--dry" in sys.argv:
    # This is read when Triton defines a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import prefill_linear, prefill_rest, prefill_words  # noqa: E402
from benchmarks.cuda_common import origin  # noqa: E402

SECTIONS = {"linear": prefill_linear, "words": prefill_words, "rest": prefill_rest}


def index_scalars() -> None:
    """NumPy 2.4 no longer takes an array of one element as a loop's end, which the interpreter's
    scalars are."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefill_kernels", description=__doc__
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
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
    start = time.monotonic()
    if options.dry:
        index_scalars()
    result = origin("prefill_kernels")
    tables = []
    for name in options.sections or SECTIONS:
        rows: list[dict] = []
        try:
            SECTIONS[name].measure(
                rows, start + options.seconds, options.repeats, options.dry, options.tokens,
                options.only,
            )  # fmt: skip
        finally:
            result[name] = rows
            tables.append(f"{name}\n{SECTIONS[name].table(rows)}")
            if "OUT" in os.environ:
                path = Path(os.environ["OUT"]) / "prefill_kernels.json"
                path.write_text(json.dumps(result) + "\n")
            print("\n\n".join(tables), flush=True)


if __name__ == "__main__":
    main()
