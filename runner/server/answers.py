"""The objects that are answered with, in the protocol's two kinds: chat and plain completions."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from tokenloop.runner.result import Result, Token
from tokenloop.runner.server.logprobs import ChatLogprobs, CompletionLogprobs
from tokenloop.runner.server.reader import Parts, Reader
from tokenloop.runner.tokenizer import Tokenizer


class Answer:
    """One answer's objects: whole, or as the chunks of a stream. Its choices are `results`."""

    def __init__(
        self, model: str, fingerprint: str, results: Sequence[Result], tokenizer: Tokenizer,
        readers: Sequence[Reader] | None, echoes: Sequence[str] = (), of_a_prompt: int = 1,
        only_echoes: bool = False,
    ):  # fmt: skip
        """`fingerprint` says which artifact it is. `readers` divide the texts of a chat's choices;
        without them it is a completion, and `echoes` are the prompts that its choices begin with,
        if they do. Each prompt has so many choices, `of_a_prompt`. With `only_echoes` prompts are
        all that it has: a token has been generated, for a row cannot do without, and nobody hears
        of it."""
        is_chat = readers is not None
        self._is_chat, self._results, self._of_a_prompt = is_chat, results, of_a_prompt
        self._readers = readers or ()
        # Of each choice how many calls it has so far.
        self._calls = [0] * len(results)
        kind = ChatLogprobs if is_chat else CompletionLogprobs
        self._logprobs = [
            None if result.request.logprobs is None else kind(tokenizer) for result in results
        ]
        self._echoes, self._only_echoes = echoes, only_echoes
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, prompt_tokens: int) -> dict[str, Any]:
        """The answer, once all results have ended."""
        choices = []
        for index, result in enumerate(self._results):
            text = "" if self._only_echoes else result.text
            content = {"message": self._message(index)} if self._is_chat else {"text": text}
            echo = self._echo(index) if self._echoes else None
            tokens = [Token(i, "", found) for i, found in zip(result.token_ids, result.logprobs)]
            tokens = [] if self._only_echoes else [*tokens, *self._end(index)]
            choice = self._choice(index, content, tokens, self._finish_reason(index))
            if echo is not None:
                choice["text"] = echo["text"] + text
                if choice["logprobs"] is not None:
                    both = echo["logprobs"], choice["logprobs"]
                    choice["logprobs"] = {name: both[0][name] + both[1][name] for name in both[0]}
            choices.append(choice)
        return self._head | {"choices": choices, "usage": self.usage(prompt_tokens)}

    def usage(self, prompt_tokens: int) -> dict[str, Any]:
        """Tokens of prompts, each counted once, and of all choices. Of a prompt those count as
        cached that its first choice found."""
        cached = sum(result.cached_tokens for result in self._results[:: self._of_a_prompt])
        new = sum(len(result.token_ids) for result in self._results)
        new = 0 if self._only_echoes else new
        return {
            "prompt_tokens": prompt_tokens, "completion_tokens": new,
            "total_tokens": prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def first_chunks(self) -> list[dict]:
        """What a stream begins with."""
        if self._echoes:
            choices = map(self._echo, range(len(self._results)))
            return [self._chunks_head() | {"choices": [choice]} for choice in choices]
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, {"delta": delta}, [], None) for i in range(len(self._results))]

    def text_chunks(self, index: int, tokens: Sequence[Token]) -> list[dict]:
        """More text of a choice; none while it is held back."""
        if self._only_echoes:
            return []
        text = "".join(token.text for token in tokens)
        if not self._is_chat:
            return [self._chunk(index, {"text": text}, tokens, None)]
        delta = self._delta(index, self._readers[index].push(text))
        # Log probabilities come with their tokens, though their text may come later.
        if not delta and all(token.logprobs is None for token in tokens):
            return []
        return [self._chunk(index, {"delta": delta}, tokens, None)]

    def last_chunks(self, index: int) -> list[dict]:
        """The end of a choice."""
        if not self._is_chat:
            end = self._end(index)
            return [self._chunk(index, {"text": ""}, end, self._finish_reason(index))]
        delta = self._delta(index, self._readers[index].finish())
        rest = [self._chunk(index, {"delta": delta}, [], None)] if delta else []
        return [*rest, self._chunk(index, {"delta": {}}, [], self._finish_reason(index))]

    def usage_chunk(self, prompt_tokens: int) -> dict:
        """What ends a stream whose options include usage."""
        return self._chunks_head() | {"choices": [], "usage": self.usage(prompt_tokens)}

    def _message(self, index: int) -> dict[str, Any]:
        """All that a choice of a chat says."""
        reader = self._readers[index]
        first, rest = reader.push(self._results[index].text), reader.finish()
        parts = Parts(
            first.reasoning + rest.reasoning, first.content + rest.content,
            first.calls + rest.calls,
        )  # fmt: skip
        calls = self._tool_calls(index, parts)
        content = None if calls and not parts.content else parts.content
        message = {"role": "assistant", "content": content, "refusal": None}
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        return message | ({"tool_calls": calls} if calls else {})

    def _delta(self, index: int, parts: Parts) -> dict[str, Any]:
        """More of what a choice of a chat says; each call comes whole, with its number."""
        delta: dict[str, Any] = {}
        if parts.reasoning:
            delta["reasoning_content"] = parts.reasoning
        if parts.content:
            delta["content"] = parts.content
        first = self._calls[index]
        if calls := self._tool_calls(index, parts):
            delta["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(calls, first)
            ]
        return delta

    def _tool_calls(self, index: int, parts: Parts) -> list[dict[str, Any]]:
        self._calls[index] += len(parts.calls)
        return [
            {
                "id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in parts.calls
        ]  # fmt: skip

    def _end(self, index: int) -> list[Token]:
        """The end token of a completion, if one came. Its log probability is there, as with other
        servers: lm-eval takes the last entry for the first token after the prompt."""
        end = self._results[index].end_token
        return [end] if end is not None and not (self._is_chat or self._only_echoes) else []

    def _finish_reason(self, index: int) -> str | None:
        if self._only_echoes:
            return "length"
        reason = self._results[index].finish_reason
        return "tool_calls" if reason == "stop" and self._calls[index] else reason

    def _chunks_head(self) -> dict:
        return self._head | ({"object": "chat.completion.chunk"} if self._is_chat else {})

    def _chunk(
        self, index: int, content: dict, tokens: Sequence[Token], finish_reason: str | None
    ) -> dict:
        choice = self._choice(index, content, tokens, finish_reason)
        return self._chunks_head() | {"choices": [choice]}

    def _choice(
        self, index: int, content: dict, tokens: Sequence[Token], finish_reason: str | None
    ) -> dict:
        found = self._logprobs[index]
        logprobs = None
        # A chunk without tokens says nothing of them.
        if found is not None and (tokens or finish_reason is not None):
            logprobs = found.of(tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _echo(self, index: int) -> dict:
        """A choice that is the prompt alone."""
        result, found = self._results[index], self._logprobs[index]
        logprobs = None
        if found is not None:
            logprobs = found.of_prompt(result.prompt_ids, result.prompt_logprobs)
        echo = {"index": index, "text": self._echoes[index]}
        return echo | {"logprobs": logprobs, "finish_reason": None}


def as_json(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a refusal may quote, is written as JSON's own."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def as_event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


END = b"data: [DONE]\n\n"
