"""The layers' inputs of per-layer embeddings, and what a gate lets in of them, are the
reference's; and so are the rows of two tables, and what rings have filled."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, EPS, assert_close
from tokenloop.models.kernels import cuda
from tokenloop.models.kernels.attention_chunk import reference as attention
from tokenloop.models.kernels.embedding import reference as embedding
from tokenloop.models.kernels.per_layer import reference

LAYERS, SIZE = 5, 37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_the_reference_s_and_rows_are_those_alone(normal, dtype):
    projected, own = (normal(6, LAYERS * SIZE, dtype=dtype) for _ in range(2))
    norm, options = normal(SIZE, dtype=dtype), {"eps": 0.1, "offset": 1.0}
    got = cuda.layer_inputs(projected, own, norm, **options)
    assert_close(got, reference.layer_inputs(projected, own, norm, **options), dtype)
    count = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    assert torch.equal(cuda.layer_inputs(projected, own, norm, count, **options)[:4], got[:4])
    alone = cuda.layer_inputs(projected[3:4], own[3:4], norm, **options)
    assert torch.equal(alone[0], got[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("size", [SIZE, 1300])
def test_what_a_gate_lets_in_is_the_reference_s(normal, dtype, activation, size):
    gate, given = normal(6, size, dtype=dtype), normal(6, 3 * size, dtype=dtype)[:, size : 2 * size]
    got = cuda.gate_input(gate, given, activation=activation)
    assert_close(got, reference.gate_input(gate, given, activation=activation), dtype)
    count = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    assert torch.equal(cuda.gate_input(gate, given, count, activation=activation)[:4], got[:4])


def test_inputs_that_do_not_fit_are_refused(normal):
    gate, rows = normal(4, 6), normal(4, 12)
    for given in (normal(6, 4).T, normal(4, 5), gate.bfloat16()):
        with pytest.raises(ValueError, match="for a gate"):
            cuda.gate_input(gate, given, activation="silu")
    for own, norm in ((gate, normal(6)), (rows.bfloat16(), normal(6)), (rows, normal(5))):
        with pytest.raises(ValueError, match="for layers of"):
            cuda.layer_inputs(rows, own, norm, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_two_tables_are_the_reference_s(normal, dtype):
    table, other = normal(50, 24, dtype=dtype), normal(50, 1100, dtype=dtype)
    tokens, scales = torch.tensor([7, 0, 49], device=DEVICE), {"scale": 4.0, "other_scale": 0.5}
    both = cuda.embed_both(tokens, table, other, **scales)
    assert torch.equal(both, embedding.embed_both(tokens, table, other, **scales))
    own = both[3 * 24 :].view(3, 1100)
    before = both.clone()
    cuda.embed_into(tokens + 0, other, own.zero_(), scale=0.5)
    assert torch.equal(both, before)


def test_a_ring_is_filled_up_to_a_position_or_whole():
    first = torch.tensor([0, 6, 7, 500, 0], dtype=torch.int32, device=DEVICE)
    filled = cuda.filled_slots(first, 7)
    assert torch.equal(filled, attention.filled_slots(first, 7))
    assert filled.tolist() == [0, 6, 6, 6, 0]
