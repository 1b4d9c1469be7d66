"""What a request body may ask for. Whatever is not understood is refused by the field's name.

A field is one of five: built (a model's field below), a hint that changes no answer (HINTS), one
that is not built and is refused unless it asks for nothing (LACKING), null, which is as good as not
there, or unknown.
"""

import json
import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from tokenloop.runner.request import MOST_LOGPROBS, Request, fault_of
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.messages import Fields, GivenTool, Message
from tokenloop.runner.server.parsing import parse, shown

# They say who asks, and what may be cached, and change no answer.
HINTS = {"user", "safety_identifier", "prompt_cache_key"}
# By name the values that ask for nothing. Null always asks for nothing.
PENALTIES = {"frequency_penalty": [0], "presence_penalty": [0], "repetition_penalty": [1]}
LACKING = PENALTIES | {"logit_bias": [{}], "min_p": [0], "service_tier": ["auto", "default"]}
LACKING_IN_CHAT = LACKING | {
    "response_format": [{"type": "text"}],
    "functions": [[]], "function_call": ["none", "auto"], "modalities": [["text"]],
    "audio": [], "prediction": [], "reasoning_effort": [], "verbosity": [],
    "web_search_options": [], "store": [False], "metadata": [{}],
}  # fmt: skip
LACKING_IN_COMPLETIONS = LACKING | {
    "suffix": [], "best_of": [1],
}  # fmt: skip
LACKING_IN_MESSAGES = {
    "name": [], "function_call": [], "refusal": [], "audio": [], "annotations": [[]],
}  # fmt: skip
# Each token is compared with all of them, in the one thread that serves all rows.
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_CHOICES = 128


def several_stops(stop: Any) -> Any:
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, list) and len(stops) > MOST_STOPS:
        raise ValueError(f"there are {len(stops)} texts; at most {MOST_STOPS} are right")
    return stops


def several_prompts(prompt: Any) -> Any:
    """The prompts, each a text or ids, of the four forms that the protocol has."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and are_ids(prompt))
    prompts = [prompt] if is_one else prompt
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("it must be a text, a list of ids, or a list of one or more of these")
    if not all(isinstance(p, str) or (isinstance(p, list) and are_ids(p)) for p in prompts):
        raise ValueError("each prompt must be a text or a list of ids")
    return prompts


def are_ids(prompt: list) -> bool:
    return bool(prompt) and all(type(i) is int for i in prompt)


class StreamOptions(Fields):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Asked(Fields):
    """What both kinds of request have."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Annotated[list[Stop], BeforeValidator(several_stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    def requests(
        self, prompt_ids: list[int], limit: int, shown_tokens: tuple[str, ...]
    ) -> list[Request]:
        """A request for each of the `n` choices. They differ in their seeds: the first has `seed`,
        and the others the numbers after it. Without a seed it is drawn."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        # An int64 that overflows begins again at its least.
        seeds = [(seed + i + 2**63) % 2**64 - 2**63 for i in range(self.n)]
        parameters = {
            "max_new_tokens": limit, "temperature": self.temperature, "top_k": self.top_k,
            "top_p": self.top_p, "stop": tuple(self.stop), "logprobs": self.alternatives,
            "prompt_logprobs": self.echoes and self.alternatives is not None,
            "shown_tokens": shown_tokens,
        }  # fmt: skip
        return [Request(prompt_ids, seed=seed, **parameters) for seed in seeds]

    def check(self) -> None:
        """Errors: ApiError for values that only together, or for the runner, are wrong."""
        for name in ("temperature", "top_p", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None and (fault := fault_of(name, value)):
                raise ApiError(400, f"{name} is {value}; {fault}", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for stream true", "stream_options")


class ChatFields(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tools: list[GivenTool] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    def check(self) -> None:
        super().check()
        for number, message in enumerate(self.messages):
            message.check(f"messages[{number}]")
        if self.tool_choice not in ("auto", "none"):
            raise ApiError(
                400, f"tool_choice is {shown(self.tool_choice)}; it is not supported (only "
                '"auto" or "none")', "tool_choice", "unsupported_parameter",
            )  # fmt: skip
        if self.given_tools is not None and not self.parallel_tool_calls:
            raise ApiError(
                400, "parallel_tool_calls is false; it is not supported with tools (only true)",
                "parallel_tool_calls", "unsupported_parameter",
            )  # fmt: skip
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is only for logprobs true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(
                400, "max_tokens and max_completion_tokens are one limit by two names: give one",
                "max_tokens",
            )  # fmt: skip

    @property
    def given_tools(self) -> list[dict] | None:
        """The tools that the template is given, if it is given any. With tool_choice "none" it is
        not, so that the model knows of none."""
        return self.tools if self.tools and self.tool_choice == "auto" else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Of how many likely tokens the log probability is asked for, beside the chosen one's."""
        return self.top_logprobs if self.logprobs else None

    @property
    def echoes(self) -> bool:
        """Whether the prompt is answered with, before the text."""
        return False

    @property
    def only_echoes(self) -> bool:
        """As of CompletionFields."""
        return False


class CompletionFields(Asked):
    """The body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(several_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens is 0; without echo it must be at least 1", "max_tokens")

    @property
    def alternatives(self) -> int | None:
        """As of ChatFields."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """As of ChatFields."""
        return self.echo

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else max(1, self.max_tokens)

    @property
    def only_echoes(self) -> bool:
        """Whether the prompt is all that is answered with."""
        return self.max_tokens == 0


Kind = TypeVar("Kind", ChatFields, CompletionFields)


def read_fields(kind: type[Kind], data: bytes) -> Kind:
    """The fields of a body. Errors: ApiError."""
    body = parse(data)
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {shown(body)}; it must be a JSON object")
    lacking = LACKING_IN_CHAT if kind is ChatFields else LACKING_IN_COMPLETIONS
    body = without_what_asks_for_nothing(body, lacking, "")
    if kind is ChatFields and isinstance(body.get("messages"), list):
        body["messages"] = [
            without_what_asks_for_nothing(message, LACKING_IN_MESSAGES, f"messages[{i}].")
            if isinstance(message, dict)
            else message
            for i, message in enumerate(body["messages"])
        ]
    try:
        fields = kind.model_validate(body)
    except ValidationError as error:
        raise refusal(error) from None
    fields.check()
    return fields


def without_what_asks_for_nothing(body: dict, lacking: dict[str, list], where: str) -> dict:
    """The fields without hints, nulls and those that ask for nothing. Errors: ApiError for one that
    asks for something that is not built."""
    kept = {}
    for name, value in body.items():
        if name in lacking:
            # 1 and true are equal in Python.
            same = [idle for idle in lacking[name] if idle == value]
            if value is not None and not any(
                isinstance(idle, bool) == isinstance(value, bool) for idle in same
            ):
                idle = " or ".join(json.dumps(idle) for idle in lacking[name])
                raise ApiError(
                    400,
                    f"{where}{name} is {shown(value)}; it is not supported"
                    + (f" (only {idle}, which asks for nothing)" if idle else ""),
                    where + name, "unsupported_parameter",
                )  # fmt: skip
        elif name in HINTS and not where:
            if value is not None and not isinstance(value, str):
                raise ApiError(400, f"{name} is {shown(value)}; it must be a text", name)
        elif value is not None:
            kept[name] = value
    return kept


def refusal(error: ValidationError) -> ApiError:
    """The first fault, with its field's name and value."""
    fault = error.errors(include_url=False)[0]
    param = ""
    for part in fault["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is no field of this request", param, "unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    reason = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
    return ApiError(400, f"{param} is {shown(fault['input'])}: {reason}", param)
