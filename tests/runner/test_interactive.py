"""`tokenloop run --interactive`: a chat, line by line."""

import builtins
import io
import sys

import pytest

from tests.serving import text_model
from tokenloop.runner import LoopOptions, Request, RunnerError, interactive
from tokenloop.runner.interactive import chat
from tokenloop.runner.run import parse_arguments

REQUEST = Request("", 6)


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function: what is said to a model, as bytes -> the lines that it prints."""

    def answers(model, said: bytes, system: str | None = None) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="ascii"))
        assert chat(model, REQUEST, LoopOptions(), system) == 0
        return capsys.readouterr().out.splitlines()

    return answers


def alone(prompt: str) -> str:
    model = text_model(1)
    return model.generate(Request(model.tokenizer.encode(prompt), 6)).run().text


def test_each_line_is_answered_with_all_before_it_in_mind(talk):
    first = alone("<user>Hé<model>")
    second = alone(f"<user>Hé<assistant>{first}<user>x<model>")
    said = "Hé\n\n  \nx\n/new\nHé".encode()
    assert talk(text_model(1), said) == [first, second, first]


def test_every_chat_begins_with_the_systems_message(talk):
    first = alone("<system>Be brief<user>Hi<model>")
    assert talk(text_model(1), b"Hi\n/new\nHi", "Be brief") == [first, first]


def test_an_interrupt_ends_an_answer_and_not_the_chat(talk, monkeypatch):
    model, pushed = text_model(1), []

    def push(token_id):
        pushed.append(token_id)
        if len(pushed) == 3:
            raise KeyboardInterrupt
        return type(model.tokenizer)._text(token_id)

    monkeypatch.setattr(model.tokenizer, "push", push)
    first = alone("<user>Hello<model>")[:4]
    second = alone(f"<user>Hello<assistant>{first}<user>x<model>")
    assert talk(model, b"Hello\nx\n") == [first, second]


def test_what_cannot_be_asked_is_one_line(talk, monkeypatch):
    with pytest.raises(RunnerError, match="^what was asked is not UTF-8 text: byte 1 is wrong$"):
        talk(text_model(1), b"a\xff\n")
    with monkeypatch.context() as patch, pytest.raises(RunnerError, match="no end in 1 MiB$"):
        patch.setattr(interactive, "MOST_BYTES", 1 << 20)
        talk(text_model(1), b"a" * (1 << 20))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RunnerError, match="^standard input is closed, and --interactive reads it$"):
        chat(text_model(1), REQUEST, LoopOptions(), None)


def test_lines_are_read_as_prompts_are(talk):
    first = alone("<user>Hi<model>")
    assert talk(text_model(1), b"\xef\xbb\xbf/new \r\nHi\r\n/new\rHi") == [first, first]


def test_in_a_terminal_a_line_that_cannot_be_asked_is_taken_back(talk, monkeypatch, capsys):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    first = alone("<user>Hé<model>")
    second = alone(f"<user>Hé<assistant>{first}<user>x<model>")
    long, model = "a" * 300, text_model(1)
    with pytest.raises(RunnerError, match="tokens and the cache"):
        talk(model, f"Hé\n{long}\n".encode())
    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    asked = iter(["Hé", long, "x"])

    def asking(_) -> str:
        if (line := next(asked, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", asking)
    capsys.readouterr()
    assert talk(model, b"") == [first, second, ""]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["Hello"], "the prompts"),
        (["--batch", "2"], "--batch"),
        (["--json"], "--json"),
        (["--messages", "chat.json"], "--messages"),
    ],
)
def test_flags_that_a_chat_has_no_use_for_are_refused(arguments, what, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--interactive", *arguments], "tokenloop run")
    assert f"line by line: leave out {what}\n" in capsys.readouterr().err
