"""Greedy selection: which id wins, in every row and whatever else is in it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloop.sampler.greedy import greedy

NAN, INF = math.nan, math.inf
# Few values, so that ties are common.
LOGITS = st.sampled_from([NAN, -INF, INF, -1.5, -0.0, 0.0, 2.0, 3.4e38, -3.4e38, 1e-45])


def first_of_the_largest(row: list[float]) -> int:
    """The definition, in plain Python: no comparison with NaN is ever true."""
    best, largest = 0, -INF
    for i, value in enumerate(row):
        if value > largest:
            best, largest = i, value
    return best


@st.composite
def batches(draw) -> list[list[float]]:
    rows, size = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 7, 17, 31, 33, 129]))
    return draw(
        st.lists(st.lists(LOGITS, min_size=size, max_size=size), min_size=rows, max_size=rows)
    )


@settings(deadline=None)
@given(batches(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_each_row_gives_the_lowest_id_of_its_largest_number(rows, dtype):
    logits = torch.tensor(rows).to(dtype)
    expected = [[first_of_the_largest(row)] for row in logits.tolist()]
    assert greedy(logits).tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 70))
def test_the_token_is_an_int64_column(rows, size):
    token = greedy(torch.randn(rows, size))
    assert token.shape == (rows, 1)
    assert token.dtype == torch.int64


@pytest.mark.parametrize(
    ("row", "token"),
    [
        ([1.0, 5.0, 5.0, 5.0], 1),
        ([-0.0, 0.0], 0),
        ([NAN, -7.0, NAN], 1),
        ([NAN, -3.4e38, NAN, INF], 3),
        ([-INF, NAN, 1e-45], 2),
        ([1.0, INF, NAN, INF], 1),
        ([-INF, -INF, -INF], 0),
        ([NAN, NAN, NAN], 0),
        ([NAN, -INF], 0),
        ([-INF, NAN], 0),
    ],
)
def test_ties_nan_and_infinities_are_decided_as_documented(row, token):
    assert greedy(torch.tensor([row])).tolist() == [[token]]


@pytest.mark.parametrize("size", [262_144, 262_145, 151_669, 65_537])
def test_ties_of_a_whole_vocabulary_go_to_the_lowest_id(size):
    logits = torch.zeros(3, size)
    logits[1, [size // 3, size // 2, size - 1]] = 1.0
    logits[2, [size - 2, size - 1]] = 1.0
    assert greedy(logits).flatten().tolist() == [0, size // 3, size - 2]


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 5, 63, 1001]), st.integers(0, 2**31))
def test_a_row_of_a_batch_gives_what_it_gives_alone(rows, size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 3, (rows, size), generator=generator).float()
    alone = torch.cat([greedy(row[None]) for row in logits])
    assert torch.equal(greedy(logits), alone)


def test_logits_need_not_be_contiguous_and_are_left_as_they_were():
    wide = torch.tensor([[1.0, 9.0], [NAN, 9.0], [3.0, 9.0], [3.0, 9.0]])
    before = wide.clone()
    assert greedy(wide.T[:1]).tolist() == [[2]]
    assert torch.equal(wide.nan_to_num(), before.nan_to_num())
    assert wide[1, 0].isnan()
