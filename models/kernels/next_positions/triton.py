"""The Triton kernel that takes the positions of a step."""

import triton
import triton.language as tl


@triton.jit
def next_positions_kernel(
    lines_ptr, next_line_ptr, position_ptr, rows, last_line, BLOCK_B: tl.constexpr
):  # fmt: skip
    b = tl.arange(0, BLOCK_B)
    line = tl.load(next_line_ptr)
    tl.store(position_ptr + b, tl.load(lines_ptr + line * rows + b, mask=b < rows), mask=b < rows)
    # A step too many reads the last line once more.
    tl.store(next_line_ptr, tl.minimum(line + 1, last_line))
