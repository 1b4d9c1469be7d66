"""Sampling with temperature, top-k and top-p: exact masses, counter-based noise, no state.

A token is drawn as the largest of its scaled logits plus Gumbel noise (Gumbel 1954; Maddison et
al., arXiv:1411.0030). Every step is exact or rounded in one way only, so a row's token depends on
that row's arguments alone: not on the rest of the batch, nor on the engine.
"""

import math

import torch
from torch import Tensor

from tokenloop.sampler import philox
from tokenloop.sampler.greedy import greedy

# A weight is a probability times 2^38, relative to the most likely token's: sums of 2^24 of them
# fit int64.
WEIGHT_BITS = 38
# Weights are 0 from here on.
LOWEST = -27.0
# Temperatures from 0 up to here are one, and it draws from the largest logits alone unless others
# are within 1.5e-18 of them. Its inverse is finite, and so far above the smallest normal float32
# that no token depends on whether an engine flushes subnormal logits and differences to 0.
LEAST_TEMPERATURE = 2.0**-64
# From Cephes' expf.c: exp(r) = 1 + r + r^2 P(r) for |r| up to ln(2) / 2.
EXP_COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor,
    position: Tensor,
) -> Tensor:  # fmt: skip
    """A random token for each row, int64 [B, 1], of logits float32 [B, V].

    temperature and top_p float32 [B], top_k, seed and position int64 [B]. Temperature 0 is
    sampler.greedy, and one between that and LEAST_TEMPERATURE counts as that; top_k 0 or above V,
    and top_p 1, leave everything in; top_p 0 leaves one token. NaN counts as -inf. Where there is
    +inf only such tokens are drawn, all equally likely. A row without any number above -inf gives
    id 0. The caller refuses values beyond these.
    """
    x, largest = numbers(logits)
    descending = torch.sort(x, dim=-1, descending=True).values
    cut = threshold(descending, largest, temperature, top_k, top_p)
    scaled = restrict(x, largest, temperature, *cut)
    scores = scaled + philox.vocabulary_gumbel(seed, position, x.shape[1])
    token = torch.argmax(scores, dim=-1, keepdim=True)
    return torch.where(temperature[:, None] == 0, greedy(logits), token)


def numbers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] without NaN and +inf that give the same tokens, and what to subtract from them:
    their largest [B, 1], or 0 where all are -inf."""
    x = torch.where(logits == logits, logits, -torch.inf)
    largest = torch.amax(x, dim=-1, keepdim=True)
    only_infinite = torch.where(x == torch.inf, 0.0, -torch.inf)
    x = torch.where(largest == torch.inf, only_infinite, x)
    return x, torch.where(torch.isinf(largest), 0.0, largest)


def scale(x: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """(x - largest) / temperature, at most 0: float32 [B, N] of x [B, N], largest [B, 1],
    temperature [B], of at least LEAST_TEMPERATURE."""
    # Where a divisor is one element, ExecuTorch multiplies by its inverse, which rounds otherwise.
    divisor = temperature.clamp(min=LEAST_TEMPERATURE)[:, None] + torch.zeros_like(x)
    return (x - largest) / divisor


def threshold(
    descending: Tensor, largest: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where top-k and top-p cut: the smallest logit that stays, float32 [B, 1], and how many of the
    tokens that have just this logit stay, int64 [B, 1].

    descending [B, N] are the largest logits in order. N may be less than the vocabulary where the
    cut lies inside, with all of top-k's ties; then mass int64 [B, 1] is the sum of all weights for
    rows without top-k. Ties at the k-th largest stay, as in transformers' TopKLogitsWarper. A token
    stays when the probability of those before it is less than top_p, as in its TopPLogitsWarper.
    """
    size = descending.shape[1]
    top_k, top_p = top_k[:, None], top_p[:, None]
    limited = (top_k > 0) & (top_k < size)
    kth = torch.gather(descending, 1, torch.where(limited, top_k, size) - 1)
    stays = descending >= kth
    weight = weights(scale(descending, largest, temperature)) * stays
    total = weight.sum(-1, keepdim=True)
    if mass is not None:
        total = torch.where(limited, total, mass)
    before = torch.cumsum(weight, -1) - weight
    inside = (before.double() < top_p.double() * total.double()) | (top_p >= 1)
    count = (inside & stays).sum(-1, keepdim=True).clamp(min=1)
    smallest = torch.gather(descending, 1, count - 1)
    return smallest, count - (descending > smallest).sum(-1, keepdim=True)


def restrict(
    x: Tensor, largest: Tensor, temperature: Tensor, smallest: Tensor, ties: Tensor
) -> Tensor:
    """Scaled logits [B, N] of x [B, N], in the order of their ids, where they stay: those above
    `smallest`, and of those equal to it the last `ties`. The others are -inf."""
    equal = x == smallest
    order = torch.cumsum(equal.long(), -1)
    stays = (x > smallest) | (equal & (order > order[:, -1:] - ties))
    return torch.where(stays, scale(x, largest, temperature), -torch.inf)


def noisiest(scaled: Tensor, ids: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The token with the largest score, int64 [B, 1]: scaled logits [B, N] plus noise, of tokens
    ids int64 [B, N], ascending; seed and position int64 [B]."""
    best = torch.argmax(scaled + philox.gumbel(seed, position, ids), dim=-1, keepdim=True)
    return torch.gather(ids, 1, best)


def weights(scaled: Tensor) -> Tensor:
    """floor(exp(scaled) 2^38), int64, of scaled float32 <= 0."""
    return exp2_38(scaled).long()


def exp2_38(scaled):
    """exp(scaled) 2^38 for float32 <= 0, and something below 1 where that is less than 2^-38.

    Every engine gives the same bits: see sampler.philox.log. It uses only arithmetic and methods of
    `scaled`, so that an exporter can record them.
    """
    scaled = scaled.clamp(min=LOWEST)
    exponent = (scaled * (1 / math.log(2)) + 0.5).floor()
    r = scaled - exponent * philox.LN2_HIGH - exponent * philox.LN2_LOW
    y = r * EXP_COEFFICIENTS[0] + EXP_COEFFICIENTS[1]
    for coefficient in EXP_COEFFICIENTS[2:]:
        y = y * r + coefficient
    y = y * (r * r) + r + 1.0
    return y * philox.nearest_power_of_two(((exponent + WEIGHT_BITS) * math.log(2)).exp())
