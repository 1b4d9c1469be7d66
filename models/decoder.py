"""The contract of a decoder's blocks, and the methods that are exported.

A block is described here once, and exporters read what it declares. This module does not know how a
network is exported or driven, nor how a token is chosen. Shapes: B rows, T tokens, D hidden size,
E what `embed` gives of a token, which is D for most, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.layers import RotaryEmbedding, rounded

# What checkpoints call a block's norms, by role: of the inputs of the mixer and the feed-forward,
# and of what the two give, each before it is added.
PRE_NORMS = {"mixer": "input_layernorm", "mlp": "post_attention_layernorm"}
SANDWICH_NORMS = {
    "mixer": "input_layernorm",
    "mixer_branch": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_branch": "post_feedforward_layernorm",
}
POST_NORMS = {
    "mixer_branch": "post_attention_layernorm",
    "mlp_branch": "post_feedforward_layernorm",
}


class Mixer(Protocol):
    """What mixes tokens: models.layers.Attention, or models.delta_net.GatedDeltaNet.

    `name` is what a checkpoint calls the mixer in a block. `layer_type` is a Hugging Face config's:
    full_attention, sliding_attention or linear_attention. `cache` is its state, buffers that are
    updated in place. `projections` are the names of the linear layers that read the block's input,
    in the order in which their rows can lie together. `output` is the name of the one that gives
    the branch. The `prefill` and `decode` of a mixer that `shares` a cache with others of its type
    take, and give, what is seen of it as well; the first of those has the cache, and the others
    have None.
    """

    name: str
    layer_type: str
    cache: nn.Module | None
    projections: tuple[str, ...]
    output: str
    shares: bool

    def project(self, x: Tensor, rope: dict) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """What `prefill` and `decode` take before the positions, and gates or None, for x
        [B, T, D]. `rope` has cos and sin by layer type."""

    def prefill(self, *inputs_positions_and_row: Tensor | None) -> Tensor:
        """[1, T, ...] of a chunk of one row, at positions int64 [T], row int64 [1] or None."""

    def decode(self, *inputs_and_position: Tensor) -> Tensor:
        """[B, 1, ...] of a step of all rows, at position int64 [B]."""

    def combine(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The branch [B, T, D] of what `prefill` or `decode` gave."""


class Block(nn.Module):
    """x becomes x + mixer_branch_norm(mixer(mixer_norm(x))), and that becomes
    (x + mlp_branch_norm(mlp(mlp_norm(x)))) * layer_scalar. Before it is scaled `per_layer` adds
    what it makes of the layer's own input, if there is one.

    A norm, `layer_scalar` [1] and `per_layer` (models.per_layer) are None where a block has none.
    `mlp` is a models.layers.MLP, a models.moe.SparseMoe or a models.moe.MlpBesideMoe. It declares
    `moe`, the config of its routed experts or None, and `dense`, the MLP that every token has or
    None. With `reads_residual` the experts have norms of their own, and read x.
    """

    def __init__(
        self, mixer: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module],
        norms: Mapping[str, str] = PRE_NORMS, scaled: bool = False,
        per_layer: nn.Module | None = None,
    ):  # fmt: skip
        """`mixer` is a Mixer. `norm` makes each of `norms`."""
        super().__init__()
        self._mixer, self._norms = mixer.name, dict(norms)
        self.add_module(mixer.name, mixer)
        self.mlp = mlp
        for name in norms.values():
            self.add_module(name, norm())
        # transformers has a buffer. A parameter is used here, because checkpoints fill parameters.
        self.layer_scalar = nn.Parameter(torch.empty(1)) if scaled else None
        self.per_layer = per_layer

    @property
    def mixer(self) -> Any:
        """The Mixer, under whatever name."""
        return self.get_submodule(self._mixer)

    def norm(self, role: str) -> nn.Module | None:
        """The norm of a role (a key of SANDWICH_NORMS), or None."""
        return self.get_submodule(self._norms[role]) if role in self._norms else None

    def begin(self, x: Tensor) -> Tensor:
        """What `project` and `finish` take of what the layer before gave: x itself, or, of several
        streams (models/altup.py), predictions."""
        return x

    def project(self, x: Tensor, rope: dict) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """All of the block before its state is used: what `Mixer.project` gives."""
        return self.mixer.project(self._normed("mixer", x), rope)

    def add_mixed(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """x [B, T, D] plus the mixer's branch."""
        return x + self._normed("mixer_branch", self.mixer.combine(mixed, gate))

    def finish(
        self, x: Tensor, mixed: Tensor, gate: Tensor | None, given: Tensor | None = None
    ) -> Tensor:
        """All of the block after its state was used: x [B, T, D] plus its branches, scaled. `given`
        is the layer's own input, None without `per_layer`."""
        x = self.add_mixed(x, mixed, gate)
        normed = self._normed("mlp", x)
        branch = self.mlp(normed, x) if self.mlp.reads_residual else self.mlp(normed)
        return self.add_fed(x, branch, given)

    def add_fed(self, x: Tensor, branch: Tensor, given: Tensor | None = None) -> Tensor:
        """x [B, T, D] plus the feed-forward's branch, and all that comes after that."""
        x = x + self._normed("mlp_branch", branch)
        x = x if self.per_layer is None else self.per_layer(x, given)
        return x if self.layer_scalar is None else x * self.layer_scalar

    def _normed(self, role: str, x: Tensor) -> Tensor:
        norm = self.norm(role)
        return x if norm is None else norm(x)


class Backbone(nn.Module):
    """Embedding, blocks and final norm. `rope` has an entry for each `rotation` of a mixer.
    Embeddings are multiplied by `embed_scale`, as the weights' dtype holds it if `rounds_scale`.
    With `per_layer` (models.per_layer) a token's own vectors for the layers lie behind its
    embedding: E elements in all. With `streams` (models.altup) blocks take several hidden states of
    a token."""

    def __init__(
        self, embed_tokens: nn.Embedding, layers: Iterable[Block], norm: nn.Module,
        rope: dict[str, RotaryEmbedding], embed_scale: float = 1.0, rounds_scale: bool = True,
        per_layer: nn.Module | None = None, streams: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.per_layer, self.streams = per_layer, streams
        # E.
        own = 0 if per_layer is None else per_layer.width
        self.embedded_size = embed_tokens.embedding_dim + own
        self.embed_scale, self.rounds_scale = embed_scale, rounds_scale
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = nn.ModuleDict(rope)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [B, T, E] of tokens int64 [B, T]."""
        x = self.embed_tokens(tokens)
        x = x if self.embed_scale == 1.0 else x * self.scale_in(x.dtype)
        return x if self.per_layer is None else torch.cat([x, self.per_layer.look_up(tokens)], -1)

    def split(self, embedded: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """What the first layer reads of embeddings [B, T, E], [B, T, D] or streams of that, and
        what each layer's `finish` takes besides."""
        if self.per_layer is None:
            return self._expanded(embedded), [()] * len(self.layers)
        x, own = embedded.split(
            [embedded.shape[-1] - self.per_layer.width, self.per_layer.width], -1
        )
        return self._expanded(x), [(given,) for given in self.per_layer(x, own)]

    def _expanded(self, x: Tensor) -> Tensor:
        return x if self.streams is None else self.streams.expand(x)

    def scale_in(self, dtype: torch.dtype) -> float:
        """What embeddings of `dtype` are multiplied by."""
        # transformers keeps Gemma's scale in the weights' dtype. In bfloat16 it is another number.
        return rounded(self.embed_scale, dtype) if self.rounds_scale else self.embed_scale

    def caches(self) -> list[nn.Module]:
        """The cache that each layer uses, its own or one that is shared."""
        shared, found = {}, []
        for mixer in (layer.mixer for layer in self.layers):
            if mixer.shares and mixer.cache is not None:
                shared[mixer.layer_type] = mixer.cache
            found.append(shared[mixer.layer_type] if mixer.cache is None else mixer.cache)
        return found

    def rotations(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin [T, 1, rotary_dim] of each rotary embedding at positions int64 [T]."""
        return {layer_type: rope(positions) for layer_type, rope in self.rope.items()}

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None) -> Tensor:
        """Hidden states [1, T, D] of a chunk: tokens int64 [1, T] at positions int64 [T]."""
        x, rope = self.embed(tokens), self.rotations(positions)
        x, given = self.split(x)
        seen: dict[str, tuple[Tensor, ...]] = {}
        for layer, own in zip(self.layers, given):
            x = layer.begin(x)
            inputs, gate = layer.project(x, rope)
            shared = (seen,) if layer.mixer.shares else ()
            mixed = layer.mixer.prefill(*inputs, positions, row, *shared)
            x = layer.finish(x, mixed, gate, *own)
        return x

    def decode(self, x: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, 1, D] of a step: embeddings x [B, 1, E] at position int64 [B]."""
        rope = self.rotations(position)
        # Rows, not tokens, are at positions of their own.
        rope = {name: (cos[:, None], sin[:, None]) for name, (cos, sin) in rope.items()}
        x, given = self.split(x)
        seen: dict[str, tuple[Tensor, ...]] = {}
        for layer, own in zip(self.layers, given):
            x = layer.begin(x)
            inputs, gate = layer.project(x, rope)
            shared = (seen,) if layer.mixer.shares else ()
            x = layer.finish(x, layer.mixer.decode(*inputs, position, *shared), gate, *own)
        return x


class CausalLM(nn.Module):
    """A text model of `batch` rows whose caches reach max_seq_len positions.

    A prefill chunk holds at most `max_chunk` tokens. An exporter may limit these, up to
    `longest_chunk`. A head that is `tied` shares the embedding's weight. Logits are soft-capped,
    tanh(x / soft_cap) * soft_cap, where soft_cap is not None. A checkpoint may have tensors for
    parameters that are `left_out`, which this network does not have.
    """

    def __init__(
        self, config: Any, layers: Iterable[Block], norm: nn.Module,
        rope: dict[str, RotaryEmbedding], max_seq_len: int, batch: int, max_chunk: int, *,
        tied: bool, embed_scale: float = 1.0, rounds_scale: bool = True,
        soft_cap: float | None = None, per_layer: nn.Module | None = None,
        streams: nn.Module | None = None, left_out: frozenset[str] = frozenset(),
    ):  # fmt: skip
        """`config` has vocab_size and hidden_size; layers, norm, rope, embed_scale, rounds_scale,
        per_layer and streams are the Backbone's."""
        super().__init__()
        self.left_out = left_out
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.config, self.soft_cap = config, soft_cap
        self.batch, self.max_seq_len = batch, max_seq_len
        self.longest_chunk = max_chunk
        scale = embed_scale, rounds_scale
        self.model = Backbone(embed_tokens, layers, norm, rope, *scale, per_layer, streams)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = embed_tokens.weight
        self.limit_chunks(max_chunk)

    def limit_chunks(self, tokens: int) -> None:
        """Limit prefill chunks to `tokens` tokens."""
        self.max_chunk = min(self.longest_chunk, tokens)
        for layer in self.model.layers:
            layer.mixer.max_chunk = self.max_chunk

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [B, V] of hidden states [B, 1, D], or streams of them, before the final norm."""
        logits = self.lm_head(self.model.norm(self._merged(hidden))).float()[:, 0]
        if self.soft_cap is None:
            return logits
        return torch.tanh(logits / self.soft_cap) * self.soft_cap

    def pool(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The pooled output, float32 [1, D], of what `prefill` takes of a model of one row: the
        last token's hidden state after the final norm, divided by its length."""
        hidden = self._merged(self.model.prefill(tokens, positions, None)[:, -1:])
        return F.normalize(self.model.norm(hidden).float()[:, 0], dim=-1)

    def prefill(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        """Logits [1, V] after the last of tokens int64 [1, T] at positions int64 [T] of one row,
        `row` int64 [1]. A model of one row takes no `row`."""
        return self.logits(self.model.prefill(tokens, positions, row)[:, -1:])

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after token int64 [B, 1] at position int64 [B]."""
        return self.decode_embedded(self.embed(token), position)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings [B, T, E] of tokens int64 [B, T], which `decode_embedded` takes."""
        return self.model.embed(tokens)

    def decode_embedded(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after the token that hidden [B, 1, E] embeds, at position int64 [B]."""
        return self.logits(self.model.decode(hidden, position))

    def _merged(self, hidden: Tensor) -> Tensor:
        return hidden if self.model.streams is None else self.model.streams.merge(hidden)
