"""SmolLM3 text models, named as in transformers: Llamas in which every fourth layer does not rotate
its queries and keys (arXiv:2501.18795)."""

from tokenloop.models import config as configs
from tokenloop.models import dense
from tokenloop.models.layers import RopeConfig

# The defaults of transformers' SmolLM3Config.
DEFAULTS = {
    "smollm3": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True, "no_rope_layer_interval": 4,
    },
}  # fmt: skip
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {"hidden_act": "silu", "use_sliding_window": False}


class SmolLM3Config(dense.DenseConfig):
    """The shape of one SmolLM3 text model. `from_dict` reads a Hugging Face config."""

    @classmethod
    def from_dict(cls, config: dict) -> "SmolLM3Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        config = dense.read(config, DEFAULTS, ONLY)
        types = configs.layer_types(config, dense.FULL, 1)
        rope = configs.rope(configs.rope_entry(config))
        return cls(
            **dense.described(
                config, types, {dense.FULL: rope, dense.UNROTATED: RopeConfig(1.0, partial=0.0)},
                [dense.FULL if rotates else dense.UNROTATED for rotates in _rotates(config)],
            )
        )  # fmt: skip


def _rotates(config: dict) -> list[int]:
    """Whether each layer rotates, 1 or 0, which is what no_rope_layers says. Without a list layers
    from one `no_rope_layer_interval` to the next do, but for the last of them."""
    count, listed = config["num_hidden_layers"], config.get("no_rope_layers")
    if listed is None:
        needed = ["no_rope_layer_interval"]
        interval = configs.read(config, defaults={}, only={}, needed=needed)[needed[0]]
        return [int((i + 1) % interval != 0) for i in range(count)]
    if len(listed) < count:
        raise ValueError(f"no_rope_layers has {len(listed)} entries for {count} layers")
    return list(listed[:count])


def checkpoint_name(name: str) -> str:
    """A checkpoint's tensor name as this model's parameter name."""
    return name


Network, Config = dense.Dense, SmolLM3Config
