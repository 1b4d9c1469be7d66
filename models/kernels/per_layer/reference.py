"""Per-layer embeddings in plain torch. Shapes: N rows, L layers, P the size of a layer's vector."""

from torch import Tensor

from tokenloop.models.kernels.linear.reference import ACTIVATIONS
from tokenloop.models.kernels.rms_norm.reference import rms_norm
from tokenloop.models.per_layer import HALF


def layer_inputs(
    projected: Tensor, own: Tensor, norm_weight: Tensor, count: Tensor | None = None, *,
    eps: float, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """The layers' inputs [N, L * P], of projections [N, L * P] of the embeddings and the tokens'
    own vectors [N, L * P]: (norm(projected) + own) / sqrt(2), each layer's P normed by themselves,
    rounded once. norm_weight is [P].

    Rows from `count` int32 [1] on, where it is given, are anything.
    """
    size = len(norm_weight)
    normed = rms_norm(projected.unflatten(1, (-1, size)), norm_weight, eps, offset)
    return ((normed.flatten(1) + own.float()) * HALF).to(projected.dtype)


def gate_input(
    gate: Tensor, given: Tensor, count: Tensor | None = None, *, activation: str
) -> Tensor:
    """activation(gate) * given, both [N, P], rounded once. `activation` is a key of
    linear.reference.ACTIVATIONS. Rows from `count` int32 [1] on, where it is given, are anything.
    """
    return (ACTIVATIONS[activation](gate.float()) * given.float()).to(gate.dtype)
