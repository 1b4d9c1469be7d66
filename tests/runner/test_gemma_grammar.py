"""Calls in Gemma 4's form fit their tool's schema, whatever is written: any way through the grammar
is a call that can be read, and whose arguments fit."""

import json
import random
from functools import partial

import jsonschema
import numpy as np
import pytest

from tests.random_schemas import random_schema, with_definition
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.grammar import Grammars
from tokenloop.runner.request import Request
from tokenloop.runner.server.gemma_grammar import call_rules
from tokenloop.runner.server.reader import GEMMA4_CALLS, Reader
from tokenloop.runner.server.structure import marker_rule


class ByteTokenizer:
    """Ids 1 to 256 are bytes. The `markers` behind them are control tokens."""

    eos_token_ids = (0,)

    def __init__(self, *markers: str):
        self._markers = markers

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            found = next((m for m in self._markers if text.startswith(m)), None)
            ids += (
                [257 + self._markers.index(found)] if found else [b + 1 for b in text[0].encode()]
            )
            text = text[len(found or text[0]) :]
        return ids

    def token_bytes(self, token_id: int) -> bytes | None:
        return bytes([token_id - 1]) if 0 < token_id < 257 else None

    def token_name(self, token_id: int) -> str:
        return self._markers[token_id - 257] if token_id > 256 else "<end>"

    def text(self, ids: list[int]) -> str:
        return b"".join(self.token_bytes(i) or self.token_name(i).encode() for i in ids).decode()


# As texts, as Gemma 4's vocabulary has them, and mixed.
VOCABULARIES = [ByteTokenizer(), ByteTokenizer(*GEMMA4_CALLS.markers), ByteTokenizer('<|"|>')]
GRAMMARS = {tokenizer: Grammars(tokenizer, 260) for tokenizer in VOCABULARIES}


def grammar_of(tokenizer: ByteTokenizer, *parameters: dict, names=("f", "foo", "g-1")) -> str:
    marker = partial(marker_rule, tokenizer)
    tools = [{"function": {"name": n, "parameters": p}} for n, p in zip(names, parameters)]
    start = f"start: {marker(GEMMA4_CALLS.begin)} called {marker(GEMMA4_CALLS.end)}"
    return "\n".join([start, *call_rules(tools, None, marker), ""])


def matcher_of(tokenizer: ByteTokenizer, *parameters: dict):
    grammar = grammar_of(tokenizer, *parameters)
    return GRAMMARS[tokenizer].matcher(Request("", grammar=grammar))


def babble(tokenizer: ByteTokenizer, parameters: dict, draw: random.Random) -> str:
    """A text of the grammar, each token of which is drawn from those that may come."""
    matcher, ids = matcher_of(tokenizer, parameters), []
    while not matcher.is_stopped():
        bits = np.empty(36, np.uint8)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:260])
        ids.append(int(draw.choice(allowed.tolist())))
        assert matcher.consume_token(ids[-1])
    return tokenizer.text(ids[:-1] if ids[-1] == 0 else ids)


def arguments_of(text: str) -> dict:
    reader = Reader(None, GEMMA4_CALLS)
    parts = [reader.push(text), reader.finish()]
    (call,) = [call for part in parts for call in part.calls]
    assert "".join(part.content for part in parts) == ""
    return json.loads(call.arguments)


@pytest.mark.parametrize("seed", range(60))
def test_any_way_through_the_grammar_is_a_call_that_fits(seed):
    draw = random.Random(seed)
    schema = random_schema(draw)
    parameters = {
        "properties": {"x": schema, "b c": schema, "A": {}}, "required": ["x", "other"],
        "additionalProperties": draw.choice([True, {"type": "null"}]),
    }  # fmt: skip
    if seed % 3 == 0:
        parameters = with_definition(draw, schema)
    tokenizer = draw.choice(VOCABULARIES)
    if "format" in json.dumps(parameters):
        with pytest.raises(RunnerError, match=": format is not supported in calls as this artif"):
            grammar_of(tokenizer, parameters)
        return
    jsonschema.validate(arguments_of(babble(tokenizer, parameters, draw)), parameters)


def takes(tokenizer: ByteTokenizer, schema, text: str, **more) -> bool:
    matcher = matcher_of(tokenizer, {"properties": {"x": schema}, "required": ["x"]} | more)
    ids = tokenizer.encode("<|tool_call>call:f{" + text + "}<tool_call|>")
    return all(map(matcher.consume_token, ids)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ['<|"|>a "b", {c}: \n ö<|"|>', '<|"|><|"|>'],
         ['"a"', "a", '<|"|>a<|"|>b<|"|>', '<|"|>a']),
        ({"type": "string", "pattern": r"^\d\w*/[a-c]$"}, ['<|"|>1z/b<|"|>'],
         ['<|"|>1z/bb<|"|>', '<|"|>x1z/b<|"|>', '<|"|>\u0663z/b<|"|>']),
        ({"type": "string", "pattern": "b+", "maxLength": 3}, ['<|"|>abc<|"|>'],
         ['<|"|>ac<|"|>', '<|"|>abcd<|"|>']),
        ({"enum": ["a b", 1, None, [True, {"Z": 1, "a": 2}]]},
         ['<|"|>a b<|"|>', "1", "null", "[true,{a:2,Z:1}]"], ["a b", "None", "[]", "01"]),
        ({"enum": [1, "a", 2.5], "type": ["integer", "null"]}, ["1"], ["2.5", '<|"|>a<|"|>']),
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13", " 3", "3.0"]),
        ({"type": "number"}, ["-1.5e3", "0"], ["1e999", "01", ".5", "NaN"]),
        ({"type": "array", "minItems": 1, "items": {"type": "boolean"}}, ["[true,false]"],
         ["[]", "[true, false]", "[1]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "object"}, ["{}", "{a:1,b_2:{c:[]}}"], ["{a b:1}", "{a}"]),
        ({"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 1}]},
         ["null", '<|"|>x<|"|>'], ["true"]),
        ({"properties": {"b": True, "a": {"type": "null"}}, "required": ["b"]},
         ["{b:1}", "{a:null,b:[]}"], ["{a:null}", "{b:1,a:null}", "{}"]),
        ({"title": "Anything"}, ["{a:[1,null]}", '<|"|>x<|"|>'], ["x"]),
    ],
    ids=json.dumps,
)  # fmt: skip
def test_values_have_the_form_of_the_template(schema, right, wrong):
    for tokenizer in VOCABULARIES[:2]:
        for value in right:
            assert takes(tokenizer, schema, f"x:{value}"), value
        assert not any(takes(tokenizer, schema, f"x:{value}") for value in wrong)


def test_a_value_may_have_values_of_its_own_kind_in_it():
    node = {"properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/N"}]}},
            "required": ["next"]}  # fmt: skip
    more = {"$defs": {"N": node}}
    ref = {"$ref": "#/$defs/N"}
    assert takes(VOCABULARIES[0], ref, "x:{next:{next:{next:null}}}", **more)
    assert not takes(VOCABULARIES[0], ref, "x:{next:{next:1}}", **more)


def test_names_that_begin_alike_are_told_apart():
    matcher = matcher_of(VOCABULARIES[0], {"type": "object"}, {"required": ["a"]}, {})
    for text in ("call:f{}", "call:foo{a:1}", "call:g-1{}"):
        reset = matcher.deep_copy()
        ids = VOCABULARIES[0].encode(f"<|tool_call>{text}<tool_call|>")
        assert all(map(reset.consume_token, ids)) and reset.is_accepting(), text


DEEP: dict = {}
for _ in range(150):
    DEEP = {"items": DEEP, "type": "array"}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "format": "date"}, "x: format is not supported in calls as this art"),
        ({"not": {}}, "x: not is not supported"),
        ({"oneOf": [{}]}, "x: oneOf is not supported"),
        ({"anyOf": [{}], "type": "null"}, "x: anyOf beside type is not supported"),
        ({"enum": ["a"], "maxLength": 3}, "x: enum beside maxLength is not supported"),
        ({"type": "string", "pattern": r"a\b"}, r'x: pattern "a\\\\b" is not supported'),
        ({"type": "string", "pattern": "(a|^b)"}, r'x: pattern "\(a|\^b\)" is not supported'),
        ({"type": "date"}, 'x.type is "date"; it must be of string, number, integer, bool'),
        ({"type": [["null"]]}, r'x.type is \[\["null"\]\]; it must be of string'),
        ({"properties": []}, r"x.properties is \[\]; it must be an object"),
        ({"required": [1]}, "x.required has 1; it must be a name"),
        ({"maxLength": -1}, "x.maxLength is -1; it must be a whole number, 0 or more"),
        ({"minItems": True}, "x.minItems is true; it must be a whole number"),
        ({"minItems": 3, "maxItems": 2}, "x.maxItems is 2, and minItems 3: no value fits both"),
        ({"enum": []}, "x has no value that fits it"),
        ({"enum": ["a"], "type": "null"}, "x has no value that fits it"),
        ({"anyOf": [False]}, r"x.anyOf\[0\] is false; no value fits that"),
        ({"items": 5}, "x.items is 5; no value fits that"),
        ({"const": '<|"|>'}, r'x has "<\|\\"\|>"; <\|"\|> cannot stand in a text'),
        ({"$ref": "#/$defs/none"}, 'x.\\$ref is "#/\\$defs/none"; it must name something in'),
        ({"$ref": "https://x.de"}, "x.\\$ref is"),
        ({"$ref": "#/$defs/self"}, "which refers to itself"),
        (DEEP, "parameters is nested more than 100 deep"),
        ({"required": list(map(str, range(501)))}, "x.properties has 501; 500 are the most in"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_its_name(schema, reason):
    definitions = {"self": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/self"}]}}
    parameters = {"properties": {"x": schema}, "$defs": definitions}
    with pytest.raises(RunnerError, match=reason) as refused:
        grammar_of(VOCABULARIES[0], parameters)
    assert str(refused.value).startswith("tools[0].function.parameters")
    assert "\n" not in str(refused.value)


def test_a_function_whose_name_a_call_cannot_have_is_refused():
    with pytest.raises(RunnerError, match=r'^tools\[0\].function.name is "a b"; in a call'):
        grammar_of(VOCABULARIES[0], {}, names=["a b"])
