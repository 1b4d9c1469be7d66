"""Routed experts for many tokens give what the reference gives, and each token the same bits
whatever the others are."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, ON_GPU, TOLERANCE
from tests.models.kernels.test_experts import GROUPED, float8, grouped, made, options_of
from tokenloop.models.kernels.experts import operator, packing, reference
from tokenloop.models.kernels.experts.chunk_tiles import (
    DENSE_PAIRS,
    ChunkTiles,
    Tiles,
    chunk_tiles,
)

EXPERTS, CHOICES, SIZE, INNER = (128, 8, 2048, 768) if ON_GPU else (5, 3, 19, 13)
TOKENS = 333 if ON_GPU else 13
# NumPy's, of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter, tiles that the small shapes do not fit into."""
    if not ON_GPU:
        tiles = ChunkTiles(4, Tiles(8, 8, 2, 4), Tiles(8, 8, 2, 4))
        monkeypatch.setattr(operator, "chunk_tiles", lambda *shape: tiles)
        monkeypatch.setattr(operator, "COUNTED", 16)
        monkeypatch.setattr(operator, "PLACED", 8)


def weights_of(dtype, size: int = SIZE, inner: int = INNER):
    """gate_up and down, so scaled that results are near 1."""
    gate_up = made(EXPERTS, 2 * inner, size, dtype=dtype, seed=1) / size**0.5
    return gate_up, made(EXPERTS, size, inner, dtype=dtype, seed=2) / inner**0.5


def counted(tokens: int) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int32, device=DEVICE)


def routed_of(tokens: int, dtype, count: torch.Tensor | None = None):
    scores = made(tokens, EXPERTS + 1, dtype=dtype, seed=3)
    return scores, operator.route(scores, EXPERTS, CHOICES, True, count)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("sizes", [(SIZE, INNER), (8 * (SIZE // 8), INNER - 5)], ids=str)
def test_they_give_what_the_reference_gives(sizes, tokens, dtype):
    x, (_, routed) = made(tokens, sizes[0], dtype=dtype), routed_of(tokens, dtype)
    arguments = x, *routed, *weights_of(dtype, *sizes), counted(tokens)
    assert_near(operator.experts_chunk(*arguments), reference.experts_chunk(*arguments))


@pytest.mark.parametrize("activation", ["gelu_tanh", "clamped_swiglu"])
def test_other_activations_and_biases_are_the_reference_s(activation):
    x, (_, routed) = made(TOKENS, SIZE), routed_of(TOKENS, torch.float32)
    given, options = (x, *routed, *weights_of(torch.float32)), options_of(activation, torch.float32)
    actual = operator.experts_chunk(*given, counted(TOKENS), **options)
    assert_near(actual, reference.experts_chunk(*given, counted(TOKENS), **options))
    assert_near(actual, reference.experts(*given, **options))


def test_experts_in_float8_are_the_reference_s_and_a_token_does_not_know_the_others():
    tables, scales = float8(weights_of(torch.bfloat16))
    x, (_, routed) = made(TOKENS, SIZE, dtype=torch.bfloat16), routed_of(TOKENS, torch.bfloat16)
    given = x, *routed, *tables
    actual = operator.experts_chunk(*given, counted(TOKENS), **scales)
    assert_near(actual, reference.experts_chunk(*given, counted(TOKENS), **scales))
    part = [tensor[3:9].contiguous() for tensor in (x, *routed)]
    some = operator.experts_chunk(*part, *tables, counted(6), **scales)
    if ON_GPU:
        assert torch.equal(some, actual[3:9])
    assert_near(some, actual[3:9])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_of_many_is_that_of_few(dtype):
    x, (scores, routed) = made(7, SIZE, dtype=dtype), routed_of(7, dtype)
    arguments, shared = (x, *routed, *weights_of(dtype)), (x.flip(0), scores)
    many = reference.experts_chunk(*arguments, counted(7), *shared)
    assert_near(many, reference.experts(*arguments, *shared))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_all_tokens_have_is_added_with_a_weight_of_its_own(dtype):
    x, shared = (made(TOKENS, SIZE, dtype=dtype, seed=seed) for seed in (0, 5))
    scores, routed = routed_of(TOKENS, dtype)
    arguments = x, *routed, *weights_of(dtype), counted(TOKENS)
    actual = operator.experts_chunk(*arguments, shared, scores)
    assert_near(actual, reference.experts_chunk(*arguments, shared, scores))
    assert not torch.allclose(actual, operator.experts_chunk(*arguments), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("few", [CHOICES, CHOICES + 1])
def test_some_experts_may_have_all_tokens_and_the_others_are_not_read(few, dtype):
    x, (gate_up, down) = made(TOKENS, SIZE, dtype=dtype), weights_of(dtype)
    scores = made(TOKENS, EXPERTS, dtype=dtype, seed=3)
    scores[:, : EXPERTS - few] -= 90.0
    arguments = *operator.route(scores, EXPERTS, CHOICES, True), gate_up, down, counted(TOKENS)
    expected = reference.experts_chunk(x, *arguments)
    gate_up[: EXPERTS - few], down[: EXPERTS - few] = torch.nan, torch.nan
    assert_near(operator.experts_chunk(x, *arguments), expected)


def test_all_choices_may_be_of_one_expert():
    x, weights = made(TOKENS, SIZE), made(TOKENS, CHOICES, seed=4)
    chosen = torch.full((TOKENS, CHOICES), EXPERTS - 1, device=DEVICE)
    arguments = x, chosen, weights, *weights_of(torch.float32), counted(TOKENS)
    assert_near(operator.experts_chunk(*arguments), reference.experts_chunk(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, TOKENS // 2, TOKENS - 1])
def test_tokens_that_do_not_exist_are_not_read(count, dtype):
    x, shared = (made(TOKENS, SIZE, dtype=dtype, seed=seed) for seed in (0, 5))
    scores, (chosen, weights) = routed_of(TOKENS, dtype)
    tables, count_ = weights_of(dtype), counted(count)
    expected = operator.experts_chunk(
        x[:count], chosen[:count], weights[:count], *tables, count_, shared[:count], scores[:count]
    ) if count else x[:0]  # fmt: skip
    for tensor in (x, shared, scores, weights):
        tensor[count:] = torch.nan
    chosen[count:] = 2**40
    again = operator.route(scores, EXPERTS, CHOICES, True, count_)
    for got, given in zip(again, (chosen, weights)):
        assert torch.equal(got[:count], given[:count])
    actual = operator.experts_chunk(x, chosen, weights, *tables, count_, shared, scores)
    assert torch.equal(actual[:count], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_gives_the_same_bits_wherever_it_is_and_whatever_the_others_are(dtype):
    x, (_, (chosen, weights)) = made(TOKENS, SIZE, dtype=dtype), routed_of(TOKENS, dtype)
    tables = weights_of(dtype)
    together = operator.experts_chunk(x, chosen, weights, *tables, counted(TOKENS))
    order = torch.arange(TOKENS - 1, -1, -1, device=DEVICE)
    for index in (order, order[: TOKENS // 2], order[3:4], order[::3]):
        part = x[index], chosen[index], weights[index], *tables, counted(len(index))
        assert torch.equal(operator.experts_chunk(*part), together[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_change_no_bit(dtype):
    x, (_, routed) = made(TOKENS, SIZE, dtype=dtype), routed_of(TOKENS, dtype)
    arguments = x, *routed, *weights_of(dtype), counted(TOKENS)
    expected = operator.experts_chunk(*arguments)
    step = 64 if ON_GPU else 8
    few, large = Tiles(64, step, 3, 4), Tiles(128, step, 2, 8)
    sizes = (16, 64, 128) if dtype == torch.bfloat16 else (16, 32)
    for block_m in sizes:
        cuts = (few, large) if dtype == torch.bfloat16 else (Tiles(32, 32, 2, 4),)
        for cut in cuts:
            tiles = ChunkTiles(block_m, cut, cut)
            actual = operator.launch_experts_chunk(*arguments, tiles=tiles)
            if ON_GPU:
                assert torch.equal(actual, expected)
            else:
                # NumPy adds up in an order that depends on the sizes.
                assert_near(actual, expected)


def test_what_is_not_contiguous_is_refused():
    _, routed = routed_of(2, torch.float32)
    with pytest.raises(ValueError, match=r"^x of strides \(1, 2\) is not contiguous"):
        operator.experts_chunk(made(SIZE, 2).T, *routed, *weights_of(torch.float32), counted(2))


@pytest.mark.parametrize("kind", GROUPED)
def test_experts_in_groups_are_those_of_their_floats(kind):
    size, (tables, scales), floats = grouped(kind)
    x, (_, routed) = made(TOKENS, size, dtype=torch.bfloat16), routed_of(TOKENS, torch.bfloat16)
    biases = [made(*table.shape[:2], dtype=torch.bfloat16, seed=6) for table in floats]
    options = {"gate_up_bias": biases[0], "down_bias": biases[1], "activation": "clamped_swiglu"}
    expected = reference.experts_chunk(x, *routed, *floats, counted(TOKENS), **options)
    cut = Tiles(64, 64, 2, 4)
    options |= scales | ({} if ON_GPU else {"tiles": ChunkTiles(16, cut, cut)})
    actual = operator.launch_experts_chunk(x, *routed, *tables, counted(TOKENS), **options)
    tolerance = TOLERANCE[torch.bfloat16] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[torch.bfloat16], atol=tolerance)
    some = slice(2, 5)
    one = (part[some].contiguous() for part in (x, *routed))
    few = operator.launch_experts_chunk(*one, *tables, counted(3), **options)
    assert torch.equal(few, actual[some])


def test_float4_that_becomes_bfloat16_in_memory_gives_the_same_bits():
    size, (tables, scales), floats = grouped("float4")
    x, (_, routed) = made(TOKENS, size, dtype=torch.bfloat16), routed_of(TOKENS, torch.bfloat16)
    cut = Tiles(64, 64, 2, 4)
    given = x, *routed, *tables, counted(TOKENS)
    within, dense = (
        operator.launch_experts_chunk(*given, **scales, tiles=ChunkTiles(16, cut, cut, is_dense))
        for is_dense in (False, True)
    )
    plain = [table.bfloat16() for table in floats]
    tiles = ChunkTiles(16, cut, cut)
    expected = operator.launch_experts_chunk(x, *routed, *plain, counted(TOKENS), tiles=tiles)
    assert torch.equal(within, expected) and torch.equal(dense, expected)
    pairs = DENSE_PAIRS * EXPERTS
    assert chunk_tiles(pairs, EXPERTS, size, size, torch.bfloat16, packing.GROUP).dense
    assert not chunk_tiles(pairs - 1, EXPERTS, size, size, torch.bfloat16, packing.GROUP).dense
