"""Counter-based noise: Philox as published, and one value for one token however it is asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloop.sampler.philox import (
    gumbel,
    log,
    noise,
    philox4x32,
    uniform,
    vocabulary_gumbel,
)

MASK = 2**32 - 1
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
# Random123's tests/kat_vectors: rounds, counter and key, result.
KNOWN = [
    (7, [0] * 6, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, [MASK] * 6, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (7, PI, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    (10, [0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [MASK] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (10, PI, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]
INT64 = st.integers(-(2**63), 2**63 - 1)


def plain_philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 in Python's integers, as the paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def plain_uniform(seed: int, position: int, token: int) -> float:
    """The definition, for one token."""
    counter = [token // 4, position & MASK, position >> 32 & MASK, 0]
    word = plain_philox(counter, [seed & MASK, seed >> 32 & MASK], 7)[token % 4]
    return ((word >> 9) + 0.5) / 2**23


@pytest.mark.parametrize("rounds, arguments, result", KNOWN)
def test_published_vectors_come_out(rounds, arguments, result):
    tensors = [torch.tensor([value]) for value in arguments]
    words = philox4x32(tuple(tensors[:4]), tuple(tensors[4:]), rounds)
    assert [word.item() for word in words] == result
    assert plain_philox(arguments[:4], arguments[4:], rounds) == result


@settings(deadline=None)
@given(st.lists(st.integers(0, MASK), min_size=6, max_size=6), st.integers(1, 10))
def test_any_counter_and_key_give_what_plain_integers_give(arguments, rounds):
    tensors = [torch.tensor([value]) for value in arguments]
    words = philox4x32(tuple(tensors[:4]), tuple(tensors[4:]), rounds)
    assert [word.item() for word in words] == plain_philox(arguments[:4], arguments[4:], rounds)


@settings(deadline=None)
@given(
    st.lists(st.tuples(INT64, INT64), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**24), min_size=1, max_size=9),
)
def test_noise_is_gumbels_of_seed_position_and_id(rows, ids):
    seed, position = (torch.tensor(values) for values in zip(*rows))
    expected = [[-math.log(-math.log(plain_uniform(*row, i))) for i in ids] for row in rows]
    found = gumbel(seed, position, torch.tensor(ids))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    each = gumbel(seed, position, torch.tensor(ids).expand(len(rows), -1).contiguous())
    assert torch.equal(found, each)


@settings(deadline=None)
@given(st.integers(1, 40), INT64, INT64)
def test_a_vocabularys_noise_is_that_of_each_id(size, seed, position):
    seed, position = torch.tensor([seed, 3, seed]), torch.tensor([position, position, -1])
    whole = vocabulary_gumbel(seed, position, size)
    assert torch.equal(whole, gumbel(seed, position, torch.arange(size)))


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_bit_of_seed_and_position_counts(bit):
    seed, position = torch.tensor([12345]), torch.tensor([678])
    flip = torch.tensor([1 << bit if bit < 63 else -(2**63)])
    before = vocabulary_gumbel(seed, position, 64)
    for changed in ((seed ^ flip, position), (seed, position ^ flip)):
        assert (vocabulary_gumbel(*changed, 64) != before).float().mean() > 0.9


def test_uniforms_are_exact_and_between_0_and_1():
    steps = torch.cat([torch.arange(2**12), torch.arange(2**23 - 2**12, 2**23)])
    assert torch.equal(uniform(steps.float()).double(), (steps.double() + 0.5) / 2**23)
    # A word's 23 upper bits count, and the others do not.
    words = torch.tensor([0, 511, 512, MASK])
    assert noise(words)[0] == noise(words)[1] < noise(words)[2] < noise(words)[3]
    assert noise(words).isfinite().all()


def test_the_logarithm_is_right_to_two_units_in_the_last_place():
    generator = torch.Generator().manual_seed(0)
    x = torch.exp(torch.rand(200_000, generator=generator) * 40 - 20)
    near_one = 1 - torch.arange(1, 5000) * 2.0**-24
    for values in (x, near_one, torch.tensor([1.0]), 2.0 ** torch.arange(-20, 20)):
        exact = torch.log(values.double())
        assert ((log(values) - exact).abs() <= exact.abs() * 2.0**-22).all()


def test_noise_has_gumbels_moments():
    g = vocabulary_gumbel(torch.tensor([1, -7]), torch.tensor([0, 2**40]), 200_000).double()
    # The standard deviations of the mean and the variance of so many are 0.0029 and 0.0077.
    assert (g.mean(1) - 0.5772156649).abs().max() < 0.015
    assert (g.var(1) - math.pi**2 / 6).abs().max() < 0.04
    # Neighbours, of one counter and of the next, have nothing to do with each other: 5 sigmas.
    for lag in (1, 2, 3, 4, 5):
        pairs = torch.stack([g[0, :-lag], g[0, lag:]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 5 / 200_000**0.5
    assert torch.corrcoef(g)[0, 1].abs() < 5 / 200_000**0.5
