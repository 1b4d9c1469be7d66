"""Quantized Hugging Face checkpoints are read as what their formats' own packages make of them."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.eager import assert_near, prefill, prompt
from tests.models.tiny_models import make_reference
from tests.mutate_quantized import NAME, REFERENCES, directory, mutated, outcome, reference
from tests.quantized_references import LAYER
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.errors import ExportError
from tokenloop.models import gpt_oss
from tokenloop.models.layers import Stacked


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_a_weight_is_what_the_formats_own_package_makes_of_it(tmp_path, file):
    config, tensors, expected = reference(file)
    checkpoint = open_checkpoint(directory(tmp_path, config, tensors))
    assert list(checkpoint.stored) == [NAME]
    stored = checkpoint.stored[NAME]
    weight = stored.read()
    assert (stored.shape, weight.dtype) == (tuple(expected.shape), torch.float32)
    assert checkpoint.quantization == config["quant_method"]
    # What bitsandbytes makes of int8, and GPTQ's runtime, is rounded a little otherwise.
    exact = file.stem.startswith(("compressed", "awq", "nf4", "fp4"))
    torch.testing.assert_close(weight, expected, rtol=0 if exact else 1e-6, atol=0)
    # Integers lie on a grid, and float8.
    if file.stem.startswith(("nf4", "fp4")):
        assert stored.grid is None
        return
    grid = stored.grid()
    scales = grid.scales().float()
    assert scales.shape == (weight.shape[0], weight.shape[1] // grid.group_size)
    codes = weight / scales.repeat_interleave(grid.group_size, 1)
    assert grid.is_float8 == file.stem.startswith("compressed_fp8")
    whole = codes.to(torch.float8_e4m3fn).float() if grid.is_float8 else codes.round()
    torch.testing.assert_close(codes, whole, rtol=1e-5, atol=1e-5)
    assert grid.least <= whole.min() and whole.max() <= grid.most
    if "asymmetric" not in file.stem and config["quant_method"] == "gptq":
        half = 2 ** (config["bits"] - 1)
        assert (grid.least, grid.most) == (-half, half - 1)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.mark.parametrize(
    ("shape", "block", "scale", "suffix"),
    [
        ((64, 96), (32, 32), (2, 3), "weight_scale_inv"),
        ((64, 96), (32, 32), (2, 3), "weight_scale"),
        ((64, 96), None, (64, 1), "weight_scale"),
        ((64, 96), None, (1, 1), "weight_scale"),
        ((5, 64, 96), (32, 32), (5, 2, 3), "weight_scale_inv"),
    ],
)
def test_fp8_is_what_transformers_makes_of_it(tmp_path, shape, block, scale, suffix):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    config = FP8 | {"weight_block_size": block and list(block)}
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        scales = (torch.rand(scale) + 0.1).to(dtype)
        tensors = {NAME: weight, f"{LAYER}.{suffix}": scales}
        stored = open_checkpoint(directory(tmp_path, config, tensors)).stored
        assert list(stored) == [NAME]
        expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
        assert torch.equal(stored[NAME].read(), expected)
        grid = stored[NAME].grid()
        assert grid.is_float8 and grid.group_size == (block[1] if block else shape[-1])
        each = grid.scales().repeat_interleave(grid.group_size, -1)
        assert torch.equal(weight.float() * each, expected)


@pytest.mark.parametrize("scale", [(), (1,), (33,)])
def test_fp8_scales_may_leave_out_sizes_of_one(tmp_path, scale):
    weight, scales = torch.randn(33, 70).to(torch.float8_e4m3fn), torch.rand(scale)
    tensors = {NAME: weight, f"{LAYER}.weight_scale": scales, f"{LAYER}.input_scale": scales}
    checkpoint = open_checkpoint(directory(tmp_path, FP8, tensors))
    expected = weight.float() * scales.view(-1, 1)
    assert torch.equal(checkpoint.stored[NAME].read(), expected)
    assert checkpoint.unused == (f"{LAYER}.input_scale",)


def test_the_last_fp8_blocks_may_be_cut_off(tmp_path):
    weight, scales = torch.randn(70, 33).to(torch.float8_e4m3fn), torch.rand(3, 2)
    config = FP8 | {"weight_block_size": [32, 32]}
    tensors = {NAME: weight, f"{LAYER}.weight_scale_inv": scales}
    stored = open_checkpoint(directory(tmp_path, config, tensors)).stored[NAME]
    read = stored.read()
    assert stored.grid() is None
    for row in range(70):
        for column in range(33):
            value = weight[row, column].float() * scales[row // 32, column // 32]
            assert read[row, column] == value


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 20, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 20, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    stored = open_checkpoint(directory(tmp_path, config, tensors)).stored[name]
    expected = convert_moe_packed_tensors(blocks, scales)
    assert (stored.shape, stored.dtype) == ((3, 64, 20), "BF16")
    assert torch.equal(stored.read(), expected)


def test_mxfp4_experts_give_the_logits_of_transformers_gpt_oss(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    hf = make_reference("gpt_oss", **sizes)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        hf.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales).float()
    path = directory(tmp_path, {"quant_method": "mxfp4"}, tensors)
    checkpoint = open_checkpoint(path)
    config = gpt_oss.Config.from_dict(hf.config.to_dict())
    with torch.device("meta"):
        network = gpt_oss.Network(config, 40)
    load_weights(network, checkpoint, gpt_oss.checkpoint_name)
    tokens = prompt(20)
    with torch.no_grad():
        expected, actual = hf(tokens).logits[0, [6, 13, 19]], prefill(network, tokens, [7, 14, 20])
    assert_near(torch.cat(actual), expected)


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_gptq_in_act_order_has_groups_by_index(tmp_path, kind):
    file = next(file for file in REFERENCES if file.stem == f"{kind}_4_asymmetric")
    config, tensors, expected = reference(file)
    # The same groups, whose inputs are elsewhere.
    order = torch.randperm(expected.shape[1], generator=torch.Generator().manual_seed(1))
    shifts = 4 * torch.arange(8)[:, None]
    codes = (tensors[f"{LAYER}.qweight"][:, None] >> shifts).bitwise_and(15).flatten(0, 1)[order]
    words = (codes.view(-1, 8, codes.shape[1]).long() << shifts).sum(1)
    tensors[f"{LAYER}.qweight"] = (words - (words >> 31 << 32)).int()
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"][order]
    stored = open_checkpoint(directory(tmp_path, config | {"desc_act": True}, tensors)).stored[NAME]
    torch.testing.assert_close(stored.read(), expected[:, order], rtol=1e-6, atol=0)
    assert stored.grid() is None


def test_a_gptq_bias_of_zeros_is_nothing_to_a_network_without_biases(tmp_path):
    """AutoGPTQ writes one beside every weight, also of models that have none."""
    config, tensors, expected = reference(next(f for f in REFERENCES if f.stem == "gptq_4"))
    with torch.device("meta"):
        own = nn.ModuleDict({"own": nn.Linear(*expected.T.shape, bias=False)})
        biased = nn.ModuleDict({"own": nn.Linear(*expected.T.shape)})
    zeros = torch.zeros(len(expected), dtype=torch.float16)

    def loaded(network: nn.Module, bias: torch.Tensor) -> nn.Module:
        checkpoint = open_checkpoint(directory(tmp_path, config, tensors | {f"{LAYER}.bias": bias}))
        load_weights(network, checkpoint, lambda name: name.replace(LAYER, "own"))
        return network["own"]

    torch.testing.assert_close(loaded(own, zeros).weight.data, expected, rtol=1e-6, atol=0)
    assert torch.equal(loaded(biased, zeros).bias, zeros.float())
    with torch.device("meta"):
        own = nn.ModuleDict({"own": nn.Linear(*expected.T.shape, bias=False)})
    with pytest.raises(ExportError, match="no place for the tensor .*bias"):
        loaded(own, zeros + 1)
    with torch.device("meta"):
        stacked = nn.ModuleDict({name: nn.Linear(128, 16, bias=False) for name in "ab"})
    checkpoint = open_checkpoint(directory(tmp_path, config, tensors | {f"{LAYER}.bias": zeros}))
    load_weights(
        stacked, checkpoint,
        lambda name: Stacked(tuple(f"{part}.{name.rpartition('.')[2]}" for part in "ab")),
    )  # fmt: skip
    assert torch.equal(stacked["b"].weight, checkpoint.stored[NAME].read()[16:])


def test_compressed_tensors_in_act_order_have_groups_by_index(tmp_path):
    file = next(file for file in REFERENCES if file.stem == "compressed_w4a16_asymmetric")
    config, tensors, expected = reference(file)
    groups = torch.arange(expected.shape[1]) % 2
    swapped = {f"{LAYER}.weight_g_idx": groups.int()}
    stored = open_checkpoint(directory(tmp_path, config, tensors | swapped)).stored[NAME]
    scales = tensors[f"{LAYER}.weight_scale"].float()
    assert stored.grid() is None
    # Where the index agrees with the order, so do the weights.
    same = groups == torch.arange(expected.shape[1]) // 64
    assert torch.equal(stored.read()[:, same], expected[:, same])
    steps = stored.read() / scales[:, groups]
    torch.testing.assert_close(steps, steps.round(), rtol=1e-5, atol=1e-5)


def test_what_a_config_asks_for_and_no_reader_knows_is_refused(tmp_path):
    config, tensors, _ = reference(next(f for f in REFERENCES if f.stem == "compressed_w4a16"))
    gptq = reference(next(file for file in REFERENCES if file.stem == "gptq_4"))[0]
    plain = {NAME: torch.zeros(32, 128)}

    def refused(config: dict, tensors: dict, words: str) -> None:
        with pytest.raises(ExportError, match=words):
            open_checkpoint(directory(tmp_path, config, tensors))

    # Weights of these are plain floats, or look like it.
    refused({"quant_method": "bitnet"}, plain, "quant_method is 'bitnet'; fp8, .* can be read")
    refused({"bits": 4}, plain, "quant_method is None")
    refused(FP8 | {"fmt": "e5m2"}, plain, "fmt is 'e5m2'; 'e4m3'")
    refused(FP8 | {"expert_dtype": "fp4"}, plain, "expert_dtype is 'fp4'")
    refused(FP8 | {"hadamard": True}, plain, "hadamard is True; what it asks for is not known")
    refused(FP8 | {"weight_block_size": [128]}, plain, "two sizes are right")
    refused(config | {"transform_config": {"config_groups": {"R1": {}}}}, tensors, "rotations")
    refused(config | {"sparsity_config": {"format": "sparse-bitmask"}}, tensors, "sparse format")
    refused(config | {"format": "nvfp4-pack-quantized"}, tensors, "format is 'nvfp4")
    refused(config | {"format": "dense"}, tensors, "format is 'dense'")
    refused(gptq | {"bits": 3}, plain, "bits is 3; 2 or 4 or 8 can be read")
    refused(gptq | {"checkpoint_format": "marlin"}, plain, "checkpoint_format is 'marlin'")
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}
    refused(awq, plain, "version is 'gemv'; 'gemm'")
    refused({"quant_method": "bitsandbytes", "load_in_2bit": True}, plain, "load_in_2bit is True")


def test_tensors_that_do_not_belong_together_are_refused(tmp_path):
    def refused(stem: str, words: str, changes: dict | None = None, **settings) -> None:
        file = next(file for file in REFERENCES if file.stem == stem)
        config, tensors, _ = reference(file)
        for end, tensor in (changes or {}).items():
            tensors.pop(LAYER + end)
            if tensor is not None:
                tensors[LAYER + end] = tensor
        with pytest.raises(ExportError, match=words):
            stored = open_checkpoint(directory(tmp_path, config | settings, tensors)).stored
            stored[NAME].read()

    integers = torch.zeros(1, dtype=torch.int32)
    refused("gptq_4", "has no scales", {".scales": None})
    refused("gptq_4", r"scales of .* has the shape \(4, 32\); \(2, 32\) is right", group_size=64)
    refused("gptq_4", "has no g_idx", {".g_idx": None}, desc_act=True)
    refused("gptq_4", "g_idx of .* has the groups 9 to 9", {".g_idx": integers.repeat(128) + 9})
    refused("gptq_4", "zero point of 0", {".qzeros": integers.new_full((4, 4), -1)})
    refused("awq", "zeros of .* has the shape", {".qzeros": integers})
    refused("nf4", "has no absmax", {".weight.absmax": None})
    refused("nf4", "is no JSON", {".weight.quant_state.bitsandbytes__nf4": torch.zeros(9).byte()})
    refused("nf4", "bytes for 4 bits of 4096 values", {".weight": torch.zeros(9).byte()})
    refused("bnb_int8", "weight_format|is 1", {".weight_format": torch.tensor(1).byte()})
    refused("compressed_w4a16", "fits none of config_groups", {".weight_scale": torch.zeros(32, 3)})
    refused("compressed_w8a8", "scale", {".weight_scale": torch.zeros(32, 1, dtype=torch.int32)})
    refused("compressed_fp8_block", "codes of .* is F32", {".weight": torch.zeros(32, 128)})


def test_a_changed_checkpoint_is_read_or_refused_in_one_line(tmp_path):
    """See tests/mutate_quantized.py."""
    outcomes = Counter(outcome(mutated(tmp_path / "model", seed)) for seed in range(120))
    assert outcomes["read"] > 10 and outcomes["refused"] > 10
