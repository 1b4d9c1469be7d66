"""Rounds of drafts on CUDA, in one launch each."""

import triton
from torch import Tensor

from tokenloop.models.kernels.drafts.reference import COMPARED
from tokenloop.models.kernels.drafts.triton import (
    accept_kernel,
    next_drafts_kernel,
    store_drafts_kernel,
    take_drafts_kernel,
)
from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator

# Places of the history that are compared at once.
BLOCK_M = 2048


@operator("next_drafts", mutates_args={"tokens", "positions"})
def next_drafts(history: Tensor, position: Tensor, tokens: Tensor, positions: Tensor) -> None:
    """See reference.next_drafts. All are contiguous."""
    count = len(tokens)
    launch(next_drafts_kernel, (1,))(
        history, position, tokens, positions,
        COUNT=count, PADDED=triton.next_power_of_2(count), COMPARED=COMPARED, BLOCK_M=BLOCK_M,
        num_warps=1 if count == 1 else 8,
    )  # fmt: skip


@operator("take_drafts", mutates_args={"tokens", "positions"})
def take_drafts(
    history: Tensor, position: Tensor, drafts: Tensor, tokens: Tensor, positions: Tensor
) -> None:
    """See reference.take_drafts. All are contiguous."""
    count = len(tokens)
    launch(take_drafts_kernel, (1,))(
        history, position, drafts, tokens, positions,
        COUNT=count, PADDED=triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip


@operator("accept", mutates_args={"history", "position", "accepted"})
def accept(
    tokens: Tensor, chosen: Tensor, history: Tensor, position: Tensor, accepted: Tensor
) -> None:
    """See reference.accept. All are contiguous."""
    count = len(tokens)
    launch(accept_kernel, (1,))(
        tokens, chosen, history, position, accepted,
        COUNT=count, PADDED=triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip


@operator("store_drafts", mutates_args={"k_cache", "v_cache"})
def store_drafts(
    draft_k: Tensor, draft_v: Tensor, positions: Tensor, accepted: Tensor, k_cache: Tensor,
    v_cache: Tensor,
) -> None:  # fmt: skip
    """See reference.store_drafts."""
    check_contiguous(draft_k=draft_k, draft_v=draft_v, k_cache=k_cache, v_cache=v_cache)
    size = draft_k[0].numel()
    launch(store_drafts_kernel, (len(draft_k),))(
        draft_k, draft_v, positions, accepted, k_cache, v_cache, k_cache.shape[1],
        SIZE=size, PADDED=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
