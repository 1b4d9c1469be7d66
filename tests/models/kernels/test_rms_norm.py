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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_post, with_scalar", [(False, False), (True, False), (True, True)])
def test_a_residual_alone_has_the_bits_that_it_has_beside_its_norm(
    normal, monkeypatch, dtype, with_post, with_scalar
):
    size, count = 40, 3
    x, branch = normal(5, size, dtype=dtype), normal(5, size, dtype=dtype)
    post = normal(size, dtype=dtype) if with_post else None
    scalar = normal(1, dtype=dtype) if with_scalar else None
    residual, options = (x, branch, post, scalar), {"eps": EPS, "offset": 1.0}
    total, _ = operator.add_norm(*residual, normal(size, dtype=dtype), **options)
    assert torch.equal(operator.add_branch(*residual, **options), total)
    assert_close(total, reference.add_branch(*residual, **options), dtype)
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    for whole in (size, 16):
        monkeypatch.setattr(operator, "WHOLE", whole)
        got = operator.add_branch(*residual, number, **options)
        assert torch.equal(got[:count], total[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("queries, keys", [(24, 12), (24, 0), (0, 12)])
def test_queries_and_keys_are_normed_all_heads_at_once(normal, dtype, offset, queries, keys):
    rows, values, count = 5, 12, 3
    # Rows that lie further apart than they are wide.
    x = normal(rows, queries + keys + values + 7, dtype=dtype)[:, : queries + keys + values]
    weights = [normal(size, dtype=dtype) if size else None for size in (queries, keys)]
    options = {"eps": EPS, "offset": offset}
    got = operator.norm_heads(x, *weights, **options)
    assert_close(got, reference.norm_heads(x, *weights, **options), dtype)
    assert torch.equal(got[:, queries + keys :], x[:, queries + keys :])
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    x[count:] = float("nan")
    assert torch.equal(operator.norm_heads(x, *weights, number, **options)[:count], got[:count])


def test_norms_of_more_than_a_row_has_are_refused(normal):
    with pytest.raises(ValueError, match=r"norms of 24 and 12: contiguous rows as long as both"):
        operator.norm_heads(normal(2, 30), normal(24), normal(12), eps=EPS)
