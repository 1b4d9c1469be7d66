"""KV caches: what a layer remembers, as buffers updated in place.

Each cache has `prefill` and `decode`, because a ring may overwrite its oldest entry before a
single query reads it, but not before a chunk of queries does. Keys arrive already rotated.
Shapes: B rows, T new tokens, H query heads, K key/value heads, D head size, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Softmax attention of q [B, T, H, D] over k, v [B, S, K, D] where `visible` [1 or B, T, S] is
    true. With `sinks` [H] there is one more score for each head, which no value belongs to."""
    if sinks is not None:
        return _attend_with_sinks(q, k, v, visible, scale, sinks)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor
) -> Tensor:
    """`attend` with sinks (arXiv:2309.17453, as gpt-oss has them), weights in float32."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    # [B, K, G, T, D] and so on.
    queries = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    keys, values = (x.transpose(1, 2)[:, :, None] for x in (k, v))
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    more = sinks.float().view(1, kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, more], -1).softmax(-1)[..., :-1].to(v.dtype)
    return torch.matmul(weights, values).permute(0, 3, 1, 2, 4).flatten(2, 3)


class KVCache(nn.Module):
    """Slots for keys and values: k, v float [B, S, K, D], zero until written.

    A chunk belongs to one row, `row` int64 [1]. Without `row` there is only one.
    """

    def __init__(
        self, batch: int, slots: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        self.slots = slots
        for name in ("k", "v"):
            buffer = torch.zeros(batch, slots, kv_heads, head_dim, dtype=dtype)
            self.register_buffer(name, buffer, persistent=False)

    def of(self, row: Tensor | None) -> tuple[Tensor, Tensor]:
        """The row's keys and values [1, S, K, D]."""
        if row is None:
            return self.k, self.v
        return self.k.index_select(0, row), self.v.index_select(0, row)

    def store_chunk(self, k: Tensor, v: Tensor, slots: Tensor, row: Tensor | None) -> None:
        """Write k, v [1, T, K, D] to `slots` int64 [T] of the row."""
        if row is None:
            self.k.index_copy_(1, slots, k)
            self.v.index_copy_(1, slots, v)
        else:
            rows = row.expand(slots.shape[0])
            self.k.index_put_((rows, slots), k[0])
            self.v.index_put_((rows, slots), v[0])

    def store_step(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write each row of k, v [B, 1, K, D] to its own one of `slots` int64 [B]."""
        rows = torch.arange(slots.shape[0], device=slots.device)
        self.k.index_put_((rows, slots), k[:, 0])
        self.v.index_put_((rows, slots), v[:, 0])

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float,
        row: Tensor | None = None, sinks: Tensor | None = None,
        seen: dict[str, tuple[Tensor, ...]] | None = None, of: str = "",
    ) -> Tensor:  # fmt: skip
        """Store k, v [1, T, K, D] at `positions` int64 [T] and attend with q [1, T, H, D].

        `seen[of]` becomes what the chunk's queries see: keys, values and which of them are visible,
        as `attend` takes them.
        """
        given = self.begin_chunk(k, v, positions, row)
        out = attend(q, *given, scale, sinks)
        self.end_chunk(k, v, positions, row)
        if seen is not None:
            seen[of] = given
        return out

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float,
        sinks: Tensor | None = None, seen: dict[str, tuple[Tensor, ...]] | None = None,
        of: str = "",
    ) -> Tensor:  # fmt: skip
        """Store k, v [B, 1, K, D] at `positions` int64 [B], then attend with q [B, 1, H, D]. `seen`
        is as in `prefill`."""
        self.store_step(k, v, positions % self.slots if self.is_ring else positions)
        # A ring's slots up to the position are filled before it is full. Afterwards all are.
        visible = self.filled(positions)[:, None]
        if seen is not None:
            seen[of] = self.k, self.v, visible
        return attend(q, self.k, self.v, visible, scale, sinks)

    def filled(self, positions: Tensor) -> Tensor:
        """bool [N, S], true for the slots up to each of `positions` int64 [N]."""
        return torch.arange(self.slots, device=positions.device) <= positions[:, None]


class FullCache(KVCache):
    """Slot i holds position i. A query sees every position up to its own."""

    is_ring = False

    def begin_chunk(
        self, k: Tensor, v: Tensor, positions: Tensor, row: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store k, v [1, T, K, D] at `positions` int64 [T]. See KVCache.prefill."""
        self.store_chunk(k, v, positions, row)
        return *self.of(row), self.filled(positions)[None]

    def end_chunk(self, k: Tensor, v: Tensor, positions: Tensor, row: Tensor | None) -> None:
        """All is stored."""


class SlidingCache(KVCache):
    """A ring: position p lives in slot p mod S. A query sees the last S positions, its own
    included. A chunk may not be longer than the ring."""

    is_ring = True

    def begin_chunk(
        self, k: Tensor, v: Tensor, positions: Tensor, row: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ring and k, v [1, T, K, D] at `positions` int64 [T], which are consecutive. See
        KVCache.prefill."""
        keys, values = self.of(row)
        visible = self.visible_in_prefill(positions)[None]
        return torch.cat([keys, k], 1), torch.cat([values, v], 1), visible

    def end_chunk(self, k: Tensor, v: Tensor, positions: Tensor, row: Tensor | None) -> None:
        """Store k, v in place of what the chunk's queries may still have seen."""
        self.store_chunk(k, v, positions % self.slots, row)

    def visible_in_prefill(self, positions: Tensor) -> Tensor:
        """bool [T, S + T]: what queries at `positions` see of the ring followed by the chunk."""
        slots = torch.arange(self.slots, device=positions.device)
        start = positions[:1]
        # A slot has the newest congruent position before the chunk. Negative means unwritten.
        held = start - 1 - (start - 1 - slots + self.slots) % self.slots
        keys = torch.cat([held, positions])
        queries = positions[:, None]
        return (keys >= 0) & (keys <= queries) & (keys > queries - self.slots)
