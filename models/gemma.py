"""What Gemma 3 and Gemma 4 have in common, named as in transformers.

Shapes: B rows, T tokens, D hidden size, H query heads, K key/value heads.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from tokenloop.models import decoder, layers
from tokenloop.models.decoder import CausalLM
from tokenloop.models.layers import Attention, RotaryEmbedding

KINDS = ("sliding_attention", "full_attention")


def layer_types(config: dict[str, Any], pattern: int = 6) -> tuple[str, ...]:
    """Each layer's kind as config.json lists them; unlisted, every `pattern`-th is full.

    Raises ValueError for a list of another length, or a kind that is none of KINDS.
    """
    layers = config["num_hidden_layers"]
    types = config.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
    ]
    unknown = set(types) - set(KINDS)
    if unknown or len(types) != layers:
        raise ValueError(
            f"layer_types has {len(types)} entries for {layers} layers"
            + (f" and unknown kinds {sorted(unknown)}" if unknown else "")
        )
    return tuple(types)


def text_name(name: str, other_parts: tuple[str, ...]) -> str | None:
    """A checkpoint's tensor name as the text model's parameter name; None for what is left out.

    Multimodal checkpoints hold the text model under a prefix beside `other_parts`.
    """
    if any(f"{part}." in name for part in other_parts):
        return None
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            name = "model." + name.removeprefix(prefix)
    # The head is tied to the embedding.
    return None if name.endswith("lm_head.weight") else name


class MLP(layers.MLP):
    """A feed-forward with the tanh approximation of GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__(hidden_size, intermediate_size, nn.GELU(approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each between a norm before and a norm after, made by `norm`."""

    def __init__(self, self_attn: Attention, mlp: MLP, norm: Callable[[], nn.Module]):
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def project(self, x: Tensor, rope: dict) -> tuple[Tensor, Tensor, Tensor]:
        """What the KV cache is given: all of the block before the attention itself."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All of the block after the attention: x [B, T, D] plus both residual branches."""
        x = x + self.post_attention_layernorm(self.self_attn.combine(attended))
        return x + self.post_feedforward_layernorm(self.mlp(self.mlp_norm(x)))

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm before the feed-forward."""
        return self.pre_feedforward_layernorm

    @property
    def branch_norms(self) -> tuple[nn.Module, nn.Module]:
        """The norms of what attention and feed-forward give."""
        return self.post_attention_layernorm, self.post_feedforward_layernorm


class Backbone(decoder.Backbone):
    """One whose embeddings are multiplied by the root of their size."""

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        layers: Iterable[Block],
        norm: nn.Module,
        rope: dict[str, RotaryEmbedding],
    ):
        super().__init__(embed_tokens, layers, norm, rope, embed_tokens.embedding_dim**0.5)


class Gemma(CausalLM):
    """A text model of `batch` rows whose caches reach max_seq_len positions; a prefill chunk is no
    longer than the sliding window, and the head is tied."""

    def __init__(self, config: Any, model: Backbone, max_seq_len: int, batch: int):
        max_chunk = min(config.sliding_window, max_seq_len)
        super().__init__(config, model, max_seq_len, batch, max_chunk, tied=True)
