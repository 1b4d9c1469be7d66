"""The Triton kernels around a round of drafts. Names: row r of COUNT, place m of the history."""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits


@triton.jit
def next_drafts_kernel(
    history_ptr, position_ptr, tokens_ptr, positions_ptr,
    COUNT: tl.constexpr, PADDED: tl.constexpr, COMPARED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All of it. It does not wait: what it writes is there before any kernel after it begins."""
    r = tl.arange(0, PADDED)
    newest = tl.load(position_ptr)
    places = newest + tl.zeros([PADDED], tl.int64)
    if COUNT > 1:
        best = tl.full([BLOCK_M], 0, tl.int64)
        last = newest.to(tl.int32)
        for start in range(0, last, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            same = m < last
            length = tl.zeros([BLOCK_M], tl.int64)
            for i in tl.static_range(COMPARED):
                same &= m >= i
                wanted = tl.load(history_ptr + last - i, mask=last >= i, other=-1)
                same &= tl.load(history_ptr + m - i, mask=same, other=-2) == wanted
                length += same.to(tl.int64)
            # Longer ones first, and then later ones.
            best = tl.maximum(best, tl.where(length > 0, (length << 32) + m, 0))
        found = tl.max(best, 0)
        place = tl.where(found > 0, found & 0xFFFFFFFF, newest - 1)
        drafts = place + 1 + (r - 1) % (newest - place)
        places = tl.where(r > 0, drafts, places)
    tokens = tl.load(history_ptr + places, mask=r < COUNT)
    tl.store(tokens_ptr + r, tokens, mask=r < COUNT)
    tl.store(positions_ptr + r, newest + r, mask=r < COUNT)


@triton.jit
def take_drafts_kernel(
    history_ptr, position_ptr, drafts_ptr, tokens_ptr, positions_ptr,
    COUNT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """It does not wait either."""
    r = tl.arange(0, PADDED)
    newest = tl.load(position_ptr)
    drafts = tl.load(drafts_ptr + r - 1, mask=(r > 0) & (r < COUNT), other=0)
    tokens = tl.where(r > 0, drafts, tl.load(history_ptr + newest))
    tl.store(tokens_ptr + r, tokens, mask=r < COUNT)
    tl.store(positions_ptr + r, newest + r, mask=r < COUNT)


@waits  # at once
@triton.jit
def accept_kernel(
    tokens_ptr, chosen_ptr, history_ptr, position_ptr, accepted_ptr,
    COUNT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    zero = wait(0)
    r = tl.arange(0, PADDED)
    chosen = tl.load(chosen_ptr + zero + r, mask=r < COUNT, other=-1)
    drafts = tl.load(tokens_ptr + zero + 1 + r, mask=r + 1 < COUNT, other=-2)
    # No draft follows the last row.
    last = tl.min(tl.where(drafts == chosen, PADDED, r), 0)
    position = tl.load(position_ptr + zero)
    tl.store(history_ptr + zero + position + 1 + r, chosen, mask=r <= last)
    tl.store(accepted_ptr + zero, last + 1)
    tl.store(accepted_ptr + zero + 1 + r, chosen, mask=r < COUNT)
    tl.store(position_ptr + zero, position + 1 + last)


@waits  # at once
@triton.jit
def store_drafts_kernel(
    draft_k_ptr, draft_v_ptr, positions_ptr, accepted_ptr, k_ptr, v_ptr, slots,
    SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A row's keys and values, SIZE of each."""
    row = tl.program_id(0)
    zero = wait(0)
    if row >= tl.load(accepted_ptr + zero):
        return
    i = tl.arange(0, PADDED)
    slot = tl.load(positions_ptr + zero + row) % slots
    source = zero + row.to(tl.int64) * SIZE + i
    to = zero + slot * SIZE + i
    tl.store(k_ptr + to, tl.load(draft_k_ptr + source, mask=i < SIZE), mask=i < SIZE)
    tl.store(v_ptr + to, tl.load(draft_v_ptr + source, mask=i < SIZE), mask=i < SIZE)
