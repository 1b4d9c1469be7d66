"""A request's output: ids as they are generated, and the text that is certain."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenloop.runner.logprobs import Logprobs
from tokenloop.runner.request import Request
from tokenloop.runner.restriction import Restriction
from tokenloop.runner.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One generated token: its id, and the text that became certain with it (maybe none). And its
    log probabilities, if the request asks for them."""

    id: int
    text: str
    logprobs: Logprobs | None = None


class Result:
    """One request's output as it grows.

    `finish_reason` is None while the output is not finished. It becomes "stop" after an end token,
    which is not among `token_ids`, or a stop string, whose tokens are, though `text` ends before
    it; "length" when no more tokens can come; "cancelled" after `cancel`; and "error" for a request
    that was refused. `error` is then one line with the request's number, counted from 1 on, though
    `index` begins at 0.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, prompt_ids: list[int], limit: int,
        restriction: Restriction | None = None, index: int = 0,
    ):  # fmt: skip
        """`limit` is how many tokens can come at most, `restriction` what restricts them, `index`
        the request's place in a batch."""
        self.request, self.restriction, self.index = request, restriction, index
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        # Of each of these, and of the prompt's but for the first, if the request asks for them.
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []
        # The end token that came, if one did; its log probabilities are in no list.
        self.end_token: Token | None = None
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.limit = limit
        # How many of the prompt's tokens an earlier prompt had computed.
        self.cached_tokens = 0
        # How many tokens have come, the end token included.
        self.taken = 0
        self._end_ids = tokenizer.eos_token_ids
        self._stream = StopStream(tokenizer.stream(request.shown_tokens), request.stop)

    def cancel(self) -> None:
        """End the output here, with the finish_reason "cancelled", if it has not ended yet.

        Call it while you iterate over the generation. `token_ids` and `text` keep what has come,
        and tokens that are still under way are dropped. In a batch the row goes to the next
        request, and the other results go on.
        """
        if self.finish_reason is None:
            self.finish_reason = "cancelled"

    def refuse(self, error: str) -> None:
        """End the output with a reason, one line."""
        self.finish_reason, self.error = "error", error

    def take(self, token_id: int) -> Token | None:
        """Add the next token, and return what is to be shown. An end token shows nothing, unless it
        ends a text that was held back."""
        self.taken += 1
        if token_id in self._end_ids:
            text = self._stream.finish()
            self.finish_reason = "stop"
            found = self.logprobs.pop() if len(self.logprobs) > len(self.token_ids) else None
            self.end_token = Token(token_id, "", found)
        else:
            self.token_ids.append(token_id)
            text = self._stream.push(token_id)
            if len(self.token_ids) == self.limit and not self._stream.stopped:
                # The last token takes with it what was held back.
                text += self._stream.finish()
                self.finish_reason = "length"
            if self._stream.stopped:
                self.finish_reason = "stop"
        self.text += text
        if token_id in self._end_ids:
            return Token(token_id, text) if text else None
        return Token(token_id, text, self.logprobs[-1] if self.logprobs else None)

    def as_dict(self) -> dict:
        """The object that `run.py --json` prints."""
        entry = {
            "prompt": self.request.prompt_as_json(), "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids, "text": self.text, "finish_reason": self.finish_reason,
        }  # fmt: skip
        return entry | ({} if self.error is None else {"error": self.error})


class StopStream:
    """A stream of ids that ends before the first of some texts.

    The first is the one that is complete first. Of several that are complete with the same
    character it is the longest. So it does not matter how the text is divided into tokens. Text
    that may be the beginning of a stop string is held back.
    """

    def __init__(self, stream, stops: Sequence[str]):
        self._stream, self._stops = stream, stops
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain: possibly none, never to be revoked."""
        return self._pass(self._stream.push(token_id))

    def finish(self) -> str:
        """The rest of the text."""
        text = self._pass(self._stream.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _pass(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(s), start) for s in self._stops if (start := text.find(s)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        certain = len(text) - max(overlap(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
