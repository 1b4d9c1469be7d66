"""A sequence, as the loop knows it: a prompt, and tokens that follow it."""

from typing import Protocol

from tokenloop.runner.logprobs import Logprobs
from tokenloop.runner.request import Request
from tokenloop.runner.restriction import Restriction


class Sequence(Protocol):
    """What the loop needs of a sequence. It ends as soon as whoever reads its tokens gives it a
    `finish_reason`. Where the request asks for them, `logprobs` gets the log probabilities of each
    token before the token comes, and `prompt_logprobs` those of the prompt's tokens, but for the
    first. `cached_tokens` becomes the number of the prompt's tokens that were not computed for it.
    A `restriction` gets each token as soon as the host has it; `refuse` ends a sequence that cannot
    follow it."""

    prompt_ids: list[int]
    limit: int
    request: Request
    finish_reason: str | None
    cached_tokens: int
    logprobs: list[Logprobs]
    prompt_logprobs: list[Logprobs]
    restriction: Restriction | None

    def refuse(self, error: str) -> None: ...
