"""Sampling: which tokens stay, how often each is drawn, and that a row's token is its own."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampler import extremes
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.philox import gumbel
from tokenloop.sampler.sample import (
    LEAST_TEMPERATURE,
    exp2_38,
    numbers,
    restrict,
    sample,
    threshold,
    weights,
)

NAN, INF = math.nan, math.inf
INT64 = st.integers(-(2**63), 2**63 - 1)
# Few values, so that ties are common; quarters, so that float32 loses nothing on the way.
LOGITS = st.sampled_from([NAN, -INF, -3.0, -1.0, -0.25, -0.0, 0.0, 0.5, 1.0, 1.25, 4.0])


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0):
    """sample with Python's numbers for rows that have the same."""
    values = (temperature, top_k, top_p, seed, position)
    dtypes = (torch.float32, torch.int64, torch.float32, torch.int64, torch.int64)
    rows = [
        value if isinstance(value, torch.Tensor) else torch.full((len(logits),), value, dtype=dtype)
        for value, dtype in zip(values, dtypes)
    ]
    return sample(logits, *rows)


def support(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Which tokens can be drawn at all, bool [B, V]."""
    rows = len(logits)
    x, largest = numbers(logits)
    settings = [
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
    ]
    cut = threshold(x.sort(-1, descending=True).values, largest, *settings)
    return restrict(x, largest, settings[0], *cut) > -INF


def plain_support(row: list[float], temperature: float, top_k: int, top_p: float) -> set[int]:
    """The definition, in Python's floats, for rows without +inf."""
    best = max((value for value in row if value > -INF), default=None)
    if best is None:
        return set()
    x = [value if value == value else -INF for value in row]
    order = sorted(range(len(x)), key=lambda i: (x[i], i), reverse=True)
    if 0 < top_k < len(x):
        order = [i for i in order if x[i] >= x[order[top_k - 1]]]
    weight = [math.floor(math.exp((x[i] - best) / temperature) * 2**38) for i in order]
    stay = [
        i
        for n, i in enumerate(order)
        if n == 0 or top_p == 1 or sum(weight[:n]) < top_p * sum(weight)
    ]
    return {i for i in stay if x[i] > -INF}


@settings(deadline=None)
@given(
    st.lists(LOGITS, min_size=1, max_size=12),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 13),
    # Not where sums of equal weights end, which is where rounding would decide.
    st.sampled_from([1.0, 0.9013, 0.6171, 0.3137, 0.0501]),
    INT64,
    INT64,
)
def test_tokens_are_those_of_the_definition(row, temperature, top_k, top_p, seed, position):
    stay = plain_support(row, temperature, top_k, top_p)
    logits = torch.tensor([row])
    found = support(logits, temperature, top_k, top_p)[0].nonzero().flatten().tolist()
    assert set(found) == stay
    token = draw(logits, temperature, top_k, top_p, seed, position)
    assert (token.shape, token.dtype) == ((1, 1), torch.int64)
    if not stay:
        assert token.item() == 0
        return
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), torch.arange(len(row)))[0]
    scores = {i: row[i] / temperature + noise[i].item() for i in sorted(stay)}
    # float32 rounds what is added in another order here.
    assert scores[token.item()] > max(scores.values()) - 1e-5


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (0, 0.5), (3, 0.9)])
@pytest.mark.parametrize(
    "row, tokens",
    [
        ([1.0, INF, NAN, INF, INF], {1, 3, 4}),
        ([INF, NAN], {0}),
        ([NAN, -INF, -3.0, NAN], {2}),
        ([NAN, NAN, NAN], {0}),
        ([-INF, -INF, NAN], {0}),
        ([3.4e38, -3.4e38, 0.0], {0}),
    ],
)
def test_only_numbers_are_drawn_and_infinity_before_all_others(row, tokens, top_k, top_p):
    drawn = draw(torch.tensor([row]).expand(400, -1), 1.0, top_k, top_p, torch.arange(400))
    found = set(drawn.flatten().tolist())
    assert found <= tokens
    if top_p == 1.0:
        assert found == tokens


def test_the_last_of_equal_tokens_stay_when_top_p_cuts_between_them():
    logits = torch.tensor([[0.0, 5.0, 0.0, 5.0, 5.0, 5.0]])
    # Of four quarters: 0.26 asks for two, 0.24 for one.
    assert support(logits, 1.0, 4, 0.26).tolist() == [[False] * 4 + [True, True]]
    assert support(logits, 1.0, 4, 0.24).tolist() == [[False] * 5 + [True]]
    assert support(logits, 1.0, 4, 0.25).tolist() == [[False] * 5 + [True]]
    assert support(logits, 1.0, 3, 1.0).tolist() == [[False, True, False, True, True, True]]


@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 300, 400])
# No fractions of small numbers, where sums of equal probabilities end.
@pytest.mark.parametrize("top_p", [1.0, 0.9989, 0.9013, 0.5171, 1e-6])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_same_tokens_stay_as_in_transformers(monkeypatch, temperature, top_k, top_p):
    from transformers import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(top_k)
    random = torch.randn(8, 300, generator=generator) * 4
    integers = torch.randint(-9, 9, (8, 300), generator=generator).float()
    logits = torch.cat([random, integers])
    # In float64, whose sums hardly depend on their order.
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(min(top_k, 300))(None, scores)
    if top_p < 1:
        # It leaves to the sort which of equal tokens go; those with the lower ids, if it is stable.
        monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
        scores = TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(support(logits, temperature, top_k, top_p), scores > -INF)


# In standard deviations of a normal distribution: with other seeds, one of the 36 values would
# exceed it in one of 1,100 runs.
QUANTILE = 4.06


@pytest.mark.parametrize("first", [0, -(2**63), 2**40])
@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 12, 0.9)],
)
def test_tokens_are_drawn_as_often_as_softmax_says(temperature, top_k, top_p, first):
    draws = 20_000
    logits = torch.linspace(-2.0, 2.0, 24)[torch.randperm(24)][None]
    stay = support(logits, temperature, top_k, top_p)
    masked = torch.where(stay, logits.double() / temperature, -INF)
    expected = torch.softmax(masked, -1)[0] * draws
    counters = torch.arange(first, first + draws)
    for seed, position in ((counters, 7), (7, counters)):
        tokens = draw(logits.expand(draws, -1), temperature, top_k, top_p, seed, position)
        counts = torch.bincount(tokens.flatten(), minlength=24)
        assert counts[~stay[0]].sum() == 0
        chi2 = ((counts - expected)[stay[0]] ** 2 / expected[stay[0]]).sum().item()
        degrees = int(stay.sum()) - 1
        # Wilson and Hilferty (1931): the cube root is nearly normal.
        spread = 2 / (9 * degrees)
        assert ((chi2 / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5 < QUANTILE


@pytest.mark.parametrize("size", [1, 3, 64, 1001])
def test_temperature_0_is_greedy_whatever_the_rest_says(size):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(-3, 3, (9, size), generator=generator).float()
    logits[3] = NAN
    logits[4, size // 2 :] = INF
    logits[5, 0] = NAN
    logits[6] = -INF
    for top_k, top_p, seed in ((0, 1.0, 0), (2, 0.3, -5)):
        assert torch.equal(draw(logits, 0.0, top_k, top_p, seed, 3), greedy(logits))


@given(st.data())
@settings(derandomize=True, deadline=None)
def test_every_temperature_but_0_up_to_the_least_is_one(data):
    size = data.draw(st.sampled_from([1, 5, 64]))
    logits, _, *rest = extremes.arguments([data.draw(extremes.rows_of(size))], size)
    least = sample(logits, torch.full((1,), LEAST_TEMPERATURE), *rest)
    for temperature in (extremes.SMALLEST, 1e-39, 2.0**-126, LEAST_TEMPERATURE * (1 - 2**-24)):
        assert torch.equal(sample(logits, torch.full((1,), temperature), *rest), least)


def test_next_to_no_temperature_draws_of_the_largest_alone_all_equally_likely():
    logits = torch.tensor([[0.75, 1.0, NAN, 1 - 2**-24, -INF, 1.0, -3.4e38]]).expand(4000, -1)
    for temperature in (extremes.SMALLEST, LEAST_TEMPERATURE, 1e-10):
        tokens = draw(logits, temperature, seed=torch.arange(4000)).flatten().bincount(minlength=7)
        assert tokens[1] + tokens[5] == 4000
        assert abs(tokens[1] - 2000) < 150


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
def test_a_row_of_a_batch_gives_what_it_gives_alone_in_any_order(rows, one_thread):
    generator = torch.Generator().manual_seed(rows)
    size = 1003
    logits = torch.randn(rows, size, generator=generator) * 3
    logits[::3] = logits[::3].round()
    logits[rows // 2, :5] = NAN
    arguments = [
        logits,
        torch.tensor([0.0, 0.3, 1.0, 1.7]).repeat(8)[:rows],
        torch.tensor([0, 40, 2000, 0, 1]).repeat(7)[:rows],
        torch.tensor([1.0, 0.9, 0.5]).repeat(11)[:rows],
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(0, 2**40, (rows,), generator=generator),
    ]
    together = sample(*arguments)
    alone = torch.cat([sample(*(x[i : i + 1] for x in arguments)) for i in range(rows)])
    assert torch.equal(together, alone)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(sample(*(x[order] for x in arguments)), together[order])


def test_other_seeds_and_positions_give_other_tokens_over_all_of_int64():
    ends = [-(2**63), -(2**63) + 1, -(2**32), -1, 0, 1, 2**31, 2**32, 2**62, 2**63 - 1]
    logits = torch.zeros(len(ends), 100_000)
    for tokens in (
        draw(logits, seed=torch.tensor(ends)),
        draw(logits, position=torch.tensor(ends)),
    ):
        assert len(set(tokens.flatten().tolist())) == len(ends)


def test_weights_are_exponentials_to_two_units_in_the_last_place_and_never_rise_as_logits_fall():
    scaled = -torch.cat([torch.linspace(0, 40, 300_001), torch.tensor([1e9, 3.4e38, INF])])
    exact = torch.exp(scaled.double()) * 2**38
    assert weights(scaled)[0] == 2**38
    assert ((exp2_38(scaled) - exact).abs()[exact >= 1] <= exact[exact >= 1] * 2.0**-22).all()
    assert (weights(scaled)[exact < 0.9] == 0).all()
    assert (weights(scaled).diff() <= 0).all()
