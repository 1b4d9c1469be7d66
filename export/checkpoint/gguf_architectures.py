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
from tokenloop.export.checkpoint.gguf_keys import Keys
from tokenloop.export.checkpoint.gguf_parts import read_parts
from tokenloop.export.checkpoint.gguf_reader import GRIDS, GgufTensor
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

# Divisors of the rotary frequencies, one for each pair of a head.
ROPE_FACTORS = "rope_freqs.weight"
# The same for texts of the original length, and for longer ones.
LONGROPE_FACTORS = {
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}

# The tensor of a convolution that has a channel for each of its own.
CONVOLUTION = ".shortconv.conv.weight"
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "token_embd_norm.weight": "model.norm.weight",  # LFM2's
    "output.weight": "lm_head.weight",
    # Gemma 4's, where each layer has an input of its own.
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    ROPE_FACTORS: None,  # the config has these
    **dict.fromkeys(LONGROPE_FACTORS),
}
# blk.N.<key>.weight -> model.layers.N.<value>.weight; or .bias. A key that ends in a kind itself
# is of a whole name, and its value too.
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
        "rope_theta": keys.optional("rope.freq_base", 10_000.0),
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
    slides = keys.flags("attention.sliding_window_pattern")
    if slides is None:
        interval = keys.optional("attention.sliding_window_pattern", 6)
        pattern = {"sliding_window_pattern": interval}
    else:
        types = [f"{'sliding' if each else 'full'}_attention" for each in slides]
        pattern = {"layer_types": types}
    return (
        common
        | pattern
        | {
            "model_type": "gemma3_text",
            "intermediate_size": keys.required("feed_forward_length"),
            "head_dim": head_dim,
            "query_pre_attn_scalar": per_head if is_27b else head_dim,
            "rope_local_base_freq": keys.optional("rope.freq_base_swa", 10000.0),
            "sliding_window": keys.required("attention.sliding_window"),
            "final_logit_softcapping": keys.optional("final_logit_softcapping", None),
        }
    )


def gemma4_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Gemma4TextConfig.

    Errors: ExportError as common_config, for two sizes of one layer's heads, for layers of one type
    that differ, and for what a Gemma4TextConfig does not have.
    """
    name = "attention.head_count_kv"
    kv_heads, sizes = keys.by_layer(name), keys.by_layer("feed_forward_length")
    # The size of full layers' heads is the file's head_dim.
    one = {f"gemma4.{name}": kv_heads[-1]}
    config = common_config(keys._replace(metadata=keys.metadata | one), tensors)
    full_size, sliding_size = config["head_dim"], keys.required("attention.key_length_swa")
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if (size := keys.optional(key, sliding_size)) != sliding_size:
            raise ExportError(
                f"{keys.path}: gemma4.{key} is {size}; {sliding_size}, the size of a sliding key's "
                "head, is supported"
            )
    slides = keys.flags("attention.sliding_window_pattern")
    if slides is None or slides[-1]:
        pattern = keys.metadata.get("gemma4.attention.sliding_window_pattern")
        raise ExportError(
            f"{keys.path}: gemma4.attention.sliding_window_pattern is {shown(pattern)}; a list of "
            f"flags is right, one for each of {len(kv_heads)} layers, and false for the last"
        )
    of_type = {flag: {n for n, each in zip(kv_heads, slides) if each == flag} for flag in slides}
    if any(len(counts) > 1 for counts in of_type.values()):
        raise ExportError(
            f"{keys.path}: gemma4.{name} is {shown(kv_heads)}; one number for all sliding layers, "
            "and one for all others, is supported"
        )
    shared = keys.optional("attention.shared_kv_layers", 0)
    unshared = len(slides) - shared
    wide = sizes != sizes[:1] * len(sizes)
    if wide and sizes != [sizes[0] * (1 if i < unshared else 2) for i in range(len(sizes))]:
        raise ExportError(
            f"{keys.path}: gemma4.feed_forward_length is {shown(sizes)}; one number, or twice it "
            f"for the {shared} layers that share keys, is supported"
        )
    own_full = [i for i, flag in enumerate(slides[:unshared]) if not flag]
    shape = {"head_dim": full_size, "num_key_value_heads": kv_heads[-1]}
    theta = config.pop("rope_theta")
    rotated = _rotated_share(keys, config.pop("rope_scaling"))
    return config | _gemma4_experts(keys) | {
        "model_type": "gemma4_text",
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": wide,
        "head_dim": sliding_size,
        "num_key_value_heads": kv_heads[slides.index(True)] if True in slides else kv_heads[-1],
        "per_layer_config": {str(i): shape for i, flag in enumerate(slides) if not flag},
        "layer_types": [f"{'sliding' if each else 'full'}_attention" for each in slides],
        "attention_k_eq_v": not any(f"blk.{i}.attn_v.weight" in tensors for i in own_full),
        "num_kv_shared_layers": shared,
        "sliding_window": keys.required("attention.sliding_window"),
        "hidden_size_per_layer_input": keys.optional("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"],
        # Without the key llama.cpp caps logits at 30, and its converter leaves it out for no cap.
        "final_logit_softcapping": keys.required("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": rotated,
            },
            "sliding_attention": {
                "rope_type": "default", "rope_theta": keys.optional("rope.freq_base_swa", theta),
            },
        },
    }  # fmt: skip


def _rotated_share(keys: Keys, scaling: dict[str, Any] | None) -> float:
    """The share of a full layer's pairs that rotate: the others' frequencies are divided by what
    leaves none. Errors: ExportError for other divisors."""
    divisors = None if scaling is None else scaling.get("factors")
    count = 0 if divisors is None else divisors.count(1.0)
    if not count or divisors[:count] != [1.0] * count or min(divisors[count:], default=1e30) < 1e29:
        raise ExportError(
            f"{keys.path}: {ROPE_FACTORS} must divide the first of a full layer's pairs by 1 and "
            f"the others by 1e30; it is {shown(divisors)}"
        )
    return count / len(divisors)


def _gemma4_experts(keys: Keys) -> dict[str, Any]:
    if not (count := keys.optional("expert_count", 0)):
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": count,
        "top_k_experts": keys.required("expert_used_count"),
        "moe_intermediate_size": keys.required("expert_feed_forward_length"),
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


POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3 = Architecture(
    gemma3_config,
    BLOCK_NAMES | {"ffn_norm": "pre_feedforward_layernorm"} | POST_NORMS,
    norm_offset=1.0,
)
GEMMA4 = Architecture(
    gemma4_config,
    BLOCK_NAMES
    | POST_NORMS
    | {
        "ffn_norm": "pre_feedforward_layernorm",
        "layer_output_scale.weight": "layer_scalar",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_gate_up_exps.weight": "experts.gate_up_proj",
        "ffn_down_exps.weight": "experts.down_proj",
        "ffn_down_exps.scale": "router.per_expert_scale",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
    },
)
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
QWEN = Architecture(qwen_config, BLOCK_NAMES | EXPERTS)
ARCHITECTURES = {
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "gpt-oss": Architecture(
        gpt_oss_config,
        BLOCK_NAMES
        | EXPERTS
        | {"attn_sinks": "self_attn.sinks", "post_attention_norm": "post_attention_layernorm"},
    ),
    "granite": Architecture(granite_config, permuted=True),
    "lfm2": Architecture(
        lfm2_config,
        BLOCK_NAMES
        | {
            "shortconv.conv": "conv.conv",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
        },
    ),
    "llama": Architecture(llama_config, permuted=True),
    "mistral3": Architecture(mistral3_config, permuted=True),
    "olmo2": Architecture(olmo2_config, BLOCK_NAMES | POST_NORMS),
    "phi3": Architecture(
        phi3_config,
        BLOCK_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen3moe": QWEN,
    # Every fourth layer does not rotate, in llama.cpp as by SmolLM3Config's default.
    "smollm3": Architecture(llama_config, permuted=True),
}


def open_gguf(path: Path) -> Checkpoint:
    """Open the GGUF file `path`, or all parts of a model of which it is one. Tensors are read as
    float32.

    Errors: those of `read_parts`, and ExportError for an unknown architecture, a missing key, a key
    or a tensor that the architecture does not have.
    """
    metadata, tensors, files = read_parts(path)
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ExportError(f"{path}: general.type is {shown(kind)}; a model is right")
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{path} has the architecture {shown(name)}; supported in GGUF: "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture, keys = ARCHITECTURES[name], Keys(path, metadata, name, set())
    config = architecture.config(keys, tensors)
    keys.check_asked()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    stored = {}
    for tensor in tensors.values():
        hf_name = _renamed(architecture, tensor)
        if hf_name in stored:
            raise ExportError(f"{path}: {tensor.name} and another tensor are both {hf_name}")
        if hf_name is not None:
            permuted = heads.get(tensor.name.split(".")[-2]) if architecture.permuted else None
            read = partial(_read, tensor, architecture.norm_offset, permuted)
            grid = partial(_grid, tensor, permuted) if tensor.type in GRIDS else None
            shape = tensor.shape
            if tensor.name.endswith(CONVOLUTION):
                shape, read = (shape[0], 1, *shape[1:]), partial(_of_channels, read)
                grid = None
            stored[hf_name] = StoredTensor(shape, "F32", read, grid)
    return Checkpoint(path, "gguf", config, files, stored, metadata)


def _renamed(architecture: Architecture, tensor: GgufTensor) -> str | None:
    if tensor.name in NAMES:
        return NAMES[tensor.name]
    match tensor.name.split("."):
        case ["blk", layer, *parts] if (name := ".".join(parts)) in architecture.block_names:
            return f"model.layers.{layer}.{architecture.block_names[name]}"
        case ["blk", layer, *parts, "weight" | "bias" as kind]:
            if (part := ".".join(parts)) in architecture.block_names:
                return f"model.layers.{layer}.{architecture.block_names[part]}.{kind}"
    raise ExportError(f"{tensor.path} has a tensor of no known meaning: {tensor.name}")


def _of_channels(read: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A convolution's weight [D, W] as torch has it, [D, 1, W]."""
    return read()[:, None]


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
