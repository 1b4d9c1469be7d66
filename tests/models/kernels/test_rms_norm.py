"""The Triton kernel of RMSNorm gives what its reference gives."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, EPS, ON_GPU, assert_close
from tokenloop.models.kernels.linear import operator as linear
from tokenloop.models.kernels.rms_norm import operator, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_post, with_scalar", [(False, False), (True, False), (True, True)])
def test_norms_are_the_reference_s(
    normal, semaphores, monkeypatch, dtype, offset, with_post, with_scalar
):
    size = 5376 if ON_GPU else 40
    x, branch = normal(3, size, dtype=dtype), normal(3, size, dtype=dtype)
    post = normal(size, dtype=dtype) if with_post else None
    scalar = normal(1, dtype=dtype) if with_scalar else None
    weight = normal(size, dtype=dtype)
    options = {"eps": EPS, "offset": offset}
    expected = reference.add_norm(x, branch, post, scalar, weight, **options)
    for got, right in zip(operator.add_norm(x, branch, post, scalar, weight, **options), expected):
        assert_close(got, right, dtype)
    # Without a branch it is a launch before a linear layer, here of the identity.
    monkeypatch.setattr(linear, "SHARED_NORM", 0)
    identity = torch.eye(size, dtype=dtype, device=DEVICE)
    got = linear.norm_linear(x, weight, identity, None, None, semaphores, **options)
    assert_close(got, reference.rms_norm(x, weight, EPS, offset).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [None, 3])
def test_rows_beyond_the_count_change_no_others(normal, dtype, count):
    x, branch, weight = normal(5, 40, dtype=dtype), normal(5, 40, dtype=dtype), normal(40)
    weight = weight.to(dtype)
    options, size = {"eps": EPS, "offset": 1.0}, None
    whole = operator.add_norm(x, branch, None, None, weight, **options)
    h = operator.norm(x, weight, **options)
    assert_close(h, reference.norm(x, weight, **options), dtype)
    if count is not None:
        x[count:] = branch[count:] = float("nan")
        size = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    for got, right in zip(operator.add_norm(x, branch, None, None, weight, size, **options), whole):
        assert torch.equal(got[:count], right[:count])
    assert torch.equal(operator.norm(x, weight, size, **options)[:count], h[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_post, with_scalar", [(False, False), (True, False), (True, True)])
def test_wide_rows_have_the_same_bits_in_parts(normal, monkeypatch, dtype, with_post, with_scalar):
    size, rows, count = (5376, 500, 470) if ON_GPU else (40, 5, 3)
    x, branch = normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype)
    weight = normal(size, dtype=dtype)
    post = normal(size, dtype=dtype) if with_post else None
    scalar = normal(1, dtype=dtype) if with_scalar else None
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    options = {"eps": EPS, "offset": 1.0}
    arguments = x, branch, post, scalar, weight
    whole = *operator.add_norm(*arguments, **options), operator.norm(x, weight, **options)
    x[count:] = branch[count:] = float("nan")
    monkeypatch.setattr(operator, "WHOLE", 16)
    # Also where parts end with the row.
    for part in (1024, 256) if ON_GPU else (16, 8):
        monkeypatch.setattr(operator, "PART", part)
        got = operator.add_norm(*arguments, number, **options)
        got = *got, operator.norm(x, weight, number, **options)
        for ours, right in zip(got, whole):
            assert torch.equal(ours[:count], right[:count])
