"""Routed experts in plain torch. Shapes: B rows, E experts, C of them chosen for each row, K the
hidden size, I an expert's own size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def route(scores: Tensor, experts: int, count: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The `count` experts with the largest scores, int64 [B, count], the first of equal ones first;
    and their probabilities, of the scores' dtype, which add up to 1 if `normalized`.

    scores is [B, E or more]; the first E = `experts` of a row are the experts'.
    """
    probabilities = F.softmax(scores[:, :experts].float(), dim=-1)
    weights, chosen = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :count], chosen[:, :count]
    if normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights.to(scores.dtype)


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    shared: Tensor | None = None, scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SiLU-gated feed-forwards of x [B, K] by the experts `chosen` int64 [B, C], weighted with
    `weights` [B, C] and added up: [B, K].

    gate_up is [E, 2 I, K], down [E, K, I]. What lies between the two is rounded to x's dtype.
    `shared` [B, K] is what an expert gives that all rows have; it is added as well, weighted with
    the sigmoid of the last of `scores` [B, S].
    """
    gate, up = torch.einsum("bk,bcik->bci", x.float(), gate_up[chosen].float()).chunk(2, dim=-1)
    hidden = (F.silu(gate) * up).to(x.dtype).float()
    out = torch.einsum("bci,bcki->bck", hidden, down[chosen].float())
    out = (out * weights.float()[..., None]).sum(1)
    if shared is not None:
        out = out + scores[:, -1:].float().sigmoid() * shared.float()
    return out.to(x.dtype)
