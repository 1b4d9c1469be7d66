"""What a step is fed, in memory: all rows' embeddings, and then all rows' own vectors for the
layers, where a network has per-layer embeddings.

Shapes: B rows, D hidden size, W all layers' vectors together, E = D + W.
"""

from torch import Tensor, nn

from tokenloop.models.decoder import Backbone
from tokenloop.models.kernels import cuda


def split(hidden: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Views [B, D] and [B, W] of hidden [B, 1, E], for the hidden size `size`; the second is None
    where W is 0."""
    rows, _, whole = hidden.shape
    if whole == size:
        return hidden[:, 0], None
    flat = hidden.view(rows * whole)
    return flat[: rows * size].view(rows, size), flat[rows * size :].view(rows, whole - size)


class Tables(nn.Module):
    """The tables of embeddings and of the layers' own, each with its scale."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.embed_tokens, self.per_layer = backbone.embed_tokens, None
        dtype = self.embed_tokens.weight.dtype
        self.scale = backbone.scale_in(dtype)
        if (own := backbone.per_layer) is not None:
            self.per_layer = nn.ModuleDict({"embed_tokens": own.embed_tokens})
            self.own_scale = own.scale_in(dtype)

    @property
    def own(self) -> Tensor | None:
        """The table [V, W] of the layers' own, or None."""
        return None if self.per_layer is None else self.per_layer["embed_tokens"].weight

    def look_up(self, token: Tensor) -> Tensor:
        """hidden [B, 1, E] of token int64 [B, 1]."""
        tokens, table = token[:, 0], self.embed_tokens.weight
        if self.own is None:
            return cuda.embed_chunk(tokens, table, scale=self.scale)[:, None]
        scales = {"scale": self.scale, "other_scale": self.own_scale}
        return cuda.embed_both(tokens, table, self.own, **scales).view(len(token), 1, -1)
