"""Linear layers over a packed chunk on CUDA.

linear_chunk   1 launch, or 2 where packed weights and more than IN_TILE tokens are given
dequantize     1

Each output is summed over the inputs in order, in one float32 accumulator. So a token's result does
not depend on the chunk's size, on its place in it, or on how the work is cut.
"""

import triton
from torch import Tensor, bfloat16, empty, float32

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.linear.operator import group_size
from tokenloop.models.kernels.linear.packing import (
    FLOAT8,
    SPAN_WORDS,
    WORD_BITS,
    leaves_scale,
    weight_bits,
    words_of,
)
from tokenloop.models.kernels.linear_chunk.chunk_tiles import (
    FIRST,
    IN_TILE,
    PROCESSORS,
    ChunkTiles,
    WordTiles,
    chunk_tiles,
    word_tiles,
)
from tokenloop.models.kernels.linear_chunk.triton_descriptors import descriptors_kernel
from tokenloop.models.kernels.linear_chunk.triton_pointers import pointers_kernel
from tokenloop.models.kernels.linear_chunk.triton_words import dequantize_kernel, words_kernel

DEQUANTIZED_ROWS = 64


def launch_linear_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor, *,
    activation: str | None = None, out_float32: bool = False, tiles: ChunkTiles | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`linear_chunk` of floating-point weights, cut as `tiles` say. `scale` are the rows'.

    Raises ValueError for shapes and dtypes that do not fit, and for strides that the kernels cannot
    read.
    """
    check_contiguous(x=x, weight=weight, bias=bias, scale=scale)
    if x.dtype not in (bfloat16, float32) or weight.dtype != x.dtype:
        raise ValueError(f"activations are {x.dtype}, the weight {weight.dtype}")
    tokens, inputs = x.shape
    if weight.shape[1] != inputs:
        raise ValueError(f"a weight of {weight.shape[1]} inputs was given {inputs}")
    if scale is not None and scale.shape != (1, weight.shape[0]):
        raise ValueError(f"scale of shape {tuple(scale.shape)} for {weight.shape[0]} rows")
    gated = activation is not None
    outputs = weight.shape[0] // (2 if gated else 1)
    tiles = tiles or chunk_tiles(tokens, outputs, inputs, x.dtype, gated, out_float32)
    if triton.knobs.runtime.interpret:
        # Its sums are those of blocks of inputs, which tensor cores' are not.
        tiles = tiles._replace(block_k=SPAN_WORDS)
    y = empty(tokens, outputs, dtype=float32 if out_float32 else x.dtype, device=x.device)
    if tiles.extra and tiles.descriptors and (gated or tiles.parts > 1):
        raise ValueError(f"a tile of {tiles} has no outputs beside")
    tiles_n = triton.cdiv(outputs, tiles.block_n + tiles.extra)
    count_tiles = triton.cdiv(tokens, tiles.block_t) * tiles_n
    ahead = tiles.stages * tiles.block_k if inputs * x.element_size() % 16 == 0 else 0
    arguments = x, weight, scale, bias, count, y, tokens, outputs, inputs
    named = {
        "ACTIVATION": activation, "BLOCK_T": tiles.block_t, "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k, "GROUP": tiles.group, "STAGES": tiles.stages,
        "num_warps": tiles.warps,
    }  # fmt: skip
    if tiles.descriptors:
        launch(descriptors_kernel, (min(count_tiles, PROCESSORS),))(
            *arguments, **named, PARTS=tiles.parts, FLATTEN=tiles.flatten,
            SPECIALIZE=tiles.specialize, EXTRA=tiles.extra, AHEAD=ahead,
            num_stages=tiles.stages,
        )  # fmt: skip
    else:
        even = inputs % tiles.block_k == 0
        launch(pointers_kernel, (count_tiles,))(
            *arguments, **named, EVEN=even, AHEAD=ahead, FIRST=FIRST, EXTRA=tiles.extra
        )
    return y


def launch_words(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, count: Tensor, *,
    activation: str | None = None, out_float32: bool = False, tiles: WordTiles | None = None,
) -> Tensor:  # fmt: skip
    """`linear_chunk` of packed weights, in one launch that makes bfloat16 of them. It raises
    ValueError as launch_linear_chunk does."""
    check_contiguous(x=x, weight=weight, scale=scale, bias=bias)
    tokens, inputs = x.shape
    bits, group = _packed(x, weight, scale)
    outputs = weight.shape[0] // (1 if activation is None else 2)
    tiles = tiles or word_tiles(tokens, outputs, bits, activation is not None)
    y = empty(tokens, outputs, dtype=float32 if out_float32 else x.dtype, device=x.device)
    grid = triton.cdiv(tokens, tiles.block_t), triton.cdiv(outputs, tiles.block_n)
    words = words_of(weight)
    launch(words_kernel, grid)(
        x, words, scale, bias, count, y, tokens, outputs, inputs, words.shape[1],
        GROUP=group, BITS=bits, FLOAT8=weight.dtype == FLOAT8, LAST=leaves_scale(weight, scale),
        ACTIVATION=activation, BLOCK_T=tiles.block_t, BLOCK_N=tiles.block_n, STAGES=tiles.stages,
        EVEN=inputs % (SPAN_WORDS * (WORD_BITS // bits)) == 0,
        AHEAD=tiles.stages * SPAN_WORDS, FIRST=FIRST, num_warps=tiles.warps,
    )  # fmt: skip
    return y


def launch_dequantize(weight: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """`dequantize`; it raises ValueError as launch_linear_chunk does."""
    check_contiguous(weight=weight, scale=scale)
    bits = weight_bits(weight, inputs)
    group = group_size(scale, weight, inputs, bits)
    words = words_of(weight)
    outputs, width = words.shape
    out = empty(outputs, inputs, dtype=bfloat16, device=weight.device)
    grid = width // SPAN_WORDS, triton.cdiv(outputs, DEQUANTIZED_ROWS)
    launch(dequantize_kernel, grid)(
        words, None if leaves_scale(weight, scale) else scale, out, outputs, inputs, width,
        GROUP=group, BITS=bits, FLOAT8=weight.dtype == FLOAT8, BLOCK_N=DEQUANTIZED_ROWS,
        num_warps=4,
    )  # fmt: skip
    return out


def _packed(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[int, int]:
    """Bits of the words, and inputs that share a scale of 4 bits."""
    bits = weight_bits(weight, x.shape[1])
    if not bits or x.dtype != bfloat16:
        raise ValueError(f"activations are {x.dtype}, the weight with a scale is {weight.dtype}")
    return bits, group_size(scale, weight, x.shape[1], bits)


@operator("linear_chunk")
def linear_chunk(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, count: Tensor, *,
    activation: str | None = None, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """See reference.linear_chunk."""
    options = {"activation": activation, "out_float32": out_float32}
    if scale is None:
        return launch_linear_chunk(x, weight, bias, count, **options)
    if x.shape[0] <= IN_TILE:
        return launch_words(x, weight, scale, bias, count, **options)
    _packed(x, weight, scale)
    dense, left = launch_dequantize(weight, scale, x.shape[1]), leaves_scale(weight, scale)
    return launch_linear_chunk(x, dense, bias, count, **options, scale=scale if left else None)


@operator("dequantize")
def dequantize(weight: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """See reference.dequantize."""
    return launch_dequantize(weight, scale, inputs)
