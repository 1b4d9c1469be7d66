"""Log probabilities of tokens where the logits lie on the device: the chosen token's and those of
the likeliest come down, and the vocabulary's do not."""

from collections.abc import Callable, Sequence
from math import ceil, log2

import numpy as np
import torch
from torch import Tensor

from tokenloop.runner.logprobs import Logprobs
from tokenloop.runner.transfers import Transfers

LOW_BITS = 2**32 - 1


def device_logprobs(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Of logits float32 [N, V] and chosen tokens int64 [N, 1]: int64 [N, 1 + 2 count], the chosen
    one's log probability, the ids of the `count` likeliest, and their log probabilities. Of equal
    ones the lower id comes first. Log probabilities are float64, whose bits these are.

    No row depends on the number of rows. The only sum is one of integers, exact in any order:
    exp(logit - largest) in units of which the largest probability has 2**62 / V.
    """
    size = logits.shape[1]
    unit = 2.0 ** (62 - ceil(log2(size)))
    exact = logits.double()
    largest = exact.amax(1, keepdim=True)
    total = ((exact - largest).exp() * unit).round().long().sum(1, keepdim=True)
    total = largest + (total.double() / unit).log()
    chosen = exact.gather(1, tokens) - total
    found = [chosen.view(torch.int64)]
    if count:
        # Keys in the order of the logits, with -0.0 and 0.0 equal, and then of the ids downwards.
        bits = (logits + 0.0).view(torch.int32).long()
        order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        down = LOW_BITS - torch.arange(size, device=logits.device)
        likeliest = ((order << 32) | down).topk(count, dim=1).values
        ids = LOW_BITS - (likeliest & LOW_BITS)
        found += [ids, (exact.gather(1, ids) - total).view(torch.int64)]
    return torch.cat(found, 1)


class DeviceLogprobs:
    """Log probabilities of some rows, which are on their way to the host."""

    def __init__(
        self,
        transfers: Transfers,
        logits: Tensor,
        tokens: Tensor,
        wanted: Sequence[tuple[int, int]],
    ):
        """Submit the work, on the current stream: `wanted` are rows of logits float32 [B, V] and
        tokens int64 [B, 1], each with its number of alternatives."""
        self._transfers, self._counts = transfers, [count for _, count in wanted]
        self._most = min(max(self._counts), logits.shape[1])
        rows = [row for row, _ in wanted]
        if rows != list(range(len(logits))):
            # Not by an index, which would have to go up.
            logits = torch.cat([logits[row : row + 1] for row in rows])
            tokens = torch.cat([tokens[row : row + 1] for row in rows])
        self._values: Tensor | None = device_logprobs(logits, tokens, self._most)
        transfers.prefetch(self._values)
        self._lines: np.ndarray | None = None

    def readers(self) -> list[Callable[[], Logprobs]]:
        """For each of the rows what waits for its numbers and gives them."""
        return [lambda n=n: self._read(n) for n in range(len(self._counts))]

    def _read(self, number: int) -> Logprobs:
        if self._lines is None:
            numbers = self._transfers.download(self._values)
            self._lines = np.array(numbers, np.int64).reshape(len(self._counts), -1)
            self._values = None
        line, most = self._lines[number], self._most
        ids, values = line[1 : 1 + most], line[1 + most :].view(np.float64)
        count = min(self._counts[number], most)
        top = zip(ids[:count].tolist(), values[:count].tolist())
        return Logprobs(float(line[:1].view(np.float64)[0]), tuple(top))
