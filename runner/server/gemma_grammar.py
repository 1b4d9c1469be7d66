"""The grammar of Gemma 4's calls: a schema's values, in the form that its template writes.

    call:f{city:<|"|>Paris<|"|>,days:[1,2],more:{a:true}}

Numbers, true, false and null are those of JSON. A text stands as it is between two marks. Keys are
bare and in the order of the template, which is Jinja's dictsort. So llguidance's own grammar of
JSON does for scalars alone, and what a schema says of the rest is translated here. A grammar may
allow less than a schema, and never more; what is not known is refused.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.server.reader import GEMMA_QUOTE

# They say nothing of values, or are looked up when something refers to them.
NOTES = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$comment", "$schema", "$id", "$defs", "definitions",
}  # fmt: skip
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
# By type what restricts its values, and nothing of another type's.
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern"},
    "number": NUMBERS,
    "integer": NUMBERS,
    "boolean": set(),
    "null": set(),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
SCHEMAS = {"type", "enum", "const", "anyOf", "$ref"}
# Without a < none is taken for a marker.
BARE_KEY = re.compile(r'[^\s{}\[\],:"<]+')
NAME = re.compile(r"[^\s{}<]+")
# Of so many digits every JSON reader has a number.
INTEGER = r"/-?(0|[1-9][0-9]{0,14})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
MOST_NESTED = 100
# llguidance follows up to 2,000 ways at a time, and one that may be left out is three of them.
MOST_PROPERTIES = 500
# Of a pattern: what is escaped, a class, a group's beginning, and every other character.
PIECES = re.compile(r"\\.|\[(?P<class>\^?\]?(?:\\.|[^\]\\])*)\]|\(\?.?|.", re.DOTALL)
SETS = {r"\d": "[0-9]", r"\w": "[0-9A-Za-z_]", r"\s": r"[ \t\n\r\f\v]"}
SETS |= {escape.upper(): f"[^{found[1:]}" for escape, found in SETS.items()}
SETS |= {".": r"[^\n\r\u{2028}\u{2029}]", "/": r"\/", "\n": r"\n"}
KNOWN_ESCAPES, IN_CLASS = "dDwWsSnrtfvxupP", "dwsnrtfvxupP"
PIECE_OF_CLASS = re.compile(r"\\.|[\[&~/\n]", re.DOTALL)


def call_rules(
    tools: list[dict[str, Any]], name: str | None, marker: Callable[[str], str]
) -> list[str]:
    """Rules of `called`, what stands between a call's markers: of one of the tools, or of the one
    with this name. `marker` gives a marker in a rule, a token or a text.

    Errors: RunnerError naming what a schema asks for that there is no rule of.
    """
    rules: list[str] = []
    called = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        if name not in (None, function["name"]):
            continue
        if not NAME.fullmatch(function["name"]):
            raise RunnerError(
                f"tools[{number}].function.name is {json.dumps(function['name'])}; in a call as "
                "this artifact's chat template writes it there are no spaces, braces or <"
            )
        where = f"tools[{number}].function.parameters"
        schema = {"type": "object"} | (function.get("parameters") or {})
        values = Values(schema, where, marker, f"of_{number}", rules)
        called.append(f"{json.dumps('call:' + function['name'])} {values.rule(schema, where)}")
    return [f"called: {' | '.join(called)}", *rules]


class Values:
    """Adds rules of the values that fit the parts of one schema, `root`. Their names begin with
    `prefix`, in capitals where they are terminals."""

    def __init__(
        self, root: dict[str, Any], where: str, marker: Callable[[str], str], prefix: str,
        rules: list[str],
    ):  # fmt: skip
        self._root, self._where, self._prefix, self._rules = root, where, prefix, rules
        self._quote = marker(GEMMA_QUOTE)
        # A mark that is no token of its own is text, and ends the text that it stands in.
        self._is_text = self._quote.startswith('"')
        self._count = self._depth = 0
        self._any: str | None = None
        # The rules of what is referred to, and those of them whose value has not begun.
        self._refs: dict[str, str] = {}
        self._open: set[str] = set()

    def rule(self, schema: Any, where: str) -> str:
        """The name of a rule for values that fit a schema, which is to be found at `where`."""
        return self._add(self._right_side(schema, where))

    def _right_side(self, schema: Any, where: str) -> str:
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise RunnerError(f"{self._where} is nested more than {MOST_NESTED} deep")
        found = self._alternatives(schema, where)
        self._depth -= 1
        return found

    def _alternatives(self, schema: Any, where: str) -> str:
        if schema is True:
            return self._anything()
        if not isinstance(schema, dict):
            raise RunnerError(f"{where} is {json.dumps(schema)[:80]}; no value fits that")
        known = SCHEMAS.union(NOTES, *KEYWORDS.values())
        for keyword in schema:
            if keyword not in known:
                raise _not_known(where, keyword)
        asked = schema.keys() - NOTES
        for keyword in ("$ref", "anyOf"):
            if keyword in asked and len(asked) > 1:
                raise _not_known(where, f"{keyword} beside {min(asked - {keyword})}")
        if "$ref" in asked:
            return self._referred(schema["$ref"], where)
        if "anyOf" in asked:
            choices = _checked(schema, "anyOf", list, where)
            found = [self.rule(one, f"{where}.anyOf[{i}]") for i, one in enumerate(choices)]
            return self._one_of(found, where)
        types = self._types(schema, where)
        if "enum" in asked or "const" in asked:
            keyword = "const" if "const" in asked else "enum"
            if more := asked - {keyword, "type"}:
                raise _not_known(where, f"{keyword} beside {min(more)}")
            values = _checked(schema, "enum", list, where, [schema.get("const")])
            fits = [value for value in values if any(_is_of(value, type_) for type_ in types)]
            return self._one_of([self._literal(value, where) for value in fits], where)
        if not asked:
            return self._anything()
        ways: dict[str, Callable[[dict, str], str]] = {
            "string": self._text, "array": self._array, "object": self._object,
        }  # fmt: skip
        found = [ways.get(type_, _scalar(type_))(schema, where) for type_ in types]
        return self._one_of([self._add(one) for one in found] if len(found) > 1 else found, where)

    def _types(self, schema: dict, where: str) -> list[str]:
        """The types that values may have. Without one, those that keywords speak of."""
        types = schema.get("type")
        if types is None:
            spoken = [type_ for type_, words in KEYWORDS.items() if words & schema.keys()]
            return spoken or list(KEYWORDS)
        types = types if isinstance(types, list) else [types]
        if not all(isinstance(type_, str) and type_ in KEYWORDS for type_ in types):
            raise RunnerError(
                f"{where}.type is {json.dumps(schema['type'])[:80]}; it must be of "
                f"{', '.join(KEYWORDS)}"
            )
        return list(dict.fromkeys(types))

    def _referred(self, ref: Any, where: str) -> str:
        """The rule of what a $ref names."""
        parts = ref.split("/") if isinstance(ref, str) else []
        found: Any = None
        if parts[:1] == ["#"] and len(parts) in (1, 3):
            found = self._root
            for part in parts[1:]:
                found = found.get(part) if isinstance(found, dict) else None
        if found is None or parts[1:2] not in ([], ["$defs"], ["definitions"]):
            raise RunnerError(
                f"{where}.$ref is {json.dumps(ref)[:80]}; it must name something in the $defs of "
                "this schema"
            )
        if ref in self._open:
            raise RunnerError(f"{where}.$ref is {json.dumps(ref)[:80]}, which refers to itself")
        if ref not in self._refs:
            # Its own name, for a value may have such a value in it.
            self._refs[ref] = self._name()
            self._open.add(ref)
            right_side = self._right_side(found, f"{self._where} at {ref}")
            self._open.discard(ref)
            self._rules.append(f"{self._refs[ref]}: {right_side}")
        return self._refs[ref]

    def _inside(self, schema: Any, where: str) -> str:
        """A rule of values within a list or an object, which has begun."""
        around, self._open = self._open, set()
        name = self.rule(schema, where)
        self._open = around
        return name

    def _text(self, schema: dict, where: str) -> str:
        least, most = _sizes(schema, "minLength", "maxLength", where)
        body, end = f"(?s:.{{{least},{most}}})", ""
        if self._is_text:
            end = re.escape(GEMMA_QUOTE).replace("/", r"\/")
        # No mark is in a text, however it is spelled.
        mark = re.escape(GEMMA_QUOTE).replace("/", r"\/")
        terms = [f"/{body}{end}/", f"~/(?s:.*){mark}(?s:{'.+' if end else '.*'})/"]
        if "pattern" in schema:
            terms.append(f"/{_pattern(_checked(schema, 'pattern', str, where), where)}{end}/")
        name = self._add(" & ".join(terms), is_terminal=True)
        return f"{self._quote} {name}" + ("" if end else f" {self._quote}")

    def _array(self, schema: dict, where: str) -> str:
        least, most = _sizes(schema, "minItems", "maxItems", where)
        if most == 0:
            return '"[" "]"'
        item = self._inside(schema.get("items", True), f"{where}.items")
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most == "" else most - 1}}}'
        more = "" if most == 1 else more
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _object(self, schema: dict, where: str) -> str:
        properties = _checked(schema, "properties", dict, where, {})
        required = _checked(schema, "required", list, where, [])
        others = schema.get("additionalProperties", True)
        if not properties and not required and others is not False:
            value = self._inside(others, f"{where}.additionalProperties")
            pair = f'(/[A-Za-z0-9_]{{1,64}}/ ":" {value})'
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        schemas = dict(properties)
        for key in required:
            if not isinstance(key, str):
                raise RunnerError(f"{where}.required has {json.dumps(key)[:80]}; it must be a name")
            # One that is not among the properties.
            schemas.setdefault(key, others)
        if len(schemas) > MOST_PROPERTIES:
            raise RunnerError(
                f"{where}.properties has {len(schemas)}; {MOST_PROPERTIES} are the most in calls "
                "as this artifact's chat template writes them"
            )
        keys = sorted(schemas, key=str.lower)
        pairs = []
        for key in keys:
            # What nothing fits is left out, where it may be.
            if schemas[key] is False and key not in required:
                continue
            inside = f"{where}.{'properties' if key in properties else 'required'}.{key}"
            pair = f'{self._key(key, inside)} ":" {self._inside(schemas[key], inside)}'
            pairs.append((pair, key in required))
        # From the last on: what follows where a pair has come, and where none has.
        after, first = '"}"', '"}"'
        for pair, must in reversed(pairs):
            after, first = self._add(after), self._add(first)
            after, first = (
                f'"," {pair} {after}' + ("" if must else f" | {after}"),
                f"{pair} {after}" + ("" if must else f" | {first}"),
            )
        return f'"{{" {self._add(first)}'

    def _key(self, key: str, where: str) -> str:
        return json.dumps(key) if BARE_KEY.fullmatch(key) else self._quoted(key, where)

    def _literal(self, value: Any, where: str) -> str:
        match value:
            case str():
                return self._quoted(value, where)
            case list():
                items = ' "," '.join(self._literal(item, where) for item in value)
                return f'"[" {items} "]"'
            case dict():
                pairs = ' "," '.join(
                    f'{self._key(key, where)} ":" {self._literal(value[key], where)}'
                    for key in sorted(value, key=str.lower)
                )
                return f'"{{" {pairs} "}}"'
        return json.dumps(json.dumps(value))

    def _quoted(self, text: str, where: str) -> str:
        if GEMMA_QUOTE in text:
            raise RunnerError(
                f"{where} has {json.dumps(text)[:80]}; {GEMMA_QUOTE} cannot stand in a text as "
                "this artifact's chat template writes it"
            )
        return f"{self._quote} {json.dumps(text, ensure_ascii=False)} {self._quote}"

    def _anything(self) -> str:
        """The rule of any value."""
        if self._any is None:
            self._any = self._name()
            ways = [self._text({}, ""), NUMBER, '"true"', '"false"', '"null"']
            ways += [self._array({}, ""), self._object({}, "")]
            self._rules.append(f"{self._any}: {' | '.join(ways)}")
        return self._any

    def _one_of(self, found: list[str], where: str) -> str:
        if not found:
            raise RunnerError(f"{where} has no value that fits it")
        return " | ".join(f"({one})" for one in found) if len(found) > 1 else found[0]

    def _add(self, right_side: str, is_terminal: bool = False) -> str:
        name = self._name().upper() if is_terminal else self._name()
        self._rules.append(f"{name}: {right_side}")
        return name

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"


def _scalar(type_: str) -> Callable[[dict, str], str]:
    def right_side(schema: dict, where: str) -> str:
        asked = {key: schema[key] for key in KEYWORDS[type_] & schema.keys()}
        if asked or type_ not in ("number", "integer"):
            # No space before it.
            asked |= {"type": type_, "x-guidance": {"whitespace_flexible": False}}
            return "%json " + json.dumps(asked)
        return NUMBER if type_ == "number" else INTEGER

    return right_side


def _is_of(value: Any, type_: str) -> bool:
    """Whether a JSON value has the type of a schema."""
    match value:
        case bool():
            return type_ == "boolean"
        case int() | float():
            return type_ == "number" or (type_ == "integer" and value == int(value))
    of = {"string": str, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, of.get(type_, ()))


def _checked(schema: dict, keyword: str, type_: type, where: str, default: Any = None) -> Any:
    value = schema.get(keyword, default)
    if not isinstance(value, type_):
        kind = {list: "a list", dict: "an object", str: "a text"}[type_]
        raise RunnerError(f"{where}.{keyword} is {json.dumps(value)[:80]}; it must be {kind}")
    return value


def _sizes(schema: dict, low: str, high: str, where: str) -> tuple[int, int | str]:
    """The least and the most, "" for no such limit."""
    found: list[int | str] = []
    for keyword, default in ((low, 0), (high, "")):
        value = schema.get(keyword, default)
        if keyword in schema and (
            isinstance(value, bool) or not isinstance(value, int) or value < 0
        ):
            raise RunnerError(
                f"{where}.{keyword} is {json.dumps(value)[:80]}; it must be a whole number, 0 or "
                "more"
            )
        found.append(value)
    least, most = found
    if most != "" and most < least:
        raise RunnerError(f"{where}.{high} is {most}, and {low} {least}: no value fits both")
    return least, most


def _pattern(pattern: str, where: str) -> str:
    """A schema's pattern, which is looked for, as an expression of a whole text. A schema's has
    ECMAScript's form, in which a digit is one of ten; llguidance's has another one."""
    begins = pattern.startswith("^")
    ends = re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    found = ""
    for piece in PIECES.finditer(pattern[begins : len(pattern) - ends]):
        text, in_class = piece[0], piece["class"]
        escapes = {text} if in_class is None else set(re.findall(r"\\.", in_class, re.DOTALL))
        known = KNOWN_ESCAPES if in_class is None else IN_CLASS
        if (
            # Places, of which only the two ends are known, and what looks ahead.
            text in ("^", "$")
            or (text.startswith("(?") and text != "(?:")
            or any(one[0] == "\\" and one[1].isalnum() and one[1] not in known for one in escapes)
            # They mean something else there.
            or (in_class is not None and (in_class.lstrip("^")[:1] in "]" or "--" in in_class))
        ):
            raise _not_known(where, f"pattern {json.dumps(pattern)[:80]}")
        if in_class is None:
            found += SETS.get(text, text)
        else:
            found += f"[{re.sub(PIECE_OF_CLASS, _of_class, in_class)}]"
    return f"{'' if begins else '(?s:.*)'}(?:{found}){'' if ends else '(?s:.*)'}"


def _of_class(piece: re.Match) -> str:
    text = piece[0]
    if len(text) == 1:
        return r"\n" if text == "\n" else "\\" + text
    return SETS[text][1:-1] if text in (r"\d", r"\w", r"\s") else text


def _not_known(where: str, what: str) -> RunnerError:
    return RunnerError(
        f"{where}: {what} is not supported in calls as this artifact's chat template writes them"
    )
