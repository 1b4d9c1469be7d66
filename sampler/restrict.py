"""What changes logits before a token is chosen: a grammar's mask, penalties and biases.

Rows that ask for none of this are not given to it.
"""

import torch
from torch import Tensor

BITS = 8


def mask(logits: Tensor, allowed: Tensor) -> Tensor:
    """The logits float32 [B, V] of tokens whose bit is 1, and -inf for the others.

    allowed uint8 [B, W], W >= V / 8: token t has the bit t % 8, counted from the lowest on, of byte
    t // 8.
    """
    ids = torch.arange(logits.shape[1], device=logits.device)
    bytes_of = torch.gather(allowed.int(), 1, (ids // BITS).expand(logits.shape[0], -1))
    bits = torch.bitwise_right_shift(bytes_of, (ids % BITS).int()) & 1
    return torch.where(bits == 1, logits, -torch.inf)


def adjust(logits: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Change the logits x of some tokens to (x * scale if x < 0 else x / scale) + bias.

    logits float32 [B, V]; ids int64 [B, K], of which those that are equal have equal numbers beside
    them; scale and bias float32 [B, K]. The first step is the repetition penalty of Keskar et al.,
    arXiv:1909.05858, as transformers' RepetitionPenaltyLogitsProcessor has it for logits below 0.
    """
    x = torch.gather(logits, 1, ids)
    x = torch.where(x < 0, x * scale, x / scale) + bias
    return torch.scatter(logits, 1, ids, x)
