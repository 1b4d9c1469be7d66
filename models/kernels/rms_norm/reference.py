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
    branch = branch.float() if post_weight is None else rms_norm(branch, post_weight, eps, offset)
    total = x.float() + branch
    if layer_scalar is not None:
        total = total * layer_scalar.float()
    total = total.to(x.dtype)
    return total, rms_norm(total, norm_weight, eps, offset).to(x.dtype)


def norm(
    x: Tensor, norm_weight: Tensor, count: Tensor | None = None, *, eps: float, offset: float = 0.0
) -> Tensor:
    """The RMSNorm of x [B, K], rounded once. Rows from `count` int32 [1] on are anything."""
    return rms_norm(x, norm_weight, eps, offset).to(x.dtype)
