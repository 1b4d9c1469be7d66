import pytest
import torch

from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.command import parse_arguments
from tokenloop.export.gemma import FAMILY
from tokenloop.export.pte.calibrate import TEXT, TOKENS, calibrate, observe
from tokenloop.export.pte.quantize import QuantizedLinear
from tokenloop.export.recipes import RECIPES
from tokenloop.models import gemma3, qwen3

IDS = [2, *(3 + (7 * i) % 250 for i in range(60))]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=[2, 1], ids=["2 value heads", "1 value head"])
def model(request, make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint(num_key_value_heads=request.param))
    config = gemma3.Gemma3Config.from_dict(checkpoint.config)
    with torch.device("meta"):
        model = gemma3.Gemma3(config, 100)
    load_weights(model, checkpoint, gemma3.checkpoint_name)
    return model.eval()


def logits(model, ids=IDS[:16]):
    return model.prefill(torch.tensor([ids]), torch.arange(len(ids)))


def unevenness(values):
    return values.max() / values.median()


def test_smoothing_changes_nothing_in_float32(model):
    before = logits(model)
    weights = model.model.layers[0].mlp.down_proj.weight.clone()
    calibrate(model, IDS)
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, weights)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_smoothing_changes_nothing_of_biased_layers_and_experts(make_qwen_checkpoint, model_type):
    checkpoint = open_checkpoint(make_qwen_checkpoint(model_type))
    with torch.device("meta"):
        model = qwen3.Qwen3(qwen3.Qwen3Config.from_dict(checkpoint.config), 100)
    load_weights(model, checkpoint, qwen3.checkpoint_name)
    layer = model.model.layers[0]
    layer.input_layernorm.weight[3] = 40.0
    before, weights = logits(model), layer.self_attn.v_proj.weight.clone()
    calibrate(model, IDS)
    assert not torch.equal(layer.self_attn.v_proj.weight, weights)
    tolerance = 1e-5 * before.abs().max().item()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance)


def test_every_factor_is_a_power_of_two(model):
    layers = model.model.layers
    before = [layer.mlp.up_proj.weight.clone() for layer in layers]
    o_proj = [layer.self_attn.o_proj.weight.clone() for layer in layers]
    calibrate(model, IDS)
    ratios = [
        *(old / layer.mlp.up_proj.weight for old, layer in zip(before, layers)),
        *(old / layer.self_attn.o_proj.weight for old, layer in zip(o_proj, layers)),
    ]
    for ratio in ratios:
        assert torch.equal(torch.frexp(ratio).mantissa, torch.full_like(ratio, 0.5))
    assert any((ratio != 1).any() for ratio in ratios)


def test_a_channel_that_was_large_is_no_longer(model):
    layer = model.model.layers[1]
    layer.mlp.up_proj.weight[5] *= 64
    layer.input_layernorm.weight[3] = 40.0
    before = observe(model, IDS)
    calibrate(model, IDS)
    after = observe(model, IDS)
    for linear in (layer.mlp.down_proj, layer.self_attn.q_proj):
        assert unevenness(after[linear].square) < unevenness(before[linear].square) / 9


def test_the_means_are_those_of_what_each_layer_reads_after_the_first_token(model):
    means = calibrate(model, IDS[:16])
    seen = {}
    down = model.model.layers[2].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda module, x: seen.setdefault("x", x[0]))
    ids = IDS[:16]  # one chunk
    hidden = model.model.prefill(torch.tensor([ids]), torch.arange(16), None)
    hook.remove()
    expected = {
        down: seen["x"][0, 1:].mean(0),
        model.lm_head: model.model.norm(hidden)[0, 1:].mean(0),
    }
    for linear, mean in expected.items():
        torch.testing.assert_close(means[linear], mean, rtol=2**-8, atol=1e-6)
    assert len(means) == 3 * 7 + 1


def test_no_hook_stays_behind(model):
    calibrate(model, IDS)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("ids", [[2], [2, 5], IDS, IDS * 12], ids=["1", "2", "61", "732"])
def test_texts_of_any_length_will_do(model, ids):
    assert all(mean.isfinite().all() for mean in calibrate(model, ids).values())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 32)])
def test_the_bias_makes_up_for_the_mean_of_the_error(bits, group_size):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False)
    mean = torch.randn(64)
    plain = QuantizedLinear(linear, bits, group_size)
    corrected = QuantizedLinear(linear, bits, group_size, mean)
    error = (linear.weight - plain.dequantized()) @ mean
    assert error.abs().max() > 1e-3
    torch.testing.assert_close(corrected.bias, error, rtol=1e-4, atol=1e-6)
    assert plain.bias is None


def test_the_text_is_long_enough_and_the_recipes_are_known():
    assert len(TEXT.read_text(encoding="utf-8").encode()) > 3 * TOKENS
    assert parse_arguments(FAMILY, ["--backend", "xnnpack"]).quant in RECIPES
