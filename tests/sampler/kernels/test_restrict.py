"""The operators that change logits give the reference's bits, and touch no other row."""

import math

import pytest
import torch

from tests.sampler.kernels.drawing import DEVICE, ON_GPU
from tests.sampler.test_restrict import random_bits
from tokenloop.sampler import restrict
from tokenloop.sampler.kernels import operator

SIZES = [1, 259, 151_936, 262_144] if ON_GPU else [1, 259, 2051]


def random_logits(rows: int, size: int) -> torch.Tensor:
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 8
    logits[0, 0], logits[-1, -1] = -math.inf, math.inf
    return logits


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(torch.int32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_masked_logits_are_the_reference_s_and_rows_that_allow_all_are_as_they_were(rows, size):
    logits, allowed = random_logits(rows, size), random_bits(rows, size)
    logits[0, size // 2] = math.nan
    allowed[1:2] = 0xFF
    found = logits.to(DEVICE)
    operator.mask(found, allowed.to(DEVICE))
    assert torch.equal(bits_of(found), bits_of(restrict.mask(logits, allowed)))
    assert torch.equal(bits_of(found[1:2]), bits_of(logits[1:2]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_adjusted_logits_are_the_reference_s_and_an_id_of_minus_one_is_none(rows, size):
    logits, generator = random_logits(rows, size), torch.Generator().manual_seed(rows)
    count = min(size, 1500)
    ids = torch.stack([torch.randperm(size, generator=generator)[:count] for _ in range(rows)])
    scale = torch.rand(rows, count, generator=generator) * 3 + 0.1
    bias = torch.randn(rows, count, generator=generator)
    expected = restrict.adjust(logits, ids, scale, bias)
    # In the second row the first half alone counts.
    kept = -(-count // 2)
    second = logits[1:2], ids[1:2, :kept], scale[1:2, :kept], bias[1:2, :kept]
    expected[1:2] = restrict.adjust(*second)
    ids[1:2, kept:] = -1
    found = logits.to(DEVICE)
    operator.adjust(found, *(x.to(DEVICE) for x in (ids, scale, bias)))
    assert torch.equal(bits_of(found), bits_of(expected))
