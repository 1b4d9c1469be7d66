"""JSON that others wrote, read strictly: Python's own reader takes a key twice, and the last one
wins without a word; it takes NaN; and what is nested deeply ends it with a RecursionError."""

import json
import reprlib
from typing import Any


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Errors: ValueError, whose text says what is wrong, for what is no JSON, for an object that has a
    key twice or half a surrogate pair in one, and for what is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} stands there twice")
    for name in found:
        # An error for half a surrogate pair.
        name.encode()
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
