"""What the ranks of a group tell one another, as an operator that torch.export sees.

A rank is a process that has a part of every layer. torch.ops.tokenloop.gather_ranks is declared
here and has no code: the runner gives it (runner/engines/ranks.py), by torch.distributed. A sum is
made of what all ranks gathered, in the ranks' order, so every rank has the same bits, and a row of
it does not depend on the rows beside it, whatever the number of ranks.
"""

import torch
from torch import Tensor

NAME = "tokenloop::gather_ranks"

# The runner declares it as well, where it runs without this module.
if not hasattr(torch.ops.tokenloop, "gather_ranks"):
    torch.library.define(NAME, "(Tensor x, int ranks) -> Tensor")


@torch.library.register_fake(NAME)
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(ranks, *x.shape)


def gather(x: Tensor, ranks: int) -> Tensor:
    """[N, ...] of each rank's x [...], in the ranks' order."""
    return torch.ops.tokenloop.gather_ranks(x, ranks)


def reduce(x: Tensor, ranks: int) -> Tensor:
    """The sum of each rank's x, in float32 and in the ranks' order, rounded once."""
    parts = gather(x, ranks).unbind(0)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(x.dtype)
