"""Rounds of drafts: what is tried, what holds, and what of it is stored."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES
from tokenloop.models.kernels.drafts import operator, reference

BOTH = pytest.mark.parametrize("operators", [reference, operator], ids=["torch", "triton"])


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def drafted(operators, ids: list[int], rows: int) -> list[int]:
    """A round's tokens after `ids`, and whatever the history holds behind them."""
    history, position = integers(*ids, *[9] * 5), integers(len(ids) - 1)
    tokens, positions = integers(*[-1] * rows), integers(*[-1] * rows)
    operators.next_drafts(history, position, tokens, positions)
    assert positions.tolist() == [len(ids) - 1 + i for i in range(rows)]
    return tokens.tolist()


@BOTH
@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        # The longest of what is the same, and of equal ones the latest.
        ([1, 2, 3, 50, 9, 2, 3, 60, 7, 3, 70, 1, 2, 3], [3, 50, 9, 2]),
        ([7, 3, 50, 8, 3, 60, 9, 3], [3, 60, 9, 3]),
        # No more than three count.
        ([0, 1, 2, 3, 50, 5, 1, 2, 3, 60, 0, 1, 2, 3], [3, 60, 0, 1]),
        # What repeats itself goes on beyond the end.
        ([4, 5, 6, 5, 6], [6, 5, 6, 5]),
        ([4, 4], [4, 4, 4, 4]),
        # Nothing is the same, and there is nothing before.
        ([1, 2, 3], [3, 3, 3, 3]),
        # The first place of all.
        ([5, 1, 2, 5], [5, 1, 2, 5]),
    ],
)
def test_drafts_follow_what_the_newest_tokens_followed(operators, ids, tokens):
    assert drafted(operators, ids, 4) == tokens
    assert drafted(operators, ids, 1) == tokens[:1]


def test_the_kernel_s_drafts_are_the_reference_s(monkeypatch):
    # Histories of several blocks.
    monkeypatch.setattr(operator, "BLOCK_M", 16)
    generator = torch.Generator().manual_seed(0)
    for length in range(2, 70, 3):
        ids = torch.randint(4, (length,), generator=generator).tolist()
        assert drafted(operator, ids, 6) == drafted(reference, ids, 6), ids


@BOTH
@pytest.mark.parametrize("drafts", [[7], [7, 0, 3, 3], [1, 2, 3, 4, 5, 6, 7]], ids=str)
def test_drafts_that_are_given_stand_behind_the_newest_token(operators, drafts):
    rows = 1 + len(drafts)
    # One more place, which is nobody's.
    tokens, positions = integers(*[-1] * (rows + 1)), integers(*[-1] * (rows + 1))
    given = integers(5, 6, 8, 9), integers(2), integers(*drafts)
    operators.take_drafts(*given, tokens[:rows], positions[:rows])
    assert tokens.tolist() == [8, *drafts, -1]
    assert positions.tolist() == [*range(2, 2 + rows), -1]


@BOTH
@pytest.mark.parametrize(
    ("tokens", "chosen", "count"),
    [
        ([1, 2, 3, 4], [2, 3, 4, 5], 4),
        ([1, 2, 3, 4], [2, 3, 9, 5], 3),
        # One that holds behind one that does not is no token of the sequence's.
        ([1, 2, 3, 4], [2, 9, 4, 5], 2),
        ([1, 2, 3, 4], [9, 3, 4, 5], 1),
        ([1], [7], 1),
    ],
)
def test_what_holds_goes_on(operators, tokens, chosen, count):
    history, position = torch.full((10,), -1, device=DEVICE), integers(3)
    accepted = torch.full((1 + len(tokens),), -1, device=DEVICE)
    operators.accept(integers(*tokens), integers(*chosen), history, position, accepted)
    assert accepted.tolist() == [count, *chosen]
    assert position.item() == 3 + count
    assert history.tolist() == [-1] * 4 + chosen[:count] + [-1] * (6 - count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_what_is_accepted_is_stored_around_the_ring_s_end(normal, dtype, count):
    drafts = [normal(4, 1, 2, 6, dtype=dtype) for _ in range(2)]
    caches = [normal(1, 5, 2, 6, dtype=dtype) for _ in range(2)]
    mine, theirs = [[x.clone() for x in caches] for _ in range(2)]
    given = integers(13, 14, 15, 16), integers(count, 7, 7, 7, 7)
    operator.store_drafts(*drafts, *given, *mine)
    reference.store_drafts(*drafts, *given, *theirs)
    for x, y, cache, draft in zip(mine, theirs, caches, drafts):
        assert torch.equal(x, y)
        for i, slot in enumerate((3, 4, 0, 1)):
            assert torch.equal(x[0, slot], draft[i, 0] if i < count else cache[0, slot])
        assert torch.equal(x[0, 2], cache[0, 2])
