"""Attention of a packed chunk of prompts on CUDA: one launch to make queries, keys and values, one
to attend, and one to put a chunk into a ring."""

import torch
import triton
from torch import Tensor, empty, empty_like, int8

from tokenloop.models.kernels.attention.triton_attend import LOG2_E
from tokenloop.models.kernels.attention_chunk.chunk_tiles import (
    PROCESSORS,
    ChunkTiles,
    GluonTiles,
    chunk_tiles,
    gluon_tiles,
    heads_together,
    parts_of_head,
    rotated_tokens,
)
from tokenloop.models.kernels.attention_chunk.gluon_attend_chunk import (
    gluon_attend_chunk_kernel,
)
from tokenloop.models.kernels.attention_chunk.gluon_attend_ring import gluon_attend_ring_kernel
from tokenloop.models.kernels.attention_chunk.gluon_attend_wide import gluon_attend_wide_kernel
from tokenloop.models.kernels.attention_chunk.triton_attend_chunk import attend_chunk_kernel
from tokenloop.models.kernels.attention_chunk.triton_rotate import (
    filled_slots_kernel,
    rotate_kernel,
    store_ring_kernel,
)
from tokenloop.models.kernels.attention_chunk.triton_sequences import count_blocks
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator

# Sequences of a chunk start at positions that this divides.
GRANULE = 64

# Gluon has no interpreter, and its kernel is for Hopper GPUs.
HAS_GLUON = not triton.knobs.runtime.interpret and (
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9
)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a launch's tensor descriptors; torch's is aligned to more than they need."""
    return empty(size, dtype=int8, device="cuda")


def _sequences(rows: Tensor) -> dict[str, int]:
    count = rows.shape[0]
    return {"SEQUENCES": count, "PADDED": triton.next_power_of_2(count)}


@operator("rotate_chunk", mutates_args={"k_cache", "v_cache"})
def rotate_chunk(
    qkv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, inv_freq: Tensor, *, eps: float,
    offset: float = 0.0, value_norm: bool = False, values_are_keys: bool = False,
    is_ring: bool = False, queries: bool = True, keys: bool = True, attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See reference.rotate_chunk. qkv's last axis is contiguous, and all else.

    Raises ValueError for projections that the caches do not fit.
    """
    check_contiguous(k_cache=k_cache, v_cache=v_cache, starts=starts, rows=rows, first=first)
    tokens, width = qkv.shape
    _, slots, kv_heads, head_dim = k_cache.shape
    others = (1 if values_are_keys else 2) * keys
    groups = width // (kv_heads * head_dim) - others
    if (
        width % (kv_heads * head_dim) or (groups < 1 if queries else groups != 0)
        or qkv.dtype != k_cache.dtype or qkv.stride(1) != 1
    ):  # fmt: skip
        raise ValueError(
            f"projections {qkv.dtype} {tuple(qkv.shape)} of strides {qkv.stride()} do not fit "
            f"caches {k_cache.dtype} {tuple(k_cache.shape)}"
        )
    new = {"dtype": qkv.dtype, "device": qkv.device}
    q = empty(tokens, kv_heads * groups * head_dim, **new) if queries else empty(0, **new)
    kv = empty(tokens, 2, kv_heads, head_dim, **new) if is_ring and keys else empty(0, **new)
    block_t = rotated_tokens(head_dim)
    blocks = count_blocks(tokens, rows.shape[0], block_t)
    launch(rotate_kernel, (kv_heads, blocks))(
        qkv, starts, rows, first, k_cache, v_cache, q_norm, k_norm, inv_freq, q, kv,
        qkv.stride(0), slots, eps, offset, attention_factor,
        KV=kv_heads, HEADS=groups, HALF=head_dim // 2, VALUE_NORM=value_norm,
        VALUES_ARE_KEYS=values_are_keys, KEYS=keys, IS_RING=is_ring, **_sequences(rows),
        BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip
    return q, kv


def _launch_gluon(
    q: Tensor, kv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor,
    v_cache: Tensor, scale: float, is_ring: bool, tiles: GluonTiles,
) -> Tensor:  # fmt: skip
    tokens, width = q.shape
    all_rows, slots, kv_heads, head_dim = k_cache.shape
    sequences = rows.shape[0]
    heads = width // head_dim
    out = empty(tokens, width, dtype=q.dtype, device=q.device)
    parts = parts_of_head(head_dim)
    most = heads * parts * count_blocks(tokens, sequences, 64 * tiles.consumers)
    triton.set_allocator(_scratch)
    kernel, given = gluon_attend_chunk_kernel, (q,)
    if is_ring:
        kernel, given = gluon_attend_ring_kernel, (q, kv)
    elif parts > 1:
        kernel = gluon_attend_wide_kernel
    launch(kernel, (min(PROCESSORS, most),))(
        *given, starts, rows, first, k_cache, v_cache, out, tokens, all_rows, slots,
        slots * kv_heads * head_dim,
        UNIT=scale * LOG2_E.value, KV=kv_heads, GROUPS=heads // kv_heads, SIZE=head_dim,
        SEQUENCES=sequences, CONSUMERS=tiles.consumers, BLOCK_N=tiles.block_n, STAGES=tiles.stages,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


def launch_attend_chunk(
    q: Tensor, kv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor,
    v_cache: Tensor, sinks: Tensor | None = None, *, scale: float, is_ring: bool,
    tiles: ChunkTiles | GluonTiles | None = None,
) -> Tensor:  # fmt: skip
    """`attend_chunk`, cut as `tiles` say: by the kernel that they are for.

    Raises ValueError for queries that the caches do not fit, and for tiles that a ring does not.
    """
    check_contiguous(
        q=q, kv=kv, k_cache=k_cache, v_cache=v_cache, starts=starts, rows=rows, first=first
    )
    _, slots, kv_heads, head_dim = k_cache.shape
    tokens, width = q.shape
    if width % (kv_heads * head_dim) or q.dtype != k_cache.dtype:
        raise ValueError(
            f"queries {q.dtype} {tuple(q.shape)} do not fit caches {k_cache.dtype} "
            f"{tuple(k_cache.shape)}"
        )
    heads = width // head_dim
    if isinstance(tiles, GluonTiles) and sinks is not None:
        raise ValueError("the Gluon kernels have no sinks; the Triton kernel has")
    if tiles is None and HAS_GLUON and sinks is None:
        tiles = gluon_tiles(tokens, rows.shape[0], heads, head_dim, slots, q.dtype, is_ring)
    tiles = tiles or chunk_tiles(slots, head_dim, q.dtype, is_ring)
    in_blocks = isinstance(tiles, GluonTiles) or tiles.tma
    if is_ring and (GRANULE % tiles.block_n or in_blocks and slots % tiles.block_n):
        raise ValueError(f"{tiles} do not fit a ring of {slots} slots")
    if isinstance(tiles, GluonTiles):
        return _launch_gluon(q, kv, starts, rows, first, k_cache, v_cache, scale, is_ring, tiles)
    groups = width // (kv_heads * head_dim)
    out = empty(tokens, width, dtype=q.dtype, device=q.device)
    blocks = count_blocks(tokens, rows.shape[0], tiles.block_m)
    if tiles.tma:
        # Every thread has its own allocator.
        triton.set_allocator(_scratch)
    together = heads_together(tokens, kv_heads, head_dim, is_ring)
    grid = together * groups * tiles.split, blocks, kv_heads // together
    launch(attend_chunk_kernel, grid)(
        q, kv, starts, rows, first, k_cache, v_cache, sinks, out, slots, scale,
        KV=kv_heads, HEADS=groups, SIZE=head_dim, SPLIT=tiles.split, IS_RING=is_ring,
        **_sequences(rows), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, STAGES=tiles.stages,
        TMA=tiles.tma, num_warps=tiles.warps,
    )  # fmt: skip
    return out


@operator("attend_chunk")
def attend_chunk(
    q: Tensor, kv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor,
    v_cache: Tensor, sinks: Tensor | None = None, *, scale: float, is_ring: bool,
) -> Tensor:  # fmt: skip
    """See reference.attend_chunk. Tensors are contiguous.

    A token's result is the same bit for bit whatever chunk it comes in, if a chunk starts at a
    multiple of 64.
    """
    return launch_attend_chunk(
        q, kv, starts, rows, first, k_cache, v_cache, sinks, scale=scale, is_ring=is_ring
    )


@operator("store_ring", mutates_args={"k_cache", "v_cache"})
def store_ring(
    kv: Tensor, starts: Tensor, rows: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> None:  # fmt: skip
    """See reference.store_ring. Tensors are contiguous."""
    check_contiguous(kv=kv, k_cache=k_cache, v_cache=v_cache, starts=starts, rows=rows, first=first)
    _, slots, kv_heads, head_dim = k_cache.shape
    block_t = rotated_tokens(head_dim)
    blocks = count_blocks(kv.shape[0], rows.shape[0], block_t)
    launch(store_ring_kernel, (kv_heads, blocks))(
        kv, starts, rows, first, k_cache, v_cache, slots,
        KV=kv_heads, SIZE=head_dim, **_sequences(rows), BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip


@operator("filled_slots")
def filled_slots(first: Tensor, slots: int) -> Tensor:
    """See reference.filled_slots. `first` is contiguous."""
    check_contiguous(first=first)
    filled, count = empty_like(first), first.shape[0]
    launch(filled_slots_kernel, (1,))(
        first, filled, slots, SEQUENCES=count, PADDED=triton.next_power_of_2(count), num_warps=1
    )
    return filled
