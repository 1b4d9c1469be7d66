"""Embeddings and last rows of a packed chunk on CUDA, in one launch each."""

import triton
from torch import Tensor, empty

from tokenloop.models.kernels.embedding.triton import embed_kernel, last_kernel
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator

BLOCK_D = 1024


@operator("embed_chunk")
def embed_chunk(
    tokens: Tensor, table: Tensor, count: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """See reference.embed_chunk."""
    check_contiguous(tokens=tokens, table=table)
    size = table.shape[1]
    x = empty(len(tokens), size, dtype=table.dtype, device=table.device)
    grid = len(tokens), triton.cdiv(size, BLOCK_D)
    launch(embed_kernel, grid)(
        tokens, table, count, x, size, scale, BLOCK_D=BLOCK_D, num_warps=4
    )  # fmt: skip
    return x


@operator("last_tokens")
def last_tokens(x: Tensor, starts: Tensor) -> Tensor:
    """See reference.last_tokens."""
    check_contiguous(x=x, starts=starts)
    size = x.shape[1]
    last = empty(len(starts) - 1, size, dtype=x.dtype, device=x.device)
    grid = len(last), triton.cdiv(size, BLOCK_D)
    launch(last_kernel, grid)(x, starts, last, size, BLOCK_D=BLOCK_D, num_warps=4)
    return last
