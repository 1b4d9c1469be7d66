"""Gemma 3n text models, named as in transformers (its models/gemma3n is the reference): several
streams of hidden states, learned augmented residuals, an input of each layer's own, sparse gates,
and last layers that share keys and values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from tokenloop.models import config as configs
from tokenloop.models import gemma4, layers
from tokenloop.models.altup import AltUp, AltUpBlock, Laurel, Streams
from tokenloop.models.cache import KVCache
from tokenloop.models.config_fields import FIELDS, WIDTH, shown
from tokenloop.models.decoder import CausalLM
from tokenloop.models.gemma3 import FULL, SLIDING, ropes
from tokenloop.models.per_layer import PerLayerBranch, PerLayerInputs

MODEL_TYPES = ("gemma3n_text",)
# The defaults of transformers' Gemma3nTextConfig. A config.json need not say what equals them.
DEFAULTS = {
    "vocab_size": 262_400,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
# Fields for which only one value is implemented.
ONLY = {
    "altup_active_idx": 0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    # Both are in rope_parameters, for each type of layer.
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "per_layer_config": None,
}
# The share of a layer's gates that becomes 0, where a config does not say: of as many layers.
SPARSITY, SPARSE_LAYERS = 0.95, 10
STREAMS_NAME = re.compile(r"model\.altup_(unembed_)?projections\.(.+)")


@dataclass(frozen=True)
class Gemma3nConfig:
    """The shape of one Gemma 3n text model. `from_dict` reads a Hugging Face config. Each layer has
    its own of `intermediate_sizes` and of `sparsities`."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    sliding_window: int
    max_position_embeddings: int
    final_logit_softcapping: float | None
    vocab_size_per_layer_input: int
    hidden_size_per_layer_input: int
    altup_correct_scale: bool
    altup_num_inputs: int
    num_kv_shared_layers: int
    laurel_rank: int
    intermediate_sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    layer_types: tuple[str, ...]
    rope: dict[str, layers.RopeConfig]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Gemma3nConfig":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        given = {key: value for key, value in config.items() if value is not None}
        count = (DEFAULTS | given)["num_hidden_layers"]
        config, sizes = _intermediate_sizes(config, count)
        derived = "intermediate_sizes", "sparsities", "layer_types", "rope"
        plain = [field.name for field in fields(cls) if field.name not in derived]
        needed = *plain, "num_hidden_layers"
        config = configs.read(config, defaults=DEFAULTS, only=ONLY, needed=needed)
        configs.rotated("head_dim", config["head_dim"])
        if config["final_logit_softcapping"] == 0:
            raise ValueError("final_logit_softcapping = 0 leaves no logits; 30 is usual")
        if config["altup_num_inputs"] < 2 or not config["hidden_size_per_layer_input"]:
            raise ValueError(
                f"altup_num_inputs = {config['altup_num_inputs']} and hidden_size_per_layer_input "
                f"= {config['hidden_size_per_layer_input']}: at least 2 and 1 are right"
            )
        if config["vocab_size_per_layer_input"] > config["vocab_size"]:
            raise ValueError(
                f"vocab_size_per_layer_input = {config['vocab_size_per_layer_input']} is more than "
                f"vocab_size = {config['vocab_size']}"
            )
        types = configs.layer_types(config, SLIDING, 5)
        gemma4.check_sharing(config, types)
        rope = ropes(config)
        config = configs.reaching(config, rope[FULL])
        return cls(
            **{key: config[key] for key in plain},
            intermediate_sizes=sizes,
            sparsities=_sparsities(config, count),
            layer_types=types,
            rope=rope,
        )


def _intermediate_sizes(
    config: Mapping[str, Any], count: Any
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The config with the largest of the layers' intermediate sizes, and all of them. Raises
    ValueError for a list that has not one number for each layer."""
    sizes = config.get("intermediate_size") or DEFAULTS["intermediate_size"]
    if not isinstance(sizes, list):
        # What is no number of layers is seen with the other fields, before a list has it as length.
        return dict(config), (sizes,) * (count if FIELDS["num_hidden_layers"].fits(count) else 0)
    if len(sizes) != count or not all(map(WIDTH.fits, sizes)):
        raise ValueError(
            f"intermediate_size = {shown(sizes)}: one, or a list of one for each of {count} layers "
            "is right"
        )
    return {**config, "intermediate_size": max(sizes)}, tuple(sizes)


def _sparsities(config: Mapping[str, Any], count: int) -> tuple[float, ...]:
    """Raises ValueError for a list that has not one share for each layer."""
    shares = config.get("activation_sparsity_pattern")
    if shares is None:
        sparse = SPARSE_LAYERS if count > SPARSE_LAYERS else 0
        return (SPARSITY,) * sparse + (0.0,) * (count - sparse)
    fitting = isinstance(shares, list) and all(
        isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share < 1
        for share in shares
    )
    if not fitting or len(shares) != count:
        raise ValueError(
            f"activation_sparsity_pattern = {shown(shares)}: a list of shares from 0 to below 1, "
            f"one for each of {count} layers, is right"
        )
    return tuple(map(float, shares))


def checkpoint_name(name: str) -> str | None:
    """A checkpoint's tensor name as this model's parameter name. None for what is left out."""
    name = gemma4.checkpoint_name(name)
    match = None if name is None else STREAMS_NAME.fullmatch(name)
    return name if match is None else f"model.streams.{match[1] or ''}projections.{match[2]}"


class Gemma3n(CausalLM):
    """A Gemma 3n text model of `batch` rows whose caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk is no longer than the sliding window, and the head is tied.
    """

    def __init__(
        self, config: Gemma3nConfig, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        norm = partial(layers.RMSNorm, eps=c.rms_norm_eps)
        own_norm = partial(norm, c.hidden_size)
        count, size = len(c.layer_types), c.hidden_size_per_layer_input
        unshared = count - c.num_kv_shared_layers
        # The last layer of its type that has keys of its own gives them to those that have none.
        last = {layer_type: i for i, layer_type in enumerate(c.layer_types[:unshared])}
        shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim
        caches: dict[str, KVCache] = {}

        def attention(i: int, layer_type: str) -> layers.Attention:
            has_keys = i < unshared
            if has_keys:
                cache = layers.kv_cache(layer_type, c.sliding_window, *shape, dtype)
                caches[layer_type] = cache
            # The norms' weights hold the scale.
            sizes = c.hidden_size, c.num_attention_heads, caches[layer_type], 1.0
            norms = {"norm": norm, "v_norm": layers.ValueNorm(c.rms_norm_eps)}
            shares = layer_type in c.layer_types[unshared:] and last[layer_type] == i
            return layers.Attention(layer_type, *sizes, **norms, has_keys=has_keys, shares=shares)

        def block(i: int, layer_type: str) -> AltUpBlock:
            mlp = layers.MLP(
                c.hidden_size, c.intermediate_sizes[i], "gelu_tanh", sparsity=c.sparsities[i]
            )
            return AltUpBlock(
                attention(i, layer_type), mlp, own_norm,
                AltUp(c.hidden_size, c.altup_num_inputs, norm),
                Laurel(c.hidden_size, c.laurel_rank, own_norm()),
                PerLayerBranch(c.hidden_size, size, "gelu_tanh", own_norm()),
                c.altup_correct_scale,
            )  # fmt: skip

        def scaled_norm(size: int, factor: float) -> layers.RMSNorm:
            return layers.RMSNorm(size, c.rms_norm_eps * factor)

        rows = c.vocab_size_per_layer_input
        per_layer = PerLayerInputs(
            rows, count, size, c.hidden_size, scaled_norm, clips=rows < c.vocab_size
        )
        rope = {
            name: layers.RotaryEmbedding(own, c.head_dim, max_seq_len)
            for name, own in c.rope.items()
        }
        blocks = [block(i, layer_type) for i, layer_type in enumerate(c.layer_types)]
        cache = max_seq_len, batch, min(c.sliding_window, max_seq_len)
        super().__init__(
            c, blocks, own_norm(), rope, *cache, tied=True, embed_scale=c.hidden_size**0.5,
            soft_cap=c.final_logit_softcapping, per_layer=per_layer,
            streams=Streams(c.hidden_size, c.altup_num_inputs),
            left_out=gemma4.keys_of(range(unshared, count)),
        )  # fmt: skip


Network, Config = Gemma3n, Gemma3nConfig
