"""Gemma 3 text models (Gemma 3 Technical Report, arXiv:2503.19786), named as in transformers."""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import nn

from tokenloop.models import gemma, layers
from tokenloop.models.layers import RopeConfig, RotaryEmbedding, kv_cache

MODEL_TYPES = ("gemma3_text",)
# transformers' Gemma3TextConfig; the 4B's config.json says nothing of what equals these.
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


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of one Gemma 3 text model; `from_dict` reads a Hugging Face config."""

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
        """Read config.json's keys, of transformers 4 or 5.

        Raises ValueError naming the field when the config lacks one or asks for something that
        is not implemented.
        """
        config = DEFAULTS | config
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias"):
            if config.get(key):
                raise ValueError(f"{key} = {config[key]} is not supported by models/gemma3.py")
        if config.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention = true is not a text generator")
        if not config["tie_word_embeddings"]:
            raise ValueError("tie_word_embeddings = false: only a head tied to the embedding")
        if config["hidden_activation"] != "gelu_pytorch_tanh":
            raise ValueError(
                f"hidden_activation = {config['hidden_activation']!r}: only gelu_pytorch_tanh"
            )
        plain = [field.name for field in fields(cls) if field.name not in ("layer_types", "rope")]
        missing = [key for key in (*plain, "num_hidden_layers") if config.get(key) is None]
        if missing:
            raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
        shape = {key: config[key] for key in plain}
        if shape["num_attention_heads"] % shape["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads = {shape['num_attention_heads']} is not a multiple of "
                f"num_key_value_heads = {shape['num_key_value_heads']}"
            )
        return cls(**shape, layer_types=_layer_types(config), rope=_rope(config))


def _layer_types(config: dict) -> tuple[str, ...]:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return gemma.layer_types(config, pattern)


def _rope(config: dict) -> dict[str, RopeConfig]:
    nested = config.get("rope_parameters") or {}
    if "rope_theta" in nested or "rope_type" in nested:
        raise ValueError("rope_parameters must have an entry for each kind of layer")
    full = {"rope_theta": config["rope_theta"]}
    full |= config.get("rope_scaling") or {}
    full |= nested.get("full_attention") or {}
    sliding = {"rope_theta": config["rope_local_base_freq"]}
    sliding |= nested.get("sliding_attention") or {}
    rope = {}
    for kind, entry in (("full_attention", full), ("sliding_attention", sliding)):
        scaling = entry.get("rope_type", entry.get("type", "default"))
        if scaling not in ("default", "linear"):
            raise ValueError(f"rope_type = {scaling!r} is not supported: default or linear")
        if scaling == "linear" and not entry.get("factor"):
            raise ValueError(f"rope_type = 'linear' of {kind} lacks its factor")
        factor = entry["factor"] if scaling == "linear" else 1.0
        rope[kind] = RopeConfig(theta=entry["rope_theta"], factor=factor)
    return rope


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name; None for what is left out."""
    return gemma.text_name(name, ("vision_tower", "multi_modal_projector"))


class RMSNorm(layers.RMSNorm):
    """The published weights are what is added to one."""

    offset = 1.0


class Attention(layers.Attention):
    """Grouped-query attention with normalised queries and keys, over its own KV cache."""

    def __init__(
        self, config: Gemma3Config, kind: str, batch: int, max_seq_len: int, dtype: torch.dtype
    ):
        c = config
        shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim
        cache = kv_cache(kind, c.sliding_window, *shape, dtype)
        super().__init__(kind, c.hidden_size, c.num_attention_heads, cache)
        self.scale = c.query_pre_attn_scalar**-0.5
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)


class Gemma3(gemma.Gemma):
    """A Gemma 3 text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk holds at most `max_chunk` tokens.
    """

    def __init__(
        self,
        config: Gemma3Config,
        max_seq_len: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        model = gemma.Backbone(
            nn.Embedding(config.vocab_size, config.hidden_size),
            [
                gemma.Block(
                    Attention(config, kind, batch, max_seq_len, dtype),
                    gemma.MLP(config.hidden_size, config.intermediate_size),
                    norm,
                )
                for kind in config.layer_types
            ],
            norm(),
            {kind: RotaryEmbedding(rope, config.head_dim) for kind, rope in config.rope.items()},
        )
        super().__init__(config, model, max_seq_len, batch)


Network, Config = Gemma3, Gemma3Config
