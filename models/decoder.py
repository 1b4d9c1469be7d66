"""The way of a token through a network, and the methods that are exported.

Embedding, blocks, KV caches, logits: it does not know how it is exported or driven, nor how a
token is chosen. Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from tokenloop.models.layers import RotaryEmbedding, rounded


class Backbone(nn.Module):
    """Embedding, blocks and final norm; `rope` has an entry for each kind of layer, and embeddings
    are multiplied by `embed_scale`.

    A block has `project`, which gives what the KV cache of its self_attn takes, and `finish`.
    """

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        rope: dict[str, RotaryEmbedding],
        embed_scale: float = 1.0,
    ):
        super().__init__()
        self.embed_scale = embed_scale
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = nn.ModuleDict(rope)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [B, T, D] of tokens int64 [B, T]."""
        x = self.embed_tokens(tokens)
        if self.embed_scale == 1.0:
            return x
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


class CausalLM(nn.Module):
    """A text model of `batch` rows whose caches reach max_seq_len positions.

    A prefill chunk holds at most `max_chunk` tokens, which an exporter may limit, and could hold
    `longest_chunk`. A head that is `tied` shares the embedding's weight.
    """

    def __init__(
        self,
        config: Any,
        model: Backbone,
        max_seq_len: int,
        batch: int,
        max_chunk: int,
        tied: bool,
    ):
        super().__init__()
        self.config = config
        self.batch, self.max_seq_len = batch, max_seq_len
        self.max_chunk = self.longest_chunk = max_chunk
        self.model = model
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = model.embed_tokens.weight

    def limit_chunks(self, tokens: int) -> None:
        """Have no prefill chunk be longer than so many tokens."""
        self.max_chunk = min(self.max_chunk, tokens)

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
