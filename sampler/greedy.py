"""Greedy selection."""

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row: logits float [B, V] -> token int64 [B, 1].

    Ties go to the lowest id, NaN is never chosen over a number, and a row without any number
    above -inf gives id 0.
    """
    numbers = torch.where(logits == logits, logits, -torch.inf)
    return torch.argmax(numbers, dim=-1, keepdim=True)
