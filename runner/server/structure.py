"""The grammar that an answer follows: JSON of a schema, calls of tools, and reasoning before it."""

import json
from functools import partial
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.grammar import json_rule
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.fields import ChatFields
from tokenloop.runner.server.gemma_grammar import call_rules
from tokenloop.runner.server.reader import GEMMA4_CALLS, QWEN3_CALLS, CallFormat, ReasoningFormat
from tokenloop.runner.tokenizer import Tokenizer


def grammar_for(
    fields: ChatFields, tokenizer: Tokenizer, reasoning: ReasoningFormat | None,
    calls: CallFormat | None, prompt: str,
) -> str | None:  # fmt: skip
    """What an answer to a chat must follow, in llguidance's Lark, if anything. `reasoning` and
    `calls` are the formats of the template, and `prompt` is what it made of the chat.

    Errors: ApiError for calls that there is no grammar of.
    """
    schema, tools = fields.wanted_schema, fields.given_tools
    must_call = tools is not None and fields.must_call
    if schema is None and not must_call:
        return None
    rules = []
    if schema is not None:
        rules.append(f"value: {json_rule(schema)}")
    if tools is not None:
        param = "tool_choice" if must_call else "response_format"
        try:
            rules += rules_of_calls(fields, tools, tokenizer, calls)
        except RunnerError as error:
            raise ApiError(400, f"{param}: {error}", param, "unsupported_parameter") from None
    answers = ["value"] * (schema is not None) + ["calls"] * (tools is not None)
    before = ""
    if reasoning is not None and not prompt.rstrip().endswith(reasoning.end):
        begin, end = (marker_rule(tokenizer, text) for text in (reasoning.begin, reasoning.end))
        rules.append(f"thought: /(.|\\n)*/ {end} /\\n{{0,2}}/")
        if end.startswith('"'):
            # Text of text: the first end is the end.
            rules[-1] = f"thought: said /\\n{{0,2}}/\nsaid[suffix={end}]: /(.|\\n)*/"
        before = "thought "
        if not prompt.rstrip().endswith(reasoning.begin):
            rules.append(f"reasoning: {begin} thought")
            before = "reasoning? "
    return f"start: {before}answer\nanswer: {' | '.join(answers)}\n" + "".join(
        f"{rule}\n" for rule in rules
    )


def rules_of_calls(
    fields: ChatFields, tools: list[dict[str, Any]], tokenizer: Tokenizer, calls: CallFormat | None
) -> list[str]:
    """Rules of `calls`, one or more as they are asked for, in their format. Errors: RunnerError."""
    if calls not in (QWEN3_CALLS, GEMMA4_CALLS):
        raise RunnerError(
            "there is no grammar of calls as this artifact's chat template writes them"
        )
    begin, end = (marker_rule(tokenizer, text) for text in (calls.begin, calls.end))
    is_json = calls is QWEN3_CALLS
    # As the templates write several: each on a line of its own, or without anything between them.
    more = ' ("\\n" call)*' if is_json else " call*"
    found = [f"calls: call{more if fields.parallel_tool_calls and not fields.named_tool else ''}"]
    if is_json:
        found.append(f'call: {begin} "\\n" called "\\n" {end}')
        return [*found, f"called: {json_rule(call_schema(tools, fields.named_tool))}"]
    found.append(f"call: {begin} called {end}")
    return found + call_rules(tools, fields.named_tool, partial(marker_rule, tokenizer))


def call_schema(tools: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """What the JSON of a call must be: of one of the tools, or of the one with this name."""
    functions = [tool["function"] for tool in tools]
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"type": "object"} | (function.get("parameters") or {}),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in functions
            if name in (None, function["name"])
        ]
    }


def marker_rule(tokenizer: Tokenizer, text: str) -> str:
    """A marker in a rule: a text, or the control tokens that it is, with text between them."""
    found, rest = [], text
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if tokenizer.token_bytes(token_id) is None:
            before, _, rest = rest.partition(tokenizer.token_name(token_id))
            found += [json.dumps(before)] * bool(before) + [f"<[{token_id}]>"]
    return " ".join(found + [json.dumps(rest)] * bool(rest))
