"""The positions of a step, taken on the device, so that a captured graph can do it."""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def next_positions_kernel(
    lines_ptr, next_line_ptr, position_ptr, rows, last_line, BLOCK_B: tl.constexpr
):  # fmt: skip
    b = tl.arange(0, BLOCK_B)
    line = tl.load(next_line_ptr)
    tl.store(position_ptr + b, tl.load(lines_ptr + line * rows + b, mask=b < rows), mask=b < rows)
    # A step too many reads the last line once more.
    tl.store(next_line_ptr, tl.minimum(line + 1, last_line))


@triton_op("tokenloop::next_positions", mutates_args={"next_line", "position"})
def next_positions(lines: Tensor, next_line: Tensor, position: Tensor) -> None:
    """position int64 [B] = lines int64 [N, B] at next_line int64 [1], to which 1 is then added,
    up to N - 1. All are contiguous."""
    count, rows = lines.shape
    wrap_triton(next_positions_kernel)[(1,)](
        lines, next_line, position, rows, count - 1,
        BLOCK_B=triton.next_power_of_2(rows), num_warps=1,
    )  # fmt: skip
