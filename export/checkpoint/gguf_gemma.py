"""The config.json of a Gemma's GGUF file, as gguf_configs.py has those of others."""

from statistics import NormalDist
from typing import Any

from tokenloop.export.checkpoint.gguf_configs import ROPE_FACTORS, common_config
from tokenloop.export.checkpoint.gguf_keys import Keys
from tokenloop.export.checkpoint.gguf_reader import GgufTensor
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown


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


def gemma3n_config(keys: Keys, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Gemma3nTextConfig.

    Errors: ExportError as common_config, for scaled positions, and for a tensor that is missing of
    those that give a size.
    """
    name = "gemma3n.attention.shared_kv_layers"
    shared = keys.metadata.get(name)
    if isinstance(shared, float) and shared.is_integer():
        # The gguf package wrote a float at first.
        keys = keys._replace(metadata=keys.metadata | {name: int(shared)})
    config = common_config(keys, tensors)
    if (scaling := config.pop("rope_scaling")) is not None:
        raise ExportError(
            f"{keys.path}: gemma3n's positions are scaled, {shown(scaling)}; no scaling is "
            "supported"
        )
    slides = keys.flags("attention.sliding_window_pattern")
    if slides is None:
        interval = keys.optional("attention.sliding_window_pattern", 5)
        slides = [(i + 1) % interval != 0 for i in range(config["num_hidden_layers"])]
    # The file has the number of standard deviations that let the share of a config.json through.
    cutoffs = keys.by_layer("activation_sparsity_scale")
    return config | {
        "model_type": "gemma3n_text",
        "head_dim": keys.required("attention.key_length"),
        "intermediate_size": keys.by_layer("feed_forward_length"),
        "layer_types": [f"{'sliding' if each else 'full'}_attention" for each in slides],
        "activation_sparsity_pattern": [NormalDist().cdf(cutoff) for cutoff in cutoffs],
        "sliding_window": keys.required("attention.sliding_window"),
        "rope_local_base_freq": keys.optional("rope.freq_base_swa", 10_000.0),
        "num_kv_shared_layers": keys.required("attention.shared_kv_layers"),
        "altup_num_inputs": keys.optional("altup.num_inputs", 4),
        "altup_active_idx": keys.optional("altup.active_idx", 0),
        "hidden_size_per_layer_input": keys.required("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": _length(keys, tensors, "per_layer_token_embd.weight"),
        "laurel_rank": _length(keys, tensors, "blk.0.laurel_l.weight"),
        # Without the key llama.cpp caps logits at 30, and its converter leaves it out for no cap.
        "final_logit_softcapping": keys.required("final_logit_softcapping"),
    }


def _length(keys: Keys, tensors: dict[str, GgufTensor], name: str) -> int:
    if name not in tensors:
        raise ExportError(f"{keys.path} has no tensor {name}, which the model needs")
    return tensors[name].shape[0]
