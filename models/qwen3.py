"""Qwen text models, named as in transformers: Qwen2 and 2.5 (arXiv:2407.10671, 2412.15115), Qwen3
and its mixtures of experts (arXiv:2505.09388).

They differ in little. Qwen2's queries, keys and values have biases. Qwen3's queries and keys have
norms instead. A mixture has routed experts for its feed-forward. Shapes: B rows, T tokens, D hidden
size.
"""

import re
from dataclasses import MISSING, dataclass, fields
from functools import partial

import torch

from tokenloop.models import config as configs
from tokenloop.models import layers
from tokenloop.models.decoder import Block, CausalLM
from tokenloop.models.moe import MoeConfig, SparseMoe

FULL = "full_attention"
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
# The defaults of transformers' Qwen2Config, Qwen3Config and Qwen3MoeConfig. A head_dim that is
# nowhere is what the hidden size leaves to each head.
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
# Fields for which only one value is implemented.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "per_layer_config": None,
}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(?:(\d{1,9})\.)?(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Qwen3Config:
    """The shape of one Qwen text model. `from_dict` reads a Hugging Face config.

    `moe` is None where all tokens have one feed-forward.
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
    rope: layers.RopeConfig
    moe: MoeConfig | None

    @classmethod
    def from_dict(cls, config: dict) -> "Qwen3Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        model_type = configs.known_type(config, DEFAULTS)
        configs.one_of(config, "num_local_experts", "num_experts")
        config = configs.with_heads(DEFAULTS[model_type] | config)
        if other := set(config.get("layer_types") or ()) - {FULL}:
            raise ValueError(f"layer_types has {', '.join(sorted(other))}: only {FULL}")
        plain = [field.name for field in fields(cls) if field.name not in ("rope", "moe")]
        config = configs.read(config, defaults={}, only=ONLY, needed=plain)
        configs.layer_types(config, FULL, 1)
        size = configs.rotated("head_dim", config["head_dim"])
        rope = configs.fitting(configs.rope(configs.rope_entry(config)), size)
        config = configs.reaching(config, rope)
        return cls(
            **{key: config[key] for key in plain},
            rope=rope,
            moe=moe_config(config) if model_type == "qwen3_moe" else None,
        )


def moe_config(config: dict, activation: str = "silu", bias: bool = False) -> MoeConfig:
    """The experts that a config's keys describe; the rest is MoeConfig's. Raises ValueError for a
    key that is missing, and for more chosen than exist."""
    # transformers 5 and the published configs have different names for the same field.
    config = config | {"num_experts": config.get("num_local_experts") or config.get("num_experts")}
    needed = [field.name for field in fields(MoeConfig) if field.default is MISSING]
    config = configs.read(config, defaults={}, only={}, needed=needed, multiples=())
    moe = MoeConfig(**{name: config[name] for name in needed}, activation=activation, bias=bias)
    if not 1 <= moe.num_experts_per_tok <= moe.num_experts:
        raise ValueError(
            f"num_experts_per_tok = {moe.num_experts_per_tok} is not among "
            f"num_experts = {moe.num_experts}"
        )
    return moe


def checkpoint_name(name: str) -> str | layers.Shard:
    """A checkpoint's tensor name as this model's parameter name, or as a shard of one.

    Published mixtures have a tensor for each expert and projection. GGUF files have one for each
    projection of all experts. Gate and up are one parameter here, as in transformers.
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
    return layers.Shard(f"{experts}.{target}", part, parts, None if entry is None else int(entry))


class Qwen3(CausalLM):
    """A Qwen text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk may be as long as the cache.
    """

    def __init__(
        self, config: Qwen3Config, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c, is_qwen2 = config, config.model_type == "qwen2"
        norm = partial(layers.RMSNorm, eps=c.rms_norm_eps)
        shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim

        def block() -> Block:
            cache = layers.kv_cache(FULL, max_seq_len, *shape, dtype)
            sizes = c.hidden_size, c.num_attention_heads, cache, c.head_dim**-0.5
            own = {"bias": True} if is_qwen2 else {"norm": norm}
            attention = layers.Attention(FULL, *sizes, **own)
            if c.moe is None:
                mlp = layers.MLP(c.hidden_size, c.intermediate_size, "silu")
            else:
                mlp = SparseMoe(c.hidden_size, c.moe)
            return Block(attention, mlp, partial(norm, c.hidden_size))

        blocks = [block() for _ in range(c.num_hidden_layers)]
        rope = {FULL: layers.RotaryEmbedding(c.rope, c.head_dim, max_seq_len)}
        cache = max_seq_len, batch, max_seq_len
        norm = norm(c.hidden_size)
        super().__init__(c, blocks, norm, rope, *cache, tied=c.tie_word_embeddings)


Network, Config = Qwen3, Qwen3Config
