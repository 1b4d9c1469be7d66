"""The protocol over HTTP: what is answered, what is refused, and who comes and goes. The program is
one that no artifact is needed for; test_serve.py has artifacts and real clients."""

import asyncio
import json
import random
import socket
import threading

import pytest

from tests.runner.test_engine import Gate
from tests.serve_soak import Soak, requests_of
from tests.serving import (
    Running,
    TextTokenizer,
    answer_of,
    events_of,
    request_of,
    running,
    text_model,
    wait_until,
)
from tests.stateful import stateful_model
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.request import Request
from tokenloop.runner.server import body as server_body
from tokenloop.runner.server.app import Settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
GREEDY = {"temperature": 0}
TOOL = {"type": "function", "function": {"name": "f"}}
STRICT_TOOL = {"type": "function", "function": {"name": "f", "strict": True}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG_CALL = CALL | {"function": {"name": "f", "arguments": "[1]"}}


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


def metrics_of(server) -> dict[str, float]:
    status, headers, data = server.get("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    lines = [line.rsplit(" ", 1) for line in data.decode().split("\n") if line[:1] > "#"]
    return {name: float(value) for name, value in lines}


def remembering_model(rows: int, kind: str):
    """A model of texts whose prompts are packed, and whose state can be kept."""
    model = stateful_model(rows, kind, True, 200)
    model.tokenizer = TextTokenizer()
    model.manifest["sha256"] = "0123456789abcdef" * 4
    return model


def text_alone(prompt: str, count: int, **parameters) -> str:
    """What a model of its own gives after the prompt."""
    model = text_model(1)
    return model.generate(Request(model.tokenizer.encode(prompt), count, **parameters)).run().text


def refusal_of(answer) -> dict:
    status, headers, data = answer
    assert headers["content-type"] == "application/json"
    error = json.loads(data)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return {"status": status, **error}


# What is answered


def test_a_chat_goes_through_the_template_and_is_answered(server):
    status, headers, data = server.post(CHAT, HELLO | GREEDY)
    answer = json.loads(data)
    text = text_alone("<user>Hello<model>", 9)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer["choices"] == [
        {
            "index": 0, "logprobs": None, "finish_reason": "length",
            "message": {"role": "assistant", "content": text, "refusal": None},
        }
    ]  # fmt: skip
    usage = {"prompt_tokens": 18, "completion_tokens": 9, "total_tokens": 27}
    usage["prompt_tokens_details"] = {"cached_tokens": 0}
    assert (answer["object"], answer["model"], answer["usage"]) == ("chat.completion", "toy", usage)
    assert answer["system_fingerprint"] == "fp_0123456789ab"


def test_messages_of_all_roles_and_of_parts_reach_the_template_as_text(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "ö"}]
    messages = [
        {"role": "developer", "content": "Be", "name": None},
        {"role": "assistant", "content": "b", "tool_calls": [], "refusal": None},
        {"role": "user", "content": parts},
    ]
    _, _, data = server.post(CHAT, {"messages": messages, "max_tokens": 5} | GREEDY)
    text = text_alone("<system>Be<assistant>b<user>aö<model>", 5)
    assert json.loads(data)["choices"][0]["message"]["content"] == text


def test_a_template_that_takes_parts_is_given_them(server, monkeypatch):
    """Gemma's trims each of them."""

    def template(tokenizer, conversation):
        pieces = [
            content if isinstance(content, str) else "|".join(p["text"].strip() for p in content)
            for content in (message["content"] for message in conversation.messages)
        ]
        return "".join(pieces)

    monkeypatch.setattr(TextTokenizer, "apply_chat_template", template)
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": " b"}]
    messages = [{"role": role, "content": parts} for role in ("user", "assistant", "user")]
    _, _, data = server.post(CHAT, {"messages": messages, "max_tokens": 5} | GREEDY)
    # What an assistant said is one text for every template.
    text = text_alone("a|b a  ba|b", 5)
    assert json.loads(data)["choices"][0]["message"]["content"] == text


def test_prompts_of_every_form_are_completed(server):
    ids = [70, 71, 72]
    texts = {"Once": text_alone("Once", 16), "On": text_alone("On", 16)}
    alone = text_model(1).generate(Request(ids, 16)).run().text
    for prompt, expected in (
        ("Once", [texts["Once"]]),
        (["Once", "On"], [texts["Once"], texts["On"]]),
        (ids, [alone]),
        ([ids, "On"], [alone, texts["On"]]),
    ):
        _, _, data = server.post(COMPLETIONS, {"prompt": prompt} | GREEDY)
        answer = json.loads(data)
        assert answer["object"] == "text_completion"
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert answer["usage"]["completion_tokens"] == 16 * len(expected)


def test_choices_have_seeds_that_follow_one_another(server):
    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
    body = {"prompt": "x", "n": 3, "seed": 2**63 - 2, "max_tokens": 8, **sampled}
    _, _, data = server.post(COMPLETIONS, body)
    texts = [choice["text"] for choice in json.loads(data)["choices"]]
    seeds = (2**63 - 2, 2**63 - 1, -(2**63))
    assert texts == [text_alone("x", 8, seed=seed, **sampled) for seed in seeds]


def test_a_stream_has_the_same_text_and_ends_in_usage_if_asked(server):
    body = HELLO | GREEDY | {"stream": True}
    _, headers, data = server.post(CHAT, body | {"stream_options": {"include_usage": True}})
    *chunks, usage, done = events_of(data)
    assert headers["content-type"].startswith("text/event-stream") and done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "length")
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == text_alone("<user>Hello<model>", 9)
    *chunks, done = events_of(server.post(CHAT, body)[2])
    assert not any("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_choices_of_a_stream_are_told_apart(server):
    body = {"prompt": ["Once", "On"], "n": 2, "seed": 5, "max_tokens": 7, "stream": True}
    texts, ends = [""] * 4, []
    for chunk in events_of(server.post(COMPLETIONS, body)[2])[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] * (choice["finish_reason"] == "length")
    wanted = [("Once", 5), ("Once", 6), ("On", 5), ("On", 6)]
    assert texts == [text_alone(prompt, 7, temperature=1.0, seed=seed) for prompt, seed in wanted]
    assert sorted(ends) == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop_and_no_chunk_has_part_of_one(server, stream):
    whole = text_alone("Once", 30)
    stop = whole[11:16]
    body = {"prompt": "Once", "max_tokens": 30, "stop": ["no such", stop], "stream": stream}
    data = server.post(COMPLETIONS, body | GREEDY)[2]
    chunks = events_of(data)[:-1] if stream else [json.loads(data)]
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_each_token(server):
    alone = text_model(1)
    ids = alone.tokenizer.encode("<user>Hello<model>")
    result = alone.generate(Request(ids, 9, logprobs=2)).run()
    body = HELLO | GREEDY | {"logprobs": True, "top_logprobs": 2}
    whole = json.loads(server.post(CHAT, body)[2])["choices"][0]
    chunks = events_of(server.post(CHAT, body | {"stream": True})[2])[:-1]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    entries = [entry for part in streamed if part for entry in part["content"]]
    assert whole["logprobs"] == {"content": entries, "refusal": None}
    assert "".join(entry["token"] for entry in entries) == whole["message"]["content"]
    assert [entry["logprob"] for entry in entries] == [one.logprob for one in result.logprobs]
    for entry, found in zip(entries, result.logprobs):
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [top["logprob"] for top in entry["top_logprobs"]] == [p for _, p in found.top]
        # What gives no text has a name and no bytes.
        names = [(top["token"], top["bytes"]) for top in entry["top_logprobs"]]
        assert all(name == "<end>" for name, data in names if data is None)
    assert any(None in [top["bytes"] for top in entry["top_logprobs"]] for entry in entries)
    body = {"prompt": "<user>Hello<model>", "max_tokens": 9, "logprobs": 2} | GREEDY
    plain = json.loads(server.post(COMPLETIONS, body)[2])["choices"][0]
    found = plain["logprobs"]
    assert found["tokens"] == [entry["token"] for entry in entries]
    assert found["token_logprobs"] == [entry["logprob"] for entry in entries]
    for token, offset in zip(found["tokens"], found["text_offset"]):
        assert plain["text"][offset:].startswith(token)
    body |= {"logprobs": 0, "stream": True}
    chunks = events_of(server.post(COMPLETIONS, body)[2])[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum((part["text_offset"] for part in parts if part), []) == found["text_offset"]
    assert all(top == {} for part in parts if part for top in part["top_logprobs"])


def test_an_echo_has_the_prompt_and_its_log_probabilities(server):
    alone = text_model(1)
    ids = alone.tokenizer.encode("Once öre")
    result = alone.generate(Request(ids, 3, logprobs=1, prompt_logprobs=True)).run()
    every = [None] + [one.logprob for one in result.prompt_logprobs + result.logprobs]
    body = {"max_tokens": 3, "echo": True, "logprobs": 1, "n": 2} | GREEDY
    for prompt, echo in (("Once öre", "Once öre"), (ids, alone.tokenizer.decode(ids))):
        for choice in json.loads(server.post(COMPLETIONS, body | {"prompt": prompt})[2])["choices"]:
            assert choice["text"] == echo + result.text
            assert choice["logprobs"]["token_logprobs"] == every
            assert choice["logprobs"]["top_logprobs"][0] is None
        chunks = events_of(
            server.post(COMPLETIONS, body | {"prompt": prompt, "n": 1, "stream": True})[2]
        )
        parts = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert "".join(part["text"] for part in parts) == echo + result.text
        values = [part["logprobs"] or {"token_logprobs": []} for part in parts]
        assert sum((one["token_logprobs"] for one in values), []) == every
    # As lm-eval reads it: whether each token of the prompt is the likeliest one.
    for value, top in list(zip(every, choice["logprobs"]["top_logprobs"]))[1:]:
        assert (value == max(top.values())) or value < max(top.values())
    plain = server.post(COMPLETIONS, body | {"prompt": "Once öre", "logprobs": None})
    assert json.loads(plain[2])["choices"][0]["text"] == "Once öre" + result.text


def prompt_before_the_end(model) -> list[int]:
    """A prompt after which the end token is the likeliest one."""
    for first in range(1, 97):
        for second in range(1, 97):
            if model.generate(Request([first, second], 1)).run().finish_reason == "stop":
                return [first, second]
    raise AssertionError("there is none")


def test_a_completions_log_probabilities_have_the_end_token(server):
    """lm-eval drops the last entry, as that of the one token which it has asked for."""
    model = text_model(1)
    ids = prompt_before_the_end(model)
    before = model.generate(Request(ids, 1, logprobs=1, prompt_logprobs=True)).run()
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True} | GREEDY
    choice = json.loads(server.post(COMPLETIONS, body)[2])["choices"][0]
    found = choice["logprobs"]
    assert choice["finish_reason"] == "stop" and found["tokens"][-1] == "<end>"
    assert found["token_logprobs"][:-1] == [None, before.prompt_logprobs[0].logprob]
    assert found["token_logprobs"][-1] == found["top_logprobs"][-1]["<end>"] <= 0
    assert len({len(values) for values in found.values()}) == 1
    chunks = events_of(server.post(COMPLETIONS, body | {"stream": True})[2])[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = {name: sum((part[name] for part in parts if part), []) for name in found}
    assert streamed == found
    # A chat's are those of the message's tokens.
    result = model.generate(Request(ids, 1, logprobs=0)).run()
    assert result.logprobs == [] and result.end_token.id == 0


def test_an_echo_may_be_all_that_is_asked_for(server):
    model = text_model(1)
    ids = model.tokenizer.encode("Once")
    result = model.generate(Request(ids, 1, logprobs=1, prompt_logprobs=True)).run()
    body = {"prompt": ["Once", "Once"], "max_tokens": 0, "echo": True, "logprobs": 1} | GREEDY
    answer = json.loads(server.post(COMPLETIONS, body)[2])
    assert answer["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 0, "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"]) == ("Once", "length")
        found = choice["logprobs"]["token_logprobs"]
        assert found == [None, *(one.logprob for one in result.prompt_logprobs)]
    chunks = events_of(server.post(COMPLETIONS, body | {"prompt": "Once", "stream": True})[2])[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Once", ""]
    assert choices[-1]["finish_reason"] == "length"


def test_without_a_limit_the_output_fills_the_context(server):
    _, _, data = server.post(CHAT, {"messages": HELLO["messages"]} | GREEDY)
    answer = json.loads(data)
    assert answer["usage"]["total_tokens"] <= 200
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    expected = text_alone("<user>Hello<model>", 1000)
    assert answer["choices"][0]["message"]["content"] == expected


def test_what_is_there_besides(server):
    status, _, data = server.get("/v1/models")
    (model,) = json.loads(data)["data"]
    assert status == 200 and model["id"] == "toy" and model["max_model_len"] == 200
    assert model["rows"] == 3 and model["prefix_cache"] is False
    assert model["tool_calls"] is None and model["reasoning"] is None
    assert json.loads(server.get("/v1/models/toy")[2]) == model
    assert refusal_of(server.get("/v1/models/no/such"))["code"] == "model_not_found"
    assert server.get("/health")[0] == 200
    status, headers, page = server.get("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    # Nothing comes from elsewhere.
    assert "default-src 'none'" in headers["content-security-policy"] and b"://" not in page
    server.post(CHAT, HELLO)
    values = metrics_of(server)
    assert values["tokenloop_rows"] == 3
    assert values["tokenloop_running_requests"] == 0
    assert values["tokenloop_new_tokens_total"] >= 9
    assert values["tokenloop_time_to_first_token_seconds_count"] >= 1
    assert f'tokenloop_answers_total{{path="{CHAT}",status="200"}}' in values


# Beginnings that are known


def test_what_was_not_computed_is_counted():
    model = remembering_model(3, "hybrid")
    body = GREEDY | {"prompt": "Once upon a time there was", "max_tokens": 4}
    with running(model, prefix_cache_mb=1) as found:
        first, second = (json.loads(found.post(COMPLETIONS, body)[2]) for _ in range(2))
        assert first["choices"] == second["choices"]
        sizes = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, second)]
        assert sizes == [0, 24] and first["usage"]["prompt_tokens"] == 26
        # Of each prompt its first choice counts, and each prompt once.
        several = body | {"prompt": ["Never seen before", body["prompt"]], "n": 2}
        usage = json.loads(found.post(COMPLETIONS, several)[2])["usage"]
        assert usage["prompt_tokens"] == 26 + 17
        assert usage["prompt_tokens_details"]["cached_tokens"] == 24
        stream = body | {"stream": True, "stream_options": {"include_usage": True}}
        *_, last, _ = events_of(found.post(COMPLETIONS, stream)[2])
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 24
        (info,) = json.loads(found.get("/v1/models")[2])["data"]
        assert (info["prefix_cache"], info["prefix_cache_tokens"]) == (True, 4)
        values = metrics_of(found)
    # The second choice of what nobody had seen waited for the first one.
    assert values["tokenloop_cached_tokens_total"] == 24 + 16 + 24 + 24 + 24
    assert values["tokenloop_prefix_cache_budget_bytes"] == 1e6
    assert 0 < values["tokenloop_prefix_cache_bytes"] < 1e6
    assert values["tokenloop_prefix_cache_evictions_total"] == 0


def test_a_model_without_a_cache_says_why():
    with running(prefix_cache_mb=None) as found:
        (info,) = json.loads(found.get("/v1/models")[2])["data"]
        assert info["prefix_cache"] is False and "cannot be read" in info["prefix_cache_fault"]


def test_a_prompts_own_log_probabilities_are_refused_where_it_is_packed():
    with running(remembering_model(1, "dense")) as found:
        body = {"prompt": [5, 6, 7], "max_tokens": 2, "echo": True, "logprobs": 1}
        status, _, data = found.post(COMPLETIONS, body)
        assert (status, json.loads(data)["error"]["param"]) == (400, "echo")


# What is refused


def response_format(schema) -> dict:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


@pytest.mark.parametrize("fields", [
    {"frequency_penalty": 1}, {"logit_bias": {"5": 1}}, {"response_format": {"type": "json_object"}}
], ids=str)  # fmt: skip
def test_what_an_older_artifact_has_no_method_for_is_refused_by_name(fields):
    model = text_model()
    model.manifest["methods"] = []
    (param,) = fields
    with running(model) as server:
        error = refusal_of(server.post(CHAT, HELLO | fields))
        assert error["param"] == param and "has no method" in error["message"]
        assert server.post(CHAT, HELLO)[0] == 200


def test_penalties_and_biases_change_the_answer_and_none_of_those_beside_it(server):
    def answer(**fields):
        body = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0} | fields
        return json.loads(server.post("/v1/completions", body)[2])["choices"][0]["text"]

    plain = answer()
    bias = {"logit_bias": {"7": 100}}
    assert answer(**bias) == TextTokenizer().decode([7] * 20) != plain
    # Any other token is as likely as the one that was taken, from the second on.
    assert len(set(answer(**bias, frequency_penalty=100))) > 1
    assert answer() == plain == answer(logit_bias={}, presence_penalty=0, repetition_penalty=1)


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"logprobs": 0}, "logprobs", "valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "only for logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "the keys must be token ids"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "the keys must be token ids"),
        ({"logit_bias": {"5" * 5000: 1}}, "logit_bias", "the keys must be token ids"),
        ({"logit_bias": {"97": 1}}, "logit_bias", "the token id 97 is beyond 96, the last"),
        ({"logit_bias": {"5": 1e39}}, "logit_bias", "finite number for each"),
        ({"frequency_penalty": 1e39}, "frequency_penalty", "it must be a finite number"),
        ({"presence_penalty": False}, "presence_penalty", "valid number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "a finite number above 0"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object' or 'json_s"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be th"),
        (response_format({"type": "strin"}), "response_format", "Invalid type: strin"),
        (response_format({"not": {}}), "response_format", "Unimplemented keys: "),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "'function'"),
        ({"tools": [TOOL | {"x": 1}]}, "tools[0].x", "no field"),
        ({"tools": [STRICT_TOOL]}, "tools[0].function.strict", "it is not supported"),
        ({"tools": [TOOL]}, "tools", "chat template has no tools"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "tools must have some"),
        ({"tool_choice": "always"}, "tool_choice", '"required" or a function'),
        ({"tool_choice": {"type": "function"}}, "tool_choice", '"required" or a function'),
        ({"functions": [{}]}, "functions", "it is not supported"),
        ({"chat_template_kwargs": {"enable_thinking": True}},
         "chat_template_kwargs.enable_thinking", "template has no enable_thinking"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "it is not supported"),
        ({"service_tier": "flex"}, "service_tier", "it is not supported"),
        ({"maximum": 5}, "maximum", "no field of this request"),
        ({"prompt": "x"}, "prompt", "no field of this request"),
        ({"user": 5}, "user", "it must be a text"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5.0}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_completion_tokens": 5}, "max_tokens", "one limit by two names"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "0 (greedy) or more"),
        ({"temperature": 1e39}, "temperature", "finite number"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"top_k": -1}, "top_k", "0 (off) or more"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["a" * 1001]}, "stop[0]", "at most 1000 characters"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": {"a": 1}}, "stop", "valid list"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for stream true"),
        ({"stream": True, "stream_options": {"obfuscate": 1}}, "stream_options.obfuscate", "no f"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": "Hello"}, "messages", "valid list"),
        ({"messages": ["Hello"]}, "messages[0]", "valid dictionary or instance of Message"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "function", "content": ""}]}, "messages[0].role", "or 'tool'"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].tool_call_id", "missing"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing"),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
            "messages[0].tool_calls", "only for the role assistant",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "reasoning_content": "x"}]},
            "messages[0].reasoning_content", "chat template has no reasoning_content",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
            "messages[0].tool_calls", "chat template has no tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [WRONG_CALL]}]},
            "messages[0].tool_calls[0].function.arguments", "the text of a JSON object",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a text or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content", "each part must be",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function", "missing",
        ),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "no field"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_chat_may_not_ask_is_refused_with_the_fields_name(server, change, param, reason):
    error = refusal_of(server.post(CHAT, HELLO | change))
    assert (error["status"], error["param"]) == (400, param)
    assert reason in error["message"] and error["message"].startswith(param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"echo": 1}, "echo", "valid boolean"),
        ({"max_tokens": 0}, "max_tokens", "without echo it must be at least 1"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"best_of": 2}, "best_of", "it is not supported"),
        ({"suffix": "x"}, "suffix", "it is not supported"),
        ({"prompt": []}, "prompt", "a list of one or more"),
        ({"prompt": [[]]}, "prompt", "each prompt must be"),
        ({"prompt": 5}, "prompt", "it must be a text"),
        ({"prompt": [1, "a"]}, "prompt", "each prompt must be"),
        ({"prompt": [97]}, "prompt", "the prompt has the id 97; ids are 0 to 96"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": "x" * 200}, "prompt", "the prompt has 200 tokens; 199 are the most"),
        ({"prompt": ["x"] * 90, "n": 3}, "prompt", "270 choices are asked for; 259 are the most"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_completion_may_not_ask_is_refused_too(server, change, param, reason):
    error = refusal_of(server.post(COMPLETIONS, {"prompt": "x"} | change))
    assert (error["status"], error["param"]) == (400, param) and reason in error["message"]


def test_what_the_artifact_cannot_do_is_refused_with_the_fields_name():
    def load_sampling(method, embed):
        raise RunnerError("no method sample, and so only temperature 0 is possible")

    model = text_model(1)
    model.loop.program.has_logits = False
    model.loop.program.load_sampling = load_sampling
    with running(model) as found:
        for body in (HELLO | {"logprobs": True}, HELLO | {"stream": True}):
            error = refusal_of(found.post(CHAT, body))
            param = "logprobs" if "logprobs" in body else "temperature"
            assert (error["status"], error["param"]) == (400, param)
            assert error["message"].startswith(("logprobs: this artifact", "no method sample"))
        assert found.post(CHAT, HELLO | GREEDY)[0] == 200


def test_what_asks_for_nothing_is_taken(server):
    idle = {
        "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "frequency_penalty": 0.0,
        "presence_penalty": 0, "response_format": {"type": "text"}, "tools": [], "user": "me",
        "tool_choice": "none", "stop": None, "seed": None, "n": 1, "stream": False, "store": False,
        "stream_options": None, "model": "toy", "metadata": None, "service_tier": "auto",
    }  # fmt: skip
    expected = json.loads(server.post(CHAT, HELLO | GREEDY)[2])["choices"]
    status, _, data = server.post(CHAT, HELLO | GREEDY | idle)
    assert status == 200 and json.loads(data)["choices"] == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"messages": [], "messages": []}', "stands there twice"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not JSON in UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_is_no_json_object_is_refused(server, data, reason):
    error = refusal_of(server.post(CHAT, data))
    assert error["status"] == 400 and reason in error["message"]


def test_half_a_surrogate_pair_is_refused_and_the_whole_of_unicode_is_not(server):
    message = b'{"messages": [{"role": "user", "content": "%s"}], "max_tokens": 2}'
    error = refusal_of(server.post(CHAT, message % rb"\ud83d"))
    assert error["status"] == 400 and error["param"] == "messages"
    error = refusal_of(server.post(CHAT, rb'{"\ud83d": 1}'))
    assert error["status"] == 400 and "not JSON in UTF-8" in error["message"]
    error = refusal_of(server.post(CHAT, rb'{"model": "\ud83d", "messages": [{"role": "\ud83d"}]}'))
    assert (error["status"], error["param"]) == (400, "messages[0].role")
    for text in (rb"\ud83d\ude00", "😀\u2028\ufeff\u202e".encode(), rb"\u0000"):
        assert server.post(CHAT, message % text)[0] == 200


def test_paths_methods_models_and_types_that_there_are_not(server):
    assert refusal_of(server.get("/v1/embeddings"))["status"] == 404
    assert refusal_of(server.get(CHAT))["status"] == 405
    wrong = refusal_of(server.post(CHAT, HELLO | {"model": "gpt-4o"}))
    assert (wrong["status"], wrong["param"], wrong["code"]) == (404, "model", "model_not_found")
    # A page of another site may send this without asking.
    assert refusal_of(server.post(CHAT, HELLO, content_type="text/plain"))["status"] == 415


def test_a_body_that_is_too_large_is_refused_and_not_kept(server, monkeypatch):
    monkeypatch.setattr(server_body, "MOST_BYTES", 1000)
    size = 3_000_000
    body = b'{"messages": "' + b"x" * size
    assert refusal_of(server.post(CHAT, body))["status"] == 413
    # In chunks nobody says how long it will be.
    head = request_of("POST", CHAT, b"", {"content-type": "application/json"})
    head = head.replace(b"content-length: 0", b"transfer-encoding: chunked")
    answer = server.raw(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert refusal_of(answer)["status"] == 413
    # Whoever asks first need not send it.
    headers = {"content-type": "application/json", "content-length": str(10**8)}
    ask = request_of("POST", CHAT, b"", headers | {"expect": "100-continue"})
    assert refusal_of(server.raw(ask))["status"] == 413


def test_a_body_that_does_not_come_to_its_end_holds_nothing(server, monkeypatch):
    monkeypatch.setattr(server_body, "SECONDS", 0.05)
    headers = {"content-type": "application/json", "content-length": "100"}
    assert refusal_of(server.raw(request_of("POST", CHAT, b'{"mess', headers)))["status"] == 408
    # A client that goes in the middle of it is nobody to answer.
    with server.connect() as connection:
        connection.sendall(request_of("POST", CHAT, b'{"mess', headers))
    assert server.post(CHAT, HELLO)[0] == 200


def test_what_the_server_did_wrong_is_no_traceback_to_the_client(monkeypatch, caplog):
    with running() as found:

        def encode(self, text, add_special_tokens=True):
            raise ArithmeticError("the inside")

        monkeypatch.setattr(type(found.engine.model.tokenizer), "encode", encode)
        error = refusal_of(found.post(CHAT, HELLO))
    assert error["status"] == 500 and error["type"] == "server_error"
    assert "inside" not in error["message"] and "the inside" in caplog.text


# Who may ask


def test_a_key_is_asked_for_everywhere_but_at_health():
    with running(settings=Settings("toy", api_key="sesame")) as found:
        for key in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
            error = refusal_of(found.post(CHAT, HELLO, **key))
            assert (error["status"], error["code"]) == (401, "invalid_api_key")
            assert found.get("/metrics", **key)[0] == found.get("/v1/models", **key)[0] == 401
        # Bytes that are no ASCII are compared as well.
        assert found.post(CHAT, HELLO, authorization="Bearer é")[0] == 401
        assert found.post(CHAT, HELLO, authorization="Bearer sesame")[0] == 200
        assert found.get("/health")[0] == 200
        # It asks for the key itself.
        assert found.get("/")[0] == 200


def test_a_page_that_a_name_server_sends_here_is_refused():
    with running(settings=Settings("toy", only_loopback=True)) as found:
        assert refusal_of(found.post(CHAT, HELLO, host="evil.example:8000"))["status"] == 403
        for host in (f"localhost:{found.port}", "127.0.0.1:8000", "[::1]:8000", "localhost"):
            assert found.post(CHAT, HELLO, host=host)[0] == 200


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_in_the_log_only_if_told(log_prompts, caplog):
    caplog.set_level("DEBUG")
    settings = Settings("toy", log_prompts=log_prompts)
    with running(settings=settings) as found:
        data = found.post(COMPLETIONS, {"prompt": "Once upon"} | GREEDY)[2]
        # Refusals name what they refuse, to the client alone.
        found.post(CHAT, {"messages": "Once upon a time"})
        found.post(COMPLETIONS, b'{"prompt": "Once upon a time"')
    text = json.loads(data)["choices"][0]["text"]
    own = [record.getMessage() for record in caplog.records]
    assert any(f"POST {COMPLETIONS}: 200" in line for line in own)
    assert any(text in line for line in own) == log_prompts
    assert not any("Once upon a time" in line for line in own)


# Who comes and goes


def open_stream(found: Running, count: int, **fields) -> socket.socket:
    connection = found.connect()
    body = {"prompt": "Once", "max_tokens": count, "stream": True} | GREEDY | fields
    data = json.dumps(body).encode()
    connection.sendall(request_of("POST", COMPLETIONS, data, {"content-type": "application/json"}))
    return connection


def test_more_requests_than_may_wait_are_told_to_come_again():
    model = text_model(1)
    gate = Gate(model)
    with running(model, max_queue=1) as found:
        with open_stream(found, 9) as first:
            gate.reached()
            with open_stream(found, 9) as second:
                wait_until(lambda: found.engine.counts.waiting == 1)
                status, headers, data = found.post(COMPLETIONS, {"prompt": "x"})
                assert (status, headers["retry-after"]) == (429, "1")
                error = json.loads(data)["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                gate.open()
                for connection in (first, second):
                    assert events_of(answer_of(connection)[2])[-1] == "[DONE]"
        assert found.post(COMPLETIONS, {"prompt": "x"})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(stream):
    model = text_model(1)
    gate = Gate(model)
    with running(model) as found:
        with open_stream(found, 150, stream=stream) as connection:
            gate.reached()
            gate.go(3)
            if stream:
                assert connection.recv(1)
        wait_until(lambda: not found.engine.counts.running)
        gate.open()
        answer = json.loads(found.post(COMPLETIONS, {"prompt": "x"} | GREEDY)[2])
        assert answer["choices"][0]["text"] == text_alone("x", 16)
        # The step that was under way, perhaps; 16 tokens take 15 steps.
        assert gate.calls.count("D") <= 2 + 1 + 15


def test_who_does_not_read_stalls_nobody_else():
    model = text_model(2, max_seq_len=60_000)
    with running(model) as found:
        with found.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            data = json.dumps({"prompt": "Once", "max_tokens": 1200, "stream": True, **GREEDY})
            head = {"content-type": "application/json"}
            slow.sendall(request_of("POST", COMPLETIONS, data.encode(), head))
            for _ in range(5):
                answer = json.loads(found.post(COMPLETIONS, {"prompt": "x"} | GREEDY)[2])
                assert answer["choices"][0]["text"] == text_alone("x", 16)
            wait_until(lambda: not found.engine.counts.running)
            # All of it has been generated. What did not go out piece by piece comes as one.
            chunks = events_of(answer_of(slow)[2])[:-1]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == long_text("Once", 1200) and len(chunks) < 1000


def long_text(prompt: str, count: int) -> str:
    model = text_model(1, max_seq_len=60_000)
    return model.generate(Request(model.tokenizer.encode(prompt), count)).run().text


def test_of_clients_that_come_all_the_time_none_has_a_wrong_answer():
    asked = requests_of(text_model(1), random.Random(0), 40)
    with running(max_stall_s=0) as found:
        soak = Soak(found.port, asked)
        asyncio.run(soak.run(tokens=600, clients=12))
        wait_until(lambda: not found.engine.counts.running)
    assert soak.counts["wrong"] == 0
    assert min(soak.counts[kind] for kind in ("whole", "streamed", "refused", "hung up")) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_time_that_is_up_is_an_error(stream, clock):
    model = text_model(1)
    gate = Gate(model)
    with (
        running(model, Settings("toy", timeout_s=1000)) as found,
        open_stream(found, 150, stream=stream) as connection,
    ):
        gate.reached()
        gate.go(3)
        if stream:
            assert connection.recv(1, socket.MSG_PEEK)
        clock.value = 1000.0
        gate.open()
        status, _, data = answer_of(connection)
    if stream:
        *_, last = events_of(data)
        assert status == 200 and last["error"]["code"] == "timeout"
    else:
        assert (status, json.loads(data)["error"]["code"]) == (504, "timeout")


def test_a_server_that_ends_says_so_to_those_that_run():
    model = text_model(1)
    gate = Gate(model)
    found = Running(model, Settings("toy"))
    with open_stream(found, 150) as first, open_stream(found, 9, stream=False) as second:
        gate.reached()
        gate.go(3)
        assert first.recv(1) == b"H"
        wait_until(lambda: found.engine.counts.waiting == 1)
        closing = threading.Thread(target=found.close)
        closing.start()
        wait_until(lambda: not found.engine.is_open)
        gate.open()
        status, _, data = answer_of(second)
        assert (status, json.loads(data)["error"]["code"]) == (503, "shutting_down")
        rest = b""
        while piece := first.recv(1 << 16):
            rest += piece
        closing.join()
    assert b'"code":"shutting_down"' in rest and b"[DONE]" not in rest
