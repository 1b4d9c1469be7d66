"""What would a decode step's layers take in one kernel whose programs stay on the processors?
`python -m benchmarks.resident_layers` measures on a CUDA GPU, in captured graphs:

- a barrier of all programs: by one counter, and by a flag of each program;
- a hop: all programs write parts of a vector and read all of it, as words of 8 bytes, each a value
  and the number of the hop. A reader asks for a word until the number is there, so no barrier is
  needed, and no fence;
- a network's layers as five hops each, with their products, norms and bytes; attention is a hop
  without its work;
- the same layers as the launches of export/launches/cuda_step.py, which overlap.

It prints microseconds, and one JSON line.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.cuda_common import CONFIGS, device_us, median_us, origin, save
from tokenloop.models.kernels.launch.dependent_launch import prefetch_rows
from tokenloop.models.kernels.linear.triton_epilogue import activate

REPEATS = 15
# No wait lasts for ever: beyond so many turns it is an error.
COUNTER = tl.constexpr(
    """{ .reg .pred p, q; .reg .b32 t, v, turns;
    mov.u32 turns, 0;
    bar.sync 0;
    mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra DONE;
    red.release.gpu.global.add.u32 [$1], 1;
    LOOP: add.u32 turns, turns, 1; setp.gt.u32 q, turns, 4000000; @q trap;
    ld.acquire.gpu.global.u32 v, [$1]; sub.s32 v, v, $2; setp.lt.s32 q, v, 0; @q bra LOOP;
    DONE: bar.sync 0; mov.b32 $0, 0; }"""
)
FLAGS = tl.constexpr(
    """{ .reg .pred p; .reg .b32 t, n, v, turns; .reg .b64 a;
    mov.u32 turns, 0; bar.sync 0;
    mov.u32 t, %tid.x; mov.u32 n, %ntid.x; setp.ne.u32 p, t, 0;
    mul.wide.u32 a, $3, 4; add.s64 a, a, $1;
    @!p st.release.gpu.global.u32 [a], $2;
    NEXT: setp.ge.u32 p, t, $4; @p bra DONE;
    mul.wide.u32 a, t, 4; add.s64 a, a, $1;
    LOOP: add.u32 turns, turns, 1; setp.gt.u32 p, turns, 4000000; @p trap;
    ld.acquire.gpu.global.u32 v, [a]; sub.s32 v, v, $2; setp.lt.s32 p, v, 0; @p bra LOOP;
    add.u32 t, t, n; bra NEXT;
    DONE: bar.sync 0; mov.b32 $0, 0; }"""
)


TRAP = tl.constexpr("{ .reg .pred p; setp.gt.s32 p, $1, 4000000; @p trap; mov.b32 $0, 0; }")


@triton.jit
def gather(ptr, K, epoch, BLOCK: tl.constexpr):
    """float32 [BLOCK], the K values of the words at ptr, and 0 beyond, when all are of `epoch`."""
    k = tl.arange(0, BLOCK)
    words = tl.load(ptr + k, mask=k < K, other=0, volatile=True)
    missing = tl.max(((k < K) & ((words >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)
    turns = 0
    while missing != 0:
        words = tl.load(ptr + k, mask=k < K, other=0, volatile=True)
        missing = tl.max(((k < K) & ((words >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)
        turns += 1
        missing += tl.inline_asm_elementwise(
            TRAP, "=r,r", [turns], dtype=tl.int32, is_pure=False, pack=1
        )
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def tell(ptr, n, values, mask, epoch):
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(ptr + n, (epoch.to(tl.int64) << 32) | bits, mask=mask)


@triton.jit
def barrier_kernel(
    state_ptr, epoch_ptr, P: tl.constexpr, COUNT: tl.constexpr, HOW: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    base = tl.load(epoch_ptr)
    zero = 0
    total = 0.0
    for i in range(COUNT):
        if HOW == "counter":
            zero += tl.inline_asm_elementwise(
                COUNTER, "=r,l,r", [state_ptr.to(tl.int64), (base + i + 1) * P + zero],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        elif HOW == "flags":
            zero += tl.inline_asm_elementwise(
                FLAGS, "=r,l,r,r,r", [state_ptr.to(tl.int64), base + i + 1 + zero, pid, P],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            words = state_ptr.to(tl.pointer_type(tl.int64)) + (i % 2) * BLOCK
            n = pid * EACH + tl.arange(0, TILE)
            mine = (n < K) & (n < (pid + 1) * EACH)
            tell(words, n, total + n.to(tl.float32), mine, base + i + 1)
            total += tl.sum(gather(words, K, base + i + 1, BLOCK), 0)
    tl.store(epoch_ptr + 1 + pid, zero + total.to(tl.int32))
    if pid == 0:
        tl.store(epoch_ptr, base + COUNT)


@triton.jit
def weights(w_ptr, first, N, K, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """[TILE, BLOCK] of rows `first` and up of a matrix [N, K]."""
    n = tl.minimum(first + tl.arange(0, TILE), N - 1)
    k = tl.arange(0, BLOCK)
    return tl.load(w_ptr + n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)


@triton.jit
def product(w, x):
    x = x.to(tl.bfloat16).to(tl.float32)
    return tl.sum(w.to(tl.float32) * x[None, :], 1).to(tl.bfloat16).to(tl.float32)


@triton.jit
def norm(x, weight, K):
    x64 = x.to(tl.float64)
    mean = tl.sum(x64 * x64, 0).to(tl.float32) / K
    return x * (1 / tl.sqrt_rn(mean + 1e-6)) * weight


@triton.jit
def layers_kernel(
    x_ptr, norm_ptr, qkv_ptr, o_ptr, gate_ptr, down_ptr, words_ptr, epoch_ptr, y_ptr, layers,
    E: tl.constexpr, Q: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    TQ: tl.constexpr, TA: tl.constexpr, TO: tl.constexpr, TF: tl.constexpr, TD: tl.constexpr,
    BE: tl.constexpr, BA: tl.constexpr, BF: tl.constexpr, BQ: tl.constexpr,
    AHEAD: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    base = tl.load(epoch_ptr)
    k = tl.arange(0, BE)
    x = tl.load(x_ptr + k, mask=k < E, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + k, mask=k < E, other=0.0).to(tl.float32)
    to_qkv = words_ptr
    to_att = to_qkv + BQ
    to_o = to_att + BA
    to_act = to_o + BE
    to_x = to_act + BF
    for layer in range(layers):
        epoch = base + layer + 1
        if AHEAD >= 2:
            ahead = tl.minimum(layer + 1, layers - 1).to(tl.int64)
            asked = 0
            if pid * TQ < Q:
                asked += prefetch_rows(qkv_ptr + (ahead * Q + pid * TQ) * E, 0, 1, TQ * E * 2)
            if pid * TO < E:
                asked += prefetch_rows(o_ptr + (ahead * E + pid * TO) * A, 0, 1, TO * A * 2)
            if pid * TF < F:
                asked += prefetch_rows(gate_ptr + (ahead * 2 * F + pid * TF) * E, 0, 1, TF * E * 2)
                asked += prefetch_rows(
                    gate_ptr + (ahead * 2 * F + F + pid * TF) * E, 0, 1, TF * E * 2
                )
            if pid * TD < E:
                asked += prefetch_rows(down_ptr + (ahead * E + pid * TD) * F, 0, 1, TD * F * 2)
            epoch += asked
        wide = layer.to(tl.int64)
        # Queries, keys and values.
        if AHEAD >= 1:
            wq = weights(qkv_ptr + wide * Q * E, pid * TQ, Q, E, TQ, BE)
        if layer > 0:
            branch = gather(to_x, E, epoch - 1, BE)
            if POST:
                branch = norm(branch, weight, E)
            x = (x + branch).to(tl.bfloat16).to(tl.float32)
        if pid * TQ < Q:
            h = norm(x, weight, E)
            if AHEAD == 0:
                wq = weights(qkv_ptr + wide * Q * E, pid * TQ, Q, E, TQ, BE)
            n = pid * TQ + tl.arange(0, TQ)
            tell(to_qkv, n, product(wq, h), n < Q, epoch)
        # Attention, without its work.
        if AHEAD >= 1:
            wo = weights(o_ptr + wide * E * A, pid * TO, E, A, TO, BA)
        if pid * TA < A:
            seen = gather(to_qkv, Q, epoch, BQ)
            n = pid * TA + tl.arange(0, TA)
            tell(to_att, n, tl.sum(seen, 0) * 1e-3 + n.to(tl.float32) * 1e-3, n < A, epoch)
        # Its projection.
        if pid * TO < E:
            a = gather(to_att, A, epoch, BA)
            if AHEAD == 0:
                wo = weights(o_ptr + wide * E * A, pid * TO, E, A, TO, BA)
            n = pid * TO + tl.arange(0, TO)
            tell(to_o, n, product(wo, a), n < E, epoch)
        # Gate and up.
        if AHEAD >= 1:
            wg = weights(gate_ptr + wide * 2 * F * E, pid * TF, F, E, TF, BE)
            wu = weights(gate_ptr + (wide * 2 + 1) * F * E, pid * TF, F, E, TF, BE)
        branch = gather(to_o, E, epoch, BE)
        if POST:
            branch = norm(branch, weight, E)
        x = (x + branch).to(tl.bfloat16).to(tl.float32)
        if pid * TF < F:
            h = norm(x, weight, E)
            if AHEAD == 0:
                wg = weights(gate_ptr + wide * 2 * F * E, pid * TF, F, E, TF, BE)
                wu = weights(gate_ptr + (wide * 2 + 1) * F * E, pid * TF, F, E, TF, BE)
            n = pid * TF + tl.arange(0, TF)
            act = activate(product(wg, h), "gelu") * product(wu, h)
            tell(to_act, n, act, n < F, epoch)
        # Down.
        if pid * TD < E:
            if AHEAD >= 1:
                wd = weights(down_ptr + wide * E * F, pid * TD, E, F, TD, BF)
            a = gather(to_act, F, epoch, BF)
            if AHEAD == 0:
                wd = weights(down_ptr + wide * E * F, pid * TD, E, F, TD, BF)
            n = pid * TD + tl.arange(0, TD)
            y = product(wd, a)
            tell(to_x, n, y, n < E, epoch)
            if layer == layers - 1:
                tl.store(y_ptr + n, y, mask=n < E)
    if pid == 0:
        tl.store(epoch_ptr, base + layers)


class Shape(NamedTuple):
    """A network's layers: hidden size, outputs of queries, keys and values, inputs of `o`,
    feed-forward, layers, and whether branches are normed."""

    hidden: int
    qkv: int
    attended: int
    feed: int
    layers: int
    post: bool


def shape_of(name: str) -> Shape:
    """That of a name in benchmarks/configs."""
    keys = json.loads((CONFIGS / f"{name}.json").read_text())
    heads, kv_heads = keys["num_attention_heads"], keys["num_key_value_heads"]
    size = keys.get("head_dim") or keys["hidden_size"] // heads
    return Shape(
        keys["hidden_size"], (heads + 2 * kv_heads) * size, heads * size,
        keys["intermediate_size"], keys["num_hidden_layers"], "gemma" in keys["model_type"],
    )  # fmt: skip


def barrier_us(how: str, programs: int, warps: int, K: int = 640) -> float:
    """Microseconds of one of many barriers or hops."""
    count = 500
    state = torch.zeros(2**14, dtype=torch.int64, device="cuda")
    epoch = torch.zeros(1 + programs, dtype=torch.int32, device="cuda")
    block = triton.next_power_of_2(K)
    each = triton.cdiv(K, programs)
    if how == "words":
        programs = triton.cdiv(K, each)  # one that wrote nothing could be left behind

    def run():
        barrier_kernel[(programs,)](
            state, epoch, programs, count, how, K, block, each, triton.next_power_of_2(each),
            num_warps=warps, launch_cooperative_grid=True,
        )  # fmt: skip

    return median_us([run], REPEATS) / count


def tile_of(outputs: int, programs: int, least: int) -> int:
    """Outputs of a program, a power of two, so that there are at most so many programs."""
    return max(least, triton.next_power_of_2(triton.cdiv(outputs, programs)))


def resident(shape: Shape, most: int, warps: int, ahead: int):
    """A run of the layers' kernel, and its compiled form."""
    torch.manual_seed(0)
    E, Q, A, F = shape.hidden, shape.qkv, shape.attended, shape.feed
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    L = shape.layers
    qkv, o = torch.randn(L, Q, E, **new) * 0.02, torch.randn(L, E, A, **new) * 0.02
    gate, down = torch.randn(L, 2 * F, E, **new) * 0.02, torch.randn(L, E, F, **new) * 0.02
    x, weight = torch.randn(E, **new), torch.rand(E, **new)
    y = torch.zeros(E, **new)
    tiles = [tile_of(n, most, warps) for n in (Q, A, E, F, E)]
    # Every program has a tile of some product, so none is left behind.
    programs = max(triton.cdiv(n, t) for n, t in zip((Q, A, E, F, E), tiles))
    blocks = [triton.next_power_of_2(n) for n in (E, A, F, Q)]
    words = torch.zeros(2 * blocks[0] + sum(blocks[1:]), dtype=torch.int64, device="cuda")
    epoch = torch.zeros(1, dtype=torch.int32, device="cuda")
    kept = []

    def run():
        compiled = layers_kernel[(programs,)](
            x, weight, qkv, o, gate, down, words, epoch, y, L, E, Q, A, F, *tiles,
            BE=blocks[0], BA=blocks[1], BF=blocks[2], BQ=blocks[3],
            AHEAD=ahead, POST=shape.post, num_warps=warps, launch_cooperative_grid=True,
        )  # fmt: skip
        if not kept:
            kept.append(compiled)

    return run, kept, y, programs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resident_layers", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--configs", nargs="+", default=["gemma3-270m", "qwen3-0.6b"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    from benchmarks.fused_step import captured, make_step  # needs cuda-bindings

    found: dict = {"barriers": [], "layers": []}
    for how, programs, warps, K in [
        ("counter", 132, 4, 0), ("counter", 132, 8, 0), ("counter", 264, 4, 0),
        ("flags", 132, 4, 0), ("flags", 132, 8, 0), ("flags", 264, 4, 0),
        ("words", 132, 4, 640), ("words", 132, 8, 640), ("words", 160, 4, 640),
        ("words", 128, 8, 1024), ("words", 256, 4, 1024), ("words", 256, 4, 2048),
        ("words", 128, 8, 2048),
    ]:  # fmt: skip
        us = barrier_us(how, programs, warps, K or 640)
        row = {"how": how, "programs": programs, "warps": warps, "words": K, "us": us}
        found["barriers"].append(row)
        print(f"{how:8} {programs} programs of {warps} warps, {K} words: {us:.3f} us", flush=True)
    for name in options.configs:
        shape = shape_of(name)
        step = make_step(name, 1000, 1, 1024, 0)
        step.head = torch.nn.Linear(shape.hidden, 16, bias=False, device="cuda").bfloat16()
        graph, *_ = captured(step, 128, 1, True)
        us = statistics.median(device_us(graph.replay, 1, 15))
        found["layers"].append({"config": name, "how": "launches", "us": us})
        print(f"{name}: launches, without the head {us:.1f} us", flush=True)
        del step, graph
        for most, warps in ((264, 4), (132, 8)):
            for ahead in (2, 1, 0) if most == 264 else (2, 1):
                run, kept, y, programs = resident(shape, most, warps, ahead)
                us = median_us([run], REPEATS)
                registers, spills = kept[0].n_regs, kept[0].n_spills
                row = {
                    "config": name, "how": "resident", "programs": programs, "warps": warps,
                    "ahead": ahead, "us": us, "registers": registers, "spills": spills,
                }  # fmt: skip
                found["layers"].append(row)
                print(
                    f"{name}: {programs} programs of {warps} warps, ahead {ahead}: {us:.1f} us, "
                    f"{registers} registers, {spills} spilled, sum {y.float().abs().sum():.3f}",
                    flush=True,
                )
    save({**origin("resident_layers"), **found}, options.output)


if __name__ == "__main__":
    main()
