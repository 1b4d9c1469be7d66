"""How fast is attention of a packed chunk of prompts on a CUDA GPU, beside torch's?
`python -m benchmarks.attention_chunk` prints the floors, the figures and one JSON line, which also
goes to $OUT/attention_chunk.json if OUT is set.

Times are medians of CUDA graphs between events. A floor is the time of the products at 790 TFLOP/s,
or of the bytes at 4.2 TB/s, whichever is longer. Errors are the largest difference from float32
softmax of two heads. `same` says whether chunks of 64 and of 1024 tokens, and packing, give the
same bits, and `like` which earlier cut with as many keys of a block gives the same bits. The cut
that the operator uses for a case is marked with *. `--dry` runs tiny shapes in the interpreter.
"""

import argparse
import contextvars
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.cuda_common import median_us, origin  # noqa: E402
from tokenloop.models.kernels.attention_chunk.chunk_tiles import (  # noqa: E402
    ChunkTiles,
    GluonTiles,
    chunk_tiles,
    gluon_tiles,
)
from tokenloop.models.kernels.attention_chunk.operator import (  # noqa: E402
    HAS_GLUON,
    launch_attend_chunk,
    rotate_chunk,
    store_ring,
)

DEVICE = "cpu" if DRY else "cuda"
FLOPS, BANDWIDTH = 790e12, 4.2e12
SEQUENCES = 8
TOLERANCE = 2e-2


class Shape(NamedTuple):
    """A layer; `window` slots of a ring, or 0."""

    name: str
    kv_heads: int
    groups: int
    head_dim: int
    window: int = 0
    values_are_keys: bool = False


SHAPES = (
    Shape("qwen3 4b", 8, 4, 128), Shape("gemma4 31b sliding", 16, 2, 256, 1024),
    Shape("gemma4 31b full", 4, 8, 512, values_are_keys=True), Shape("qwen3.5 9b", 4, 4, 256),
    Shape("gemma3 270m sliding", 1, 4, 256, 512),
)  # fmt: skip
Tiles = ChunkTiles | GluonTiles
# By head size.
VARIANTS = {
    128: (
        ChunkTiles(128, 128, 8, 3), ChunkTiles(128, 128, 8, 2), ChunkTiles(128, 64, 8, 4),
        ChunkTiles(128, 64, 8, 3), ChunkTiles(128, 64, 8, 3, False), ChunkTiles(64, 128, 4, 2),
        ChunkTiles(64, 64, 4, 3),
    ),
    256: (
        ChunkTiles(128, 64, 8, 2), ChunkTiles(128, 64, 8, 2, False), ChunkTiles(128, 32, 8, 4),
        ChunkTiles(128, 32, 8, 3), ChunkTiles(64, 64, 4, 2), ChunkTiles(64, 32, 4, 2),
    ),
    512: (
        ChunkTiles(128, 32, 8, 2, True, 2), ChunkTiles(128, 32, 8, 2, False, 2),
        ChunkTiles(128, 64, 8, 1, True, 2), ChunkTiles(64, 32, 4, 2, True, 2),
        ChunkTiles(64, 32, 8, 2),
    ),
}  # fmt: skip
# Of full layers and of rings.
GLUON = {
    (128, False): (GluonTiles(2), GluonTiles(1)),
    (256, False): (GluonTiles(2, 64), GluonTiles(1, 64), GluonTiles(1, 64, 3)),
    (256, True): (GluonTiles(2, 64), GluonTiles(1, 64, 3), GluonTiles(1, 64)),
    (512, False): (GluonTiles(2, 64, 1), GluonTiles(1, 64)),
}
# Tokens of a chunk, and positions before it.
CASES = (8192, 0), (1024, 0), (128, 0), (128, 8064)
if DRY:
    SHAPES = Shape("full", 1, 2, 16), Shape("ring", 2, 1, 16, 64)
    VARIANTS = {16: (ChunkTiles(64, 32, 4, 1, True), ChunkTiles(64, 64, 4, 1, False))}
    CASES = (192, 0), (64, 128)
LONGEST = CASES[0][0]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def places(pieces: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """starts, rows and first of pieces (row, first position, tokens)."""
    starts = [0]
    for _, _, count in pieces:
        starts.append(starts[-1] + count)
    unused = SEQUENCES - len(pieces)
    return (
        int32(starts + unused * starts[-1:]),
        int32([row for row, _, _ in pieces] + unused * [-1]),
        int32([first for _, first, _ in pieces] + unused * [0]),
    )


class Layer:
    """Queries, keys and values of LONGEST tokens; keys of a full layer are in row 1 of a cache."""

    def __init__(self, shape: Shape):
        self.shape = shape
        torch.manual_seed(0)
        new = {"device": DEVICE, "dtype": torch.bfloat16}
        self.heads = shape.kv_heads * shape.groups
        self.q = torch.randn(LONGEST, self.heads * shape.head_dim, **new)
        self.kv = torch.randn(LONGEST, 2, shape.kv_heads, shape.head_dim, **new)
        self.is_ring = shape.window > 0
        self.scale = shape.head_dim**-0.5
        slots = shape.window or LONGEST + 256
        empty = [torch.zeros(3, slots, *self.kv.shape[2:], **new) for _ in range(2)]
        self.caches = empty
        if not self.is_ring:
            for cache, x in zip(self.caches, self.kv.unbind(1)):
                cache[1, :LONGEST] = x

    def attend(self, first: int, tokens: int, tiles: Tiles | None = None) -> Tensor:
        """A chunk's attention, of row 1."""
        chunk = slice(first, first + tokens)
        return self.call(chunk, places([(1, first, tokens)]), tiles)()

    def call(self, chunk: slice, where: tuple[Tensor, ...], tiles: Tiles | None):
        kv = self.kv[chunk] if self.is_ring else self.kv[0, 0, 0, :0]
        q, options = self.q[chunk], {"scale": self.scale, "is_ring": self.is_ring}
        return lambda: launch_attend_chunk(q, kv, *where, *self.caches, **options, tiles=tiles)

    def fill(self, before: int) -> None:
        """A ring's slots as the positions before a chunk leave them."""
        if self.is_ring:
            for cache, x in zip(self.caches, self.kv.unbind(1)):
                cache.zero_()
                at = torch.arange(max(0, before - self.shape.window), before, device=DEVICE)
                cache[1, at % self.shape.window] = x[at]

    def in_chunks(self, size: int, until: int, tiles: Tiles) -> Tensor:
        """The first tokens' attention, chunk after chunk."""
        self.fill(0)
        parts = []
        for first in range(0, until, size):
            count = min(size, until - first)
            parts.append(self.attend(first, count, tiles))
            if self.is_ring:
                store_ring(
                    self.kv[first : first + count], *places([(1, first, count)]), *self.caches
                )
        return torch.cat(parts)

    def packed(self, tiles: Tiles) -> Tensor:
        """The last 64 tokens' attention, behind 64 of another row and before 64 of a third."""
        self.fill(LONGEST - 64)
        where = places([(0, 0, 64), (1, LONGEST - 64, 64), (2, 0, 64)])
        chunk = slice(LONGEST - 64, LONGEST)
        q = torch.cat([self.q[:64], self.q[chunk], self.q[:64]])
        kv = torch.cat([self.kv[:64], self.kv[chunk], self.kv[:64]])
        out = launch_attend_chunk(
            q, kv, *where, *self.caches, scale=self.scale, is_ring=self.is_ring, tiles=tiles
        )
        return out[64:128]

    def floor_us(self, first: int, tokens: int) -> tuple[float, float]:
        """Microseconds at the least, and floating-point operations."""
        window = self.shape.window or LONGEST + 1
        seen = sum(min(p + 1, window) for p in range(first, first + tokens))
        flops = 4 * self.heads * self.shape.head_dim * seen
        keys = min(first + tokens, tokens + window)
        moved = 4 * self.shape.head_dim * (self.heads * tokens + self.shape.kv_heads * keys)
        return 1e6 * max(flops / FLOPS, moved / BANDWIDTH), flops

    def exact(self, head: int) -> Tensor:
        """float32 attention [LONGEST, Dh] of one head, whole."""
        size = self.shape.head_dim
        q = self.q[:, head * size : (head + 1) * size].float()
        k, v = self.kv[:, :, head // self.shape.groups].float().unbind(1)
        p = torch.arange(LONGEST, device=DEVICE)
        seen = p[None] <= p[:, None]
        if self.is_ring:
            seen &= p[None] > p[:, None] - self.shape.window
        scores = (q @ k.T * self.scale).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v


def microseconds(call, repeats: int) -> float:
    if not DRY:
        return median_us([call] * 4, repeats)
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def torch_s(layer: Layer, repeats: int) -> list[dict]:
    """Times of torch's backends, of one whole sequence."""
    found = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        for tokens, first in CASES:
            if first or layer.is_ring or DRY:
                continue
            q = layer.q[:tokens].view(1, tokens, layer.heads, -1).transpose(1, 2)
            k, v = (x[None, :tokens].transpose(1, 2) for x in layer.kv.unbind(1))
            entry = {"shape": layer.shape.name, "variant": name.lower(), "case": [tokens, first]}
            try:
                with nn.attention.sdpa_kernel(getattr(nn.attention.SDPBackend, name)):
                    entry["us"] = microseconds(
                        lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(
                            q, k, v, is_causal=True, enable_gqa=True
                        ),
                        repeats,
                    )
            except Exception as error:  # a backend may not have the head size
                entry["skipped"] = reason(error)
            found.append(entry)
    return found


def described(tiles: Tiles) -> str:
    if isinstance(tiles, GluonTiles):
        return f"gluon {64 * tiles.consumers}x{tiles.block_n} s{tiles.stages}"
    text = f"{tiles.block_m}x{tiles.block_n} w{tiles.warps} s{tiles.stages} "
    return text + ("tma" if tiles.tma else "ptr") + (f" /{tiles.split}" if tiles.split > 1 else "")


def measured(shape: Shape, repeats: int) -> list[dict]:
    layer = Layer(shape)
    heads = 0, layer.heads - 1
    size = shape.head_dim
    exact = torch.cat([layer.exact(head) for head in heads], 1)

    def chosen(tokens: int) -> Tiles:
        rest = torch.bfloat16, layer.is_ring
        slots = layer.caches[0].shape[1]
        cut = gluon_tiles(tokens, SEQUENCES, layer.heads, size, slots, *rest)
        return HAS_GLUON and cut or chunk_tiles(slots, size, *rest)

    variants = [x for x in VARIANTS[size] if not (layer.is_ring and x.block_n > 64)]
    variants += GLUON.get((size, layer.is_ring), ()) if HAS_GLUON else ()
    variants = [chosen(LONGEST)] * (chosen(LONGEST) not in variants and not DRY) + variants

    def compiled(tiles: Tiles) -> str | None:
        try:
            layer.attend(0, 64, tiles)
        except Exception as error:  # a cut may not fit
            return reason(error)

    with ThreadPoolExecutor(1 if DRY else 8) as pool:
        jobs = [pool.submit(contextvars.copy_context().run, compiled, x) for x in variants]
        faults = [job.result() for job in jobs]
    found, whole_of = [], {}
    for tiles, fault in zip(variants, faults):
        shared = {"shape": shape.name, "variant": described(tiles)}
        if fault:
            found.append(shared | {"case": list(CASES[0]), "skipped": fault})
            continue
        layer.fill(0)
        whole = layer.attend(0, LONGEST, tiles)
        picked = torch.cat([whole[:, head * size : (head + 1) * size] for head in heads], 1)
        shared["error"] = (picked.float() - exact).abs().max().item() / exact.abs().max().item()
        until = min(LONGEST, 2048 + 40)
        shared["same"] = all(
            torch.equal(layer.in_chunks(chunk, until, tiles), whole[:until]) for chunk in (64, 1024)
        ) and torch.equal(layer.packed(tiles), whole[-64:])
        like = [n for n, (t, x) in whole_of.items() if t.block_n == tiles.block_n and
                torch.equal(x, whole)]  # fmt: skip
        shared["like"] = like[0] if like else ""
        whole_of[shared["variant"]] = tiles, whole
        for tokens, first in CASES:
            layer.fill(first)
            floor, flops = layer.floor_us(first, tokens)
            call = layer.call(slice(first, first + tokens), places([(1, first, tokens)]), tiles)
            us = microseconds(call, repeats)
            found.append(
                shared | {"case": [tokens, first], "us": us, "floor_us": floor,
                          "tflops": flops / us / 1e6, "chosen": tiles == chosen(tokens)}
            )  # fmt: skip
    return found + torch_s(layer, repeats) + around(layer, repeats)


def around(layer: Layer, repeats: int) -> list[dict]:
    """Times of rotation, and of putting a chunk into a ring."""
    shape, found = layer.shape, []
    others = 1 if shape.values_are_keys else 2
    width = (layer.heads + others * shape.kv_heads) * shape.head_dim
    qkv = torch.randn(LONGEST, width, device=DEVICE, dtype=torch.bfloat16)
    norm = torch.ones(shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
    inv_freq = torch.rand(shape.head_dim // 2, device=DEVICE)
    for tokens, first in CASES:
        where = places([(1, first, tokens)])
        floor = 1e6 * tokens * 2 * (width + layer.q.shape[1] + 2 * layer.kv[0, 0].numel())

        def rotate(tokens=tokens, where=where):
            return rotate_chunk(
                qkv[:tokens], *where, *layer.caches, norm, norm, inv_freq, eps=1e-6,
                values_are_keys=shape.values_are_keys, is_ring=layer.is_ring,
            )  # fmt: skip

        found.append({
            "shape": shape.name, "variant": "rotate_chunk", "case": [tokens, first],
            "us": microseconds(rotate, repeats), "floor_us": floor / BANDWIDTH,
        })  # fmt: skip
        if layer.is_ring:
            kv = layer.kv[first : first + tokens]
            stored = 4 * kv[0].numel() * min(tokens, shape.window)
            found.append({
                "shape": shape.name, "variant": "store_ring", "case": [tokens, first],
                "us": microseconds(
                    lambda kv=kv, w=where: store_ring(kv, *w, *layer.caches), repeats
                ),
                "floor_us": 1e6 * stored / BANDWIDTH,
            })  # fmt: skip
    return found


def table(rows: list[dict]) -> str:
    lines = [
        f"{'layer':<20} {'cut':<18} {'tokens':>6} {'before':>6} {'us':>8} {'floor':>8} "
        f"{'TFLOP/s':>8} {'error':>7} same like"
    ]
    for row in rows:
        name = row["variant"] + "*" * row.get("chosen", False)
        line = f"{row['shape']:<20} {name:<18} {row['case'][0]:>6} {row['case'][1]:>6} "
        if "skipped" in row:
            lines.append(line + row["skipped"])
            continue
        floor = f"{row['floor_us']:.1f}" if "floor_us" in row else ""
        tflops = f"{row['tflops']:.0f}" if "tflops" in row else ""
        error = f"{row['error']:.4f}" if "error" in row else ""
        same = {True: "yes", False: "NO", None: ""}[row.get("same")]
        line += f"{row['us']:>8.1f} {floor:>8} {tflops:>8} {error:>7} {same:<4} "
        lines.append(line + row.get("like", ""))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_chunk", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes, in the interpreter")
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name has it")
    options = parser.parse_args(arguments)
    if not DRY and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    rows = []
    for shape in SHAPES:
        if options.only in shape.name:
            begin = time.perf_counter()
            rows += measured(shape, options.repeats)
            print(f"{shape.name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    result = origin("attention_chunk") | {"rows": rows}
    line = json.dumps(result)
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "attention_chunk.json").write_text(line + "\n")
    print(line)
    print(table(rows))
    wrong = [r for r in rows if r.get("error", 0) > TOLERANCE or r.get("same") is False]
    if wrong:
        names = {(r["shape"], r["variant"]) for r in wrong}
        sys.exit(f"wrong results: {sorted(names)}")


if __name__ == "__main__":
    main()
