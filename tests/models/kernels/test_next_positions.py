"""The positions of a step come line by line, and the last line again in a step too many."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE
from tokenloop.models.kernels.next_positions import operator, reference


@pytest.mark.parametrize("operators", [reference, operator], ids=["torch", "triton"])
@pytest.mark.parametrize("rows", [1, 3])
def test_each_step_takes_the_next_line_and_stays_at_the_last(operators, rows):
    lines = torch.arange(4 * rows, device=DEVICE).view(4, rows) + 2**40
    line, position = torch.tensor([1], device=DEVICE), torch.zeros(rows, dtype=int, device=DEVICE)
    for expected, following in ((1, 2), (2, 3), (3, 3), (3, 3)):
        operators.next_positions(lines, line, position)
        assert torch.equal(position, lines[expected]) and line.item() == following
