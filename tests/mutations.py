"""Random changes of a checkpoint's files: its bytes, and what its formats hold.

`mutate` does a change of one of KINDS. Each draws from the `random.Random` that it is given alone.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 3, 7, 31, 255, 65_535, 65_536, 1_000_000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
FLOATS = 0.0, -1.0, 0.5, 1e-45, 1e-30, 1e30, 2.0**40, float("inf"), float("-inf"), float("nan")
STRINGS = (
    "", "64", "x", "../outside", "/etc/passwd", "\ud800", "\0", "a\nb", "é" * 40, "linear", "yarn",
    "llama3", "default", "proportional", "full_attention", "sliding_attention", "gemma3_text",
    "x" * 100_000,
)  # fmt: skip
# As GGUF's types of values have them.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


# Bytes


def change_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """A few bytes of the first `within` are others, gone, doubled or new."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        end = min(len(changed), within or len(changed))
        if not end:
            break
        at = rng.randrange(end)
        size = rng.choice((1, 1, 4, 8, 100))
        match rng.randrange(7):
            case 0 | 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at] = rng.randrange(256)
            case 3:
                word = rng.choice(NUMBERS)
                size = rng.choice((4, 8))
                changed[at : at + size] = (word % (1 << 8 * size)).to_bytes(size, "little")
            case 4:
                del changed[at : at + size]
            case 5:
                changed[at:at] = rng.randbytes(size)
            case 6:
                changed[at:at] = changed[at : at + size]
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


# JSON


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                left.append(container[key])
    return found


def any_json(rng: random.Random) -> Any:
    match rng.randrange(6):
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2:
            return rng.choice(FLOATS)
        case 3:
            return rng.choice(STRINGS)
        case 4:
            return rng.choice((None, True, False, [], {}, [[]], {"": None}))
        case _:
            return rng.choice(([1, 2], ["a"], [None], {"content": 3}, {"type": "linear"}, [-1]))


def change_json(value: Any, rng: random.Random) -> Any:
    """One or two values of a JSON object are others, gone, or in one another's place."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = places(value)
        if not found:
            break
        # Near the root as often as deep in a vocabulary.
        container, key = rng.choice(found[:60] if rng.random() < 0.7 else found)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container[key], (int, float)):
                container[key] = rng.choice((-1, 2, 0.5, 1 << 40)) * container[key]
            case 2:
                other, place = rng.choice(found)
                container[key] = (
                    json.loads(json.dumps(other.get(place, None)))
                    if isinstance(other, dict)
                    else None
                )
            case 3 if isinstance(container, dict):
                container[rng.choice(STRINGS)] = container.pop(key)
            case 4 if isinstance(container[key], str):
                container[key] = container[key][: rng.randrange(20)] + rng.choice(STRINGS)
            case _:
                container[key] = any_json(rng)
    return value


def change_json_text(text: bytes, rng: random.Random) -> bytes:
    """The text of an object, changed: mostly as a value, and sometimes as bytes."""
    match rng.randrange(10):
        case 0 | 1:
            return change_bytes(text, rng)
        case 2:
            depth = rng.choice((100, 900, 5000, 100_000))
            deep = rng.choice((b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth + b"]" * depth))
            end = text.rindex(b"}")
            return text[:end] + b', "deep": ' + deep + text[end:]
        case 3:
            return rng.choice(
                (b"", b"null", b"[]", b"\xef\xbb\xbf" + text, text + text, b"9" * 5000)
            )
        case 4:
            return text.decode().encode(rng.choice(("utf-16", "utf-32")))
        case _:
            return json.dumps(change_json(json.loads(text), rng)).encode()


# GGUF


class Gguf:
    """A GGUF file apart: `values` are [key, type, bytes], `tensors` are [name, dimensions, type,
    offset], and `data` is what follows the header."""

    def __init__(self, file: bytes):
        self.file, self.at = file, 0
        self.version = self.take("4sI")[1]
        n_tensors, n_values = self.take("QQ")
        self.values = []
        for _ in range(n_values):
            key, (kind,) = self.string(), self.take("I")
            start = self.at
            self.skip(kind)
            self.values.append([key, kind, file[start : self.at]])
        self.tensors = []
        for _ in range(n_tensors):
            name, (rank,) = self.string(), self.take("I")
            self.tensors.append([name, list(self.take(f"{rank}Q")), *self.take("IQ")])
        self.data = file[-(-self.at // 32) * 32 :]

    def take(self, code: str) -> tuple:
        values = struct.unpack_from("<" + code, self.file, self.at)
        self.at += struct.calcsize("<" + code)
        return values

    def string(self) -> bytes:
        (size,) = self.take("Q")
        return self.take(f"{size}s")[0]

    def skip(self, kind: int) -> None:
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            of, length = self.take("IQ")
            for _ in range(length):
                self.skip(of)
        else:
            self.take(SCALARS[kind])

    def joined(self) -> bytes:
        parts = [b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.values))]
        parts += [packed(key) + struct.pack("<I", kind) + raw for key, kind, raw in self.values]
        for name, dimensions, kind, offset in self.tensors:
            shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
            parts.append(packed(name) + shape + struct.pack("<IQ", kind, offset))
        header = b"".join(parts)
        return header + bytes(-len(header) % 32) + self.data


def packed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def any_value(rng: random.Random) -> tuple[int, bytes]:
    """A type of GGUF's and a value of it."""
    kind = rng.choice((*SCALARS, STRING, STRING, ARRAY, ARRAY))
    if kind == STRING:
        text = rng.choice(STRINGS).encode("utf-8", "surrogatepass")
        return kind, packed(rng.choice((text, text, b"\xff\xfe")))
    if kind == ARRAY:
        of, length = rng.choice((0, 4, 5, 6, STRING)), rng.choice((0, 1, 2, 300))
        items = [any_scalar(rng, of) if of != STRING else packed(b"a") for _ in range(length)]
        claimed = rng.choice((length, length, length, 1 << 40))
        return kind, struct.pack("<IQ", of, claimed) + b"".join(items)
    return kind, any_scalar(rng, kind)


def any_scalar(rng: random.Random, kind: int) -> bytes:
    code = SCALARS[kind]
    size = struct.calcsize("<" + code)
    if code in "fd":
        value = rng.choice(FLOATS)
        return struct.pack("<" + code, value if code == "d" or abs(value) < 1e38 else value)
    return (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")


def change_values(gguf: Gguf, rng: random.Random) -> None:
    """A value of the header is another, of another type, gone, or there twice."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        value = rng.choice(gguf.values)
        match rng.randrange(8):
            case 0:
                gguf.values.remove(value)
            case 1:
                gguf.values.append(list(value))
            case 2:
                name = rng.choice((b"split.count", b"general.alignment", b"tokenizer.ggml.pre"))
                gguf.values.append([name, *any_value(rng)])
            case 3 if value[1] in SCALARS:
                value[2] = any_scalar(rng, value[1])
            case 4 if value[1] == ARRAY:
                value[2] = change_bytes(value[2], rng)
            case _:
                value[1:] = any_value(rng)
        if not gguf.values:
            break


def change_tensors(gguf: Gguf, rng: random.Random) -> None:
    """A row of the table of tensors has another name, shape, type or offset, or is gone."""
    tensor, other = rng.choice(gguf.tensors), rng.choice(gguf.tensors)
    match rng.randrange(9):
        case 0:
            gguf.tensors.remove(tensor)
        case 1:
            tensor[0] = rng.choice((other[0], b"", b"\xff", b"a\nb", b"blk.x.attn_q.weight"))
        case 2:
            tensor[1][rng.randrange(len(tensor[1]))] = rng.choice(NUMBERS) % (1 << 64)
        case 3:
            tensor[1] = rng.choice((tensor[1][::-1], tensor[1][:1], [*tensor[1], 1], other[1], []))
        case 4:
            tensor[2] = rng.choice((*range(42), 999))
        case 5:
            tensor[3] = rng.choice(NUMBERS) % (1 << 64)
        case 6:
            tensor[3] += rng.choice((1, 4, 16, 32, 4096, -tensor[3]))
        case 7:
            tensor[3] = other[3]
        case 8:
            gguf.tensors.append(list(tensor))


def overlap(gguf: Gguf, rng: random.Random) -> None:
    first, second = rng.sample(gguf.tensors, 2)
    first[3] = second[3]


def misalign(gguf: Gguf, rng: random.Random) -> None:
    rng.choice(gguf.tensors)[3] += rng.randrange(1, 32)


def in_gguf(change: Callable[[Gguf, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def mutation(path: Path, rng: random.Random) -> None:
        gguf = Gguf(path.read_bytes())
        change(gguf, rng)
        path.write_bytes(gguf.joined())

    return mutation


def gguf_header_bytes(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(change_bytes(data, rng, within=len(data) - len(Gguf(data).data)))


def gguf_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(change_bytes(path.read_bytes(), rng))


def gguf_nan(path: Path, rng: random.Random) -> None:
    """A float32 tensor has a value that is not finite."""
    data = bytearray(path.read_bytes())
    gguf = Gguf(bytes(data))
    tensor = rng.choice([t for t in gguf.tensors if t[2] == 0 and t[0] != b"rope_freqs.weight"])
    size = 1
    for dimension in tensor[1]:
        size *= dimension
    at = len(data) - len(gguf.data) + tensor[3] + 4 * rng.randrange(size)
    data[at : at + 4] = struct.pack("<f", rng.choice(FLOATS[-3:]))
    path.write_bytes(data)


def gguf_big_endian(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4] + data[4:8][::-1] + data[8:])


# Directories


def weight_file(path: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path.glob("*.safetensors")))


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def safetensors_header(path: Path, rng: random.Random) -> None:
    file = weight_file(path, rng)
    header, data = split_safetensors(file.read_bytes())
    file.write_bytes(join_safetensors(change_json_text(json.dumps(header).encode(), rng), data))


def safetensors_bytes(path: Path, rng: random.Random) -> None:
    file = weight_file(path, rng)
    within = rng.choice((None, 8, 2000))
    file.write_bytes(change_bytes(file.read_bytes(), rng, within))


def safetensors_nan(path: Path, rng: random.Random) -> None:
    """A float16 weight is not finite."""
    file = weight_file(path, rng)
    header, data = split_safetensors(file.read_bytes())
    changed = bytearray(data)
    at = 2 * rng.randrange(len(changed) // 2)
    changed[at : at + 2] = struct.pack("<e", rng.choice(FLOATS[-3:]))
    file.write_bytes(join_safetensors(json.dumps(header).encode(), bytes(changed)))


def index_path(path: Path, rng: random.Random) -> None:
    """The index names a path to a file that is there and whole."""
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    else:
        header, _ = split_safetensors(files[0].read_bytes())
        weight_map = {name: files[0].name for name in header if name != "__metadata__"}
    moved = rng.choice(files)
    shutil.move(moved, path.parent / "outside.safetensors")
    named = rng.choice(("../outside.safetensors", str(path.parent / "outside.safetensors")))
    for name, file in weight_map.items():
        if file == moved.name:
            weight_map[name] = named
    index.write_text(json.dumps({"weight_map": weight_map}))


def index_values(path: Path, rng: random.Random) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return config_json(path, rng)
    index.write_bytes(change_json_text(index.read_bytes(), rng))


def config_json(path: Path, rng: random.Random) -> None:
    file = path / "config.json"
    file.write_bytes(change_json_text(file.read_bytes(), rng))


def config_fields(path: Path, rng: random.Random) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(change_json(json.loads(file.read_text()), rng)))


def tokenizer(path: Path, rng: random.Random) -> None:
    file = path / "tokenizer.json"
    if file.exists():
        file.write_bytes(change_json_text(file.read_bytes(), rng))
    else:
        file = path / "tokenizer.model"
        file.write_bytes(change_bytes(file.read_bytes(), rng))


def tokenizer_settings(path: Path, rng: random.Random) -> None:
    """One of the files is another, or a new one with tokens is there and is another."""
    file = path / rng.choice(("tokenizer_config.json", "generation_config.json", *TOKEN_FILES))
    settings = json.loads(file.read_text()) if file.exists() else {}
    if rng.random() < 0.5:
        settings |= TOKEN_FILES.get(file.name, {"added_tokens_decoder": ADDED_TOKENS})
    file.write_bytes(change_json_text(json.dumps(settings).encode(), rng))


def template(path: Path, rng: random.Random) -> None:
    file = path / "chat_template.jinja"
    data = file.read_bytes() if file.exists() else b"{{ messages }}"
    file.write_bytes(rng.choice((change_bytes(data, rng), rng.randbytes(50), data + b"\xff")))


def any_file_bytes(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path.iterdir()))
    file.write_bytes(change_bytes(file.read_bytes(), rng))


def lost_file(path: Path, rng: random.Random) -> None:
    """A file is gone, or something else has its name."""
    file = rng.choice(sorted(path.iterdir()))
    file.unlink()
    match rng.randrange(4):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to(file)
        case 2:
            file.symlink_to("gone")


# What tests/tiny_checkpoints.py has no files of: tokens that go on where its vocabularies end.
ADDED_TOKENS = {"262": {"content": "<new>", "lstrip": False, "normalized": False, "special": True}}
TOKEN_FILES = {
    "added_tokens.json": {"<new>": 262, "<newer>": 263},
    "special_tokens_map.json": {
        "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>",
        "additional_special_tokens": ["<s>", "<new>"],
    },
}  # fmt: skip
OF_GGUF = {
    "values": in_gguf(change_values),
    "tensors": in_gguf(change_tensors),
    "overlap": in_gguf(overlap),
    "misaligned": in_gguf(misalign),
    "header": gguf_header_bytes,
    "bytes": gguf_bytes,
    "not finite": gguf_nan,
    "big-endian": gguf_big_endian,
}
OF_DIRECTORY = {
    "config": config_json,
    "config fields": config_fields,
    "index": index_values,
    "index to a path": index_path,
    "safetensors header": safetensors_header,
    "safetensors": safetensors_bytes,
    "not finite": safetensors_nan,
    "tokenizer": tokenizer,
    "settings": tokenizer_settings,
    "template": template,
    "bytes": any_file_bytes,
    "lost": lost_file,
}
# Those that nothing good can come of: reading one is a fault.
HOPELESS = "overlap", "misaligned", "not finite", "big-endian", "index to a path"
# Often what has most to get wrong: for a file, and for a directory.
KINDS = {
    False: [*OF_GGUF, "values", "values", "values", "tensors", "header"],
    True: [*OF_DIRECTORY, "config fields", "config fields", "tokenizer", "safetensors header"],
}


def mutate(path: Path, kind: str, rng: random.Random) -> None:
    """Change the checkpoint at `path` in place."""
    (OF_DIRECTORY if path.is_dir() else OF_GGUF)[kind](path, rng)
