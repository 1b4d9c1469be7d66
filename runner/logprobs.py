"""Log probabilities of tokens, from logits that lie in the host's memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Logprobs:
    """What a token's log probability was, and the ids and log probabilities of the most likely
    ones, likeliest first; of equal ones the lower id. They are those of softmax(logits), whatever
    temperature, top_k and top_p made of it."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(logits: Any, token_id: int, count: int) -> Logprobs:
    """Of a token that was chosen by logits float32 [V], with `count` alternatives, which the token
    itself may be among. Sums are of float64."""
    logits = np.asarray(logits)
    largest = logits.max()
    # The logits of one row alone, and always in the same order: no other row changes a bit.
    total = largest + np.log(np.exp(logits - largest).sum(dtype=np.float64))
    top = []
    if count > 0:
        count = min(count, len(logits))
        least = np.partition(logits, -count)[-count]
        (ids,) = np.nonzero(logits >= least)
        order = np.lexsort((ids, -logits[ids]))[:count]
        top = [(int(i), float(logits[i] - total)) for i in ids[order]]
    return Logprobs(float(logits[token_id] - total), tuple(top))
