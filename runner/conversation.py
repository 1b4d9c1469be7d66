"""A conversation: messages, and whatever else a chat template is given with them.

The forms and the meaning are those of transformers 5 (`apply_chat_template`). Imports no NumPy, so
that run.py can answer a wrong file at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenloop.runner.errors import RunnerError

# A message's reasoning is passed under any of these names, and templates read the first, or
# gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Ends what of the last message is continued. A template that trims messages takes the space off.
# It is transformers' own, for templates look for it (LFM2.5's writes the message's calls before).
OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True)
class Conversation:
    """Messages, the oldest first, and what else the chat template is given.

    A message has a `role` (such as system, user, assistant, tool) and a `content`, which is text or
    a list of parts {"type": "text", "text": ...}; and any other keys that the template knows, such
    as tool_calls. A key whose value is None counts as missing.

    `tools` and `documents` are lists of objects, or None. With `continue_final_message` the text
    goes on in the last message, otherwise an assistant's turn is begun. `chat_template_kwargs` are
    more names for the template, such as {"enable_thinking": False}.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Errors: RunnerError for a value that is not what it must be."""
        if not _is_list(self.messages) or not self.messages:
            raise RunnerError(
                f"messages is {_kind(self.messages)}; it must be a list of at least one message"
            )
        for number, message in enumerate(self.messages, 1):
            _check_message(f"message {number}", message)
        for name in ("tools", "documents"):
            found = getattr(self, name)
            if found is None:
                continue
            if not _is_list(found):
                raise RunnerError(f"{name} is {_kind(found)}; it must be a list of objects")
            for item in found:
                if not isinstance(item, Mapping):
                    raise RunnerError(
                        f"{name} has an item {_kind(item)}; it must be a list of objects"
                    )
        if not isinstance(self.continue_final_message, bool):
            raise RunnerError(
                f"continue_final_message is {_kind(self.continue_final_message)}; it must be true "
                "or false"
            )
        names = self.chat_template_kwargs
        if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
            raise RunnerError(
                f"chat_template_kwargs is {_kind(names)}; it must be an object with names"
            )
        if own := sorted(
            names.keys() & {"messages", "tools", "documents", "add_generation_prompt"}
        ):
            raise RunnerError(
                f"chat_template_kwargs has {own[0]}, which the conversation itself says: leave it "
                "out there"
            )
        if self.continue_final_message and self._open_text() is None:
            raise RunnerError(
                "continue_final_message is true, and the last message has no text: give it some, "
                "or leave that key out"
            )

    def context(self, add_generation_prompt: bool | None = None) -> dict[str, Any]:
        """The names and values for the template, but for the special tokens. The conversation has
        been checked. By default a turn is begun unless the last message is continued.

        Errors: RunnerError where a turn is to be begun and the last message continued.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not self.continue_final_message
        elif add_generation_prompt and self.continue_final_message:
            raise RunnerError(
                "add_generation_prompt and continue_final_message are both true: a turn is begun "
                "or the last one continued"
            )
        messages = [_plain(message) for message in self.messages]
        if self.continue_final_message:
            messages[-1] |= {"content": _with_open_end(messages[-1]["content"])}
        # Templates ask `tools is not none`, which an undefined name would answer with yes.
        return {
            **self.chat_template_kwargs, "messages": messages, "tools": self.tools,
            "documents": self.documents, "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip

    def finish(self, text: str) -> str:
        """What the template made of the context, without what comes after the open end.

        Errors: RunnerError where it leaves out the message that is continued, or makes something
        else of a content in parts than their texts.
        """
        for number, message in enumerate(self.messages, 1):
            content = message.get("content")
            if isinstance(content, str) or content is None:
                continue
            # A template that knows texts alone either drops a list or writes Python's form of it.
            # Of an assistant's earlier turns templates may drop what they like.
            texts = [part["text"].strip() for part in content]
            kept = message["role"] == "assistant" or all(part in text for part in texts)
            if not kept or str([dict(part) for part in content])[:-3] in text:
                raise RunnerError(
                    f"the chat template does not take message {number}'s content in parts: give "
                    "it as one text"
                )
        if not self.continue_final_message:
            return text
        end = text.rfind(OPEN_END.strip())
        if end < 0 or self._open_text().strip() not in text:
            raise RunnerError(
                "the chat template leaves out or changes the last message, which is to be "
                "continued: leave continue_final_message out"
            )
        kept = text[:end] if text.startswith(OPEN_END, end) else text[:end].rstrip()
        if OPEN_END.strip() in str(self.messages):
            return kept
        # A template may write the last message twice.
        return kept.replace(OPEN_END, "").replace(OPEN_END.strip(), "")

    def _open_text(self) -> str | None:
        """The text of the last message that is continued: all of it, or its last part."""
        content = self.messages[-1].get("content")
        if isinstance(content, str) or not content:
            return content or None
        return content[-1]["text"]


def as_conversation(prompt: Any) -> Conversation | None:
    """`prompt` if it is a conversation or a list of messages, else None."""
    if isinstance(prompt, Conversation):
        return prompt
    if _is_list(prompt) and len(prompt) and isinstance(prompt[0], Mapping):
        return Conversation(prompt)
    return None


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise RunnerError(
            f"{where} is {_kind(message)}; it must be an object with role and content"
        )
    if not isinstance(message.get("role"), str):
        raise RunnerError(
            f"{where} has the role {message.get('role')!r}; it must be a name such as user"
        )
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not _is_list(content):
        raise RunnerError(
            f"the content of {where} is {_kind(content)}; it must be text or a list of parts"
        )
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RunnerError(
                f"part {number} of the content of {where} is of type {kind!r}; only parts of type "
                "'text' with a text can be read"
            )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that are None, and its reasoning under the names that templates
    read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _with_open_end(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content + OPEN_END
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + OPEN_END}]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else f"of type {type(value).__name__}"
