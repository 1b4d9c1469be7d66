"""The Triton kernels that take rows out of a table. Names: row b or t, element d of D."""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits


@waits  # once it has the count, which the host wrote
@triton.jit
def embed_kernel(
    tokens_ptr, table_ptr, count_ptr, x_ptr, D, scale: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_D elements of a token's row, scaled."""
    t = tl.program_id(0)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    # Tokens beyond the count are anything, and no place in the table.
    if count_ptr is not None:  # noqa: SIM102
        if t + zero >= count:
            return
    token = tl.load(tokens_ptr + zero + t)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(table_ptr + token * D + d, mask=d < D, other=0.0)
    x = (x.to(tl.float32) * scale).to(x.dtype)
    tl.store(x_ptr + t.to(tl.int64) * D + d, x, mask=d < D)


@waits  # once it has its row's number, which the host wrote
@triton.jit
def last_kernel(x_ptr, starts_ptr, last_ptr, D, BLOCK_D: tl.constexpr):
    """BLOCK_D elements of a sequence's last row."""
    b = tl.program_id(0)
    row = tl.maximum(tl.load(starts_ptr + b + 1) - 1, 0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + wait(0) + row * D + d, mask=d < D, other=0.0)
    tl.store(last_ptr + b.to(tl.int64) * D + d, x, mask=d < D)
