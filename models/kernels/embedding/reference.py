"""The ends of a packed chunk in plain torch. Shapes: T tokens, D hidden size, B sequences."""

import torch
from torch import Tensor


def embed_chunk(
    tokens: Tensor, table: Tensor, count: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Rows [T, D] of a table [V, D] of tokens int64 [T], times `scale`, rounded once. `scale` is a
    number that the table's dtype holds (models.layers.rounded).

    Rows from `count` int32 [1] on are anything, whatever their tokens are.
    """
    if count is not None:
        tokens = torch.where(torch.arange(len(tokens), device=tokens.device) < count, tokens, 0)
    rows = table[tokens]
    return (rows.float() * scale).to(table.dtype)


def embed_both(
    tokens: Tensor, table: Tensor, other: Tensor, *, scale: float = 1.0, other_scale: float = 1.0
) -> Tensor:
    """The rows [T, D] of a table [V, D], and then those [T, E] of another [V, E], each times its
    scale: [T * (D + E)], in which the tokens' rows of one table lie together."""
    rows = embed_chunk(tokens, table, scale=scale), embed_chunk(tokens, other, scale=other_scale)
    return torch.cat([each.flatten() for each in rows])


def last_tokens(x: Tensor, starts: Tensor) -> Tensor:
    """Row starts[i + 1] - 1 of x [T, D] for each sequence i: [B, D]. starts: int32 [B + 1].

    An empty sequence's row is any row of x.
    """
    return x[(starts[1:].long() - 1).clamp(min=0)]
