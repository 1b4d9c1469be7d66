"""A packed chunk's attention in plain torch, one sequence after the other.

Shapes: T tokens, of which starts[-1] are there; B sequences, of which i has the tokens from
starts[i] to starts[i + 1], the cache's row rows[i] (negative: no sequence) and positions from
first[i] on; H query heads, G key/value heads, Dh head size, S slots; caches [rows, S, G, Dh].
starts [B + 1], rows and first [B] are int32.
"""

import torch
from torch import Tensor

from tokenloop.models.cache import FullCache, SlidingCache, attend
from tokenloop.models.kernels.rms_norm.reference import rms_norm


def sequences(starts: Tensor, rows: Tensor, first: Tensor):
    """(tokens as a slice, the cache's row, positions int64) of each sequence that has tokens."""
    bounds, device = starts.tolist(), starts.device
    for begin, end, row, position in zip(bounds, bounds[1:], rows.tolist(), first.tolist()):
        if end > begin and row >= 0:
            positions = torch.arange(position, position + end - begin, device=device)
            yield slice(begin, end), row, positions


def rotate_chunk(
    qkv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, inv_freq: Tensor, *, eps: float,
    offset: float = 0.0, value_norm: bool = False, values_are_keys: bool = False,
    is_ring: bool = False, queries: bool = True, keys: bool = True, attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and rotate the queries and keys of a chunk: q [T, H * Dh] and kv.

    qkv [T, (H + 2 G) * Dh]; inv_freq float32 [Dh / 2] is 0 where a pair is not rotated. With
    values_are_keys qkv is [T, (H + G) * Dh], and a value is its key before norm and rotation. With
    value_norm values are normed, without a weight. Pairs that are rotated are multiplied by
    attention_factor. Without `queries` H is 0 and q is [0]. Without `keys` qkv is [T, H * Dh].

    Keys and values of a full cache are put into it, and kv is [0]. A ring is left as it is, and kv
    [T, 2, G, Dh] are its keys and values.
    """
    _, slots, kv_heads, head_dim = k_cache.shape
    x = qkv.reshape(qkv.shape[0], -1, head_dim)
    others = 0 if not keys else kv_heads * (1 if values_are_keys else 2)
    heads = x.shape[1] - others
    q = qkv.new_zeros(x.shape[0], heads, head_dim)
    kv = qkv.new_zeros(x.shape[0] if is_ring and keys else 0, 2, kv_heads, head_dim)

    def prepare(x: Tensor, weight: Tensor | None, positions: Tensor) -> Tensor:
        angles = (positions.float()[:, None] * inv_freq)[:, None]
        length = torch.where(inv_freq != 0, attention_factor, 1.0)
        cos, sin = angles.cos() * length, angles.sin() * length
        x = x.float() if weight is None else rms_norm(x, weight, eps, offset)
        one, two = x.chunk(2, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(qkv.dtype)

    for tokens, row, positions in sequences(starts, rows, first):
        q[tokens] = prepare(x[tokens, :heads], q_norm, positions)
        if not keys:
            continue
        k = x[tokens, heads : heads + kv_heads]
        v = x[tokens, -kv_heads:]
        if value_norm:
            v = rms_norm(v, None, eps, offset).to(qkv.dtype)
        k = prepare(k, k_norm, positions)
        if is_ring:
            kv[tokens, 0], kv[tokens, 1] = k, v
        else:
            k_cache[row, positions], v_cache[row, positions] = k, v
    return (q.flatten(1) if queries else q.new_empty(0)), (kv if kv.numel() else kv.new_empty(0))


def attend_chunk(
    q: Tensor, kv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor,
    v_cache: Tensor, sinks: Tensor | None = None, *, scale: float, is_ring: bool,
) -> Tensor:  # fmt: skip
    """Causal attention of the queries q [T, H * Dh] -> [T, H * Dh]. `sinks` [H] are a score more of
    each head, which no value belongs to.

    A full cache has the keys of all positions up to a query's own. A ring has those before the
    chunk, position p in slot p % S, and kv [T, 2, G, Dh] has the chunk's; a query sees the last S
    positions, its own included. A chunk may be longer than the ring.
    """
    _, slots, kv_heads, head_dim = k_cache.shape
    out = torch.zeros_like(q)
    queries = q.view(q.shape[0], -1, head_dim).float()
    for tokens, row, positions in sequences(starts, rows, first):
        keys, values = k_cache[row].float(), v_cache[row].float()
        if is_ring:
            cache = SlidingCache(1, slots, 1, 1).to(q.device)
            visible = cache.visible_in_prefill(positions)
            keys = torch.cat([keys, kv[tokens, 0].float()])
            values = torch.cat([values, kv[tokens, 1].float()])
        else:
            visible = FullCache(1, slots, 1, 1).to(q.device).filled(positions)
        given = queries[None, tokens], keys[None], values[None], visible[None]
        got = attend(*given, scale, sinks)
        out[tokens] = got[0].flatten(1).to(q.dtype)
    return out


def store_ring(
    kv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> None:  # fmt: skip
    """Put the last S tokens of each sequence, or all, of kv [T, 2, G, Dh] into their slots."""
    slots = k_cache.shape[1]
    for tokens, row, positions in sequences(starts, rows, first):
        last = positions[-slots:] % slots
        k_cache[row, last] = kv[tokens, 0][-slots:]
        v_cache[row, last] = kv[tokens, 1][-slots:]


def filled_slots(first: Tensor, slots: int) -> Tensor:
    """The last slot of a ring of `slots` that is filled up to each position first int32 [B]: that
    of a token which sees it whole, when its own key is stored."""
    return first.clamp(max=slots - 1)
