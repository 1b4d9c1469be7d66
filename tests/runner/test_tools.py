"""Tools and reasoning over HTTP, with OpenAI's own client. The model writes what its prompt says
that it should, and its template is one of the shape of Qwen3's, which renders in its own process.
"""

import asyncio
import json
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serving import EchoTokenizer, echo_model, events_of, running
from tokenloop.runner.server.chat import Chats
from tokenloop.runner.server.fields import ChatFields, read_fields

# <think> is begun by the prompt if it is told to.
TEMPLATE = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}<{{ message.role }}>
{%- if message.reasoning_content %}(<think>{{ message.reasoning_content }}</think>){% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}}\n</tool_call>
{%- endfor %}{% endfor %}<model>
{%- if begin_thinking %}{{ '<think>\n' }}{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Of today",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
BEGIN_THINKING = {"extra_body": {"chat_template_kwargs": {"begin_thinking": True}}}
PARIS, ROME = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "' + city + '"}}\n</tool_call>'
    for city in ("Paris", "Rome")
)


@pytest.fixture(scope="module")
def server():
    with running(echo_model(TEMPLATE)) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as found:
        yield found


def asked(text: str, **fields) -> dict:
    """What asks the model to say the text."""
    messages = [{"role": "user", "content": f"Say [[{text}]]"}]
    return {"model": "toy", "messages": messages, "temperature": 0} | fields


def streamed(client, **fields) -> tuple[dict, str]:
    """The parts of a streamed message, joined, and the finish_reason."""
    found, reason = {"reasoning_content": "", "content": "", "tool_calls": []}, None
    for chunk in client.chat.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        delta = choice.delta.model_dump(exclude_none=True)
        for name in ("reasoning_content", "content"):
            found[name] += delta.get(name, "")
        for call in delta.get("tool_calls", []):
            assert call["index"] == len(found["tool_calls"]) and call["id"].startswith("call_")
            found["tool_calls"].append(call["function"])
        reason = choice.finish_reason or reason
    return found, reason


def whole(client, **fields) -> tuple[dict, str]:
    (choice,) = client.chat.completions.create(**fields).choices
    message = choice.message.model_dump()
    calls = message["tool_calls"] or []
    assert len({call["id"] for call in calls}) == len(calls)
    found = {name: message.get(name) or "" for name in ("reasoning_content", "content")}
    return found | {"tool_calls": [call["function"] for call in calls]}, choice.finish_reason


@pytest.mark.parametrize(
    ("text", "fields", "reasoning", "content", "cities", "reason"),
    [
        (f"<think>\nHm\n</think>\n\nSure.\n{PARIS}\n{ROME}", {}, "Hm", "Sure.",
         ["Paris", "Rome"], "tool_calls"),
        (f"<think>\n{PARIS}", BEGIN_THINKING, PARIS, "", [], "stop"),
        (f"<think>\nHm\n</think>\n{PARIS}", BEGIN_THINKING, "Hm", "", ["Paris"], "tool_calls"),
        (f"{PARIS}\n<tool_call>\n{{no}}</tool_call>\n", {}, "",
         "\n<tool_call>\n{no}</tool_call>\n", ["Paris"], "tool_calls"),
        # Without tools, or where none is to be called, such a text is a text.
        (f"Sure.\n{PARIS}\n", {"tools": []}, "", f"Sure.\n{PARIS}\n", [], "stop"),
        (f"Sure.\n{PARIS}\n", {"tool_choice": "none"}, "", f"Sure.\n{PARIS}\n", [], "stop"),
        # Neither is a call that its limit or a stop text cuts short.
        (PARIS, {"max_tokens": 30}, "", PARIS[:30], [], "length"),
        (PARIS, {"stop": ["Paris"]}, "", PARIS.partition("Paris")[0], [], "stop"),
        (f"{PARIS} {ROME}", {"max_tokens": len(PARIS) + 9}, "", f" {ROME[:8]}", ["Paris"],
         "length"),
    ],
)  # fmt: skip
def test_a_message_has_its_parts_whole_and_streamed(
    client, text, fields, reasoning, content, cities, reason
):
    body = asked(text, tools=[WEATHER]) | fields
    calls = [{"name": "weather", "arguments": json.dumps({"city": city})} for city in cities]
    expected = {"reasoning_content": reasoning, "content": content, "tool_calls": calls}
    assert whole(client, **body) == (expected, reason)
    assert streamed(client, **body) == (expected, reason)


def test_tools_calls_and_what_they_gave_reach_the_template(server, client):
    first = client.chat.completions.create(**asked(f"<think>Hm</think>{PARIS}", tools=[WEATHER]))
    encoded = server.engine.model.tokenizer.encoded
    assert encoded[-1].startswith(json.dumps(WEATHER) + "<user>")
    # As the client gives a message back that it got.
    message = first.choices[0].message
    assert message.content is None and message.reasoning_content == "Hm"
    (call,) = message.tool_calls
    given = {"role": "tool", "tool_call_id": call.id, "content": "Rain [[Take care]]"}
    second = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "?"}, message, given], tools=[WEATHER],
        temperature=0,
    )  # fmt: skip
    assert encoded[-1].endswith(
        f"<user>?<assistant>(<think>Hm</think>){PARIS}<tool>Rain [[Take care]]<model>"
    )
    assert second.choices[0].message.content == "Take care"
    assert second.choices[0].finish_reason == "stop"


# What an answer must be


class Person(BaseModel):
    name: Annotated[str, Field(max_length=4)]
    kind: Literal["one", "two"]
    tags: Annotated[list[bool], Field(max_length=2)]


@pytest.mark.parametrize("text", ["{", "{}", "{nonsense", "<think>Hm</think>Well, [1]"])
def test_an_answer_fits_its_schema_whatever_the_model_would_say(client, text):
    parsed = client.chat.completions.parse(**asked(text), response_format=Person, n=2)
    for choice in parsed.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Person)
        reasoning = getattr(choice.message, "reasoning_content", None)
        assert reasoning == ("Hm" if "Hm" in text else None)
    with client.chat.completions.stream(**asked(text), response_format=Person) as stream:
        (choice,) = stream.get_final_completion().choices
    assert choice.message.parsed == parsed.choices[0].message.parsed


def test_an_answer_that_fits_its_schema_is_left_as_it_is(client):
    for text in (
        '{"name": "x]", "kind": "two", "tags": []}',
        '{\n  "name":"","kind":"one","tags":[]\n}',
    ):
        (choice,) = client.chat.completions.parse(**asked(text), response_format=Person).choices
        assert choice.message.content == text
    text = '{"any": [1, {"k": null}]}'
    (choice,) = client.chat.completions.create(
        **asked(text), response_format={"type": "json_object"}
    ).choices
    assert choice.message.content == text


def test_reasoning_that_the_prompt_has_begun_comes_before_the_json(client):
    text = '<think>\nHm {"\n</think>\n\n{"name": "", "kind": "one", "tags": [true]}'
    (choice,) = client.chat.completions.parse(
        **asked(text), response_format=Person, **BEGIN_THINKING
    ).choices
    assert choice.message.reasoning_content == 'Hm {"'
    assert choice.message.parsed == Person(name="", kind="one", tags=[True])


ROUTE = {
    "type": "function",
    "function": {
        "name": "route", "strict": True,
        "parameters": {
            "type": "object", "required": ["by"], "additionalProperties": False,
            "properties": {"by": {"enum": ["car", "train"]}},
        },
    },
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "route"}}


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=str)
@pytest.mark.parametrize("text", ["<to", "<tool_call>No.", f"<think>Hm</think>{PARIS}"])
def test_a_tool_is_called_whatever_the_model_would_say(client, tool_choice, text):
    tools = [ROUTE] if tool_choice == "required" else [WEATHER, ROUTE]
    body = asked(text, tools=tools, tool_choice=tool_choice, parallel_tool_calls=False)
    message, reason = whole(client, **body)
    (call,) = message["tool_calls"]
    assert call["name"] == "route" and json.loads(call["arguments"])["by"] in ("car", "train")
    assert message["content"] == "" and reason == "tool_calls"
    assert streamed(client, **body) == (message, reason)


def test_calls_that_the_model_would_make_are_left_as_they_are(client):
    body = asked(f"{PARIS}\n{ROME}", tools=[WEATHER], tool_choice="required")
    message, _ = whole(client, **body)
    assert [json.loads(c["arguments"])["city"] for c in message["tool_calls"]] == ["Paris", "Rome"]
    # Beside tools that may be called an answer can be either.
    for text, calls in (PARIS, 1), ('{"kind": "one"}', 0):
        message, _ = whole(
            client, **asked(text, tools=[WEATHER], response_format={"type": "json_object"})
        )
        assert len(message["tool_calls"]) == calls and message["content"] == ("", text)[not calls]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}},
         "response_format"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [ROUTE]}, "tools[0].function.strict"),
    ],
)  # fmt: skip
def test_what_nothing_would_make_sure_of_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked("", tools=[WEATHER]) | fields)
    assert refused.value.param == param


def test_a_key_that_stands_twice_in_a_call_that_must_come_counts_once(client):
    twice = PARIS.replace("}}", ', "x": 1, "x": 2}}')
    body = asked(twice, tools=[WEATHER])
    assert whole(client, **body)[0]["content"] == twice
    message, reason = whole(client, **body, tool_choice="required")
    (call,) = message["tool_calls"]
    assert json.loads(call["arguments"]) == {"city": "Paris", "x": 2} and reason == "tool_calls"


GEMMA = """{{ '' if tools else 'no ' }}tools
{%- for message in messages %}<{{ message.role }}>
{%- if message.reasoning_content %}<|channel>thought{{ message.reasoning_content }}<channel|>
{%- endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}{...}
{%- endfor %}{% endfor %}<model>"""
BOOK = {
    "type": "function",
    "function": {
        "name": "book", "strict": True,
        "parameters": {
            "type": "object", "required": ["to", "days"],
            "properties": {
                "to": {"type": "string", "maxLength": 5},
                "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            },
        },
    },
}  # fmt: skip
ROME_IN_GEMMAS = '<|tool_call>call:book{days:[1,20],to:<|"|>"Rome<|"|>}<tool_call|>'


@pytest.fixture(scope="module")
def gemma():
    with running(echo_model(GEMMA)) as found:
        url = f"http://127.0.0.1:{found.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


@pytest.mark.parametrize(
    ("text", "reasoning", "calls"),
    [
        (ROME_IN_GEMMAS, "", [("book", {"days": [1, 20], "to": '"Rome'})]),
        (f"<|channel>thought\nHm<channel|>{ROME_IN_GEMMAS}{ROME_IN_GEMMAS}", "Hm",
         [("book", {"days": [1, 20], "to": '"Rome'})] * 2),
        (ROME_IN_GEMMAS.replace("Rome", "Rome, Italy"), "",
         [("book", {"days": [1, 20], "to": '"Rome'})]),
    ],
    ids=len,
)  # fmt: skip
def test_gemmas_calls_come_where_they_must(gemma, text, reasoning, calls):
    for tool_choice in "required", {"type": "function", "function": {"name": "book"}}:
        body = asked(text, tools=[WEATHER, BOOK], tool_choice=tool_choice)
        message, reason = whole(gemma, **body)
        found = [(c["name"], json.loads(c["arguments"])) for c in message["tool_calls"]]
        assert found == calls[: 1 if tool_choice != "required" else None]
        assert (message["reasoning_content"], message["content"]) == (reasoning, "")
        assert reason == "tool_calls" and streamed(gemma, **body) == (message, reason)


@pytest.mark.parametrize(
    "text", ["<|to", "<|tool_call>call:weather{", "<|tool_call>call:book{days:[x"]
)
def test_a_tool_is_called_in_gemmas_form_whatever_the_model_would_say(gemma, text):
    message, reason = whole(gemma, **asked(text, tools=[BOOK], tool_choice="required"))
    (call,) = message["tool_calls"]
    arguments = json.loads(call["arguments"])
    assert list(arguments) == ["days", "to"] and len(arguments["to"]) <= 5
    assert message["content"] == "" and reason == "tool_calls"


def test_what_gemmas_calls_cannot_have_is_refused_by_its_name(gemma):
    parameters = {"properties": {"on": {"type": "string", "format": "date"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for fields in {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}:
        with pytest.raises(openai.BadRequestError, match="parameters.properties.on: format") as e:
            gemma.chat.completions.create(**asked("", tools=[tool]) | fields)
        assert [e.value.param] == list(fields)
        assert e.value.code == "unsupported_parameter"


def test_what_is_nested_too_deeply_for_a_grammar_is_refused(gemma):
    value: list = []
    for _ in range(930):
        value = [value]
    parameters = {"properties": {"x": {"const": value}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="nested"):
        gemma.chat.completions.create(**asked("", tools=[tool], tool_choice="required"))


def test_calls_in_a_form_that_has_no_grammar_are_refused_where_they_must_come():
    template = "<tool_call><function=f>{{ tools }}{{ messages[0].content }}"
    with running(echo_model(template)) as server:
        for fields in {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}:
            status, _, data = server.post(
                "/v1/chat/completions", asked("", tools=[WEATHER]) | fields
            )
            (param,) = fields
            assert status == 400 and json.loads(data)["error"]["param"] == param


def test_choices_and_the_helper_for_streams_tell_calls_apart(client):
    body = asked(f"{PARIS}\n{ROME}", tools=[WEATHER], n=2)
    with client.chat.completions.stream(**body) as stream:
        choices = stream.get_final_completion().choices
    for choice in choices:
        calls = [json.loads(call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [{"city": "Paris"}, {"city": "Rome"}]
        assert choice.finish_reason == "tool_calls"


def test_log_probabilities_are_streamed_with_their_tokens(client):
    body = asked(f"a{PARIS}", tools=[WEATHER], logprobs=True)
    entries = [
        entry.token
        for chunk in client.chat.completions.create(**body, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert "".join(entries) == f"a{PARIS}"


def test_the_asynchronous_client_gets_them_too(server):
    async def ask():
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            bodies = [asked(f"{n}{PARIS}", tools=[WEATHER]) for n in range(2)]
            return await asyncio.gather(*(client.chat.completions.create(**b) for b in bodies))

    for number, answer in enumerate(asyncio.run(ask())):
        message = answer.choices[0].message
        assert message.content == str(number) and len(message.tool_calls) == 1


def test_the_server_says_which_formats_it_reads(client):
    (model,) = client.models.list().data
    assert (model.tool_calls, model.reasoning) == ("qwen3", "qwen3")


@pytest.mark.parametrize(
    "template",
    [
        # Whoever joins texts wants a text, and whoever prints an object prints Python's form.
        "{{ '<tool_call>' ~ call.function.arguments ~ '</tool_call>' }}",
        "{{ '<tool_call>' + call.function.arguments + '</tool_call>' }}",
    ],
)
def test_a_template_that_wants_arguments_as_text_gets_it(template):
    source = (
        "{% for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] "
        "%}" + template + "{% endfor %}{% endfor %}<model>"
    )
    arguments = '{"city":  "Paris"}'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "?"}]
    fields = read_fields(ChatFields, json.dumps({"messages": messages}).encode())
    tokenizer = EchoTokenizer(source)
    Chats(tokenizer).encode(fields)
    assert tokenizer.encoded == [f"<tool_call>{arguments}</tool_call>?<model>"]


def test_a_stream_shows_nothing_of_a_call_before_it_is_whole(server):
    body = asked(f"Sure. {PARIS}", tools=[WEATHER], stream=True)
    *chunks, done = events_of(server.post("/v1/chat/completions", body)[2])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done == "[DONE]" and [set(delta) for delta in deltas[-2:]] == [{"tool_calls"}, set()]
    assert "".join(delta.get("content", "") for delta in deltas) == "Sure."
    assert all(delta for delta in deltas[:-1])
