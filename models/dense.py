"""What Llama and its kin share: dense text models whose layers differ in window and rotation alone.

A family reads its config as a DenseConfig, and says what else of its blocks is its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from tokenloop.models import config as configs
from tokenloop.models.decoder import PRE_NORMS, Block, CausalLM
from tokenloop.models.layers import (
    MLP,
    Attention,
    RMSNorm,
    RopeConfig,
    RotaryEmbedding,
    kv_cache,
)

FULL, SLIDING = "full_attention", "sliding_attention"
# The rotary embedding, by name, of layers that have none: all of its angles are 0.
UNROTATED = "none"
# Fields of a config.json that are read as they are.
PLAIN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True)
class DenseConfig:
    """The shape of one dense text model. A family's `from_dict` reads a Hugging Face config.

    `rotations` has for each layer the name of its rotary embedding in `rope`, which is of the first
    `rotary_dim` elements of each head. `sliding_window` is
    None where no layer slides. The multipliers are Granite's: scores
    are multiplied by `attention_multiplier`, embeddings by `embedding_multiplier`, branches by
    `residual_multiplier`, and logits are divided by `logits_scaling`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rotations: tuple[str, ...]
    rope: dict[str, RopeConfig]
    rotary_dim: int
    attention_multiplier: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


def read(
    config: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]], only: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json's keys over the `defaults` of its model_type, checked, with heads filled in. No
    layer has a shape of its own.

    Raises ValueError as `configs.read`.
    """
    only, needed = {"per_layer_config": None, **only}, (*PLAIN, "num_hidden_layers")
    own = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
    own |= defaults[configs.known_type(config, defaults)]
    config = configs.with_heads(own | dict(config))
    return configs.read(config, defaults={}, only=only, needed=needed)


def described(
    config: Mapping[str, Any], layer_types: Sequence[str], rope: Mapping[str, RopeConfig],
    rotations: Sequence[str] | None = None, rotary_dim: int | None = None, **multipliers: float,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a DenseConfig, of a config that `read` gave. The rotary embedding of a layer is
    the one in `rope` of its name in `rotations`, which are the `layer_types` unless they are given.
    `rotary_dim` elements of a head rotate, or all of them.

    Raises ValueError for a rotary_dim that is not made of pairs, for divisors of frequencies that
    are not as many as those, and for layers that slide without a window.
    """
    name = "head_dim" if rotary_dim is None else "head_dim * partial_rotary_factor"
    rotary_dim = configs.rotated(name, rotary_dim or config["head_dim"])
    rotations = tuple(rotations or layer_types)
    rope = {name: configs.fitting(rope[name], rotary_dim) for name in dict.fromkeys(rotations)}
    for each in rope.values():
        config = configs.reaching(config, each)
    slides = SLIDING in layer_types
    if slides and config["sliding_window"] is None:
        raise ValueError(f"layer_types has {SLIDING}, and the config lacks its sliding_window")
    return {
        **{key: config[key] for key in PLAIN},
        "sliding_window": config["sliding_window"] if slides else None,
        "layer_types": tuple(layer_types),
        "rotations": rotations,
        "rope": rope,
        "rotary_dim": rotary_dim,
        "attention_multiplier": config["head_dim"] ** -0.5,
        **multipliers,
    }


class Dense(CausalLM):
    """A dense text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk may be as long as the cache, or as the sliding window where there is one. A
    family has its own `norms` (models/decoder.py), and `whole_norms`, which are norms of all
    queries and of all keys of a token. `has_sinks` is Attention's.
    """

    norms: ClassVar[Mapping[str, str]] = PRE_NORMS
    whole_norms: ClassVar[bool] = False
    has_sinks: ClassVar[bool] = False

    def __init__(
        self, config: DenseConfig, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        # Instead of branches that are multiplied by m, all that they are added to is divided by m.
        # A norm does not see that, if its eps is divided by m * m.
        residual = c.residual_multiplier
        norm = partial(RMSNorm, eps=c.rms_norm_eps / residual**2)
        shape, window = (batch, max_seq_len, c.num_key_value_heads, c.head_dim), c.sliding_window
        own = {"norm": norm, "whole_norms": True} if self.whole_norms else {}

        def block(layer_type: str, rotation: str) -> Block:
            cache, bias = (
                kv_cache(layer_type, window or max_seq_len, *shape, dtype),
                c.attention_bias,
            )
            sizes = c.hidden_size, c.num_attention_heads, cache, c.attention_multiplier
            biases = {"bias": bias, "output_bias": bias}
            attention = Attention(
                layer_type, *sizes, **biases, **own, rotation=rotation, has_sinks=self.has_sinks
            )
            return Block(attention, self.feed_forward(c), partial(norm, c.hidden_size), self.norms)

        blocks = [block(*layer) for layer in zip(c.layer_types, c.rotations)]
        rope = {
            name: RotaryEmbedding(each, c.rotary_dim, max_seq_len) for name, each in c.rope.items()
        }
        cache = max_seq_len, batch, min(window or max_seq_len, max_seq_len)
        # Logits that are divided are those of a norm that is.
        last = norm(c.hidden_size, scale=1 / c.logits_scaling)
        super().__init__(
            c, blocks, last, rope, *cache, tied=c.tie_word_embeddings,
            embed_scale=c.embedding_multiplier / residual, rounds_scale=False,
        )  # fmt: skip

    @staticmethod
    def feed_forward(config: DenseConfig) -> nn.Module:
        """The feed-forward of one block."""
        c = config
        return MLP(c.hidden_size, c.intermediate_size, "silu", bias=c.mlp_bias)
