"""What the messages of a chat are, and the tools that it brings."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
)

from tokenloop.runner.json_text import parse_json
from tokenloop.runner.server.errors import ApiError


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def checked_content(content: Any) -> Any:
    """A message's content: a text, a list of parts that are text, or null, which is none."""
    if not isinstance(content, str | list | None):
        raise ValueError("it must be a text or a list of parts")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('each part must be {"type": "text", "text": "..."}')
    return content


def object_as_text(arguments: str) -> str:
    """Errors: ValueError for what is no JSON object, or has a key twice."""
    try:
        value = parse_json(arguments)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("it must be the text of a JSON object")
    return arguments


class CalledFunction(Fields):
    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[str, AfterValidator(object_as_text)]


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, BeforeValidator(checked_content)] = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    def check(self, where: str) -> None:
        """Errors: ApiError for what the role does not have, or must have."""
        needed = {"tool": ["content", "tool_call_id"], "assistant": []}.get(self.role, ["content"])
        if self.role == "assistant" and not self.tool_calls:
            needed = ["content"]
        for name in needed:
            if getattr(self, name) is None:
                param = f"{where}.{name}"
                raise ApiError(400, f"{param} is missing", param, "missing_required_parameter")
        only_of = {"reasoning_content": "assistant", "tool_calls": "assistant"}
        for name, role in (only_of | {"tool_call_id": "tool"}).items():
            if getattr(self, name) not in (None, []) and self.role != role:
                param = f"{where}.{name}"
                raise ApiError(400, f"{param} is only for the role {role}", param)

    def as_dict(self, joined: bool = False) -> dict[str, Any]:
        """As chat templates take it. What the protocol calls developer, templates call system. A
        content that is null is an empty one, which templates can join to a text. With `joined` a
        content in parts is one text. An assistant's always is: a template may drop one in parts as
        it drops old reasoning, and nobody could tell."""
        role = "system" if self.role == "developer" else self.role
        kept = self.model_dump(exclude_none=True)
        if not self.tool_calls:
            kept.pop("tool_calls")
        content = self.content or ""
        if (joined or role == "assistant") and not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        return kept | {"role": role, "content": content}


class Function(Fields):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


# It is checked, and goes to the template as it came.
GivenTool = Annotated[Tool, WrapValidator(lambda value, check: (check(value), value)[1])]
