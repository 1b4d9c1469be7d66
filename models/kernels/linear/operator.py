"""Linear layers of a decode step on CUDA.

linear                         1 launch
norm_linear, add_norm_linear   1 where rows are short and few, else 2
"""

import triton
from torch import Tensor, bfloat16, empty, empty_like, float32

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.linear.linear_tiles import (
    AHEAD,
    FEW_ROWS,
    SHARED_NORM,
    LinearTiles,
    linear_tiles,
)
from tokenloop.models.kernels.linear.packing import (
    FLOAT8,
    GROUP_SIZES,
    SPAN_WORDS,
    WORD_BITS,
    weight_bits,
    words_of,
)
from tokenloop.models.kernels.linear.triton_dot import dot_kernel
from tokenloop.models.kernels.linear.triton_rows import rows_kernel
from tokenloop.models.kernels.rms_norm.operator import Norm, launch_norm


def launch_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, semaphores: Tensor, *,
    activation: str | None = None, soft_cap: float = 0.0, out_float32: bool = False,
    norm: Norm | None = None, tiles: LinearTiles | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """The new residual, None where no norm adds a branch to it, and `linear` of x or of its norm,
    cut as `tiles` say.

    Raises ValueError for a weight or scale that does not fit, and for strides or dtypes that the
    kernels cannot read.
    """
    check_contiguous(x=x, weight=weight, scale=scale, bias=bias)
    rows, inputs = x.shape
    bits = weight_bits(weight, inputs)
    if x.dtype != (bfloat16 if bits else weight.dtype):
        raise ValueError(f"activations are {x.dtype}, the weight {weight.dtype}")
    group = group_size(scale, weight, inputs, bits)
    outputs = weight.shape[0] // (1 if activation is None else 2)
    gated = activation is not None
    tiles = tiles or linear_tiles(rows, outputs, inputs, bits, x.dtype, gated)
    total = None
    if norm is not None and (tiles.dot or not tiles.norm or rows > SHARED_NORM):
        total, x = launch_norm(x, norm)
        norm = None
    y = empty(rows, outputs, dtype=float32 if out_float32 else x.dtype, device=x.device)
    if not tiles.dot:
        # What the kernel is given of a norm: tensors and numbers.
        tensors, numbers = (None,) * 4, (0.0, 0.0)
        if norm is not None:
            check_contiguous(branch=norm.branch)
            total = None if norm.branch is None else empty_like(x)
            tensors, numbers = (*norm[3:], norm.weight), (norm.eps, norm.offset)
        grid = (rows * triton.cdiv(outputs, tiles.block_n),)
        launch(rows_kernel, grid)(
            x, *tensors, weight, bias, total, y, rows, outputs, inputs, *numbers, soft_cap,
            NORM=norm is not None, ADD=total is not None and norm is not None,
            ACTIVATION=activation, SOFT_CAP=soft_cap > 0,
            BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, AHEAD=inputs % 8 == 0,
            num_warps=tiles.warps,
        )  # fmt: skip
        return total, y
    block = SPAN_WORDS * (WORD_BITS // bits) if bits else tiles.block_k
    steps = triton.cdiv(triton.cdiv(inputs, block), tiles.splits)
    # Floating-point weights with 64 outputs a program would take another instruction for more rows.
    few = rows <= FEW_ROWS and (bits or tiles.block_n < 64)
    block_b = FEW_ROWS if few else 16 if rows <= 16 else 32
    grid = (triton.cdiv(outputs, tiles.block_n), tiles.splits, triton.cdiv(rows, block_b))
    partial = None
    if tiles.splits > 1:
        halves = 1 if activation is None else 2
        partial = empty(tiles.splits, halves, rows, outputs, dtype=float32, device=x.device)
    words = words_of(weight)
    launch(dot_kernel, grid)(
        x, words, scale, bias, partial, semaphores, y,
        rows, outputs, inputs, words.shape[1], steps, soft_cap, BITS=bits,
        FLOAT8=weight.dtype == FLOAT8, GROUP=group, ACTIVATION=activation, SOFT_CAP=soft_cap > 0,
        SPLITS=tiles.splits, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_B=block_b,
        EVEN=inputs % block == 0, STAGES=tiles.stages,
        AHEAD=AHEAD if words.shape[1] % 8 == 0 else 0, num_warps=tiles.warps,
    )  # fmt: skip
    return total, y


def group_size(scale: Tensor | None, weight: Tensor, inputs: int, bits: int) -> int:
    """Inputs that share a scale; 0 for floating-point weights, and where a row has one."""
    if not bits:
        return 0
    known = [size for size in GROUP_SIZES if SPAN_WORDS * WORD_BITS // bits % size == 0]
    known = known if bits == 4 else [inputs, *known]
    shape = None if scale is None else tuple(scale.shape)
    if shape not in [(inputs // size, weight.shape[0]) for size in known if inputs % size == 0]:
        raise ValueError(
            f"scale of shape {shape}: {weight.shape[0]} rows of {bits} bits need one for each row "
            f"and group of {known}"
        )
    return 0 if bits == 8 and shape[0] == 1 else inputs // shape[0]


@operator("linear", mutates_args={"semaphores"})
def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, semaphores: Tensor, *,
    activation: str | None = None, soft_cap: float = 0.0, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """See reference.linear."""
    options = {"activation": activation, "soft_cap": soft_cap, "out_float32": out_float32}
    return launch_linear(x, weight, scale, bias, semaphores, **options)[1]


@operator("norm_linear", mutates_args={"semaphores"})
def norm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    semaphores: Tensor, *, eps: float, offset: float = 0.0, activation: str | None = None,
    soft_cap: float = 0.0, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """See reference.norm_linear."""
    options = {"activation": activation, "soft_cap": soft_cap, "out_float32": out_float32}
    norm = Norm(norm_weight, eps, offset)
    return launch_linear(x, weight, scale, bias, semaphores, **options, norm=norm)[1]


@operator("add_norm_linear", mutates_args={"semaphores"})
def add_norm_linear(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    semaphores: Tensor, *, eps: float, offset: float = 0.0, activation: str | None = None,
    soft_cap: float = 0.0, out_float32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See reference.add_norm_linear."""
    options = {"activation": activation, "soft_cap": soft_cap, "out_float32": out_float32}
    norm = Norm(norm_weight, eps, offset, branch, post_weight, layer_scalar)
    return launch_linear(x, weight, scale, bias, semaphores, **options, norm=norm)
