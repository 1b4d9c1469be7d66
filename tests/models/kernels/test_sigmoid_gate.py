"""A product with the sigmoid of gates is the reference's."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, assert_close
from tokenloop.models.kernels.sigmoid_gate import operator, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [37, 2100])
def test_products_are_the_reference_s(normal, dtype, size):
    x, gate = normal(9, size, dtype=dtype), normal(9, 2 * size, dtype=dtype)[:, size:]
    expected = reference.sigmoid_gate(x, gate)
    assert_close(operator.sigmoid_gate(x, gate), expected, dtype)
    count = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    assert_close(operator.sigmoid_gate(x, gate, count)[:5], expected[:5], dtype)


def test_gates_that_do_not_fit_are_refused(normal):
    x = normal(4, 6)
    for gate in (normal(6, 4).T, normal(4, 5), normal(4, 6).bfloat16()):
        with pytest.raises(ValueError):
            operator.sigmoid_gate(x, gate)
