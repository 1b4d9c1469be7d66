"""How fast are integer weights of linear layers over a packed chunk on a CUDA GPU? `python -m
benchmarks.words_chunk` prints a table.

Rows of T = 0 make bfloat16 weights in device memory. The others are layers that make them in their
tiles, and layers of weights that were made before. Bits are those of the reference, or of a layer
of such weights.
"""

import time
from collections.abc import Sequence

import torch

from benchmarks.chunk_common import BYTES_S, COLD_BYTES, allocate, equal, run, time_us
from benchmarks.linear_chunk import DRY_MATRICES, MATRICES, Matrix, named
from tokenloop.models.kernels.linear.packing import quantize_int4, quantize_int8
from tokenloop.models.kernels.linear_chunk import reference
from tokenloop.models.kernels.linear_chunk.chunk_tiles import WordTiles, word_tiles
from tokenloop.models.kernels.linear_chunk.operator import (
    launch_dequantize,
    launch_linear_chunk,
    launch_words,
)

TOKENS = 64, 128, 256
TILES = WordTiles(64, 64, 4, 3), WordTiles(64, 64, 4, 4), WordTiles(128, 64, 4, 2)


def measure(
    rows: list[dict], deadline: float, repeats: int, dry: bool = False,
    tokens: Sequence[int] = (), only: Sequence[str] = (),
) -> None:  # fmt: skip
    """Add a row of figures for each matrix, number of bits and way."""
    if not dry:
        allocate()
    device = "cpu" if dry else "cuda"
    new = {"device": device, "dtype": torch.bfloat16}
    matrices = (DRY_MATRICES[0], Matrix("gated", 24, 192, True)) if dry else MATRICES[:4]
    sizes = (16, 40) if dry else tokens or TOKENS
    for matrix in named(matrices, only):
        dense = torch.randn(matrix.rows, matrix.inputs, **new) * matrix.inputs**-0.5
        for bits in (8,) if matrix.inputs % 64 else (4, 8):
            weight, scale = (quantize_int8 if bits == 8 else quantize_int4)(
                dense.float(), *([64] if bits == 4 else [])
            )
            count_copies = 1 if dry else int(COLD_BYTES // weight.nbytes) + 1
            copies = [(weight.clone(), scale.clone()) for _ in range(count_copies)]
            made = launch_dequantize(weight, scale, matrix.inputs)

            def add(tokens, way, own, size, bits_of, calls, flops=0.0, name=matrix.name, bits=bits):
                row = {"name": f"{name} int{bits}", "tokens": tokens, "way": way, "own": own}
                row["floor_us"] = size / BYTES_S * 1e6
                rows.append(row)
                if time.monotonic() > deadline:
                    row["failure"] = "no time left"
                    return
                try:
                    row["bits"] = bits_of()
                    row["us"] = time_us(calls, repeats, dry)
                    row["tflops"], row["tb_s"] = flops / row["us"] / 1e6, size / row["us"] / 1e6
                # Triton's and CUDA's failures have no common type; the next way may work.
                except Exception as failure:
                    row["failure"] = f"{type(failure).__name__}: {failure}".split("\n")[0][:90]

            size = weight.nbytes + made.nbytes
            calls = [lambda c=c, k=matrix.inputs: launch_dequantize(*c, k) for c in copies[:8]]
            expected = reference.dequantize(weight, scale, matrix.inputs)
            add(0, "dequantize", True, size, lambda a=made, b=expected: equal(a, b), calls)
            options = {"activation": "silu" if matrix.gated else None}
            for tokens in sizes:
                x = torch.randn(tokens, matrix.inputs, **new)
                count = torch.tensor([tokens], dtype=torch.int32, device=device)
                y = launch_linear_chunk(x, made, None, count, **options)
                size = weight.nbytes + x.nbytes + y.nbytes
                flops = 2.0 * tokens * dense.numel()
                own = word_tiles(tokens, matrix.outputs, bits, matrix.gated)
                for tiles in dict.fromkeys([own, *TILES]):

                    def product(c, x=x, count=count, tiles=tiles, options=options):
                        return launch_words(x, *c, None, count, **options, tiles=tiles)

                    calls = [lambda c=c, f=product: f(c) for c in copies[:20]]
                    way = f"words {tiles.block_t}x{tiles.block_n} w{tiles.warps} s{tiles.stages}"
                    verdict = lambda f=product, c=copies[0], y=y: equal(f(c), y)  # noqa: E731
                    add(tokens, way, tiles == own, size, verdict, calls, flops)
                many = [made] if dry else [made.clone() for _ in range(4)]
                calls = [
                    lambda w=w, x=x, n=count, o=options: launch_linear_chunk(x, w, None, n, **o)
                    for w in many
                ]
                add(tokens, "made before", False, size, lambda y=y: equal(y, y), calls, flops)
                del many
        print(f"{matrix.name} done, {deadline - time.monotonic():.0f} s left", flush=True)


if __name__ == "__main__":
    run("words_chunk", __doc__, measure)
