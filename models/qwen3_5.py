"""Hybrid text models, named as in transformers: Qwen3.5's, dense or with routed experts, and
Qwen3-Next's layout of them.

Most layers are gated delta nets, which remember the same amount whatever the context; every fourth
is attention with an output gate over a KV cache. Shapes: B rows, T tokens, D hidden size, H heads.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from tokenloop.models import decoder, layers, qwen3
from tokenloop.models.cache import KVCache
from tokenloop.models.delta_net import DeltaNetCache, DeltaNetConfig, GatedDeltaNet
from tokenloop.models.kernels.causal_conv1d.reference import WIDTHS
from tokenloop.models.layers import MLP, Piece, RopeConfig, RotaryEmbedding, kv_cache, rotate
from tokenloop.models.moe import MoeConfig, SharedSparseMoe

FULL, LINEAR = "full_attention", "linear_attention"
_SHARED_DEFAULTS = {
    "num_attention_heads": 16,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000.0,
}
_EXPERTS = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
# transformers' Qwen3_5TextConfig, Qwen3_5MoeTextConfig and Qwen3NextConfig.
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
# Fields whose other values are refused; a field that is missing has its value here.
UNSUPPORTED = {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True}


@dataclass(frozen=True)
class Qwen3_5Config:
    """The shape of one hybrid text model; `from_dict` reads a Hugging Face config.

    A layer that is `sparse` has the experts of `moe`, and one of shared_expert_intermediate_size
    that all tokens share; the others have a feed-forward of intermediate_size.
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
    rope: RopeConfig
    rotary_dim: int
    delta_net: DeltaNetConfig
    sparse: tuple[bool, ...]
    intermediate_size: int | None
    moe: MoeConfig | None
    shared_expert_intermediate_size: int | None

    @classmethod
    def from_dict(cls, config: dict) -> "Qwen3_5Config":
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
        names = [field.name for field in fields(cls)]
        plain = names[: names.index("layer_types")]
        linear = [field.name for field in fields(DeltaNetConfig) if field.name.startswith("linear")]
        needed = [*plain, *linear, "num_hidden_layers"]
        missing = [key for key in needed if config.get(key) is None]
        if not missing:
            sparse = _sparse(config)
            missing = [key for key in _feed_forward_keys(sparse) if config.get(key) is None]
        if missing:
            raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if config[many] % config[few]:
                raise ValueError(f"{many} = {config[many]} is no multiple of {few} = {config[few]}")
        if config["linear_conv_kernel_dim"] not in WIDTHS:
            raise ValueError(
                f"linear_conv_kernel_dim = {config['linear_conv_kernel_dim']}: one of {WIDTHS}"
            )
        rope, partial = _rope(config)
        return cls(
            **{key: config[key] for key in plain},
            layer_types=_layer_types(config),
            rope=rope,
            rotary_dim=int(config["head_dim"] * partial),
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
    """Which layers have routed experts: of a model that is dense none, and it has no step."""
    step, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers") or ()
    some = step is not None and bool(config.get("num_experts"))
    layers = range(config["num_hidden_layers"])
    return tuple(some and i not in dense and (i + 1) % step == 0 for i in layers)


def _feed_forward_keys(sparse: tuple[bool, ...]) -> list[str]:
    keys = [] if all(sparse) else ["intermediate_size"]
    if any(sparse):
        keys += ["num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
    return keys


def _layer_types(config: dict) -> tuple[str, ...]:
    count, interval = config["num_hidden_layers"], config["full_attention_interval"]
    types = config.get("layer_types") or [
        LINEAR if (i + 1) % interval else FULL for i in range(count)
    ]
    unknown = set(types) - {LINEAR, FULL}
    if unknown or len(types) != count:
        raise ValueError(
            f"layer_types has {len(types)} entries for {count} layers"
            + (f" and unknown kinds {sorted(unknown)}" if unknown else "")
        )
    return tuple(types)


def _rope(config: dict) -> tuple[RopeConfig, float]:
    """The rotation, and the share of a head that it turns. Of text the three axes of Qwen3.5's
    positions (mrope_section) are one."""
    entry = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
    entry |= config.get("rope_scaling") or {}
    entry |= config.get("rope_parameters") or {}
    scaling = entry.get("rope_type", entry.get("type", "default"))
    if scaling != "default":
        raise ValueError(f"rope_type = {scaling!r} is not supported: only 'default'")
    return RopeConfig(entry["rope_theta"]), entry["partial_rotary_factor"]


def checkpoint_name(name: str) -> str | Piece | None:
    """A checkpoint's tensor name as this model's parameter name, or as a piece of one; None for
    what is left out: the vision tower, and the layers that predict several tokens at once."""
    if name.startswith(("mtp.", "model.visual.")):
        return None
    return qwen3.checkpoint_name(name.replace("model.language_model.", "model.", 1))


class RMSNorm(layers.RMSNorm):
    """normalize(x) * (1 + weight)."""

    offset = 1.0


class Attention(layers.Attention):
    """Grouped-query attention with normalised queries and keys and a gate for what comes out."""

    def __init__(self, config: Qwen3_5Config, cache: KVCache):
        size, heads = config.head_dim, config.num_attention_heads
        super().__init__(FULL, config.hidden_size, heads, cache)
        self.scale = size**-0.5
        # Of each head its query and then its gate.
        self.q_proj = nn.Linear(config.hidden_size, 2 * heads * size, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """(queries [B, T, H, head_dim], keys and values), and gates like the queries."""
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        k, v = self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        return (turn(self.q_norm(q), rope), turn(self.k_norm(k), rope), v), gate

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, row: Tensor | None
    ) -> Tensor:
        return self.cache.prefill(q, k, v, positions, self.scale, row)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return self.cache.decode(q, k, v, position, self.scale)

    def combine(self, attended: Tensor, gate: Tensor) -> Tensor:
        """The heads' results [B, T, H, head_dim], gated and brought back to [B, T, D]."""
        return super().combine(attended * gate.sigmoid())


def turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first part of each head of x [B, T, H, head_dim], as long as the angles are."""
    size = rope[0].shape[-1]
    return torch.cat([rotate(x[..., :size], rope), x[..., size:]], -1)


class Block(nn.Module):
    """A mixer of tokens and a feed-forward, each after a norm and added to what was before it."""

    def __init__(self, config: Qwen3_5Config, mixer: Attention | GatedDeltaNet, sparse: bool):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_name = "self_attn" if isinstance(mixer, Attention) else "linear_attn"
        self.add_module(self.mixer_name, mixer)
        if sparse:
            shared = config.shared_expert_intermediate_size
            self.mlp = SharedSparseMoe(size, config.moe, shared)
        else:
            self.mlp = MLP(size, config.intermediate_size, nn.SiLU())
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    @property
    def mixer(self) -> Attention | GatedDeltaNet:
        return getattr(self, self.mixer_name)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the mixer's prefill and decode are given, and its gates."""
        return self.mixer.project(self.input_layernorm(x), rope)

    def finish(self, x: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
        """All of the block after the mixing: x [B, T, D] plus both residual branches."""
        x = x + self.mixer.combine(mixed, gate)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(decoder.Backbone):
    """decoder.Backbone with blocks of two kinds."""

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None) -> Tensor:
        """Hidden states [1, T, D] of a chunk: tokens int64 [1, T] at positions int64 [T]."""
        x, rope = self.embed(tokens), self.rope[FULL](positions)
        for layer in self.layers:
            inputs, gate = layer.project(x, rope)
            x = layer.finish(x, layer.mixer.prefill(*inputs, positions, row), gate)
        return x

    def decode(self, x: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, 1, D] of a step: embeddings x [B, 1, D] at position int64 [B]."""
        cos, sin = self.rope[FULL](position)
        # Rows, not tokens, are at positions of their own.
        rope = cos[:, None], sin[:, None]
        for layer in self.layers:
            inputs, gate = layer.project(x, rope)
            x = layer.finish(x, layer.mixer.decode(*inputs, position), gate)
        return x


class Qwen3_5(decoder.CausalLM):
    """A hybrid text model of `batch` rows whose KV caches, of `dtype`, reach max_seq_len positions.

    Where it is exported a prefill costs what one of `max_chunk` tokens does in its delta nets.
    """

    def __init__(
        self,
        config: Qwen3_5Config,
        max_seq_len: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        max_chunk: int = 512,
    ):
        max_chunk = min(max_chunk, max_seq_len)

        def mixer(kind: str) -> Attention | GatedDeltaNet:
            if kind == FULL:
                heads = config.num_key_value_heads, config.head_dim
                return Attention(config, kv_cache(FULL, 0, batch, max_seq_len, *heads, dtype))
            # A cache holds activations, so it is real where parameters may still be on "meta".
            with torch.device("cpu"):
                cache = DeltaNetCache(config.delta_net, batch, dtype)
            size, eps = config.hidden_size, config.rms_norm_eps
            return GatedDeltaNet(size, config.delta_net, eps, cache, max_chunk)

        model = Backbone(
            nn.Embedding(config.vocab_size, config.hidden_size),
            [
                Block(config, mixer(kind), sparse)
                for kind, sparse in zip(config.layer_types, config.sparse)
            ],
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            {FULL: RotaryEmbedding(config.rope, config.rotary_dim)},
        )
        tied = config.tie_word_embeddings
        super().__init__(config, model, max_seq_len, batch, max_chunk, tied)

    def limit_chunks(self, tokens: int) -> None:
        super().limit_chunks(tokens)
        for layer in self.model.layers:
            if isinstance(layer.mixer, GatedDeltaNet):
                layer.mixer.max_chunk = self.max_chunk


Network, Config = Qwen3_5, Qwen3_5Config
