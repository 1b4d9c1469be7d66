"""A decode step's operators on CUDA: the functions of reference.py by Triton kernels.

They are operators too, torch.ops.tokenloop.linear and so on, whose kernels torch.export and
AOTInductor see. Launches depend on shapes alone and nothing is read back, so they can be captured
in a CUDA graph. No row's result depends on the number of rows.

`counters` are int32 zeros that parts of a result are counted in, `counters_size` of them; every
launch leaves them 0, so that one tensor serves a whole network.

    linear, norm, add_norm, attend_step   1 launch
    norm_linear, add_norm_linear          1 where rows are short and few, else 2
"""

from typing import NamedTuple

import triton
from torch import Tensor, bfloat16, empty, empty_like, float32
from torch.library import triton_op, wrap_triton

from tokenloop.models.kernels.attention import attend_kernel
from tokenloop.models.kernels.linear import dot_kernel, norm_kernel, rows_kernel
from tokenloop.models.kernels.packing import GROUP_SIZES, SPAN_WORDS, WORD_BITS, weight_bits
from tokenloop.models.kernels.tiles import (
    AHEAD,
    FAN,
    FEW_ROWS,
    PROGRAMS,
    SHARED_NORM,
    AttendTiles,
    LinearTiles,
    attend_tiles,
    linear_tiles,
    most_splits,
)


def counters_size(rows: int, outputs: int, kv_heads: int) -> int:
    """How many `counters` the operators need for so many rows and outputs of a linear layer."""
    groups = triton.cdiv(most_splits(kv_heads), FAN)
    return max(triton.cdiv(rows, 16) * triton.cdiv(outputs, 16), rows * kv_heads * (1 + groups))


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} of strides {x.stride()} is not contiguous")


class Norm(NamedTuple):
    """A norm before a linear layer, of a residual to which a branch may be added first."""

    weight: Tensor
    eps: float
    offset: float
    branch: Tensor | None = None
    post_weight: Tensor | None = None
    layer_scalar: Tensor | None = None


def launch_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
    norm: Norm | None = None,
    tiles: LinearTiles | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The new residual where a norm adds a branch to it, and `linear` of x or of its norm, cut as
    `tiles` say.

    Raises ValueError for a weight or scale that does not fit, or what the kernels cannot read.
    """
    _check_contiguous(x=x, weight=weight, scale=scale, bias=bias)
    rows, inputs = x.shape
    bits = weight_bits(weight, inputs)
    if x.dtype != (bfloat16 if bits else weight.dtype):
        raise ValueError(f"activations are {x.dtype}, the weight {weight.dtype}")
    group = _group_size(scale, weight, inputs, bits)
    outputs = weight.shape[0] // (1 if activation is None else 2)
    gated = activation is not None
    tiles = tiles or linear_tiles(rows, outputs, inputs, bits, x.dtype, gated)
    total = None
    if norm is not None and (tiles.dot or not tiles.norm or rows > SHARED_NORM):
        total, x = _norm(x, norm)
        norm = None
    y = empty(rows, outputs, dtype=float32 if wide else x.dtype, device=x.device)
    if not tiles.dot:
        # Of the kernel's arguments: a norm's tensors, its numbers.
        tensors, numbers = (None,) * 4, (0.0, 0.0)
        if norm is not None:
            _check_contiguous(branch=norm.branch)
            total = None if norm.branch is None else empty_like(x)
            tensors, numbers = (*norm[3:], norm.weight), (norm.eps, norm.offset)
        grid = (rows * triton.cdiv(outputs, tiles.block_n),)
        wrap_triton(rows_kernel)[grid](
            x, *tensors, weight, bias, total, y, rows, outputs, inputs, *numbers, soft_cap,
            NORM=norm is not None, ADD=total is not None and norm is not None,
            ACTIVATION=activation, SOFT_CAP=soft_cap > 0,
            BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, AHEAD=inputs % 8 == 0,
            num_warps=tiles.warps,
        )  # fmt: skip
        return total, y
    block = SPAN_WORDS * (WORD_BITS // bits) if bits else tiles.block_k
    steps = triton.cdiv(triton.cdiv(inputs, block), tiles.splits)
    # More rows would be another instruction where floating-point weights have 64 outputs a program.
    few = rows <= FEW_ROWS and (bits or tiles.block_n < 64)
    block_b = FEW_ROWS if few else 16 if rows <= 16 else 32
    grid = (triton.cdiv(outputs, tiles.block_n), tiles.splits, triton.cdiv(rows, block_b))
    partial = None
    if tiles.splits > 1:
        halves = 1 if activation is None else 2
        partial = empty(tiles.splits, halves, rows, outputs, dtype=float32, device=x.device)
    wrap_triton(dot_kernel)[grid](
        x, weight, scale, bias, partial, counters, y,
        rows, outputs, inputs, weight.shape[1], steps, soft_cap, BITS=bits, GROUP=group,
        ACTIVATION=activation, SOFT_CAP=soft_cap > 0, SPLITS=tiles.splits,
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_B=block_b,
        EVEN=inputs % block == 0, STAGES=tiles.stages,
        AHEAD=AHEAD if weight.shape[1] % 8 == 0 else 0, num_warps=tiles.warps,
    )  # fmt: skip
    return total, y


def _group_size(scale: Tensor | None, weight: Tensor, inputs: int, bits: int) -> int:
    """Inputs of a scale of 4 bits, else 0."""
    if not bits:
        return 0
    known = GROUP_SIZES if bits == 4 else (inputs,)
    shape = None if scale is None else tuple(scale.shape)
    if shape not in [(inputs // size, weight.shape[0]) for size in known if inputs % size == 0]:
        raise ValueError(
            f"scale of shape {shape}: {weight.shape[0]} rows of {bits} bits need one for each row "
            f"and group of {known}"
        )
    return inputs // shape[0] if bits == 4 else 0


def _norm(x: Tensor, norm: Norm) -> tuple[Tensor | None, Tensor]:
    _check_contiguous(x=x, branch=norm.branch)
    rows, size = x.shape
    total = None if norm.branch is None else empty_like(x)
    h = empty_like(x)
    wrap_triton(norm_kernel)[(rows,)](
        x, *norm[3:], norm.weight, total, h, size, norm.eps, norm.offset,
        ADD=total is not None, BLOCK_K=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip
    return total, h


@triton_op("tokenloop::linear", mutates_args={"counters"})
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """See reference.linear."""
    options = {"activation": activation, "soft_cap": soft_cap, "wide": wide}
    return launch_linear(x, weight, scale, bias, counters, **options)[1]


@triton_op("tokenloop::norm", mutates_args={})
def norm(x: Tensor, norm_weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """See reference.norm."""
    return _norm(x, Norm(norm_weight, eps, offset))[1]


@triton_op("tokenloop::add_norm", mutates_args={})
def add_norm(
    x: Tensor,
    branch: Tensor,
    post_weight: Tensor | None,
    layer_scalar: Tensor | None,
    norm_weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See reference.add_norm."""
    return _norm(x, Norm(norm_weight, eps, offset, branch, post_weight, layer_scalar))


@triton_op("tokenloop::norm_linear", mutates_args={"counters"})
def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """See reference.norm_linear."""
    options = {"activation": activation, "soft_cap": soft_cap, "wide": wide}
    norm = Norm(norm_weight, eps, offset)
    return launch_linear(x, weight, scale, bias, counters, **options, norm=norm)[1]


@triton_op("tokenloop::add_norm_linear", mutates_args={"counters"})
def add_norm_linear(
    x: Tensor,
    branch: Tensor,
    post_weight: Tensor | None,
    layer_scalar: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    activation: str | None = None,
    soft_cap: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """See reference.add_norm_linear."""
    options = {"activation": activation, "soft_cap": soft_cap, "wide": wide}
    norm = Norm(norm_weight, eps, offset, branch, post_weight, layer_scalar)
    return launch_linear(x, weight, scale, bias, counters, **options, norm=norm)


def launch_attend(
    qkv: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    inv_freq: Tensor,
    counters: Tensor,
    *,
    scale: float,
    eps: float,
    offset: float = 0.0,
    value_norm: bool = False,
    values_are_keys: bool = False,
    tiles: AttendTiles | None = None,
) -> Tensor:
    """`attend_step`, cut as `tiles` say.

    Raises ValueError for projections that the caches do not fit.
    """
    _check_contiguous(qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    rows, slots, kv_heads, head_dim = k_cache.shape
    groups = qkv.shape[1] // (kv_heads * head_dim) - (1 if values_are_keys else 2)
    if qkv.shape[1] % (kv_heads * head_dim) or groups < 1 or qkv.dtype != k_cache.dtype:
        raise ValueError(
            f"projections {qkv.dtype} {tuple(qkv.shape)} do not fit caches {k_cache.dtype} "
            f"{tuple(k_cache.shape)}"
        )
    tiles = tiles or attend_tiles(slots, kv_heads, head_dim, qkv.dtype)
    parts = triton.cdiv(slots, tiles.block_s * tiles.least)
    splits = min(tiles.splits, triton.next_power_of_2(parts))
    fan = min(tiles.fan, splits)
    stored = triton.next_power_of_2(groups)
    new = {"dtype": float32, "device": qkv.device}
    out = empty(rows, kv_heads * groups * head_dim, dtype=qkv.dtype, device=qkv.device)
    acc = empty(rows, kv_heads, splits, stored, head_dim, **new)
    largest = empty(rows, kv_heads, splits, stored, **new)
    total = empty(rows, kv_heads, splits, stored, **new)
    # Most programs of many short rows would have nothing to do.
    programs = min(splits, max(1, PROGRAMS // (kv_heads * rows)))
    wrap_triton(attend_kernel)[(kv_heads, rows, programs)](
        qkv, position, k_cache, v_cache, q_norm, k_norm, inv_freq,
        out, acc, largest, total, counters, slots, scale, eps, offset,
        KV=kv_heads, HEADS=groups, HALF=head_dim // 2,
        VALUE_NORM=value_norm, VALUES_ARE_KEYS=values_are_keys,
        SPLITS=splits, FAN=fan, BLOCK_S=tiles.block_s, LEAST=tiles.least,
        ONE_PART=programs == splits,
        BLOCK_G=max(16, stored),
        PARTS=max(1, min(fan, tiles.combined // (stored * head_dim))),
        STORED=stored, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


@triton_op("tokenloop::attend_step", mutates_args={"k_cache", "v_cache", "counters"})
def attend_step(
    qkv: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    inv_freq: Tensor,
    counters: Tensor,
    *,
    scale: float,
    eps: float,
    offset: float = 0.0,
    value_norm: bool = False,
    values_are_keys: bool = False,
) -> Tensor:
    """See reference.attend_step. Tensors are contiguous."""
    return launch_attend(
        qkv, position, k_cache, v_cache, q_norm, k_norm, inv_freq, counters,
        scale=scale, eps=eps, offset=offset,
        value_norm=value_norm, values_are_keys=values_are_keys,
    )  # fmt: skip
