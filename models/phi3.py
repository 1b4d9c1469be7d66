"""Phi text models, named as in transformers: Phi-3 (arXiv:2404.14219), Phi-4 and Phi-4-mini
(arXiv:2503.01743).

They are Llamas whose heads may rotate in part, and whose layers may slide. Checkpoints have
queries, keys and values in one tensor, and gate and up in another.
"""

import re

from tokenloop.models import config as configs
from tokenloop.models import dense
from tokenloop.models.layers import Stacked

# The defaults of transformers' Phi3Config.
DEFAULTS = {
    "phi3": {
        "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_word_embeddings": False, "sliding_window": None,
    },
}  # fmt: skip
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
STACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
STACKED_NAME = re.compile(r"(.*)\.(self_attn\.qkv_proj|mlp\.gate_up_proj)\.weight")


class Phi3Config(dense.DenseConfig):
    """The shape of one Phi text model. `from_dict` reads a Hugging Face config."""

    @classmethod
    def from_dict(cls, config: dict) -> "Phi3Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        config = dense.read(config, DEFAULTS, ONLY)
        types = [dense.FULL if config["sliding_window"] is None else dense.SLIDING]
        types *= config["num_hidden_layers"]
        entry = configs.rope_entry(config)
        # The first Phi-3s call LongRoPE by other names.
        if entry.get("rope_type") in ("su", "yarn"):
            entry = configs.completed(entry | {"rope_type": "longrope"}, config)
        rope = configs.rope(entry, ("default", "longrope"), partial=True)
        rotary_dim = int(config["head_dim"] * (entry.get("partial_rotary_factor") or 1.0))
        return cls(**dense.described(config, types, {types[0]: rope}, rotary_dim=rotary_dim))


def checkpoint_name(name: str) -> str | Stacked:
    """A checkpoint's tensor name as this model's parameter name, or as those that it has the rows
    of."""
    match = STACKED_NAME.fullmatch(name)
    if match is None:
        return name
    layer, stacked = match.groups()
    return Stacked(tuple(f"{layer}.{part}.weight" for part in STACKED[stacked]))


Network, Config = dense.Dense, Phi3Config
