"""What is asked with messages: from Python, from --messages and --system, and what is refused."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tokenloop.runner import prompts
from tokenloop.runner.chat_template import ChatTemplate
from tokenloop.runner.conversation import Conversation, as_conversation
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.prompts import KEYS, read_requests
from tokenloop.runner.request import Request, is_bias

USER = {"role": "user", "content": "hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Conversation([]), "messages is an empty list; it must be a list of at least one message"),
        (Conversation("hi"), "messages is of type str"),
        (Conversation([USER, "hi"]), "message 2 is of type str; it must be an object"),
        (Conversation([{"content": "hi"}]), "message 1 has the role None; it must be a name"),
        (Conversation([{"role": "user", "content": 3}]), "the content of message 1 is of type int"),
        (
            Conversation([USER, IMAGE]),
            "part 1 of the content of message 2 is of type 'image_url'; only parts of type 'text'",
        ),
        (Conversation([{"role": "user", "content": ["a"]}]), "part 1 .* is of type None"),
        (Conversation([USER], tools={"a": 1}), "tools is of type dict; it must be a list of obj"),
        (Conversation([USER], documents=["a"]), "documents has an item of type str; it must be"),
        (Conversation([USER], continue_final_message=1), "continue_final_message is of type int"),
        (
            Conversation([USER, {"role": "assistant"}], continue_final_message=True),
            "the last message has no text",
        ),
        (Conversation([USER], chat_template_kwargs=[1]), "chat_template_kwargs is of type list"),
        (
            Conversation([USER], chat_template_kwargs={"messages": []}),
            "chat_template_kwargs has messages, which the conversation itself says",
        ),
    ],
)
def test_a_conversation_that_is_none_is_refused_with_what_would_be_right(asked, message):
    with pytest.raises(RunnerError, match=message):
        asked.check()


def test_only_lists_of_messages_are_conversations():
    for prompt in ("text", [1, 2], [], ["a"], b"ab", {"role": "user"}, None):
        assert as_conversation(prompt) is None
    assert as_conversation([USER]) == Conversation([USER])
    assert Request("hi", chat=True).conversation() == Conversation([USER])
    assert Request("hi").conversation() is None
    assert Request([USER]).prompt_as_json() == [USER]
    assert Request(Conversation([USER], tools=[])).prompt_as_json() == [USER]


def test_the_context_is_that_of_transformers():
    asked = [{"role": "assistant", "content": "x", "reasoning": "because", "tool_calls": None}]
    context = Conversation(asked, chat_template_kwargs={"enable_thinking": False}).context()
    assert context == {
        "messages": [
            {"role": "assistant", "content": "x", "reasoning": "because", "thinking": "because",
             "reasoning_content": "because"}
        ],
        "tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": False,
    }  # fmt: skip
    assert Conversation([USER], continue_final_message=True).context()["add_generation_prompt"] is (
        False
    )
    with pytest.raises(RunnerError, match="are both true"):
        Conversation([USER], continue_final_message=True).context(add_generation_prompt=True)


@pytest.mark.parametrize("message", [USER | {"content": "ab "}, PARTS])
def test_what_is_continued_ends_the_text(message):
    asked = Conversation([message], continue_final_message=True)
    (open_message,) = asked.context()["messages"]
    content = open_message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    assert asked.finish(f"<s>{text}</s>") in ("<s>ab ", "<s>ab")
    # A template that trims takes the space that ended the message, too.
    assert asked.finish(f"<s>{text.strip()}</s>") == "<s>ab"
    with pytest.raises(RunnerError, match="leaves out or changes the last message|in parts"):
        asked.finish("<s></s>")


def test_a_template_may_look_for_the_end_of_what_is_continued():
    """As that of LFM2.5 does. The text is transformers', also of words that name the mark."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% set mark = 'CONTINUE_FINAL_MESSAGE_TAG ' %}{% for m in messages %}"
        "{% if m.content.endswith(mark) %}{{ m.content[:-(mark | length)] }}[calls]{{ mark }}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    template = ChatTemplate(Path("chat.jinja"), source.encode())
    for words in ("hi", "CONTINUE_FINAL_MESSAGE_TAG is"):
        messages = [USER | {"content": words}, {"role": "assistant", "content": "ab"}]
        asked = Conversation(messages, continue_final_message=True)
        ((expected,), _) = render_jinja_template(
            [messages], chat_template=source, continue_final_message=True
        )
        assert asked.finish(template.render(asked.context())) == expected
        assert expected == f"{words}</s>ab[calls]"


@pytest.mark.parametrize("text", ["<s>a</s>", f"<s>{PARTS['content']}</s>", "<s>"])
def test_a_template_that_takes_no_parts_is_refused(text):
    with pytest.raises(RunnerError, match="does not take message 2's content in parts: give it as"):
        Conversation([USER, PARTS]).finish(f"hi{text}")


def test_a_template_may_write_parts_in_its_own_way():
    assert Conversation([PARTS]).finish("<s>b a</s>") == "<s>b a</s>"
    earlier = PARTS | {"role": "assistant"}
    assert Conversation([earlier, USER]).finish("<s>hi") == "<s>hi"


# From the command line


@pytest.fixture
def read(tmp_path):
    """A function (prompts, **options) -> the requests' prompts; files are given by contents."""

    def read(*prompts, **options):
        flags = Namespace(
            prompts=list(prompts), prompt_file=None, batch=None, chat=False, system=None,
            messages=None, json_object=False, **{key: getattr(Request, key) for key in KEYS[1:]},
        )  # fmt: skip
        for name, suffix in (("messages", ".json"), ("prompt_file", ".jsonl")):
            if name in options:
                path = tmp_path / f"{name}{suffix}"
                path.write_text(options[name], encoding="utf-8")
                options[name] = path
        return [request.prompt for request in read_requests(Namespace(**vars(flags) | options))]

    return read


SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_systems_message_goes_before_each_prompt(read):
    file = json.dumps([USER])
    lines = json.dumps({"prompt": [USER]}) + "\n" + json.dumps({"prompt": "yo"})
    prompts = read("hi", system="Be brief.", messages=file, prompt_file=lines, batch=2)
    assert prompts[0] == [SYSTEM, USER]
    assert prompts[1] == Conversation([SYSTEM, USER])
    assert prompts[2] == [SYSTEM, USER | {"content": "yo"}]
    assert prompts[3] == Conversation([SYSTEM, USER])


def test_messages_are_one_more_prompt_and_none_is_made_up(read):
    whole = {"messages": [USER], "tools": [{"name": "f"}], "continue_final_message": True}
    assert read(messages=json.dumps(whole)) == [Conversation(**whole)]
    assert read("a", messages=json.dumps([USER])) == ["a", Conversation([USER])]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("{", "messages.json is not JSON: "),
        ("[" * 100_000, "messages.json is not JSON: it is nested too deeply"),
        (
            '[{"role": "user", "content": "a", "content": "b"}]',
            "the key 'content' stands there twice",
        ),
        ('[{"role": "user", "content": "a", "n": NaN}]', "NaN is no number of JSON"),
        ("3", "messages.json holds no messages; a list of them, or an object, is right"),
        ('{"tools": []}', "holds no messages"),
        ('{"messages": [], "model": "x"}', "has the key 'model'; the keys are messages, tools, "),
        ("[]", "messages is an empty list"),
        ('[{"role": 1}]', "messages.json: message 1 has the role 1"),
    ],
)
def test_a_file_without_messages_is_refused(read, file, message):
    with pytest.raises(RunnerError, match=message):
        read(messages=file)


def test_a_systems_message_that_has_no_place_is_refused(read):
    with pytest.raises(RunnerError, match="a conversation has a system's message: leave one"):
        read(system="x", messages=json.dumps([SYSTEM, USER]))
    with pytest.raises(RunnerError, match="a prompt is token ids: give that one as text"):
        read(system="x", prompt_file='{"prompt": [1, 2]}', batch=1)


def test_keys_of_a_bias_are_ids_as_they_are_written():
    def bias(*keys: str) -> dict:
        line = json.dumps({"prompt": "a", "logit_bias": dict.fromkeys(keys, 1)})
        return prompts.entry("line 1", line)["logit_bias"]

    assert bias("5", "10", "0") == {5: 1, 10: 1, 0: 1}
    # A zero before it, digits that are not ASCII, more of them than Python reads.
    for key in ("05", "\u0665", "5" * 5000):
        assert not is_bias(bias(key))


def test_what_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_BYTES", 1 << 20)
    with pytest.raises(RunnerError, match="^--messages /dev/zero has more than 1 MiB: divide it$"):
        prompts.read_file(Path("/dev/zero"), "--messages")
    with Path("/dev/zero").open() as zeros, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", zeros)
        with pytest.raises(RunnerError, match="^standard input has more than 1 MiB: divide it$"):
            prompts.read_stdin()
