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
def norm_weights(norm_ptr, post_ptr, k, K, ADD: tl.constexpr):
    """float32 weights [len(k)] of a norm and of the norm of a branch, if there are any."""
    weight = tl.zeros(k.shape, tl.float32)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    post = weight
    if ADD and post_ptr is not None:
        post = tl.load(post_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return weight, post


@triton.jit
def norm_row(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, weight, post, start, k, K, eps, offset,
    ADD: tl.constexpr,
):  # fmt: skip
    """The row from `start` on of the residual and of its norm, both rounded: [len(k)]. `weight` and
    `post` are of norm_weights; `start` has the zero of `wait`."""
    mask = k < K
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


@waits  # once it has the weights and the count, which the host wrote
@triton.jit
def norm_kernel(
    x_ptr, branch_ptr, post_ptr, scalar_ptr, norm_ptr, total_ptr, h_ptr, K,
    eps: tl.constexpr, offset: tl.constexpr,
    ADD: tl.constexpr, BLOCK_K: tl.constexpr, count_ptr=None,
):  # fmt: skip
    """Norm a row, to which a branch is added first if ADD. Rows from `count` on are left out."""
    b = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    weight, post = norm_weights(norm_ptr, post_ptr, k, K, ADD)
    if count_ptr is not None:
        count = tl.load(count_ptr)
    zero = wait(0)
    # One of the two conditions is of constants.
    if count_ptr is not None:  # noqa: SIM102
        if b + zero >= count:
            return
    total, h = norm_row(
        x_ptr, branch_ptr, post_ptr, scalar_ptr, weight, post, b * K + zero, k, K, eps, offset, ADD
    )
    if ADD:
        tl.store(total_ptr + b * K + k, total, mask=k < K)
    if norm_ptr is not None:
        tl.store(h_ptr + b * K + k, h, mask=k < K)


@waits  # once it has the weights and the count, which the host wrote
@triton.jit
def norm_heads_kernel(
    x_ptr, q_norm_ptr, k_norm_ptr, y_ptr, count_ptr, width, size, q_size, k_size,
    eps: tl.constexpr, offset: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row's queries, keys or what comes after them, by the program's second number. Rows of x are
    `width` elements apart, and have `size`."""
    b, part = tl.program_id(0), tl.program_id(1)
    begin = tl.where(part == 0, 0, tl.where(part == 1, q_size, q_size + k_size))
    count = tl.where(part == 0, q_size, tl.where(part == 1, k_size, size - q_size - k_size))
    k = tl.arange(0, BLOCK_K)
    mask = k < count
    weight = tl.zeros([BLOCK_K], tl.float32)
    if q_norm_ptr is not None:
        weight += tl.load(q_norm_ptr + k, mask=mask & (part == 0), other=0.0).to(tl.float32)
    if k_norm_ptr is not None:
        weight += tl.load(k_norm_ptr + k, mask=mask & (part == 1), other=0.0).to(tl.float32)
    rows = b + 1
    if count_ptr is not None:
        rows = tl.load(count_ptr)
    zero = wait(0)
    if b + zero >= rows:
        return
    x = tl.load(x_ptr + (b + zero) * width + begin + k, mask=mask, other=0.0)
    h = x
    if part < 2:
        h = rms_norm(x.to(tl.float32), offset + weight, tl.maximum(count, 1), eps).to(x.dtype)
    tl.store(y_ptr + b * size + begin + k, h, mask=mask)


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
    if norm_ptr is not None:
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
