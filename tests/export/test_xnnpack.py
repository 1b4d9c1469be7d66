"""Regions inside XNNPACK: what stands in for modules of the network, and weights that are told
apart."""

import pytest
import torch
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch import nn

from tests.models.tiny_models import DENSE_NETWORKS, dense_network
from tokenloop.export.pte import quantize
from tokenloop.export.pte.lowered_layers import lower_layers
from tokenloop.export.pte.quantize import QuantizedLinear
from tokenloop.export.pte.xnnpack_regions import (
    DataInFiles,
    DelegatedGELU,
    DelegatedRMSNorm,
    Head,
    InParts,
    in_nibbles,
    in_parts,
    prepare,
    trace,
)
from tokenloop.export.tensors_in_files import tensors_in_files
from tokenloop.models.gemma3 import RMSNorm
from tokenloop.runner.engines.executorch_runtime import set_backend_option


@pytest.fixture(autouse=True)
def weight_cache():
    """As the runner has it."""
    set_backend_option("XnnpackBackend", "weight_cache_enabled", True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(columns: int, rows: int, seed: int, factor: float = 1.0) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = factor * random(rows, columns, seed=seed)
    return layer.requires_grad_(False)


def norm(size: int, eps: float, seed: int = 1) -> RMSNorm:
    module = RMSNorm(size, eps).requires_grad_(False)
    module.weight.copy_(random(size, seed=seed))
    return module


class Region(nn.Module):
    """A few layers with constants of every kind."""

    def __init__(self, seed: int):
        super().__init__()
        self.norm = DelegatedRMSNorm(norm(32, 1e-6, seed), scale=0.5)
        self.first, self.second = linear(32, 24, seed), linear(24, 32, seed + 1)
        self.act = DelegatedGELU()
        self.register_buffer("shift", random(32, seed=seed + 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.act(self.first(self.norm(x)))
        return x + self.second(hidden) * self.shift, hidden


class Both(nn.Module):
    """Two layers, each with an input of its own."""

    def __init__(self, a: nn.Module, b: nn.Module):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(y)


# Instead of modules of the network


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_delegated_norm_is_the_networks_norm_times_a_scale(eps, scale):
    module, x = norm(48, eps), 5.0 * random(1, 3, 48)
    expected = module(x) * scale
    torch.testing.assert_close(DelegatedRMSNorm(module, scale)(x), expected, rtol=1e-5, atol=1e-6)


def test_a_delegated_gelu_is_the_tanh_approximation():
    x = torch.linspace(-12.0, 12.0, 2001)
    expected = nn.GELU(approximate="tanh")(x.double())
    torch.testing.assert_close(DelegatedGELU()(x).double(), expected, rtol=1e-5, atol=1e-6)


# Regions


def test_one_kind_of_region_serves_other_weights(as_method):
    regions = [Region(seed) for seed in (10, 20, 30)]
    length = torch.export.Dim("T", min=1, max=8)
    kind = trace(regions[0], (torch.zeros(1, 3, 32),), ({1: length},))
    x = random(1, 3, 32)
    for region in regions:
        run = as_method(kind.lower(region), (x,))
        for actual, expected in zip(run(x), region(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits, group_size", [(None, None), (8, None), (4, 32)])
def test_a_head_gives_each_row_the_bits_that_it_has_alone(as_method, bits, group_size):
    layer = linear(64, 300, 1)
    if bits:
        layer = QuantizedLinear(layer, bits, group_size)
    head, x = Head(DelegatedRMSNorm(norm(64, 1e-6)), layer), random(1, 5, 64)
    shapes = ({1: torch.export.Dim("N", min=1, max=5)},)
    run = as_method(trace(head, (x,), shapes).lower(head), (x,), shapes)
    logits, hidden = run(x)
    assert (logits.shape, hidden.shape) == ((5, 300), (1, 5, 64))
    torch.testing.assert_close(logits, head(x)[0], rtol=1e-4, atol=1e-4)
    for row in range(5):
        alone = run(x[:, [row]])
        assert torch.equal(alone[0], logits[[row]]) and torch.equal(alone[1], hidden[:, [row]])


@pytest.mark.parametrize("name", DENSE_NETWORKS)
def test_regions_of_llama_s_kin_give_what_their_layers_give(as_method, name):
    plain, network = (dense_network(name, 16, 1) for _ in range(2))
    prepare(network)
    regions = lower_layers(network, network.model.layers, 3, None, lambda what: None)
    # The last layer's are made of the first's.
    layer, mixer = plain.model.layers[-1], plain.model.layers[-1].mixer
    x, rope = random(1, 3, plain.config.hidden_size), plain.model.rotations(torch.arange(5, 8))
    inputs = x, *rope[mixer.rotation]
    (q, k, v), _ = layer.project(x, rope)
    expected = [
        heads[0].unflatten(1, (mixer.kv_heads, -1)).flatten(2).transpose(0, 1).contiguous()
        for heads in (q * mixer.scale, k, v)
    ]
    for got, right in zip(as_method(regions.before[-1], inputs)(*inputs), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    (got,) = as_method(regions.after[-1], (x, expected[0]))(x, expected[0])
    right = layer.finish(x, q * mixer.scale, None)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


class Parts(nn.Module):
    """A linear layer that notes how many rows it is given."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.seen = 8, 4, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[1])
        return x[..., :4] * 2.0


@pytest.mark.parametrize(
    "rows, parts",
    [
        (1, [1]),
        (5, [5]),
        (6, [3, 3]),
        (7, [4, 3]),
        (10, [5, 5]),
        (11, [4, 4, 3]),
        (16, [4] * 4),
        (32, [5] * 6 + [2]),
    ],
)
def test_rows_are_multiplied_in_even_parts_of_five_at_most(rows, parts):
    linear, x = Parts(), random(1, rows, 8)
    assert torch.equal(InParts(linear)(x), x[..., :4] * 2.0)
    assert linear.seen == parts


def test_a_layer_in_parts_shares_its_weights_and_leaves_the_layer_as_it_was():
    layer = nn.Sequential(linear(64, 32, 1), QuantizedLinear(linear(32, 64, 2), 8, None))
    divided = in_parts(layer)
    assert [type(module) for module in layer] == [nn.Linear, QuantizedLinear]
    assert [type(module) for module in divided] == [InParts, InParts]
    assert divided[0].linear.weight is layer[0].weight
    for name, buffer in layer[1].named_buffers():
        assert getattr(divided[1].linear, name) is buffer


@pytest.mark.parametrize(
    "bits, group_size, rows", [(None, None, 7), (8, None, 7), (4, 32, 7), (8, None, 131)]
)
def test_each_row_of_several_parts_has_the_bits_that_it_has_alone(
    as_method, bits, group_size, rows
):
    # XNNPACK joins five parts at most. Of 131 rows there are 27.
    layer, x = linear(64, 96, 1), random(1, rows, 64)
    if bits:
        layer = QuantizedLinear(layer, bits, group_size)
    run, alone = (
        as_method(trace(region, (rows,), None).lower(region), (rows,))
        for region, rows in ((in_parts(nn.Sequential(layer)), x), (nn.Sequential(layer), x[:, :1]))
    )
    (out,) = run(x)
    torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-4)
    for row in range(rows):
        assert torch.equal(alone(x[:, [row]])[0], out[:, [row]])


def test_a_region_that_xnnpack_does_not_take_is_refused():
    class Sorted(nn.Module):
        def forward(self, x):
            return torch.sort(x).values * 2.0

    with pytest.raises(RuntimeError, match="Sorted became .*sort.* outside"):
        trace(Sorted(), (torch.zeros(1, 4),), None)


# The weight cache


def run_both(as_method, a: nn.Module, b: nn.Module, x, y) -> None:
    region = Both(a, b)
    lowered = trace(region, (x, y), None).lower(region)
    for actual, expected in zip(as_method(lowered, (x, y))(x, y), region(x, y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 32)])
def test_layers_of_equal_weights_are_the_same(as_method, bits, group_size):
    a, b = (QuantizedLinear(linear(64, 32, 1), bits, group_size) for _ in range(2))
    run_both(as_method, a, b, random(1, 1, 64, seed=1), random(1, 1, 64, seed=2))


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 32)])
def test_layers_of_equal_codes_keep_their_own_scales(as_method, bits, group_size):
    a, b = (QuantizedLinear(linear(64, 32, 1, f), bits, group_size) for f in (1.0, 4.0))
    assert torch.equal(a.weight, b.weight)
    run_both(as_method, a, b, random(1, 1, 64), random(1, 1, 64))


def test_layers_of_equal_weights_keep_their_own_biases(as_method):
    # As of a block that a merged model has twice, where it reads other activations.
    layer, means = linear(64, 32, 1), (5.0, -5.0)
    a, b = (QuantizedLinear(layer, 8, None, torch.full((64,), mean)) for mean in means)
    run_both(as_method, a, b, random(1, 1, 64), random(1, 1, 64))


def test_layers_of_equal_bytes_keep_their_own_shapes(as_method):
    a, b = linear(64, 32, 1), linear(32, 64, 1)
    for layer in (a, b):
        layer.weight.fill_(0.5)
    run_both(as_method, a, b, random(1, 1, 64), random(1, 1, 32))


@pytest.mark.parametrize("shape", [(1, 1), (7, 32), (300, 33), (5, 9, 1)])
def test_codes_of_4_bits_are_packed_as_by_executorch(shape, monkeypatch):
    monkeypatch.setattr(quantize, "BLOCK_ELEMENTS", 64)
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = in_nibbles(codes)
    halves = torch.nn.functional.pad(codes.view(shape[:2]) + 8, (0, shape[1] % 2), value=8)
    expected = (halves[:, ::2] + 16 * halves[:, 1::2].int()).to(torch.uint8)
    assert torch.equal(packed, expected) and packed.shape == expected.shape
    # The bytes of the storage are what is written.
    assert packed.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    codes.view(-1)[-1] = 8
    with pytest.raises(RuntimeError, match="above 7"):
        in_nibbles(codes)


def test_large_weights_wait_in_files_until_the_program_is_written(tmp_path):
    data = bytes(range(256)) * 4096
    with tensors_in_files(tmp_path):
        weights = DataInFiles()
        weights.add_named_data("large", data, alignment=16)
        weights.add_named_data("small", b"1234", alignment=16)
        large, small = weights.get_named_data_store_output().buffers
        assert isinstance(large, FileBackedData) and large.to_bytes() == data and small == b"1234"
        # As the program's own store does it.
        merged = NamedDataStore()
        merged.merge_named_data_store(weights.get_named_data_store_output())
        merged.add_named_data("again", data, alignment=16)
        assert merged.buffers == [large, small]
