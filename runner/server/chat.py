"""A chat's way through the artifact's template: what it is given, and how the answer is read."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tokenloop.runner.conversation import Conversation
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.fields import ChatFields
from tokenloop.runner.server.reader import CallFormat, Reader, call_format, reasoning_format
from tokenloop.runner.server.structure import grammar_for
from tokenloop.runner.tokenizer import Tokenizer


class Chats:
    """The chats with one artifact. `reasoning` and `calls` are the formats that its template writes
    these in, or None where it writes none, or calls in a format that is not known."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.reasoning = reasoning_format(tokenizer.template_source() or "")
        self.calls = call_format(tokenizer.template_source(with_tools=True) or "")

    def encode(self, fields: ChatFields) -> tuple[list[int], bool, str | None]:
        """The prompt's ids, whether it ends in reasoning that has begun, and the grammar that the
        answer follows. Errors: ApiError for what the template does not take, RunnerError for what
        it refuses."""
        source = self._tokenizer.template_source(fields.given_tools is not None)
        if source is not None:
            self._check(fields, source)
        text = self._text(fields)
        is_open = self.reasoning is not None and text.rstrip().endswith(self.reasoning.begin)
        grammar = grammar_for(fields, self._tokenizer, self.reasoning, self.calls, text)
        return self._tokenizer.encode(text, add_special_tokens=False), is_open, grammar

    def shown_tokens(self, fields: ChatFields) -> tuple[str, ...]:
        """The control tokens that the answer is read by."""
        formats = (self.reasoning, self._calls_of(fields))
        return tuple(marker for found in formats if found for marker in found.markers)

    def reader(self, fields: ChatFields, is_open: bool) -> Reader:
        """What divides a choice's text."""
        return Reader(self.reasoning, self._calls_of(fields), is_open, fields.must_call)

    def _calls_of(self, fields: ChatFields) -> CallFormat | None:
        return None if fields.given_tools is None else self.calls

    def _check(self, fields: ChatFields, source: str) -> None:
        """Errors: ApiError for what a template would leave out without a word."""
        names = {f"chat_template_kwargs.{name}": name for name in fields.chat_template_kwargs}
        if fields.given_tools is not None:
            names["tools"] = "tools"
        for number, message in enumerate(fields.messages):
            if message.tool_calls:
                names[f"messages[{number}].tool_calls"] = "tool_calls"
            if message.reasoning_content is not None and self.reasoning is None:
                names[f"messages[{number}].reasoning_content"] = "reasoning_content"
        for param, name in names.items():
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ApiError(
                    400, f"{param} is not supported: this artifact's chat template has no {name}",
                    param, "unsupported_parameter",
                )  # fmt: skip

    def _text(self, fields: ChatFields) -> str:
        """The prompt. Contents in parts are joined for a template that knows texts alone."""
        if any(not isinstance(message.content, str) for message in fields.messages):
            # It refuses parts. What else is wrong is so with texts, too.
            with suppress(RunnerError):
                return self._render(fields, joined=False)
        return self._render(fields, joined=True)

    def _render(self, fields: ChatFields, joined: bool) -> str:
        """The prompt. A call's arguments are given to the template as an object, as transformers
        and vLLM do; and as JSON text if it cannot take that, or writes Python's form of it."""
        messages = [message.as_dict(joined) for message in fields.messages]
        calls = [call["function"] for m in messages for call in m.get("tool_calls", ())]
        texts = [call["arguments"] for call in calls]
        for call in calls:
            call["arguments"] = json.loads(call["arguments"])
        fault = None
        try:
            text = self._apply(messages, fields)
            if not any(call["arguments"] and str(call["arguments"]) in text for call in calls):
                return text
        except RunnerError as error:
            if not calls:
                raise
            fault = error
        for call, arguments in zip(calls, texts):
            call["arguments"] = arguments
        try:
            return self._apply(messages, fields)
        except RunnerError as error:
            raise fault or error from None

    def _apply(self, messages: list[Mapping[str, Any]], fields: ChatFields) -> str:
        conversation = Conversation(
            messages, fields.given_tools, chat_template_kwargs=fields.chat_template_kwargs
        )
        return self._tokenizer.apply_chat_template(conversation)
