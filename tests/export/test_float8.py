"""Weights in float8: the recipe `fp8`, and checkpoints in float8 that are kept."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton", reason="triton is not installed")

from tests.export.packed import layers_by_names, loaded, packed_layers  # noqa: E402
from tests.export.test_cuda_prefill import chunk_of  # noqa: E402
from tests.models.eager import prompt  # noqa: E402
from tests.models.tiny_models import ROW_OF, make_reference, network_of  # noqa: E402
from tests.tiny_checkpoints import write_directory  # noqa: E402
from tokenloop.export.command import ANY, export, parse_arguments  # noqa: E402
from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.kept_weights import Keeping, can_keep  # noqa: E402
from tokenloop.export.launches.cuda_prefill import CudaPrefill  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.packed_weights import PackedHead, pack_blocks, pack_head  # noqa: E402
from tokenloop.export.recipes import FP8  # noqa: E402
from tokenloop.models.kernels.linear.packing import (  # noqa: E402
    FLOAT8,
    quantize_float8,
    quantize_int8,
    round_float8,
)
from tokenloop.models.kernels.linear.reference import dequantize  # noqa: E402
from tokenloop.models.kernels.linear_chunk import operator  # noqa: E402
from tokenloop.models.moe import Experts  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "interpreted_ranges")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 16


def logits_of(method: torch.nn.Module, packed: torch.nn.Module) -> torch.Tensor:
    """After two prompts at once, and after a step of four rows."""
    ids = {0: prompt(9, 0), 2: prompt(5, 2)}
    token, position = torch.tensor([[5], [6], [7], [8]]), torch.tensor([9, 0, 5, 0])
    with torch.no_grad():
        if isinstance(method, CudaPrefill):
            given = chunk_of(ids, dict.fromkeys(ids, 0), 128, 3)
            prompts = method(*(x.to(DEVICE) for x in given))[:2].cpu()
            hidden = packed.embed(token.to(DEVICE))
            return torch.cat([prompts, method.step(hidden, position.to(DEVICE)).cpu()])
        prompts = [
            method.prefill(tokens, torch.arange(tokens.shape[1]), torch.tensor([row]))
            for row, tokens in ids.items()
        ]
        return torch.cat([*prompts, method.decode(token, position)])


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the logits after most places: of one in many a router may choose otherwise."""
    squares = (actual - expected).square().mean(1) / expected.square().mean(1)
    return squares.sqrt().median().item()


def test_steps_and_prompts_of_the_recipe_give_the_logits_of_its_weights(monkeypatch):
    # Tests of the operators compare what is converted in memory with what is in tiles.
    monkeypatch.setattr(operator, "IN_TILE", 0)
    # With experts beside a feed-forward of every token.
    case = "gemma4_text, experts beside"
    shallow = ROW_OF[case].shallow
    hf = make_reference(case, **shallow, head_dim=32, global_head_dim=64)
    packed = network_of(ROW_OF[case], hf, SLOTS, 4, torch.bfloat16).to(DEVICE)
    plain = network_of(ROW_OF[case], hf, SLOTS, 4)
    before = logits_of(plain, plain)
    for name, layer in plain.named_modules():
        # Routers are not packed. The head may be the embedding, which stays as it is.
        if isinstance(layer, torch.nn.Linear) and not name.endswith(".gate"):
            make = quantize_int8 if name == "lm_head" else quantize_float8
            values = dequantize(*make(layer.weight), layer.in_features)
            layer.weight = torch.nn.Parameter(values, requires_grad=False)
        if isinstance(layer, Experts):
            for table in (layer.gate_up_proj, layer.down_proj):
                rounded = [round_float8(matrix) for matrix in table]
                table.copy_(torch.stack([w.float() * scale[:, None] for w, scale in rounded]))
    step = CudaStep(packed, FP8)
    floats = {layer.scores.weight for layer in step.layers}
    packings = {p.weight.dtype for p in packed_layers(step.layers) if p.weight not in floats}
    assert packings == {FLOAT8} and step.head.weight.dtype == torch.int16
    assert all(layer.experts.down_proj.dtype == FLOAT8 for layer in step.layers)
    actual, expected = logits_of(CudaPrefill(step, packed), packed), logits_of(plain, plain)
    # Activations are bfloat16 in the one and float32 in the other. Float8 itself makes more of a
    # difference.
    assert distance(actual, expected) < 0.03 < distance(before, expected)


def float8_checkpoint(path: Path, form: str, **changes) -> Path:
    """A tiny checkpoint whose layers' linear weights are float8, with scales by `form`."""
    write_directory(path, "llama", "tokenizer.json", sharded=False, **changes)
    tensors = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if weight.ndim != 2 or "layers" not in name:
            tensors[name] = weight
            continue
        weight, (rows, columns) = weight.float(), weight.shape
        if "block" in form:
            size = 64 if "64" in form else 128
            padded = torch.nn.functional.pad(weight, (0, -columns % size, 0, -rows % size))
            blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).abs()
            scale = blocks.amax((1, 3)) / 448
            each = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
        else:
            scale = weight.abs().amax(1, keepdim=True) / 448
            scale = each = scale.amax() if form == "tensor" else scale
        if form == "block powers":
            scale, each = (x.log2().ceil().exp2() for x in (scale, each))
        name = name.removesuffix("weight")
        tensors[name + "weight"] = (weight / each).clamp(-448, 448).to(FLOAT8)
        tensors[name + ("weight_scale_inv" if "block" in form else "weight_scale")] = scale
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if "block" in form:
        config["quantization_config"]["weight_block_size"] = [size, size]
    if form == "compressed":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8}


@pytest.mark.parametrize(
    "form", ["tensor", "row", "compressed", "block 128", "block 64", "block powers"]
)
def test_a_checkpoint_s_float8_is_kept(tmp_path, form):
    path = float8_checkpoint(tmp_path / "model", form, **WIDE)
    checkpoint, network = loaded(path, torch.bfloat16)
    assert can_keep(checkpoint, "launches")
    assert not any(can_keep(checkpoint, other) for other in ("inductor", "xnnpack", "portable"))
    keeping = Keeping("launches", torch.bfloat16)
    blocks = pack_blocks(network, keeping)
    pack_head(network, keeping)
    assert len(keeping.kept) == 14 and keeping.left == [] and keeping.without == 1
    assert not isinstance(network.lm_head, PackedHead)
    (line,) = keeping.lines()
    assert "14 layers have the checkpoint's numbers and scales; 1 are neither" in line
    stored = load_file(path / "model.safetensors")
    for names, packed in layers_by_names(blocks):
        expected = torch.cat([checkpoint.stored[name].read() for name in names])
        assert packed.weight.dtype == FLOAT8 and packed.scale.dtype == torch.float32
        groups = packed.inputs // (64 if form == "block 64" else 128) if "block" in form else 1
        assert packed.scale.shape == (groups, len(expected))
        # To the last bit of float32, and bytes as they are.
        assert torch.equal(dequantize(packed.weight, packed.scale, packed.inputs), expected)
        bytes_of = torch.cat([stored[name].view(torch.uint8) for name in names])
        assert torch.equal(*(x.flatten().bincount() for x in (bytes_of, bytes_in(packed))))


def bytes_in(packed: torch.nn.Module) -> torch.Tensor:
    return packed.weight.view(torch.uint8)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter takes 5 s")
@pytest.mark.parametrize("form", ["row", "block 128"])
def test_steps_and_prompts_of_kept_float8_give_the_checkpoint_s_logits(tmp_path, form):
    path = float8_checkpoint(tmp_path / "model", form, head_dim=32, **WIDE)
    _, packed = loaded(path, torch.bfloat16, SLOTS, 4)
    _, plain = loaded(path, torch.float32, SLOTS, 4)
    packed = packed.to(DEVICE)
    step = CudaStep(packed, Keeping("launches", torch.bfloat16))
    assert {layer.weight.dtype for layer in packed_layers(step.layers)} == {FLOAT8}
    actual, expected = logits_of(CudaPrefill(step, packed), packed), logits_of(plain, plain)
    assert distance(actual, expected) < 0.03


def test_blocks_that_are_cut_off_have_no_layout(tmp_path):
    path = float8_checkpoint(tmp_path / "model", "block 128", **WIDE | {"intermediate_size": 200})
    _, network = loaded(path, torch.bfloat16)
    keeping = Keeping("launches", torch.bfloat16)
    blocks = pack_blocks(network, keeping)
    # Rows may be; the inputs of `down` are 200.
    assert len(keeping.kept) == 12 and keeping.without == 2
    assert blocks[0].down.scale is None


def test_layers_of_which_one_is_float8_and_one_integers_are_not_kept(tmp_path):
    from tokenloop.export.checkpoint.contents import Grid
    from tokenloop.export.kept_weights import Layout, layout

    float8 = Grid(-448, 448, 128, lambda: None, is_float8=True)
    assert layout("launches", [float8], 512) == Layout(8, 128, True)
    assert layout("launches", [float8, float8._replace(group_size=64)], 512) == Layout(8, 64, True)
    assert layout("launches", [float8, Grid(-128, 127, 128, lambda: None)], 512) is None
    assert layout("launches", [float8._replace(group_size=16)], 512) is None


def test_other_backends_refuse_float8_by_name(tmp_path, capsys):
    path = float8_checkpoint(tmp_path / "model", "row", **WIDE)
    arguments = ["--model", str(path), "--output", str(tmp_path / "artifact")]
    for backend in ("xnnpack", "inductor", "portable", "cuda"):
        with pytest.raises(SystemExit):
            parse_arguments(ANY, [*arguments, "--backend", backend, "--quant", "fp8"])
        assert f"--quant fp8 is not for --backend {backend}" in capsys.readouterr().err
    options = parse_arguments(ANY, [*arguments, "--backend", "inductor", "--quant", "keep"])
    with pytest.raises(ExportError, match="no integers or float8 that --backend inductor has a l"):
        export(ANY, options, lambda _: None)
