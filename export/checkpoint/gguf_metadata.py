"""What the values of a GGUF header may be: a kind for each key that is read.

A GGUF file gives every value a type of its own, so nothing of a value is known before it is
compared. Keys that are not read are not looked at.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import (
    FIELDS,
    FLAG,
    TEXT,
    TOKEN_ID,
    Kind,
    list_of,
    number,
    shown,
    whole,
)

STRINGS = list_of(TEXT, "strings")
NUMBERS = Kind(
    lambda value: (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "iuf"
        and bool(np.isfinite(value).all())
    ),
    "an array of finite numbers",
)
INTEGERS = Kind(
    lambda value: isinstance(value, np.ndarray) and value.dtype.kind in "iu", "an array of integers"
)
# 0 is no factor.
SCALING_FACTOR = number(0, 1e6)

KINDS = {
    "general.architecture": TEXT,
    "general.type": TEXT,
    "general.quantization_version": whole(0, (1 << 32) - 1),
    "split.count": whole(0, 65_535),
    "split.no": whole(0, 65_535),
    "split.tensors.count": whole(0, (1 << 31) - 1),
    "tokenizer.chat_template": TEXT,
    "tokenizer.chat_template.tool_use": TEXT,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": STRINGS,
    "tokenizer.ggml.merges": STRINGS,
    "tokenizer.ggml.scores": NUMBERS,
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.ggml.add_eos_token": FLAG,
    "tokenizer.ggml.add_space_prefix": FLAG,
    **{
        f"tokenizer.ggml.{role}_token_id": TOKEN_ID
        for role in ("bos", "eos", "eot", "eom", "unknown")
    },
    # Files for byte-level BPE, which needs none, may have any number.
    "tokenizer.ggml.padding_token_id": whole(-(1 << 31), (1 << 32) - 1),
}
# Of the keys `<architecture>.<key>`. What config.json has too is of the same kind as there.
ARCHITECTURE_KINDS = {
    key: FIELDS[field]
    for key, field in {
        "altup.active_idx": "altup_active_idx",
        "altup.num_inputs": "altup_num_inputs",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.key_length_swa": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "attention.value_length": "head_dim",
        "attention.value_length_swa": "head_dim",
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        "expert_count": "num_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_used_count": "num_experts_per_tok",
        "expert_weights_norm": "norm_topk_prob",
        "feed_forward_length": "intermediate_size",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.dimension_count": "head_dim",
        "rope.dimension_count_swa": "head_dim",
        "shortconv.l_cache": "conv_L_cache",
        "rope.freq_base": "rope_theta",
        "rope.freq_base_swa": "rope_local_base_freq",
    }.items()
} | {
    "activation_sparsity_scale": Kind(
        lambda value: type(value) is float and value < math.inf, "a number, or minus infinity,"
    ),
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": SCALING_FACTOR,
    "rope.scale_linear": SCALING_FACTOR,
    "rope.scaling.attn_factor": SCALING_FACTOR,
    "rope.scaling.original_context_length": FIELDS["original_max_position_embeddings"],
    **{
        f"rope.scaling.yarn_{key}": SCALING_FACTOR
        for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")
    },
    **dict.fromkeys(
        (
            "attention.scale",
            "attention.temperature_scale",
            "embedding_scale",
            "logit_scale",
            "residual_scale",
            "rope.scaling.yarn_log_multiplier",
        ),
        SCALING_FACTOR,
    ),
}


def check_value(path: Path, key: str, value: Any, kind: Kind) -> None:
    """Errors: ExportError with the file, the key, its value and what would be right."""
    if not kind.fits(value):
        raise ExportError(f"{path}: {key} is {shown(value)}; {kind.right} is right")


def check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Compare the values of KINDS that the header has. Errors: those of `check_value`."""
    for key, kind in KINDS.items():
        if key in metadata:
            check_value(path, key, metadata[key], kind)
