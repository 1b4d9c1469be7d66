"""The Triton kernels of the norm and gate: of a step, and of a packed chunk."""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits


@waits  # once it has the weight
@triton.jit
def gated_rms_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, heads, size,
    gate_stride_row, gate_stride_head, eps: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and head, rounded where torch rounds."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // heads, row_head % heads
    i = tl.arange(0, BLOCK)
    mask = i < size
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0)
    zero = wait(0)
    x = tl.load(x_ptr + zero + row_head * size + i, mask=mask, other=0.0)
    gate_ptr += row * gate_stride_row + head * gate_stride_head + zero
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    x32 = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x32 * x32) / size + eps)
    normal = (x32 * scale).to(x.dtype).to(tl.float32)
    normal = (normal * weight.to(tl.float32)).to(x.dtype).to(tl.float32)
    gated = normal * (gate / (1.0 + tl.exp(-gate)))
    tl.store(out_ptr + row_head * size + i, gated.to(x.dtype), mask=mask)


@waits  # once it has the weight and the count, which the host wrote
@triton.jit
def gated_rms_norm_chunk_kernel(
    x_ptr, gate_ptr, weight_ptr, count_ptr, out_ptr, heads: tl.constexpr, size: tl.constexpr,
    gate_stride_row: tl.constexpr, gate_stride_head: tl.constexpr, eps: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS heads, each as the other kernel has one, of the first `count` rows."""
    count = tl.load(count_ptr)
    i = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + i, mask=i < size, other=0.0)
    zero = wait(0)
    row_head = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if tl.program_id(0) * BLOCK_ROWS + zero >= count * heads:
        return
    row, head = row_head // heads, row_head % heads
    mask = (i < size) & (row < count)[:, None]
    x = tl.load(x_ptr + zero + row_head[:, None] * size + i, mask=mask, other=0.0)
    gate_ptrs = gate_ptr + zero + (row * gate_stride_row + head * gate_stride_head)[:, None] + i
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    x32 = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x32 * x32, 1) / size + eps)
    normal = (x32 * scale[:, None]).to(x.dtype).to(tl.float32)
    normal = (normal * weight.to(tl.float32)).to(x.dtype).to(tl.float32)
    gated = normal * (gate / (1.0 + tl.exp(-gate)))
    tl.store(out_ptr + row_head[:, None] * size + i, gated.to(x.dtype), mask=mask)
