"""KV caches: what a layer remembers, as buffers updated in place.

Each cache has `prefill` and `decode`, because a ring may overwrite its oldest entry before a
single query reads it, but not before a chunk of queries does. Keys arrive already rotated.
Shapes: B rows, T new tokens, H query heads, K key/value heads, D head size, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention of q [B, T, H, D] over k, v [B, S, K, D] where `visible` [T, S] is true."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class KVCache(nn.Module):
    """Slots for keys and values: k, v float [B, S, K, D], zero until written."""

    def __init__(self, batch: int, slots: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.slots = slots
        for name in ("k", "v"):
            buffer = torch.zeros(batch, slots, kv_heads, head_dim)
            self.register_buffer(name, buffer, persistent=False)


class FullCache(KVCache):
    """Slot i holds position i; a query sees every position up to its own."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Store k, v [B, T, K, D] at `positions` int64 [T] and attend with q [B, T, H, D]."""
        self.k.index_copy_(1, positions, k)
        self.v.index_copy_(1, positions, v)
        slots = torch.arange(self.slots, device=positions.device)
        return attend(q, self.k, self.v, slots <= positions[:, None], scale)

    decode = prefill


class SlidingCache(KVCache):
    """A ring: position p lives in slot p mod S, and a query sees the last S positions, itself
    included. A chunk may not be longer than the ring."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Attend with q [B, T, H, D] over the ring and k, v [B, T, K, D]; then store k, v at
        `positions` int64 [T], which are consecutive."""
        visible = self.visible_in_prefill(positions)
        out = attend(q, torch.cat([self.k, k], 1), torch.cat([self.v, v], 1), visible, scale)
        slots = positions % self.slots
        self.k.index_copy_(1, slots, k)
        self.v.index_copy_(1, slots, v)
        return out

    def decode(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Store k, v [B, 1, K, D] at `positions` int64 [1], then attend with q [B, 1, H, D]."""
        slot = positions % self.slots
        self.k.index_copy_(1, slot, k)
        self.v.index_copy_(1, slot, v)
        # Before the ring is full the slots up to the position are filled; afterwards all are.
        visible = torch.arange(self.slots, device=positions.device) <= positions[:, None]
        return attend(q, self.k, self.v, visible, scale)

    def visible_in_prefill(self, positions: Tensor) -> Tensor:
        """bool [T, S + T]: what queries at `positions` see of the ring followed by the chunk."""
        slots = torch.arange(self.slots, device=positions.device)
        start = positions[:1]
        # The newest position before the chunk that is congruent to the slot; negative: unwritten.
        held = start - 1 - (start - 1 - slots + self.slots) % self.slots
        keys = torch.cat([held, positions])
        queries = positions[:, None]
        return (keys >= 0) & (keys <= queries) & (keys > queries - self.slots)
