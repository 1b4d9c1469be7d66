"""Gemma 3 text models (Gemma 3 Technical Report, arXiv:2503.19786), named as in transformers.

What a network is: embeddings, blocks, KV caches, logits. It does not know how it is exported or
driven, nor how a token is chosen. Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from models.cache import FullCache, SlidingCache

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
class RopeConfig:
    """Rotary embedding of one kind of layer; `factor` divides positions (linear scaling)."""

    theta: float
    factor: float = 1.0


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
    layers = config["num_hidden_layers"]
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    types = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
    ]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ValueError(
            f"layer_types has {len(types)} entries for {layers} layers"
            + (f" and unknown kinds {sorted(unknown)}" if unknown else "")
        )
    return tuple(types)


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
    """A checkpoint's tensor name as this model's parameter name; None for what is left out.

    Multimodal checkpoints hold the text model under a prefix beside a vision tower.
    """
    if "vision_tower." in name or "multi_modal_projector." in name:
        return None
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            name = "model." + name.removeprefix(prefix)
    # The head is tied to the embedding in every Gemma 3.
    return None if name.endswith("lm_head.weight") else name


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last axis, in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """cos and sin of rotary angles (arXiv:2104.09864), each [T, 1, head_dim] for positions [T]."""

    def __init__(self, rope: RopeConfig, head_dim: int):
        super().__init__()
        frequency = rope.theta ** (torch.arange(0, head_dim, 2, device="cpu") / head_dim)
        self.register_buffer("inv_freq", 1.0 / frequency / rope.factor, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions.float()[:, None] * self.inv_freq)[:, None]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [B, T, H, D] by the angles whose cos and sin are given."""
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, over its own KV cache."""

    def __init__(self, config: Gemma3Config, kind: str, batch: int, max_seq_len: int):
        super().__init__()
        c = config
        self.kind, self.head_dim = kind, c.head_dim
        self.scale = c.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        # A ring never needs more slots than there are positions.
        if kind == "sliding_attention":
            cache, slots = SlidingCache, min(c.sliding_window, max_seq_len)
        else:
            cache, slots = FullCache, max_seq_len
        # The cache holds activations, so it is real where parameters may still be on "meta".
        with torch.device("cpu"):
            self.cache = cache(batch, slots, c.num_key_value_heads, c.head_dim)

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, K, head_dim] of x [B, T, D]."""
        q, k, v = (
            proj(x).view(x.shape[0], -1, proj.out_features // self.head_dim, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(self.q_norm(q), rope[self.kind]), rotate(self.k_norm(k), rope[self.kind]), v

    def combine(self, attended: Tensor) -> Tensor:
        """The heads' results [B, T, H, head_dim] brought back to [B, T, D]."""
        return self.o_proj(attended.reshape(attended.shape[0], -1, self.o_proj.in_features))


class MLP(nn.Module):
    """GELU-gated feed-forward (arXiv:2002.05202), with the tanh approximation of GELU."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each between a norm before and a norm after."""

    def __init__(self, config: Gemma3Config, kind: str, batch: int, max_seq_len: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, kind, batch, max_seq_len)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """What the KV cache is given: all of the block before the attention itself."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All of the block after the attention: x [B, T, D] plus both residual branches."""
        x = x + self.post_attention_layernorm(self.self_attn.combine(attended))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Backbone(nn.Module):
    """Embedding, blocks and final norm: tokens int64 [B, T] to hidden states [B, T, D]."""

    def __init__(self, config: Gemma3Config, batch: int, max_seq_len: int):
        super().__init__()
        # transformers keeps the scale in the weights' dtype; a Python float multiplies the same
        # in float32.
        self.embed_scale = config.hidden_size**0.5
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, kind, batch, max_seq_len) for kind in config.layer_types
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = nn.ModuleDict(
            {kind: RotaryEmbedding(config.rope[kind], config.head_dim) for kind in config.rope}
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [B, T, D] of tokens int64 [B, T]."""
        return self.embed_tokens(tokens) * self.embed_scale

    def rotations(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each kind of layer cos and sin [T, 1, head_dim] at positions int64 [T]."""
        return {kind: rope(positions) for kind, rope in self.rope.items()}

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None) -> Tensor:
        """Hidden states [1, T, D] of a chunk: tokens int64 [1, T] at positions int64 [T]."""
        x, rope = self.embed(tokens), self.rotations(positions)
        for layer in self.layers:
            cache, scale = layer.self_attn.cache, layer.self_attn.scale
            attended = cache.prefill(*layer.project(x, rope), positions, scale, row)
            x = layer.finish(x, attended)
        return x

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, 1, D] of a step: token int64 [B, 1] at position int64 [B]."""
        x, rope = self.embed(token), self.rotations(position)
        # Rows, not tokens, are at positions of their own.
        rope = {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in rope.items()}
        for layer in self.layers:
            cache, scale = layer.self_attn.cache, layer.self_attn.scale
            x = layer.finish(x, cache.decode(*layer.project(x, rope), position, scale))
        return x


class Gemma3(nn.Module):
    """A Gemma 3 text model of `batch` rows whose caches reach max_seq_len positions.

    A prefill chunk holds at most `max_chunk` tokens.
    """

    def __init__(self, config: Gemma3Config, max_seq_len: int, batch: int = 1):
        super().__init__()
        self.config = config
        self.batch, self.max_seq_len = batch, max_seq_len
        self.max_chunk = min(config.sliding_window, max_seq_len)
        self.model = Backbone(config, batch, max_seq_len)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weight, as every Gemma 3 does."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [B, V] of hidden states [B, 1, D] before the final norm."""
        return self.lm_head(self.model.norm(hidden)).float()[:, 0]

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        """Logits [1, V] after the last of tokens int64 [1, T] at positions int64 [T] of one row,
        `row` int64 [1]; a model of one row takes none."""
        return self.logits(self.model.prefill(tokens, positions, row)[:, -1:])

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after token int64 [B, 1] at position int64 [B]."""
        return self.logits(self.model.decode(token, position))


Network, Config = Gemma3, Gemma3Config
