"""What a model's text is made of, and the same of a text that comes in pieces."""

import json
import random

import pytest

from tokenloop.runner.server.reader import (
    GEMMA4_CALLS,
    GEMMA4_REASONING,
    QWEN3_CALLS,
    QWEN3_REASONING,
    Call,
    Reader,
    call_format,
    reasoning_format,
)

QWEN3 = QWEN3_REASONING, QWEN3_CALLS
GEMMA4 = GEMMA4_REASONING, GEMMA4_CALLS
PARIS = '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>'
CALL_OF_PARIS = ("f", {"city": "Paris"})


def read(reader: Reader, pieces) -> tuple[str, str, list[Call]]:
    parts = [*map(reader.push, pieces), reader.finish()]
    return (
        "".join(part.reasoning for part in parts), "".join(part.content for part in parts),
        [call for part in parts for call in part.calls],
    )  # fmt: skip


def parts_of(text: str, formats, is_open: bool = False) -> tuple[str, str, list]:
    reasoning, content, calls = read(Reader(*formats, is_open), [text])
    return reasoning, content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello\n", ("", "Hello\n", [])),
        (" \n", ("", " \n", [])),
        ("", ("", "", [])),
        ("<think>\na\n\nb\n</think>\n\nHello\n", ("a\n\nb", "Hello\n", [])),
        ("\n<think>a", ("a", "", [])),
        ("<think>\n\n</think>\n\nHello", ("", "Hello", [])),
        ("<think>a\n</thin", ("a\n</thin", "", [])),
        # Reasoning is at the beginning and nowhere else.
        ("a <think>b</think>", ("", "a <think>b</think>", [])),
        ("<thin", ("", "<thin", [])),
        (PARIS, ("", "", [CALL_OF_PARIS])),
        (f"<think>a</think>\n{PARIS}\n{PARIS}\n", ("a", "", [CALL_OF_PARIS] * 2)),
        (f"Sure.\n{PARIS}\nDone. ", ("", "Sure.\nDone. ", [CALL_OF_PARIS])),
        # The end within a string is text.
        (
            '<tool_call>{"name": "f", "arguments": {"a": "\\"</tool_call>"}}</tool_call>',
            ("", "", [("f", {"a": '"</tool_call>'})]),
        ),
        # In reasoning there are no calls.
        (f"<think>{PARIS}</think>", (PARIS, "", [])),
    ],
)
def test_qwens_text_is_divided(text, expected):
    assert parts_of(text, QWEN3) == expected


@pytest.mark.parametrize(
    "body",
    [
        "", "f", "{", '{"name": "f"}', '{"name": "f", "arguments": "{}"}', '["f", {}]',
        '{"name": 1, "arguments": {}}', '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": {}, "more": 1}', '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": 1, "a": 2}}',
        '{"name": "f", "arguments": {}} {}', '{"name": "f", "arguments": {"a": "}}',
        '{"name": "f", "arguments": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    ],
    ids=lambda body: body[:40],
)  # fmt: skip
def test_a_call_that_cannot_be_read_is_content_as_it_stands(body):
    text = f"Sure. \n<tool_call>{body}</tool_call>\n "
    assert parts_of(text, QWEN3) == ("", text, [])
    if '"a": "}' not in body:
        # In the one with a string that is open the other call may be part of that.
        found = parts_of(f"{text}\n{PARIS}", QWEN3)
        assert found == ("", text.rstrip(), [CALL_OF_PARIS])
    assert parts_of(text.removesuffix("</tool_call>\n "), QWEN3)[1:] == (
        text[: -len("</tool_call>\n ")],
        [],
    )


def test_a_marker_that_begins_no_call_holds_nothing_back():
    reader = Reader(*QWEN3)
    assert reader.push("In <tool_call> t").content == "In <tool_call> t"
    assert reader.push("ags and <tool_").content == "ags and"
    assert reader.push("box").content == " <tool_box"


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("call:f{}", {}),
        ('call:f{city:<|"|>Paris, {a}: "x"\n\\<|"|>,days:3}',
         {"city": 'Paris, {a}: "x"\n\\', "days": 3}),
        ('call:f{a:{b:[1.5,true,null,None,<|"|>c<|"|>]}, d : -1e3}',
         {"a": {"b": [1.5, True, None, None, "c"]}, "d": -1000.0}),
        ('call:f{<|"|>a b<|"|>:1}', {"a b": 1}),
        ('call:f{a:<|"|><tool_call|><|"|>}', {"a": "<tool_call|>"}),
        ('call:f{a:<|"|>None<|"|>,None:1}', {"a": "None", "None": 1}),
    ],
)  # fmt: skip
def test_gemmas_calls_are_read(body, arguments):
    text = f"<|channel>thought\nHm\n<channel|>Sure.<|tool_call>{body}<tool_call|>"
    assert parts_of(text, GEMMA4) == ("Hm", "Sure.", [("f", arguments)])


@pytest.mark.parametrize(
    "body",
    [
        "", "call:", "call:f", "call:{}", "f{}", "call:f{a:Paris}", 'call:f{a:"b"}', "call:f{a}",
        'call:f{"a":1}', "call:f{a:1,a:2}", "call:f{a:1}{}", 'call:f{a:<|"|>b}', "call:f{a:NaN}",
        "call:f{a:1 b:2}", "call:f{a:1e999}", "call:f{a:" + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=lambda body: body[:40],
)  # fmt: skip
def test_what_is_none_of_gemmas_calls_is_content(body):
    text = f"Sure. <|tool_call>{body}<tool_call|>"
    assert parts_of(text, GEMMA4) == ("", text, [])


def test_reasoning_that_the_prompt_began_ends_where_it_says():
    assert parts_of("\na\n</think>\n\nb", QWEN3, True) == ("a", "b", [])
    assert parts_of("a", QWEN3, True) == ("a", "", [])


def test_what_is_not_looked_for_is_content():
    text = f"<think>a</think>\n\n{PARIS}\n"
    assert parts_of(text, (None, None)) == ("", text, [])
    assert parts_of(text, (QWEN3_REASONING, None)) == ("a", f"{PARIS}\n", [])


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", PARIS, '{"name": "f", "arguments": {}}',
    "\n", "\n\n", " ", "a", "ö😀", '"', "\\", "{", "<", "call:", "<|tool_call>", "<tool_call|>",
    '<|"|>', "call:f{a:1}", "<|tool_call>call:f{}<tool_call|>", "<|channel>thought", "<channel|>",
    "<|tool_call>call:f{a:<|\"|>b<|\"|>}<tool_call|>",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_however_a_text_is_cut_its_parts_are_the_same_and_nothing_is_lost(seed):
    draw = random.Random(seed)
    for _ in range(300):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 12)))
        formats, is_open = draw.choice([QWEN3, GEMMA4]), draw.random() < 0.3
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, len(text))))
        cut = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        reasoning, content, calls = read(Reader(*formats, is_open), [text])
        assert read(Reader(*formats, is_open), cut) == (reasoning, content, calls)
        assert read(Reader(*formats, is_open), text) == (reasoning, content, calls)
        # What is shown is in the text, in its order; and without calls and reasoning it is all.
        left = iter(text)
        assert all(letter in left for letter in reasoning + content)
        if (
            not calls
            and not reasoning
            and not is_open
            and not text.lstrip().startswith(formats[0].begin)
        ):
            assert content == text
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict)


def test_a_long_call_is_read_in_time_that_grows_with_its_length():
    counted = []
    slow = [*'<tool_call>{"a": "', *["</tool_call>"] * 2000]
    calls = QWEN3_CALLS.__class__(
        **{**QWEN3_CALLS.__dict__, "quotes": lambda piece: counted.append(len(piece)) or
           QWEN3_CALLS.quotes(piece)}
    )  # fmt: skip
    text = "".join(slow)
    assert read(Reader(None, calls), slow)[1:] == (text, [])
    assert sum(counted) < len(text)


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        ('<tool_call>\\n{\\"name\\": x, \\"arguments\\": y}', "qwen3", None),
        ("<tool_call>\\n<function=x>\\n\"arguments\" <think> </think>", None, "qwen3"),
        ("'<|tool_call>call:' + name; '<|channel>thought\\n<channel|>'", "gemma4", "gemma4"),
        ("<start_of_turn>model", None, None),
    ],
)  # fmt: skip
def test_a_template_says_which_formats_its_model_has(template, calls, reasoning):
    found = call_format(template), reasoning_format(template)
    assert tuple(one and one.name for one in found) == (calls, reasoning)
