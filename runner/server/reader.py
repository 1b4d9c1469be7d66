"""What a model's text is made of: its reasoning, its content, and its calls of tools.

How a model writes them is decided by the markers that its chat template writes them with. Two
formats of calls are known, and a template with another one has its text as content:

    qwen3   <tool_call>{"name": "f", "arguments": {"city": "Paris"}}</tool_call>
    gemma4  <|tool_call>call:f{city:<|"|>Paris<|"|>,days:3}<tool_call|>

and two of reasoning, which is what a text begins with:

    qwen3   <think> ... </think>
    gemma4  <|channel>thought ... <channel|>

These are the formats of the published templates of Qwen3 and Gemma 4. Gemma 3's has neither. Knows
nothing of tokens: however a text is divided, the pieces joined are the same.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenloop.runner.result import overlap


@dataclass(frozen=True)
class Call:
    """A call of a tool: `arguments` are the text of a JSON object."""

    name: str
    arguments: str


@dataclass
class Parts:
    """More of a text, or all of it."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning is between the texts `begin` and `end`. `markers` are tokens of the format, which
    some vocabularies hide as control tokens."""

    name: str
    begin: str
    end: str
    markers: tuple[str, ...]


@dataclass(frozen=True)
class CallFormat:
    """A call is between the texts `begin` and `end`, and begins with `opening`. `quotes` counts
    the marks in a piece that begin or end a string, in which `end` is text. `read` gives the call,
    or None for what is none; it is told whether a key may stand there twice. `markers` are as of
    reasoning."""

    name: str
    begin: str
    end: str
    opening: str
    quotes: Callable[[str], int]
    read: Callable[[str, bool], Call | None]
    markers: tuple[str, ...]


def read_json_call(text: str, may_repeat: bool = False) -> Call | None:
    """A call that is a JSON object."""
    try:
        call = json.loads(text, object_pairs_hook=dict if may_repeat else _once)
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            return None
        return _call(call["name"], call["arguments"])
    # Of ValueError are also a number that is none in JSON, and one of too many digits.
    except (ValueError, RecursionError):
        return None


def read_gemma_call(text: str, may_repeat: bool = False) -> Call | None:
    """A call whose strings stand between <|"|>, and whose keys mostly stand bare."""
    found = re.fullmatch(r"call:([^\s{}]+)(\{.*\})", text.strip(), re.DOTALL)
    if found is None:
        return None
    bare_and_strings = found[2].split(GEMMA_QUOTE)
    if any('"' in piece for piece in bare_and_strings[::2]):
        return None
    pieces = [
        json.dumps(piece) if number % 2 else BARE_WORD.sub(_as_json, piece)
        for number, piece in enumerate(bare_and_strings)
    ]
    try:
        hook = dict if may_repeat else _once
        return _call(found[1], json.loads("".join(pieces), object_pairs_hook=hook))
    except (ValueError, RecursionError):
        return None


GEMMA_QUOTE = '<|"|>'
BARE_WORD = re.compile(r"([^\s{}\[\],:]+)(\s*:)?")
JSON_QUOTE = re.compile(r'\\.|"', re.DOTALL)


def _as_json(word: re.Match) -> str:
    if word[2]:
        return json.dumps(word[1]) + word[2]
    # As jinja2 writes the null of an earlier call.
    return "null" if word[1] == "None" else word[1]


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _call(name: object, arguments: object) -> Call | None:
    """Errors: ValueError for arguments with a number that JSON does not have."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


QWEN3_CALLS = CallFormat(
    "qwen3", "<tool_call>", "</tool_call>", "{",
    lambda piece: sum(found[0] == '"' for found in JSON_QUOTE.finditer(piece)), read_json_call,
    ("<tool_call>", "</tool_call>"),
)  # fmt: skip
GEMMA4_CALLS = CallFormat(
    "gemma4", "<|tool_call>", "<tool_call|>", "call:",
    lambda piece: piece.count(GEMMA_QUOTE), read_gemma_call,
    ("<|tool_call>", "<tool_call|>", GEMMA_QUOTE),
)  # fmt: skip
QWEN3_REASONING = ReasoningFormat("qwen3", "<think>", "</think>", ("<think>", "</think>"))
GEMMA4_REASONING = ReasoningFormat(
    "gemma4", "<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")
)


def call_format(template: str) -> CallFormat | None:
    """How a model with this chat template writes its calls, or None if that is not known."""
    if "<|tool_call>call:" in template:
        return GEMMA4_CALLS
    # Qwen3.5 and Qwen3-Coder write <function=name> between the markers.
    is_json = "<tool_call>" in template and '"arguments"' in template.replace("\\", "")
    return QWEN3_CALLS if is_json and "<function=" not in template else None


def reasoning_format(template: str) -> ReasoningFormat | None:
    """As `call_format`, of reasoning."""
    if "<|channel>" in template and "<channel|>" in template:
        return GEMMA4_REASONING
    return QWEN3_REASONING if "<think>" in template and "</think>" in template else None


class Reader:
    """Divides one text, which comes in pieces, into its parts.

    What may be a marker's beginning, and a call before its end, are held back. A call that cannot
    be read is content as it stands, and so is one that has no end. Line breaks around reasoning
    are nobody's, and so is white space before a call, and at the end after one.
    """

    def __init__(
        self, reasoning: ReasoningFormat | None, calls: CallFormat | None, is_open: bool = False,
        must_call: bool = False,
    ):  # fmt: skip
        """A format that is None is not looked for. With `is_open` the prompt has begun the
        reasoning. With `must_call` a grammar made the calls, which cannot see to it that a key
        stands there once: the last one counts, as for other readers of JSON."""
        self._reasoning, self._calls, self._may_repeat = reasoning, calls, must_call
        self._held = ""
        self._state = self._begin if reasoning else self._text
        if reasoning and is_open:
            self._state = self._begin_reasoning
        # White space that may come before a call, and whether one was the last to come.
        self._space, self._is_after_call = "", False
        # Of a call: whether it begins as one, how far its strings' marks have been counted, how
        # many there were, and from where on its end is looked for.
        self._is_call, self._counted, self._quotes, self._looked = False, 0, 0, 0

    def push(self, text: str) -> Parts:
        """What is certain with this piece."""
        self._held += text
        return self._advance(False)

    def finish(self) -> Parts:
        """The rest."""
        return self._advance(True)

    def _advance(self, is_end: bool) -> Parts:
        parts = Parts()
        # A state gives True when another one goes on.
        while self._state(parts, is_end):
            pass
        return parts

    def _begin(self, parts: Parts, is_end: bool) -> bool:
        begin, text = self._reasoning.begin, self._held.lstrip()
        if text.startswith(begin):
            self._held, self._state = text[len(begin) :], self._begin_reasoning
            return True
        if begin.startswith(text) and not is_end:
            return False
        self._state = self._text
        return True

    def _begin_reasoning(self, parts: Parts, is_end: bool) -> bool:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._state = self._reason
        return bool(self._held)

    def _reason(self, parts: Parts, is_end: bool) -> bool:
        end = self._reasoning.end
        said, marker, rest = self._held.partition(end)
        if marker:
            parts.reasoning += said.rstrip("\n")
            self._held, self._state = rest, self._end_reasoning
            return True
        if not is_end:
            said = said[: len(said) - overlap(said, end)].rstrip("\n")
        parts.reasoning += said
        self._held = self._held[len(said) :]
        return False

    def _end_reasoning(self, parts: Parts, is_end: bool) -> bool:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._state = self._text
        return bool(self._held)

    def _text(self, parts: Parts, is_end: bool) -> bool:
        if self._calls is None:
            parts.content += self._held
            self._held = ""
            return False
        text, begin = self._held, self._calls.begin
        at = text.find(begin)
        end = at if at >= 0 else len(text) - (0 if is_end else overlap(text, begin))
        self._say(parts, text[:end])
        self._held = text[end:]
        if at >= 0:
            self._state, self._is_call = self._call, False
            self._counted = self._looked = len(begin)
            self._quotes = 0
            return True
        if is_end and not self._is_after_call:
            parts.content += self._space
        return False

    def _call(self, parts: Parts, is_end: bool) -> bool:
        calls, text = self._calls, self._held
        begin = len(calls.begin)
        if not self._is_call:
            body = text[begin:].lstrip()
            if calls.opening.startswith(body) and body != calls.opening and not is_end:
                return False
            self._is_call = body.startswith(calls.opening)
            if not self._is_call:
                return self._text_again(parts, begin)
        while (at := text.find(calls.end, self._looked)) >= 0:
            self._quotes += calls.quotes(text[self._counted : at])
            self._looked = self._counted = at + len(calls.end)
            if self._quotes % 2:
                continue
            call = calls.read(text[begin:at], self._may_repeat)
            if call is None:
                return self._text_again(parts, self._looked)
            parts.calls.append(call)
            self._held, self._state = text[self._looked :], self._text
            self._space, self._is_after_call = "", True
            return True
        if is_end:
            return self._text_again(parts, len(text))
        # Nothing is looked at twice, but for what may be the end's beginning.
        self._looked = max(self._looked, len(text) - len(calls.end) + 1)
        return False

    def _text_again(self, parts: Parts, count: int) -> bool:
        """So many characters of what was held are no call but content."""
        self._say(parts, self._held[:count])
        self._held, self._state = self._held[count:], self._text
        return True

    def _say(self, parts: Parts, text: str) -> None:
        text = self._space + text
        content = text.rstrip()
        if content:
            parts.content += content
            self._is_after_call = False
        self._space = text[len(content) :]
