"""LFM2 text models (arXiv:2511.23404), named as in transformers, dense: most layers mix tokens by a
short convolution between two gates, and the others attend.

Shapes: B rows, T tokens, D hidden size, W the convolution's width.
"""

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tokenloop.models import config as configs
from tokenloop.models.config_fields import check
from tokenloop.models.decoder import Block, CausalLM
from tokenloop.models.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from tokenloop.models.kernels.causal_conv1d.reference import WIDTHS
from tokenloop.models.layers import MLP, Attention, RMSNorm, RopeConfig, RotaryEmbedding, kv_cache

MODEL_TYPES = ("lfm2",)
FULL, CONV = "full_attention", "conv"
# The defaults of transformers' Lfm2Config.
DEFAULTS = {
    "vocab_size": 65_536, "hidden_size": 2560, "intermediate_size": 12_288,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 128_000, "norm_eps": 1e-5, "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True, "conv_bias": False, "conv_L_cache": 3, "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
}  # fmt: skip
# Fields for which only one value is implemented.
ONLY = {"per_layer_config": None}
PLAIN = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "norm_eps", "max_position_embeddings", "tie_word_embeddings", "conv_bias", "conv_L_cache",
)  # fmt: skip
# A checkpoint's names of parts, and those of every network here.
RENAMED = {
    "operator_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "self_attn.out_proj": "self_attn.o_proj",
    "self_attn.q_layernorm": "self_attn.q_norm", "self_attn.k_layernorm": "self_attn.k_norm",
}  # fmt: skip
LAYER_NAME = re.compile(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Lfm2Config:
    """The shape of one LFM2 text model. `from_dict` reads a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    conv_bias: bool
    conv_L_cache: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    rope: RopeConfig

    @classmethod
    def from_dict(cls, config: dict) -> "Lfm2Config":
        """Read config.json's keys, of transformers 4 or 5. Raises ValueError naming the field that
        is missing, or asks for what is not implemented."""
        configs.known_type(config, MODEL_TYPES)
        check(config)
        # The first configs have other names of two fields, which transformers prefers.
        for name, other in (
            ("tie_word_embeddings", "tie_embedding"), ("intermediate_size", "block_ff_dim"),
        ):  # fmt: skip
            configs.one_of(config, name, other)
            if config.get(other) is not None:
                config = config | {name: config[other]}
        adjusting = "block_auto_adjust_ff_dim", "block_multiple_of"
        needed = *PLAIN, "intermediate_size", "num_hidden_layers", *adjusting
        config = configs.with_heads(DEFAULTS | config)
        config = configs.read(config, defaults={}, only=ONLY, needed=needed)
        if config["conv_L_cache"] not in WIDTHS:
            raise ValueError(f"conv_L_cache = {config['conv_L_cache']}: one of {WIDTHS} is right")
        rope = configs.rope(configs.rope_entry(config))
        rope = configs.fitting(rope, configs.rotated("head_dim", config["head_dim"]))
        config = configs.reaching(config, rope)
        return cls(
            **{key: config[key] for key in PLAIN},
            intermediate_size=_adjusted(config),
            layer_types=_layer_types(config),
            rope=rope,
        )


def _adjusted(config: dict) -> int:
    """The size of the feed-forward, which a config need not say as it is."""
    size = config["intermediate_size"]
    if not config["block_auto_adjust_ff_dim"]:
        return size
    size, multiple = int(2 * size / 3), config["block_multiple_of"]
    if config["block_ffn_dim_multiplier"] is not None:
        size = int(config["block_ffn_dim_multiplier"] * size)
        size = -(-size // multiple) * multiple
    return size


def _layer_types(config: dict) -> tuple[str, ...]:
    """Each layer's type, by the list of types or by that of the layers that attend."""
    if config.get("layer_types"):
        return configs.layer_types(config, CONV, 1)
    attends = config.get("full_attn_idxs")
    layers = range(config["num_hidden_layers"])
    return tuple(FULL if attends is None or i in attends else CONV for i in layers)


def checkpoint_name(name: str) -> str:
    """A checkpoint's tensor name as this model's parameter name."""
    if name == "model.embedding_norm.weight":
        return "model.norm.weight"
    match = LAYER_NAME.fullmatch(name)
    if match is None:
        return name
    layer, part, kind = match.groups()
    return f"{layer}.{RENAMED.get(part, part)}.{kind}"


class ShortConvCache(nn.Module):
    """What a short convolution remembers of each row: its last inputs, `conv` [B, D, W - 1]."""

    def __init__(self, batch: int, hidden_size: int, width: int, dtype: torch.dtype):
        super().__init__()
        conv = torch.zeros(batch, hidden_size, width - 1, dtype=dtype)
        self.register_buffer("conv", conv, persistent=False)


class ShortConv(nn.Module):
    """out_proj(c * conv(b * x)) for b, c and x of in_proj, which is a Mixer. A row begins anew at
    position 0, whatever it remembered."""

    name, layer_type, output = "conv", CONV, "out_proj"
    projections, shares = ("in_proj",), False

    def __init__(self, hidden_size: int, width: int, bias: bool, cache: ShortConvCache):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.conv = nn.Conv1d(hidden_size, hidden_size, width, groups=hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.cache = cache

    def project(self, x: Tensor, rope: dict) -> tuple[tuple[Tensor], Tensor]:
        """(the convolution's input [B, T, D],) and what its output is multiplied by."""
        b, c, x = self.in_proj(x).chunk(3, -1)
        return (b * x,), c

    def prefill(self, x: Tensor, positions: Tensor, row: Tensor | None) -> Tensor:
        """[1, T, D] of a chunk of one row."""
        row = None if row is None else row.int()
        ends = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[1]
        weight, started = self.conv.weight[:, 0], positions[:1] > 0
        out = causal_conv1d(x[0].T, weight, self.conv.bias, ends, self.cache.conv, row, started)
        return out.T[None]

    def decode(self, x: Tensor, position: Tensor) -> Tensor:
        """[B, 1, D] of a step of all rows."""
        weight, started = self.conv.weight[:, 0], position > 0
        return causal_conv1d_update(
            x[:, 0], weight, self.conv.bias, self.cache.conv, None, started
        )[:, None]  # fmt: skip

    def combine(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """The branch [B, T, D]."""
        return self.out_proj(gate * mixed)


class Lfm2(CausalLM):
    """An LFM2 text model of `batch` rows whose KV caches, of `dtype`, reach max_seq_len positions.

    A prefill chunk may be as long as these.
    """

    def __init__(
        self, config: Lfm2Config, max_seq_len: int, batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        c = config
        norm = partial(RMSNorm, eps=c.norm_eps)

        def mixer(layer_type: str) -> Attention | ShortConv:
            if layer_type == FULL:
                shape = batch, max_seq_len, c.num_key_value_heads, c.head_dim
                cache = kv_cache(FULL, max_seq_len, *shape, dtype)
                sizes = c.hidden_size, c.num_attention_heads, cache, c.head_dim**-0.5
                return Attention(FULL, *sizes, norm=norm)
            # A cache holds activations, so it is real where parameters may still be on "meta".
            with torch.device("cpu"):
                cache = ShortConvCache(batch, c.hidden_size, c.conv_L_cache, dtype)
            return ShortConv(c.hidden_size, c.conv_L_cache, c.conv_bias, cache)

        def block(layer_type: str) -> Block:
            mlp = MLP(c.hidden_size, c.intermediate_size, "silu")
            return Block(mixer(layer_type), mlp, partial(norm, c.hidden_size))

        rope = {FULL: RotaryEmbedding(c.rope, c.head_dim, max_seq_len)}
        cache, blocks = (max_seq_len, batch, max_seq_len), [block(each) for each in c.layer_types]
        norm = norm(c.hidden_size)
        super().__init__(c, blocks, norm, rope, *cache, tied=c.tie_word_embeddings)


Network, Config = Lfm2, Lfm2Config
