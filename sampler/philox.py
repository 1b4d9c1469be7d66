"""Noise that depends on (seed, position, token id) alone: counters through Philox, no state.

Philox4x32 is of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC11), with the constants of their Random123. Words are uint32 values in int64 tensors.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
ROUNDS = 7
WORDS = 4
# 23 bits and a half fit float32, whose largest below 1 they stay under.
UNIFORM_BITS = 23

# From Cephes' logf.c: ln 2 in two parts, and log(1 + f) = f - f^2 / 2 + f^3 P(f) for 1 + f between
# sqrt(1/2) and sqrt(2).
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
LOG_COEFFICIENTS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each counter: int64 tensors that broadcast, all of values 0 to 2^32 - 1.

    What depends on small tensors alone is computed once for all that they broadcast to.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product's upper bits come out right though it wraps around. `>>` would be exported as
        # an operator that ExecuTorch lacks.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (torch.bitwise_right_shift(p, 32) for p in (p0, p1))
        c0, c2 = (high1 ^ (c1 ^ k0)) & MASK, (high0 ^ (c3 ^ k1)) & MASK
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(seed: Tensor, position: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of tokens 4 b, 4 b + 1, 4 b + 2 and 4 b + 3, each int64 [B, N].

    seed and position int64 [B], of any value; blocks b int64 [N] or [B, N].
    """
    key, place = (
        ((x & MASK)[:, None], (torch.bitwise_right_shift(x, 32) & MASK)[:, None])
        for x in (seed, position)
    )
    return philox4x32((blocks, *place, torch.zeros_like(place[0])), key)


def gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise float32 [B, N] of tokens: seed, position int64 [B]; ids int64 [N] or [B, N]."""
    four = words(seed, position, torch.bitwise_right_shift(ids, 2))
    which = (ids & 3).expand_as(four[0])
    return noise(torch.gather(torch.stack(four), 0, which[None])[0])


def vocabulary_gumbel(seed: Tensor, position: Tensor, size: int) -> Tensor:
    """gumbel of the ids 0 to size - 1, float32 [B, size], at one counter for four of them."""
    blocks = torch.arange(-(-size // WORDS), device=seed.device)
    four = words(seed, position, blocks)
    return noise(torch.stack(four, dim=-1).flatten(1)[:, :size])


def steps(word: Tensor) -> Tensor:
    """The upper 23 bits of words, as float32."""
    return torch.bitwise_right_shift(word, 32 - UNIFORM_BITS).float()


def uniform(steps):
    """(steps + 1/2) / 2^23, exact in float32: above 0 and below 1."""
    return (steps + 0.5) * 2.0**-UNIFORM_BITS


def noise(word: Tensor) -> Tensor:
    """-log(-log(u)) float32 of words int64."""
    return -log(-log(uniform(steps(word))))


def log(x: Tensor) -> Tensor:
    """The natural logarithm of float32 x > 0, normal, to about one unit in the last place.

    It is made of operations that IEEE 754 rounds in one way only, so every engine gives the same
    bits. Libraries' logarithms differ; torch's serves for whole numbers only.
    """
    power = nearest_power_of_two(x * (1.5 / math.sqrt(2)))
    exponent = torch.round(torch.log(power) * (1 / math.log(2)))
    f = x / power - 1.0
    y = f * LOG_COEFFICIENTS[0] + LOG_COEFFICIENTS[1]
    for coefficient in LOG_COEFFICIENTS[2:]:
        y = y * f + coefficient
    square = f * f
    y = y * f * square + exponent * LN2_LOW - square * 0.5
    return f + y + exponent * LN2_HIGH


def nearest_power_of_two(x):
    """x > 0 rounded to one bit by Veltkamp's splitting, exactly."""
    split = x * (2.0**23 + 1)
    return split - (split - x)
