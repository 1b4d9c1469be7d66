"""Quantized weights: how far they may be from the weights, and what is computed with them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenloop.export.pte.quantize import (
    EMBEDDING_GROUP_SIZE,
    QuantizedEmbedding,
    QuantizedLinear,
    Shortlist,
    ShortlistHead,
    dot_products,
    quantize,
    quantize_rows,
    restore,
)
from tokenloop.export.recipes import RECIPES, Recipe
from tokenloop.models.moe import MoeConfig, SparseMoe

TINY = torch.finfo(torch.float32).tiny
SMALLEST_VOCABULARY = 64 * 256  # that a shortlist fits


def linear(rows: int, columns: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, std=0.1, generator=generator)
    return layer


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes * scale in float64 [N, K], each of which float32 and int8 give exactly."""
    group_size = values.shape[1] // scales.shape[1]
    return values.double() * scales.double().repeat_interleave(group_size, 1)


def quantized_activations(x: torch.Tensor) -> torch.Tensor:
    """Per token int8 with a zero point: 256 steps between the smallest and the largest, and 0 is
    one of them."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for token, result in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        low, high = min(token.min().item(), 0.0), max(token.max().item(), 0.0)
        scale = (high - low) / 255
        zero_point = max(-128, min(127, round(-128 - low / scale)))
        codes = (token.double() / scale).round() + zero_point
        result.copy_((codes.clamp(-128, 127) - zero_point) * scale)
    return out


@st.composite
def matrices(draw) -> tuple[torch.Tensor, int]:
    """(weight [N, K], group size), with values of any size that float32 scales reach."""
    group_size = draw(st.sampled_from([1, 2, 31, 32, 100]))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, groups * group_size, generator=generator)
    return weight * 10.0 ** draw(st.integers(-44, 37)), group_size


@pytest.mark.parametrize("bits", [8, 4])
@settings(deadline=None)
@given(matrix=matrices())
def test_a_weight_is_off_by_no_more_than_half_a_step(bits, matrix):
    weight, group_size = matrix
    values, scales = quantize_rows(weight, bits, group_size)
    step = scales.double().repeat_interleave(group_size, 1)
    error = (restored(values, scales) - weight.double()).abs()
    # A few float32 roundings of codes up to 128: of the scale, of the quotient.
    assert (error <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -127, 127), (4, -8, 7)])
@settings(deadline=None)
@given(matrix=matrices())
def test_codes_are_int8_within_the_range_of_the_bits(bits, low, high, matrix):
    weight, group_size = matrix
    values, scales = quantize_rows(weight, bits, group_size)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert values.shape == weight.shape
    assert scales.shape == (weight.shape[0], weight.shape[1] // group_size)
    assert low <= values.min() <= values.max() <= high
    assert (scales >= TINY).all()


def test_the_largest_weight_of_a_group_has_the_last_code_of_8_bits():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_rows(weight, 8, 32)
    assert torch.equal(scales, weight.unflatten(1, (2, 32)).abs().amax(-1) / 127)
    assert (values.unflatten(1, (2, 32)).abs().amax(-1) == 127).all()


def test_with_4_bits_the_extremes_of_a_group_lie_at_most_half_a_step_outside():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_rows(weight, 4, 32)
    steps = weight.unflatten(1, (2, 32)) / scales[..., None]
    assert steps.amax() <= 7.5 + 1e-5 and steps.amin() >= -8.5 - 1e-5
    # The scale is the next bfloat16 up, so the extremes are that little inside.
    last = 1 - 2**-6
    at_an_end = (steps.amax(-1) > 7.5 * last) | (steps.amin(-1) < -8.5 * last)
    assert torch.equal(scales, scales.bfloat16().float())
    assert at_an_end.all() and values.min() == -8 and values.max() == 7


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_zeros_stays_zero_and_does_not_touch_its_neighbours(bits):
    weight = linear(4, 96).weight.detach().clone()
    weight[1] = 0.0
    weight[2, 32:64] = 0.0
    values, scales = quantize_rows(weight, bits, 32)
    assert not values[1].any()
    assert not values[2, 32:64].any()
    assert torch.isfinite(1.0 / scales).all()
    alone = quantize_rows(weight[2:3, 64:], bits, 32)
    assert torch.equal(values[2:3, 64:], alone[0])
    assert torch.equal(scales[2:3, 2:], alone[1])


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(-7, 2))
def test_a_q8_0_tensor_comes_through_without_any_loss(seed, exponent):
    """llama.cpp's Q8_0: d float16 times codes of which the largest is 127."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (3, 2, 32), generator=generator)
    at = torch.randint(0, 32, (3, 2, 1), generator=generator)
    sign = torch.randint(0, 2, (3, 2, 1), generator=generator) * 2 - 1
    codes.scatter_(2, at, 127 * sign)
    d = (torch.rand(3, 2, generator=generator) * 10.0**exponent).half().float()
    weight = (d[..., None] * codes).flatten(1)
    values, scales = quantize_rows(weight, 8, 32)
    assert torch.equal(restored(values, scales), weight.double())
    assert torch.equal(scales[d > 0], d[d > 0])


@pytest.mark.parametrize("rows", [16384, 16385, 2 * 16384 + 3])
def test_a_row_of_a_large_table_is_what_it_is_alone(rows):
    weight = linear(rows, 8).weight.detach()
    values, scales = quantize_rows(weight, 8, 4)
    for row in (0, 16382, 16383, 16384, 32767, 32768, rows - 1):
        if row < rows:
            alone = quantize_rows(weight[row : row + 1], 8, 4)
            assert torch.equal(values[row : row + 1], alone[0])
            assert torch.equal(scales[row : row + 1], alone[1])
    error = (restored(values, scales) - weight.double()).abs()
    assert (error <= 0.5001 * scales.double().repeat_interleave(4, 1)).all()


@pytest.mark.parametrize("shape", [(64,), (5, 64), (3, 5, 64)])
@pytest.mark.parametrize("groups", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_times_their_groups_scales_are_restored_on_the_last_axis(shape, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(*shape[:-1], groups, generator=generator).to(dtype)
    expected = codes.float() * scales.float().repeat_interleave(64 // groups, -1)
    assert torch.equal(restore(codes, scales), expected)


def test_rows_that_are_not_whole_groups_are_refused():
    with pytest.raises(ValueError, match="rows of 40 values are not whole groups of 32"):
        quantize_rows(torch.zeros(2, 40), 4, 32)


@pytest.mark.parametrize("mean", [None, torch.ones(32)])
def test_a_linear_layers_own_bias_is_added_as_it_is(mean):
    layer, biased = linear(5, 32), nn.Linear(32, 5)
    biased.weight = layer.weight
    x = random(1, 3, 32)
    without, module = (QuantizedLinear(each, 8, None, mean) for each in (layer, biased))
    torch.testing.assert_close(module(x), without(x) + biased.bias)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 64), (37, 96), (64, 320)])
@pytest.mark.parametrize("length", [1, 3])
def test_a_linear_layer_multiplies_quantized_activations_with_quantized_weights(
    bits, group_size, rows, columns, length
):
    layer = linear(rows, columns)
    module = QuantizedLinear(layer, bits, group_size)
    generator = torch.Generator().manual_seed(1)
    x = 3.0 * torch.randn(1, length, columns, generator=generator) + 1.0
    weight = restored(*quantize_rows(layer.weight, bits, group_size or columns))
    assert torch.equal(module.dequantized(), weight.float())
    expected = quantized_activations(x) @ weight.T
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    # Nearness to the float layer says that the steps above are small, not only consistent.
    exact = layer(x).double()
    assert (module(x) - exact).norm() / exact.norm() < {8: 0.02, 4: 0.15}[bits]


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_each_token_has_its_own_activation_scale(bits, group_size):
    module = QuantizedLinear(linear(8, 64), bits, group_size)
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([1e-3, 1.0, 1e3])[:, None]
    x = torch.randn(1, 3, 64, generator=generator) * sizes
    alone = torch.cat([module(x[:, i : i + 1]) for i in range(3)], 1)
    torch.testing.assert_close(module(x) / sizes, alone / sizes, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_a_token_of_zeros_gives_zeros(bits, group_size):
    module = QuantizedLinear(linear(8, 64), bits, group_size)
    assert not module(torch.zeros(1, 2, 64)).any()


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_a_bias_makes_up_for_the_weights_rounding_at_the_mean(bits, group_size):
    layer, mean = linear(37, 96), random(96) + 1.0
    module = QuantizedLinear(layer, bits, group_size, mean)
    exact = layer.weight.detach() @ mean
    rounded = module.dequantized() @ mean
    torch.testing.assert_close(rounded + module.bias, exact, rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-3


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_a_bias_is_added_to_the_product(bits, group_size):
    layer, x = linear(37, 96), random(1, 3, 96)
    with_bias = QuantizedLinear(layer, bits, group_size, random(96, seed=1))
    without = QuantizedLinear(layer, bits, group_size)
    torch.testing.assert_close(with_bias(x), without(x) + with_bias.bias)


def test_a_mean_of_zeros_needs_no_bias():
    assert not QuantizedLinear(linear(37, 96), 8, None, torch.zeros(96)).bias.any()


@pytest.mark.parametrize("size", [32, 96, 33, 20])
def test_an_embedding_gives_the_rows_of_its_table(size):
    table = nn.Embedding(11, size)
    module = QuantizedEmbedding(table)
    group_size = EMBEDDING_GROUP_SIZE if size % EMBEDDING_GROUP_SIZE == 0 else size
    expected = restored(*quantize_rows(table.weight, 8, group_size, half=True)).float()
    tokens = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(module(tokens), expected[tokens])
    assert (module(tokens) - table(tokens)).abs().max() < 0.02


def test_what_an_embedding_looks_up_is_the_tokens_codes_and_scales():
    module = QuantizedEmbedding(nn.Embedding(11, 96))
    tokens = torch.tensor([[0, 10, 3], [3, 3, 7]])
    codes, scales = module.lookup(tokens)
    assert (codes.dtype, codes.shape) == (torch.int8, (2, 3, 96))
    assert (scales.dtype, scales.shape) == (torch.float32, (2, 3, 3))
    assert torch.equal(codes, module.weight[tokens])
    assert torch.equal(scales, module.scales[tokens].float())


def test_an_embedding_in_q8_0_comes_through_without_any_loss():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-126, 127, (9, 2, 32), generator=generator)
    codes[..., 5] = 127
    d = torch.rand(9, 2, 1, generator=generator).half().float()
    table = nn.Embedding.from_pretrained((codes * d).flatten(1))
    tokens = torch.arange(9)[None]
    assert torch.equal(QuantizedEmbedding(table)(tokens), table(tokens))


# The output head


def largest_ids(logits: torch.Tensor) -> torch.Tensor:
    """Shortlist.largest of logits float32 [N, V]."""
    ids = Shortlist(QuantizedEmbedding(nn.Embedding(1, 32))).largest(logits)
    assert (ids.dtype, ids.shape) == (torch.int64, (len(logits), 256))
    return ids


def largest(logits: torch.Tensor) -> list[int]:
    """The same of logits [V], sorted."""
    return largest_ids(logits[None])[0].sort().values.tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([256, 257, 1000, 4097]))
def test_the_shortlist_has_the_largest_of_all(seed, groups):
    logits = random(64 * groups, seed=seed)
    found = largest(logits)
    # Of equal ones any.
    assert len(set(found)) == 256
    assert torch.equal(logits[found].sort(descending=True).values, torch.topk(logits, 256).values)


def test_the_shortlist_has_the_largest_though_one_group_has_most_of_them():
    logits = random(64 * 300)
    logits[64 * 17 : 64 * 18] += 100.0
    assert largest(logits) == torch.topk(logits, 256).indices.sort().values.tolist()
    assert set(range(64 * 17, 64 * 18)) <= set(largest(logits))


def test_the_shortlist_has_the_largest_though_they_fill_a_few_groups():
    logits = random(64 * 300)
    places = torch.tensor([299, 0, 150, 151])[:, None] * 64 + torch.arange(64)
    logits[places] += 100.0
    assert largest(logits) == places.flatten().sort().values.tolist()


def test_the_shortlist_has_the_largest_though_no_two_share_a_group():
    logits = random(64 * 300)
    places = torch.arange(256) * 64 + torch.arange(256) % 64
    logits[places] += 100.0
    assert largest(logits) == places.tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 40))
def test_of_equal_logits_the_shortlist_has_as_many_as_fit_and_none_twice(seed, kinds):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, kinds + 1, (64 * 260,), generator=generator).float()
    ids = largest(logits)
    assert len(set(ids)) == 256
    assert torch.equal(logits[ids].sort().values, torch.topk(logits, 256).values.sort().values)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 5), st.sampled_from([1, 1000]))
def test_each_row_has_the_shortlist_that_it_has_alone(seed, rows, kinds):
    # With few kinds of logits there are many equal ones.
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, kinds + 1, (rows, 64 * 270), generator=generator).float()
    # Of rows so different in size a mixture would show.
    logits *= torch.randint(1, 100, (rows, 1), generator=generator)
    together = largest_ids(logits)
    for row in range(rows):
        assert torch.equal(together[row : row + 1], largest_ids(logits[row : row + 1]))


@pytest.mark.parametrize("rows", [1, 3])
def test_dot_products_are_those_of_the_dequantized_rows(rows):
    values, scales = quantize_rows(random(rows * 7, 96), 8, 32)
    values, scales = values.view(rows, 7, 96), scales.view(rows, 7, 3)
    hidden = random(rows, 1, 96, seed=1)
    actual = dot_products(values, scales, hidden)
    assert actual.shape == (rows, 7)
    for row in range(rows):
        expected = restored(values[row], scales[row]) @ hidden[row, 0].double()
        torch.testing.assert_close(actual[row].double(), expected, rtol=1e-5, atol=1e-5)


def head_of(table: torch.Tensor) -> tuple[ShortlistHead, QuantizedEmbedding]:
    """The head of a vocabulary's weights float32 [V, D], and the embedding that it scores with."""
    embedding = QuantizedEmbedding(nn.Embedding.from_pretrained(table))
    layer = nn.Linear(table.shape[1], table.shape[0], bias=False)
    layer.weight = nn.Parameter(table)
    return ShortlistHead(layer, embedding), embedding


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [SMALLEST_VOCABULARY, SMALLEST_VOCABULARY + 64])
def test_shortlisted_logits_are_those_of_the_embeddings_own_rows(size, batch):
    head, embedding = head_of(0.1 * random(size, 64))
    hidden = random(batch, 1, 64, seed=1)
    logits, approximate = head(hidden), head.approximate(hidden)
    for row in range(batch):
        ids = torch.topk(approximate[row, 0], 256).indices
        expected = restored(embedding.weight, embedding.scales)[ids] @ hidden[row, 0].double()
        torch.testing.assert_close(logits[row, 0, ids].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_that_are_not_shortlisted_are_those_of_the_4_bit_weights(batch):
    head, _ = head_of(0.1 * random(SMALLEST_VOCABULARY, 64))
    hidden = random(batch, 1, 64, seed=1)
    logits, approximate = head(hidden), head.approximate(hidden)
    assert logits.shape == (batch, 1, SMALLEST_VOCABULARY)
    for row in range(batch):
        rest = approximate[row, 0].argsort(descending=True)[256:]
        assert torch.equal(logits[row, 0, rest], approximate[row, 0, rest])


def test_a_shortlist_gives_each_row_the_same_bits_as_it_alone():
    head, _ = head_of(0.1 * random(SMALLEST_VOCABULARY, 64))
    hidden = random(4, 1, 64, seed=1)
    logits = head.approximate(hidden)[:, 0]
    together = head.shortlist(logits, hidden, dot_products)
    for row in range(4):
        alone = head.shortlist(logits[[row]], hidden[[row]], dot_products)
        assert torch.equal(together[[row]], alone)
        assert not torch.equal(alone, logits[[row]])


def test_the_best_token_of_a_q8_0_table_has_its_exact_logit():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-126, 127, (SMALLEST_VOCABULARY, 2, 32), generator=generator)
    codes[..., 5] = 127
    d = (0.01 * torch.rand(SMALLEST_VOCABULARY, 2, 1, generator=generator)).half().float()
    table = (codes * d).flatten(1)
    head, _ = head_of(table)
    for seed in range(10):
        hidden = random(1, 1, 64, seed=seed)
        best, exact = head(hidden)[0, 0].max(0), (hidden[0, 0] @ table.T).max(0)
        assert best.indices == exact.indices
        torch.testing.assert_close(best.values, exact.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "rows", "fits"),
    [
        (64, SMALLEST_VOCABULARY, True), (32, SMALLEST_VOCABULARY + 64, True),
        (64, SMALLEST_VOCABULARY - 64, False), (64, SMALLEST_VOCABULARY + 32, False),
        (48, SMALLEST_VOCABULARY, False), (2560, 262_208, True),
    ],
)  # fmt: skip
def test_a_shortlist_fits_a_large_vocabulary_in_whole_groups(columns, rows, fits):
    with torch.device("meta"):
        assert ShortlistHead.fits(nn.Linear(columns, rows, bias=False)) is fits


# Recipes


@pytest.mark.parametrize("layer", ["q_proj", "v_proj", "down_proj"])
def test_a_recipe_of_8_bits_has_no_exceptions(layer):
    assert RECIPES["8da8w"].of(layer) == (8, None)


def test_a_recipe_keeps_the_layers_that_it_names_in_8_bits():
    recipe = Recipe(bits=4, group_size=32, head_bits=4, int8=("down_proj",))
    assert recipe.of("down_proj") == (8, None)
    assert recipe.of("up_proj") == recipe.of("proj") == (4, 32)


def test_the_4_bit_recipe_keeps_in_8_bits_what_is_added_to_the_stream_and_what_is_attended_to():
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    bits = [RECIPES["8da4w"].of(layer)[0] for layer in layers]
    assert bits == [4, 4, 8, 8, 4, 4, 8]


class TiedModel(nn.Module):
    """An embedding, two linear layers at different depths, and a head tied to the embedding."""

    def __init__(self, vocabulary: int = 40):
        super().__init__()
        self.model = nn.Module()
        self.model.streams = None
        self.model.embed_tokens = nn.Embedding(vocabulary, 64)
        self.model.up_proj = linear(96, 64, 1)
        self.model.mlp = nn.ModuleDict({"down_proj": linear(64, 96, 2)})
        self.model.layers = nn.ModuleList()
        self.model.per_layer = None
        self.lm_head = nn.Linear(64, vocabulary, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.model.up_proj(self.model.embed_tokens(tokens))
        return self.lm_head(self.model.mlp["down_proj"](hidden))


@pytest.mark.parametrize("name", ["8da8w", "8da4w"])
def test_a_recipe_reaches_every_layer(name):
    model, recipe = TiedModel(), RECIPES[name]
    quantize(model, recipe)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    layers = {"up_proj": model.model.up_proj, "down_proj": model.model.mlp["down_proj"]}
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedLinear)
        assert (layer.bits, layer.group_size) == recipe.of(name)
    assert not list(model.parameters())


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_a_head_that_no_shortlist_fits_is_kept_in_8_bits(recipe):
    model = TiedModel(SMALLEST_VOCABULARY - 1)
    quantize(model, RECIPES[recipe])
    assert isinstance(model.lm_head, QuantizedLinear)
    assert (model.lm_head.bits, model.lm_head.group_size) == (8, None)


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_a_shortlist_scores_with_the_embedding_itself(recipe):
    model = TiedModel(SMALLEST_VOCABULARY)
    quantize(model, RECIPES[recipe])
    assert isinstance(model.lm_head, ShortlistHead)
    assert model.lm_head.shortlist.embedding is model.model.embed_tokens
    assert (model.lm_head.approximate.bits, model.lm_head.approximate.group_size) == (4, 64)


@pytest.mark.parametrize(("size", "group_size"), [(640, 128), (192, 64), (96, 32)])
def test_a_shortlist_head_takes_the_largest_groups_that_fit(size, group_size):
    head = linear(SMALLEST_VOCABULARY, size)
    embedding = QuantizedEmbedding(nn.Embedding(SMALLEST_VOCABULARY, size))
    assert ShortlistHead.fits(head)
    assert ShortlistHead(head, embedding).approximate.group_size == group_size


def test_a_recipe_with_a_head_of_8_bits_makes_no_shortlist():
    model = TiedModel(SMALLEST_VOCABULARY)
    quantize(model, Recipe(bits=8, group_size=None, head_bits=8))
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.bits == 8


@pytest.mark.parametrize(("recipe", "limit"), [("8da8w", 0.03), ("8da4w", 0.2)])
def test_a_quantized_model_is_near_the_one_it_was_made_from(recipe, limit):
    torch.manual_seed(4)
    model = TiedModel()
    tokens = torch.arange(40)[None]
    exact = model(tokens)
    quantize(model, RECIPES[recipe])
    assert (model(tokens) - exact).norm() / exact.norm() < limit


def test_fp32_leaves_the_model_as_it_is():
    model = TiedModel()
    before = copy.deepcopy(model)
    quantize(model, RECIPES["fp32"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(torch.arange(40)[None]), before(torch.arange(40)[None]))


def test_a_model_that_asks_for_gradients_can_be_quantized_and_copied():
    model = TiedModel()
    assert model.lm_head.weight.requires_grad
    quantize(model, RECIPES["8da4w"])
    assert not any(buffer.requires_grad for buffer in model.buffers())
    tokens = torch.arange(40)[None]
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


# Experts, and heads of their own


class Mixture(nn.Module):
    """As much of a network as `quantize` looks at, with experts and an untied head."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.model = nn.Module()
        self.model.streams = None
        self.model.embed_tokens = nn.Embedding(vocabulary, 32)
        self.model.per_layer = None
        layer = nn.Module()
        layer.mlp = SparseMoe(32, MoeConfig(5, 2, 16, norm_topk_prob=True))
        layer.mixer = nn.Module()
        layer.mixer.layer_type = "full_attention"
        self.model.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(32, vocabulary, bias=False)
        for i, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
        self.requires_grad_(False)


def test_experts_keep_their_rows_in_8_bits_and_the_router_its_weights():
    network = Mixture(64)
    moe = network.model.layers[0].mlp
    router, gate_up, down = moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj
    quantize(network, RECIPES["8da4w"])
    assert moe.gate.weight is router
    for codes, scales, weight in (
        (moe.experts.gate_up_proj_codes, moe.experts.gate_up_proj_scales, gate_up),
        (moe.experts.down_proj_codes, moe.experts.down_proj_scales, down),
    ):
        assert codes.dtype == torch.int8 and codes.shape == weight.shape
        error = (codes * scales[..., None] - weight).abs()
        assert (error <= scales[..., None] * 0.5001).all()
    x = random(1, 4, 32)
    torch.testing.assert_close(moe(x[:, :1]), moe(x)[:, :1], rtol=1e-4, atol=1e-4)


def test_an_untied_heads_best_tokens_are_scored_with_the_heads_own_rows():
    network = Mixture(SMALLEST_VOCABULARY)
    head = network.lm_head
    quantize(network, RECIPES["8da8w"])
    rows = network.lm_head.shortlist.embedding
    assert rows is not network.model.embed_tokens
    ids = torch.tensor([3, 16_000])
    torch.testing.assert_close(rows(ids), head.weight[ids], rtol=0, atol=0.02)
