"""What restricts a sequence's tokens: a grammar, penalties for tokens that came before, and biases.

The state follows the sequence: the token of a step must be known before the next one is chosen.
"""

from typing import Any

import numpy as np

from tokenloop.runner.request import Request

ADJUSTED = {"ids": np.int64, "scale": np.float32, "bias": np.float32}


def mask_bytes(vocab_size: int) -> int:
    """How many bytes have a bit for each token: whole words of 32 bits."""
    return -(-vocab_size // 32) * 4


class Restriction:
    """What restricts one sequence, as far as its tokens have been seen.

    With c, how often a token stands in the output, its logit x becomes

        (x * r if x < 0 else x / r) - frequency_penalty * c - presence_penalty * (c > 0) + bias

    where r is the repetition_penalty for tokens of the prompt and of the output, and 1 for others.
    The repetition penalty is that of transformers' RepetitionPenaltyLogitsProcessor, the other two
    are those of OpenAI's API reference ("frequency and presence penalties"), and the bias is its
    logit_bias. A token that the grammar does not allow has -inf.
    """

    def __init__(self, request: Request, prompt_ids: list[int], matcher: Any = None):
        """`matcher` is the grammar's, an llguidance.LLMatcher (grammar.py), or None."""
        self._request, self._matcher = request, matcher
        # Why the output cannot go on, in one line.
        self.fault: str | None = None
        self._bias = {int(i): float(b) for i, b in (request.logit_bias or {}).items()}
        self._counts: dict[int, int] = {}
        # The tokens that are adjusted, by their places in the arrays.
        self._places: dict[int, int] = {}
        self._arrays = {name: np.zeros(16, dtype) for name, dtype in ADJUSTED.items()}
        repeated = dict.fromkeys(prompt_ids) if request.repetition_penalty != 1 else ()
        for token_id in dict.fromkeys([*self._bias, *repeated]):
            self._adjust(token_id, token_id in repeated)

    @property
    def masks(self) -> bool:
        """Whether a grammar says which tokens may come next. After its end, or a token that it does
        not allow, it says nothing."""
        return self._matcher is not None

    @property
    def adjusts(self) -> bool:
        """Whether logits are adjusted: with a penalty, from the first token on that has one."""
        return bool(self._places)

    def see(self, token_id: int) -> None:
        """Follow the sequence's next token. There is a `fault` if the grammar does not allow it."""
        request = self._request
        if request.frequency_penalty or request.presence_penalty or request.repetition_penalty != 1:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self._adjust(token_id, True)
        if (matcher := self._matcher) is None:
            return
        # After the grammar's end it allows end tokens alone.
        was_at_end = matcher.is_stopped()
        if not matcher.consume_token(token_id):
            # Of those that it allows none had a number above -inf.
            self._fail(f"the grammar does not allow the token {token_id} that was chosen")
        elif was_at_end or matcher.stop_reason() == "EndOfSentence":
            self._matcher = None

    def allowed(self, size: int) -> np.ndarray:
        """The tokens that the grammar allows next, uint8 [size] with a bit for each. There is a
        `fault` if that is more than llguidance may work out."""
        bits = np.empty(size, np.uint8)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines() or ["no reason is given"]
            self._fail(f"the grammar cannot be followed any further: {reason[0]}")
        return bits

    def _fail(self, fault: str) -> None:
        self.fault, self._matcher = self.fault or fault, None

    def adjusted(self) -> dict[str, np.ndarray]:
        """The arrays of ADJUSTED, each [K], for sampler.restrict.adjust. A token stands there
        once."""
        return {name: array[: len(self._places)] for name, array in self._arrays.items()}

    def _adjust(self, token_id: int, seen: bool) -> None:
        request, place = self._request, self._places.setdefault(token_id, len(self._places))
        if place == len(self._arrays["ids"]):
            for name, array in self._arrays.items():
                self._arrays[name] = np.concatenate([array, np.zeros_like(array)])
        count = self._counts.get(token_id, 0)
        penalty = request.frequency_penalty * count + request.presence_penalty * (count > 0)
        self._arrays["ids"][place] = token_id
        self._arrays["scale"][place] = request.repetition_penalty if seen else 1
        self._arrays["bias"][place] = self._bias.get(token_id, 0) - penalty
