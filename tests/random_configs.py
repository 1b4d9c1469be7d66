"""Configs at random, of every model_type: what people write, what they forget, and what contradicts
itself. tests/compare_configs.py says what becomes of them."""

from random import Random
from typing import Any

from tests.models.architectures import FULL, LINEAR, SLIDING
from tests.models.tiny_models import ROW_OF

MODEL_TYPES = sorted({name for row in ROW_OF.values() for name in row.classes})
HYBRIDS = "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"
ROPE_TYPES = "default", "linear", "dynamic", "llama3", "yarn", "longrope"
# What may stand in any config, whether its model_type knows it or not.
ODDITIES = (
    {"is_causal": False}, {"is_causal": True}, {"attention_bias": True}, {"mlp_bias": True},
    {"hidden_act": "gelu"}, {"hidden_activation": "silu"}, {"attn_logit_softcapping": 5.0},
    {"final_logit_softcapping": 5.0}, {"partial_rotary_factor": 0.5}, {"sliding_window": 5},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
    {"num_kv_shared_layers": 1}, {"original_max_position_embeddings": 16}, {"head_dim": None},
    {"num_key_value_heads": None}, {"norm_topk_prob": True}, {"norm_topk_prob": False},
    {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"num_local_experts": 3},
    {"query_pre_attn_scalar": 7}, {"use_bidirectional_attention": True},
    {"per_layer_config": {"0": {"num_key_value_heads": 1}}}, {"per_layer_config": {}},
    {"sliding_window_pattern": 2}, {"_sliding_window_pattern": 2}, {"rope_theta": 123.0},
    {"rope_local_base_freq": 77.0}, {"pretraining_tp": 2}, {"attention_dropout": 0.5},
    {"initializer_range": 0.1}, {"use_cache": False}, {"pad_token_id": 3}, {"torch_dtype": "half"},
    {"full_attention_interval": 2}, {"attn_output_gate": False}, {"attention_k_eq_v": True},
    {"enable_moe_block": True}, {"use_double_wide_mlp": True}, {"unheard_of": 3},
    {"is_encoder_decoder": True}, {"tie_word_embeddings": None}, {"rms_norm_eps": None},
)  # fmt: skip


def random_config(rng: Random, model_type: str) -> dict[str, Any]:
    """A config.json's keys; a key whose value is None is left out."""
    heads = rng.choice((1, 2, 3, 4, 6))
    layers = rng.randint(1, 3)
    config = {
        "model_type": model_type, "vocab_size": rng.randint(31, 97),
        "hidden_size": heads * rng.choice((4, 6, 10)), "intermediate_size": rng.choice((8, 21)),
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": rng.choice((4, 8, 10, 16)), "rms_norm_eps": rng.choice((1e-6, 1e-5, 0.1)),
        "max_position_embeddings": rng.choice((32, 64, 256)),
        "tie_word_embeddings": rng.random() < 0.5, "pad_token_id": 0,
    }  # fmt: skip
    if model_type in ("qwen2",) and rng.random() < 0.7:
        config["head_dim"] = None
    if model_type.startswith("gemma"):
        config |= gemma(rng, model_type, layers, config["vocab_size"])
    if model_type in HYBRIDS:
        config |= hybrid(rng, layers)
    config |= kin(rng, model_type, layers)
    if model_type == "phi3":
        config |= {"hidden_size": 8 * heads}
    if model_type == "granitemoehybrid":
        config |= {"num_local_experts": 2 * (rng.random() < 0.1)}
    elif "moe" in model_type or model_type == "qwen3_next" and rng.random() < 0.7:
        config |= {
            "num_experts": rng.choice((3, 5)), "num_experts_per_tok": rng.randint(1, 3),
            "moe_intermediate_size": 6,
            "norm_topk_prob": model_type == "qwen3_5_moe_text" or rng.random() < 0.5,
        }  # fmt: skip
        if model_type in HYBRIDS:
            config |= {"shared_expert_intermediate_size": 10}
    elif model_type == "qwen3_next":
        config |= {"num_experts": 0}
    config |= rotary(rng, model_type, config)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        config |= rng.choice(ODDITIES)
    return {key: value for key, value in config.items() if value is not None}


def gemma(rng: Random, model_type: str, layers: int, vocab_size: int) -> dict[str, Any]:
    own = {"tie_word_embeddings": True, "sliding_window": rng.choice((1, 5, 100))}
    if rng.random() < 0.7:
        own["layer_types"] = [rng.choice((SLIDING, FULL)) for _ in range(layers)]
    if model_type == "gemma3_text":
        return own | {"query_pre_attn_scalar": rng.choice((5, 24))}
    shared = {"num_kv_shared_layers": rng.choice((0, 0, 1))}
    if model_type == "gemma3n_text":
        shares = [rng.choice((0.0, 0.5, 0.9)) for _ in range(layers)]
        return own | shared | {
            "hidden_size_per_layer_input": 6, "laurel_rank": rng.choice((2, 5)),
            "vocab_size_per_layer_input": rng.choice((vocab_size, 20)),
            "altup_num_inputs": rng.choice((2, 3, 4)), "altup_correct_scale": rng.random() < 0.5,
            "activation_sparsity_pattern": rng.choice((shares, None)),
            "intermediate_size": rng.choice((8, [rng.choice((8, 21)) for _ in range(layers)])),
            "final_logit_softcapping": rng.choice((5.0, None)),
        }  # fmt: skip
    if rng.random() < 0.3:
        own |= {
            "enable_moe_block": True, "num_experts": rng.choice((3, 5)), "moe_intermediate_size": 6,
            "top_k_experts": rng.randint(1, 3),
        }  # fmt: skip
    own |= shared | {"use_double_wide_mlp": rng.random() < 0.2}
    return own | {
        "hidden_size_per_layer_input": rng.choice((0, 0, 6)),
        "vocab_size_per_layer_input": vocab_size, "global_head_dim": rng.choice((8, 12)),
        "num_global_key_value_heads": rng.choice((None, 1)),
        "attention_k_eq_v": rng.random() < 0.5,
        "final_logit_softcapping": rng.choice((None, 5.0)),
    }  # fmt: skip


def kin(rng: Random, model_type: str, layers: int) -> dict[str, Any]:
    """What is of its own in a family like Llama's."""
    sliding = {"sliding_window": rng.choice((1, 5, 100))}
    types = {"layer_types": [rng.choice((SLIDING, FULL)) for _ in range(layers)]}
    some = rng.random() < 0.6
    if model_type == "mistral":
        return rng.choice((sliding, {"sliding_window": None}, {}))
    if model_type == "ministral":
        return sliding | (types if some else {})
    if model_type == "smollm3":
        own = {"no_rope_layers": [rng.randint(0, 1) for _ in range(layers)]}
        return own if some else {"no_rope_layer_interval": rng.randint(1, 3)}
    if model_type.startswith("granite"):
        own = {
            "embedding_multiplier": rng.choice((1, 12.0)), "logits_scaling": rng.choice((1, 8)),
            "attention_multiplier": rng.choice((0.1, 0.5)), "head_dim": None,
            "residual_multiplier": rng.choice((1.0, 0.22)),
        }  # fmt: skip
        if model_type == "granite":
            return own
        attends = rng.choice(("attention", FULL))
        return own | {
            "layer_types": [attends] * layers, "shared_intermediate_size": rng.choice((6, 11)),
            "position_embedding_type": rng.choice(("rope", "rope", None)), "mamba_n_heads": 1,
        }  # fmt: skip
    if model_type == "olmo3":
        return sliding | (types if some else {})
    if model_type == "gpt_oss":
        return sliding | (types if some else {}) | {
            "num_local_experts": rng.choice((3, 5)), "num_experts_per_tok": rng.randint(1, 3),
            "attention_bias": rng.random() < 0.7,
        }  # fmt: skip
    if model_type == "phi3":
        own = {"head_dim": None, "partial_rotary_factor": rng.choice((None, 0.5, 0.75))}
        return own | (sliding if some else {})
    if model_type == "lfm2":
        return {
            "head_dim": None, "norm_eps": 1e-5, "conv_L_cache": rng.randint(2, 4),
            "block_auto_adjust_ff_dim": some, "block_multiple_of": 4,
            "layer_types": [rng.choice(("conv", FULL)) for _ in range(layers - 1)] + [FULL],
        }  # fmt: skip
    return {}


def hybrid(rng: Random, layers: int) -> dict[str, Any]:
    keys = rng.choice((1, 2))
    # transformers' cache needs one layer of attention.
    types = [rng.choice((LINEAR, FULL)) for _ in range(layers - 1)] + [FULL]
    interval = rng.randint(1, layers)
    return {
        "head_dim": rng.choice((8, 16, 24)),
        **({"layer_types": types} if rng.random() < 0.6 else {"full_attention_interval": interval}),
        "linear_num_key_heads": keys, "linear_num_value_heads": keys * rng.choice((1, 3)),
        "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "linear_conv_kernel_dim": rng.choice((2, 4)),
    }  # fmt: skip


def rotary(rng: Random, model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding under one of its names, or under two of them."""
    theta = rng.choice((300.0, 10_000.0, 5e5))
    size = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    share = rng.choice((0.5, 0.25)) if model_type in HYBRIDS else 1.0
    if model_type == "phi3":
        share = config.get("partial_rotary_factor") or 1.0
    entry = scaling(rng, int(size * share) // 2)
    if model_type == "phi3" and entry.get("rope_type") != "longrope" and rng.random() < 0.8:
        entry = {}
    if model_type in ("ministral3", "phi3"):
        return kin_rotary(rng, model_type, entry, theta)
    if share != 1.0:
        entry |= {"partial_rotary_factor": share}
    if model_type == "olmo3" and rng.random() < 0.9 or model_type.startswith("gemma"):
        return gemma_rotary(rng, model_type, entry, theta)
    if rng.random() < 0.4 and "rope_type" in entry:
        entry = {"type": entry.pop("rope_type"), **entry}
    place = rng.random()
    if place < 0.4:
        return {"rope_scaling": entry or None, "rope_theta": theta}
    if place < 0.8:
        return {"rope_parameters": entry | {"rope_theta": theta}}
    if place < 0.9:
        other = {"rope_type": "default", "rope_theta": theta}
        return {"rope_scaling": entry or None, "rope_parameters": other}
    return {"rope_scaling": entry | {"rope_theta": theta}, "rope_parameters": entry | {
        "rope_theta": theta
    }}  # fmt: skip


def kin_rotary(rng: Random, model_type: str, entry: dict[str, Any], theta: float) -> dict[str, Any]:
    """Phi's, and Ministral 3's, which have more to them."""
    if model_type == "phi3":
        original = {"original_max_position_embeddings": rng.choice((16, 64))}
        entry.pop("original_max_position_embeddings", None)
        return {"rope_scaling": entry or None, "rope_theta": theta} | original
    entry = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    beta = rng.choice((0.0, 0.1))
    return {"rope_parameters": entry | {"rope_theta": theta, "llama_4_scaling_beta": beta}}


def gemma_rotary(
    rng: Random, model_type: str, entry: dict[str, Any], theta: float
) -> dict[str, Any]:
    if model_type in ("gemma3_text", "gemma3n_text") and rng.random() < 0.5:
        return {"rope_scaling": entry or None, "rope_theta": theta, "rope_local_base_freq": 50.0}
    if rng.random() < 0.2:
        return {}
    if model_type == "gemma4_text" and rng.random() < 0.5:
        entry = {"rope_type": "proportional", "partial_rotary_factor": rng.choice((0.25, 0.6))}
    return {"rope_parameters": {
        FULL: {"rope_type": "default"} | entry | {"rope_theta": theta},
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    }}  # fmt: skip


def scaling(rng: Random, pairs: int) -> dict[str, Any]:
    """A rope_type with its numbers, of which some are missing at times."""
    kind = rng.choice((None, None, *ROPE_TYPES, "su"))
    if kind is None:
        return {}
    entry: dict[str, Any] = {"rope_type": kind}
    original = {"original_max_position_embeddings": rng.choice((8, 16, 64))}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        entry["factor"] = rng.choice((1.0, 2.0, 8.0))
    if kind == "llama3":
        entry |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": rng.choice((4.0, 2.5, 1.0)),
        } | original
    if kind in ("yarn", "longrope") and rng.random() < 0.8:
        entry |= original
    options: dict[str, Any] = {}
    if kind == "yarn":
        options = {
            "attention_factor": 0.8, "beta_fast": rng.choice((2, 16)), "beta_slow": 0.5,
            "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "finetuned": True,
        }  # fmt: skip
    if kind == "longrope":
        entry |= {
            "short_factor": [1 + 0.2 * i for i in range(pairs)],
            "long_factor": [2 + 0.7 * i for i in range(pairs)],
        }
        options = {"attention_factor": 1.2, "factor": 3.0}
    for key, value in options.items():
        if rng.random() < 0.3:
            entry[key] = value
    if rng.random() < 0.08:
        entry.pop(rng.choice(sorted(entry)))
    if rng.random() < 0.05:
        entry["alpha"] = 2.0
    return entry
