"""The norm and gate on CUDA, in one launch."""

import triton
from torch import Tensor, empty_like

from tokenloop.models.kernels.gated_rms_norm.triton import gated_rms_norm_kernel
from tokenloop.models.kernels.launch.launches import launch, operator


@operator("gated_rms_norm")
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.gated_rms_norm. Raises ValueError where x or a head of the gate is not
    contiguous."""
    batch, heads, size = x.shape
    if not x.is_contiguous() or gate.stride(-1) != 1:
        raise ValueError(
            f"strides of x and gate are {x.stride()} and {gate.stride()}: x and each head of the "
            "gate must be contiguous"
        )
    out = empty_like(x)
    launch(gated_rms_norm_kernel, (batch * heads,))(
        x, gate, weight, out, heads, size, *gate.stride()[:2], eps,
        BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return out
