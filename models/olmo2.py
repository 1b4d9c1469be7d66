"""OLMo text models (arXiv:2501.00656), named as in transformers: OLMo 2, and OLMo 3, three quarters
of whose layers slide.

Norms are those of what attention and the feed-forward give, and not of their inputs. Queries and
keys have norms of all heads at once.
"""

from tokenloop.models import config as configs
from tokenloop.models import dense
from tokenloop.models.decoder import POST_NORMS
from tokenloop.models.layers import RopeConfig

_SHARED_DEFAULTS = {
    "vocab_size": 50_304, "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": False,
}  # fmt: skip
# The defaults of transformers' Olmo2Config and Olmo3Config.
DEFAULTS = {
    "olmo2": _SHARED_DEFAULTS,
    "olmo3": _SHARED_DEFAULTS | {"rope_theta": 500_000.0, "sliding_window": 4096},
}
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {
    "olmo2": {"hidden_act": "silu", "mlp_bias": False},
    # These are in rope_parameters, for each type of layer.
    "olmo3": {
        "hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": None,
        "original_max_position_embeddings": None,
    },
}  # fmt: skip


class Olmo2Config(dense.DenseConfig):
    """The shape of one OLMo text model. `from_dict` reads a Hugging Face config."""

    @classmethod
    def from_dict(cls, config: dict) -> "Olmo2Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        model_type, said = configs.known_type(config, DEFAULTS), config.get("rope_theta")
        config = dense.read(config, DEFAULTS, ONLY[model_type])
        if model_type == "olmo2":
            types = configs.layer_types(config, dense.FULL, 1)
            rope = {dense.FULL: configs.rope(configs.rope_entry(config))}
        else:
            types = configs.layer_types(config, dense.SLIDING, 4)
            rope = _rope_by_type(config, said)
        return cls(**dense.described(config, types, rope))


def _rope_by_type(config: dict, said: float | None) -> dict[str, RopeConfig]:
    """OLMo 3's rotary embedding of each type of layer. Only that of full layers is scaled.

    Raises ValueError for a rope_theta for all layers, which is `said`, that is not the default:
    transformers takes it for full layers alone. Likewise for a rope_scaling of a `type`.
    """
    nested, theta = config.get("rope_parameters") or {}, DEFAULTS["olmo3"]["rope_theta"]
    if "rope_theta" in nested or "rope_type" in nested:
        raise ValueError("rope_parameters must have an entry for each kind of layer")
    if said not in (None, theta):
        raise ValueError(
            f"rope_theta = {said} is not supported: only {theta}, or rope_parameters with an entry "
            "for each kind of layer"
        )
    scaling = config.get("rope_scaling") or {}
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling.type = {scaling['type']!r} is not supported: rope_type is right, which "
            "transformers reads alone"
        )
    default = {"rope_theta": theta}
    full = default | configs.merged(config.get("rope_scaling"), nested.get(dense.FULL))
    sliding = default | (nested.get(dense.SLIDING) or {})
    return {
        name: configs.rope(configs.completed(entry, config), of=name)
        for name, entry in ((dense.FULL, full), (dense.SLIDING, sliding))
    }


def checkpoint_name(name: str) -> str:
    """A checkpoint's tensor name as this model's parameter name."""
    return name


class Olmo2(dense.Dense):
    """An OLMo text model, as dense.Dense."""

    norms = POST_NORMS
    whole_norms = True


Network, Config = Olmo2, Olmo2Config
