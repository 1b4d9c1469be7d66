"""Routed experts of a decode step on CUDA (models/moe.py): only those that are chosen are read.

They are operators, torch.ops.tokenloop.route and torch.ops.tokenloop.experts, as cuda.py has them;
reference.py says what they give. A row's result does not depend on the other rows: experts are
added up in the order in which they were chosen.

Names: row b, choice j of C, expert e of E, output n of N, input k of K.

    route     1 launch
    experts   2: gate and up with the activation, then down with the weighted sum
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tokenloop.models.kernels.dependent_launch import wait
from tokenloop.models.kernels.linear import activate

BLOCK_N = 8


@triton.jit
def route_kernel(
    scores_ptr, chosen_ptr, weights_ptr, E, width,
    C: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest of a row's first E scores, one after the other, and their probabilities."""
    b = tl.program_id(0)
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    scores_ptr += wait(0)
    scores = tl.load(scores_ptr + b * width + e, mask=e < E, other=float("-inf")).to(tl.float32)
    left = tl.exp(scores - tl.max(scores, 0))
    left = tl.where(e < E, left / tl.sum(left, 0), -1.0)
    chosen, weights = tl.zeros([BLOCK_C], tl.int64), tl.zeros([BLOCK_C], tl.float32)
    for i in tl.static_range(C):
        largest = tl.max(left, 0)
        # Of a row of NaN none is the largest, and any expert will do.
        index = tl.minimum(tl.min(tl.where(left == largest, e, BLOCK_E), 0), E - 1)
        chosen = tl.where(j == i, index.to(tl.int64), chosen)
        weights = tl.where(j == i, largest, weights)
        left = tl.where(e == index, -1.0, left)
    if NORMALIZED:
        weights = weights / tl.sum(weights, 0)
    tl.store(chosen_ptr + b * C + j, chosen, mask=j < C)
    tl.store(weights_ptr + b * C + j, weights.to(weights_ptr.dtype.element_ty), mask=j < C)


@triton.jit
def products(acc, x_ptr, w_ptr, n, N, K, BLOCK_K: tl.constexpr):
    """acc [n, BLOCK_K] plus weights [n, k] times x [k], to be summed over its columns."""
    # Rows beyond the last are the last: a load without mask, whose results are not stored.
    rows = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc += w.to(tl.float32) * x[None, :]
    return acc


@triton.jit
def gate_up_kernel(
    x_ptr, chosen_ptr, w_ptr, h_ptr, N, K,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs silu(gate) * up of one row's choice: h [B, C, N]."""
    pair = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    zero = wait(0)
    expert = tl.load(chosen_ptr + zero + pair) * 2 * N * K
    row_ptr, zeros = x_ptr + zero + pair // C * K, tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    gate = products(zeros, row_ptr, w_ptr + expert, n, N, K, BLOCK_K)
    up = products(zeros, row_ptr, w_ptr + expert + tl.cast(N, tl.int64) * K, n, N, K, BLOCK_K)
    h = activate(tl.sum(gate, 1), "silu") * tl.sum(up, 1)
    tl.store(h_ptr + pair * N + n, h.to(h_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def down_kernel(
    h_ptr, chosen_ptr, weights_ptr, w_ptr, shared_ptr, scores_ptr, y_ptr, N, K, width,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a row: the weighted sum of what its experts make of h [B, C, K], and of
    what is shared, whose weight is the last of the row's scores."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros([BLOCK_N], tl.float32)
    zero = wait(0)
    for j in range(C):
        pair = b * C + j + zero
        expert = tl.load(chosen_ptr + pair) * N * K
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        acc = products(acc, h_ptr + pair * K, w_ptr + expert, n, N, K, BLOCK_K)
        y += tl.load(weights_ptr + pair).to(tl.float32) * tl.sum(acc, 1)
    if shared_ptr is not None:
        score = tl.load(scores_ptr + zero + b * width + width - 1).to(tl.float32)
        shared = tl.load(shared_ptr + zero + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        y += shared / (1 + tl.exp(-score))
    tl.store(y_ptr + b * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton_op("tokenloop::route", mutates_args={})
def route(scores: Tensor, experts: int, count: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """See reference.route. The scores are contiguous."""
    rows, width = scores.shape
    chosen = torch.empty(rows, count, dtype=torch.int64, device=scores.device)
    weights = torch.empty(rows, count, dtype=scores.dtype, device=scores.device)
    wrap_triton(route_kernel)[(rows,)](
        scores, chosen, weights, experts, width, C=count, NORMALIZED=normalized,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_C=triton.next_power_of_2(count),
        num_warps=1,
    )  # fmt: skip
    return chosen, weights


@triton_op("tokenloop::experts", mutates_args={})
def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """See reference.experts. Raises ValueError for a tensor that is not contiguous."""
    rest = {"shared": shared, "scores": scores}
    for name, tensor in {"x": x, "chosen": chosen, "weights": weights, **rest}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} of strides {tensor.stride()} is not contiguous")
    rows, count = chosen.shape
    _, size, inner = down.shape
    h = torch.empty(rows, count, inner, dtype=x.dtype, device=x.device)
    wrap_triton(gate_up_kernel)[(triton.cdiv(inner, BLOCK_N), rows * count)](
        x, chosen, gate_up, h, inner, size,
        C=count, BLOCK_N=BLOCK_N, BLOCK_K=_block_k(size), num_warps=4,
    )  # fmt: skip
    y = torch.empty_like(x)
    wrap_triton(down_kernel)[(triton.cdiv(size, BLOCK_N), rows)](
        h, chosen, weights, down, shared, scores, y, size, inner,
        0 if scores is None else scores.shape[1],
        C=count, BLOCK_N=BLOCK_N, BLOCK_K=_block_k(inner), num_warps=4,
    )  # fmt: skip
    return y


def _block_k(inputs: int) -> int:
    return min(512, triton.next_power_of_2(inputs))
