"""Tiny checkpoints of every kind that the exporter reads, with random weights: GGUF with each of
the two tokenizers, dense and with experts; directories of one file and of several."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenloop.export.checkpoint.gguf_architectures import ARCHITECTURES, NAMES
from tokenloop.export.checkpoint.sentencepiece_bpe import sentencepiece_model
from tokenloop.models import by_model_type

TEMPLATE = "{% for message in messages %}{{ message.content }}<end_of_turn>\n{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<end_of_turn>"]
VOCAB_SIZE = 2 + len(SPECIAL) + 256
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [2, 3],
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gemma3_text": {
        "query_pre_attn_scalar": 32, "sliding_window": 16, "rms_norm_eps": 1e-6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma4_text": {
        "num_global_key_value_heads": 1, "global_head_dim": 48, "attention_k_eq_v": True,
        "sliding_window": 16, "final_logit_softcapping": 5.0, "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
            },
        },
    },
    "llama": {"rope_parameters": LLAMA_3, "tie_word_embeddings": True},
    "qwen2": {
        "head_dim": None, "rope_theta": 1e6,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.1,
        },
    },
    "qwen3_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
        },
    },
    "qwen3_next": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2,
    },
}  # fmt: skip
HEADERS = {
    "gemma3": {
        "attention.sliding_window": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    },
    "llama": {},
    "qwen2": {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 16.0,
    },
    "qwen3moe": {
        "expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32,
    },
}  # fmt: skip
MODEL_TYPES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}


def write_checkpoints(directory: Path) -> list[Path]:
    """Write all of them into `directory`, which is made, and return their paths."""
    directory.mkdir()
    paths = [write_gguf(directory / f"{name}.gguf", name) for name in HEADERS]
    kinds = ("tokenizer.json", "tokenizer.model")
    for i, model_type in enumerate(CONFIGS):
        name = f"{model_type}{'-sharded' if i % 2 else ''}"
        paths.append(write_directory(directory / name, model_type, kinds[i // 2 % 2], bool(i % 2)))
    return paths


def config_of(model_type: str) -> dict:
    return {"model_type": model_type} | SIZES | CONFIGS[model_type]


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    """A tensor for each parameter of the config's network."""
    module = by_model_type()[config["model_type"]]
    with torch.device("meta"):
        network = module.Network(module.Config.from_dict(config), 1)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(parameter.shape).normal_(generator=generator)
        for name, parameter in network.named_parameters()
    }


def write_directory(
    path: Path, model_type: str, tokenizer: str, sharded: bool, **changes: int
) -> Path:
    """`changes` are of the config."""
    path.mkdir()
    config = config_of(model_type) | changes
    config = {key: value for key, value in config.items() if value is not None}
    weights = {name: tensor.half() for name, tensor in random_weights(config).items()}
    if sharded:
        names = sorted(weights)
        weight_map = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            save_file(
                {name: weights[name] for name in names if weight_map[name] == file}, path / file
            )
        write_json(path / "model.safetensors.index.json", {"weight_map": weight_map})
        (path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        save_file(weights, path / "model.safetensors")
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2]})
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    templates = [{"name": "default", "template": TEMPLATE}]
    write_json(path / "tokenizer_config.json", settings | {"chat_template": templates})
    if tokenizer == "tokenizer.json":
        write_byte_tokenizer(path / tokenizer)
    else:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in sentencepiece_keys().items()}
        (path / tokenizer).write_bytes(sentencepiece_model(path, metadata)[0])
    return path


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_byte_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path))


def sentencepiece_keys() -> dict:
    """A SentencePiece vocabulary, by GGUF's keys without `tokenizer.ggml.`."""
    tokens = [*SPECIAL, "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": -np.arange(len(tokens), dtype=np.float32),
        "token_type": np.array([3, 3, 3, 4, 1, 1] + [6] * 256, np.int32),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
    }


def byte_level_keys() -> dict:
    """A byte-level vocabulary likewise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*SPECIAL, *alphabet, "ab", "abc"],
        "token_type": np.array([3] * 4 + [1] * 258, np.int32),
        "merges": ["a b", "ab c"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 3,
        "add_bos_token": False,
    }


def write_gguf(path: Path, architecture: str) -> Path:
    config = config_of(MODEL_TYPES.get(architecture, architecture))
    writer = gguf.GGUFWriter(path, architecture)
    header = {
        "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
    }  # fmt: skip
    if config["head_dim"] is not None:
        header["attention.key_length"] = config["head_dim"]
    keys = sentencepiece_keys() if architecture in ("gemma3", "llama") else byte_level_keys()
    values = {f"{architecture}.{k}": v for k, v in (header | HEADERS[architecture]).items()}
    values |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    values["tokenizer.chat_template"] = TEMPLATE
    add_values(writer, values)
    if architecture == "llama":
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 16, dtype=np.float32))
    for name, data in gguf_tensors(architecture, random_weights(config)).items():
        if data.ndim > 1 and data.shape[-1] % 32 == 0 and "embd" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_values(writer: gguf.GGUFWriter, values: dict) -> None:
    """Add keys with values of any type."""
    add = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string, list: writer.add_array, np.ndarray: writer.add_array,
    }  # fmt: skip
    for key, value in values.items():
        add[type(value)](key, value.tolist() if isinstance(value, np.ndarray) else value)


def gguf_tensors(architecture: str, weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The network's parameters under GGUF's names."""
    whole = {name: key for key, name in NAMES.items() if name is not None}
    parts = {name: key for key, name in ARCHITECTURES[architecture].block_names.items()}
    tensors = {}
    for name, weight in weights.items():
        data = weight.numpy()
        if name in whole:
            tensors[whole[name]] = data
            continue
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()
        if rest == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=1)):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = np.ascontiguousarray(half)
        elif rest == "mlp.experts.down_proj":
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = data
        else:
            module, kind = rest.rsplit(".", 1)
            tensors[f"blk.{layer}.{parts[module]}.{kind}"] = data
    return tensors
