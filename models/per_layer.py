"""Per-layer embeddings (Gemma 3n's and Gemma 4's): each token has, besides its embedding, a small
vector for every layer, which a gate of the layer's own lets in.

Shapes: B rows, T tokens, D hidden size, L layers, P the size of a layer's vector.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenloop.models.layers import ACTIVATIONS, rounded

# Both parts of a layer's input are of one size.
HALF = 0.5**0.5


class PerLayerInputs(nn.Module):
    """The layers' inputs, of a token's own vectors and of a projection of its embedding."""

    def __init__(
        self, rows: int, layers: int, size: int, hidden_size: int,
        norm: Callable[[int, float], nn.Module], clips: bool = False,
    ):  # fmt: skip
        """`norm` makes a norm, given its size and what its eps is multiplied by. The table has
        `rows` tokens. One that `clips` takes the first for all that it does not have."""
        super().__init__()
        self.rows, self.layers, self.size, self.clips = rows, layers, size, clips
        self.embed_tokens = nn.Embedding(rows, layers * size)
        self.projection = nn.Linear(hidden_size, layers * size, bias=False)
        # A projection is divided by the root of D before its norm, which sees that in its eps only.
        self.projection_norm = norm(size, hidden_size)

    @property
    def width(self) -> int:
        """L * P."""
        return self.layers * self.size

    def scale_in(self, dtype: torch.dtype) -> float:
        """What a token's vectors of `dtype` are multiplied by."""
        return rounded(self.size**0.5, dtype)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The tokens' own vectors [B, T, L * P], scaled."""
        if self.clips:
            tokens = torch.where(tokens < self.rows, tokens, 0)
        x = self.embed_tokens(tokens)
        return x * self.scale_in(x.dtype)

    def forward(self, x: Tensor, own: Tensor) -> list[Tensor]:
        """The input [B, T, P] of each layer, of embeddings x [B, T, D] and what `look_up` gave."""
        projected = self.projection_norm(self._by_layer(self.projection(x)))
        return list(((projected + self._by_layer(own)) * HALF).unbind(2))

    def _by_layer(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.layers, self.size))


class PerLayerBranch(nn.Module):
    """x + norm(projection(activation(input_gate(x)) * given)), for x [B, T, D] and a layer's input
    `given` [B, T, P]."""

    def __init__(self, hidden_size: int, size: int, activation: str, norm: nn.Module):
        """`activation` is a key of layers.ACTIVATIONS."""
        super().__init__()
        self.activation = activation
        self.input_gate = nn.Linear(hidden_size, size, bias=False)
        self.projection = nn.Linear(size, hidden_size, bias=False)
        self.norm, self.act = norm, ACTIVATIONS[activation]()

    def branch(self, x: Tensor, given: Tensor) -> Tensor:
        """What is added to x."""
        return self.norm(self.projection(self.act(self.input_gate(x)) * given))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return x + self.branch(x, given)
