"""Hybrid text models, named as in transformers: Qwen3.5's, dense or with routed experts, and
Qwen3-Next's layout of them.

Most layers are gated delta nets, which remember the same amount whatever the context. Every fourth
is attention with an output gate over a KV cache. Shapes: B rows, T tokens, D hidden size, H heads.
"""

from dataclasses import dataclass, fields
from functools import partial

import torch

from tokenloop.models import config as configs
from tokenloop.models import layers, qwen3
from tokenloop.models.decoder import Block, CausalLM
from tokenloop.models.delta_net import DeltaNetCache, DeltaNetConfig, GatedDeltaNet
from tokenloop.models.kernels.causal_conv1d.reference import WIDTHS
from tokenloop.models.moe import MoeConfig, SparseMoe

# The most tokens of a prefill chunk: exports unroll the delta nets' chunks.
MAX_CHUNK = 512
FULL, LINEAR = "full_attention", "linear_attention"
_SHARED_DEFAULTS = {
    "num_attention_heads": 16, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "head_dim": 256, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "full_attention_interval": 4, "partial_rotary_factor": 0.25,
    "rope_theta": 10_000.0,
}  # fmt: skip
_EXPERTS = {
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True, "decoder_sparse_step": 1,
}  # fmt: skip
# The defaults of transformers' Qwen3_5TextConfig, Qwen3_5MoeTextConfig and Qwen3NextConfig.
DEFAULTS = {
    "qwen3_5_text": _SHARED_DEFAULTS | {"vocab_size": 248_320, "num_key_value_heads": 4},
    "qwen3_5_moe_text": _SHARED_DEFAULTS
    | _EXPERTS
    | {"vocab_size": 248_320, "num_experts": 256, "num_experts_per_tok": 8},
    "qwen3_next": _SHARED_DEFAULTS
    | _EXPERTS
    | {"vocab_size": 151_936, "num_experts": 512, "num_experts_per_tok": 10},
}
MODEL_TYPES = tuple(DEFAULTS)
# Fields for which only one value is implemented.
ONLY = {
    "hidden_act": "silu", "attention_bias": False, "attn_output_gate": True,
    "per_layer_config": None, "num_local_experts": None,
}  # fmt: skip

# What transformers' Qwen3.5 does not read, and therefore computes in one way.
ALWAYS = {
    "qwen3_5_text": {"num_experts": 0},
    "qwen3_5_moe_text": {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_next": {},
}


@dataclass(frozen=True)
class Qwen3_5Config:
    """The shape of one hybrid text model. `from_dict` reads a Hugging Face config.

    A layer that is `sparse` has the experts of `moe`, and one of shared_expert_intermediate_size
    that all tokens share. The other layers have a feed-forward of intermediate_size.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]
    rope: layers.RopeConfig
    rotary_dim: int
    delta_net: DeltaNetConfig
    sparse: tuple[bool, ...]
    intermediate_size: int | None
    moe: MoeConfig | None
    shared_expert_intermediate_size: int | None

    @classmethod
    def from_dict(cls, config: dict) -> "Qwen3_5Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        model_type = configs.known_type(config, DEFAULTS)
        names = [field.name for field in fields(cls)]
        plain = names[: names.index("layer_types")]
        linear = [field.name for field in fields(DeltaNetConfig) if field.name.startswith("linear")]
        config = configs.read(
            config,
            defaults=DEFAULTS[model_type],
            only=ONLY | ALWAYS[model_type],
            needed=(*plain, *linear, "num_hidden_layers"),
            multiples=(
                ("num_attention_heads", "num_key_value_heads"),
                ("linear_num_value_heads", "linear_num_key_heads"),
            ),
        )
        sparse = _sparse(config)
        needed = _feed_forward_keys(sparse)
        if not config.get("layer_types"):
            needed.append("full_attention_interval")
        config = configs.read(config, defaults={}, only={}, needed=needed, multiples=())
        if any(sparse) and not config["shared_expert_intermediate_size"]:
            raise ValueError("shared_expert_intermediate_size = 0: a whole number from 1 is right")
        if config["linear_conv_kernel_dim"] not in WIDTHS:
            raise ValueError(
                f"linear_conv_kernel_dim = {config['linear_conv_kernel_dim']}: one of {WIDTHS}"
            )
        # The three axes of Qwen3.5's positions (mrope_section) are one for text.
        entry = configs.rope_entry(config)
        share = configs.read(
            entry, defaults={}, only={}, needed=["partial_rotary_factor"], multiples=()
        )
        rotary_dim = int(config["head_dim"] * share["partial_rotary_factor"])
        configs.rotated("head_dim * partial_rotary_factor", rotary_dim)
        rope = configs.fitting(configs.rope(entry, partial=True), rotary_dim)
        config = configs.reaching(config, rope)
        return cls(
            **{key: config[key] for key in plain},
            layer_types=configs.layer_types(config, LINEAR, config["full_attention_interval"]),
            rope=rope,
            rotary_dim=rotary_dim,
            delta_net=DeltaNetConfig(
                **{key: config[key] for key in linear}, fused_projections=model_type == "qwen3_next"
            ),
            sparse=sparse,
            intermediate_size=None if all(sparse) else config["intermediate_size"],
            moe=qwen3.moe_config(config) if any(sparse) else None,
            shared_expert_intermediate_size=(
                config["shared_expert_intermediate_size"] if any(sparse) else None
            ),
        )


def _sparse(config: dict) -> tuple[bool, ...]:
    """Which layers have routed experts. A dense model has none, and its config has no step."""
    step, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers") or ()
    some = step is not None and bool(config.get("num_experts"))
    layers = range(config["num_hidden_layers"])
    return tuple(some and i not in dense and (i + 1) % step == 0 for i in layers)


def _feed_forward_keys(sparse: tuple[bool, ...]) -> list[str]:
    keys = [] if all(sparse) else ["intermediate_size"]
    if any(sparse):
        keys += ["num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
    return keys


def checkpoint_name(name: str) -> str | layers.Shard | None:
    """A checkpoint's tensor name as this model's parameter name, or as a shard of one. None for the
    vision tower, and for the layers that guess tokens after the next one: neither changes a text's
    logits."""
    if name.startswith(("mtp.", "model.visual.")):
        return None
    return qwen3.checkpoint_name(name.replace("model.language_model.", "model.", 1))


class Qwen3_5(CausalLM):
    """A hybrid text model of `batch` rows whose KV caches, of `dtype`, reach max_seq_len positions.

    An exported prefill costs as much in its delta nets as one of `max_chunk` tokens.
    """

    def __init__(
        self, config: Qwen3_5Config, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        norm = partial(layers.RMSNorm, eps=c.rms_norm_eps, offset=1.0)

        def mixer(layer_type: str) -> layers.Attention | GatedDeltaNet:
            if layer_type == FULL:
                shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim
                cache = layers.kv_cache(FULL, 0, *shape, dtype)
                sizes = c.hidden_size, c.num_attention_heads, cache, c.head_dim**-0.5
                return layers.Attention(FULL, *sizes, norm=norm, output_gate=True)
            # A cache holds activations, so it is real where parameters may still be on "meta".
            with torch.device("cpu"):
                cache = DeltaNetCache(c.delta_net, batch, dtype)
            return GatedDeltaNet(c.hidden_size, c.delta_net, c.rms_norm_eps, cache)

        def mlp(sparse: bool) -> layers.MLP | SparseMoe:
            if sparse:
                return SparseMoe(c.hidden_size, c.moe, c.shared_expert_intermediate_size)
            return layers.MLP(c.hidden_size, c.intermediate_size, "silu")

        blocks = [
            Block(mixer(layer_type), mlp(sparse), partial(norm, c.hidden_size))
            for layer_type, sparse in zip(c.layer_types, c.sparse)
        ]
        rope = {FULL: layers.RotaryEmbedding(c.rope, c.rotary_dim, max_seq_len)}
        cache, norm = (max_seq_len, batch, min(MAX_CHUNK, max_seq_len)), norm(c.hidden_size)
        super().__init__(c, blocks, norm, rope, *cache, tied=c.tie_word_embeddings)


Network, Config = Qwen3_5, Qwen3_5Config
