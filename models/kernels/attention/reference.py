"""One token's attention in plain torch.

Shapes: B rows, H query heads, G key/value heads, Dh head size, S slots. `semaphores` are the
kernel's own; they stay as they are.
"""

import torch
from torch import Tensor

from tokenloop.models.kernels.rms_norm.reference import rms_norm


def attend_step(
    qkv: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, inv_freq: Tensor, semaphores: Tensor, sinks: Tensor | None = None, *,
    scale: float, eps: float, offset: float = 0.0, value_norm: bool = False,
    values_are_keys: bool = False, attention_factor: float = 1.0, keys: bool = True,
) -> Tensor:  # fmt: skip
    """One token's attention of each row, after its key and value are put into the caches.

    qkv [B, (H + 2 G) * Dh] -> [B, H * Dh]; position int64 [B]; caches [B, S, G, Dh] have position p
    in slot p % S; inv_freq float32 [Dh / 2] is 0 where a pair is not rotated. With values_are_keys
    qkv is [B, (H + G) * Dh], and a value is its key before norm and rotation. With value_norm
    values are normed, without a weight. Pairs that are rotated are multiplied by attention_factor.
    `sinks` [H] are a score more of each head, which no value belongs to. Without `keys` qkv is
    [B, H * Dh], and the caches have the token's key and value already.
    """
    rows, slots, kv_heads, head_dim = k_cache.shape
    others = [kv_heads] * ((1 if values_are_keys else 2) * keys)
    heads = qkv.shape[1] // head_dim - sum(others)
    q, *rest = qkv.view(rows, -1, head_dim).split([heads, *others], dim=1)
    angles = (position.float()[:, None] * inv_freq)[:, None]
    length = torch.where(inv_freq != 0, attention_factor, 1.0)
    cos, sin = angles.cos() * length, angles.sin() * length

    def prepare(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float() if weight is None else rms_norm(x, weight, eps, offset)
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated.to(qkv.dtype)

    q = prepare(q, q_norm)
    if keys:
        k, v = rest[0], rest[-1]
        if value_norm:
            v = rms_norm(v, None, eps, offset).to(qkv.dtype)
        row = torch.arange(rows, device=qkv.device)
        k_cache.index_put_((row, position % slots), prepare(k, k_norm))
        v_cache.index_put_((row, position % slots), v)

    grouped = q.float().view(rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bghd,bsgd->bghs", grouped, k_cache.float()) * scale
    filled = torch.arange(slots, device=qkv.device) <= position[:, None]
    scores = scores.masked_fill(~filled[:, None, None], -torch.inf)
    if sinks is not None:
        sunk = sinks.float().view(1, kv_heads, -1, 1).expand(rows, -1, -1, 1)
        scores = torch.cat([scores, sunk], -1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    out = torch.einsum("bghs,bsgd->bghd", scores, v_cache.float())
    return out.reshape(rows, -1).to(qkv.dtype)


def attend_drafts(
    qkv: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, draft_k: Tensor,
    draft_v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, inv_freq: Tensor,
    semaphores: Tensor, sinks: Tensor | None = None, *,
    scale: float, eps: float, offset: float = 0.0, value_norm: bool = False,
    values_are_keys: bool = False, attention_factor: float = 1.0, stores: bool = True,
) -> Tensor:  # fmt: skip
    """What steps of one row give, one after the other, for rows of qkv at consecutive positions:
    caches [1, S, G, Dh], at least as many slots as rows.

    Keys and values come to draft_k and draft_v [B, 1, G, Dh]. The caches have them after it if it
    `stores`, and otherwise they are as before: no row has lost what it may still see.
    """
    k, v = k_cache.clone(), v_cache.clone()
    rows = []
    for row in range(len(qkv)):
        given = qkv[row : row + 1], position[row : row + 1]
        out = attend_step(
            *given, k, v, q_norm, k_norm, inv_freq, semaphores, sinks, scale=scale, eps=eps,
            offset=offset, value_norm=value_norm, values_are_keys=values_are_keys,
            attention_factor=attention_factor,
        )  # fmt: skip
        rows.append(out)
        slot = position[row] % k.shape[1]
        draft_k[row, 0], draft_v[row, 0] = k[0, slot], v[0, slot]
    if stores:
        k_cache.copy_(k)
        v_cache.copy_(v)
    return torch.cat(rows)
