"""Routed experts in plain torch. Shapes: B rows or tokens, E experts, C of them chosen for each
row, K the hidden size, I an expert's own size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.kernels.experts.packing import dequantize
from tokenloop.models.kernels.rms_norm.reference import add_norm
from tokenloop.models.layers import gated


def route(
    scores: Tensor, experts: int, count: int, normalized: bool, tokens: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `count` experts with the largest scores, int64 [B, count], the first of equal ones first;
    and their probabilities, of the scores' dtype, which add up to 1 if `normalized`. With `scales`
    [E] each is multiplied by its expert's after that.

    scores is [B, E or more]; the first E = `experts` of a row are the experts'. Only the first
    `tokens`, int32 [1], rows of the results mean anything, or all without it.
    """
    scores32 = scores[:, :experts].float()
    chosen = torch.sort(scores32, dim=-1, descending=True, stable=True)[1][:, :count]
    weights = F.softmax(scores32, dim=-1).gather(1, chosen)
    if normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    if scales is not None:
        weights = weights * scales[chosen].float()
    return chosen, weights.to(scores.dtype)


def add_norm_scores(
    x: Tensor, branch: Tensor, post_weight: Tensor | None, layer_scalar: Tensor | None,
    norm_weight: Tensor, weight: Tensor, gate_up: Tensor | None, activation: str, *, eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The new residual and its norm, as rms_norm's add_norm has them, both [B, K]; the norm's
    products with weight [S, K], which are [B, S]; and activation(gate) * up of it [B, I], for
    gate_up [2 I, K], or [B, 0] where there is none."""
    norm = x, branch, post_weight, layer_scalar, norm_weight
    total, normed = add_norm(*norm, eps=eps, offset=offset)
    scores = F.linear(normed.float(), weight.float()).to(x.dtype)
    if gate_up is None:
        return total, normed, scores, x.new_empty(len(x), 0)
    both = F.linear(normed.float(), gate_up.float()).chunk(2, dim=-1)
    return total, normed, scores, gated(*both, activation).to(x.dtype)


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gated feed-forwards of x [B, K] by the experts `chosen` int64 [B, C], weighted with
    `weights` [B, C] and added up: [B, K].

    gate_up is [E, 2 I, K], down [E, K, I], and their biases [E, 2 I] and [E, K]. They are of x's
    dtype, or in a layout of packing.py, with its scales.
    `activation` is one of models.layers.gated. What lies between the two is rounded to x's dtype.
    `shared` [B, K] is what an expert gives that all rows have; it is added as well, weighted with
    the sigmoid of the last of `scores` [B, S]. With `shared_down` [K, S] it is what that makes of
    `shared` [B, S], not rounded in between.
    """
    gate_up, down = dequantize(gate_up, gate_up_scale), dequantize(down, down_scale)
    both = torch.einsum("bk,bcik->bci", x.float(), gate_up[chosen].float())
    both = both if gate_up_bias is None else both + gate_up_bias[chosen].float()
    hidden = gated(*both.chunk(2, dim=-1), activation).to(x.dtype).float()
    out = torch.einsum("bci,bcki->bck", hidden, down[chosen].float())
    out = out if down_bias is None else out + down_bias[chosen].float()
    out = (out * weights.float()[..., None]).sum(1)
    if shared is not None:
        shared = shared.float()
        shared = shared if shared_down is None else shared @ shared_down.float().T
        out = out + scores[:, -1:].float().sigmoid() * shared
    return out.to(x.dtype)


def route_experts(
    x: Tensor, scores: Tensor, count: int, normalized: bool, scales: Tensor | None,
    gate_up: Tensor, down: Tensor, shared: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    """`experts` of what `route` gives for `scores` [B, E or more], whose last weighs what is
    `shared`."""
    routed = route(scores, len(down), count, normalized, None, scales)
    beside = () if shared is None else (shared, scores)
    return experts(x, *routed, gate_up, down, *beside, **options)


def experts_chunk(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, count: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    gate_up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`experts` of many rows, of which the first `count`, int32 [1], exist. No other is read, and
    the result's others are zero here, and anything in the kernels' result.

    A row's result does not depend on the number of rows, nor on where it is, nor on the others.
    """
    gate_up, down = dequantize(gate_up, gate_up_scale), dequantize(down, down_scale)
    tokens = int(count)
    x32, weights32 = x[:tokens].float(), weights[:tokens].float()
    given = x32.new_zeros(*weights32.shape, x.shape[1])
    for expert in range(len(down)):
        rows, choices = torch.where(chosen[:tokens] == expert)
        biases = (None if b is None else b[expert].float() for b in (gate_up_bias, down_bias))
        first, second = biases
        both = F.linear(x32[rows], gate_up[expert].float(), first)
        hidden = gated(*both.chunk(2, dim=-1), activation).to(x.dtype).float()
        given[rows, choices] = F.linear(hidden, down[expert].float(), second)
    out = (given * weights32[..., None]).sum(1)
    if shared is not None:
        out = out + scores[:tokens, -1:].float().sigmoid() * shared[:tokens].float()
    return F.pad(out, (0, 0, 0, len(x) - tokens)).to(x.dtype)
