"""Qwen text models, named as in transformers: Qwen2 and 2.5 (arXiv:2407.10671, 2412.15115), Qwen3
and its mixtures of experts (arXiv:2505.09388).

They differ in little: Qwen2's queries, keys and values have biases, Qwen3's queries and keys norms
instead, and a mixture has routed experts for its feed-forward. Shapes: B rows, T tokens, D hidden
size.
"""

import re
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from tokenloop.models import layers
from tokenloop.models.cache import KVCache
from tokenloop.models.decoder import Backbone, CausalLM
from tokenloop.models.layers import MLP, Piece, RMSNorm, RopeConfig, RotaryEmbedding, kv_cache
from tokenloop.models.moe import MoeConfig, SparseMoe

KIND = "full_attention"
_SHARED_DEFAULTS = {
    "vocab_size": 151_936,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
# transformers' Qwen2Config, Qwen3Config and Qwen3MoeConfig; a head_dim that is nowhere is what the
# hidden size leaves to each head.
DEFAULTS = {
    "qwen2": _SHARED_DEFAULTS,
    "qwen3": _SHARED_DEFAULTS | {"head_dim": 128},
    "qwen3_moe": _SHARED_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
}
MODEL_TYPES = tuple(DEFAULTS)
# Fields whose other values are refused; a field that is missing has its value here.
UNSUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(?:(\d+)\.)?(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Qwen3Config:
    """The shape of one Qwen text model; `from_dict` reads a Hugging Face config.

    `moe` is None where the feed-forward is one for all tokens.
    """

    model_type: str
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
    rope: RopeConfig
    moe: MoeConfig | None

    @classmethod
    def from_dict(cls, config: dict) -> "Qwen3Config":
        """Read config.json's keys, of transformers 4 or 5.

        Raises ValueError naming the field when the config lacks one or asks for something that
        is not implemented.
        """
        model_type = config.get("model_type")
        if model_type not in DEFAULTS:
            raise ValueError(f"model_type = {model_type!r} is none of {', '.join(DEFAULTS)}")
        config = DEFAULTS[model_type] | config
        for key, supported in UNSUPPORTED.items():
            value = config.get(key)
            if value is not None and value != supported:
                raise ValueError(f"{key} = {value!r} is not supported: only {supported!r}")
        if other := set(config.get("layer_types") or ()) - {KIND}:
            raise ValueError(f"layer_types has {', '.join(sorted(other))}: only {KIND}")
        heads = config["num_attention_heads"]
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = heads
        if config.get("head_dim") is None and config.get("hidden_size") is not None:
            config["head_dim"] = config["hidden_size"] // heads
        plain = [field.name for field in fields(cls) if field.name not in ("rope", "moe")]
        missing = [key for key in plain if config.get(key) is None]
        if missing:
            raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
        shape = {key: config[key] for key in plain}
        if heads % shape["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {shape['num_key_value_heads']}"
            )
        moe = moe_config(config) if model_type == "qwen3_moe" else None
        return cls(**shape, rope=_rope(config), moe=moe)


def _rope(config: dict) -> RopeConfig:
    entry = {"rope_theta": config["rope_theta"]}
    entry |= config.get("rope_scaling") or {}
    entry |= config.get("rope_parameters") or {}
    scaling = entry.get("rope_type", entry.get("type", "default"))
    if scaling not in ("default", "linear"):
        raise ValueError(f"rope_type = {scaling!r} is not supported: default or linear")
    if scaling == "linear" and not entry.get("factor"):
        raise ValueError("rope_type = 'linear' lacks its factor")
    return RopeConfig(entry["rope_theta"], entry["factor"] if scaling == "linear" else 1.0)


def moe_config(config: dict) -> MoeConfig:
    """The experts that a config's keys describe. Raises ValueError for more chosen than exist."""
    # transformers 5 writes another name than the published configs have, for the same field.
    config = config | {"num_experts": config.get("num_local_experts") or config["num_experts"]}
    moe = MoeConfig(**{field.name: config[field.name] for field in fields(MoeConfig)})
    if not 1 <= moe.num_experts_per_tok <= moe.num_experts:
        raise ValueError(
            f"num_experts_per_tok = {moe.num_experts_per_tok} is not among "
            f"num_experts = {moe.num_experts}"
        )
    return moe


def checkpoint_name(name: str) -> str | Piece:
    """A checkpoint's tensor name as this model's parameter name, or as a piece of one.

    Published mixtures have a tensor for each expert and projection, GGUF files one for each
    projection of all experts; here, as in transformers, gate and up are one parameter.
    """
    match = EXPERT.fullmatch(name)
    if match is None:
        return name
    experts, entry, projection = match.groups()
    part, parts, target = {
        "gate": (0, 2, "gate_up_proj"),
        "up": (1, 2, "gate_up_proj"),
        "down": (0, 1, "down_proj"),
    }[projection]
    return Piece(f"{experts}.{target}", part, parts, None if entry is None else int(entry))


class Attention(layers.Attention):
    """Grouped-query attention with biases (Qwen2) or with normalised queries and keys (Qwen3)."""

    def __init__(self, config: Qwen3Config, cache: KVCache):
        biased = config.model_type == "qwen2"
        heads, size = config.num_attention_heads, config.head_dim
        super().__init__(KIND, config.hidden_size, heads, cache, bias=biased)
        self.scale = size**-0.5
        if not biased:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to what was before it."""

    def __init__(self, config: Qwen3Config, cache: KVCache):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, cache)
        if config.moe is None:
            self.mlp = MLP(size, config.intermediate_size, nn.SiLU())
        else:
            self.mlp = SparseMoe(size, config.moe)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """What the KV cache is given: all of the block before the attention itself."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def add_attended(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, T, D] plus what the attention gave: the first residual branch."""
        return x + self.self_attn.combine(attended)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All of the block after the attention: x [B, T, D] plus both residual branches."""
        x = self.add_attended(x, attended)
        return x + self.mlp(self.mlp_norm(x))

    # What attention and feed-forward give is added as it is.
    branch_norms = None, None

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm before the feed-forward."""
        return self.post_attention_layernorm


class Qwen3(CausalLM):
    """A Qwen text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk may be as long as the cache.
    """

    def __init__(
        self,
        config: Qwen3Config,
        max_seq_len: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        shape = batch, max_seq_len, config.num_key_value_heads, config.head_dim
        model = Backbone(
            nn.Embedding(config.vocab_size, config.hidden_size),
            [
                Block(config, kv_cache(KIND, max_seq_len, *shape, dtype))
                for _ in range(config.num_hidden_layers)
            ],
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            {KIND: RotaryEmbedding(config.rope, config.head_dim)},
        )
        super().__init__(
            config,
            model,
            max_seq_len,
            batch,
            max_chunk=max_seq_len,
            tied=config.tie_word_embeddings,
        )


Network, Config = Qwen3, Qwen3Config
