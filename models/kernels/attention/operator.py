"""Attention of a decode step on CUDA, in one launch."""

import triton
from torch import Tensor, empty, float32

from tokenloop.models.kernels.attention.attend_tiles import PROGRAMS, AttendTiles, attend_tiles
from tokenloop.models.kernels.attention.triton_attend import attend_kernel
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator


def launch_attend(
    qkv: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, inv_freq: Tensor, semaphores: Tensor, sinks: Tensor | None = None, *,
    scale: float, eps: float, offset: float = 0.0, value_norm: bool = False,
    values_are_keys: bool = False, attention_factor: float = 1.0, keys: bool = True,
    tiles: AttendTiles | None = None, drafts: tuple[Tensor, Tensor] | None = None,
    stores: bool = True,
) -> Tensor:  # fmt: skip
    """`attend_step`, or with `drafts` `attend_drafts`, cut as `tiles` say.

    Raises ValueError for projections that the caches do not fit, and for sinks without keys.
    """
    check_contiguous(k_cache=k_cache, v_cache=v_cache)
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv of strides {qkv.stride()}: a row must be contiguous")
    if sinks is not None and not keys:
        raise ValueError("sinks are scored with the token's own key, and there are no keys")
    _, slots, kv_heads, head_dim = k_cache.shape
    rows = len(qkv)
    groups = qkv.shape[1] // (kv_heads * head_dim) - (1 if values_are_keys else 2) * keys
    if qkv.shape[1] % (kv_heads * head_dim) or groups < 1 or qkv.dtype != k_cache.dtype:
        raise ValueError(
            f"projections {qkv.dtype} {tuple(qkv.shape)} do not fit caches {k_cache.dtype} "
            f"{tuple(k_cache.shape)}"
        )
    tiles = tiles or attend_tiles(slots, kv_heads, head_dim, qkv.dtype)
    parts = triton.cdiv(slots, tiles.block_s * tiles.least)
    splits = min(tiles.splits, triton.next_power_of_2(parts))
    fan = min(tiles.fan, splits)
    stored = triton.next_power_of_2(groups)
    new = {"dtype": float32, "device": qkv.device}
    out = empty(rows, kv_heads * groups * head_dim, dtype=qkv.dtype, device=qkv.device)
    acc = empty(rows, kv_heads, splits, stored, head_dim, **new)
    largest = empty(rows, kv_heads, splits, stored, **new)
    total = empty(rows, kv_heads, splits, stored, **new)
    # Most programs of many short rows would have nothing to do.
    programs = min(splits, max(1, PROGRAMS // (kv_heads * rows)))
    launch(attend_kernel, (kv_heads, rows, programs))(
        qkv, position, k_cache, v_cache, q_norm, k_norm, inv_freq, sinks,
        *(drafts or (None, None)), out, acc, largest, total, semaphores, slots, scale, eps, offset,
        attention_factor,
        KV=kv_heads, HEADS=groups, HALF=head_dim // 2,
        VALUE_NORM=value_norm, STORES=stores, VALUES_ARE_KEYS=values_are_keys, WIDTH=qkv.stride(0),
        SPLITS=splits, FAN=fan, BLOCK_S=tiles.block_s, LEAST=tiles.least,
        ONE_PART=programs == splits,
        BLOCK_G=max(16, stored),
        PARTS=max(1, min(fan, tiles.combined // (stored * head_dim))),
        STORED=stored, STAGES=tiles.stages, KEYS=keys, num_warps=tiles.warps,
    )  # fmt: skip
    return out


@operator("attend_step", mutates_args={"k_cache", "v_cache", "semaphores"})
def attend_step(
    qkv: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, inv_freq: Tensor, semaphores: Tensor, sinks: Tensor | None = None, *,
    scale: float, eps: float, offset: float = 0.0, value_norm: bool = False,
    values_are_keys: bool = False, attention_factor: float = 1.0, keys: bool = True,
) -> Tensor:  # fmt: skip
    """See reference.attend_step. Tensors are contiguous, but rows of qkv may lie further apart."""
    return launch_attend(
        qkv, position, k_cache, v_cache, q_norm, k_norm, inv_freq, semaphores, sinks,
        scale=scale, eps=eps, offset=offset,
        value_norm=value_norm, values_are_keys=values_are_keys, attention_factor=attention_factor,
        keys=keys,
    )  # fmt: skip


@operator("attend_drafts", mutates_args={"k_cache", "v_cache", "draft_k", "draft_v", "semaphores"})
def attend_drafts(
    qkv: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, draft_k: Tensor,
    draft_v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, inv_freq: Tensor,
    semaphores: Tensor, sinks: Tensor | None = None, *,
    scale: float, eps: float, offset: float = 0.0, value_norm: bool = False,
    values_are_keys: bool = False, attention_factor: float = 1.0, stores: bool = True,
) -> Tensor:  # fmt: skip
    """See reference.attend_drafts. Two launches: rows see keys of others, which come first.

    Raises ValueError for more rows than a cache has slots.
    """
    if len(qkv) > k_cache.shape[1]:
        raise ValueError(f"{len(qkv)} rows do not fit a cache of {k_cache.shape[1]} slots")
    options = {
        "scale": scale, "eps": eps, "offset": offset, "value_norm": value_norm,
        "values_are_keys": values_are_keys, "attention_factor": attention_factor,
    }  # fmt: skip
    given = q_norm, k_norm, inv_freq, semaphores, sinks
    # A step of rows with caches of one slot each stores what a step stores, by the same code.
    launch_attend(qkv, position, draft_k, draft_v, *given, **options)
    return launch_attend(
        qkv, position, k_cache, v_cache, *given, **options,
        drafts=(draft_k, draft_v), stores=stores,
    )  # fmt: skip
