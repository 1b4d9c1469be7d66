"""Mistral text models (arXiv:2310.06825), named as in transformers: Mistral, Ministral, and the
text part of Mistral 3 and Ministral 3. They are Llamas whose layers may slide."""

from collections.abc import Mapping
from typing import Any

from tokenloop.models import config as configs
from tokenloop.models import dense, gemma3

_SHARED_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "sliding_window": 4096,
}  # fmt: skip
# The defaults of transformers' MistralConfig, MinistralConfig and Ministral3Config.
DEFAULTS = {
    "mistral": _SHARED_DEFAULTS,
    "ministral": _SHARED_DEFAULTS,
    "ministral3": _SHARED_DEFAULTS
    | {
        "vocab_size": 131_072, "num_hidden_layers": 34, "head_dim": 128,
        "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5, "sliding_window": None,
    },
}  # fmt: skip
MINISTRAL_3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0,
    "original_max_position_embeddings": 16_384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class MistralConfig(dense.DenseConfig):
    """The shape of one Mistral text model. `from_dict` reads a Hugging Face config."""

    @classmethod
    def from_dict(cls, config: dict) -> "MistralConfig":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        beta = None
        if config.get("model_type") == "ministral3":
            config, beta = _without_beta(config)
        config = dense.read(config, DEFAULTS, ONLY)
        usual = dense.FULL if config["sliding_window"] is None else dense.SLIDING
        types = (usual,) * config["num_hidden_layers"]
        if config.get("layer_types"):
            types = configs.layer_types(config, dense.SLIDING, 1)
        model_type = config["model_type"]
        if model_type != "ministral" and set(types) != {usual}:
            raise ValueError(
                f"layer_types has {', '.join(sorted(set(types) - {usual}))}: only {usual}, which "
                f"sliding_window = {config['sliding_window']} makes all layers of a {model_type}"
            )
        entry = configs.rope_entry(config)
        shape = dense.described(config, types, dict.fromkeys(types, configs.rope(entry)))
        if beta:
            # Queries of later positions are multiplied by 1 + beta * log(1 + position // original).
            original = configs.read(
                entry, defaults={}, only={}, needed=["original_max_position_embeddings"],
                multiples=(),
            )["original_max_position_embeddings"]  # fmt: skip
            positions = min(shape["max_position_embeddings"], original)
            shape |= {"max_position_embeddings": positions}
        return cls(**shape)


def _without_beta(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """A Ministral 3's config without the llama_4_scaling_beta of its rope_parameters, and that."""
    entry = config.get("rope_parameters") or MINISTRAL_3_ROPE
    if not isinstance(entry, Mapping):
        return config, None
    # Neither is a number of the rotary embedding.
    others = "llama_4_scaling_beta", "max_position_embeddings"
    rope = {key: value for key, value in entry.items() if key not in others}
    return {**config, "rope_parameters": rope}, entry.get("llama_4_scaling_beta")


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name. None for what is left out, such
    as the vision tower of a Mistral 3."""
    return gemma3.text_name(name, ("vision_tower", "multi_modal_projector"))


Network, Config = dense.Dense, MistralConfig
