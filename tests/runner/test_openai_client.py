"""OpenAI's own client against the server: what it is given, and how it is told what went wrong.
Tools are in test_tools.py, and an artifact behind it in test_serve.py."""

import asyncio
import json

import openai
import pytest

from tests.runner.test_engine import Gate
from tests.runner.test_server import text_alone
from tests.serving import running, text_model, wait_until
from tokenloop.runner.server.app import Settings

MESSAGES = [{"role": "user", "content": "Hello"}]
ASKED = {"model": "toy", "messages": MESSAGES, "temperature": 0}
COMPLETED = {"model": "toy", "prompt": "Once", "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


def client_of(found, kind=openai.OpenAI):
    url = f"http://127.0.0.1:{found.port}/v1"
    return kind(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(server):
    with client_of(server) as found:
        yield found


def test_models_are_listed_and_found(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("toy", "model", "tokenloop")
    assert client.models.retrieve("toy") == model
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("several", [False, True])
def test_text_ends_before_a_stop(client, several):
    alone = text_alone("<user>Hello<model>", 30)
    stop = alone[11:16]
    body = ASKED | {"max_tokens": 30, "stop": ["no such", stop] if several else stop}
    whole = client.chat.completions.create(**body).choices[0]
    with client.chat.completions.create(**body, stream=True) as stream:
        streamed = [chunk.choices[0] for chunk in stream]
    text = "".join(choice.delta.content or "" for choice in streamed)
    assert whole.message.content == text == alone[: alone.index(stop)]
    assert whole.finish_reason == streamed[-1].finish_reason == "stop"


def test_choices_of_several_prompts_come_in_order(client):
    prompts = ["Once", [70, 71, 72], "On"]
    answer = client.completions.create(**COMPLETED | {"prompt": prompts[::2], "n": 2})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [text_alone(prompt, 16) for prompt in ("Once", "Once", "On", "On")]
    assert [choice.text for choice in answer.choices] == texts
    by_ids = client.completions.create(**COMPLETED | {"prompt": prompts[1]})
    assert by_ids.usage.prompt_tokens == 3


def test_log_probabilities_are_the_same_whole_and_streamed(client):
    body = ASKED | {"max_tokens": 9, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**body).choices[0].logprobs.content
    with client.chat.completions.stream(**body) as stream:
        entries = [
            entry
            for event in stream
            if event.type == "chunk"
            for choice in event.chunk.choices
            for entry in (choice.logprobs.content if choice.logprobs else [])
        ]
    assert entries == whole and len(whole) == 9
    assert all(len(entry.top_logprobs) == 3 for entry in whole)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in whole)
    body = COMPLETED | {"echo": True, "logprobs": 2, "max_tokens": 3}
    found = client.completions.create(**body).choices[0]
    assert found.text == "Once" + text_alone("Once", 3)
    assert found.logprobs.token_logprobs[0] is None and len(found.logprobs.tokens) == 4 + 3


def test_many_streams_of_the_asynchronous_client_are_told_apart(server):
    async def ask(client, prompt):
        body = COMPLETED | {"prompt": prompt, "stream": True, "max_tokens": 12}
        stream = await client.completions.create(**body)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all(prompts):
        async with client_of(server, openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    prompts = [chr(97 + n) * (n % 5 + 1) for n in range(20)]
    assert asyncio.run(ask_all(prompts)) == [text_alone(prompt, 12) for prompt in prompts]


def test_a_stream_that_is_left_and_a_call_that_is_cancelled_free_their_rows():
    model = text_model(1)
    gate = Gate(model)

    async def cancel(found):
        async with client_of(found, openai.AsyncOpenAI) as client:
            body = COMPLETED | {"max_tokens": 150}
            asking = asyncio.ensure_future(client.completions.create(**body))
            await asyncio.to_thread(gate.reached)
            asking.cancel()
            await asyncio.wait([asking])
        await asyncio.to_thread(wait_until, lambda: not found.engine.counts.running)

    with running(model) as found:
        asyncio.run(cancel(found))
        gate.open()
        with client_of(found) as client:
            with client.completions.create(**COMPLETED, max_tokens=150, stream=True) as stream:
                next(iter(stream))
            wait_until(lambda: not found.engine.counts.running)
            assert client.completions.create(**COMPLETED).choices[0].text == text_alone("Once", 16)


def test_every_kind_of_refusal_is_an_error_of_its_own(client):
    for body, param, code in (
        ({"temperature": "hot"}, "temperature", None),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "unsupported_parameter"),
        ({"extra_body": {"x": 1}}, "x", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages",
         "context_length_exceeded"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**ASKED | body)
        assert (refused.value.param, refused.value.code) == (param, code)
        assert refused.value.type == "invalid_request_error" and refused.value.status_code == 400
    with pytest.raises(openai.NotFoundError) as lacking:
        client.embeddings.create(model="toy", input="x", encoding_format="float")
    assert json.loads(lacking.value.response.content)["error"]["message"] == "Not Found"


def test_full_queues_and_time_that_is_up_are_errors_too(clock):
    model = text_model(1)
    gate = Gate(model)

    async def ask(found):
        async with client_of(found, openai.AsyncOpenAI) as client:
            body = COMPLETED | {"max_tokens": 150, "stream": True}
            first = asyncio.ensure_future(client.completions.create(**body))
            await asyncio.to_thread(gate.reached)
            with pytest.raises(openai.RateLimitError) as full:
                await client.completions.create(**COMPLETED)
            assert full.value.response.headers["retry-after"] == "1"
            gate.go(3)
            stream = await first
            await anext(aiter(stream))
            clock.value = 1000.0
            gate.open()
            with pytest.raises(openai.APIError) as late:
                async for _ in stream:
                    pass
            assert late.value.code == "timeout"

    with running(model, Settings("toy", timeout_s=1000), max_queue=0) as found:
        asyncio.run(ask(found))
