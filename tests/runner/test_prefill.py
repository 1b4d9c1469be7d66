"""Prompts that come together are packed into chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloop.runner.prefill import LAYOUT, Part, layout, packed
from tokenloop.runner.transfers import Copies, Transfers

prompts = st.lists(st.integers(1, 900), min_size=1, max_size=9).map(
    lambda sizes: [(7 - row, list(range(row, row + size))) for row, size in enumerate(sizes)]
)


@given(prompts, st.sampled_from([64, 128, 200, 512, 1024]), st.integers(1, 5))
def test_every_prompt_is_in_chunks_whole_and_in_order(prompts, capacity, parts):
    chunks = list(packed(prompts, capacity, parts, 64))
    assert all(0 < sum(len(part.ids) for part in chunk) <= capacity for chunk in chunks)
    assert all(0 < len(chunk) <= parts for chunk in chunks)
    pieces = [part for chunk in chunks for part in chunk]
    assert all(part.first % 64 == 0 for part in pieces)
    assert all(part.ends or len(part.ids) % 64 == 0 for part in pieces)
    for row, ids in prompts:
        mine = [part for part in pieces if part.row == row]
        assert [part.ends for part in mine] == [False] * (len(mine) - 1) + [True]
        assert sum((part.ids for part in mine), []) == ids
        sizes = [len(part.ids) for part in mine]
        assert [part.first for part in mine] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert list(dict.fromkeys(part.row for part in pieces)) == [row for row, _ in prompts]


@given(prompts)
def test_prompts_that_fit_share_one_chunk(prompts):
    (chunk,) = packed(prompts, sum(len(ids) for _, ids in prompts), len(prompts), 64)
    assert [part.row for part in chunk] == [row for row, _ in prompts]


def test_the_layout_of_a_chunk_names_rows_positions_and_last_tokens():
    chunk = [Part(2, 128, [5, 6, 7], True), Part(0, 0, [8] * 64, False)]
    # Of what was there before nothing is left.
    found = {name: np.full(5 if "starts" in name else 4, 99, np.int32) for name in LAYOUT}
    layout(chunk, found)
    assert {name: values.tolist() for name, values in found.items()} == {
        "starts": [0, 3, 67, 67, 67],
        "rows": [2, 0, -1, -1],
        "first": [128, 0, 0, 0],
        "last_starts": [0, 1, 2, 2, 2],
        "last_first": [130, 63, 0, 0],
    }


@given(st.lists(st.lists(st.integers(1, 2**40), min_size=1, max_size=8), max_size=7))
def test_numbers_go_up_from_two_buffers_that_take_turns(given):
    torch = pytest.importorskip("torch")
    from tokenloop.runner.engines.staging import Staging

    destination = torch.full((8,), -1)
    staging, transfers = Staging(destination, None), Transfers()
    expected, taken = destination.tolist(), []
    for numbers in given:
        taken.append(staging.take())
        staging.arrays[taken[-1]][: len(numbers)] = numbers
        transfers.send(staging, len(numbers))
        expected[: len(numbers)] = numbers
        assert destination.tolist() == expected
    assert all(a != b for a, b in zip(taken, taken[1:]))
    assert transfers.host_to_device == Copies(len(given), 8 * sum(map(len, given)))
