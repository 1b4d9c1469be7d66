"""A product with the sigmoid of gates in plain torch."""

from torch import Tensor


def sigmoid_gate(x: Tensor, gate: Tensor, count: Tensor | None = None) -> Tensor:
    """x [N, C] times sigmoid(gate [N, C]), which is rounded to their dtype first.

    Rows from `count` int32 [1] on are anything.
    """
    return x * gate.sigmoid()
