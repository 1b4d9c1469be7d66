"""A server in this process, over a program that no artifact is needed for, and what talks to it."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.threads import VOCABULARY, YieldingProgram, yielding_model
from tokenloop.runner.chat_template import ChatTemplate
from tokenloop.runner.engine import Engine
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.grammar import Grammars
from tokenloop.runner.loop import Loop
from tokenloop.runner.model import Model
from tokenloop.runner.server.app import Server, Settings
from tokenloop.runner.server.listening import Listening
from tokenloop.runner.tokenizer import Tokenizer

SECONDS = 120  # after which whatever is waited for fails


class TextTokenizer:
    """A byte for an id, but for 0 to 96 letters of which are printed: in place of an artifact's."""

    eos_token_ids = (0,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return [byte % 97 for byte in text.encode()]
        except UnicodeEncodeError:
            raise RunnerError("half a surrogate pair") from None

    def decode(self, ids) -> str:
        return "".join(map(self._text, ids))

    def template_source(self, with_tools: bool = False) -> str:
        return "<role>content<model>"

    def apply_chat_template(self, conversation) -> str:
        messages = getattr(conversation, "messages", conversation)
        if not all(isinstance(message["content"], str) for message in messages):
            raise RunnerError("the chat template does not take message 1's content in parts")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<model>"

    def encode_conversation(self, conversation) -> list[int]:
        return self.encode(self.apply_chat_template(conversation))

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._text(token_id).encode() if token_id else None

    def token_name(self, token_id: int) -> str:
        return "<end>"

    def stream(self, shown_tokens=()):
        return self

    def push(self, token_id: int) -> str:
        return self._text(token_id)

    def finish(self) -> str:
        return ""

    @staticmethod
    def _text(token_id: int) -> str:
        # Letters of one, two and four bytes.
        return "eö😀"[token_id % 3] + chr(97 + token_id % 26)


def text_model(rows: int = 3, max_seq_len: int = 200) -> Model:
    """A model of texts."""
    model = yielding_model(rows, max_seq_len)
    model.tokenizer = TextTokenizer()
    model.grammars = Grammars(model.tokenizer, VOCABULARY)
    model.manifest["sha256"] = "0123456789abcdef" * 4
    return model


class EchoTokenizer:
    """An id for each printable ASCII character and the line break, and real chat templates."""

    eos_token_ids = (0,)
    _special_tokens: dict[str, str] = {}
    apply_chat_template = Tokenizer.apply_chat_template
    template_source = Tokenizer.template_source
    _template = Tokenizer._template
    letters = "\n" + "".join(map(chr, range(32, 127)))

    def __init__(self, template: str):
        path = Path("chat_template.jinja")
        self._templates = {"chat_template": ChatTemplate(path, template.encode())}
        self.encoded: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded.append(text)
        return [self.letters.index(letter) + 1 for letter in text]

    def decode(self, ids) -> str:
        return "".join(map(self.push, ids))

    def token_bytes(self, token_id: int) -> bytes | None:
        return self.push(token_id).encode() or None

    def token_name(self, token_id: int) -> str:
        return "<end>"

    def stream(self, shown_tokens=()):
        return self

    def push(self, token_id: int) -> str:
        return self.letters[token_id - 1] if token_id else ""

    def finish(self) -> str:
        return ""


class EchoProgram(YieldingProgram):
    """After "<model>" it writes what stands before it between the last "[[" and "]]", and ends. The
    prompt may have begun that."""

    _ascii = np.frombuffer(EchoTokenizer.letters.encode(), np.uint8)

    def _logits(self, row, last):
        so_far = self._ascii[self._state[row, : last + 1] - 1].tobytes().decode()
        prompt, _, answer = so_far.rpartition("<model>")
        said = prompt.rpartition("[[")[2].partition("]]")[0]
        logits = np.zeros((1, VOCABULARY), np.float32)
        left = said[len(answer) :]
        logits[0, EchoTokenizer.letters.index(left[0]) + 1 if left else 0] = 1
        return logits


def echo_model(template: str, rows: int = 3, max_seq_len: int = 2000) -> Model:
    """A model that says what its prompt says that it should, with this chat template."""
    model = yielding_model(rows, max_seq_len)
    model.loop = Loop(EchoProgram(rows, max_seq_len, 64))
    model.manifest = model.loop.program.manifest | {"sha256": "0123456789abcdef" * 4}
    model.tokenizer = EchoTokenizer(template)
    model.grammars = Grammars(model.tokenizer, VOCABULARY)
    return model


class Running:
    """A server that runs in a thread: its `port`, the `engine`, and `get` and `post`."""

    def __init__(self, model: Model, settings: Settings, **options):
        self.engine = Engine(model, **options)
        self.server = Server(self.engine, settings)
        self._socket = socket.socket()
        # Whoever does not read soon has the server wait.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        started = threading.Event()
        self.listening = Listening(self.server, self.engine, 0, started.set)
        self._thread = threading.Thread(
            target=self.listening.run, kwargs={"sockets": [self._socket]}
        )
        self._thread.start()
        assert started.wait(SECONDS)

    def close(self) -> None:
        self.listening.should_exit = True
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def raw(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what is answered to these bytes."""
        with self.connect() as connection:
            connection.sendall(data)
            return answer_of(connection)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.raw(request_of("GET", path, b"", headers))

    def post(self, path: str, body, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """`body` is sent as JSON, and bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        headers = {"content-type": "application/json"} | given
        return self.raw(request_of("POST", path, data, headers))


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def request_of(method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    given = {"host": "localhost", "connection": "close", "content-length": str(len(body))}
    lines = [f"{name}: {text}" for name, text in (given | headers).items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; chunks are joined."""
    import http.client

    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def events_of(body: bytes) -> list:
    """The objects of server-sent events, and at the end "[DONE]" if it is there."""
    events = body.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    texts = [event.removeprefix("data: ") for event in events]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


@contextlib.contextmanager
def running(model: Model | None = None, settings: Settings | None = None, **options) -> Iterator:
    server = Running(model or text_model(), settings or Settings("toy"), **options)
    try:
        yield server
    finally:
        server.close()
