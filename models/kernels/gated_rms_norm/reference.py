"""The norm and gate in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.kernels.rms_norm.reference import rms_norm


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, count: Tensor | None = None
) -> Tensor:
    """weight * RMSNorm(x) * silu(gate) over the last axis, of x's dtype: x and gate [B, H, V],
    weight [V] of x's dtype. The norm, its product with the weight and the result are rounded. Of a
    packed chunk there are `count` rows, int32 [1]; the results of the others are anything."""
    normal = weight * rms_norm(x, None, eps, 0.0).to(x.dtype)
    return (normal * F.silu(gate.float())).to(x.dtype)
