"""`tokenloop run --interactive`: a chat, line by line."""

import io
import sys

import pytest

from tests.serving import text_model
from tokenloop.runner import LoopOptions, Request, RunnerError
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
    with pytest.raises(RunnerError, match="half a surrogate pair"):
        talk(text_model(1), b"\xff\n")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RunnerError, match="^standard input is closed, and --interactive reads it$"):
        chat(text_model(1), REQUEST, LoopOptions(), None)


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
