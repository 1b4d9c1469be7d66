"""Routed experts of quantized checkpoints, kept as they are: MXFP4, and float8 with scales of
blocks, rows or tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton is not installed")

from tests.export.packed import loaded  # noqa: E402
from tests.export.test_float8 import DEVICE, SLOTS, distance, logits_of  # noqa: E402
from tests.tiny_checkpoints import SIZES, random_weights  # noqa: E402
from tokenloop.export.checkpoint.contents import Grid  # noqa: E402
from tokenloop.export.kept_weights import Keeping, can_keep, experts_layout  # noqa: E402
from tokenloop.export.launches.cuda_prefill import CudaPrefill  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.packed_weights import pack_blocks  # noqa: E402
from tokenloop.models.kernels.experts.packing import dequantize, pack_float4  # noqa: E402
from tokenloop.models.moe import Experts  # noqa: E402

EXPERTS = 5
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_size": 128, "head_dim": 32}


def written(path: Path, config: dict, quantization: dict, convert) -> Path:
    """A checkpoint of random weights, of which `convert` makes those of experts' matrices."""
    path.mkdir()
    config = SIZES | config
    tensors = {}
    for name, weight in random_weights(config).items():
        is_table = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        tensors |= convert(name, weight) if is_table else {name: weight.half() / 8}
    save_file(tensors, path / "model.safetensors")
    config |= {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


def mxfp4_checkpoint(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = *weight.shape[:2], weight.shape[2] // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    config = {"model_type": "gpt_oss", "intermediate_size": 96, "num_local_experts": EXPERTS}
    return written(path, MOE | config, {"quant_method": "mxfp4"}, convert)


def float8_checkpoint(path: Path, form: str, inner: int = 128) -> Path:
    """Matrices of each expert and projection, as they are published, or of all experts."""

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if form == "stacked":
            return scaled(name, weight)
        prefix, _, table = name.rpartition(".")
        names = ("gate_proj", "up_proj") if table == "gate_up_proj" else ("down_proj",)
        tensors = {}
        for expert, matrix in enumerate(weight):
            for part, rows in zip(names, matrix.chunk(len(names))):
                tensors |= scaled(f"{prefix}.{expert}.{part}.weight", rows)
        return tensors

    def scaled(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        *outer, rows, columns = weight.shape
        size = (1, columns) if form == "row" else (rows, columns) if form == "tensor" else (64, 64)
        padded = torch.nn.functional.pad(weight, (0, -columns % size[1], 0, -rows % size[0]))
        blocks = padded.unflatten(-1, (-1, size[1])).unflatten(-3, (-1, size[0]))
        scale = blocks.abs().amax((-3, -1)) / 448
        each = scale.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)
        values = weight / each[..., :rows, :columns]
        suffix = "_scale" if form in ("row", "tensor") else "_scale_inv"
        return {
            name: values.clamp(-448, 448).to(torch.float8_e4m3fn), name + suffix: scale / 8,
        }  # fmt: skip

    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if form not in ("row", "tensor"):
        quantization["weight_block_size"] = [64, 64]
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": inner, "norm_topk_prob": True}
    return written(path, MOE | config, quantization, convert)


def tables_of(network: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    modules = (module for module in network.modules() if isinstance(module, Experts))
    return [(experts.gate_up_proj, experts.down_proj) for experts in modules]


@pytest.mark.parametrize("form", ["mxfp4", "block", "stacked", "row", "tensor"])
def test_experts_have_the_checkpoint_s_values_to_the_last_bit(tmp_path, form):
    path = tmp_path / "model"
    path = mxfp4_checkpoint(path) if form == "mxfp4" else float8_checkpoint(path, form)
    checkpoint, network = loaded(path, torch.bfloat16)
    assert can_keep(checkpoint, "launches")
    assert not any(can_keep(checkpoint, name) for name in ("xnnpack", "inductor", "portable"))
    _, plain = loaded(path, torch.float32)
    keeping = Keeping("launches", torch.bfloat16)
    blocks = pack_blocks(network, keeping)
    assert len(blocks) == SIZES["num_hidden_layers"]
    for block, tables in zip(blocks, tables_of(plain), strict=True):
        kept, (gate_up, down) = block.experts, tables
        assert torch.equal(dequantize(kept.gate_up_proj, kept.gate_up_scale), gate_up)
        assert torch.equal(dequantize(kept.down_proj, kept.down_scale), down)
        packing = {"mxfp4": torch.int16}.get(form, torch.float8_e4m3fn)
        assert {kept.gate_up_proj.dtype, kept.down_proj.dtype} == {packing}
    (line,) = keeping.lines()
    assert f"numbers and scales, and the routed experts of {len(blocks)} layers; " in line
    # No other backend has a layout for them.
    _, again = loaded(path, torch.bfloat16)
    keeping = Keeping("inductor", torch.bfloat16)
    blocks = pack_blocks(again, keeping)
    assert all(isinstance(block.experts, Experts) for block in blocks)
    (line,) = keeping.lines()
    assert f"the routed experts of {len(blocks)} layers are bfloat16, for --backend ind" in line
    assert f"with {'float4' if form == 'mxfp4' else 'float8'} in groups of" in line


def test_experts_that_no_layout_fits_are_floats_and_named(tmp_path):
    path = float8_checkpoint(tmp_path / "model", "block", inner=96)
    _, network = loaded(path, torch.bfloat16)
    keeping = Keeping("launches", torch.bfloat16)
    blocks = pack_blocks(network, keeping)
    # The last block of a row of `down` is cut off.
    assert all(isinstance(block.experts, Experts) for block in blocks)
    assert "routed experts of 2 layers are bfloat16, for" in keeping.lines()[0]
    float8 = Grid(-448, 448, 128, lambda: None, is_float8=True)
    assert experts_layout("launches", float8, 512) == 128
    assert experts_layout("launches", float8._replace(group_size=512), 512) == 512
    assert experts_layout("launches", float8._replace(group_size=192), 384) == 64
    assert experts_layout("launches", float8._replace(group_size=32), 512) is None
    assert experts_layout("launches", Grid(-8, 7, 128, lambda: None), 512) is None
    assert experts_layout("inductor", float8, 512) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter takes half a minute")
@pytest.mark.parametrize("form", ["mxfp4", "block"])
def test_steps_and_prompts_of_kept_experts_give_the_checkpoint_s_logits(tmp_path, form):
    path = tmp_path / "model"
    path = mxfp4_checkpoint(path) if form == "mxfp4" else float8_checkpoint(path, form)
    _, packed = loaded(path, torch.bfloat16, SLOTS, 4)
    _, plain = loaded(path, torch.float32, SLOTS, 4)
    # What a checkpoint has lies in the host's memory.
    step = CudaStep(packed, Keeping("launches", torch.bfloat16)).to(DEVICE)
    packed = packed.to(DEVICE)
    assert all(not isinstance(layer.experts, Experts) for layer in step.layers)
    actual, expected = logits_of(CudaPrefill(step, packed), packed), logits_of(plain, plain)
    assert distance(actual, expected) < 0.03


def test_a_float4_lies_in_the_words_as_the_kernels_read_it():
    codes = torch.arange(32, dtype=torch.uint8) % 16
    words = pack_float4(codes)
    assert words.shape == (8,)
    for word in range(8):
        for field in range(4):
            assert words[word].item() >> 4 * field & 15 == codes[8 * field + word]
