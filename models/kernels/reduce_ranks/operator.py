"""The ranks' sum on CUDA, with the residual and the norm after it: one launch."""

import triton
from torch import Tensor, empty_like

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.reduce_ranks.triton import reduce_norm_kernel

# A program waits for the same one of every other rank, so all must run at once. A GPU of the kinds
# that kernels are compiled for has at least so many processors.
MOST_ROWS = 128


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
