"""Embeddings and last rows of a packed chunk are the reference's."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES
from tokenloop.models.kernels.embedding import operator, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_embeddings_are_the_reference_s(normal, dtype, scale):
    table = normal(50, 1100, dtype=dtype)
    tokens = torch.arange(20, device=DEVICE) * 7 % 50
    # Tokens beyond the count are no place in the table.
    tokens[13:] = -(2**40)
    count = torch.tensor([13], dtype=torch.int32, device=DEVICE)
    got = operator.embed_chunk(tokens, table, count, scale=scale)
    expected = reference.embed_chunk(tokens, table, count, scale=scale)
    assert torch.equal(got[:13], expected[:13])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_tokens_are_the_reference_s(normal, dtype):
    x = normal(20, 1100, dtype=dtype)
    starts = torch.tensor([0, 0, 5, 6, 20, 20], dtype=torch.int32, device=DEVICE)
    got = operator.last_tokens(x, starts)
    assert torch.equal(got, reference.last_tokens(x, starts))
