"""The positions of a step in plain torch."""

from torch import Tensor


def next_positions(lines: Tensor, next_line: Tensor, position: Tensor) -> None:
    """Copy line `next_line`, int64 [1], of `lines` int64 [N, B] to position int64 [B], and add 1 to
    next_line, up to N - 1: a step too many reads the last line once more."""
    position.copy_(lines.index_select(0, next_line)[0])
    next_line.add_(1).clamp_(max=lines.shape[0] - 1)
