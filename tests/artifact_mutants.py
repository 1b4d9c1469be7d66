"""Damage to an artifact, chosen at random: bytes and fields of its files, and the files' kind."""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tokenloop.export.artifact import MANIFEST, seal


class Mutant(NamedTuple):
    """What was done to an artifact. `is_damage` says that the manifest does not know of it: a run
    then gives the ids of the whole artifact, or none. Otherwise an export might have meant it."""

    kind: str
    is_damage: bool


# What stands where something else should. Names lead to a directory beside the artifact that has
# the same files.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 255, 256, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308),
    *("", "x", "0" * 64, "\x00", "\n", "\ud800", "é" * 300, "float32", "cuda", "prefill"),
    *("model.pte", "manifest.json", "../outside/model.pte", "../outside", ".", "..", "/dev/zero"),
    *([], [[]], [None], [0], [-1], [2**40] * 3, ["a"] * 1000, {}, {"file": "x"}, {"a": {"b": []}}),
]


def mutate(artifact: Path, outside: Path, random: Random) -> Mutant:
    """Change the artifact, of which `outside` has a copy."""
    names = sorted(path.name for path in artifact.iterdir())
    name = random.choice(names)
    kinds: dict[str, Callable[[], Mutant]] = {
        "bytes": lambda: _change_bytes(artifact, name, random),
        "field": lambda: _change_field(artifact, MANIFEST, random),
        "sealed field": lambda: _seal_field(artifact, random),
        "sealed file": lambda: _seal_file(artifact, random),
        "kind": lambda: _change_kind(artifact, outside, name, random),
    }
    return kinds[random.choices(list(kinds), [9, 2, 5, 2, 2])[0]]()


def _change_bytes(artifact: Path, name: str, random: Random) -> Mutant:
    what, data = damage((artifact / name).read_bytes(), random)
    (artifact / name).write_bytes(data)
    return Mutant(f"{_part(name)}: {what}", True)


def damage(data: bytes, random: Random) -> tuple[str, bytes]:
    """What was done, and other bytes."""
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    # Most damage is short.
    end = min(end, start + 2 ** random.randrange(16))
    part, place = data[start:end], random.randrange(len(data))
    kinds = {
        "flip": lambda: _with(data, place, bytes([data[place] ^ 1 << random.randrange(8)])),
        "overwrite": lambda: _with(data, start, random.randbytes(len(part))),
        "zeros": lambda: _with(data, start, bytes(len(part))),
        "truncate": lambda: data[:start],
        "extend": lambda: data + random.randbytes(1 + random.randrange(1000)),
        "drop": lambda: data[:start] + data[end:],
        "repeat": lambda: data[:end] + part + data[end:],
        "swap": lambda: data[: start // 2] + part + data[start // 2 + len(part) :],
    }
    kind = random.choices(list(kinds), [8, 3, 2, 2, 1, 1, 1, 1])[0]
    return kind, kinds[kind]()


def _with(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place] + piece + data[place + len(piece) :]


def _change_field(artifact: Path, name: str, random: Random) -> Mutant:
    found = json.loads((artifact / name).read_text(encoding="utf-8"))
    what = change_field(found, random)
    text = json.dumps(found)
    if random.random() < 0.02:
        what = "nested without end"
        text = text[:-1] + ',"nested":' + '[{"a":' * 50_000
    (artifact / name).write_text(text, encoding="utf-8")
    return Mutant(f"{_part(name)}: {what}", True)


def change_field(found: Any, random: Random) -> str:
    """Change something in this object or list, or in what is in it. What was done."""
    places = list(_places(found))
    parent, key = random.choice(places)
    # What is deep in it is as likely to be changed as the rest.
    if random.random() < 0.5:
        shallow = [place for place in places if place[0] is found] or places
        parent, key = random.choice(shallow)
    what = random.choices(["replace", "remove", "add", "exchange", "repeat"], [8, 2, 1, 2, 1])[0]
    if what == "replace":
        parent[key] = random.choice(VALUES)
    elif what == "remove":
        del parent[key]
    elif what == "exchange":
        other, place = random.choice(places)
        parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(parent[key])
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]) if what == "repeat" else random.choice(VALUES))
    else:
        parent[f"{key}_"] = parent[key] if what == "repeat" else random.choice(VALUES)
    return f"{what} a field"


def _places(found: Any):
    """Every object or list in it with each of its keys."""
    for key in list(found) if isinstance(found, dict) else range(len(found)):
        yield found, key
        if isinstance(found[key], (dict, list)):
            yield from _places(found[key])


def _seal_field(artifact: Path, random: Random) -> Mutant:
    """A manifest of another program that writes artifacts: whose own hash is right."""
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    what = change_field(manifest, random)
    if isinstance(manifest.get("sha256"), str):
        entries = {key: value for key, value in manifest.items() if key != "sha256"}
        text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (artifact / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return Mutant(f"sealed manifest: {what}", False)


def _seal_file(artifact: Path, random: Random) -> Mutant:
    """A tokenizer, or a chat template, that the manifest says is right. Programs and weights are
    not changed so: whoever writes them can have them do anything."""
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    tokenizer = manifest["tokenizer"]
    name = random.choice([tokenizer["file"], tokenizer["chat_template"] or tokenizer["file"]])
    data = (artifact / name).read_bytes()
    if name.endswith(".json") and random.random() < 0.5:
        found = json.loads(data)
        what = change_field(found, random)
        data = json.dumps(found).encode()
    else:
        what, data = damage(data, random)
    (artifact / name).write_bytes(data)
    seal(artifact, manifest)
    return Mutant(f"sealed {_part(name)}: {what}", False)


def _change_kind(artifact: Path, outside: Path, name: str, random: Random) -> Mutant:
    path = artifact / name
    others = [other for other in artifact.iterdir() if other.name != name]
    kind = random.choice(["link", "FIFO", "directory", "device", "missing", "loop", "other"])
    if kind == "other":
        path.write_bytes(random.choice(sorted(others)).read_bytes())
        return Mutant(f"{_part(name)}: another file", True)
    path.unlink()
    if kind == "link":
        path.symlink_to(random.choice([outside / name, Path("..", outside.name, name)]))
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(random.choice(["/dev/zero", "/dev/null", "/dev/tty"]))
    elif kind == "loop":
        path.symlink_to(name)
    return Mutant(f"{_part(name)}: {kind}", True)


def _part(name: str) -> str:
    """What a file is in an artifact."""
    parts = {
        ".pte": "program", ".pt2": "program", ".safetensors": "weights", ".jinja": "template",
    }  # fmt: skip
    return {MANIFEST: "manifest"}.get(name, parts.get(Path(name).suffix, "tokenizer"))
