"""The grammar that an answer follows: JSON of a schema, calls of tools, and reasoning before it."""

import json
from typing import Any

from tokenloop.runner.grammar import json_rule
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.fields import ChatFields
from tokenloop.runner.server.reader import QWEN3_CALLS, CallFormat, ReasoningFormat
from tokenloop.runner.tokenizer import Tokenizer


def grammar_for(
    fields: ChatFields, tokenizer: Tokenizer, reasoning: ReasoningFormat | None,
    calls: CallFormat | None, prompt: str,
) -> str | None:  # fmt: skip
    """What an answer to a chat must follow, in llguidance's Lark, if anything. `reasoning` and
    `calls` are the formats of the template, and `prompt` is what it made of the chat.

    Errors: ApiError for calls in a format that there is no grammar of.
    """
    schema, tools = fields.wanted_schema, fields.given_tools
    must_call = tools is not None and fields.must_call
    if schema is None and not must_call:
        return None
    rules = []
    if schema is not None:
        rules.append(f"value: {json_rule(schema)}")
    if tools is not None:
        if calls is not QWEN3_CALLS:
            param = "tool_choice" if must_call else "response_format"
            raise ApiError(
                400, f"{param} is not supported{'' if must_call else ' with tools'}: there is no "
                "grammar of calls as this artifact's chat template writes them", param,
                "unsupported_parameter",
            )  # fmt: skip
        more = "" if not fields.parallel_tool_calls or fields.named_tool else ' ("\\n" call)*'
        rules.append(f"calls: call{more}")
        begin, end = (marker_rule(tokenizer, text) for text in (calls.begin, calls.end))
        rules.append(f'call: {begin} "\\n" called "\\n" {end}')
        rules.append(f"called: {json_rule(call_schema(tools, fields.named_tool))}")
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
    """A marker in a rule: a text, or the control token that it is."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and tokenizer.token_bytes(ids[0]) is None:
        return f"<[{ids[0]}]>"
    return json.dumps(text)
