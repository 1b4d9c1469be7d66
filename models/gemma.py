"""What Gemma 3 and Gemma 4 have in common, named as in transformers.

Embeddings, blocks, KV caches, logits: it does not know how it is exported or driven, nor how a
token is chosen. Shapes: B rows, T tokens, D hidden size, H query heads, K key/value heads,
V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from models.cache import KVCache
from models.layers import RotaryEmbedding, rounded

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


class Attention(nn.Module):
    """Grouped-query attention's projections and its KV cache, whose shape tells K and head_dim.

    `own_values` false: there is no v_proj.
    """

    def __init__(
        self, kind: str, hidden_size: int, heads: int, cache: KVCache, own_values: bool = True
    ):
        super().__init__()
        kv_heads, head_dim = cache.k.shape[2:]
        self.kind, self.head_dim = kind, head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        if own_values:
            self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.cache = cache

    def heads(self, projected: Tensor) -> Tensor:
        """[B, T, H or K, head_dim] of what a projection gave, [B, T, ...]."""
        return projected.view(
            projected.shape[0], -1, projected.shape[2] // self.head_dim, self.head_dim
        )

    def combine(self, attended: Tensor) -> Tensor:
        """The heads' results [B, T, H, head_dim] brought back to [B, T, D]."""
        return self.o_proj(attended.reshape(attended.shape[0], -1, self.o_proj.in_features))


class MLP(nn.Module):
    """GELU-gated feed-forward (arXiv:2002.05202), with the tanh approximation of GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


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
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Backbone(nn.Module):
    """Embedding, blocks and final norm; `rope` has an entry for each kind of layer."""

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        layers: Iterable[Block],
        norm: nn.Module,
        rope: dict[str, RotaryEmbedding],
    ):
        super().__init__()
        self.embed_scale = embed_tokens.embedding_dim**0.5
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = nn.ModuleDict(rope)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [B, T, D] of tokens int64 [B, T]."""
        x = self.embed_tokens(tokens)
        # transformers keeps the scale in the weights' dtype: in bfloat16 it is another number.
        return x * rounded(self.embed_scale, x.dtype)

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

    def decode(self, x: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, 1, D] of a step: embeddings x [B, 1, D] at position int64 [B]."""
        rope = self.rotations(position)
        # Rows, not tokens, are at positions of their own.
        rope = {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in rope.items()}
        for layer in self.layers:
            cache, scale = layer.self_attn.cache, layer.self_attn.scale
            x = layer.finish(x, cache.decode(*layer.project(x, rope), position, scale))
        return x


class Gemma(nn.Module):
    """A text model of `batch` rows whose caches reach max_seq_len positions.

    A prefill chunk holds at most `max_chunk` tokens.
    """

    def __init__(self, config: Any, model: Backbone, max_seq_len: int, batch: int):
        super().__init__()
        self.config = config
        self.batch, self.max_seq_len = batch, max_seq_len
        self.max_chunk = min(config.sliding_window, max_seq_len)
        self.model = model
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weight, as every Gemma does."""
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
        return self.decode_embedded(self.embed(token), position)

    def embed(self, tokens: Tensor) -> Tensor:
        """What `decode_embedded` takes of tokens int64 [B, T]: scaled embeddings [B, T, D]."""
        return self.model.embed(tokens)

    def decode_embedded(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after the token that hidden [B, 1, D] embeds, at position int64 [B]."""
        return self.logits(self.model.decode(hidden, position))
