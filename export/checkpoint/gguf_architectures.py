"""GGUF models in Hugging Face's terms: config.json's keys, and its names and values of tensors.

There is one `Architecture` for each `general.architecture`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenloop.export.checkpoint.contents import Checkpoint, StoredTensor
from tokenloop.export.checkpoint.gguf_reader import GgufTensor, read_header
from tokenloop.export.errors import ExportError


class Keys(NamedTuple):
    """The values of one architecture's keys, `<architecture>.<key>`."""

    path: Path
    metadata: dict[str, Any]
    architecture: str

    def required(self, key: str) -> Any:
        name = f"{self.architecture}.{key}"
        if name not in self.metadata:
            raise ExportError(f"{self.path} has no key {name}, which the model needs")
        return self.metadata[name]

    def optional(self, key: str, default: Any) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def rope_scaling(self) -> dict[str, Any] | None:
        """As in config.json. Errors: ExportError for what is neither none nor linear."""
        kind = self.optional("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ExportError(
                f"{self.path}: {self.architecture}.rope.scaling.type is {kind!r}; none and linear "
                "are supported"
            )
        if kind == "none":
            return None
        return {"rope_type": "linear", "factor": self.required("rope.scaling.factor")}


class Architecture(NamedTuple):
    """How one `general.architecture` reads in Hugging Face's terms."""

    config: Callable[[Keys, dict[str, GgufTensor]], dict[str, Any]]
    block_names: dict[str, str]  # blk.N.<key>.weight -> model.layers.N.<value>.weight; or .bias
    norm_offset: float  # what llama.cpp's converter added to the weights of norms


def common_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """What every architecture's config.json has, under the same names."""
    if "token_embd.weight" not in tensors:
        raise ExportError(f"{keys.path} has no tensor token_embd.weight, which every model needs")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.required("embedding_length"),
        "num_hidden_layers": keys.required("block_count"),
        "num_attention_heads": keys.required("attention.head_count"),
        "num_key_value_heads": keys.required("attention.head_count_kv"),
        "rms_norm_eps": keys.required("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.required("rope.freq_base"),
        "rope_scaling": keys.rope_scaling(),
        "max_position_embeddings": keys.required("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": keys.metadata.get("tokenizer.ggml.eos_token_id"),
    }


def gemma3_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Gemma3TextConfig. Defaults are llama.cpp's for gemma3."""
    common, head_dim = common_config(keys, tensors), keys.required("attention.key_length")
    pattern = keys.optional("attention.sliding_window_pattern", 6)
    if not isinstance(pattern, int):
        raise ExportError(
            f"{keys.path}: gemma3.attention.sliding_window_pattern is {pattern}; a whole number is "
            "right"
        )
    # The file does not say. llama.cpp tells the 27B, the one exception, by its 62 layers.
    is_27b = common["num_hidden_layers"] == 62
    per_head = common["hidden_size"] // common["num_attention_heads"]
    return common | {
        "model_type": "gemma3_text",
        "intermediate_size": keys.required("feed_forward_length"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": per_head if is_27b else head_dim,
        "rope_local_base_freq": keys.optional("rope.freq_base_swa", 10000.0),
        "sliding_window": keys.required("attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "final_logit_softcapping": keys.optional("final_logit_softcapping", None),
    }


def qwen_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Qwen2Config, Qwen3Config or Qwen3MoeConfig."""
    common = common_config(keys, tensors)
    per_head = common["hidden_size"] // common["num_attention_heads"]
    config = common | {"head_dim": keys.optional("attention.key_length", per_head)}
    if keys.architecture != "qwen3moe":
        feed_forward = keys.required("feed_forward_length")
        return config | {"model_type": keys.architecture, "intermediate_size": feed_forward}
    expert_size = keys.required("expert_feed_forward_length")
    return config | {
        "model_type": "qwen3_moe",
        # Of no use where every layer has experts.
        "intermediate_size": keys.optional("feed_forward_length", expert_size),
        "moe_intermediate_size": expert_size,
        "num_experts": keys.required("expert_count"),
        "num_experts_per_tok": keys.required("expert_used_count"),
        # llama.cpp's own for qwen3moe, whose files need not say it.
        "norm_topk_prob": keys.optional("expert_weights_norm", True),
    }


NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3 = Architecture(
    gemma3_config,
    BLOCK_NAMES
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    norm_offset=1.0,
)
QWEN = Architecture(
    qwen_config,
    BLOCK_NAMES
    | {
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.gate_proj",
        "ffn_up_exps": "mlp.experts.up_proj",
        "ffn_down_exps": "mlp.experts.down_proj",
    },
    norm_offset=0.0,
)
ARCHITECTURES = {"gemma3": GEMMA3, "qwen2": QWEN, "qwen3": QWEN, "qwen3moe": QWEN}


def open_gguf(path: Path) -> Checkpoint:
    """Open the GGUF file `path`. Its tensors are read as float32.

    Errors: those of `read_header`, and ExportError for an unknown architecture, a missing key, or a
    tensor that the architecture does not have.
    """
    metadata, tensors = read_header(path)
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{path} has the architecture {name!r}; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    config = architecture.config(Keys(path, metadata, name), tensors)
    stored = {
        _renamed(architecture, tensor): StoredTensor(
            tensor.shape, "F32", partial(_read, tensor, architecture.norm_offset)
        )
        for tensor in tensors.values()
    }
    return Checkpoint(path, "gguf", config, (path,), stored, metadata)


def _renamed(architecture: Architecture, tensor: GgufTensor) -> str:
    if tensor.name in NAMES:
        return NAMES[tensor.name]
    match tensor.name.split("."):
        case ["blk", layer, part, "weight" | "bias" as kind] if part in architecture.block_names:
            return f"model.layers.{layer}.{architecture.block_names[part]}.{kind}"
    raise ExportError(f"{tensor.path} has a tensor of no known meaning: {tensor.name}")


def _read(tensor: GgufTensor, norm_offset: float) -> torch.Tensor:
    values = tensor.dequantize()
    return values.sub_(norm_offset) if tensor.name.endswith("norm.weight") else values
