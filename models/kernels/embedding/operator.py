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
    x = empty(len(tokens), table.shape[1], dtype=table.dtype, device=table.device)
    _look_up(tokens, table, count, x, scale)
    return x


@operator("embed_into", mutates_args={"x"})
def embed_into(tokens: Tensor, table: Tensor, x: Tensor, *, scale: float = 1.0) -> None:
    """embed_chunk's rows of all tokens, written to x [T, D], which is contiguous."""
    _look_up(tokens, table, None, x, scale)


@operator("embed_both")
def embed_both(
    tokens: Tensor, table: Tensor, other: Tensor, *, scale: float = 1.0, other_scale: float = 1.0
) -> Tensor:
    """See reference.embed_both."""
    count, size, width = len(tokens), table.shape[1], other.shape[1]
    both = empty(count * (size + width), dtype=table.dtype, device=table.device)
    _look_up(tokens, table, None, both[: count * size].view(count, size), scale)
    _look_up(tokens, other, None, both[count * size :].view(count, width), other_scale)
    return both


def _look_up(tokens: Tensor, table: Tensor, count: Tensor | None, x: Tensor, scale: float) -> None:
    check_contiguous(tokens=tokens, table=table, x=x)
    size = table.shape[1]
    grid = len(tokens), triton.cdiv(size, BLOCK_D)
    launch(embed_kernel, grid)(
        tokens, table, count, x, size, scale, BLOCK_D=BLOCK_D, num_warps=4
    )  # fmt: skip


@operator("last_tokens")
def last_tokens(x: Tensor, starts: Tensor) -> Tensor:
    """See reference.last_tokens."""
    check_contiguous(x=x, starts=starts)
    size = x.shape[1]
    last = empty(len(starts) - 1, size, dtype=x.dtype, device=x.device)
    grid = len(last), triton.cdiv(size, BLOCK_D)
    launch(last_kernel, grid)(x, starts, last, size, BLOCK_D=BLOCK_D, num_warps=4)
    return last
