"""An ExecuTorch program that is not written yet, as JSON and back.

ExecuTorch's own JSON is what its flatbuffer compiler reads. It does not come back as it was.
"""

import base64
import json
from dataclasses import fields, is_dataclass
from enum import IntEnum
from typing import Any

from executorch.exir import schema

# All that a program is made of. Nothing else can come out of a file.
CLASSES = {
    name: value
    for name, value in vars(schema).items()
    if isinstance(value, type) and (is_dataclass(value) or issubclass(value, IntEnum))
}


def to_json(program: schema.Program) -> bytes:
    """A value is itself, a list, or an object whose one key names its class."""
    return json.dumps(_plain(program), separators=(",", ":")).encode()


def from_json(data: bytes) -> schema.Program:
    """What to_json was given. Errors: ValueError, KeyError or TypeError if it does not fit."""
    return _value(json.loads(data))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {type(value).__name__: named}
    if isinstance(value, IntEnum):
        return {type(value).__name__: int(value)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a program with a {type(value).__name__}")


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((name, content),) = plain.items()
    if name == "bytes":
        return base64.b64decode(content)
    if isinstance(content, dict):
        return CLASSES[name](**{key: _value(item) for key, item in content.items()})
    return CLASSES[name](content)
