"""Granite text models (Granite 3.0 Language Models, IBM 2024), named as in transformers: Granite 3,
and what is dense of Granite 4.

They are Llamas whose embeddings, scores, branches and logits are multiplied by numbers of the
config (models/dense.py).
"""

import re

from tokenloop.models import config as configs
from tokenloop.models import dense, llama
from tokenloop.models.layers import RopeConfig, Stacked

_SHARED_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}  # fmt: skip
# The defaults of transformers' GraniteConfig and GraniteMoeHybridConfig.
DEFAULTS = {
    "granite": _SHARED_DEFAULTS,
    "granitemoehybrid": _SHARED_DEFAULTS
    | {
        "shared_intermediate_size": 1024, "num_local_experts": 8, "position_embedding_type": None,
    },
}  # fmt: skip
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {
    "granite": {"hidden_act": "silu"},
    "granitemoehybrid": {"hidden_act": "silu", "num_local_experts": 0, "mlp_bias": False},
}
MULTIPLIERS = (
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling",
)  # fmt: skip
SHARED_MLP = re.compile(r"(.*)\.shared_mlp\.(input|output)_linear\.weight")


class GraniteConfig(dense.DenseConfig):
    """The shape of one Granite text model. `from_dict` reads a Hugging Face config."""

    @classmethod
    def from_dict(cls, config: dict) -> "GraniteConfig":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        model_type = configs.known_type(config, DEFAULTS)
        config = dense.read(config, DEFAULTS, ONLY[model_type])
        configs.read(config, defaults={}, only={}, needed=MULTIPLIERS, multiples=())
        rotates = True
        if model_type == "granitemoehybrid":
            config = hybrid(config)
            rotates = config["position_embedding_type"] == "rope"
        types = configs.layer_types(config, dense.FULL, 1)
        rope = configs.rope(configs.rope_entry(config), llama.ROPE_TYPES)
        rope = {dense.FULL: rope, dense.UNROTATED: RopeConfig(1.0, partial=0.0)}
        rotations = [dense.FULL if rotates else dense.UNROTATED] * len(types)
        multipliers = {name: config[name] for name in MULTIPLIERS}
        return cls(**dense.described(config, types, rope, rotations, **multipliers))


def hybrid(config: dict) -> dict:
    """The keys of a Granite 4, whose layers all attend and which has no experts, as a Granite 3's.

    Raises ValueError for layers that do not attend, for none, which is Mamba for all, and for
    another position_embedding_type.
    """
    needed = ["layer_types", "shared_intermediate_size"]
    configs.read(config, defaults={}, only={}, needed=needed, multiples=())
    # Published configs have the older name of the type.
    types = [dense.FULL if each == "attention" else each for each in config["layer_types"]]
    if others := set(types) - {dense.FULL}:
        raise ValueError(
            f"layer_types has {', '.join(sorted(others))}: only attention and {dense.FULL} are "
            "supported"
        )
    kind = config["position_embedding_type"]
    if kind not in (None, "rope", "nope"):
        raise ValueError(f"position_embedding_type = {kind!r} is not supported: rope or nope")
    return config | {"layer_types": types, "intermediate_size": config["shared_intermediate_size"]}


def checkpoint_name(name: str) -> str | Stacked:
    """A checkpoint's tensor name as this model's parameter name, or as those of two. Granite 4 has
    gate above up in one tensor."""
    match = SHARED_MLP.fullmatch(name)
    if match is None:
        return name
    layer, side = match.groups()
    if side == "output":
        return f"{layer}.mlp.down_proj.weight"
    return Stacked((f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"))


Network, Config = dense.Dense, GraniteConfig
