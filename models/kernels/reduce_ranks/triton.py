"""The Triton kernel of the ranks' sum: one shot over memory that every rank can write.

Each rank has a mailbox: flags int32 [N, ROWS], and room for parts [2, N, ROWS, K]. A program puts
its row of this rank's part into all mailboxes, raises its flag there, waits for all flags in its
own, and adds what lies there in the ranks' order. So all ranks have the same bits.

How many sums a row has had is its epoch, which lies on the device: replaying a graph needs nothing
of the host. The epoch's lowest bit says which half of the room is used. A rank can begin a sum
while another still reads the one before, and not the one before that: it had to wait for the flag
that the other raised after it.

Names: row b, element k of K, rank r of RANKS.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.rms_norm.triton import norm_weights, rms_norm


@triton.jit
def tell(peers_ptr, part, slot, k, mask, flag, epoch, RANKS: tl.constexpr):
    """Store a part's elements k at a slot of all ranks' rooms, and then raise all ranks' flag of
    that number to the epoch."""
    for r in tl.static_range(RANKS):
        room = tl.load(peers_ptr + RANKS + r).to(tl.pointer_type(part.dtype))
        tl.store(room + slot + k, part, mask=mask)
    tl.debug_barrier()  # the stores of all threads come before the flags
    for r in tl.static_range(RANKS):
        flags = tl.load(peers_ptr + r).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + flag, epoch, sem="release", scope="sys")


@triton.jit
def wait_for_flag(flag_ptr, epoch):
    """Wait until a flag is raised to the epoch. Both wrap around."""
    while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - epoch < 0:
        pass


@waits  # once it has the weights
@triton.jit
def reduce_norm_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, total_ptr, h_ptr, peers_ptr, epoch_ptr, K,
    eps: tl.constexpr, offset: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr,
):  # fmt: skip
    """A row of the new residual, and its norm if there is one. peers int64 [2 N + 1] has the
    addresses of all flags, those of all rooms, and this rank's number. PUSH and PULL are the two
    halves of the work, which one process that stands for all ranks does one after the other."""
    b = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    mask = k < K
    weight, post = norm_weights(norm_ptr, post_ptr, k, K, True)
    zero = wait(0)
    peers_ptr += zero
    rank = tl.load(peers_ptr + 2 * RANKS).to(tl.int32)
    # It wraps around, and so do the flags.
    epoch = tl.load(epoch_ptr + zero + b) + 1
    half = (epoch & 1) * RANKS
    start = b * K + zero
    part_type = tl.pointer_type(branch_ptr.dtype.element_ty)
    if PUSH:
        part = tl.load(branch_ptr + start + k, mask=mask, other=0.0)
        slot = ((half + rank) * ROWS + b).to(tl.int64) * K
        tell(peers_ptr, part, slot, k, mask, rank * ROWS + b, epoch, RANKS)
    if PULL:
        flags = tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int32))
        room = tl.load(peers_ptr + RANKS + rank).to(part_type)
        branch = tl.zeros([BLOCK_K], tl.float32)
        for r in tl.static_range(RANKS):
            wait_for_flag(flags + r * ROWS + b, epoch)
            slot = ((half + r) * ROWS + b).to(tl.int64) * K
            part = tl.load(room + slot + k, mask=mask, other=0.0, volatile=True).to(tl.float32)
            if r == 0:
                branch = part
            else:
                branch += part
        # Rounded as the result of a product is that no other rank has a part of.
        branch = branch.to(branch_ptr.dtype.element_ty).to(tl.float32)
        if post_ptr is not None:
            branch = rms_norm(branch, offset + post, K, eps)
        x = tl.load(x_ptr + start + k, mask=mask, other=0.0)
        total = x.to(tl.float32) + branch
        if scalar_ptr is not None:
            total = total * tl.load(scalar_ptr).to(tl.float32)
        total = total.to(x.dtype)
        tl.store(total_ptr + b * K + k, total, mask=mask)
        if norm_ptr is not None:
            h = rms_norm(total.to(tl.float32), offset + weight, K, eps).to(x.dtype)
            tl.store(h_ptr + b * K + k, h, mask=mask)
        tl.store(epoch_ptr + b, epoch)


@waits  # once it has the count, which the host wrote
@triton.jit
def exchange_kernel(
    x_ptr, y_ptr, count_ptr, peers_ptr, epoch_ptr, rows, K, width,
    RANKS: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Rows of the ranks' sum, rounded once, or with SUM false all ranks' columns side by side, of
    which the first `width` are kept. A mailbox has SLOTS slots of SLOT elements of each rank and
    half, and an epoch for each slot: a program has one, and takes every PROGRAMS'th block of BLOCK
    columns. Rows from `count` on are left out, on all ranks the same."""
    p = tl.program_id(0)
    if count_ptr is not None:
        rows = tl.load(count_ptr)
    zero = wait(0)
    peers_ptr += zero
    rank = tl.load(peers_ptr + 2 * RANKS).to(tl.int32)
    own_flags = tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int32))
    part_type = tl.pointer_type(x_ptr.dtype.element_ty)
    own_room = tl.load(peers_ptr + RANKS + rank).to(part_type)
    epoch = tl.load(epoch_ptr + zero + p)
    blocks = tl.cdiv(K, BLOCK)
    for task in range(p + zero, rows * blocks, PROGRAMS):
        epoch += 1
        half = (epoch & 1) * RANKS
        b = (task // blocks).to(tl.int64)
        k = (task % blocks) * BLOCK + tl.arange(0, BLOCK)
        e = tl.arange(0, BLOCK)
        mask = k < K
        part = tl.load(x_ptr + b * K + k, mask=mask, other=0.0)
        slot = ((half + rank) * SLOTS + p).to(tl.int64) * SLOT
        tell(peers_ptr, part, slot, e, mask, rank * SLOTS + p, epoch, RANKS)
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(RANKS):
            wait_for_flag(own_flags + r * SLOTS + p, epoch)
            slot = ((half + r) * SLOTS + p).to(tl.int64) * SLOT
            part = tl.load(own_room + slot + e, mask=mask, other=0.0, volatile=True)
            if not SUM:
                column = r * K + k
                tl.store(y_ptr + b * width + column, part, mask=mask & (column < width))
            elif r == 0:
                total = part.to(tl.float32)
            else:
                total += part.to(tl.float32)
        if SUM:
            tl.store(y_ptr + b * K + k, total.to(part.dtype), mask=mask)
    tl.store(epoch_ptr + p + zero, epoch)
