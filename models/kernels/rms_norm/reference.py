"""RMSNorm and the residual before it in plain torch. Shapes: B rows of K elements."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """float32 x / rms(x) * (offset + weight) over the last axis (arXiv:1910.07467)."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * (offset + weight.float())


def add_norm(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, count: Tensor | None = None, *, eps: float, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The new residual (x + post norm(branch)) * layer_scalar [B, K], and its norm.

    Both are computed in float32 and rounded once; the norm is that of the rounded residual.
    layer_scalar has one element. Rows from `count` int32 [1] on, where it is given, are anything.
    """
    total = add_branch(x, branch, post_weight, layer_scalar, eps=eps, offset=offset)
    return total, rms_norm(total, norm_weight, eps, offset).to(x.dtype)


def add_branch(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    count: Tensor | None = None, *, eps: float, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """The new residual of `add_norm`, alone. eps and offset are those of the post norm."""
    branch = branch.float() if post_weight is None else rms_norm(branch, post_weight, eps, offset)
    total = x.float() + branch
    return (total if layer_scalar is None else total * layer_scalar.float()).to(x.dtype)


def norm_heads(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, count: Tensor | None = None, *,
    eps: float, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """x [B, N] whose queries and keys are normed, all heads of a row at once. Queries come first in
    a row, then keys, as many as the norms have weights, and what comes then stays. A row has no
    queries, or no keys, where their weight is None. Rows from `count` int32 [1] on are anything."""
    sizes = [0 if weight is None else len(weight) for weight in (q_weight, k_weight)]
    q, k, rest = x.split([*sizes, x.shape[1] - sum(sizes)], 1)
    parts = [
        part.float() if weight is None else rms_norm(part, weight, eps, offset)
        for part, weight in ((q, q_weight), (k, k_weight), (rest, None))
    ]
    return torch.cat(parts, 1).to(x.dtype)


def norm(
    x: Tensor, norm_weight: Tensor, count: Tensor | None = None, *, eps: float, offset: float = 0.0
) -> Tensor:
    """The RMSNorm of x [B, K], rounded once. Rows from `count` int32 [1] on are anything."""
    return rms_norm(x, norm_weight, eps, offset).to(x.dtype)
