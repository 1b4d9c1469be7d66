"""The ranks' sum, the residual and the norm after it, in plain torch."""

from collections.abc import Sequence

from torch import Tensor

from tokenloop.models.kernels.rms_norm import reference


def reduce_add_norm(
    x: Tensor, parts: Sequence[Tensor], post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, *, eps: float, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What reference.add_norm of models/kernels/rms_norm gives for the branch that is the sum of
    the ranks' `parts` [B, K]: in float32, in the ranks' order, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    branch = total.to(x.dtype)
    return reference.add_norm(
        x, branch, post_weight, layer_scalar, norm_weight, eps=eps, offset=offset
    )
