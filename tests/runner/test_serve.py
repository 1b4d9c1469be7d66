"""`runner/serve.py` with an artifact, as a process, and OpenAI's own client against it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from tests.serving import SECONDS, answer_of, request_of, running, text_model
from tokenloop import runner
from tokenloop.runner import Request

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS = "/v1/completions"


class Process:
    """`runner/serve.py` with these arguments: its `port`, and `lines`, what it said so far."""

    def __init__(self, *arguments, cwd: Path, **env: str):
        command = [sys.executable, ROOT / "runner" / "serve.py", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=cwd, stderr=subprocess.PIPE, text=True,
            env=os.environ | env,
        )  # fmt: skip
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(SECONDS), self.lines
        self.ready = re.search(r"^(.*), (\d+) rows?, on http://127.0.0.1:(\d+) ", self.lines[-1])
        self.port = int(self.ready[3])

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if " on http://" in line:
                self._ready.set()
        self._ready.set()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return status


@pytest.fixture(scope="module")
def served(batch_artifact, tmp_path_factory):
    # With no flags it is the default artifact.
    directory = tmp_path_factory.mktemp("serve")
    (directory / "artifacts").mkdir()
    (directory / "artifacts" / "gemma3-xnnpack").symlink_to(batch_artifact)
    found = Process("--threads", 1, "--max-stall-ms", 0, cwd=directory, TOKENLOOP_API_KEY="sesame")
    yield found
    assert found.end() == -signal.SIGTERM
    assert "Traceback" not in "".join(found.lines)


def client_of(port: int, kind=openai.OpenAI, key: str = "sesame"):
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def test_the_client_lists_completes_and_streams(served):
    assert served.ready[2] == "3"
    with client_of(served.port) as client:
        (model,) = client.models.list().data
        assert model.id == "gemma3-xnnpack"
        whole = client.completions.create(
            model=model.id, prompt="Once", max_tokens=20, temperature=0, logprobs=3,
            extra_body={"top_k": 5},
        )  # fmt: skip
        stream = client.completions.create(
            model=model.id, prompt="Once", max_tokens=20, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].text for chunk in stream]
    assert whole.choices[0].text == "".join(pieces)
    assert whole.usage.completion_tokens == 20
    found = whole.choices[0].logprobs
    # The likeliest token was taken, and the others are less likely.
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert logprob == max(top.values()) == top[token] <= 0
    assert len(found.tokens) == 20


def test_the_client_knows_what_it_is_refused_for(served):
    with client_of(served.port) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="no", prompt="Once", suffix="x")
        assert refused.value.param == "suffix" and refused.value.code == "unsupported_parameter"
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            message = {"role": "user", "content": "Hello"}
            client.chat.completions.create(model="gemma3-xnnpack", messages=[message])
        with pytest.raises(openai.NotFoundError, match="this server has"):
            client.completions.create(model="no", prompt="Once")
    with client_of(served.port, key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_prompts_log_probabilities_are_those_it_was_generated_with(served, batch_artifact):
    prompt = [2, *range(60, 79)]
    model = runner.load(batch_artifact, 1)
    result = model.generate(Request(prompt, 20, logprobs=0)).run()
    with client_of(served.port) as client:
        echo = client.completions.create(
            model="gemma3-xnnpack", prompt=prompt + result.token_ids, max_tokens=1, echo=True,
            logprobs=0, temperature=0,
        )  # fmt: skip
    found = echo.choices[0].logprobs.token_logprobs
    assert found[0] is None and len(found) == 20 + 20 + 1
    generated = [one.logprob for one in result.logprobs]
    assert found[20:40] == pytest.approx(generated, abs=1e-4)


def test_the_clients_chat_is_answered_and_streamed():
    message = {"role": "user", "content": "Hello"}
    asked = {"model": "toy", "messages": [message], "max_completion_tokens": 12, "seed": 5, "n": 2}

    async def stream(port):
        async with client_of(port, openai.AsyncOpenAI) as client:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            texts, usage = ["", ""], None
            async for chunk in await client.chat.completions.create(**asked, **options):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            return texts, usage

    with running() as found:
        with client_of(found.port) as client:
            whole = client.chat.completions.create(**asked)
        texts, usage = asyncio.run(stream(found.port))
    model, alone = text_model(1), []
    ids = model.tokenizer.encode("<user>Hello<model>")
    for seed in (5, 6):
        alone.append(model.generate(Request(ids, 12, temperature=1.0, seed=seed)).run())
    expected = [one.text for one in alone]
    assert [choice.message.content for choice in whole.choices] == texts == expected
    assert [choice.finish_reason for choice in whole.choices] == [a.finish_reason for a in alone]
    assert usage == whole.usage
    assert usage.completion_tokens == sum(len(one.token_ids) for one in alone)


def test_of_a_thousand_requests_at_64_clients_none_is_lost_or_mixed_up(served, tiny_artifact):
    alone = runner.load(tiny_artifact, 1)
    asked = []
    for n in range(40):
        sampled = {"temperature": 0.9, "top_p": 0.9, "seed": n} if n % 3 else {"temperature": 0.0}
        ids = [2, *(i * (n + 3) % 256 + 3 for i in range((1, 4, 9, 17, 40)[n % 5]))]
        result = alone.generate(Request(ids, 3 + n % 9, **sampled)).run()
        body = {"prompt": ids, "max_tokens": 3 + n % 9, **sampled}
        asked.append((body, result.text, result.finish_reason))

    async def one(client, limit, n):
        body, text, reason = asked[n * 7 % 40]
        async with limit:
            body = body | {"extra_body": {"top_k": 0}, "model": "gemma3-xnnpack"}
            if n % 2:
                whole = await client.completions.create(**body)
                found = whole.choices[0].text, whole.choices[0].finish_reason
            else:
                chunks = [c async for c in await client.completions.create(**body, stream=True)]
                pieces = [chunk.choices[0].text for chunk in chunks]
                found = "".join(pieces), chunks[-1].choices[0].finish_reason
        return found == (text, reason)

    async def all_of_them():
        limit = asyncio.Semaphore(64)
        async with client_of(served.port, openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, limit, n) for n in range(1000)))

    assert asyncio.run(all_of_them()) == [True] * 1000


def test_a_hundred_megabytes_are_refused_and_dropped(served):
    size = 100_000_000
    headers = {"content-type": "application/json", "authorization": "Bearer sesame"}
    head = request_of("POST", COMPLETIONS, b"", headers | {"content-length": str(size)})
    with socket.create_connection(("127.0.0.1", served.port), SECONDS) as connection:
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b" " * (size // 100))
        status, _, data = answer_of(connection)
    assert (status, json.loads(data)["error"]["type"]) == (413, "invalid_request_error")
    fields = Path(f"/proc/{served.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", fields)[1]) < 300_000


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_signal_ends_it_once_what_runs_has_ended(batch_artifact, tmp_path, number, status):
    found = Process("--artifact", batch_artifact, "--threads", 1, cwd=tmp_path)
    body = {"prompt": "Once", "max_tokens": 100, "temperature": 0, "stream": True}
    head = {"content-type": "application/json"}
    with socket.create_connection(("127.0.0.1", found.port), SECONDS) as connection:
        connection.sendall(request_of("POST", COMPLETIONS, json.dumps(body).encode(), head))
        first = connection.recv(1)
        assert found.end(number) == status
        rest = b""
        while piece := connection.recv(1 << 16):
            rest += piece
    assert first + rest[:8] == b"HTTP/1.1 "
    assert b"data: [DONE]\n\n" in rest
    assert "Traceback" not in "".join(found.lines)


def run_serve(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "runner" / "serve.py", *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=SECONDS
    )


def test_mistakes_end_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, reason in (
            (("--artifact", "nowhere", "--port", 0), "nowhere is not an artifact directory"),
            (("--port", port), f"--port {port} of 127.0.0.1: Address already in use"),
            (("--host", "a" * 64), f"--host {'a' * 64}: "),
            (("--port", 65536), "--port is 65536; it must be 0 to 65535"),
            (("--max-queue", -1), "--max-queue is -1; it must be at least 0"),
            (("--max-stall-ms", "nan"), "--max-stall-ms is nan; it must be a finite number, 0"),
            (("--prefix-cache-mb", -1), "--prefix-cache-mb is -1.0; it must be a finite number, 0"),
            (("--timeout", 0), "--timeout is 0.0; it must be a finite number above 0"),
            (("--api-key", ""), "--api-key must be of one or more ASCII characters"),
            (("--api-key", "key\n"), "--api-key must be of one or more ASCII characters without"),
        ):
            done = run_serve(*arguments, cwd=tmp_path)
            assert (done.returncode, done.stdout) == (2, "")
            last = done.stderr.splitlines()[-1]
            assert last.startswith(f"runner/serve.py: error: {reason}")
            assert "Traceback" not in done.stderr
