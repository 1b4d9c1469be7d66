"""Linear layers over a packed chunk on CUDA, in one launch, or two for integer weights.

Each output is summed over the inputs in order, in one float32 accumulator. So a token's result does
not depend on the chunk's size, on its place in it, or on how the work is cut.
"""

import triton
from torch import Tensor, bfloat16, empty, float32

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.linear_chunk.chunk_tiles import PROCESSORS, ChunkTiles, chunk_tiles
from tokenloop.models.kernels.linear_chunk.triton_descriptors import descriptors_kernel
from tokenloop.models.kernels.linear_chunk.triton_pointers import pointers_kernel


def launch_linear_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor, *,
    activation: str | None = None, out_float32: bool = False, tiles: ChunkTiles | None = None,
) -> Tensor:  # fmt: skip
    """`linear_chunk` of floating-point weights, cut as `tiles` say.

    Raises ValueError for shapes and dtypes that do not fit, and for strides that the kernels cannot
    read.
    """
    check_contiguous(x=x, weight=weight, bias=bias)
    if x.dtype not in (bfloat16, float32) or weight.dtype != x.dtype:
        raise ValueError(f"activations are {x.dtype}, the weight {weight.dtype}")
    tokens, inputs = x.shape
    if weight.shape[1] != inputs:
        raise ValueError(f"a weight of {weight.shape[1]} inputs was given {inputs}")
    gated = activation is not None
    outputs = weight.shape[0] // (2 if gated else 1)
    tiles = tiles or chunk_tiles(tokens, outputs, inputs, x.dtype, gated)
    y = empty(tokens, outputs, dtype=float32 if out_float32 else x.dtype, device=x.device)
    count_tiles = triton.cdiv(tokens, tiles.block_t) * triton.cdiv(outputs, tiles.block_n)
    arguments = x, weight, bias, count, y, tokens, outputs, inputs
    named = {
        "ACTIVATION": activation, "BLOCK_T": tiles.block_t, "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k, "GROUP": tiles.group, "STAGES": tiles.stages,
        "num_warps": tiles.warps,
    }  # fmt: skip
    if tiles.descriptors:
        launch(descriptors_kernel, (min(count_tiles, PROCESSORS),))(
            *arguments, **named, PARTS=tiles.parts, FLATTEN=tiles.flatten,
            SPECIALIZE=tiles.specialize, num_stages=tiles.stages,
        )  # fmt: skip
    else:
        even = inputs % tiles.block_k == 0
        launch(pointers_kernel, (count_tiles,))(*arguments, **named, EVEN=even)
    return y


@operator("linear_chunk")
def linear_chunk(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, count: Tensor, *,
    activation: str | None = None, out_float32: bool = False,
) -> Tensor:  # fmt: skip
    """See reference.linear_chunk."""
    options = {"activation": activation, "out_float32": out_float32}
    return launch_linear_chunk(x, weight, bias, count, **options)
