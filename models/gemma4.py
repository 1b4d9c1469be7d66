"""Gemma 4 text models, dense, named as in transformers (its models/gemma4 is the reference).

Sliding and full layers differ in more than their window: in head size, key/value heads and rotary
embedding; and full layers may have no v_proj, where a value is the key before norm and rotation.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenloop.models import gemma, layers
from tokenloop.models.layers import (
    RMSNorm,
    RopeConfig,
    RotaryEmbedding,
    kv_cache,
    normalize,
    rotate,
)

MODEL_TYPES = ("gemma4_text",)
# transformers' Gemma4TextConfig; a config.json need not say what equals these.
DEFAULTS = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": None,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}
ROPE_PARAMETERS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}
# What the E2B and E4B (per-layer inputs, shared keys and values) and the 26B-A4B (experts) have.
UNSUPPORTED = (
    "attention_bias",
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "enable_moe_block",
    "use_double_wide_mlp",
)


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of one kind of layer; `keys_are_values`: there is no v_proj."""

    head_dim: int
    num_key_value_heads: int
    keys_are_values: bool
    rope: RopeConfig


@dataclass(frozen=True)
class Gemma4Config:
    """The shape of one Gemma 4 text model; `from_dict` reads a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    rms_norm_eps: float
    sliding_window: int
    max_position_embeddings: int
    final_logit_softcapping: float | None
    layer_types: tuple[str, ...]
    attention: dict[str, AttentionConfig]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Gemma4Config":
        """Read config.json's keys.

        Raises ValueError naming the field when the config asks for something that is not
        implemented, or sets a size to null.
        """
        config = DEFAULTS | config
        for key in UNSUPPORTED:
            if config[key]:
                raise ValueError(f"{key} = {config[key]} is not supported by models/gemma4.py")
        # "vision" concerns image tokens only.
        if config["use_bidirectional_attention"] not in (None, "vision"):
            raise ValueError(
                f"use_bidirectional_attention = {config['use_bidirectional_attention']!r} is not "
                "a text generator"
            )
        if not config["tie_word_embeddings"]:
            raise ValueError("tie_word_embeddings = false: only a head tied to the embedding")
        if config["hidden_activation"] != "gelu_pytorch_tanh":
            raise ValueError(
                f"hidden_activation = {config['hidden_activation']!r}: only gelu_pytorch_tanh"
            )
        if config["final_logit_softcapping"] == 0:
            raise ValueError("final_logit_softcapping = 0 leaves no logits; null is no cap")
        derived = ("final_logit_softcapping", "layer_types", "attention")
        plain = [field.name for field in fields(cls) if field.name not in derived]
        sizes = (*plain, "num_hidden_layers", "num_key_value_heads", "head_dim")
        missing = [key for key in sizes if config[key] is None]
        if missing:
            raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
        # The last layer is full whatever the list says.
        layer_types = (*gemma.layer_types(config)[:-1], "full_attention")
        return cls(
            **{key: config[key] for key in plain},
            final_logit_softcapping=config["final_logit_softcapping"],
            layer_types=layer_types,
            attention=_attention(config, layer_types),
        )


def _attention(config: dict[str, Any], layer_types: tuple[str, ...]) -> dict[str, AttentionConfig]:
    shapes = _head_shapes(config, layer_types)
    attention = {}
    for kind, shape in shapes.items():
        heads = shape["num_key_value_heads"]
        if config["num_attention_heads"] % heads:
            raise ValueError(
                f"num_attention_heads = {config['num_attention_heads']} is not a multiple of the "
                f"{heads} key/value heads of {kind}"
            )
        keys_are_values = config["attention_k_eq_v"] and kind == "full_attention"
        attention[kind] = AttentionConfig(
            **shape, keys_are_values=keys_are_values, rope=_rope(config, kind)
        )
    return attention


def _head_shapes(config: dict[str, Any], layer_types: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """head_dim and num_key_value_heads of each kind of layer that there is.

    A published config.json has what full layers have of their own as global_head_dim and
    num_global_key_value_heads; transformers 5.24 writes each layer that differs in
    per_layer_config.
    """
    own = config.get("per_layer_config")
    if own is None:
        full = {"head_dim": config["global_head_dim"]}
        if config["attention_k_eq_v"] and config["num_global_key_value_heads"]:
            full["num_key_value_heads"] = config["num_global_key_value_heads"]
        own = {i: full for i, kind in enumerate(layer_types) if kind == "full_attention"}
    common = {key: config[key] for key in ("head_dim", "num_key_value_heads")}
    own = {int(i): shape for i, shape in own.items()}
    shapes: dict[str, dict[str, int]] = {}
    for i, kind in enumerate(layer_types):
        shape = common | own.get(i, {})
        if unknown := shape.keys() - common.keys():
            raise ValueError(f"per_layer_config sets {', '.join(sorted(unknown))} of layer {i}")
        if shapes.setdefault(kind, shape) != shape:
            raise ValueError(
                f"per_layer_config gives layer {i} {shape} and another of {kind} {shapes[kind]}"
            )
    return shapes


def _rope(config: dict[str, Any], kind: str) -> RopeConfig:
    parameters = config["rope_parameters"] or ROPE_PARAMETERS
    if "rope_theta" not in (parameters.get(kind) or {}):
        raise ValueError(f"rope_parameters lacks rope_theta of {kind}")
    entry = parameters[kind]
    rope_type = entry.get("rope_type", "default")
    if rope_type == "default":
        return RopeConfig(entry["rope_theta"])
    if rope_type != "proportional":
        raise ValueError(f"rope_type = {rope_type!r} is not supported: default or proportional")
    return RopeConfig(
        entry["rope_theta"], entry.get("factor", 1.0), entry.get("partial_rotary_factor", 1.0)
    )


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name; None for what is left out."""
    return gemma.text_name(name, ("vision_tower", "embed_vision", "audio_tower", "embed_audio"))


class Attention(layers.Attention):
    """Grouped-query attention with normalised queries, keys and values, over its own KV cache."""

    # The norms' weights hold it.
    scale = 1.0

    def __init__(
        self, config: Gemma4Config, kind: str, batch: int, max_seq_len: int, dtype: torch.dtype
    ):
        own, eps = config.attention[kind], config.rms_norm_eps
        shape = batch, max_seq_len, own.num_key_value_heads, own.head_dim
        cache = kv_cache(kind, config.sliding_window, *shape, dtype)
        heads = config.num_attention_heads
        super().__init__(kind, config.hidden_size, heads, cache, not own.keys_are_values)
        self.keys_are_values = own.keys_are_values
        self.q_norm = RMSNorm(own.head_dim, eps)
        self.k_norm = RMSNorm(own.head_dim, eps)
        self.v_norm = ValueNorm(eps)

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, K, head_dim] of x [B, T, D]."""
        q, k = self.heads(self.q_proj(x)), self.heads(self.k_proj(x))
        v = k if self.keys_are_values else self.heads(self.v_proj(x))
        q, k = rotate(self.q_norm(q), rope[self.kind]), rotate(self.k_norm(k), rope[self.kind])
        return q, k, self.v_norm(v)


class ValueNorm(nn.Module):
    """x / rms(x) over the last axis, in float32 (arXiv:1910.07467): a norm without weights."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.eps).to(x.dtype)


class Block(gemma.Block):
    """A block whose result is multiplied by a number of its own."""

    def __init__(
        self, config: Gemma4Config, kind: str, batch: int, max_seq_len: int, dtype: torch.dtype
    ):
        super().__init__(
            Attention(config, kind, batch, max_seq_len, dtype),
            gemma.MLP(config.hidden_size, config.intermediate_size),
            partial(RMSNorm, config.hidden_size, config.rms_norm_eps),
        )
        # A buffer in transformers; a parameter here, because checkpoints fill parameters.
        self.layer_scalar = nn.Parameter(torch.empty(1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All of the block after the attention: x [B, T, D] plus both residual branches, scaled."""
        return super().finish(x, attended) * self.layer_scalar


class Gemma4(gemma.Gemma):
    """A Gemma 4 text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk holds at most `max_chunk` tokens.
    """

    def __init__(
        self,
        config: Gemma4Config,
        max_seq_len: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        model = gemma.Backbone(
            nn.Embedding(config.vocab_size, config.hidden_size),
            [Block(config, kind, batch, max_seq_len, dtype) for kind in config.layer_types],
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            {
                kind: RotaryEmbedding(own.rope, own.head_dim)
                for kind, own in config.attention.items()
            },
        )
        super().__init__(config, model, max_seq_len, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [B, V] of hidden states [B, 1, D] before the final norm, soft-capped."""
        logits, cap = super().logits(hidden), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


Network, Config = Gemma4, Gemma4Config
