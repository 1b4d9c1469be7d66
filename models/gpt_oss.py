"""gpt-oss text models (arXiv:2508.10925), named as in transformers: every other layer slides, each
head has a sink, and the feed-forward is routed experts with biases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenloop.models import config as configs
from tokenloop.models import dense, qwen3
from tokenloop.models.layers import SWIGLU_LIMIT, SWIGLU_SLOPE, Rearranged, Shard
from tokenloop.models.moe import MoeConfig, SparseMoe

# The defaults of transformers' GptOssConfig.
DEFAULTS = {
    "gpt_oss": {
        "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "sliding_window": 128, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "tie_word_embeddings": False,
        "attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4,
    },
}  # fmt: skip
MODEL_TYPES = tuple(DEFAULTS)
# What transformers takes where a config has neither of the rotary embedding's entries.
ROPE_PARAMETERS = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
# Fields for which only one value is implemented.
ONLY = {
    "hidden_act": "silu", "mlp_bias": False, "swiglu_limit": SWIGLU_LIMIT,
    "swiglu_alpha": SWIGLU_SLOPE,
}  # fmt: skip
EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate|up|gate_up|down)_proj(\.weight|[._]bias)?")


@dataclass(frozen=True)
class GptOssConfig(dense.DenseConfig):
    """The shape of one gpt-oss text model. `from_dict` reads a Hugging Face config."""

    moe: MoeConfig | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GptOssConfig":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        # The published configs have two names of one number.
        for name, other in (
            ("experts_per_token", "num_experts_per_tok"), ("num_experts", "num_local_experts"),
        ):  # fmt: skip
            configs.one_of(config, name, other)
        if not config.get("rope_scaling") and not config.get("rope_parameters"):
            config = {**config, "rope_parameters": ROPE_PARAMETERS}
        config = dense.read(config, DEFAULTS, ONLY)
        types = configs.layer_types(config, dense.SLIDING, 2)
        rope = {dense.FULL: configs.rope(configs.rope_entry(config))}
        shape = dense.described(config, types, rope, rotations=(dense.FULL,) * len(types))
        given = {"moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": True}
        return cls(**shape, moe=qwen3.moe_config(config | given, "clamped_swiglu", bias=True))


def checkpoint_name(name: str) -> str | Shard | Rearranged:
    """A checkpoint's tensor name as this model's parameter name, or how its elements lie in it.

    A checkpoint has gates and ups in turns, and experts' matrices transposed. GGUF files have a
    tensor for each projection of all experts, as they are here.
    """
    match = EXPERTS.fullmatch(name)
    if match is None:
        name = name.replace(".mlp.router.", ".mlp.gate.")
        return name.removesuffix(".weight") if name.endswith(".sinks.weight") else name
    experts, projection, kind = match.groups()
    is_bias = kind is not None and kind.endswith("bias")
    bias = "_bias" * is_bias
    if projection in ("gate", "up"):
        part = ("gate", "up").index(projection)
        return Shard(f"{experts}.gate_up_proj{bias}", part, 2, None, axis=-1 if is_bias else -2)
    target = f"{experts}.{projection}_proj{bias}"
    if kind in (".weight", ".bias"):
        return target
    return Rearranged(target, transposed=not is_bias, interleaved=projection == "gate_up")


class GptOss(dense.Dense):
    """A gpt-oss text model, as dense.Dense."""

    has_sinks = True

    @staticmethod
    def feed_forward(config: GptOssConfig) -> SparseMoe:
        return SparseMoe(config.hidden_size, config.moe)


Network, Config = GptOss, GptOssConfig
