"""Clients that send what is no request, only hold their connections, or do not read: what they are
answered, and that others are served meanwhile."""

import json
import socket
import threading
from contextlib import suppress

import pytest

from tests.runner.test_engine import Gate
from tests.runner.test_server import CHAT, COMPLETIONS, GREEDY, HELLO, text_alone
from tests.serving import SECONDS, answer_of, request_of, running, text_model, wait_until
from tokenloop.runner.server import app, connection
from tokenloop.runner.server.app import Settings

JSON = {"content-type": "application/json"}
KEPT = {"connection": "keep-alive"}


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


def is_served(found) -> bool:
    status, _, data = found.post(COMPLETIONS, {"prompt": "x"} | GREEDY)
    return status == 200 and json.loads(data)["choices"][0]["text"] == text_alone("x", 16)


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    found = b""
    try:
        while piece := client.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def test_a_connection_is_kept_after_an_error_and_used_again(server):
    """Whether the body was read or not."""
    good = json.dumps({"prompt": "x"} | GREEDY).encode()
    wrong = [
        (request_of("POST", "/v1/nothing", b"{}" * 50_000, JSON | KEPT), 404),
        (request_of("GET", CHAT, b"", KEPT), 405),
        (request_of("POST", CHAT, b"x" * 200_000, {"content-type": "text/plain"} | KEPT), 415),
        (request_of("POST", CHAT, b"{", JSON | KEPT), 400),
        (request_of("POST", CHAT, json.dumps(HELLO | {"n": 0}).encode(), JSON | KEPT), 400),
        (request_of("HEAD", "/v1/nothing", b"", KEPT), 404),
    ]
    with server.connect() as client:
        for request, status in wrong:
            client.sendall(request)
            if request.startswith(b"HEAD"):
                head = client.recv(1 << 16)
                assert head.startswith(b"HTTP/1.1 404") and head.endswith(b"\r\n\r\n")
            else:
                assert answer_of(client)[0] == status
            client.sendall(request_of("POST", COMPLETIONS, good, JSON | KEPT))
            status, _, data = answer_of(client)
            assert status == 200
            assert json.loads(data)["choices"][0]["text"] == text_alone("x", 16)


def test_requests_that_do_not_wait_for_answers_are_answered_in_turn(server):
    bodies = [json.dumps({"prompt": p, "max_tokens": 4} | GREEDY).encode() for p in "abc"]
    requests = [request_of("POST", COMPLETIONS, body, JSON | KEPT) for body in bodies]
    with server.connect() as client:
        client.sendall(b"".join(requests[:2]) + requests[2].replace(b"keep-alive", b"close"))
        found = rest_of(client)
    texts = [json.loads(part.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
             for part in found.split(b"HTTP/1.1 200 ")[1:]]  # fmt: skip
    assert texts == [text_alone(prompt, 4) for prompt in "abc"]


def test_head_gives_no_body_and_options_no_leave_to_other_sites(server):
    for path in ("/", "/health", "/v1/models", "/metrics"):
        with server.connect() as client:
            client.sendall(request_of("HEAD", path, b"", {}))
            found = rest_of(client)
        assert found.startswith(b"HTTP/1.1 200 ") and found.endswith(b"\r\n\r\n")
    asks = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for path in (CHAT, "/v1/models", "/"):
        status, headers, data = server.raw(request_of("OPTIONS", path, b"", asks))
        assert (status, json.loads(data)["error"]["message"]) == (405, "Method Not Allowed")
        assert headers["allow"] and not any(name.startswith("access-control") for name in headers)
    status, headers, _ = server.post(CHAT, HELLO, origin="http://evil.example")
    assert status == 200 and not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: other\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        request_of("POST", CHAT, b"", JSON | {"content-length": "-1"}),
        request_of("POST", CHAT, b"", JSON | {"content-length": "9" * 400}),
        request_of("POST", CHAT, b"", JSON | {"content-length": "5\r\ncontent-length: 6"}),
        request_of("POST", CHAT, b"zz\r\n{}", JSON).replace(
            b"content-length: 6", b"transfer-encoding: chunked"
        ),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_http_is_answered_with_400(server, data, caplog):
    with server.connect() as client:
        client.sendall(data)
        found = rest_of(client)
    assert found.startswith(b"HTTP/1.1 400 ") and is_served(server)
    assert "Traceback" not in caplog.text and "Fatal" not in caplog.text


def test_a_head_without_end_is_not_kept(server):
    with server.connect() as client:
        with suppress(OSError):
            client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 20_000_000)
        with suppress(OSError):
            assert client.recv(12) in (b"HTTP/1.1 400", b"")
        # It is over, whatever of the answer came through.
        with pytest.raises(OSError):
            while True:
                client.sendall(b"y")
    assert is_served(server)


def test_what_is_no_http_after_an_answer_ends_the_connection(server, caplog):
    head = request_of("POST", "/v1/nothing", b"", JSON | KEPT)
    head = head.replace(b"content-length: 0", b"transfer-encoding: chunked")
    with server.connect() as client:
        client.sendall(head)
        assert answer_of(client)[0] == 404
        client.sendall(b"zz\r\n")
        assert rest_of(client) == b""
    assert is_served(server) and "Fatal" not in caplog.text


def test_paths_and_headers_of_any_bytes_are_no_fault(server):
    for target in (b"/v1/models/%ff%00", b"/%2e%2e/%2e%2e/etc/passwd", b"//", b"/?" + b"%zz" * 99):
        data = request_of("GET", "/x", b"", {}).replace(b"/x", target, 1)
        assert server.raw(data)[0] in (200, 404)
    data = request_of("GET", "/health", b"", {"x": "y"}).replace(b"x: y", b"x: \xff\xfe")
    assert server.raw(data)[0] == 200


def test_clients_that_only_hold_connections_are_ended_and_stall_nobody(monkeypatch):
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.5)
    slow_head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "
    no_end = request_of("POST", "/v1/nothing", b"", JSON | KEPT | {"content-length": "1000000"})
    with running() as found:
        silent = [found.connect() for _ in range(100)]
        dripping = [found.connect() for _ in range(2)]
        dripping[0].sendall(slow_head)
        dripping[1].sendall(no_end)
        assert answer_of(dripping[1])[0] == 404
        assert is_served(found)
        for client in silent:
            assert rest_of(client) == b""
        for client in dripping:
            # Bytes that come now and then are no request.
            with pytest.raises(OSError):
                while True:
                    client.sendall(b"y")
                    client.settimeout(0.02)
                    try:
                        if client.recv(1) == b"":
                            raise ConnectionResetError
                    except TimeoutError:
                        pass
        for client in silent + dripping:
            client.close()
        assert is_served(found)


def test_a_connection_is_not_ended_while_it_is_used():
    model = text_model(1)
    gate = Gate(model)

    def look(held, done) -> None:
        looked = threading.Event()
        held.loop.call_soon_threadsafe(lambda: (held._look(done), looked.set()))
        assert looked.wait(SECONDS)

    body = json.dumps({"prompt": "x", "max_tokens": 9} | GREEDY).encode()
    with running(model) as found, found.connect() as client:
        client.sendall(request_of("POST", COMPLETIONS, body, JSON | KEPT))
        gate.reached()
        (held,) = found.listening.server_state.connections
        # However often.
        look(held, held.cycle)
        look(held, held.cycle)
        gate.open()
        assert answer_of(client)[0] == 200
        # Nor between two requests, unless the first one was done a whole time ago.
        look(held, connection.NOT_DONE)
        first = held.cycle
        client.sendall(request_of("POST", COMPLETIONS, body, JSON | KEPT))
        assert answer_of(client)[0] == 200
        look(held, first)
        assert not held.transport.is_closing()
        look(held, held.cycle)
        assert rest_of(client) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_is_given_up(monkeypatch, stream):
    """What it has not read is dropped with it, and its connection is gone."""
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(app, "READING_SECONDS", 0.5 - 60)
    model = text_model(2, max_seq_len=60_000)
    with running(model, Settings("toy", timeout_s=60)) as found:
        with found.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            body = {"prompt": "Once", "max_tokens": 1200, "logprobs": 5, "stream": stream} | GREEDY
            data = json.dumps(body).encode()
            slow.sendall(request_of("POST", COMPLETIONS, data, JSON | KEPT))
            assert slow.recv(1) == b"H"
            assert is_served(found)
            connections = found.listening.server_state.connections
            wait_until(lambda: not connections and not found.engine.counts.running)
        assert is_served(found)
