"""Llama text models (arXiv:2407.21783), named as in transformers: Llama 2 and 3, and what else has
their architecture, such as SmolLM2."""

from tokenloop.models import config as configs
from tokenloop.models import dense

# The defaults of transformers' LlamaConfig. Key/value heads and head_dim follow from the others.
DEFAULTS = {
    "llama": {
        "vocab_size": 32_000, "num_attention_heads": 32, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {"hidden_act": "silu"}
# The last is no transformers' own: GGUF files have divisors of their own.
ROPE_TYPES = *configs.ROPE_TYPES, "factors"


class LlamaConfig(dense.DenseConfig):
    """The shape of one Llama text model. `from_dict` reads a Hugging Face config."""

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        config = dense.read(config, DEFAULTS, ONLY)
        types = configs.layer_types(config, dense.FULL, 1)
        rope = configs.rope(configs.rope_entry(config), ROPE_TYPES)
        return cls(**dense.described(config, types, {dense.FULL: rope}))


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name. None for the rotary frequencies
    that old checkpoints hold. transformers does not read them either: they follow from the config.
    """
    return None if name.endswith("rotary_emb.inv_freq") else name


Network, Config = dense.Dense, LlamaConfig
