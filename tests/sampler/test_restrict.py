"""Masks and adjustments are what a loop over tokens makes of the logits."""

import math

import pytest
import torch

from tokenloop.sampler.restrict import adjust, mask


def random_bits(rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    shape = rows, -(-size // 32) * 4
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 8, 37, 259])
def test_a_token_without_its_bit_has_minus_infinity_and_others_their_logit(size):
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    logits[0, 0], logits[1, 0] = math.nan, math.inf
    allowed = random_bits(3, size)
    found = mask(logits, allowed)
    for row in range(3):
        for token in range(size):
            has_bit = allowed[row, token // 8].item() >> (token % 8) & 1
            expected = logits[row, token] if has_bit else torch.tensor(-math.inf)
            assert torch.equal(found[row, token], expected) or (has_bit and expected.isnan())


def test_logits_are_scaled_away_from_zero_or_to_it_and_then_moved():
    logits = torch.tensor([[2.0, -2.0, 0.0, 5.0, -math.inf]])
    ids, scale = torch.tensor([[1, 0, 4, 2]]), torch.tensor([[4.0, 4.0, 2.0, 2.0]])
    found = adjust(logits, ids, scale, torch.tensor([[1.0, 0.25, 9.0, -1.0]]))
    assert found.tolist() == [[0.75, -7.0, -1.0, 5.0, -math.inf]]
    assert logits.tolist() == [[2.0, -2.0, 0.0, 5.0, -math.inf]]
