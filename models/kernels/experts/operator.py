"""Routed experts of a decode step on CUDA: only those that are chosen are read.

route     1 launch
experts   2: gate and up with the activation, then down with the weighted sum
"""

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.experts.triton import down_kernel, gate_up_kernel, route_kernel
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator

BLOCK_N = 8


@operator("route")
def route(scores: Tensor, experts: int, count: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """See reference.route. The scores are contiguous."""
    rows, width = scores.shape
    chosen = torch.empty(rows, count, dtype=torch.int64, device=scores.device)
    weights = torch.empty(rows, count, dtype=scores.dtype, device=scores.device)
    launch(route_kernel, (rows,))(
        scores, chosen, weights, experts, width, C=count, NORMALIZED=normalized,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_C=triton.next_power_of_2(count),
        num_warps=1,
    )  # fmt: skip
    return chosen, weights


@operator("experts")
def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See reference.experts. Raises ValueError for a tensor that is not contiguous."""
    check_contiguous(x=x, chosen=chosen, weights=weights, shared=shared, scores=scores)
    rows, count = chosen.shape
    _, size, inner = down.shape
    h = torch.empty(rows, count, inner, dtype=x.dtype, device=x.device)
    launch(gate_up_kernel, (triton.cdiv(inner, BLOCK_N), rows * count))(
        x, chosen, gate_up, h, inner, size,
        C=count, BLOCK_N=BLOCK_N, BLOCK_K=_block_k(size), num_warps=4,
    )  # fmt: skip
    y = torch.empty_like(x)
    launch(down_kernel, (triton.cdiv(size, BLOCK_N), rows))(
        h, chosen, weights, down, shared, scores, y, size, inner,
        0 if scores is None else scores.shape[1],
        C=count, BLOCK_N=BLOCK_N, BLOCK_K=_block_k(inner), num_warps=4,
    )  # fmt: skip
    return y


def _block_k(inputs: int) -> int:
    return min(512, triton.next_power_of_2(inputs))
