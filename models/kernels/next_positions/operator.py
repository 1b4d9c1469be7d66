"""The positions of a step on CUDA, in one launch."""

import triton
from torch import Tensor

from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.next_positions.triton import next_positions_kernel


@operator("next_positions", mutates_args={"next_line", "position"})
def next_positions(lines: Tensor, next_line: Tensor, position: Tensor) -> None:
    """See reference.next_positions. All are contiguous."""
    count, rows = lines.shape
    launch(next_positions_kernel, (1,))(
        lines, next_line, position, rows, count - 1,
        BLOCK_B=triton.next_power_of_2(rows), num_warps=1,
    )  # fmt: skip
