"""The Triton kernel of RMSNorm, and how a program norms a row.

Numbers such as `eps` are constants: as arguments torch's compiler would pass them as float64.
Names: row b, element k of K.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits


@triton.jit
def rms_norm(x, weight, size, eps):
    """float32 x / rms(x) * weight of one row, which is zero beyond `size`.

    The squares are summed in float64: once rounded, their sum does not depend on the order in which
    a program adds them. So rows are equal that are normed in different kernels.
    """
    x64 = x.to(tl.float64)
    mean = tl.sum(x64 * x64, 0).to(tl.float32) / size
    return x * (1 / tl.sqrt_rn(mean + eps)) * weight


@triton.jit
def inverse_rms(squares, size, eps):
    """float32 1 / rms of a row, as rms_norm has it, of sums of float64 squares."""
    mean = tl.sum(squares, 0).to(tl.float32) / size
    return 1 / tl.sqrt_rn(mean + eps)


@triton.jit
def norm_row(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, b, k, K, eps, offset,
    ADD: tl.constexpr,
):  # fmt: skip
    """Row b of the residual and of its norm, both rounded: [len(k)]. It waits."""
    mask = k < K
    weight = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if ADD and post_ptr is not None:
        post = tl.load(post_ptr + k, mask=mask, other=0.0).to(tl.float32)
    start = b * K + wait(0)
    x = tl.load(x_ptr + start + k, mask=mask, other=0.0)
    if ADD:
        branch = tl.load(branch_ptr + start + k, mask=mask, other=0.0).to(tl.float32)
        if post_ptr is not None:
            branch = rms_norm(branch, offset + post, K, eps)
        total = x.to(tl.float32) + branch
        if scalar_ptr is not None:
            total = total * tl.load(scalar_ptr).to(tl.float32)
        x = total.to(x.dtype)
    return x, rms_norm(x.to(tl.float32), offset + weight, K, eps).to(x.dtype)


@waits  # once it has the weights
@triton.jit
def norm_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, total_ptr, h_ptr, K,
    eps: tl.constexpr, offset: tl.constexpr,
    ADD: tl.constexpr, BLOCK_K: tl.constexpr, count_ptr=None,
):  # fmt: skip
    """Norm a row, to which a branch is added first if ADD. Rows from `count` on are left out."""
    b = tl.program_id(0)
    # One of the two conditions is of constants.
    if count_ptr is not None:  # noqa: SIM102
        # It waits first: else no program might, and the kernel after it would not wait for those
        # ahead.
        if b >= tl.load(count_ptr + wait(0)):
            return
    k = tl.arange(0, BLOCK_K)
    total, h = norm_row(
        x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, b, k, K, eps, offset, ADD
    )
    if ADD:
        tl.store(total_ptr + b * K + k, total, mask=k < K)
    tl.store(h_ptr + b * K + k, h, mask=k < K)


@waits
@triton.jit
def norm_parts_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, total_ptr, h_ptr, count_ptr, K,
    eps: tl.constexpr, offset: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same bits as norm_kernel's, of wide rows: BLOCK_K elements at a time, PARTS times.

    A program that held all of a wide row would take the registers of several. So it reads the row
    again, from L1 or L2, once it knows the sum of its squares.
    """
    b = tl.program_id(0)
    zero = wait(0)
    if b >= tl.load(count_ptr + zero):
        return
    start = b * K + zero
    if ADD and post_ptr is not None:
        squares = tl.zeros([BLOCK_K], tl.float64)
        for part in tl.static_range(PARTS):
            k = part * BLOCK_K + tl.arange(0, BLOCK_K)
            branch = tl.load(branch_ptr + start + k, mask=k < K, other=0.0).to(tl.float64)
            squares += branch * branch
        branch_scale = inverse_rms(squares, K, eps)
    squares = tl.zeros([BLOCK_K], tl.float64)
    for part in tl.static_range(PARTS):
        k = part * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = k < K
        x = tl.load(x_ptr + start + k, mask=mask, other=0.0)
        if ADD:
            branch = tl.load(branch_ptr + start + k, mask=mask, other=0.0).to(tl.float32)
            if post_ptr is not None:
                post = tl.load(post_ptr + k, mask=mask, other=0.0).to(tl.float32)
                branch = branch * branch_scale * (offset + post)
            total = x.to(tl.float32) + branch
            if scalar_ptr is not None:
                total = total * tl.load(scalar_ptr).to(tl.float32)
            x = total.to(x.dtype)
            tl.store(total_ptr + start + k, x, mask=mask)
        x64 = x.to(tl.float32).to(tl.float64)
        squares += x64 * x64
    # The sum has barriers, behind which every thread sees what was stored.
    scale = inverse_rms(squares, K, eps)
    for part in tl.static_range(PARTS):
        k = part * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = k < K
        weight = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x = tl.load(total_ptr + start + k, mask=mask, other=0.0)
        else:
            x = tl.load(x_ptr + start + k, mask=mask, other=0.0)
        h = x.to(tl.float32) * scale * (offset + weight)
        tl.store(h_ptr + start + k, h.to(x.dtype), mask=mask)
