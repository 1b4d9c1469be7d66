"""`--quant keep`: what is kept is what the checkpoint has, and what is not stays floating point."""

import gguf
import numpy as np
import pytest
import torch

from tests.export.compressed import compressed_checkpoint
from tests.export.packed import layers_by_names, loaded, packed_layers
from tokenloop.export.checkpoint.contents import Grid, NamedGrid
from tokenloop.export.command import ANY, export, parse_arguments
from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping, Layout, can_keep, codes_and_scales, layout
from tokenloop.export.packed_weights import (
    PackedHead,
    PackedLinear,
    pack_blocks,
    pack_head,
    pad_heads,
)
from tokenloop.export.pte.quantize import QuantizedLinear, keep
from tokenloop.models.kernels.linear.packing import weight_bits
from tokenloop.models.kernels.linear.reference import dequantize
from tokenloop.models.layers import Attention, kv_cache

pytestmark = pytest.mark.usefixtures("one_thread")


def grid(least: int, most: int, size: int, scale: float = 0.5) -> Grid:
    return Grid(least, most, size, lambda: torch.full((3, 512 // size), scale))


INT4, INT8 = (-8, 7), (-128, 127)
PROJECTED = "q_proj", "k_proj", "v_proj"


@pytest.mark.parametrize(
    ("backend", "grids", "expected"),
    [
        ("launches", [grid(*INT4, 64)], Layout(4, 64)),
        ("launches", [grid(*INT4, 512)], Layout(4, 128)),
        ("launches", [grid(*INT4, 128), grid(*INT4, 64)], Layout(4, 64)),
        ("launches", [grid(*INT4, 128), grid(*INT4, 32)], Layout(4, 32)),
        ("launches", [grid(*INT4, 16)], None),
        ("launches", [grid(*INT8, 512)], Layout(8, 512)),
        ("launches", [grid(*INT8, 512), grid(*INT4, 512)], Layout(8, 512)),
        ("launches", [grid(*INT8, 256)], Layout(8, 128)),
        ("launches", [grid(*INT8, 32), grid(*INT4, 64)], Layout(8, 32)),
        ("launches", [grid(-32, 31, 16)], None),
        ("launches", [grid(-15, 15, 128)], Layout(8, 128)),
        ("inductor", [grid(*INT4, 32)], Layout(4, 32)),
        ("inductor", [grid(-15, 15, 128)], Layout(8, 128)),
        ("inductor", [grid(*INT8, 32), grid(-32, 31, 16)], Layout(8, 16)),
        ("inductor", [grid(-255, 255, 128)], None),
        ("xnnpack", [grid(*INT4, 32)], Layout(4, 32)),
        ("xnnpack", [grid(*INT4, 32, 1 + 2**-10)], None),  # no number of bfloat16
        ("xnnpack", [grid(*INT4, 512, 1 + 2**-10)], Layout(4, 512)),
        ("xnnpack", [grid(*INT4, 16)], None),
        ("xnnpack", [grid(*INT8, 512)], Layout(8, 512)),
        ("xnnpack", [grid(*INT8, 32)], None),
        ("portable", [grid(*INT8, 512)], None),
    ],
)
def test_a_layout_holds_all_of_a_grid_or_there_is_none(backend, grids, expected):
    assert layout(backend, grids, 512) == expected


def test_heads_that_are_made_longer_keep_their_integers():
    attention = Attention(
        "full_attention", 40, 4, kv_cache("full_attention", 8, 1, 8, 2, 24, torch.float32), 1.0
    )
    for name, scale in (("q_proj", 0.5), ("k_proj", 0.25), ("v_proj", 2.0)):
        linear = attention.get_submodule(name)
        rows = linear.out_features
        scales = scale * torch.arange(1, rows + 1)[:, None]
        codes = torch.randint(-128, 128, (rows, 40))
        linear.weight = torch.nn.Parameter(codes * scales, requires_grad=False)
        linear.grid = NamedGrid(name, Grid(*INT8, 40, lambda scales=scales: scales))
    attention.requires_grad_(False)
    before = {name: codes_and_scales(attention.get_submodule(name), 40) for name in PROJECTED}
    pad_heads(attention, 32)
    for name, (codes, scales) in before.items():
        longer, theirs = codes_and_scales(attention.get_submodule(name), 40)
        heads = longer.unflatten(0, (-1, 32))
        assert torch.equal(heads[:, :24].flatten(0, 1), codes) and not heads[:, 24:].any()
        assert torch.equal(theirs.unflatten(0, (-1, 32))[:, :24].flatten(0, 1), scales)


WIDE = {"hidden_size": 256, "intermediate_size": 192, "num_attention_heads": 8}


@pytest.mark.parametrize("backend", ["launches", "inductor"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_packed_weights_are_the_checkpoint_s(tmp_path, backend, scale_dtype):
    path = compressed_checkpoint(tmp_path / "model", 64, scale_dtype=scale_dtype, **WIDE)
    checkpoint, network = loaded(path, torch.bfloat16)
    assert can_keep(checkpoint, backend)
    keeping = Keeping(backend, torch.bfloat16)
    blocks = pack_blocks(network, keeping)
    pack_head(network, keeping)
    assert len(keeping.kept) == 2 * 7 and keeping.left == [] and keeping.without == 1
    for i, block in enumerate(blocks):
        layers = [block.qkv, block.o, block.gate_up, block.down]
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]
        names += ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
        for packed, parts in zip(layers, names):
            stored = [checkpoint.stored[f"model.layers.{i}.{part}.weight"] for part in parts]
            expected = torch.cat([tensor.read() for tensor in stored])
            assert weight_bits(packed.weight, packed.inputs) == 4
            assert packed.scale.dtype == scale_dtype
            assert torch.equal(dequantize(packed.weight, packed.scale, packed.inputs), expected)


def test_what_has_no_layout_stays_floating_point(tmp_path):
    path = compressed_checkpoint(tmp_path / "model", 16, symmetric=False, **WIDE)
    checkpoint, network = loaded(path, torch.bfloat16)
    assert not can_keep(checkpoint, "launches") and can_keep(checkpoint, "inductor")
    keeping = Keeping("launches", torch.bfloat16)
    pack_blocks(network, keeping)
    assert keeping.kept == [] and len(keeping.left) == 14
    (line,) = keeping.lines()
    assert "14 are bfloat16" in line and "-10 to 9 in groups of 16" in line
    assert all(part.scale is None for part in packed_layers(network))
    keeping = Keeping("inductor", torch.bfloat16)
    _, network = loaded(path, torch.bfloat16)
    (block, _) = pack_blocks(network, keeping)
    expected = checkpoint.stored["model.layers.0.self_attn.o_proj.weight"].read()
    assert weight_bits(block.o.weight, block.o.inputs) == 8
    assert torch.equal(dequantize(block.o.weight, block.o.scale, block.o.inputs), expected)


def test_a_backend_without_a_layout_is_refused_and_the_others_named(tmp_path):
    path = compressed_checkpoint(tmp_path / "model", 64, scale_dtype=torch.float16, **WIDE)
    arguments = ["--model", str(path), "--quant", "keep", "--output", str(tmp_path / "artifact")]
    options = parse_arguments(ANY, [*arguments, "--backend", "xnnpack"])
    with pytest.raises(ExportError, match="xnnpack has a layout for; inductor and launches can"):
        export(ANY, options, lambda _: None)
    with pytest.raises(SystemExit):
        parse_arguments(ANY, [*arguments, "--backend", "portable"])


def test_rows_that_are_rearranged_keep_their_scales(tmp_path):
    """A hybrid's queries and gates, and the fused projections of its delta nets."""
    path = compressed_checkpoint(tmp_path / "model", 64, model_type="qwen3_next", **WIDE)
    _, network = loaded(path, torch.bfloat16)
    _, plain = loaded(path, torch.bfloat16)
    keeping = Keeping("launches", torch.bfloat16)
    kept, floats = pack_blocks(network, keeping), pack_blocks(plain, 0)
    assert any("q_proj" in name for name in keeping.kept)
    assert any("in_proj_qkvz" in name for name in keeping.kept)
    compared = 0
    for block, other in zip(kept, floats):
        for name, packed in block.named_children():
            if isinstance(packed, PackedLinear) and packed.scale is not None:
                weight = dequantize(packed.weight, packed.scale, packed.inputs).bfloat16()
                assert torch.equal(weight, getattr(other, name).weight)
                compared += 1
    assert compared >= 4


def test_xnnpack_keeps_groups_and_leaves_the_rest(tmp_path):
    path = compressed_checkpoint(tmp_path / "model", 64, **WIDE)
    checkpoint, network = loaded(path, torch.float32)
    keeping = Keeping("xnnpack", torch.float32)
    keep(network, keeping)
    assert len(keeping.kept) == 14 and keeping.without == 1
    layers = dict(network.named_modules())
    for name in keeping.kept:
        layer = layers[name.removesuffix(".weight")]
        assert isinstance(layer, QuantizedLinear) and (layer.bits, layer.group_size) == (4, 64)
        assert torch.equal(layer.dequantized(), checkpoint.stored[name].read())
    assert isinstance(network.model.embed_tokens, torch.nn.Embedding)
    assert type(network.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("backend", "kinds"),
    [
        ("inductor", ["Q4_0", "Q5_0", "Q8_0", "Q6_K"]),
        ("launches", ["Q4_0", "Q5_0", "Q8_0", "Q8_0"]),  # groups of 16 are too small for it
    ],
)
def test_ggufs_blocks_are_kept(tmp_path, backend, kinds):
    """Every type that has no minimum, and rows that the format has permuted."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    header = {
        "block_count": 2, "context_length": 64, "embedding_length": 256,
        "feed_forward_length": 256, "attention.head_count": 4,
    }  # fmt: skip
    for key, value in header.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]

    def add(name: str, kind: str) -> None:
        kind = gguf.GGMLQuantizationType[kind]
        size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (256, 256 // size, n_bytes), dtype=np.uint8)
        # Any bytes are codes. Scales are float16, here from 2^-6 to 2.
        at = slice(208, 210) if kind.name == "Q6_K" else slice(0, 2)
        scale = rng.uniform(0.02, 2, (256, 256 // size)).astype(np.float16)
        data[..., at] = scale[..., None].view(np.uint8)
        writer.add_tensor(name, data.reshape(256, -1), raw_dtype=kind)

    add("token_embd.weight", "Q8_0")
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(256, np.float32))
        for i, name in enumerate(names):
            # q, k and v lie together, and gate and up.
            add(f"blk.{layer}.{name}.weight", "Q4_0" if i < 3 and not layer else kinds[i % 4])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint, network = loaded(tmp_path / "model.gguf", torch.bfloat16)
    keeping = Keeping(backend, torch.bfloat16)
    blocks = pack_blocks(network, keeping)
    pack_head(network, keeping)
    assert len(keeping.kept) == 15 and keeping.left == [] and keeping.without == 0
    assert isinstance(network.lm_head, PackedHead)
    for names, packed in layers_by_names(blocks):
        expected = torch.cat([checkpoint.stored[name].read() for name in names])
        assert torch.equal(dequantize(packed.weight, packed.scale, 256), expected)
    assert weight_bits(blocks[0].qkv.weight, 256) == 4
