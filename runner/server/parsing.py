"""JSON that a client sent, and values in the errors about it."""

import json
from typing import Any

from tokenloop.runner.json_text import parse_json
from tokenloop.runner.server.errors import ApiError


def parse(data: bytes) -> Any:
    """Errors: ApiError for what `parse_json` does not take."""
    try:
        return parse_json(data.decode())
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from None


def shown(value: Any) -> str:
    """A value in an error, as JSON and not longer than a line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
