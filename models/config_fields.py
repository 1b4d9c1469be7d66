"""What the fields of a config.json may be: a kind for each, and the sizes that belong together.

Every family reads its fields through `check` (models/config.py calls it). GGUF headers have the
same values under other names and are checked against the same kinds. Ranges are wide: they keep out
what no network has, before anything is made of it.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Elements of a tensor, and of one of its axes.
MAX_TENSOR, MAX_WIDTH = 1 << 40, 1 << 24
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class Kind(NamedTuple):
    """Whether a value is of the kind, and which values are, in words."""

    fits: Callable[[Any], bool]
    right: str


def shown(value: Any) -> str:
    """The value for a message: its repr, shortened."""
    return _SHORT.repr(value)


def whole(least: int, most: int) -> Kind:
    """Whole numbers. True and 3.0 are none."""
    return Kind(
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number from {least} to {most}",
    )


def number(least: float, most: float) -> Kind:
    """Finite numbers, whole or not."""
    return Kind(
        lambda value: type(value) in (int, float) and least <= value <= most,
        f"a number from {least:g} to {most:g}",
    )


def list_of(kind: Kind, of: str, least: int = 0) -> Kind:
    """Lists of at least so many values of the kind."""
    return Kind(
        lambda value: (
            isinstance(value, (list, tuple)) and len(value) >= least and all(map(kind.fits, value))
        ),
        f"a list of {of}",
    )


def either(first: Kind, second: Kind) -> Kind:
    return Kind(
        lambda value: first.fits(value) or second.fits(value), f"{first.right}, or {second.right}"
    )


FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a string")
OBJECT = Kind(lambda value: isinstance(value, Mapping), "an object")
WIDTH = whole(1, MAX_WIDTH)
# Heads, the size of one, experts.
FEW = whole(1, 1 << 16)
POSITIONS = whole(1, (1 << 31) - 1)
TOKEN_ID = whole(0, (1 << 31) - 1)
THETA = number(1, 1e12)
FACTOR = number(1e-6, 1e6)
SHARE = number(1e-6, 1)
CAP = number(0, 1e6)
DIVISORS = list_of(FACTOR, f"numbers from {1e-6:g} to {1e6:g}")

ROPE_FIELDS = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": THETA,
    "factor": FACTOR,
    "factors": DIVISORS,
    "partial_rotary_factor": SHARE,
    "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR,
    "original_max_position_embeddings": POSITIONS,
    "attention_factor": FACTOR,
    "beta_fast": FACTOR,
    "beta_slow": FACTOR,
    "mscale": CAP,
    "mscale_all_dim": CAP,
    "truncate": FLAG,
    "short_factor": DIVISORS,
    "long_factor": DIVISORS,
    # The axes of an image's positions, which are one for text, and who trained what.
    "mrope_section": list_of(whole(0, 1 << 16), "whole numbers"),
    "mrope_interleaved": FLAG,
    "finetuned": FLAG,
}
# rope_parameters may have an entry for each type of layer.
LAYER_TYPES = "full_attention", "sliding_attention", "linear_attention"
FIELDS = {
    "model_type": TEXT,
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": whole(1, 1024),
    "num_attention_heads": FEW,
    "num_key_value_heads": FEW,
    "num_global_key_value_heads": FEW,
    "head_dim": FEW,
    "global_head_dim": FEW,
    "max_position_embeddings": POSITIONS,
    "original_max_position_embeddings": POSITIONS,
    "rms_norm_eps": number(1e-30, 1),
    "query_pre_attn_scalar": number(1e-6, MAX_WIDTH),
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "embedding_multiplier": FACTOR,
    "attention_multiplier": FACTOR,
    "residual_multiplier": FACTOR,
    "logits_scaling": FACTOR,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_sliding_window": FLAG,
    "use_bidirectional_attention": either(FLAG, TEXT),
    "sliding_window": POSITIONS,
    "sliding_window_pattern": FEW,
    "_sliding_window_pattern": FEW,
    "layer_types": list_of(TEXT, "strings, one for each layer", least=1),
    "no_rope_layers": list_of(whole(0, 1), "zeros and ones, one for each layer"),
    "no_rope_layer_interval": FEW,
    "position_embedding_type": TEXT,
    "norm_eps": number(1e-30, 1),
    "tie_embedding": FLAG,
    "block_ff_dim": WIDTH,
    "block_multiple_of": WIDTH,
    "block_ffn_dim_multiplier": FACTOR,
    "block_auto_adjust_ff_dim": FLAG,
    "conv_bias": FLAG,
    "conv_L_cache": FEW,
    "full_attn_idxs": list_of(whole(0, 1023), "layers' numbers"),
    "attention_k_eq_v": FLAG,
    "hidden_size_per_layer_input": whole(0, MAX_WIDTH),
    "vocab_size_per_layer_input": whole(0, MAX_WIDTH),
    "num_kv_shared_layers": whole(0, 1024),
    "altup_active_idx": whole(0, 1024),
    "altup_correct_scale": FLAG,
    "altup_num_inputs": whole(1, 1024),
    "laurel_rank": WIDTH,
    "enable_moe_block": FLAG,
    "use_double_wide_mlp": FLAG,
    "per_layer_config": OBJECT,
    "full_attention_interval": FEW,
    "attn_output_gate": FLAG,
    "is_causal": FLAG,
    "is_encoder_decoder": FLAG,
    "linear_conv_kernel_dim": FEW,
    "linear_num_key_heads": FEW,
    "linear_num_value_heads": FEW,
    "linear_key_head_dim": FEW,
    "linear_value_head_dim": FEW,
    # 0 experts are none, and 0 of them are chosen.
    "num_experts": whole(0, 1 << 16),
    "num_local_experts": whole(0, 1 << 16),
    "num_experts_per_tok": whole(0, 1 << 16),
    "moe_intermediate_size": WIDTH,
    # 0 is no such expert, in models that have none.
    "shared_expert_intermediate_size": whole(0, MAX_WIDTH),
    "shared_intermediate_size": WIDTH,
    "norm_topk_prob": FLAG,
    "experts_per_token": whole(0, 1 << 16),
    "top_k_experts": whole(0, 1 << 16),
    "swiglu_alpha": FACTOR,
    "swiglu_limit": FACTOR,
    "decoder_sparse_step": FEW,
    "mlp_only_layers": list_of(whole(0, 1023), "layers' numbers"),
    "rope_theta": THETA,
    "rope_local_base_freq": THETA,
    "partial_rotary_factor": SHARE,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "bos_token_id": TOKEN_ID,
    "eos_token_id": either(TOKEN_ID, list_of(TOKEN_ID, "such numbers")),
}
# Products that are an axis of a tensor, a tensor, or what a delta net remembers of one row.
PRODUCTS = {
    MAX_WIDTH: (
        ("num_attention_heads", "head_dim"),
        ("num_attention_heads", "global_head_dim"),
        ("linear_num_key_heads", "linear_key_head_dim"),
        ("linear_num_value_heads", "linear_value_head_dim"),
    ),
    MAX_TENSOR: (
        ("vocab_size", "hidden_size"),
        ("hidden_size", "intermediate_size"),
        ("hidden_size", "num_attention_heads", "head_dim"),
        ("hidden_size", "num_attention_heads", "global_head_dim"),
        ("hidden_size", "linear_num_key_heads", "linear_key_head_dim"),
        ("hidden_size", "linear_num_value_heads", "linear_value_head_dim"),
        ("hidden_size", "num_experts", "moe_intermediate_size"),
        ("hidden_size", "num_local_experts", "moe_intermediate_size"),
        ("hidden_size", "shared_expert_intermediate_size"),
        ("hidden_size", "shared_intermediate_size"),
    ),
    1 << 30: (("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),),
}


def check_fields(
    entry: Mapping[str, Any], kinds: Mapping[str, Kind], of: str = "", nullable: bool = True
) -> None:
    """Compare those fields of an entry that have a kind with it. Raises ValueError as `check`, and
    for a null where that is no value either."""
    for name, value in entry.items():
        kind = kinds.get(name)
        if kind is None or (value is None and nullable):
            continue
        if not kind.fits(value):
            raise ValueError(f"{of}{name} = {shown(value)}: {kind.right} is right")


def check(config: Mapping[str, Any]) -> None:
    """Compare all fields that are known with their kinds; null is the same as a field that is not
    there. Raises ValueError with the field, its value and what would be right."""
    check_fields(config, FIELDS)
    for name in ("rope_scaling", "rope_parameters"):
        entry = config.get(name) or {}
        check_rope(entry, ROPE_FIELDS | dict.fromkeys(LAYER_TYPES, OBJECT), f"{name}.")
        for layer_type in LAYER_TYPES:
            check_rope(entry.get(layer_type) or {}, ROPE_FIELDS, f"{name}.{layer_type}.")
    for layer, shape in (config.get("per_layer_config") or {}).items():
        name = f"per_layer_config.{shown(layer)}"
        if not str(layer).isdecimal():
            raise ValueError(f"{name} is for no layer: a layer's number is right")
        if not isinstance(shape, Mapping):
            raise ValueError(f"{name} = {shown(shape)}: an object is right")
        check_fields(shape, FIELDS, f"{name}.", nullable=False)


def check_rope(entry: Mapping[str, Any], kinds: Mapping[str, Kind], of: str) -> None:
    """Compare an entry of the rotary embedding with its kinds, which are all that there are. Raises
    ValueError as `check_fields`, and for a field that is not known."""
    check_fields(entry, kinds, of)
    for name in entry.keys() - kinds.keys():
        if entry[name] is not None:
            raise ValueError(f"{of}{name} = {shown(entry[name])} is not supported: leave it out")


def check_products(config: Mapping[str, Any]) -> None:
    """Compare what a checked config's sizes come to with the largest tensors that there are. Raises
    ValueError as `check`."""
    for most, products in PRODUCTS.items():
        for names in products:
            sizes = [config.get(name) for name in names]
            if None not in sizes and math.prod(sizes) > most:
                raise ValueError(
                    f"{' * '.join(names)} = {' * '.join(map(str, sizes))}: at most {most} is right"
                )
