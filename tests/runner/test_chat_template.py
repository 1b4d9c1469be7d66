"""Chat templates are programs of someone else's: bounded in time, memory and text, and shut in."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from tokenloop.runner import chat_template
from tokenloop.runner.chat_template import ChatTemplate
from tokenloop.runner.errors import RunnerError

MESSAGES = {"messages": [{"role": "user", "content": "hi \U0001f600 \ud800"}], "tools": None}


@pytest.fixture
def render(monkeypatch):
    """A function (template, **context) -> its text, with limits that are soon reached."""
    monkeypatch.setattr(chat_template, "PROCESSOR_SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "MEMORY", 128 << 20)

    def render(source, **context):
        return ChatTemplate(Path("chat.jinja"), source.encode()).render(MESSAGES | context)

    return render


def refusal(render, source: str) -> str:
    """The one line that `source` ends in."""
    start = time.perf_counter()
    with pytest.raises(RunnerError) as error:
        render(source)
    assert time.perf_counter() - start < 20
    message = str(error.value)
    assert message.startswith("chat.jinja: ") and message.endswith(", or run without --chat")
    assert "\n" not in message and len(message) < 700
    return message


REPEAT = (
    "{{% set n = namespace(a=7) %}}"
    "{{% for i in range(40) %}}{{% set n.a = {} %}}{{% endfor %}}{{{{ n.a }}}}"
)
EITHER = "it takes more than"
TIME, MEMORY, TEXT = "s of a processor", "128 MB of memory", "8000000 characters"


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            TIME,
        ),
        ("{{ lipsum(n=10**7) }}", TIME),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(99) }}",
            TIME,
        ),
        (REPEAT.format("n.a * n.a"), EITHER),
        ("{{ '%0999999999d' % 3 }}", MEMORY),
        ("{{ '%*d' % (999999999, 3) }}", MEMORY),
        ("{{ '{:>999999999}'.format(3) }}", MEMORY),
        ("{{ 'a' * 2000000000 }}", MEMORY),
        ("{{ [1] * 2000000000 }}", MEMORY),
        ("{{ ('a' * 9999) | replace('', 'b' * 99999) | length }}", MEMORY),
        ("{{ 'a' | center(10**9) | length }}", MEMORY),
        ("{{ 'a' | indent(10**9, true) | length }}", MEMORY),
        ("{{ 'a'.ljust(10**9) }}", MEMORY),
        ("{{ messages | tojson(indent=10**9) | length }}", MEMORY),
        ("{{ range(99999) | join('b' * 99999) | length }}", MEMORY),
        ("{{ [1] | batch(10**9, 'x') | list | length }}", MEMORY),
        (REPEAT.format("n.a ~ n.a"), EITHER),
        (REPEAT.format("[n.a, n.a]"), EITHER),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", TEXT),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion depth"),
        ("{{ raise_exception('ab' * 1000000) }}", "ababab"),
    ],
)  # fmt: skip
def test_a_template_that_takes_too_much_ends_in_one_line(render, template, limit):
    assert limit in refusal(render, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ '' | attr('__class__') }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ ('{0.__class__}' | attr('format'))('') }}",
        "{{ ['{0.__class__}'] | map('format', '') | list }}{{ [''] | map(attribute='__class__') "
        "| list | first }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_gets_at_nothing_outside(render, template):
    # What is unsafe is undefined, and an error where it is used.
    try:
        assert render(template) == ""
    except RunnerError:
        refusal(render, template)


def test_what_leaves_the_sandbox_can_open_and_start_nothing(render, monkeypatch):
    """As if a template had the functions of Python: its process may not."""
    process = Path(chat_template.__file__).with_name("template_process.py").read_text()
    added = "raise_exception=raise_exception, open=open, system=__import__('os').fork,"
    assert (found := "raise_exception=raise_exception,") in process
    script = process.replace(found, added)

    def popen(command, **options):
        return started([*command[:-1], "-c", script], **options)

    import subprocess

    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    assert "Too many open files" in refusal(render, "{{ open('/etc/passwd').read() }}")
    if os.geteuid():
        assert "unavailable" in refusal(render, "{{ system() }}")


def test_the_next_conversation_is_rendered_after_one_that_was_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "PROCESSOR_SECONDS", 0.3)
    template = ChatTemplate(
        Path("chat.jinja"),
        b"{% for m in messages %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        b"{% endfor %}{% else %}empty{% endfor %}",
    )
    for _ in range(2):
        with pytest.raises(RunnerError, match="more than 0.3 s of a processor"):
            template.render(MESSAGES)
        assert template.render({"messages": []}) == "empty"


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    template = ChatTemplate(
        Path("chat.jinja"), b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        b"{% endfor %}",
    )  # fmt: skip
    with pytest.raises(RunnerError, match="more than 0.3 s:"):
        template.render({})


def test_one_process_serves_all_conversations_and_threads():
    process = texts_of_threads(ChatTemplate(Path("chat.jinja"), b"{{ n }}"))
    # It ends with its template.
    assert process.wait(5) < 0


def texts_of_threads(template: ChatTemplate):
    """Render in four threads at once; the process that rendered all of it."""
    texts = {}

    def ask(first):
        for n in range(first, first + 50):
            texts[n] = template.render({"n": n})

    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(4)]
    template.render({"n": 0})
    process = template._process
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {n: str(n) for n in texts} and len(texts) == 200
    assert template._process is process
    return process


def test_a_forked_process_renders_for_itself():
    template = ChatTemplate(Path("chat.jinja"), b"{{ n }}")
    template.render({"n": 0})
    child = os.fork()
    if not child:
        status = 70
        try:
            status = int(template.render({"n": 7}) != "7")
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert template.render({"n": 1}) == "1"


def test_any_text_comes_back_as_it_is(render):
    text = "\x00 \r\n \U0001f600 \ud800 \u2028"
    assert render("{{ text }}", text=text) == text
    assert len(render("{{ 'ab' * 1000000 }}")) == 2_000_000


def test_what_jinja_imports_late_is_there(render):
    template = "{{ '\\N{DIGIT ONE}' }}{{ 'a b' | wordwrap(1) }}{{ [1] | pprint }}{{ lipsum(1) }}"
    assert render(template).startswith("1a\nb[1]")


@pytest.mark.parametrize("value", [{1, 2}, object(), [b"x"]])
def test_messages_that_are_no_json_are_refused(render, value):
    with pytest.raises(RunnerError, match="the messages are no JSON"):
        render("x", messages=value)


def test_a_template_that_is_no_utf8_is_refused():
    with pytest.raises(RunnerError, match="chat.jinja: 'utf-8' codec can't decode byte 0xff"):
        ChatTemplate(Path("chat.jinja"), b"\xff")


def test_a_python_that_cannot_be_started_is_named(render, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "no process to render it (No such file or directory)" in refusal(render, "x")
