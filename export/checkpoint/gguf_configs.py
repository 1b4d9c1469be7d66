"""The config.json of a GGUF model, from the keys of its header and the shapes of its tensors: one
function for each architecture, or for several that are alike."""

from typing import Any

import numpy as np

from tokenloop.export.checkpoint.gguf_keys import Keys
from tokenloop.export.checkpoint.gguf_reader import GgufTensor
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

# Divisors of the rotary frequencies, one for each pair of a head.
ROPE_FACTORS = "rope_freqs.weight"
# The same for texts of the original length, and for longer ones.
LONGROPE_FACTORS = {
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}


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
        "rope_theta": keys.optional("rope.freq_base", 10_000.0),
        "rope_scaling": keys.rope_scaling(tensors.get(ROPE_FACTORS), head_dim),
        "max_position_embeddings": keys.required("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": keys.metadata.get("tokenizer.ggml.eos_token_id"),
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
    """The config.json of a LlamaConfig, or of another with its fields, whose model_type is the
    architecture. Errors: ExportError for a mixture of experts (Mixtral)."""
    if experts := keys.optional("expert_count", 0):
        raise ExportError(
            f"{keys.path}: {keys.architecture}.expert_count is {experts}; a mixture of experts is "
            "not supported for it, 0 is right"
        )
    biases = {name.split(".")[-2] for name in tensors if name.endswith(".bias")}
    return common_config(keys, tensors) | {
        "model_type": keys.architecture,
        "intermediate_size": keys.required("feed_forward_length"),
        "attention_bias": any(name.startswith("attn_") for name in biases),
        "mlp_bias": any(name.startswith("ffn_") for name in biases),
    }


def granite_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a GraniteConfig. A scale of 0, or none, is llama.cpp's for no scale.

    Errors: ExportError as llama_config, and for layers that do not rotate.
    """
    config = llama_config(keys, tensors)
    if not keys.metadata.get("granite.rope.scaling.finetuned", True):
        raise ExportError(
            f"{keys.path}: granite.rope.scaling.finetuned is false, for layers that do not "
            "rotate; true is supported"
        )
    return config | {
        "attention_multiplier": keys.optional("attention.scale", 0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": keys.optional("embedding_scale", 0) or 1.0,
        "residual_multiplier": keys.optional("residual_scale", 0) or 1.0,
        "logits_scaling": keys.required("logit_scale"),
    }


def gpt_oss_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a GptOssConfig. YaRN's line is not cut to whole pairs, as the model has
    it; llama.cpp's own is.

    Errors: ExportError as common_config, and for two sizes of an expert.
    """
    config, size = common_config(keys, tensors), keys.required("expert_feed_forward_length")
    if (other := keys.optional("feed_forward_length", size)) != size:
        raise ExportError(
            f"{keys.path}: gpt-oss.feed_forward_length is {other}; {size}, the size of an expert, "
            "is right"
        )
    if (scaling := config["rope_scaling"]) and scaling["rope_type"] == "yarn":
        scaling["truncate"] = False
    return config | {
        "model_type": "gpt_oss",
        "intermediate_size": size,
        # Without one, transformers would take the 20B's.
        "rope_scaling": scaling or {"rope_type": "default"},
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in tensors),
        "num_local_experts": keys.required("expert_count"),
        "num_experts_per_tok": keys.required("expert_used_count"),
        "sliding_window": keys.required("attention.sliding_window"),
    }


def lfm2_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of an Lfm2Config. A layer without key/value heads is a short convolution.

    Errors: ExportError as common_config, and for numbers of heads that are not one and 0.
    """
    name = "lfm2.attention.head_count_kv"
    heads = np.asarray(keys.metadata.get(name, ())).tolist()
    if not isinstance(heads, list) or len(heads) != keys.required("block_count"):
        raise ExportError(f"{keys.path}: {name} is {shown(heads)}; one for each layer is right")
    if len(some := set(heads) - {0}) != 1:
        raise ExportError(f"{keys.path}: {name} is {shown(heads)}; 0 and one more are supported")
    config = common_config(keys._replace(metadata=keys.metadata | {name: some.pop()}), tensors)
    return config | {
        "model_type": "lfm2",
        "norm_eps": config["rms_norm_eps"],
        "intermediate_size": keys.required("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": keys.required("shortconv.l_cache"),
        "conv_bias": any(".shortconv." in each and each.endswith(".bias") for each in tensors),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
    }


def mistral3_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Ministral3Config: Ministral 3's, and Mistral Small 3's.

    Errors: ExportError as llama_config, and for a YaRN that is not Ministral 3's, which leaves the
    length of queries and keys as it is.
    """
    config = llama_config(keys, tensors)
    rope = {"rope_theta": config.pop("rope_theta")}
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        name = "rope.scaling.yarn_log_multiplier"
        if (value := keys.optional(name, None)) != 1:
            raise ExportError(f"{keys.path}: mistral3.{name} is {shown(value)}; 1 is supported")
        if (value := keys.optional("rope.scaling.attn_factor", 1.0)) != 1:
            raise ExportError(
                f"{keys.path}: mistral3.rope.scaling.attn_factor is {value}; 1 is supported"
            )
        del scaling["attention_factor"]
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    if beta := keys.optional("attention.temperature_scale", 0.0):
        rope["llama_4_scaling_beta"] = beta
        # Without it no position is known from which on queries grow.
        rope["original_max_position_embeddings"] = keys.required(
            "rope.scaling.original_context_length"
        )
    return config | {"model_type": "ministral3", "rope_parameters": rope | scaling}


def olmo2_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of an Olmo2Config, or of an Olmo3Config where layers slide.

    Errors: ExportError as llama_config, and for a pattern that is no list of flags.
    """
    config = llama_config(keys, tensors)
    window = keys.optional("attention.sliding_window", None)
    if window is None:
        return config
    if (slides := keys.flags("attention.sliding_window_pattern")) is None:
        name = "olmo2.attention.sliding_window_pattern"
        raise ExportError(
            f"{keys.path}: {name} is {shown(keys.metadata.get(name))}; a list of flags is right, "
            f"one for each of {config['num_hidden_layers']} layers"
        )
    # Only full layers are scaled.
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling") or {}
    return config | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
        "rope_parameters": {
            "full_attention": {"rope_theta": theta} | scaling,
            "sliding_attention": {"rope_theta": keys.optional("rope.freq_base_swa", theta)},
        },
    }


def phi3_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Phi3Config. A sliding window of 0 is none.

    Errors: ExportError as common_config, and for LongRoPE's divisors of long or of short texts
    without the others.
    """
    partial_keys = "rope.dimension_count", "rope.scaling.attn_factor"
    whole = {f"{keys.architecture}.{key}" for key in partial_keys}
    others = {key: value for key, value in keys.metadata.items() if key not in whole}
    config = common_config(keys._replace(metadata=others), tensors)
    rotated = keys.optional("rope.dimension_count", config["head_dim"])
    original = keys.optional(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    found = [name for name in LONGROPE_FACTORS if name in tensors]
    attention_factor = keys.optional("rope.scaling.attn_factor", 1.0)
    if len(found) == 1 or not found and attention_factor != 1:
        raise ExportError(
            f"{keys.path} has {found[0] if found else 'phi3.rope.scaling.attn_factor'} alone; "
            f"{' and '.join(LONGROPE_FACTORS)} are right beside it"
        )
    if found:
        divisors = {LONGROPE_FACTORS[name]: tensors[name].dequantize().tolist() for name in found}
        config["rope_scaling"] = {
            "rope_type": "longrope", "attention_factor": attention_factor, **divisors,
        }  # fmt: skip
    window = keys.metadata.get(f"{keys.architecture}.attention.sliding_window")
    return config | {
        "model_type": "phi3",
        "intermediate_size": keys.required("feed_forward_length"),
        "original_max_position_embeddings": original,
        "partial_rotary_factor": rotated / config["head_dim"],
        "sliding_window": keys.optional("attention.sliding_window", None) if window else None,
    }
