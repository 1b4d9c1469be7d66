"""Gemma 3 text models (Gemma 3 Technical Report, arXiv:2503.19786), named as in transformers."""

from dataclasses import dataclass, fields
from functools import partial

import torch

from tokenloop.models import config as configs
from tokenloop.models.decoder import SANDWICH_NORMS, Block, CausalLM
from tokenloop.models.layers import MLP, Attention, RMSNorm, RopeConfig, RotaryEmbedding, kv_cache

MODEL_TYPES = ("gemma3_text",)
SLIDING, FULL = "sliding_attention", "full_attention"
# The defaults of transformers' Gemma3TextConfig. The 4B's config.json leaves out what equals them.
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
# Fields for which only one value is implemented.
ONLY = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    # Both are in rope_parameters, for each type of layer.
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "per_layer_config": None,
}


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of one Gemma 3 text model. `from_dict` reads a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    query_pre_attn_scalar: float
    sliding_window: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    rope: dict[str, RopeConfig]

    @classmethod
    def from_dict(cls, config: dict) -> "Gemma3Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        if not config.get("layer_types"):
            # transformers writes the second name, and does not read it.
            read = {"sliding_window_pattern": config.get("sliding_window_pattern") or 6}
            configs.one_of(config | read, "sliding_window_pattern", "_sliding_window_pattern")
        plain = [field.name for field in fields(cls) if field.name not in ("layer_types", "rope")]
        needed = *plain, "num_hidden_layers", "tie_word_embeddings"
        config = configs.read(config, defaults=DEFAULTS, only=ONLY, needed=needed)
        configs.rotated("head_dim", config["head_dim"])
        pattern = config.get("sliding_window_pattern") or 6
        rope = ropes(config)
        config = configs.reaching(config, rope[FULL])
        return cls(
            **{key: config[key] for key in plain},
            layer_types=configs.layer_types(config, SLIDING, pattern),
            rope=rope,
        )


def ropes(config: dict) -> dict[str, RopeConfig]:
    """The rotary embedding of each type of layer. Raises ValueError for parameters of all types
    together, and as models/config_rope.py."""
    nested = config.get("rope_parameters") or {}
    if "rope_theta" in nested or "rope_type" in nested:
        raise ValueError("rope_parameters must have an entry for each kind of layer")
    full = {"rope_theta": config["rope_theta"]}
    full |= configs.merged(config.get("rope_scaling"), nested.get(FULL))
    sliding = {"rope_theta": config["rope_local_base_freq"]} | (nested.get(SLIDING) or {})
    ropes = {
        name: configs.rope(configs.completed(entry, config), of=name)
        for name, entry in ((FULL, full), (SLIDING, sliding))
    }
    return {name: configs.fitting(rope, config["head_dim"]) for name, rope in ropes.items()}


def text_name(name: str, other_parts: tuple[str, ...]) -> str | None:
    """A checkpoint's tensor name as the text model's parameter name. None for what is left out.

    Multimodal checkpoints hold the text model under a prefix beside `other_parts`, which work on
    images and sounds and change nothing of a text's logits.
    """
    if name.removeprefix("model.").startswith(tuple(f"{part}." for part in other_parts)):
        return None
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name. None for what is left out."""
    return text_name(name, ("vision_tower", "multi_modal_projector"))


class Gemma3(CausalLM):
    """A Gemma 3 text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk is no longer than the sliding window, and the head is tied.
    """

    def __init__(
        self, config: Gemma3Config, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        # The published weights are added to one.
        norm = partial(RMSNorm, eps=c.rms_norm_eps, offset=1.0)
        shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim

        def block(layer_type: str) -> Block:
            cache = kv_cache(layer_type, c.sliding_window, *shape, dtype)
            scale, heads = c.query_pre_attn_scalar**-0.5, c.num_attention_heads
            return Block(
                Attention(layer_type, c.hidden_size, heads, cache, scale, norm=norm),
                MLP(c.hidden_size, c.intermediate_size, "gelu_tanh"),
                partial(norm, c.hidden_size),
                SANDWICH_NORMS,
            )

        blocks = [block(layer_type) for layer_type in c.layer_types]
        rope = {
            name: RotaryEmbedding(rope, c.head_dim, max_seq_len) for name, rope in c.rope.items()
        }
        max_chunk, scale = min(c.sliding_window, max_seq_len), c.hidden_size**0.5
        cache = max_seq_len, batch, max_chunk
        super().__init__(c, blocks, norm(c.hidden_size), rope, *cache, tied=True, embed_scale=scale)


Network, Config = Gemma3, Gemma3Config
