"""Llama text models (arXiv:2407.21783), named as in transformers: Llama 2 and 3, and what else has
their architecture, such as SmolLM2."""

from dataclasses import dataclass, fields
from functools import partial

import torch

from tokenloop.models import config as configs
from tokenloop.models.decoder import Block, CausalLM
from tokenloop.models.layers import MLP, Attention, RMSNorm, RopeConfig, RotaryEmbedding, kv_cache

MODEL_TYPES = ("llama",)
FULL = "full_attention"
# The defaults of transformers' LlamaConfig. Key/value heads and head_dim follow from the others.
DEFAULTS = {
    "vocab_size": 32_000, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# Fields for which only one value is implemented.
ONLY = {"hidden_act": "silu", "per_layer_config": None}
# The last is no transformers' own: GGUF files have divisors of their own.
ROPE_TYPES = *configs.ROPE_TYPES, "factors"


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of one Llama text model. `from_dict` reads a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        configs.known_type(config, MODEL_TYPES)
        config = configs.with_heads(DEFAULTS | config)
        plain = [field.name for field in fields(cls) if field.name != "rope"]
        config = configs.read(config, defaults={}, only=ONLY, needed=plain)
        configs.layer_types(config, FULL, 1)
        rope = configs.rope(configs.rope_entry(config), ROPE_TYPES)
        rope = configs.fitting(rope, configs.rotated("head_dim", config["head_dim"]))
        config = configs.reaching(config, rope)
        return cls(**{key: config[key] for key in plain}, rope=rope)


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name. None for the rotary frequencies
    that old checkpoints hold. transformers does not read them either: they follow from the config.
    """
    return None if name.endswith("rotary_emb.inv_freq") else name


class Llama(CausalLM):
    """A Llama text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk may be as long as the cache.
    """

    def __init__(
        self, config: LlamaConfig, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim

        def block() -> Block:
            cache, bias = kv_cache(FULL, max_seq_len, *shape, dtype), c.attention_bias
            sizes = c.hidden_size, c.num_attention_heads, cache, c.head_dim**-0.5
            attention = Attention(FULL, *sizes, bias=bias, output_bias=bias)
            mlp = MLP(c.hidden_size, c.intermediate_size, "silu", bias=c.mlp_bias)
            return Block(attention, mlp, norm)

        blocks = [block() for _ in range(c.num_hidden_layers)]
        rope = {FULL: RotaryEmbedding(c.rope, c.head_dim, max_seq_len)}
        cache = max_seq_len, batch, max_seq_len
        super().__init__(c, blocks, norm(), rope, *cache, tied=c.tie_word_embeddings)


Network, Config = Llama, LlamaConfig
