"""What ranks tell one another on CUDA, in one launch each: the sum of their parts with the residual
and the norm after it, the sum alone, and all ranks' columns."""

import triton
from torch import Tensor, empty, empty_like

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.reduce_ranks.triton import exchange_kernel, reduce_norm_kernel

# A program waits for the same one of every other rank, so all must run at once. A GPU of the kinds
# that kernels are compiled for has at least so many processors.
MOST_ROWS = 128
# An exchange's mailbox: programs, each with a slot of its own, and what a slot holds.
SLOTS, SLOT_BYTES = 128, 32768
# Columns of one block. The largest fills a slot in float32.
LEAST_BLOCK, MOST_BLOCK = 1024, 8192


@operator("reduce_add_norm", mutates_args={"epochs"})
def reduce_add_norm(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, peers: Tensor, epochs: Tensor, *, eps: float, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See reference.reduce_add_norm; `branch` [B, K] is this rank's part. peers int64 [2 N + 1] has
    the addresses of the N ranks' flags and of their rooms for parts, and this rank's number; epochs
    int32 [ROWS] counts each row's sums. All begin as zeros (triton.py says how large they are).

    Raises ValueError for more rows than there is room for, or than programs that can wait for one
    another.
    """
    return launch_reduce(
        x, branch, post_weight, layer_scalar, norm_weight, peers, epochs, eps=eps, offset=offset
    )


def launch_reduce(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, peers: Tensor, epochs: Tensor, *, eps: float, offset: float = 0.0,
    **halves: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As reduce_add_norm; of the kernel's PUSH and PULL those that `halves` do not say are done."""
    check_contiguous(x=x, branch=branch)
    rows, size = x.shape
    room = epochs.shape[0]
    if rows > min(room, MOST_ROWS):
        raise ValueError(f"{rows} rows: at most {min(room, MOST_ROWS)} can be summed at once")
    total, h = empty_like(x), empty_like(x)
    launch(reduce_norm_kernel, (rows,))(
        x, branch, post_weight, layer_scalar, norm_weight, total, h, peers, epochs, size,
        eps, offset, RANKS=peers.shape[0] // 2, ROWS=room,
        BLOCK_K=triton.next_power_of_2(size), num_warps=8,
        **{"PUSH": True, "PULL": True} | halves,
    )  # fmt: skip
    return total, h


@operator("sum_ranks", mutates_args={"epochs"})
def sum_ranks(x: Tensor, peers: Tensor, epochs: Tensor, count: Tensor | None = None) -> Tensor:
    """The sum of each rank's x [T, K], as reference.reduce_add_norm has it. Rows from `count` int32
    [1] on are anything. The mailbox is an exchange's: SLOTS slots of SLOT_BYTES."""
    y = empty_like(x)
    _exchange(x, y, count, peers, epochs, x.shape[1], True)
    return y


@operator("gather_columns", mutates_args={"epochs"})
def gather_columns(x: Tensor, peers: Tensor, epochs: Tensor, *, width: int) -> Tensor:
    """The first `width` columns of all ranks' x [B, K] side by side: [B, width]."""
    y = empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    _exchange(x, y, None, peers, epochs, width, False)
    return y


def _exchange(
    x: Tensor, y: Tensor, count: Tensor | None, peers: Tensor, epochs: Tensor, width: int,
    sums: bool,
) -> None:  # fmt: skip
    check_contiguous(x=x)
    rows, size = x.shape
    ranks, slot = peers.shape[0] // 2, SLOT_BYTES // x.element_size()
    # Few rows are cut so that all programs have some of them.
    block = min(MOST_BLOCK, max(LEAST_BLOCK, triton.next_power_of_2(rows * size // SLOTS)))
    block = min(block, triton.next_power_of_2(size))
    programs = min(SLOTS, rows * triton.cdiv(size, block))
    launch(exchange_kernel, (programs,))(
        x, y, count, peers, epochs, rows, size, width, RANKS=ranks, SLOTS=SLOTS, SLOT=slot,
        PROGRAMS=programs, BLOCK=block, SUM=sums, num_warps=8,
    )  # fmt: skip
