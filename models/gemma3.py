"""Gemma 3 text models (Gemma 3 Technical Report, arXiv:2503.19786), named as in transformers.

What a network is: embeddings, blocks, KV caches, logits. It does not know how it is exported or
driven, nor how a token is chosen. Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from models import layers
from models.cache import FullCache, KVCache, SlidingCache
from models.layers import MLP, Attention, Backbone, CausalLM, RopeConfig, RotaryEmbedding

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


class RMSNorm(layers.RMSNorm):
    """x / rms(x) * (1 + weight): the published weights are what is added to one."""

    offset = 1.0


class Block(nn.Module):
    """Attention and feed-forward, each between a norm before and a norm after."""

    def __init__(self, config: Gemma3Config, kind: str, cache: KVCache):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(
            kind,
            size,
            config.num_attention_heads,
            cache,
            q_norm=RMSNorm(config.head_dim, eps),
            k_norm=RMSNorm(config.head_dim, eps),
            scale=config.query_pre_attn_scalar**-0.5,
        )
        self.mlp = MLP(size, config.intermediate_size, nn.GELU(approximate="tanh"))
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


class Gemma3(CausalLM):
    """A Gemma 3 text model; a prefill chunk is no longer than the sliding window. Caches hold
    `dtype`."""

    def __init__(
        self,
        config: Gemma3Config,
        max_seq_len: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        # A ring never needs more slots than there are positions.
        window = min(config.sliding_window, max_seq_len)
        kinds = {
            "sliding_attention": (SlidingCache, window),
            "full_attention": (FullCache, max_seq_len),
        }

        def block(kind: str) -> Block:
            cache, slots = kinds[kind]
            shape = batch, slots, config.num_key_value_heads, config.head_dim
            return Block(config, kind, cache(*shape, dtype))

        backbone = Backbone(
            nn.Embedding(config.vocab_size, config.hidden_size),
            [block(kind) for kind in config.layer_types],
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            {kind: RotaryEmbedding(rope, config.head_dim) for kind, rope in config.rope.items()},
            # transformers keeps the scale in the weights' dtype; a Python float multiplies the
            # same in float32.
            embed_scale=config.hidden_size**0.5,
        )
        super().__init__(backbone, batch, max_seq_len, window, tied=True)
        self.config = config
