"""Compile for a Hopper GPU what groups of operators would launch, and see that exactly those
kernels wait for others that say so.

`python tests/compile_kernels.py linear hybrids` prints how many different kernels each group has.
It takes Triton, and no GPU. `--ptx` names a directory that it writes each kernel's PTX to, as
NAME-HASH.ptx: the text without comments and places in source files, and a hash of that. So two
commits have the same kernels if `ls` says the same of their directories.
"""

import argparse
import hashlib
import importlib
import itertools
import re
from pathlib import Path

import torch
import triton
from torch import bfloat16, empty, float16, float32, int32, int64
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from tokenloop.models.kernels.launch.dependent_launch import WAITING
from tokenloop.models.kernels.launch.launches import Launch, kept_launches

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
# What may be read before a kernel waits: weights and tables, what the host writes before a graph,
# and the state that no other kernel of a graph writes.
EARLY = {
    "w_ptr", "weight_ptr", "scale_ptr", "norm_ptr", "post_ptr", "scalar_ptr", "bias_ptr",
    "q_norm_ptr", "k_norm_ptr", "inv_freq_ptr", "A_log_ptr", "dt_bias_ptr", "table_ptr",
    "count_ptr", "starts_ptr", "rows_ptr", "first_ptr", "query_start_loc_ptr",
    "cache_indices_ptr", "position_ptr", "sinks_ptr", "shared_w_ptr",
}  # fmt: skip
OWN_STATE = {
    "attend_kernel": {"k_ptr", "v_ptr"}, "gated_delta_rule_update_kernel": {"state_ptr"},
    "causal_conv1d_update_kernel": {"state_ptr", "has_initial_ptr"},
}  # fmt: skip
# Weights that a kernel right ahead may have made of packed ones are only asked for.
ASKED = {
    name: {"w_ptr"} for name in (
        "pointers_kernel", "descriptors_kernel", "gate_up_chunk_kernel", "down_chunk_kernel",
    )
}  # fmt: skip
# Kernels of which some programs return before they wait, but never all of them.
SOME_RETURN = {"attend_kernel"}
OPTIONS = "num_warps", "num_stages", "maxnreg"
# What tells kernels apart, and the PTX of those that are compiled.
Key = tuple[str, ...]
compiled: dict[Key, str] = {}


def compile_launch(launch: Launch, ptx: Path | None) -> Key:
    """Compile a launch's kernel, with what is a constant for torch's compiler, any 1 among them,
    and multiples of 16. Its PTX is written to the directory `ptx`, if there is one."""
    assert all(0 < size < 2**31 for size in launch.grid)
    kernel, named = launch.kernel, dict(launch.named)
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = dict(zip(kernel.arg_names, launch.arguments)) | named
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = True
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        else:
            # Python's floats may come as float64 from torch's compiler: there are none.
            assert isinstance(value, int), parameter.name
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = kernel.__name__, *map(str, (signature, constants, attributes, options))
    if key not in compiled:
        kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
        source = kind(kernel, signature, constants, attributes)
        code = triton.compile(source, target=TARGET, options=options).asm["ptx"]
        assert ("griddepcontrol.wait" in code) == (kernel.__name__ in WAITING)
        # Warps of a Gluon kernel that begin later have code of their own ahead of the wait.
        if kernel.__name__ in WAITING and kind is ASTSource:
            given = {name: kind for name, kind in signature.items() if kind != "constexpr"}
            own_state = OWN_STATE.get(kernel.__name__, set())
            # State that an earlier kernel of the step writes is only asked for.
            writes = constants.get("KEYS", True)
            check_wait(kernel.__name__, code, given, own_state if writes else set(), own_state)
        if ptx is not None:
            write_ptx(ptx, kernel.__name__, code)
        compiled[key] = code
    return key


def check_wait(
    kernel: str, code: str, given: dict[str, str], read_too: set[str], asked_too: set[str]
) -> None:
    """See that a program waits before it returns or stores, and that what it reads before that is
    in EARLY and not in ASKED, or in `read_too`, and what it prefetches in EARLY or `asked_too`;
    `given` are the types of its parameters."""
    names = [name if kind.startswith("*") else None for name, kind in given.items()]
    body = code.split(".entry")[1].split("\n{", 1)[1]
    ahead, behind = body.split("griddepcontrol.wait", 1)
    # Every path leads through the wait.
    for label in re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", ahead):
        assert f"\n{label}:" in ahead or kernel in SOME_RETURN, f"{kernel} returns before it waits"
    assert not re.search(r"\b(ret;|st\.global|atom|red\.|bulk\.tensor)", ahead), kernel
    # Each register comes from these parameters.
    sources: dict[str, set[int]] = {}
    for line in ahead.splitlines():
        line = line.split("//")[0].strip()
        found = [set(), *(sources.get(register, set()) for register in re.findall(r"%\w+", line))]
        if parameter := re.search(r"ld\.param\S*\s+(%\w+), \[\w+?_param_(\d+)", line):
            sources[parameter[1]] = {int(parameter[2])}
        elif re.search(r"(ld\.global|cp\.async|prefetch)", line):
            address = re.search(r"\[\s*(%\w+)(?:\s*\+[^]]*)?\s*\]", line.split("shared")[-1])
            read = {names[i] for i in sources.get(address[1], set())} if address else set()
            if "prefetch" in line:
                early = EARLY | asked_too | {None}
            else:
                early = EARLY - ASKED.get(kernel, set()) | read_too | {None}
            assert read <= early, f"{kernel} reads {read - early} before it waits"
        elif target := re.match(r"(?:@!?%\w+\s+)?[a-z][\w.:]*\s+\{?\s*(%\w+)", line):
            sources[target[1]] = sources.get(target[1], set()).union(*found)


def arithmetic(code: str) -> list[str]:
    """The instructions of PTX that compute floating-point numbers or pass them among threads, in
    their order."""
    found = re.findall(r"^\s*(?:@!?%\w+\s+)?((?:[a-z]\w*)\.[\w.:]+)\s", code, flags=re.M)
    moves = "ld", "st", "mov", "cp", "setp", "selp", "prefetch"
    return [
        name
        for name in found
        if re.search(r"\.(f16|bf16|f32|f64)|^shfl", name) and name.split(".")[0] not in moves
    ]


def check_drafts(codes: list[str]) -> None:
    """That rows of one sequence are computed as a step computes them: PTX of a step's attention, of
    what stores the rows' keys, and of their attention."""
    step, keys, rows = codes
    assert len(arithmetic(step)) > 300
    assert arithmetic(rows) == arithmetic(step)
    # Both store keys and values first.
    ahead, of_step = (arithmetic(code.split("st.global")[0]) for code in (keys, step))
    assert len(ahead) > 100 and ahead == of_step[: len(ahead)] == of_step


def write_ptx(directory: Path, name: str, code: str) -> None:
    """Write the instructions of a kernel's PTX, without debugging information."""
    noise = ".loc", ".file", "//", "$L__tmp"
    lines = [line for line in code.splitlines() if not line.strip().startswith(noise)]
    lines = [line for line in lines if "$L__info" not in line]
    text = re.sub(r"\t*// .*", "", "\n".join(lines).split(".section")[0])
    directory.mkdir(parents=True, exist_ok=True)
    hashed = hashlib.sha256(text.encode()).hexdigest()[:16]
    (directory / f"{name}-{hashed}.ptx").write_text(text)


def operators(name: str):
    """The module of operators tokenloop.`name`."""
    return importlib.import_module(f"tokenloop.{name}")


def linear() -> None:
    from tokenloop.models.kernels.linear.packing import (
        quantize_float8,
        quantize_int4,
        quantize_int8,
    )

    module = operators("models.kernels.linear.operator")
    semaphores = empty(100_000, dtype=int32)
    # Small layers and large ones, and one that fills no tiles.
    for (outputs, inputs), rows in itertools.product(((512, 640), (2048, 4096)), (1, 32)):
        whole = torch.zeros(2 * outputs, inputs)
        quantized = quantize_int4(whole), quantize_int8(whole)
        for weight, scale in ((whole, None), (whole.bfloat16(), None), *quantized):
            x = empty(rows, inputs, dtype=float32 if weight.dtype == float32 else bfloat16)
            for activation in (None, "gelu_tanh"):
                arguments = weight, scale, None, semaphores
                module.linear(x, *arguments, activation=activation)
                norm = empty(inputs, dtype=x.dtype)
                options = {"eps": 1e-6, "offset": 1.0, "activation": activation}
                module.add_norm_linear(x, x, norm, norm[:1], norm, *arguments, **options)
    # A checkpoint's groups of 32, with its scales.
    for words, dtype in ((quantized[0][0], float16), (quantized[1][0], float32)):
        scale = empty(4096 // 32, len(words), dtype=dtype)
        for rows, activation in ((1, None), (1, "silu"), (32, "silu")):
            x = empty(rows, 4096, dtype=bfloat16)
            module.linear(x, words, scale, None, semaphores, activation=activation)
    # Float8 with a scale for each row, and blocks of it.
    words, scale = quantize_float8(whole)
    for rows, activation, scales in (
        (1, None, scale), (32, "silu", scale), (1, "silu", empty(4096 // 128, len(words))),
    ):  # fmt: skip
        x = empty(rows, 4096, dtype=bfloat16)
        module.linear(x, words, scales, None, semaphores, activation=activation)
    uneven = empty(3, 5000, dtype=bfloat16), empty(77, 5000, dtype=bfloat16)
    bias = empty(77, dtype=bfloat16)
    module.linear(*uneven, None, bias, semaphores, soft_cap=30.0, out_float32=True)


def attention() -> None:
    module = operators("models.kernels.attention.operator")
    semaphores = empty(100_000, dtype=int32)
    layouts = (8, 4, 128, 1024), (1, 4, 256, 2048), (4, 8, 512, 8448)
    for (kv_heads, groups, size, slots), rows in itertools.product(layouts, (1, 64)):
        for dtype in (bfloat16, float32):
            shared = kv_heads == 4
            width = kv_heads * size * (groups + (1 if shared else 2))
            caches = (empty(rows, slots, kv_heads, size, dtype=dtype) for _ in range(2))
            norms = (empty(size, dtype=dtype) for _ in range(2))
            module.attend_step(
                empty(rows, width, dtype=dtype), empty(rows, dtype=int64), *caches, *norms,
                empty(size // 2), semaphores, scale=1.0, eps=1e-6, value_norm=shared,
                values_are_keys=shared, attention_factor=1.2 if size == 128 else 1.0,
            )  # fmt: skip

    # gpt-oss's heads have sinks.
    for slots, dtype in ((128, bfloat16), (8448, bfloat16), (8448, float32)):
        caches = (empty(2, slots, 8, 64, dtype=dtype) for _ in range(2))
        module.attend_step(
            empty(2, 80 * 64, dtype=dtype), empty(2, dtype=int64), *caches, None, None, empty(32),
            semaphores, empty(64, dtype=dtype), scale=0.125, eps=0.0, attention_factor=1.3,
        )  # fmt: skip

    # Heads of Gemma 4 E2B that see what an earlier layer's kernel has written.
    for size, slots, dtype in ((256, 512, float32), (512, 8448, bfloat16)):
        caches = (empty(2, slots, 1, size, dtype=dtype) for _ in range(2))
        module.attend_step(
            empty(2, 8 * size, dtype=dtype), empty(2, dtype=int64), *caches,
            empty(size, dtype=dtype), None, empty(size // 2), semaphores, scale=1.0, eps=1e-6,
            keys=False,
        )  # fmt: skip


def per_layer() -> None:
    from tokenloop.models.kernels import cuda

    count, starts = empty(1, dtype=int32), empty(3, dtype=int32)
    for rows, dtype in itertools.product((1, 2, 1024), (bfloat16, float32)):
        number = count if rows > 2 else None
        given = empty(rows, 35 * 256, dtype=dtype)
        norm = empty(256, dtype=dtype)
        inputs = cuda.layer_inputs(given, given, norm, number, eps=1e-6)
        gate = empty(rows, 256, dtype=dtype)
        cuda.gate_input(gate, inputs[:, 256:512], number, activation="gelu_tanh")
        cuda.last_tokens(inputs, starts)
    tables = empty(1000, 1536, dtype=bfloat16), empty(1000, 35 * 256, dtype=bfloat16)
    hidden = cuda.embed_both(empty(2, dtype=int64), *tables, scale=39.25, other_scale=16.0)
    own = hidden[2 * 1536 :].view(2, -1)
    cuda.embed_into(empty(2, dtype=int64), tables[1], own, scale=16.0)
    # Its rings, of which a layer without keys sees what is filled.
    for size, slots in ((256, 512), (512, 8448)):
        caches = [empty(2, slots, 1, size, dtype=bfloat16) for _ in range(2)]
        filled = cuda.filled_slots(empty(2, dtype=int32), slots)
        where = starts, empty(2, dtype=int32), filled
        q, kv = cuda.rotate_chunk(
            empty(2, 8 * size, dtype=bfloat16), *where, *caches, empty(size, dtype=bfloat16), None,
            empty(size // 2), eps=1e-6, is_ring=slots == 512, keys=False,
        )  # fmt: skip
        cuda.attend_chunk(q, kv, *where, *caches, scale=1.0, is_ring=False)


def drafts() -> None:
    module, attention = (operators(f"models.kernels.{n}.operator") for n in ("drafts", "attention"))
    history, position = empty(2056, dtype=int64), empty(1, dtype=int64)
    for rows in (1, 8):
        tokens, positions, chosen = (empty(rows, dtype=int64) for _ in range(3))
        accepted = empty(1 + rows, dtype=int64)
        module.next_drafts(history, position, tokens, positions)
        module.accept(tokens, chosen, history, position, accepted)
    module.take_drafts(history, position, empty(7, dtype=int64), tokens, positions)
    # Qwen3 0.6B's heads, and a step of theirs.
    caches = [empty(1, 1024, 8, 128, dtype=bfloat16) for _ in range(2)]
    rows = [empty(8, 1, 8, 128, dtype=bfloat16) for _ in range(2)]
    qkv, norms = empty(8, 32 * 128, dtype=bfloat16), [empty(128, dtype=bfloat16) for _ in range(2)]
    last, options = (*norms, empty(64), empty(1000, dtype=int32)), {"scale": 0.125, "eps": 1e-6}
    attention.attend_step(qkv[:1], positions[:1], *caches, *last, **options)
    attention.attend_drafts(qkv, positions, *caches, *rows, *last, **options)
    module.store_drafts(*rows, positions, accepted, *caches)


def attention_chunk() -> None:
    module = operators("models.kernels.attention_chunk.operator")
    starts, rows, first = (empty(count, dtype=int32) for count in (9, 8, 8))
    # Qwen3 4B, both kinds of Gemma 4's layers, Qwen3.5 9B, Gemma 3 270M.
    # The largest heads and a ring in float32 as well.
    half, both = (bfloat16,), (bfloat16, float32)
    for kv_heads, groups, size, slots, is_ring, dtypes in (
        (8, 4, 128, 8448, False, half), (16, 2, 256, 1024, True, half),
        (4, 8, 512, 8448, False, both), (4, 4, 256, 8448, False, half),
        (1, 4, 256, 512, True, half), (2, 1, 32, 100, True, both),
    ):  # fmt: skip
        for dtype in dtypes:
            shared = size == 512
            width = kv_heads * size * (groups + (1 if shared else 2))
            caches = [empty(4, slots, kv_heads, size, dtype=dtype) for _ in range(2)]
            norms = [empty(size, dtype=dtype) for _ in range(2)]
            where = starts, rows, first
            q, kv = module.rotate_chunk(
                empty(1024, width, dtype=dtype), *where, *caches, *norms, empty(size // 2),
                eps=1e-6, value_norm=shared, values_are_keys=shared, is_ring=is_ring,
                attention_factor=1.2 if size == 128 else 1.0,
            )  # fmt: skip
            module.attend_chunk(q, kv, *where, *caches, scale=1.0, is_ring=is_ring)
            # Few tokens may be cut otherwise.
            few = q[:64], kv[:64], *where, *caches
            module.attend_chunk(*few, scale=1.0, is_ring=is_ring)
            if is_ring:
                module.store_ring(kv, *where, *caches)
    # gpt-oss's heads have sinks.
    for slots, is_ring, dtype in ((128, True, bfloat16), (8448, False, bfloat16)):
        caches = [empty(4, slots, 8, 64, dtype=dtype) for _ in range(2)]
        q, kv = empty(1024, 64 * 64, dtype=dtype), empty(1024, 2, 8, 64, dtype=dtype)
        given = q, kv if is_ring else kv[:0], starts, rows, first, *caches, empty(64, dtype=dtype)
        module.attend_chunk(*given, scale=0.125, is_ring=is_ring)


def experts() -> None:
    module = operators("models.kernels.experts.operator")
    add_norm_scores = operators("models.kernels.experts.scores_operator").add_norm_scores
    for dtype in (bfloat16, float32):
        scores, x = empty(2, 129, dtype=dtype), empty(2, 2048, dtype=dtype)
        chosen, weights = module.route(scores, 128, 8, True)
        module.route(scores, 128, 8, True, None, empty(128, dtype=dtype))
        tables = empty(128, 1536, 2048, dtype=dtype), empty(128, 2048, 768, dtype=dtype)
        module.experts(x, chosen, weights, *tables)
        module.experts(x, chosen, weights, *tables, x, scores)
        biases = empty(128, 1536, dtype=dtype), empty(128, 2048, dtype=dtype)
        own = {"gate_up_bias": biases[0], "down_bias": biases[1], "activation": "clamped_swiglu"}
        module.experts(x, chosen, weights, *tables, **own)
        module.experts(x, chosen, weights, *tables, activation="gelu_tanh")
        for rows in (1, 32):
            x, hidden = empty(rows, 2048, dtype=dtype), empty(rows, 512, dtype=dtype)
            scores, norm = empty(rows, 129, dtype=dtype), empty(2048, dtype=dtype)
            weight, gate_up = (empty(n, 2048, dtype=dtype) for n in (129, 1024))
            for shared, scales in ((None, None), (gate_up, empty(128, dtype=dtype))):
                given = x, x, None, None, norm, weight, shared, "silu"
                add_norm_scores(*given, eps=1e-6, offset=1.0)
                beside = {}
                if shared is not None:
                    beside = {"shared": hidden, "shared_down": empty(2048, 512, dtype=dtype)}
                module.route_experts(x, scores, 8, True, scales, *tables, **beside)
        count = empty(1, dtype=int32)
        for tokens in (128, 512, 1024, 8192) if dtype == bfloat16 else (1024,):
            scores, x = empty(tokens, 129, dtype=dtype), empty(tokens, 2048, dtype=dtype)
            routed = module.route(scores, 128, 8, True, count)
            module.experts_chunk(x, *routed, *tables, count, x, scores)
        module.experts_chunk(x, *routed, *tables, count, **own)
        module.experts_chunk(x, *routed, *tables, count, activation="gelu_tanh")
        uneven = empty(128, 2 * 77, 1000, dtype=dtype), empty(128, 1000, 77, dtype=dtype)
        x = empty(tokens, 1000, dtype=dtype)
        module.experts_chunk(x, *routed, *uneven, count)
    # Float8.
    tables = [
        table.to(torch.float8_e4m3fn) for table in (empty(128, 1536, 2048), empty(128, 2048, 768))
    ]
    own = {"gate_up_scale": empty(128, 1536), "down_scale": empty(128, 2048)}
    for tokens in (1, 128):
        scores, x = empty(tokens, 129, dtype=bfloat16), empty(tokens, 2048, dtype=bfloat16)
        routed = module.route(scores, 128, 8, True)
        if tokens == 1:
            module.experts(x, *routed, *tables, **own)
        else:
            module.experts_chunk(x, *routed, *tables, count, x, scores, **own)
    # Float8 in groups, and float4, of gpt-oss's sizes.
    grouped = [empty(128, 1536, 16), empty(128, 2048, 6)]
    words = empty(32, 5760, 720, dtype=torch.int16), empty(32, 2880, 720, dtype=torch.int16)
    powers = [empty(32, rows, 90, dtype=torch.uint8) for rows in (5760, 2880)]
    biases = {"gate_up_bias": empty(32, 5760, dtype=bfloat16)}
    biases["down_bias"] = empty(32, 2880, dtype=bfloat16)
    swiglu = biases | {"activation": "clamped_swiglu"}
    for size, scales, given, options in (
        (2048, grouped, tables, {}), (2880, powers, words, swiglu),
    ):  # fmt: skip
        own = dict(zip(("gate_up_scale", "down_scale"), scales)) | options
        for tokens in (1, 256, 2048):
            scores, x = empty(tokens, 32, dtype=bfloat16), empty(tokens, size, dtype=bfloat16)
            routed = module.route(scores, 32, 4, True)
            if tokens == 1:
                module.experts(x, *routed, *given, **own)
            else:
                module.experts_chunk(x, *routed, *given, count, **own)


def positions() -> None:
    module = operators("models.kernels.next_positions.operator")
    for rows in (1, 5):
        lines, line = empty(100, rows, dtype=int64), empty(1, dtype=int64)
        module.next_positions(lines, line, empty(rows, dtype=int64))


def ranks() -> None:
    module = operators("models.kernels.reduce_ranks.operator")
    norm, scalar = empty(5376, dtype=bfloat16), empty(1, dtype=bfloat16)
    for rows, count, more in ((1, 2, (norm, scalar)), (32, 8, (None, None))):
        x, epochs = empty(rows, 5376, dtype=bfloat16), empty(32, dtype=int32)
        peers = empty(2 * count + 1, dtype=int64)
        module.reduce_add_norm(x, x, *more, norm, peers, epochs, eps=1e-6)
        exchange = peers, empty(module.SLOTS, dtype=int32)
        module.sum_ranks(x, *exchange, empty(1, dtype=int32))
        module.gather_columns(empty(rows, 131072, dtype=float32), *exchange, width=262144)


def hybrids() -> None:
    from tokenloop.models.kernels import cuda

    dim, width, tokens, rows = 4096, 4, 2048, 4
    weight, bias = empty(dim, width, dtype=bfloat16), empty(dim, dtype=bfloat16)
    state = empty(rows, dim, width - 1, dtype=bfloat16)
    ends, begun = empty(rows + 1, dtype=int32), empty(rows, dtype=torch.bool)
    # By twos or not, with and without channels that are left over.
    for dtype, channels, taps in ((float16, 4096, 4), (bfloat16, 1001, 3), (float32, 1000, 2)):
        x = empty(tokens, channels, dtype=dtype).T
        weight_, state_ = empty(channels, taps, dtype=dtype), empty(rows, channels, taps - 1)
        cuda.causal_conv1d(x, weight_, None, ends, state_, None, begun, None)
    for x in (empty(tokens, dim, dtype=bfloat16).T, empty(dim, tokens, dtype=bfloat16)):
        for b, slots in ((None, None), (bias, empty(rows, dtype=int32))):
            cuda.causal_conv1d(x, weight, b, ends, state, slots, begun, "silu")
        cuda.causal_conv1d(x, weight, None, ends[:2], state, None, begun[:1], "silu")
    positions = empty(rows, dtype=int64)
    x = empty(rows, dim, dtype=bfloat16)
    cuda.causal_conv1d_update(x, weight, None, state, None, positions, "silu")
    q, v = (empty(rows, heads, 128, dtype=bfloat16) for heads in (16, 32))
    gates, constants = empty(rows, 32, dtype=bfloat16), empty(32)
    table = empty(rows, 32, 128, 128)
    given = q, q, v, gates, gates, constants, constants, table, None, positions
    cuda.gated_delta_rule_update(*given)
    cuda.gated_rms_norm(v, v, empty(128, dtype=bfloat16), 1e-6)
    packed = ends, positions.int(), positions.int()
    for dtype in (bfloat16, float32):
        for groups, heads, keys, values in ((16, 32, 128, 128), (2, 6, 16, 256), (1, 1, 256, 16)):
            widths = groups * keys, groups * keys, heads * values
            q, k, v = empty(tokens, sum(widths), dtype=dtype).split(widths, 1)
            q, k = (x.unflatten(1, (groups, keys)) for x in (q, k))
            b, a = empty(tokens, 2 * heads, dtype=dtype).split(heads, 1)
            given = q, k, v.unflatten(1, (heads, values)), a, b, empty(heads), empty(heads)
            table = empty(rows, heads, keys, values)
            out = cuda.gated_delta_rule_chunk(*given, table, *packed)
            cuda.gated_rms_norm(out, out, empty(values, dtype=dtype), 1e-6, ends[-1:])


def chunks() -> None:
    from tokenloop.models.kernels import cuda
    from tokenloop.models.kernels.linear.packing import (
        quantize_float8,
        quantize_int4,
        quantize_int8,
    )

    count = empty(1, dtype=int32)
    shapes = (512, 1024), (6144, 2560), (2560, 4096), (5376, 8192), (76, 1002)
    for (outputs, inputs), tokens in itertools.product(shapes, (64, 128, 1024, 8192)):
        for activation, dtype in itertools.product((None, "silu"), (bfloat16, float32)):
            rows = outputs * (1 if activation is None else 2)
            x, weight = empty(tokens, inputs, dtype=dtype), empty(rows, inputs, dtype=dtype)
            bias = empty(rows, dtype=dtype) if inputs == 1024 else None
            options = {"activation": activation, "out_float32": tokens == 128}
            cuda.linear_chunk(x, weight, None, bias, count, **options)
    x, weight = empty(1024, 1024, dtype=bfloat16), empty(4096, 1024, dtype=bfloat16)
    cuda.linear_chunk(x, weight, None, None, count, out_float32=True)
    # A tile of 80 gated outputs.
    x, weight = empty(128, 2560, dtype=bfloat16), empty(2 * 9728, 2560, dtype=bfloat16)
    cuda.linear_chunk(x, weight, None, None, count, activation="silu")
    dense = torch.zeros(512, 1024)
    for tokens, activation in itertools.product((64, 128, 1024), (None, "gelu_tanh")):
        x = empty(tokens, 1024, dtype=bfloat16)
        for weight, scale in (quantize_int8(dense), quantize_int4(dense)):
            cuda.linear_chunk(x, weight, scale, None, count, activation=activation)
            few = empty(1024 // 32, 512, dtype=float32 if len(scale) == 1 else float16)
            cuda.linear_chunk(x, weight, few, None, count, activation=activation)
    # Float8 with a scale for each row, and blocks of it.
    weight, scale = quantize_float8(dense)
    for tokens, activation, scales in (
        (64, "silu", scale), (128, None, scale), (128, None, empty(1024 // 128, 512)),
        (1024, "silu", scale), (512, None, empty(1024 // 128, 512)),
    ):  # fmt: skip
        x = empty(tokens, 1024, dtype=bfloat16)
        cuda.linear_chunk(x, weight, scales, None, count, activation=activation)
    # Tiles in halves that multiply by the scales of rows.
    x, weight = empty(8192, 1024, dtype=bfloat16), torch.zeros(4096, 1024)
    cuda.linear_chunk(x, *quantize_float8(weight), None, count)
    x, norm = empty(8192, 2560, dtype=bfloat16), empty(2560, dtype=bfloat16)
    cuda.add_norm(x, x, norm, norm[:1], norm, count, eps=1e-6)
    cuda.norm(x, norm, count, eps=1e-6)
    wide, norm = empty(8192, 5376, dtype=bfloat16), empty(5376, dtype=bfloat16)
    cuda.add_norm(wide, wide, norm, norm[:1], norm, count, eps=1e-6)
    cuda.norm(wide, norm, count, eps=1e-6)
    for number in (None, count):
        cuda.add_branch(wide, wide, norm, None, number, eps=1e-6)
        cuda.norm_heads(wide, norm[:4096], norm[:1024], number, eps=1e-6)
        cuda.norm_heads(wide, None, norm[:1024], number, eps=1e-6)
    cuda.sigmoid_gate(x, empty(8192, 5120, dtype=bfloat16)[:, :2560], count)
    cuda.embed_chunk(empty(8192, dtype=int64), x, count, scale=25.25)
    cuda.last_tokens(x, empty(5, dtype=int32))


def sampler() -> None:
    module = operators("sampler.kernels.operator")
    for rows, size in ((1, 259), (4, 151_936)):
        logits, most = empty(rows, size), min(size, 5120)
        module.mask(logits, empty(rows, -(-size // 32) * 4, dtype=torch.uint8))
        module.adjust(logits, empty(rows, most, dtype=int64), empty(rows, most), empty(rows, most))
    for rows in (1, 32):
        logits, table = empty(rows, 262_144), empty(262_144, 640, dtype=bfloat16)
        numbers, counts = empty(rows), empty(rows, dtype=int64)
        sampling = numbers, counts, numbers, counts, counts
        written = table, empty(rows, 1, dtype=int64), empty(rows, 1, 640, dtype=bfloat16)
        module.greedy(logits)
        module.greedy_embed(logits, *written, scale=25.25)
        module.sample(logits, *sampling, restricted=False)
        module.sample_embed(logits, *sampling, *written)


def main() -> None:
    parser = argparse.ArgumentParser()
    groups = (
        linear, attention, attention_chunk, per_layer, drafts, experts, positions, hybrids, chunks,
        ranks, sampler,
    )  # fmt: skip
    names = {function.__name__: function for function in groups}
    parser.add_argument("groups", nargs="+", choices=names)
    parser.add_argument("--ptx", type=Path)
    options = parser.parse_args()
    for name in options.groups:
        with torch.no_grad(), kept_launches() as launches:
            names[name]()
        kernels = dict.fromkeys(compile_launch(launch, options.ptx) for launch in launches)
        if name == "drafts":
            check_drafts([compiled[key] for key in kernels if key[0] == "attend_kernel"])
        print(name, len(kernels), flush=True)


if __name__ == "__main__":
    main()
