"""Log probabilities of tokens, in the two shapes that the protocol has for them."""

from collections.abc import Sequence
from typing import Any

from tokenloop.runner.logprobs import Logprobs
from tokenloop.runner.result import Token
from tokenloop.runner.tokenizer import Tokenizer

# JSON has no minus infinity; OpenAI's servers write this.
LEAST = -9999.0


class ChatLogprobs:
    """Those of one choice of a chat, in the order of its tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The next tokens' entries."""
        content = []
        for token in tokens:
            if (found := token.logprobs) is None:
                continue  # An end token that brought text.
            top = [self._entry(*pair) for pair in found.top]
            content.append(self._entry(token.id, found.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        if data is None:
            text = self._tokenizer.token_name(token_id)
        else:
            text = data.decode(errors="replace")
        as_bytes = None if data is None else list(data)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": as_bytes}


class CompletionLogprobs:
    """Those of one choice of a completion. `text_offset` is how many characters of the choice's
    text were certain before the token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream, self._offset = tokenizer, tokenizer.stream(), 0

    def of(self, tokens: Sequence[Token]) -> dict[str, list]:
        """The next tokens' entries."""
        return self._lists([(t.id, t.logprobs) for t in tokens if t.logprobs is not None])

    def of_prompt(self, ids: Sequence[int], found: Sequence[Logprobs]) -> dict[str, list]:
        """The prompt's entries, where it comes before the tokens. Its first token is after nothing
        and has no probability."""
        return self._lists(list(zip(ids, [None, *found])))

    def _lists(self, tokens: list[tuple[int, Logprobs | None]]) -> dict[str, list]:
        lists: dict[str, list] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token_id, found in tokens:
            # Of two ids with one text the likelier one comes first.
            top: dict[str, float] = {}
            for other, logprob in found.top if found else ():
                top.setdefault(self._key(other), max(logprob, LEAST))
            lists["tokens"].append(self._key(token_id))
            lists["token_logprobs"].append(max(found.logprob, LEAST) if found else None)
            lists["top_logprobs"].append(top if found else None)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._stream.push(token_id))
        return lists

    def _key(self, token_id: int) -> str:
        """The token's text, or its bytes where they are part of a character."""
        data = self._tokenizer.token_bytes(token_id)
        if data is None:
            return self._tokenizer.token_name(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
