"""Gemma 4 text models, named as in transformers (its models/gemma4 is the reference): dense, with
experts beside the feed-forward, or with per-layer embeddings and shared keys and values.

Sliding and full layers differ in window, head size, key/value heads and rotary embedding. Full
layers may have no v_proj. A value is then the key before norm and rotation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from tokenloop.models import config as configs
from tokenloop.models import layers, qwen3
from tokenloop.models.cache import KVCache
from tokenloop.models.decoder import SANDWICH_NORMS, Block, CausalLM
from tokenloop.models.gemma3 import FULL, SLIDING, text_name
from tokenloop.models.moe import MlpBesideMoe, MoeConfig
from tokenloop.models.per_layer import PerLayerBranch, PerLayerInputs

MODEL_TYPES = ("gemma4_text",)
# The defaults of transformers' Gemma4TextConfig. A config.json need not say what equals them.
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
ROPE_TYPES = "default", "linear", "dynamic", "llama3", "yarn", "proportional"
# Fields for which only one value is implemented.
ONLY = {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    # Both are in rope_parameters, for each type of layer.
    "rope_scaling": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}


# A checkpoint's names of what lies in a block beside the usual, and of what lies beside the blocks;
# and models.moe's and models.per_layer's.
RENAMED = {
    "router.proj.weight": "mlp.gate.weight",
    "router.scale": "mlp.router_norm.weight",
    "router.per_expert_scale": "mlp.expert_scales",
    "experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "experts.down_proj": "mlp.experts.down_proj",
    "pre_feedforward_layernorm_2.weight": "mlp.experts_norm.weight",
    "post_feedforward_layernorm_1.weight": "mlp.dense_branch_norm.weight",
    "post_feedforward_layernorm_2.weight": "mlp.experts_branch_norm.weight",
    "per_layer_input_gate.weight": "per_layer.input_gate.weight",
    "per_layer_projection.weight": "per_layer.projection.weight",
    "post_per_layer_input_norm.weight": "per_layer.norm.weight",
    "embed_tokens_per_layer.weight": "per_layer.embed_tokens.weight",
    "per_layer_model_projection.weight": "per_layer.projection.weight",
    "per_layer_projection_norm.weight": "per_layer.projection_norm.weight",
}
RENAMED_NAME = re.compile(rf"(model(?:\.layers\.\d+)?)\.({'|'.join(map(re.escape, RENAMED))})")


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of one type of layer. There is no v_proj where `values_are_keys`."""

    head_dim: int
    num_key_value_heads: int
    values_are_keys: bool
    rope: layers.RopeConfig


@dataclass(frozen=True)
class Gemma4Config:
    """The shape of one Gemma 4 text model. `from_dict` reads a Hugging Face config."""

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
    moe: MoeConfig | None
    hidden_size_per_layer_input: int
    num_kv_shared_layers: int
    use_double_wide_mlp: bool

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Gemma4Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        # "vision" concerns image tokens only.
        if config.get("use_bidirectional_attention") == "vision":
            config = config | {"use_bidirectional_attention": None}
        derived = ("final_logit_softcapping", "layer_types", "attention", "moe")
        plain = [field.name for field in fields(cls) if field.name not in derived]
        sizes = "num_hidden_layers", "num_key_value_heads", "head_dim", "tie_word_embeddings"
        only = ONLY | {"use_bidirectional_attention": None}
        config = configs.read(
            config, defaults=DEFAULTS, only=only, needed=(*plain, *sizes), multiples=()
        )
        if config["final_logit_softcapping"] == 0:
            raise ValueError("final_logit_softcapping = 0 leaves no logits; null is no cap")
        # The last layer is full whatever the list says.
        layer_types = (*configs.layer_types(config, SLIDING, 6)[:-1], FULL)
        check_sharing(config, layer_types)
        rows = config.get("vocab_size_per_layer_input") or DEFAULTS["vocab_size"]
        if config["hidden_size_per_layer_input"] and rows != config["vocab_size"]:
            raise ValueError(
                f"vocab_size_per_layer_input = {rows}: only vocab_size = {config['vocab_size']}"
            )
        attention = _attention(config, layer_types)
        config = configs.reaching(config, attention[FULL].rope)
        return cls(
            **{key: config[key] for key in plain},
            final_logit_softcapping=config["final_logit_softcapping"],
            layer_types=layer_types,
            attention=attention,
            moe=_experts(config) if config["enable_moe_block"] else None,
        )


def check_sharing(config: dict[str, Any], layer_types: tuple[str, ...]) -> None:
    """Raises ValueError for a layer whose keys no layer has that is not shared."""
    shared = config["num_kv_shared_layers"]
    own = layer_types[: len(layer_types) - shared] if shared < len(layer_types) else ()
    if set(own) != set(layer_types):
        raise ValueError(
            f"num_kv_shared_layers = {shared} of {len(layer_types)} layers leaves no keys of "
            f"{' and '.join(sorted(set(layer_types) - set(own)))}"
        )


def _experts(config: dict[str, Any]) -> MoeConfig:
    """The experts of every layer. Raises ValueError for a key that is missing, and for more chosen
    than exist."""
    names = {"num_experts_per_tok": config.get("top_k_experts"), "norm_topk_prob": True}
    if names["num_experts_per_tok"] is None:
        raise ValueError("the checkpoint's config lacks top_k_experts")
    return qwen3.moe_config(config | names, "gelu_tanh")


def _attention(config: dict[str, Any], layer_types: tuple[str, ...]) -> dict[str, AttentionConfig]:
    shapes = _head_shapes(config, layer_types)
    attention = {}
    for layer_type, shape in shapes.items():
        heads = shape["num_key_value_heads"]
        if config["num_attention_heads"] % heads:
            raise ValueError(
                f"num_attention_heads = {config['num_attention_heads']} is not a multiple of the "
                f"{heads} key/value heads of {layer_type}"
            )
        size = configs.rotated(f"head_dim of {layer_type}", shape["head_dim"])
        values_are_keys = config["attention_k_eq_v"] and layer_type == "full_attention"
        attention[layer_type] = AttentionConfig(
            **shape,
            values_are_keys=values_are_keys,
            rope=configs.fitting(_rope(config, layer_type), size),
        )
    return attention


def _head_shapes(config: dict[str, Any], layer_types: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """head_dim and num_key_value_heads of each type of layer that there is.

    A published config.json has full layers' own values as global_head_dim and
    num_global_key_value_heads. transformers 5.24 writes each layer that differs in
    per_layer_config.
    """
    own = config.get("per_layer_config")
    if own is None:
        configs.read(config, defaults={}, only={}, needed=["global_head_dim"], multiples=())
        full = {"head_dim": config["global_head_dim"]}
        if config["attention_k_eq_v"] and config["num_global_key_value_heads"]:
            full["num_key_value_heads"] = config["num_global_key_value_heads"]
        own = {i: full for i, layer_type in enumerate(layer_types) if layer_type == FULL}
    common = {key: config[key] for key in ("head_dim", "num_key_value_heads")}
    own = {int(i): shape for i, shape in own.items()}
    shapes: dict[str, dict[str, int]] = {}
    for i, layer_type in enumerate(layer_types):
        shape = common | own.get(i, {})
        if unknown := shape.keys() - common.keys():
            raise ValueError(f"per_layer_config sets {', '.join(sorted(unknown))} of layer {i}")
        if shapes.setdefault(layer_type, shape) != shape:
            raise ValueError(
                f"per_layer_config gives layer {i} {shape} and another of {layer_type} "
                f"{shapes[layer_type]}"
            )
    return shapes


def _rope(config: dict[str, Any], layer_type: str) -> layers.RopeConfig:
    parameters = config["rope_parameters"] or ROPE_PARAMETERS
    if "rope_theta" not in (parameters.get(layer_type) or {}):
        raise ValueError(f"rope_parameters lacks rope_theta of {layer_type}")
    entry = configs.completed(parameters[layer_type], config)
    return configs.rope(entry, ROPE_TYPES, layer_type)


def keys_of(layers: Iterable[int]) -> frozenset[str]:
    """The parameters of the layers' own keys and values."""
    names = "k_proj", "v_proj", "k_norm"
    return frozenset(f"model.layers.{i}.self_attn.{name}.weight" for i in layers for name in names)


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name. None for what is left out."""
    name = text_name(name, ("vision_tower", "embed_vision", "audio_tower", "embed_audio"))
    match = None if name is None else RENAMED_NAME.fullmatch(name)
    return name if match is None else f"{match[1]}.{RENAMED[match[2]]}"


class Gemma4(CausalLM):
    """A Gemma 4 text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk is no longer than the sliding window, and the head is tied.
    """

    def __init__(
        self, config: Gemma4Config, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        norm = partial(layers.RMSNorm, eps=c.rms_norm_eps)

        count, size = len(c.layer_types), c.hidden_size_per_layer_input
        unshared = count - c.num_kv_shared_layers
        # The last layer of its type that has keys of its own gives them to those that have none.
        last = {layer_type: i for i, layer_type in enumerate(c.layer_types[:unshared])}
        caches: dict[str, KVCache] = {}

        def attention(i: int, layer_type: str) -> layers.Attention:
            own, has_keys = c.attention[layer_type], i < unshared
            if has_keys:
                shape = batch, max_seq_len, own.num_key_value_heads, own.head_dim
                cache = layers.kv_cache(layer_type, c.sliding_window, *shape, dtype)
                caches[layer_type] = cache
            # The norms' weights hold the scale.
            sizes = c.hidden_size, c.num_attention_heads, caches[layer_type], 1.0
            norms = {"norm": norm, "v_norm": layers.ValueNorm(c.rms_norm_eps)}
            shares = layer_type in c.layer_types[unshared:] and last[layer_type] == i
            return layers.Attention(
                layer_type, *sizes, **norms, values_are_keys=own.values_are_keys,
                has_keys=has_keys, shares=shares,
            )  # fmt: skip

        def block(i: int, layer_type: str) -> Block:
            is_wide = c.use_double_wide_mlp and i >= unshared
            sizes = c.hidden_size, c.intermediate_size * (2 if is_wide else 1), "gelu_tanh"
            if c.moe is None:
                mlp = layers.MLP(*sizes)
            else:
                mlp = MlpBesideMoe(*sizes, c.moe, partial(norm, c.hidden_size))
            own = None
            if size:
                own = PerLayerBranch(c.hidden_size, size, "gelu_tanh", norm(c.hidden_size))
            return Block(
                attention(i, layer_type), mlp, partial(norm, c.hidden_size), SANDWICH_NORMS,
                scaled=True, per_layer=own,
            )  # fmt: skip

        def scaled_norm(size: int, factor: float) -> layers.RMSNorm:
            return layers.RMSNorm(size, c.rms_norm_eps * factor)

        per_layer = None
        if size:
            sizes = c.vocab_size, count, size, c.hidden_size
            per_layer = PerLayerInputs(*sizes, scaled_norm)
        rope = {
            name: layers.RotaryEmbedding(own.rope, own.head_dim, max_seq_len)
            for name, own in c.attention.items()
        }
        blocks = [block(i, layer_type) for i, layer_type in enumerate(c.layer_types)]
        cache = max_seq_len, batch, min(c.sliding_window, max_seq_len)
        super().__init__(
            c, blocks, norm(c.hidden_size), rope, *cache, tied=True,
            embed_scale=c.hidden_size**0.5, soft_cap=c.final_logit_softcapping,
            per_layer=per_layer, left_out=keys_of(range(unshared, count)),
        )  # fmt: skip


Network, Config = Gemma4, Gemma4Config
