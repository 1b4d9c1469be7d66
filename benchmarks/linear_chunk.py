"""How fast are linear layers over a packed chunk of prompts on a CUDA GPU, beside cuBLAS, and are
their bits the same however they are cut? `python -m benchmarks.linear_chunk` prints a table.

Times are medians of CUDA graphs of several calls between events; small chunks go over copies of the
weights that no L2 holds. The floor is the larger of what the products and the bytes take. Bits are
those of the operator's own tiles for the largest chunk, of which smaller chunks are the beginning.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from benchmarks.chunk_common import (
    BYTES_S,
    COLD_BYTES,
    FLOP_S,
    allocate,
    equal,
    run,
    time_us,
)
from benchmarks.cuda_common import Matrix
from tokenloop.models.kernels.linear_chunk.chunk_tiles import ChunkTiles, chunk_tiles
from tokenloop.models.kernels.linear_chunk.operator import launch_linear_chunk

TOKENS = 256, 512, 1024, 2048
MATRICES = (
    Matrix("qwen3-4b qkv", 6144, 2560), Matrix("qwen3-4b o", 2560, 4096),
    Matrix("qwen3-4b gate up", 9728, 2560, True), Matrix("qwen3-4b down", 2560, 9728),
    Matrix("gemma4-31b qkv", 16_384, 5376), Matrix("gemma4-31b o", 5376, 8192),
    Matrix("gemma4-31b gate up", 21_504, 5376, True), Matrix("gemma4-31b down", 5376, 21_504),
    Matrix("hybrid-9b qkv", 12_352, 4096), Matrix("hybrid-9b o", 4096, 4096),
    Matrix("hybrid-9b gate up", 12_288, 4096, True), Matrix("hybrid-9b down", 4096, 12_288),
)  # fmt: skip
DRY_TOKENS = 16, 40
DRY_MATRICES = Matrix("plain", 48, 40), Matrix("gated", 24, 72, True)


def pointers(*shape: int, **named) -> ChunkTiles:
    return ChunkTiles(*shape, **named)


def descriptors(*shape: int, **named) -> ChunkTiles:
    return ChunkTiles(*shape, descriptors=True, **named)


def candidates(tokens: int, matrix: Matrix) -> list[ChunkTiles]:
    """Ways to cut a product, the operator's own first."""
    own = chunk_tiles(tokens, matrix.outputs, matrix.inputs, torch.bfloat16, matrix.gated)
    ways = {
        # Tokens, outputs, inputs, warps, stages.
        (64, False): [
            pointers(64, 32, 128, 4, 7), pointers(64, 64, 128, 4, 6), pointers(64, 128, 64, 4, 8),
            descriptors(64, 64, 128, 4, 5, extra=32), descriptors(64, 32, 128, 4, 5, extra=16),
        ],
        (64, True): [
            pointers(64, 32, 128, 4, 6), pointers(64, 64, 64, 4, 8), pointers(64, 128, 64, 4, 5),
        ],
        (128, False): [
            pointers(128, 32, 128, 4, 5), pointers(128, 64, 64, 4, 8), pointers(64, 64, 128, 4, 6),
            pointers(128, 128, 64, 8, 6), descriptors(128, 32, 128, 4, 5),
            descriptors(64, 64, 128, 4, 5, extra=32), descriptors(128, 64, 64, 4, 5, extra=32),
        ],
        (128, True): [
            pointers(128, 128, 64, 8, 4), pointers(128, 64, 64, 8, 6), pointers(128, 64, 64, 4, 6),
            pointers(128, 64, 64, 8, 5, extra=16),
        ],
        (512, False): [
            descriptors(64, 64, 128, 4, 5), descriptors(64, 64, 128, 4, 5, extra=32),
            descriptors(64, 128, 64, 4, 5), descriptors(64, 128, 64, 4, 5, extra=32),
            descriptors(64, 128, 64, 4, 5, extra=64), descriptors(128, 64, 64, 4, 5),
            descriptors(128, 64, 64, 4, 7), descriptors(128, 64, 64, 4, 5, extra=32),
            descriptors(128, 128, 64, 4, 5), descriptors(128, 128, 64, 4, 5, extra=32),
            descriptors(128, 128, 64, 8, 4, extra=64), descriptors(128, 256, 64, 8, 4, parts=2),
            pointers(128, 64, 64, 4, 8), pointers(128, 128, 64, 8, 6),
        ],
        (512, True): [
            descriptors(128, 128, 64, 8, 4, flatten=False),
            descriptors(128, 64, 64, 4, 5, flatten=False),
            descriptors(128, 64, 64, 8, 5, flatten=False),
            descriptors(64, 128, 64, 4, 5, flatten=False), pointers(128, 128, 64, 8, 4),
            pointers(128, 64, 64, 8, 6),
        ],
        (1024, False): [
            descriptors(128, 256, 64, 8, 4, parts=2), descriptors(128, 128, 64, 4, 5),
            descriptors(128, 128, 64, 4, 5, extra=32), descriptors(128, 128, 64, 8, 5, extra=32),
            descriptors(128, 128, 64, 8, 5, flatten=False, extra=32),
            descriptors(128, 128, 64, 4, 4, extra=64), descriptors(128, 128, 64, 8, 4, extra=64),
            descriptors(128, 128, 64, 8, 4, flatten=False, extra=64),
        ],
        (1024, True): [
            descriptors(128, 128, 64, 8, 4, flatten=False),
            descriptors(128, 128, 64, 8, 4, flatten=False, group=16),
            descriptors(128, 64, 64, 4, 5, flatten=False),
        ],
    }  # fmt: skip
    bound = min((size for size, _ in ways if tokens <= size), default=1024)
    return list(dict.fromkeys([own, *ways[bound, matrix.gated]]))


def described(tiles: ChunkTiles) -> str:
    kind = "pointers"
    if tiles.descriptors:
        kind = "warps" if tiles.specialize else "flat" if tiles.flatten else "nested"
    outputs = f"{tiles.block_n}+{tiles.extra}" if tiles.extra else f"{tiles.block_n}"
    shape = f"{tiles.block_t}x{outputs}x{tiles.block_k}"
    return f"{kind} {shape} w{tiles.warps} s{tiles.stages} p{tiles.parts} g{tiles.group}"


def build(calls: list[Callable[[], object]], begin: Callable[[], None]) -> None:
    """Compile what the calls need side by side; failures are reported where they are measured."""
    with ThreadPoolExecutor(16, initializer=begin) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.exception()


def named(matrices: Sequence[Matrix], only: Sequence[str]) -> list[Matrix]:
    """Those whose names have one of the strings in them; all if there is none."""
    return [m for m in matrices if not only or any(part in m.name for part in only)]


def measure(
    rows: list[dict], deadline: float, repeats: int, dry: bool = False,
    tokens: Sequence[int] = (), only: Sequence[str] = (),
) -> None:  # fmt: skip
    """Add a row of figures for each matrix, number of tokens and way."""
    device = "cpu" if dry else "cuda"
    matrices, sizes = (DRY_MATRICES, DRY_TOKENS) if dry else (MATRICES, tokens or TOKENS)
    matrices = named(matrices, only)
    if not matrices:
        return
    largest = max(sizes)
    new = {"device": device, "dtype": torch.bfloat16}
    if not dry:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        allocate()
        torch.manual_seed(0)
        # A kernel does not depend on the sizes, so small matrices will do.
        given = torch.randn(128, 1024, **new), torch.randn(1024, 1024, **new), None
        count = torch.tensor([128], dtype=torch.int32, device=device)
        ways = {
            (tiles, matrix.gated): None
            for matrix in matrices
            for tokens in sizes
            for tiles in candidates(tokens, matrix)
        }
        calls = [
            lambda t=tiles, g=gated: launch_linear_chunk(
                *given, count, activation="silu" if g else None, tiles=t
            )
            for tiles, gated in ways
        ]
        start = time.monotonic()
        build(calls, allocate)
        torch.cuda.synchronize()
        print(f"{len(calls)} kernels in {time.monotonic() - start:.0f} s", flush=True)
    for matrix in matrices:
        weight = torch.randn(matrix.rows, matrix.inputs, **new) * matrix.inputs**-0.5
        x = torch.randn(largest, matrix.inputs, **new)
        count_copies = 1 if dry else max(1, min(20, int(COLD_BYTES // weight.nbytes) + 1))
        copies = [weight] + [weight.clone() for _ in range(count_copies - 1)]
        activation = "silu" if matrix.gated else None

        def product(x, weight, count, tiles, activation=activation):
            return launch_linear_chunk(x, weight, None, count, activation=activation, tiles=tiles)

        def torch_s(x, weight, gated=matrix.gated):
            y = F.linear(x, weight)
            if gated:
                gate, up = y.chunk(2, -1)
                y = F.silu(gate) * up
            return y

        whole = torch.tensor([largest], dtype=torch.int32, device=device)
        expected = None
        for tiles in candidates(largest, matrix):
            try:
                expected = product(x, weight, whole, tiles)
                break
            # What fails here fails again below, and is reported there.
            except Exception as failure:
                print(f"{matrix.name} {described(tiles)}: {failure}"[:200], flush=True)
        for tokens in sizes:
            size = 2 * (weight.numel() + tokens * (matrix.inputs + matrix.outputs))
            flops = 2.0 * tokens * weight.numel()
            floor = max(size / BYTES_S, flops / FLOP_S) * 1e6
            part = x[:tokens]
            count = torch.tensor([tokens], dtype=torch.int32, device=device)
            # A graph that is long enough for events to time.
            used = [copies[i % len(copies)] for i in range(max(2, min(20, int(400 // floor))))]
            used = used[:1] if dry else used
            for tiles in [*candidates(tokens, matrix), None]:
                way = "cuBLAS" if tiles is None else described(tiles)
                row = {"name": matrix.name, "tokens": tokens, "way": way, "floor_us": floor}
                row["own"] = tiles == candidates(tokens, matrix)[0]
                rows.append(row)
                if time.monotonic() > deadline:
                    row["failure"] = "no time left"
                    continue
                try:
                    if tiles is None:
                        row["bits"] = equal(torch_s(part, weight), expected[:tokens])
                        calls = [lambda w=w, part=part: torch_s(part, w) for w in used]
                    else:
                        row["bits"] = equal(product(part, weight, count, tiles), expected[:tokens])
                        calls = [
                            lambda w=w, a=(part, count, tiles): product(a[0], w, *a[1:])
                            for w in used
                        ]
                    row["us"] = time_us(calls, repeats, dry)
                    row["tflops"] = flops / row["us"] / 1e6
                    row["tb_s"] = size / row["us"] / 1e6
                # Triton's and CUDA's failures have no common type; the next way may work.
                except Exception as failure:
                    row["failure"] = f"{type(failure).__name__}: {failure}".split("\n")[0][:90]
            # Rows beyond the count leave those before it as they are.
            if tokens > 37:
                few = torch.tensor([tokens - 37], dtype=torch.int32, device=device)
                dirty = part.clone()
                dirty[tokens - 37 :] = float("nan")
                got = product(dirty, weight, few, candidates(tokens, matrix)[0])[: tokens - 37]
                verdict = equal(got, expected[: tokens - 37])
                if verdict != "same":
                    print(f"{matrix.name} {tokens}: {verdict} of a chunk that is not full differs")
        print(f"{matrix.name} done, {deadline - time.monotonic():.0f} s left", flush=True)
        del copies, weight, x, expected


if __name__ == "__main__":
    run("linear_chunk", __doc__, measure)
