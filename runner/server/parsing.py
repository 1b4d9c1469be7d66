"""JSON that a client sent, and values in the errors about it."""

import json
from typing import Any

from tokenloop.runner.server.errors import ApiError


def parse(data: bytes) -> Any:
    """Errors: ApiError for what is no JSON, or has a key twice."""
    try:
        return json.loads(data.decode(), object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    for name in found:
        # An error for half a surrogate pair.
        name.encode()
    return found


def no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def shown(value: Any) -> str:
    """A value in an error, as JSON and not longer than a line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
