"""What a request body may ask for. Whatever is not understood is refused by the field's name.

A field is one of five: built (a model's field below), a hint that changes no answer (HINTS), one
that is not built and is refused unless it asks for nothing (LACKING), null, which is as good as not
there, or unknown.
"""

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from tokenloop.runner.request import MOST_LOGPROBS, Request, fault_of, is_id
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.messages import Fields, GivenTool, Message
from tokenloop.runner.server.parsing import parse, shown

# They say who asks, and what may be cached, and change no answer.
HINTS = {"user", "safety_identifier", "prompt_cache_key"}
# By name the values that ask for nothing. Null always asks for nothing.
LACKING = {"min_p": [0], "service_tier": ["auto", "default"]}
LACKING_IN_CHAT = LACKING | {
    "functions": [[]], "function_call": ["none", "auto"], "modalities": [["text"]],
    "audio": [], "prediction": [], "reasoning_effort": [], "verbosity": [],
    "web_search_options": [], "store": [False], "metadata": [{}],
}  # fmt: skip
LACKING_IN_COMPLETIONS = LACKING | {
    "suffix": [], "best_of": [1], "response_format": [{"type": "text"}],
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


def by_token_id(bias: dict[str, float]) -> dict[str, float]:
    for name in bias:
        if not is_id(name):
            raise ValueError("the keys must be token ids")
    return bias


class JsonSchema(Fields):
    """The schema of a json_schema. `name`, `description` and `strict` change nothing: the answer
    always fits it."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    # BaseModel has a method of that name.
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {"type": "object"}
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


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
    logit_bias: Annotated[dict[str, float], AfterValidator(by_token_id)] = {}
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None

    def requests(
        self, prompt_ids: list[int], limit: int, shown_tokens: tuple[str, ...], grammar: str | None
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
            "shown_tokens": shown_tokens, "grammar": grammar, **self.adjustments,
        }  # fmt: skip
        return [Request(prompt_ids, seed=seed, **parameters) for seed in seeds]

    def check(self) -> None:
        """Errors: ApiError for values that only together, or for the runner, are wrong."""
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        for name, value in (values | self.adjustments).items():
            if value is not None and (fault := fault_of(name, value)):
                raise ApiError(400, f"{name} is {shown(getattr(self, name))}; {fault}", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for stream true", "stream_options")

    @property
    def adjustments(self) -> dict[str, Any]:
        """What changes logits, by the names that a Request has for it."""
        bias = {int(token_id): value for token_id, value in self.logit_bias.items()}
        names = "frequency_penalty", "presence_penalty", "repetition_penalty"
        return {"logit_bias": bias or None} | {name: getattr(self, name) for name in names}


class ChatFields(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tools: list[GivenTool] = []
    tool_choice: str | dict[str, Any] = "auto"
    response_format: ResponseFormat = ResponseFormat(type="text")
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    def check(self) -> None:
        super().check()
        for number, message in enumerate(self.messages):
            message.check(f"messages[{number}]")
        self._check_tools()
        wanted = self.response_format
        if (wanted.type == "json_schema") != (wanted.json_schema is not None):
            raise ApiError(
                400, "response_format.json_schema must be there for the type json_schema, and for "
                "no other", "response_format.json_schema",
            )  # fmt: skip
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is only for logprobs true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(
                400, "max_tokens and max_completion_tokens are one limit by two names: give one",
                "max_tokens",
            )  # fmt: skip

    def _check_tools(self) -> None:
        if self.tool_choice not in ("auto", "none", "required") and self.named_tool is None:
            raise ApiError(
                400, f"tool_choice is {shown(self.tool_choice)}; it must be \"auto\", \"none\", "
                "\"required\" or a function", "tool_choice",
            )  # fmt: skip
        if self.must_call and self.response_format.type != "text":
            raise ApiError(
                400, "response_format is given, and tool_choice asks for calls alone: give one",
                "response_format",
            )  # fmt: skip
        names = [tool["function"]["name"] for tool in self.tools]
        if self.must_call and (not names or self.named_tool not in (None, *names)):
            raise ApiError(
                400, f"tool_choice is {shown(self.tool_choice)}; tools must have "
                f"{'some' if self.named_tool is None else 'it'}", "tool_choice",
            )  # fmt: skip
        if self.given_tools is None or self.must_call:
            return
        # Nothing would make sure of them.
        if not self.parallel_tool_calls:
            raise ApiError(
                400, "parallel_tool_calls is false; it is not supported with tools (only true) "
                "unless tool_choice asks for calls", "parallel_tool_calls", "unsupported_parameter",
            )  # fmt: skip
        for number, tool in enumerate(self.tools):
            if tool["function"].get("strict"):
                param = f"tools[{number}].function.strict"
                raise ApiError(
                    400, f"{param} is true; it is not supported (only false, which asks for "
                    "nothing) unless tool_choice asks for calls", param, "unsupported_parameter",
                )  # fmt: skip

    @property
    def named_tool(self) -> str | None:
        """The one function that must be called, if tool_choice names one."""
        match self.tool_choice:
            case {"type": "function", "function": {"name": str(name), **rest}, **more} if (
                not rest and not more
            ):
                return name
        return None

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls of tools."""
        return self.tool_choice == "required" or self.named_tool is not None

    @property
    def wanted_schema(self) -> dict[str, Any] | None:
        """The schema that the answer must fit, if it must be JSON."""
        wanted = self.response_format
        if wanted.type == "text":
            return None
        return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_

    @property
    def given_tools(self) -> list[dict] | None:
        """The tools that the template is given, if it is given any. With tool_choice "none" it is
        not, so that the model knows of none."""
        return self.tools if self.tools and self.tool_choice != "none" else None

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
