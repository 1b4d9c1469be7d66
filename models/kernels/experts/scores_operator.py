"""What a step's rows have ahead of their experts, on CUDA.

add_norm_scores   1 launch, and one of the norm for many rows
"""

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.experts.triton_scores import scores_kernel
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.linear.linear_tiles import SHARED_NORM
from tokenloop.models.kernels.rms_norm.operator import Norm, launch_norm

# The most inputs of a row, all of which a program has at once, and how many scores, or gates and
# ups, it makes.
MOST_INPUTS, BLOCK_N = 2048, 4


def fits_one_launch(size: int) -> bool:
    """Whether `add_norm_scores` takes rows of that size."""
    return size <= MOST_INPUTS


@operator("add_norm_scores")
def add_norm_scores(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, weight: Tensor, gate_up: Tensor | None, activation: str, *, eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference.add_norm_scores. Raises ValueError for weights of another dtype than x's, for
    rows that `fits_one_launch` does not take, and for what is not contiguous."""
    check_contiguous(x=x, branch=branch, weight=weight, gate_up=gate_up)
    rows, size = x.shape
    other = any(each is not None and each.dtype != x.dtype for each in (weight, gate_up))
    if size > MOST_INPUTS or other:
        raise ValueError(
            f"{size} inputs of {x.dtype}, weights of {weight.dtype}: at most {MOST_INPUTS} inputs, "
            "of the weights' dtype, are right"
        )
    outputs, inner = len(weight), 0 if gate_up is None else len(gate_up) // 2
    scores, gated = (
        torch.empty(rows, count, dtype=x.dtype, device=x.device) for count in (outputs, inner)
    )
    normed_within = rows <= SHARED_NORM
    if normed_within:
        total, normed = torch.empty_like(x), torch.empty_like(x)
        given = x, branch, post_weight, layer_scalar, norm_weight
        stored = total, normed
    else:
        norm = Norm(norm_weight, eps, offset, branch, post_weight, layer_scalar)
        total, normed = launch_norm(x, norm)
        given, stored = (normed, None, None, None, None), (None, None)
    tiles = triton.cdiv(outputs, BLOCK_N) + triton.cdiv(inner, BLOCK_N)
    launch(scores_kernel, (rows * tiles,))(
        *given, weight, gate_up, *stored, scores, gated if inner else None,
        rows, outputs, inner, size, eps, offset, NORM=normed_within, ACTIVATION=activation,
        BLOCK_N=BLOCK_N, BLOCK_K=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return total, normed, scores, gated
