"""GGUF models in Hugging Face's terms: config.json's keys, and its names and values of tensors.

There is one `Architecture` for each `general.architecture`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenloop.export.checkpoint.contents import Checkpoint, Grid, StoredTensor
from tokenloop.export.checkpoint.gguf_metadata import ARCHITECTURE_KINDS, check_value
from tokenloop.export.checkpoint.gguf_reader import GRIDS, GgufTensor, read_header
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

# Divisors of the rotary frequencies, one for each pair of a head.
ROPE_FACTORS = "rope_freqs.weight"
# The keys `rope.scaling.*` that need no more than is done here; others are refused.
ROPE_SCALING_KEYS = {"type", "factor", "finetuned", "original_context_length"}


class Keys(NamedTuple):
    """The values of one architecture's keys, `<architecture>.<key>`.

    Errors: ExportError for a key that is required and missing, for one that has a value for each
    layer, and for a value that is not of the key's kind (gguf_metadata.py).
    """

    path: Path
    metadata: dict[str, Any]
    architecture: str

    def required(self, key: str) -> Any:
        name = f"{self.architecture}.{key}"
        if name not in self.metadata:
            raise ExportError(f"{self.path} has no key {name}, which the model needs")
        return self.optional(key, None)

    def optional(self, key: str, default: Any) -> Any:
        name = f"{self.architecture}.{key}"
        if name not in self.metadata:
            return default
        value = self.metadata[name]
        if isinstance(value, (list, np.ndarray)):
            raise ExportError(
                f"{self.path}: {name} has {len(value)} values; one for all layers is supported"
            )
        check_value(self.path, name, value, ARCHITECTURE_KINDS[key])
        return value

    def head_dim(self, default: int) -> int:
        """The size of a head's queries, keys and values, all of which the rotary embedding rotates.

        Errors: ExportError for a key that asks for another size.
        """
        head_dim = self.optional("attention.key_length", default)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (size := self.optional(key, head_dim)) != head_dim:
                raise ExportError(
                    f"{self.path}: {self.architecture}.{key} is {size}; {head_dim}, the size of a "
                    "key's head, is supported"
                )
        return head_dim

    def rope_scaling(self, factors: GgufTensor | None, head_dim: int) -> dict[str, Any] | None:
        """As in config.json: None, linear, or a divisor of each pair's frequency as "factors".

        llama.cpp scales linearly where a factor has no type, and 0 is no factor. The tensor
        `factors` (Llama 3.1's) divides frequencies besides. Errors: ExportError for another type,
        for a key that is not understood, and for factors that are not those of a head's pairs.
        """
        scaling = f"{self.architecture}.rope.scaling."
        for name in self.metadata:
            if name.startswith(scaling) and name.removeprefix(scaling) not in ROPE_SCALING_KEYS:
                raise ExportError(f"{self.path} has the key {name}, which is not supported")
        kind = self.optional("rope.scaling.type", None)
        if kind not in (None, "none", "linear"):
            raise ExportError(
                f"{self.path}: {scaling}type is {shown(kind)}; none and linear are supported"
            )
        # The second name is the older one.
        factor = self.optional("rope.scaling.factor", self.optional("rope.scale_linear", None))
        if kind == "linear" and factor is None:
            self.required("rope.scaling.factor")
        factor = None if kind == "none" else factor
        if factors is None:
            return {"rope_type": "linear", "factor": factor} if factor else None
        divisors = factors.dequantize() * (factor or 1.0)
        if divisors.shape != (head_dim // 2,) or not (divisors.isfinite() & (divisors > 0)).all():
            raise ExportError(
                f"{self.path}: {factors.name} of the shape {factors.shape} is no list of "
                f"{head_dim // 2} positive numbers, one for each pair of a head"
            )
        return {"rope_type": "factors", "factors": divisors.tolist()}


NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    ROPE_FACTORS: None,  # the config has it
}
# blk.N.<key>.weight -> model.layers.N.<value>.weight; or .bias
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Architecture(NamedTuple):
    """How one `general.architecture` reads in Hugging Face's terms.

    llama.cpp's converter adds `norm_offset` to the weights of norms. Where it is `permuted`, it
    puts the rows of queries and keys that rotate together next to each other; Hugging Face has them
    half a head apart.
    """

    config: Callable[[Keys, dict[str, GgufTensor]], dict[str, Any]]
    block_names: Mapping[str, str] = BLOCK_NAMES
    norm_offset: float = 0.0
    permuted: bool = False


def common_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """What every architecture's config.json has, under the same names. Defaults are llama.cpp's."""
    if "token_embd.weight" not in tensors:
        raise ExportError(f"{keys.path} has no tensor token_embd.weight, which every model needs")
    hidden_size, heads = keys.required("embedding_length"), keys.required("attention.head_count")
    if not keys.optional("attention.key_length", None) and hidden_size % heads:
        raise ExportError(
            f"{keys.path}: {keys.architecture}.embedding_length is {hidden_size}, no multiple of "
            f"the {heads} heads, and the file has no {keys.architecture}.attention.key_length"
        )
    head_dim = keys.head_dim(hidden_size // heads)
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": keys.required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.required("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.required("rope.freq_base"),
        "rope_scaling": keys.rope_scaling(tensors.get(ROPE_FACTORS), head_dim),
        "max_position_embeddings": keys.required("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": keys.metadata.get("tokenizer.ggml.eos_token_id"),
    }


def gemma3_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Gemma3TextConfig. Defaults are llama.cpp's for gemma3."""
    common, head_dim = common_config(keys, tensors), keys.required("attention.key_length")
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
        "sliding_window_pattern": keys.optional("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": keys.optional("final_logit_softcapping", None),
    }


def qwen_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Qwen2Config, Qwen3Config or Qwen3MoeConfig."""
    config = common_config(keys, tensors)
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


def llama_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a LlamaConfig. Errors: ExportError for a mixture of experts (Mixtral)."""
    if experts := keys.optional("expert_count", 0):
        raise ExportError(
            f"{keys.path}: {keys.architecture}.expert_count is {experts}; a mixture of experts is "
            "not supported for it, 0 is right"
        )
    # llama.cpp's default.
    rope_theta = {f"{keys.architecture}.rope.freq_base": 10000.0}
    biases = {name.split(".")[-2] for name in tensors if name.endswith(".bias")}
    return common_config(keys._replace(metadata=rope_theta | keys.metadata), tensors) | {
        "model_type": keys.architecture,
        "intermediate_size": keys.required("feed_forward_length"),
        "attention_bias": any(name.startswith("attn_") for name in biases),
        "mlp_bias": any(name.startswith("ffn_") for name in biases),
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
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.gate_proj",
        "ffn_up_exps": "mlp.experts.up_proj",
        "ffn_down_exps": "mlp.experts.down_proj",
    },
)
ARCHITECTURES = {
    "gemma3": GEMMA3,
    "llama": Architecture(llama_config, permuted=True),
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen3moe": QWEN,
}


def open_gguf(path: Path) -> Checkpoint:
    """Open the GGUF file `path`. Its tensors are read as float32.

    Errors: those of `read_header`, and ExportError for an unknown architecture, a missing key, or a
    tensor that the architecture does not have.
    """
    metadata, tensors = read_header(path)
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{path} has the architecture {shown(name)}; supported in GGUF: "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    config = architecture.config(Keys(path, metadata, name), tensors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    stored = {}
    for tensor in tensors.values():
        hf_name = _renamed(architecture, tensor)
        if hf_name is not None:
            permuted = heads.get(tensor.name.split(".")[-2]) if architecture.permuted else None
            read = partial(_read, tensor, architecture.norm_offset, permuted)
            grid = partial(_grid, tensor, permuted) if tensor.type in GRIDS else None
            stored[hf_name] = StoredTensor(tensor.shape, "F32", read, grid)
    return Checkpoint(path, "gguf", config, (path,), stored, metadata)


def _renamed(architecture: Architecture, tensor: GgufTensor) -> str | None:
    if tensor.name in NAMES:
        return NAMES[tensor.name]
    match tensor.name.split("."):
        case ["blk", layer, part, "weight" | "bias" as kind] if part in architecture.block_names:
            return f"model.layers.{layer}.{architecture.block_names[part]}.{kind}"
    raise ExportError(f"{tensor.path} has a tensor of no known meaning: {tensor.name}")


def _read(tensor: GgufTensor, norm_offset: float, permuted_heads: int | None) -> torch.Tensor:
    values = tensor.dequantize()
    if permuted_heads is not None:
        return _permuted(values, permuted_heads)
    return values.sub_(norm_offset) if tensor.name.endswith("norm.weight") else values


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of pairs as Hugging Face has them, half a head apart."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _grid(tensor: GgufTensor, permuted_heads: int | None) -> Grid:
    least, most, size, _ = GRIDS[tensor.type]

    def scales() -> torch.Tensor:
        found = tensor.scales()
        return found if permuted_heads is None else _permuted(found, permuted_heads)

    return Grid(least, most, size, scales)
