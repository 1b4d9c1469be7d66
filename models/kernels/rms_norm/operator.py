"""RMSNorm on CUDA, in one launch."""

from typing import NamedTuple

import triton
from torch import Tensor, empty, empty_like

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.rms_norm.triton import (
    norm_heads_kernel,
    norm_kernel,
    norm_parts_kernel,
)

# Rows of prompts that are wider are normed in parts of so many elements.
WHOLE, PART = 4096, 2048


class Norm(NamedTuple):
    """A norm of a residual, to which a branch may be added first. Without a `weight` it is the
    residual alone that is wanted."""

    weight: Tensor | None
    eps: float
    offset: float
    branch: Tensor | None = None
    post_weight: Tensor | None = None
    layer_scalar: Tensor | None = None


def launch_norm(x: Tensor, norm: Norm, count: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """The new residual, None where no branch is added, and its norm, None where there is none."""
    check_contiguous(x=x, branch=norm.branch)
    rows, size = x.shape
    total = None if norm.branch is None else empty_like(x)
    h = None if norm.weight is None else empty_like(x)
    if count is not None and size > WHOLE:
        launch(norm_parts_kernel, (rows,))(
            x, *norm[3:], norm.weight, total, h, count, size, norm.eps, norm.offset,
            ADD=total is not None, PARTS=triton.cdiv(size, PART), BLOCK_K=PART,
            num_warps=max(1, PART // 256),
        )  # fmt: skip
        return total, h
    launch(norm_kernel, (rows,))(
        x, *norm[3:], norm.weight, total, h, size, norm.eps, norm.offset,
        ADD=total is not None, BLOCK_K=triton.next_power_of_2(size), count_ptr=count, num_warps=8,
    )  # fmt: skip
    return total, h


@operator("add_norm")
def add_norm(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, count: Tensor | None = None, *, eps: float, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See reference.add_norm."""
    norm = Norm(norm_weight, eps, offset, branch, post_weight, layer_scalar)
    return launch_norm(x, norm, count)


@operator("add_branch")
def add_branch(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    count: Tensor | None = None, *, eps: float, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """See reference.add_branch."""
    return launch_norm(x, Norm(None, eps, offset, branch, post_weight, layer_scalar), count)[0]


@operator("norm_heads")
def norm_heads(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, count: Tensor | None = None, *,
    eps: float, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """See reference.norm_heads. Rows of x may lie further apart than they are wide.

    Raises ValueError for rows that are not contiguous, and for norms of more than a row has.
    """
    rows, size = x.shape
    q_size, k_size = (0 if weight is None else len(weight) for weight in (q_weight, k_weight))
    if x.stride(1) != 1 or q_size + k_size > size:
        raise ValueError(
            f"x {tuple(x.shape)} of strides {x.stride()} for norms of {q_size} and {k_size}: "
            "contiguous rows as long as both are right"
        )
    normed = empty(rows, size, dtype=x.dtype, device=x.device)
    widest = max(q_size, k_size, size - q_size - k_size)
    launch(norm_heads_kernel, (rows, 3))(
        x, q_weight, k_weight, normed, count, x.stride(0), size, q_size, k_size, eps, offset,
        BLOCK_K=triton.next_power_of_2(widest), num_warps=8,
    )  # fmt: skip
    return normed


@operator("norm")
def norm(
    x: Tensor, norm_weight: Tensor, count: Tensor | None = None, *, eps: float, offset: float = 0.0
) -> Tensor:
    """See reference.norm."""
    return launch_norm(x, Norm(norm_weight, eps, offset), count)[1]
