"""The Triton kernels of routed experts give what their references and the network's own experts
give."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, EPS, ON_GPU, TOLERANCE
from tokenloop.models.kernels.experts import operator, packing, reference, scores_operator
from tokenloop.models.kernels.experts.triton import down_kernel
from tokenloop.models.kernels.experts.triton_chunk import down_chunk_kernel
from tokenloop.models.kernels.launch.launches import launch
from tokenloop.models.moe import MoeConfig, SparseMoe

EXPERTS, CHOICES, SIZE, INNER = (128, 8, 2048, 768) if ON_GPU else (5, 3, 19, 13)
ROWS = [1, 2, 7] if ON_GPU else [1, 3]
# NumPy's, of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def made(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def weights_of(dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down, so scaled that results are near 1."""
    gate_up = made(EXPERTS, 2 * INNER, SIZE, dtype=dtype, seed=1) / SIZE**0.5
    return gate_up, made(EXPERTS, SIZE, INNER, dtype=dtype, seed=2) / INNER**0.5


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_largest_scores_choose_and_weigh(rows, dtype, normalized):
    scores = made(rows, EXPERTS, dtype=dtype)
    # Ties, which go to the first; and one that leaves nothing to the others.
    scores[0, 1:4], scores[-1, 2] = 2.5, 80.0
    chosen, weights = operator.route(scores, EXPERTS, CHOICES, normalized)
    expected, expected_weights = reference.route(scores, EXPERTS, CHOICES, normalized)
    assert torch.equal(chosen, expected) and weights.dtype == dtype
    torch.testing.assert_close(weights, expected_weights, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_expert_s_scale_multiplies_its_weight(dtype):
    scores, scales = made(7, EXPERTS, dtype=dtype), made(EXPERTS, dtype=dtype, seed=8)
    chosen, weights = operator.route(scores, EXPERTS, CHOICES, True, None, scales)
    expected, expected_weights = reference.route(scores, EXPERTS, CHOICES, True, None, scales)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=TOLERANCE[dtype], atol=1e-6)
    assert weights.min() < 0 and (weights.float().sum(-1) - 1).abs().min() > 1e-3


def test_a_row_of_nan_chooses_experts_that_exist():
    scores = made(2, EXPERTS)
    scores[0] = torch.nan
    chosen, _ = operator.route(scores, EXPERTS, CHOICES, True)
    assert chosen.min() >= 0 and chosen.max() < EXPERTS
    assert torch.equal(chosen[1:], reference.route(scores[1:], EXPERTS, CHOICES, True)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_chosen_experts_give_what_the_reference_gives(rows, dtype):
    x = made(rows, SIZE, dtype=dtype)
    routed = operator.route(made(rows, EXPERTS, dtype=dtype, seed=3), EXPERTS, CHOICES, True)
    actual = operator.experts(x, *routed, *weights_of(dtype))
    expected = reference.experts(x, *routed, *weights_of(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_what_all_rows_have_is_added_with_a_weight_of_its_own(rows, dtype):
    x, shared = (made(rows, SIZE, dtype=dtype, seed=seed) for seed in (0, 5))
    scores = made(rows, EXPERTS + 1, dtype=dtype, seed=3)
    # Not to be chosen, however large it is.
    scores[0, -1] = 90.0
    routed = operator.route(scores, EXPERTS, CHOICES, True)
    assert routed[0].max() < EXPERTS
    assert torch.equal(
        routed[0], operator.route(scores[:, :-1].contiguous(), EXPERTS, CHOICES, True)[0]
    )
    actual = operator.experts(x, *routed, *weights_of(dtype), shared, scores)
    expected = reference.experts(x, *routed, *weights_of(dtype), shared, scores)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    alone = reference.experts(x, *routed, *weights_of(dtype))
    assert not torch.allclose(actual, alone, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("rows", "dtype", "normalized"), [(2, torch.float32, True), (5, torch.bfloat16, False)]
)
def test_the_first_products_route_as_a_launch_of_its_own_does(rows, dtype, normalized):
    x, scores = made(rows, SIZE, dtype=dtype), made(rows, EXPERTS + 1, dtype=dtype, seed=3)
    scores[0, 1:4], scores[-1, 2] = 2.5, 80.0
    scales, hidden = made(EXPERTS, dtype=dtype, seed=8), made(rows, 11, dtype=dtype, seed=5)
    shared_down = made(SIZE, 11, dtype=dtype, seed=9) / 11**0.5
    routing, beside = (CHOICES, normalized, scales), {"shared": hidden, "shared_down": shared_down}
    actual = operator.route_experts(x, scores, *routing, *weights_of(dtype), **beside)
    expected = reference.route_experts(x, scores, *routing, *weights_of(dtype), **beside)
    tolerance = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=tolerance)
    # Of few rows the first products find out which experts are chosen, of many a launch ahead does.
    if rows > operator.FEW_ROWS:
        row = operator.route_experts(
            x[-1:], scores[-1:], *routing, *weights_of(dtype), hidden[-1:], shared_down=shared_down
        )
        assert torch.equal(row, actual[-1:])
        return
    routed = operator.route(scores, EXPERTS, CHOICES, normalized, None, scales)
    given = x, *routed, *weights_of(dtype), hidden, scores
    assert torch.equal(actual, operator.experts(*given, shared_down=shared_down))


@pytest.mark.parametrize("inner", [INNER, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_come_with_the_norm_and_with_what_all_rows_have(dtype, inner):
    x, branch = made(7, SIZE, dtype=dtype), made(7, SIZE, dtype=dtype, seed=1)
    post, norm = (made(SIZE, dtype=dtype, seed=seed) for seed in (2, 3))
    weight = made(EXPERTS + 1, SIZE, dtype=dtype, seed=4) / SIZE**0.5
    gate_up = made(2 * inner, SIZE, dtype=dtype, seed=5) / SIZE**0.5 if inner else None
    given, options = (post, None, norm, weight, gate_up, "gelu_tanh"), {"eps": EPS, "offset": 1.0}
    actual = scores_operator.add_norm_scores(x, branch, *given, **options)
    expected = reference.add_norm_scores(x, branch, *given, **options)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=2 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    for few in (1, 3):
        rows = scores_operator.add_norm_scores(x[-few:], branch[-few:], *given, **options)
        assert all(torch.equal(one, other[-few:]) for one, other in zip(rows, actual))
    with pytest.raises(ValueError, match=r"2049 inputs of torch.float32, .* at most 2048 inputs"):
        wide = made(1, 2049)
        scores_operator.add_norm_scores(wide, wide, None, None, norm, weight, None, "silu", eps=EPS)


def options_of(activation: str, dtype) -> dict:
    """Biases for one activation, and none for the other."""
    if activation == "gelu_tanh":
        return {"activation": activation}
    biases = made(EXPERTS, 2 * INNER, dtype=dtype, seed=6), made(EXPERTS, SIZE, dtype=dtype, seed=7)
    return {"activation": activation, "gate_up_bias": 4 * biases[0], "down_bias": biases[1]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "clamped_swiglu"])
def test_other_activations_and_biases_are_the_reference_s(activation, dtype):
    x = made(2, SIZE, dtype=dtype)
    routed = operator.route(made(2, EXPERTS, dtype=dtype, seed=3), EXPERTS, CHOICES, True)
    options = options_of(activation, dtype)
    actual = operator.experts(x, *routed, *weights_of(dtype), **options)
    expected = reference.experts(x, *routed, *weights_of(dtype), **options)
    # The clamp leaves more than 1.
    tolerance = TOLERANCE[dtype], TOLERANCE[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance[0], atol=tolerance[1])
    alone = reference.experts(x, *routed, *weights_of(dtype))
    assert not torch.allclose(actual, alone, rtol=0.05, atol=0.05)


def float8(weights: tuple[torch.Tensor, torch.Tensor]) -> tuple[list, dict]:
    """gate_up and down in float8, and the scales of their rows."""
    scales = [table.float().abs().amax(2) / 448 for table in weights]
    tables = [
        (table.float() / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        for table, scale in zip(weights, scales)
    ]
    return tables, dict(zip(("gate_up_scale", "down_scale"), scales))


@pytest.mark.parametrize("activation", ["gelu_tanh", "clamped_swiglu"])
def test_experts_in_float8_are_the_reference_s(activation):
    tables, scales = float8(weights_of(torch.bfloat16))
    options = options_of(activation, torch.bfloat16) | scales
    x, scores = (made(3, n, dtype=torch.bfloat16, seed=3) for n in (SIZE, EXPERTS))
    routed = operator.route(scores, EXPERTS, CHOICES, True)
    actual = operator.experts(x, *routed, *tables, **options)
    expected = reference.experts(x, *routed, *tables, **options)
    tolerance = TOLERANCE[torch.bfloat16] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[torch.bfloat16], atol=tolerance)
    row = operator.experts(x[1:2], *(part[1:2] for part in routed), *tables, **options)
    assert torch.equal(row, actual[1:2])
    with pytest.raises(ValueError, match="experts torch.float8_e4m3fn of shape .* shape None"):
        operator.experts(x, *routed, *tables)
    with pytest.raises(ValueError, match="activations are torch.float32, experts torch.float8"):
        operator.experts(x.float(), *routed, *tables, **options)


def test_what_is_not_contiguous_is_refused():
    x, chosen = made(2, SIZE), torch.zeros(CHOICES, 2, dtype=torch.int64, device=DEVICE).T
    with pytest.raises(ValueError, match=r"^chosen of strides \(1, 2\) is not contiguous"):
        operator.experts(x, chosen, made(2, CHOICES), *weights_of(torch.float32))


def test_experts_that_are_not_chosen_are_not_read():
    x, (gate_up, down) = made(2, SIZE), weights_of(torch.float32)
    chosen = torch.tensor([[4, 0, 1], [1, 4, 0]], device=DEVICE)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]], device=DEVICE)
    expected = operator.experts(x, chosen, weights, gate_up, down)
    gate_up[2:4], down[2:4] = torch.nan, torch.nan
    assert torch.equal(operator.experts(x, chosen, weights, gate_up, down), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_whatever_the_others_are(dtype):
    x, gate_up_down = made(7, SIZE, dtype=dtype), weights_of(dtype)
    scores = made(7, EXPERTS, dtype=dtype, seed=3)
    together = operator.experts(x, *operator.route(scores, EXPERTS, CHOICES, True), *gate_up_down)
    for row in range(7) if ON_GPU else (0, 3, 6):
        one = slice(row, row + 1)
        routed = operator.route(scores[one], EXPERTS, CHOICES, True)
        assert torch.equal(operator.experts(x[one], *routed, *gate_up_down), together[one])


@pytest.mark.parametrize("normalized", [True, False])
def test_they_are_the_networks_own_experts(normalized):
    moe = SparseMoe(SIZE, MoeConfig(EXPERTS, CHOICES, INNER, normalized)).to(DEVICE)
    gate_up, down = weights_of(torch.float32)
    moe.gate.weight.data = made(EXPERTS, SIZE, seed=4)
    moe.experts.gate_up_proj.data, moe.experts.down_proj.data = gate_up, down
    x = made(3, SIZE)
    with torch.no_grad():
        expected = moe(x[:, None])[:, 0]
        routed = operator.route(moe.gate(x), EXPERTS, CHOICES, normalized)
        actual = operator.experts(x, *routed, gate_up, down)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_they_are_the_networks_own_with_one_that_every_token_has():
    config = MoeConfig(EXPERTS, CHOICES, INNER, True)
    moe = SparseMoe(SIZE, config, INNER).to(DEVICE).requires_grad_(False)
    for seed, parameter in enumerate(moe.parameters()):
        parameter.data = made(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5
    x = made(3, SIZE)
    weight = torch.cat([moe.gate.weight, moe.shared_expert_gate.weight])
    scores = torch.nn.functional.linear(x, weight)
    routed = operator.route(scores, EXPERTS, CHOICES, True)
    tables = moe.experts.gate_up_proj, moe.experts.down_proj
    actual = operator.experts(x, *routed, *tables, moe.shared_expert(x), scores)
    torch.testing.assert_close(actual, moe(x[:, None])[:, 0], rtol=1e-4, atol=1e-4)


def float4_tables(size: int, inner: int) -> tuple[list, dict]:
    """gate_up and down of any float4 numbers and powers of 2, and the latter."""
    generator = torch.Generator().manual_seed(1)
    tables, scales = [], []
    for rows, inputs in ((2 * inner, size), (size, inner)):
        codes = torch.randint(0, 16, (EXPERTS, rows, inputs), generator=generator)
        tables.append(packing.pack_float4(codes.to(torch.uint8)).to(DEVICE))
        powers = torch.randint(118, 124, (EXPERTS, rows, inputs // 32), generator=generator)
        scales.append(powers.to(DEVICE, torch.uint8))
    return tables, dict(zip(("gate_up_scale", "down_scale"), scales))


def grouped_tables(size: int, inner: int) -> tuple[list, dict]:
    """gate_up and down in float8, by groups of 64."""
    tables, scales = [], []
    for table in (made(EXPERTS, 2 * inner, size, seed=1), made(EXPERTS, size, inner, seed=2)):
        groups = table.unflatten(2, (-1, 64))
        scales.append(groups.abs().amax(3) / 448 / table.shape[2] ** 0.5)
        values = groups / groups.abs().amax(3, keepdim=True) * 448
        tables.append(values.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(2))
    return tables, dict(zip(("gate_up_scale", "down_scale"), scales))


GROUPED = {"float4": (float4_tables, 64, 32), "float8": (grouped_tables, 128, 64)}


def grouped(kind: str) -> tuple[int, tuple[list, dict], list]:
    """The hidden size, the tables with their scales, and the floats that they are."""
    make, *sizes = GROUPED[kind]
    tables, scales = make(*((2880, 2880) if ON_GPU and kind == "float4" else sizes))
    floats = [packing.dequantize(*given) for given in zip(tables, scales.values())]
    return floats[0].shape[2], (tables, scales), floats


@pytest.mark.parametrize("kind", GROUPED)
def test_experts_in_groups_are_those_of_their_floats(kind):
    size, (tables, scales), floats = grouped(kind)
    x, scores = (made(2, n, dtype=torch.bfloat16, seed=3) for n in (size, EXPERTS))
    routed = operator.route(scores, EXPERTS, CHOICES, True)
    biases = [made(*table.shape[:2], dtype=torch.bfloat16, seed=6) for table in floats]
    options = {"gate_up_bias": biases[0], "down_bias": biases[1], "activation": "clamped_swiglu"}
    actual = operator.experts(x, *routed, *tables, **scales, **options)
    expected = reference.experts(x, *routed, *floats, **options)
    assert torch.equal(reference.experts(x, *routed, *tables, **scales, **options), expected)
    tolerance = TOLERANCE[torch.bfloat16] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[torch.bfloat16], atol=tolerance)
    row = operator.experts(x[1:2], *(part[1:2] for part in routed), *tables, **scales, **options)
    assert torch.equal(row, actual[1:2])


def test_every_float4_with_every_power_is_exact_in_both_kernels():
    """An input of one is the only one: the results are its weights."""
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(255)
    powers = torch.arange(255, dtype=torch.uint8, device=DEVICE).repeat_interleave(16)
    table = packing.pack_float4(codes[:, None].expand(-1, 32).contiguous())[None]
    expected = packing.dequantize(table, powers[None, :, None])[0, :, 13]
    h = torch.nn.functional.one_hot(torch.tensor([13], device=DEVICE), 32).bfloat16()
    n, one = len(codes), torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    first = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    y, chunk = (torch.empty(1, n, device=DEVICE) for _ in range(2))
    launch(down_kernel, (4, 1))(
        h, first, one, table, powers, None, None, None, None, None, y, n, 32, 0, 0,
        C=1, GROUP=32, AHEAD=False, BLOCK_C=1, BLOCK_N=1024, BLOCK_K=32, BLOCK_S=1, num_warps=4,
    )  # fmt: skip
    assert torch.equal(y[0], expected)
    blocks = torch.tensor([[0, 0, 1]], dtype=torch.int32, device=DEVICE)
    launch(down_chunk_kernel, (n // 255 * 2,))(
        h, first.int(), blocks, one, table, powers, None, chunk, n, 32,
        GROUP=32, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64, EVEN=False, STAGES=1, num_warps=4,
    )  # fmt: skip
    # 2^128 and more are no float32, and the interpreter has no subnormal bfloat16.
    there = expected.isfinite()
    assert there.sum() == n - 12
    there &= ON_GPU | (expected == 0) | (expected.abs() >= 2.0**-126)
    assert torch.equal(chunk[0, there], expected[there])


def test_groups_of_other_sizes_and_float32_are_refused():
    _, (tables, scales), _ = grouped("float4")
    x, chosen = made(1, tables[1].shape[1]), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    routed = chosen, made(1, 1)
    with pytest.raises(ValueError, match="activations are torch.float32, experts torch.int16"):
        operator.experts(x, *routed, *tables, **scales)
    with pytest.raises(ValueError, match="experts torch.int16 of shape .* with scales of shape"):
        short = {name: scale[:, :, 1:].contiguous() for name, scale in scales.items()}
        operator.experts(x.bfloat16(), *routed, *tables, **short)
