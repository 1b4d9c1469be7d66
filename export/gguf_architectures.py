"""GGUF models in Hugging Face's terms: config.json's keys, and its names and values of tensors.

One `Architecture` per `general.architecture`; only names, norms and keys differ between them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from export.errors import ExportError
from export.gguf_reader import GgufTensor, read_header


class Architecture(NamedTuple):
    """How one `general.architecture` reads in Hugging Face's terms."""

    config: Callable[[Path, dict[str, Any], dict[str, GgufTensor]], dict[str, Any]]
    names: dict[str, str]
    block_names: dict[str, str]  # blk.N.<key>.weight -> model.layers.N.<value>.weight
    norm_offset: float  # what llama.cpp's converter added to the weights of norms


def gemma3_config(path: Path, metadata: dict, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """`metadata` as the config.json of a Gemma3TextConfig. Defaults are llama.cpp's for gemma3."""

    def required(key: str) -> Any:
        if f"gemma3.{key}" not in metadata:
            raise ExportError(f"{path} has no key gemma3.{key}, which a Gemma 3 model needs")
        return metadata[f"gemma3.{key}"]

    def optional(key: str, default: Any) -> Any:
        return metadata.get(f"gemma3.{key}", default)

    if "token_embd.weight" not in tensors:
        raise ExportError(f"{path} has no tensor token_embd.weight, which every model needs")
    hidden_size, n_heads = required("embedding_length"), required("attention.head_count")
    n_layers, head_dim = required("block_count"), required("attention.key_length")
    pattern = optional("attention.sliding_window_pattern", 6)
    if not isinstance(pattern, int):
        raise ExportError(
            f"{path}: gemma3.attention.sliding_window_pattern is {pattern}; a whole number is right"
        )
    scaling = optional("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ExportError(
            f"{path}: gemma3.rope.scaling.type is {scaling!r}; none and linear are supported"
        )
    rope_scaling = None
    if scaling == "linear":
        rope_scaling = {"rope_type": "linear", "factor": required("rope.scaling.factor")}
    return {
        "model_type": "gemma3_text",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": required("attention.head_count_kv"),
        "head_dim": head_dim,
        # The file does not say. llama.cpp tells the 27B, the one exception, by its 62 layers.
        "query_pre_attn_scalar": hidden_size // n_heads if n_layers == 62 else head_dim,
        "rms_norm_eps": required("attention.layer_norm_rms_epsilon"),
        "rope_theta": required("rope.freq_base"),
        "rope_local_base_freq": optional("rope.freq_base_swa", 10000.0),
        "rope_scaling": rope_scaling,
        "sliding_window": required("attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "max_position_embeddings": required("context_length"),
        "final_logit_softcapping": optional("final_logit_softcapping", None),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


ARCHITECTURES = {
    "gemma3": Architecture(
        config=gemma3_config,
        names={
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        },
        block_names={
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        norm_offset=1.0,
    ),
}


class GgufModel(NamedTuple):
    """A GGUF file in Hugging Face's terms; `readers` give float32 tensors."""

    metadata: dict[str, Any]
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    readers: dict[str, Callable[[], torch.Tensor]]


def read_model(path: Path) -> GgufModel:
    """Open the GGUF file `path` without reading tensor data.

    Errors: those of `read_header`; ExportError for an unknown architecture, a missing key, or a
    tensor that the architecture does not have.
    """
    metadata, tensors = read_header(path)
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{path} has the architecture {name!r}; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    renamed = {_renamed(architecture, tensor): tensor for tensor in tensors.values()}
    return GgufModel(
        metadata,
        architecture.config(path, metadata, tensors),
        {hf_name: tensor.shape for hf_name, tensor in renamed.items()},
        {
            hf_name: partial(_read, tensor, architecture.norm_offset)
            for hf_name, tensor in renamed.items()
        },
    )


def _renamed(architecture: Architecture, tensor: GgufTensor) -> str:
    if tensor.name in architecture.names:
        return architecture.names[tensor.name]
    match tensor.name.split("."):
        case ["blk", layer, part, "weight"] if part in architecture.block_names:
            return f"model.layers.{layer}.{architecture.block_names[part]}.weight"
    raise ExportError(f"{tensor.path} has a tensor of no known meaning: {tensor.name}")


def _read(tensor: GgufTensor, norm_offset: float) -> torch.Tensor:
    values = tensor.dequantize()
    return values.sub_(norm_offset) if tensor.name.endswith("norm.weight") else values
